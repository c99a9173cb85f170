"""What short formats cost: the same SAEs trained with other products and other moments.

    python -m benchmarks.train.precision --acts STORE --site layers.4 --latents 4096 --k 32,128 -o DIR

Same seeds, same stream; the figure is the FVU of the last log line, the mean over the last 10 steps.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.report import machine
from saemill.train.config import TrainConfig
from saemill.train.run import run

PRECISIONS, STATES = ("fp32", "bf16"), ("fp32", "bf16", "8bit")


def train(args: argparse.Namespace, precision: str) -> dict[str, dict[str, float]]:
    """Train each variant, all together. Returns: their last metrics."""
    variants = tuple(
        {"k": k, "num_latents": args.latents, "optimizer_state": state, "name": f"{state}-{k}"}
        for k in args.k
        for state in STATES
    )
    out = args.out / precision
    settings: dict[str, Any] = {"acts": args.acts, "out": out, "site": (args.site,), "variants": variants}
    run(TrainConfig(**settings, max_tokens=args.tokens, precision=precision, log_every=10))
    metrics: dict[str, dict[str, float]] = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])[
        "variants"
    ]
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--acts", type=Path, required=True)
    parser.add_argument("--site", required=True)
    parser.add_argument("--latents", type=int, default=4096)
    parser.add_argument("--k", type=lambda text: [int(k) for k in text.split(",")], default=[32, 128])
    parser.add_argument("--tokens", type=int, default=128 * 4096)
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    metrics = {precision: train(args, precision) for precision in PRECISIONS}
    lines = [machine(), "", f"{args.latents} latents, {args.tokens:,} tokens, lr auto", ""]
    lines += ["| product | moments | " + " | ".join(f"FVU, k {k}" for k in args.k) + " |"]
    lines += ["|---|---|" + "--:|" * len(args.k)]
    for precision in PRECISIONS:
        for state in STATES:
            cells = []
            for k in args.k:
                fvu, exact = metrics[precision][f"{state}-{k}"]["fvu"], metrics["fp32"][f"fp32-{k}"]["fvu"]
                cells.append(f"{fvu:.5f} ({fvu / exact - 1:+.2%})")
            lines.append(f"| {precision} | {state} | " + " | ".join(cells) + " |")
    (args.out / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
