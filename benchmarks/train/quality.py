"""What every architecture learns from the same tokens, beside the peers that have it: figures at equal L0.

    python -m benchmarks.train.quality --acts STORE --site layers.4 --latents 4096 --tokens 2000000 -o DIR

One `saemill train` trains all of saemill's SAEs. Each peer trains its own through its own loop on the same
activations in the same order (`benchmarks/train/contestants/`), one process per architecture. All are then
measured by one yardstick: `saemill assess` on the files that each package saved, on held-out rows.

Recipes are each package's own: saemill's defaults; sparsify's defaults; dictionary_learning's demo (unit
norm, lr 3e-4, decay over the last fifth); SAELens' defaults with its normalisation of activations, b_dec
started at the mean, and JumpReLU in Anthropic's setting. Warm-ups that are longer than the run become shares
of it (the contestants say which).

With a k, `--l0` is it. Where a penalty decides, each package gets a list of weights that is to span these L0
(`--levels saelens.relu=1,3,10` replaces one); saemill's and dictionary_learning's JumpReLU take a target.
Compared is at equal measured L0: an SAE within 5% of it, or between two neighbours, linearly in log L0
(`benchmarks/train/equal_l0.py`). "–" where a package's SAEs do not reach an L0: add levels.

Runs and assessments that are finished in DIR are not run again, also after a change of `--levels`. The result
is `DIR/results.md`, raw figures in `DIR/results.json`.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks.settings import OWN_OF_PEERS, ROOT, keep_settings
from benchmarks.train import contest, quality_tables, rows
from benchmarks.train.contest import MEMBERS, Entry
from benchmarks.train.quality_tables import Trained
from benchmarks.train.sweep import runs_of
from benchmarks.train.yardstick import Yardstick
from saemill.common.durable import hash_json
from saemill.common.stores import runs

PEERS = {
    "sparsify": Entry("sparsify", (), "defaults", "one", members=("topk",)),
    "saelens": Entry(
        "saelens", ("--normalise", "--b-dec", "mean", "--anthropic"), "normalised, b_dec = mean", "lr"
    ),
    "dictionary_learning": Entry("dictionary_learning", ("--demo",), "its demo's recipe", "all"),
}
LEVELS = {
    "saemill.relu": (0.01, 0.02, 0.04, 0.07, 0.12, 0.2),
    "saemill.gated": (0.02, 0.04, 0.07, 0.12, 0.2, 0.35),
    "saelens.jumprelu": (0.05, 0.12, 0.3, 0.7, 1.5, 3),
    "saelens.relu": (0.5, 0.8, 1.3, 2, 3.5, 6),
    "saelens.gated": (0.8, 1.3, 2, 3.5, 6, 10),
    "dictionary_learning.relu": (0.02, 0.035, 0.06, 0.1, 0.18, 0.3),
    "dictionary_learning.gated": (0.02, 0.04, 0.08, 0.15, 0.25, 0.4),
}
"""Weights of penalties, by contestant and architecture; the others take the L0 themselves."""
SETTINGS = {"jumprelu": "target_l0", "relu": "l1_coefficient", "gated": "l1_coefficient"}
"""saemill's setting of the level; k in the others."""


def levels(args: argparse.Namespace, contestant: str, member: str) -> list[float]:
    """List the levels of a contestant's SAEs of an architecture."""
    name = f"{contestant}.{member}"
    return list((LEVELS | args.levels).get(name, args.l0))


