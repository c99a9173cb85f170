"""What `saemill plan` says beside what the stages then take: bytes, memory, seconds, of three pipelines.

    python -m benchmarks.scale.plan --causal MODEL --encoder MODEL --embeddings FILE --text FILE -o DIR

Each stage is a process of its own, as a user would run it. CPU seconds are those of the process and hardly
depend on what else the machine does; seconds by the clock do. The result is `DIR/results.md`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import saemill.cli  # noqa: F401  what the command's own process has imported, and no more
from benchmarks.report import machine, table
from saemill.common import durable

if TYPE_CHECKING:
    from saemill.plan.planner import Planned

MEANWHILE = "meanwhile"
"""Word in the names of what is on the disk only while a stage runs."""
STAGES = ("tokenize", "cache", "train", "assess")


@dataclass(frozen=True)
class Took:
    """What a stage took."""

    n_bytes: int
    peak_bytes: int
    seconds: float
    cpu_seconds: float


def pipelines(args: argparse.Namespace, out: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The settings of each pipeline; folders are named, so that stages can be run by hand."""
    folders = {
        name: {"tokens": out / name / "tokens", "acts": out / name / "acts", "run": out / name / "run"}
        for name in ("causal", "encoder", "embeddings")
    }

    def of_model(name: str, model: str, cache: dict[str, Any], train: dict[str, Any]) -> dict[str, Any]:
        here = folders[name]
        return {
            "tokenize": {
                "dataset": args.text, "tokenizer": model, "out": here["tokens"], "ctx_len": 256,
                "max_tokens": args.max_tokens,
            },
            "cache": {"tokens": here["tokens"], "model": model, "out": here["acts"], **cache},
            "train": {"acts": here["acts"], "out": here["run"], **train},
            "assess": {"run": here["run"]},
        }  # fmt: skip

    train = {"site": ["layers.2", "layers.4"], "k": [16, 32], "expansion_factor": [8], "epochs": 4}
    mixed = {
        "num_latents": [3072],
        "epochs": 2,
        "architecture": ["topk", "batchtopk", "jumprelu"],
        "k": [32],
        "target_l0": [32.0],
    }
    embedded = folders["embeddings"]
    return {
        "causal": of_model("causal", args.causal, {"layers": [2, 4]}, train),
        "encoder": of_model("encoder", args.encoder, {"layers": [3]}, mixed),
        "embeddings": {
            "train": {
                "acts": embedded["acts"], "out": embedded["run"], "k": [16, 32], "num_latents": [1536],
                "batch_size": 256, "epochs": 6,
            },
            "assess": {"run": embedded["run"]},
        },
    }  # fmt: skip


def run(command: list[str]) -> tuple[float, float, int]:
    """Run a command; return its seconds, its CPU seconds and the most memory that it held.

    The memory is read while it runs: what the kernel tells afterwards begins with this process's own.
    """
    start, peak_bytes, ended = time.perf_counter(), 0, 0
    process = subprocess.Popen([sys.executable, "-m", "saemill", *command], stdout=subprocess.DEVNULL)
    status = Path(f"/proc/{process.pid}/status")
    while not ended:
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                peak_bytes = int(line.split()[1]) * 1024
        time.sleep(0.05)
        ended, code, usage = os.wait4(process.pid, os.WNOHANG)
    if code != 0:
        raise SystemExit(f"{' '.join(command)} failed with status {code}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, peak_bytes


def take(stage: str, config: Path, out: Path) -> Took:
    """Run one stage of a config, and measure it."""
    before = durable.folder_bytes(out)
    seconds, cpu_seconds, peak_bytes = run([stage, "--config", str(config)])
    return Took(durable.folder_bytes(out) - before, peak_bytes, seconds, cpu_seconds)


def cells(name: str, planned: "Planned", took: Took) -> list[list[str]]:
    """Lines of the table for one stage."""
    outlook, estimated = planned
    assert estimated is not None
    there = sum(n for what, n in outlook.disk.items() if MEANWHILE not in what)
    pairs = [
        ("MiB on disk", there / 2**20, took.n_bytes / 2**20),
        ("MiB of memory", outlook.memory_bytes / 2**20, took.peak_bytes / 2**20),
        ("CPU seconds", estimated.cpu_seconds, took.cpu_seconds),
        ("seconds", estimated.seconds, took.seconds),
    ]
    return [
        [name, outlook.stage, what, f"{expected:,.1f}", f"{was:,.1f}", f"{expected / was:.2f}"]
        for what, expected, was in pairs
        if expected
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--causal", required=True, help="local folder or hub id of a causal model")
    parser.add_argument("--encoder", required=True, help="of an encoder")
    parser.add_argument("--embeddings", required=True, help="file of embeddings")
    parser.add_argument("--text", required=True, help="dataset to tokenize")
    parser.add_argument("--max-tokens", type=int, default=400_000)
    parser.add_argument("--only", nargs="+", default=["causal", "encoder", "embeddings"])
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    # Not above: the processes in which pieces are measured import this module too.
    from saemill.pipeline.run import chain_of
    from saemill.plan.run import of_chain

    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    lines: list[list[str]] = []
    for name, sections in pipelines(args, out).items():
        if name not in args.only:
            continue
        if "cache" not in sections:
            run(["import-activations", args.embeddings, "-o", str(sections["train"]["acts"])])
        config = out / f"{name}.yaml"
        config.write_text(yaml.safe_dump(json.loads(json.dumps(sections, default=str))))
        chain = chain_of(None, None, {}, config, is_plan=True)
        for planned in of_chain(chain):
            stage = planned.outlook.stage
            folder = Path(sections[stage].get("out") or sections[stage]["run"])
            lines += cells(name, planned, take(stage, config, folder))
            write(out, lines)
    print((out / "results.md").read_text())


def write(out: Path, lines: list[list[str]]) -> None:
    """Write the table of what is measured so far."""
    head = ["pipeline", "stage", "", "planned", "measured", "ratio"]
    (out / "results.md").write_text("\n".join([machine(), "", *table(head, lines, n_text=3)]) + "\n")


if __name__ == "__main__":
    main()
