"""Another tree of saemill beside this one: the same bytes, and how fast each trains them.

    python -m benchmarks.train.trees OTHER_TREE -o DIR

A refactoring proves itself with it: `git worktree add OTHER_TREE COMMIT` has the tree from before. Both train
the same runs over the same stores, in turns: a grid over two sites and two widths, several widths of one
site, SGD, moments in bf16 and 8 bits, losses in both units, AuxK at work, accumulated batches, halving with a
variant that diverges, and two processes in every way. Compared are the SAEs' tensors, their cfg.json and the
metrics but for the times.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.report import machine, table
from saemill.demo import MODEL, TEXT

ROOT = Path(__file__).parents[2]
D_WIDE = 256
"""Width of the planted rows: wide enough for products in 8 bits, where a CPU has them."""
COMMON = "--batch-size 1024 --max-tokens 60k --log-every 5 --dead-after-tokens 4k --device cpu"
RUNS = {
    "two sites, two widths": "two --site layers.1,layers.2 --k 8,32 --num-latents 512,768",
    "four widths of one site": "wide --k 16 --num-latents 768,1024,1536,2048",
    "sgd": "wide --k 16 --optimizer sgd --lr 0.3 --weight-decay 0.01",
    "bf16 moments, median": "wide --k 16 --optimizer-state bf16 --b-dec-init geometric_median",
    "8-bit moments, mse": "wide --k 16 --optimizer-state 8bit --loss mse --auxk-alpha 0.1 --k-aux 40",
    "float32, accumulated": "two --site layers.1 --k 16 --precision fp32 --grad-acc-steps 2",
    "halving, one diverges": "wide --k 16 --lr 0.001,0.01,0.1,1e3 --halving 2",
}
OF_TWO = {
    "two processes, dealt": "two --site layers.1,layers.2 --k 8,32 --latent-ranks 1",
    "two processes, latents split": "wide --k 8,32 --latent-ranks 2",
    "two processes, tokens split": "wide --k 8,32 --data-ranks 2 --latent-ranks 1",
}
"""Each begins with its store."""


def saemill(tree: Path, arguments: list[str], n_processes: int = 1) -> float:
    """Run a command of a tree. CPU seconds of its processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_processes)]
    command = [sys.executable, *(launcher if n_processes > 1 else []), "-m", "saemill", *arguments]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tree)}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{tree}: saemill {' '.join(arguments)} failed\n{done.stdout}{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def make_stores(out: Path, tree: Path) -> None:
    """Two sites of the demo's model, and planted rows that are wider."""
    if not (out / "two").exists():
        tokens = ["--tokenizer", str(MODEL), "--ctx-len", "128", "--max-tokens", "80k"]
        saemill(tree, ["tokenize", str(TEXT), *tokens, "-o", str(out / "tokens")])
        model = ["--model", str(MODEL), "--layers", "1,2"]
        saemill(tree, ["cache", str(out / "tokens"), *model, "-o", str(out / "two")])
    if not (out / "wide").exists():
        random = np.random.default_rng(0)
        directions = random.standard_normal((800, D_WIDE)).astype(np.float32)
        rows = 0.05 * random.standard_normal((30_000, D_WIDE)).astype(np.float32)
        for _ in range(12):
            rows += random.random((len(rows), 1), np.float32) * directions[random.integers(0, 800, len(rows))]
        np.save(out / "rows.npy", rows)
        saemill(tree, ["import-activations", str(out / "rows.npy"), "-o", str(out / "wide")])


def content(run: Path) -> str:
    """A hash of a run's SAEs and of its metrics without times."""
    digest = hashlib.sha256()
    for file in sorted([*run.glob("*/sae.safetensors"), *run.glob("*/cfg.json")]):
        digest.update(file.read_bytes())
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        digest.update(
            json.dumps(
                {k: v for k, v in record.items() if "second" not in k and k != "tokens_per_s"}
            ).encode()
        )
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, help="a checkout of another commit")
    parser.add_argument("--kernels", default="numba")
    parser.add_argument("--rounds", type=int, default=1, help="of each run by each tree, for the times")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    trees = {"other": args.other.absolute(), "this": ROOT}
    make_stores(args.out, trees["other"])
    rows = []
    for name, words in (RUNS | OF_TWO).items():
        store, *options = words.split()
        folder = args.out / name.replace(" ", "-").replace(",", "")
        seconds: dict[str, list[float]] = {which: [] for which in trees}
        for turn in range(args.rounds):
            for which, tree in trees.items():
                run = folder / f"{which}-{turn}"
                command = ["train", str(args.out / store), "-o", str(run), *options, *COMMON.split()]
                command += ["--kernels", args.kernels]
                if "--num-latents" not in options:
                    command += ["--num-latents", "1024"]
                seconds[which].append(saemill(tree, command, 2 if name in OF_TWO else 1))
        hashes = {content(folder / f"{which}-{turn}") for which in trees for turn in range(args.rounds)}
        other, this = (min(seconds[which]) for which in trees)
        same = "same bytes" if len(hashes) == 1 else "DIFFERENT"
        rows.append([name, same, f"{other:.1f}", f"{this:.1f}", f"{this / other:.2f}"])
        print(*rows[-1], flush=True)
    head = ["run", "SAEs and metrics", "other, CPU s", "this, CPU s", "this / other"]
    lines = [machine(), "", f"kernels {args.kernels}, least of {args.rounds}", "", *table(head, rows)]
    (args.out / "trees.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
