"""What `peers`, `members`, `sweep` and `quality` share: contestants, their processes, cells of tables."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.settings import OWN_OF_PEERS, ROOT

MEMBERS = ("topk", "batchtopk", "matryoshka", "jumprelu", "relu", "gated")
"""Architectures, by saemill's names."""
LONG = ["--dead-after", "10000000"]
"""For a few timed steps: latents count as dead as late as in a long run, and as with all peers."""


@dataclass(frozen=True)
class Entry:
    """A contestant: a package with one choice of settings."""

    module: str
    arguments: tuple[str, ...]
    setting: str
    """In words."""
    together: str
    """Which SAEs train in one process: all, those of one lr, or one at a time."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    members: tuple[str, ...] = MEMBERS
    """The architectures that it has."""


CONTESTANTS = {
    "saemill": Entry("saemill", (), "defaults", "all"),
    "sparsify-signum": Entry("sparsify", (), "defaults", "one", members=("topk",)),
    "sparsify-adam": Entry("sparsify", ("--optimizer", "adam"), "Adam", "one", members=("topk",)),
    "sparsify-autocast": Entry(
        "sparsify",
        ("--optimizer", "adam", "--autocast"),
        "Adam, bf16 autocast put around its loop",
        "one",
        ("cpu",),
        ("topk",),
    ),
    "saelens": Entry("saelens", (), "defaults (fp32)", "lr"),
    "saelens-bf16": Entry("saelens", ("--autocast", "--b-dec", "mean"), "bf16 autocast, b_dec = mean", "lr"),
    "saelens-sparse": Entry(
        "saelens",
        ("--autocast", "--sparse", "--b-dec", "mean"),
        "bf16 autocast, sparse activations, no norm rescaling, b_dec = mean",
        "lr",
        members=("topk",),
    ),
    "dictionary_learning": Entry("dictionary_learning", (), "defaults (fp32)", "all"),
    "dictionary_learning-bf16": Entry(
        "dictionary_learning", ("--dtype", "bf16"), "bf16 autocast", "all", ("cuda",)
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that both benchmarks take."""
    parser.add_argument("--contestants", help="comma-separated; all by default: " + ", ".join(CONTESTANTS))
    parser.add_argument("--latents", type=int, default=6144)
    parser.add_argument("--batch", type=int, default=4096, help="tokens per step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="of a speed run")
    parser.add_argument("--warmup", type=int, default=3, help="of these, not counted")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--peers-python", type=Path, default=OWN_OF_PEERS)
    parser.add_argument("-o", "--out", type=Path, required=True)


def chosen(args: argparse.Namespace) -> dict[str, Entry]:
    """Choose the contestants of this run, by name."""
    names = args.contestants.split(",") if args.contestants else list(CONTESTANTS)
    unknown = [name for name in names if name not in CONTESTANTS]
    if unknown:
        raise SystemExit(f"unknown contestants {unknown}; there are {list(CONTESTANTS)}")
    return {name: CONTESTANTS[name] for name in names if args.device in CONTESTANTS[name].devices}


def run(args: argparse.Namespace, entry: Entry, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Run one process of a contestant. Returns: what it reported. A finished run is not run again."""
    path = args.out / "runs" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        options = {key: value for key, value in options.items() if value is not None}
        python = sys.executable if entry.module == "saemill" else str(args.peers_python)
        shared = {"data": args.out.absolute() / "rows", "latents": args.latents, "batch": args.batch}
        shared |= {"device": args.device, "out": path.absolute()} | options
        extra = LONG if entry.module == "saemill" and "warmup" in options else []
        command = [python, "-m", f"benchmarks.train.contestants.{entry.module}", *entry.arguments, *extra]
        command += [word for key, value in shared.items() for word in (f"--{key}", str(value))]
        print(name, flush=True)
        threads = str(options["threads"])
        offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
        environment = os.environ | offline | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), threads)
        with path.with_suffix(".log").open("w") as log:
            status = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log).returncode
        if status != 0:
            raise SystemExit(f"{name} ended with status {status}; see {path.with_suffix('.log')}")
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def machine(results: Iterable[dict[str, Any]]) -> str:
    """Describe the machine, the versions of what ran, and the date."""
    versions: dict[str, str] = {}
    gpus = set()
    for result in results:
        versions |= result["versions"]
        gpus |= {result["gpu"]} if result["gpu"] else set()
    return report.machine(versions, gpus)


def median_of(results: list[dict[str, Any]], key: str) -> float:
    """Compute the median over rounds."""
    return statistics.median(result[key] for result in results)


def rate_cells(
    results: list[dict[str, Any]], saemill_results: list[dict[str, Any]] | None, key: str
) -> tuple[str, str]:
    """Format a contestant's rate, and its share of saemill's."""
    rate = median_of(results, key)
    return f"{rate:,.0f}", f"{rate / median_of(saemill_results, key):.2f}" if saemill_results else "–"


def memory_cell(results: list[dict[str, Any]]) -> str:
    """Format peak memory in MiB: of the process, that after its imports, and of the GPU if there is one."""
    mib = [max(r[key] for r in results) / 2**20 for key in ("peak_rss_bytes", "rss_after_import_bytes")]
    gpu = max(r["cuda_peak_bytes"] for r in results) / 2**20
    return f"{mib[0]:,.0f} ({mib[1]:,.0f})" + (f", GPU {gpu:,.0f}" if gpu else "")
