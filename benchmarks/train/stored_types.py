"""What int8 costs: errors of the activations, and FVU and ΔCE of SAEs that are trained on them.

    python -m benchmarks.train.stored_types --model MODEL --text TEXT --layer 3 -o DIR [--tokens 400k]

The activations are cached once, as fp32; `saemill convert-store` makes of them the bf16 and the int8 store
that `saemill cache` would have made. SAEs of two architectures, two k and two seeds are trained on each,
with the same seeds, stream and recipe, and assessed on the same held-out tokens, with the model's losses.

Error: mean squared error of the held-out activations over their variance, in all and of the dimension where
it is largest. What is finished in DIR is not done again. The result is `DIR/stored_types.md`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import machine, table
from saemill.assess.config import AssessConfig
from saemill.assess.run import run as assess
from saemill.cache.config import CacheConfig
from saemill.cache.run import run as cache
from saemill.common.config import resolve
from saemill.common.stores import assessments, runs
from saemill.common.stores.activations import ActivationStore
from saemill.convert_store.config import ConvertConfig
from saemill.convert_store.run import run as convert
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.run import run as tokenize
from saemill.train.config import TrainConfig
from saemill.train.run import run as train

DTYPES = ("bf16", "int8")
ARCHITECTURES, KS, SEEDS = ("topk", "batchtopk"), (16, 64), (0, 1)


def stores_of(args: argparse.Namespace) -> dict[str, ActivationStore]:
    """Make the stores, by type; fp32 is the truth."""
    tokens = {"dataset": str(args.text), "tokenizer": str(args.model), "out": args.out / "tokens"}
    tokens |= {"ctx_len": 256, "max_tokens": args.tokens}
    tokenize(resolve(TokenizeConfig, "tokenize", tokens, None, ()))
    fp32 = args.out / "fp32"
    cache(
        CacheConfig(
            tokens=args.out / "tokens", model=str(args.model), out=fp32, layers=(args.layer,), dtype="fp32",
            shard_tokens=32_768, device="cpu",
        )
    )  # fmt: skip
    stores = {"fp32": ActivationStore(fp32)}
    return stores | {
        dtype: convert(ConvertConfig(source=fp32, out=args.out / dtype, dtype=dtype)) for dtype in DTYPES
    }


def errors(store: ActivationStore, truth: ActivationStore) -> list[str]:
    """Measure the error of a store's held-out activations: in all, and of the worst dimension."""
    (site,) = store.sites
    keep = np.concatenate([store.keep_addresses(s, store.mask, held_out=True) for s in range(store.n_shards)])
    true_TD, found_TD = (
        each.read(site, 0, each.n_tokens)[torch.from_numpy(keep)].double() for each in (truth, store)
    )
    error_D, variance_D = (true_TD - found_TD).square().mean(0), true_TD.var(0, unbiased=False)
    return [f"{error_D.sum() / variance_D.sum():.1e}", f"{(error_D / variance_D).max():.1e}"]


def assessed(args: argparse.Namespace, store: ActivationStore, dtype: str) -> dict[str, dict[str, Any]]:
    """Train on a store and assess: the figures by variant."""
    out = args.out / f"run-{dtype}"
    if not runs.is_finished(out):
        settings = {"acts": store.path, "out": out, "site": store.sites[0], "architecture": ARCHITECTURES}
        settings |= {"k": KS, "seeds": SEEDS, "num_latents": args.latents, "max_tokens": args.train_tokens}
        train(resolve(TrainConfig, "train", settings | {"batch_size": 2048, "device": "cpu"}, None, ()))
    if not (out / assessments.FILE).exists():
        assess(
            AssessConfig(
                run=out, model=str(args.model), device="cpu", model_tokens=args.loss_tokens, n_latents=0
            )
        )
    return {entry["name"]: entry["metrics"] for entry in assessments.read(out)["variants"]}


def figures(found: dict[str, dict[str, dict[str, Any]]], metric: str) -> list[list[str]]:
    """Compare a metric: the mean over seeds for each type, how far int8 is off bf16 with the same seed, and
    how far seeds are apart."""
    rows = []
    names = sorted({name.rpartition("-s")[0] for name in found["bf16"]})
    for name in names:
        bf16, int8 = (
            np.array([found[dtype][f"{name}-s{seed}"][metric]["value"] for seed in SEEDS]) for dtype in DTYPES
        )
        off = ", ".join(f"{value:+.1e}" for value in int8 - bf16)
        rows.append([name, metric, f"{bf16.mean():.5f}", f"{int8.mean():.5f}", off, f"{np.ptp(bf16):.1e}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--train-tokens", type=int, default=600_000)
    parser.add_argument("--loss-tokens", type=int, default=20_000)
    parser.add_argument("--latents", type=int, default=1024)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    stores = stores_of(args)
    found = {dtype: assessed(args, stores[dtype], dtype) for dtype in DTYPES}
    (args.out / "stored_types.json").write_text(json.dumps(found, indent=1))
    lines = [machine(), ""]
    sizes = {dtype: stores[dtype].array(stores[dtype].sites[0]).n_bytes for dtype in DTYPES}
    lines += table(
        ["stored as", "of bf16's bytes", "error", "error, worst dimension"],
        [[d, f"{sizes[d] / sizes['bf16']:.3f}", *errors(stores[d], stores["fp32"])] for d in DTYPES],
        n_text=1,
    )
    head = ["SAE", "metric", "bf16", "int8", "int8 − bf16, by seed", "between seeds"]
    lines += table(head, [row for metric in ("fvu", "delta_ce") for row in figures(found, metric)])
    (args.out / "stored_types.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