def train_saemill(args: argparse.Namespace) -> dict[str, list[Trained]]:
    """Train all of saemill's SAEs in one run. Returns: the SAEs by architecture."""
    variants = [
        {"architecture": member, "name": f"{member}-{level:g}", SETTINGS.get(member, "k"): whole(level)}
        for member in args.members
        for level in levels(args, "saemill", member)
    ]
    settings: dict[str, Any] = {"site": [args.site], "num_latents": [args.latents], "variants": variants}
    settings |= {"max_tokens": args.tokens, "batch_size": args.batch, "device": args.device}
    out = args.out / f"saemill-{hash_json(settings)}"
    if not runs.is_finished(out):
        config = args.out / "saemill.yaml"
        config.write_text(yaml.safe_dump({"train": settings}))
        command = [sys.executable, "-m", "saemill", "train", str(args.acts), "--config", str(config)]
        print(out.name, flush=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": str(ROOT)}
        if status := subprocess.run([*command, "-o", str(out)], env=environment).returncode:
            raise SystemExit(f"saemill train ended with status {status}")
    seconds = runs.finished(out).seconds / len(variants)
    return {
        member: [
            Trained("saemill", member, level, out / f"{member}-{level:g}", seconds)
            for level in levels(args, "saemill", member)
        ]
        for member in args.members
    }


def whole(level: float) -> float | int:
    """Turn a number without a fraction into an int, as a k is one."""
    return int(level) if level == int(level) else level


def train_peer(args: argparse.Namespace, name: str, member: str) -> Iterator[Trained]:
    """Train a peer's SAEs of an architecture, together or one at a time. Yields: them."""
    entry = PEERS[name]
    goals = [(member, f"{level:g}", "auto") for level in levels(args, name, member)]
    for group in runs_of(entry, goals):
        run = "-".join([name, member, *(level for _, level, _ in group)])
        options = {"goals": ",".join(":".join(goal) for goal in group), "threads": args.threads}
        options |= {"steps": args.tokens // args.batch, "save": (args.out / "saes" / run).absolute()}
        result = contest.run(args, entry, run, options)
        seconds = sum(result["step_seconds"]) / len(group)
        for number, (_, level, _) in enumerate(group):
            folder = options["save"] / (f"trainer_{number}" if name == "dictionary_learning" else str(number))
            yield Trained(name, member, float(level), folder, seconds)


def assess(args: argparse.Namespace, trained: list[Trained], yardstick: list[Yardstick]) -> None:
    """Measure the SAEs that are not measured yet, and fill in their figures.

    Args:
        trained: of one contestant and architecture.
        yardstick: the one in use; empty before the first that is needed.
    """
    files = [args.out / "assessed" / f"{sae.name}-{hash_json(str(sae.folder))}.json" for sae in trained]
    todo = {sae.name: sae.folder for sae, file in zip(trained, files, strict=True) if not file.exists()}
    if todo:
        print("assess", *todo, flush=True)
        if not yardstick:
            yardstick.append(Yardstick(args.acts, args.site, args.assess_tokens, args.model_tokens))
        found = yardstick[0].measure(todo)
        files[0].parent.mkdir(exist_ok=True)
        for sae, file in zip(trained, files, strict=True):
            if sae.name in found:
                file.write_text(json.dumps(found[sae.name]))
    for sae, file in zip(trained, files, strict=True):
        sae.figures.update(json.loads(file.read_text()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    listed = {"type": lambda text: text.split(",")}
    parser.add_argument("--acts", type=Path, required=True, help="an activation store with held-out rows")
    parser.add_argument("--site", required=True)
    parser.add_argument("--latents", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=2_000_000, help="of training; read again after the end")
    parser.add_argument("--batch", type=int, default=1024, help="tokens per step")
    parser.add_argument("--l0", type=numbers, default=[16.0, 32.0, 64.0, 128.0])
    parser.add_argument("--levels", action="append", default=[], metavar="CONTESTANT.MEMBER=X,…")
    parser.add_argument("--members", default=list(MEMBERS), help="comma-separated; all by default", **listed)
    parser.add_argument("--contestants", default=["saemill", *PEERS], help="comma-separated", **listed)
    parser.add_argument("--assess-tokens", type=int, default=200_000, help="for FVU, L0 and dead latents")
    parser.add_argument("--model-tokens", type=int, default=30_000, help="for the model's losses")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--peers-python", type=Path, default=OWN_OF_PEERS)
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    for what, known in (("members", MEMBERS), ("contestants", ("saemill", *PEERS))):
        if unknown := set(getattr(args, what)) - set(known):
            parser.error(f"unknown {what} {sorted(unknown)}; there are {', '.join(known)}")
    pairs = [text.partition("=") for text in args.levels]
    args.levels = {name: numbers(values) for name, _, values in pairs}
    names = {f"{contestant}.{member}" for contestant in args.contestants for member in args.members}
    if unknown := args.levels.keys() - names:
        parser.error(f"--levels of {sorted(unknown)}: it is CONTESTANT.MEMBER=X,…, as saelens.relu=1,3,10")
    return args


def numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def main() -> None:
    args = parse()
    keep_settings(args, "levels", "members", "l0")
    source = argparse.Namespace(acts=args.acts, site=args.site, rows=args.tokens, held_out=8192)
    words = rows.make(args.out / "rows", source)
    own = train_saemill(args) if "saemill" in args.contestants else {}
    yardstick: list[Yardstick] = []
    every: list[Trained] = []
    for member in args.members:
        for name in args.contestants:
            if name != "saemill" and member not in PEERS[name].members:
                continue
            trained = own[member] if name == "saemill" else list(train_peer(args, name, member))
            assess(args, trained, yardstick)
            every += trained
    (args.out / "results.json").write_text(json.dumps([sae.plain for sae in every], default=str))
    lines = quality_tables.lines(args, words, every)
    (args.out / "results.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
