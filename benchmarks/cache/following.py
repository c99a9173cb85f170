"""What a run that follows a store loses by it: how its batches mix, and the error of its SAEs.

    python -m benchmarks.cache.following --model MODEL --text TEXT -o DIR [--tokens 600000]

Mixing: batches over a store of random rows that tell their address, 2,097,152 tokens in shards of 65,536: of
the stream over the whole store, and of followers whose groups are 1, 4 and 16 shards.

Error: TEXT is tokenized and cached in shards of 8,192 tokens at one layer of MODEL; the same SAEs are trained
on the whole store and by followers, with several seeds, and measured on held-out tokens. A finished store
gives a follower the stream that it would have had while it was filled, so nothing has to be timed. The result
is `DIR/results.md`, raw figures in `DIR/results.json`.
"""

import argparse
import json
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

import saemill
from benchmarks.cache import mixing
from benchmarks.cache import store as stores
from benchmarks.cache.store import NOTHING_LEFT_OUT, SITE
from benchmarks.report import machine, table
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.followed import FollowedStore
from saemill.train.stream.epochs import open_epochs
from saemill.train.stream.following import open_following

MIXED_TOKENS, MIXED_WIDTH = 1 << 21, 16
SIZES: dict[str, Any] = {"batch_tokens": 4096, "buffer_tokens": 262_144, "seed": 0}
GROUPS = (1, 4, 16)
"""Shards per group of the followers whose mixing is measured."""
SHARD_TOKENS = 8192
TRAINED_GROUPS = (1, 8, 32)
"""Shards per group of the followers whose SAEs are measured."""
SAES: dict[str, Any] = {
    "k": [16, 64], "num_latents": 2048, "seeds": [0, 1], "batch_size": 2048, "eval_tokens": 20_000,
    "log_every": 10, "precision": "fp32", "device": "cpu",
}  # fmt: skip


def mixed(path: Path) -> dict[str, dict[str, float]]:
    """Measure how batches mix, by the way in which the store is read."""
    figures = {}
    for name, group in {"the whole store": None, **{_of_group(n): n for n in GROUPS}}.items():
        if group is None:
            loader = open_epochs(ActivationStore(path), [SITE], NOTHING_LEFT_OUT, **SIZES)
        else:
            followed = FollowedStore(path, group * ActivationStore(path).shard_tokens)
            loader = open_following(followed, [SITE], NOTHING_LEFT_OUT, units=None, **SIZES)
        with closing(loader):
            n_batches = loader.epoch_tokens // loader.batch_tokens
            batches = [stores.addresses(loader.batch(i)[SITE]) for i in range(n_batches)]
        figures[name] = mixing.measure(np.stack(batches))
    figures["a full shuffle, expected"] = mixing.of_full_shuffle(MIXED_TOKENS, SIZES["batch_tokens"])
    return figures


def _of_group(n_shards: int) -> str:
    return f"a follower, groups of {n_shards} {'shard' if n_shards == 1 else 'shards'}"


def trained(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Train the same SAEs on the whole store and by followers. Return their last figures, by the way of
    reading."""
    text = {"tokenizer": args.model, "max_tokens": args.tokens, "held_out_fraction": 0.1}
    tokens = saemill.tokenize_text(args.text, args.out / "tokens", **text)
    acts = saemill.cache_activations(
        tokens, args.out / "acts", model=args.model, layers=[args.layer], shard_tokens=SHARD_TOKENS
    )
    ways: dict[str, dict[str, Any]] = {"the whole store": {}}
    for n_shards in TRAINED_GROUPS:
        ways[_of_group(n_shards)] = {"follow": True, "follow_tokens": n_shards * SHARD_TOKENS}
    found = {}
    for number, (name, settings) in enumerate(ways.items()):
        run = saemill.train_saes(
            acts, args.out / f"run-{number}", site=acts.sites[0], eval_every=100, **SAES, **settings
        )
        found[name] = [
            {"variant": variant} | dict(last) for variant, last in run.metrics[-1]["variants"].items()
        ]
    return found


def report(results: dict[str, Any]) -> list[str]:
    """Write both tables."""
    rows = [
        [name, *(f"{figures[key]:.2f}" for key in ("same", "next", "documents"))]
        for name, figures in results["mixing"].items()
    ]
    lines = [
        "Rows of a row's own document in its batch and in the next one, documents in a batch of 4,096:",
        "",
    ]
    lines += table(["read as", "same batch", "next batch", "documents"], rows, 1)
    lines += ["FVU and dead share on held-out tokens, for each k the mean of the seeds and their spread:", ""]
    rows = []
    for name, saes in results["trained"].items():
        cells = [name]
        for k in SAES["k"]:
            of_k = [sae for sae in saes if f"-k{k}-" in sae["variant"]]
            for key in ("eval_fvu", "eval_dead_fraction"):
                values = [sae[key] for sae in of_k]
                cells.append(f"{np.mean(values):.4f} ± {np.ptp(values) / 2:.4f}")
        rows.append(cells)
    head = [f"{what}, k {k}" for k in SAES["k"] for what in ("FVU", "dead")]
    return [*lines, *table(["read as", *head], rows, 1), machine()]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="causal model with its tokenizer: hub id or folder")
    parser.add_argument("--text", required=True, help="dataset: a file or hub id")
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=600_000)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for stores, runs and results")
    return parser.parse_args()


def main() -> None:
    """Measure mixing, train, write the tables."""
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        figures = mixed(stores.make(Path(folder), MIXED_TOKENS, MIXED_WIDTH))
    results = {"mixing": figures, "trained": trained(args)}
    lines = report(results)
    (args.out / "results.md").write_text("\n".join(lines))
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
