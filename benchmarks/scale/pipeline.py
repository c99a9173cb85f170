"""The whole pipeline on real input, stage by stage: time, peak memory, and what training together costs.

    python -m benchmarks.scale.pipeline --model MODEL --train-text FILE --valid-text FILE -o DIR

Each stage is a process of its own, as a user would run it. Training 8 variants together is compared with
training one alone. The result is `DIR/results.md`.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.report import machine


@dataclass(frozen=True)
class Measured:
    """One process: what it took."""

    name: str
    seconds: float
    peak_mib: float


def measure(out: Path, name: str, command: str) -> Measured:
    """Run a command; measure its wall time and the largest memory it held.

    The measurement is kept in `out`, so that a benchmark that was cut off goes on at its next stage.
    """
    file = out / f"{name}.json"
    if file.exists():
        return Measured(**json.loads(file.read_text()))
    print(f"\n$ {command}", flush=True)
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", *shlex.split(command)])
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{name} failed with status {status}")
    measured = Measured(name, time.perf_counter() - start, usage.ru_maxrss / 1024)
    file.write_text(json.dumps(asdict(measured)))
    return measured


def last_metrics(run: Path) -> dict[str, float]:
    """Read the last line of a run's metrics and its summary."""
    finished = json.loads((run / "finished.json").read_text())
    return {"tokens": finished["tokens"], "seconds": finished["seconds"]}


def main() -> None:
    """Run all stages and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="local folder or hub id of a causal model")
    parser.add_argument("--train-text", required=True, help="dataset to train on")
    parser.add_argument("--valid-text", required=True, help="dataset to assess on")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--layers", default="2,4")
    parser.add_argument("--site", default="layers.4")
    parser.add_argument("--max-tokens", default="2M")
    parser.add_argument("--ctx-len", default="512")
    args = parser.parse_args()
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    tokenize = f"saemill tokenize --tokenizer {args.model} --ctx-len {args.ctx_len}"
    train = f"saemill train {out}/acts --site {args.site}"
    stages = [
        measure(out, name, command)
        for name, command in {
            "tokenize": f"{tokenize} --max-tokens {args.max_tokens} -o {out}/tokens {args.train_text}",
            "tokenize, validation": f"{tokenize} --held-out-fraction 0 -o {out}/valid {args.valid_text}",
            "cache": f"saemill cache {out}/tokens --model {args.model} --layers {args.layers} -o {out}/acts",
            "train, 8 variants": f"{train} --k 16,32,64,128 --expansion-factor 8,16 -o {out}/run",
            "assess": f"saemill assess {out}/run --tokens {out}/valid",
        }.items()
    ]
    measure(out, "one variant", f"{train} --k 32 --expansion-factor 8 --max-tokens 400k -o {out}/single")
    write(out, stages)


def write(out: Path, stages: list[Measured]) -> None:
    """Write the tables as Markdown."""
    lines = [machine(), "", "| stage | seconds | peak memory, MiB |", "|---|--:|--:|"]
    lines += [f"| {stage.name} | {stage.seconds:,.1f} | {stage.peak_mib:,.0f} |" for stage in stages]
    many, one = last_metrics(out / "run"), last_metrics(out / "single")
    many_rate, one_rate = (m["tokens"] / m["seconds"] for m in (many, one))
    lines += [
        "",
        "| | tokens/s |",
        "|---|--:|",
        f"| training 1 variant (k 32, expansion 8) | {one_rate:,.0f} |",
        f"| training 8 variants together, tokens | {many_rate:,.0f} |",
        f"| training 8 variants together, variant-tokens | {8 * many_rate:,.0f} |",
        "",
    ]
    assessment = json.loads((out / "run" / "on-valid" / "final_assessment.json").read_text())
    lines += assessment_table(assessment)
    (out / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def assessment_table(assessment: dict) -> list[str]:  # type: ignore[type-arg]
    """Render the variants, best first, with 95% intervals."""

    def cell(figure: dict) -> str:  # type: ignore[type-arg]
        if figure["value"] is None:
            return "–"
        interval = f" ({figure['lo']:.3f}–{figure['hi']:.3f})" if figure.get("lo") is not None else ""
        return f"{figure['value']:.3f}{interval}"

    names = ("fvu", "delta_ce", "kl", "loss_recovered", "dead_fraction", "max_decoder_cosine")
    data = assessment["data"]
    lines = [
        f"{data['n_tokens']:,} tokens of {data['n_documents']:,} documents ({data['chosen']}), losses on "
        f"{data['n_tokens_with_losses']:,}; best: {assessment['best_variant']}",
        "",
        f"| variant | {' | '.join(names)} | verdict |",
        f"|---{'|---' * len(names)}|---|",
    ]
    for entry in assessment["variants"]:
        cells = " | ".join(cell(entry["metrics"][name]) for name in names)
        lines.append(f"| {entry['name']} | {cells} | {entry['verdict']} |")
    return lines


if __name__ == "__main__":
    main()
