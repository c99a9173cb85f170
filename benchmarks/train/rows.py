"""The rows that all contestants read: planted directions, or activations out of a store.

A folder gets `train.npy` and `held_out.npy` (float32 [rows, D]) and `statistics.npz` (mean and total
variance of the training rows). A planted row is 32 of 4,096 random directions, each times a random
positive coefficient, plus little noise and a constant mean five times its spread.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.mask import TrainingMask
from saemill.common.stores.statistics import Moments
from saemill.train.stream.epochs import open_epochs

DIRECTIONS, ACTIVE, NOISE, MEAN = 4096, 32, 0.02, 1.0
CHUNK = 4096
SEED = 7_919_777
"""No seed that a contestant starts from: one with the same generator, shape and seed would start with
the planted directions as its decoder."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say where the rows come from."""
    parser.add_argument("--width", type=int, default=768, help="D of planted rows")
    parser.add_argument("--rows", type=int, default=262_144, help="training rows; read again after the end")
    parser.add_argument("--held-out", type=int, default=8192, help="held-out rows")
    parser.add_argument("--fp32", action="store_true", help="do not round planted rows to bf16")
    parser.add_argument("--acts", type=Path, help="an activation store, in place of planted rows")
    parser.add_argument("--site", help="a site of that store")


def make(folder: Path, args: argparse.Namespace) -> str:
    """Write the folder's files unless they are there. Returns: the rows in words."""
    if (args.acts is None) != (args.site is None):
        raise SystemExit("give --acts and --site together")
    if args.acts is None:
        words = f"planted rows, D = {args.width}" + (", not rounded" if args.fp32 else ", rounded to bf16")
    else:
        words = f"activations at {args.site} of {args.acts.name}"
    if not (folder / "statistics.npz").exists():
        folder.mkdir(parents=True, exist_ok=True)
        chunks = planted(args) if args.acts is None else stored(args)
        write(folder, chunks, args)
    return words


def write(folder: Path, chunks: Iterator[tuple[str, Tensor]], args: argparse.Namespace) -> None:
    """Write chunks of rows for "train" and "held_out", each file full or cut to what there is. The rows go to
    disk chunk by chunk, as all of them may be more than memory holds."""
    n_rows = {"held_out": args.held_out, "train": args.rows}
    n_written = dict.fromkeys(n_rows, 0)
    moments: Moments | None = None
    for name, x_TD in chunks:
        x_TD = x_TD.float()[: n_rows[name] - n_written[name]]
        with (folder / f"{name}.f32").open("ab" if n_written[name] else "wb") as file:
            file.write(x_TD.numpy().tobytes())
        n_written[name] += len(x_TD)
        if name == "train":
            moments = moments or Moments(x_TD.shape[1])
            moments.add(x_TD)
    assert moments is not None
    for name, n in n_written.items():
        raw = folder / f"{name}.f32"
        np.save(folder / f"{name}.npy", np.memmap(raw, np.float32, "r", shape=(n, len(moments.mean_D))))
        raw.unlink()
    statistics = moments.statistics()
    np.savez(
        folder / "statistics.npz",
        mean=statistics.mean_D.numpy(),
        variance=np.array(statistics.total_variance),
    )


def planted(args: argparse.Namespace) -> Iterator[tuple[str, Tensor]]:
    """Draw chunks of planted rows: the held-out ones, then the training ones."""
    generator = torch.Generator().manual_seed(SEED)
    directions = torch.randn(DIRECTIONS, args.width, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    mean_D = MEAN * torch.randn(args.width, generator=generator)
    for name, n_rows in (("held_out", args.held_out), ("train", args.rows)):
        for _ in range(0, n_rows, CHUNK):
            index = torch.randint(DIRECTIONS, (CHUNK, ACTIVE), generator=generator)
            weight = 0.5 + torch.rand(CHUNK, ACTIVE, generator=generator)
            x_TD = embedding_bag(index, directions, per_sample_weights=weight, mode="sum") + mean_D
            x_TD += NOISE * torch.randn(CHUNK, args.width, generator=generator)
            yield name, x_TD if args.fp32 else x_TD.bfloat16().float()


def stored(args: argparse.Namespace) -> Iterator[tuple[str, Tensor]]:
    """Read chunks of a store's held-out rows in their order, then of its training rows as training sees
    them."""
    store = ActivationStore(args.acts)
    site = store.site(args.site)
    for shard in range(store.n_shards):
        offsets = np.flatnonzero(store.keep_addresses(shard, store.mask, held_out=True))
        yield "held_out", site.gather(shard, offsets)
    loader = open_epochs(
        store,
        [args.site],
        store.mask,
        norm_over_median=TrainingMask().norm_over_median,
        batch_tokens=CHUNK,
        buffer_tokens=262_144,
        seed=0,
    )
    for i in range(min(args.rows, loader.epoch_tokens) // CHUNK):
        yield "train", loader.batch(i)[args.site]
    loader.close()
