"""The training loader alone, beside plain sequential reads of the same bytes; and how well its batches mix.

    python -m benchmarks.cache.loader -o DIR [--tokens 2097152] [--readers 1,2,3,4]

A store is made in DIR, read in every way, and removed; no model is needed. Plain: `preadv` of all shards in
their order, 4,096 rows at a time into a buffer that is used again. The loader: all batches of an epoch,
nothing done with them; beside reading, it compares each block with its hash and shuffles. Each has 1, 2, …
threads that read, in a process of its own; they take turns, round after round. Cold: each shard was synced
and dropped from the page cache (`fsync`, `posix_fadvise(POSIX_FADV_DONTNEED)`) while no process mapped it; a
disk with a cache of its own, as that of a virtual machine, may still answer from there. Warm: all shards were
read just before. Whether a read came from the disk is told by Linux's count of bytes fetched.

Waiting: a trainer that does nothing for 10 ms after each batch, how long the next one takes, and the memory
that the loader adds to the process's peak, beside the two windows that it is to hold. Its first two windows
are in memory that is new to the process; where the host of a virtual machine took free memory back, that
takes longer than the reading.

Mixing: how many other rows of a batch are of a row's own document, and how many of the next batch; how many
documents a batch has; and χ² of the places of its rows in their documents, per degree of freedom, which is
1 where they are drawn at random. The result is `DIR/results.md`, raw figures in `DIR/results.json`.
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from benchmarks.cache import mixing
from benchmarks.cache import store as stores
from benchmarks.cache.store import DOCUMENT_TOKENS, NOTHING_LEFT_OUT, SITE
from benchmarks.report import machine, table
from saemill.common.outlook import process_bytes
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.forms.packing import BLOCK_TOKENS
from saemill.common.stores.permutation import permutation
from saemill.common.stores.shards import as_numpy
from saemill.common.stores.site_array import SiteArray
from saemill.train.memory import zeros
from saemill.train.stream import loader as stream
from saemill.train.stream.epochs import open_epochs
from saemill.train.stream.loader import Loader

PIECE_ROWS = 4096
"""Rows per plain read."""
N_WINDOWS = 3
"""Windows of which the loader's work is timed."""
STEP_SECONDS = 0.01
"""What a trainer does with a batch, while it is timed how long it waits for them."""
GIB = 2**30


@dataclass(frozen=True)
class Task:
    """What a process reads, and how."""

    path: Path
    """The store."""
    batch_tokens: int
    buffer_tokens: int
    n_readers: int = 1


@dataclass(frozen=True)
class Measured:
    """What one pass over all bytes took."""

    seconds: float
    first_s: float
    """Until the first batch or piece was there."""
    cpu_s: float
    """Of all threads."""
    disk_bytes: int
    """Fetched from the disk; the others were in the page cache."""


def shard_files(path: Path) -> list[Path]:
    """List the files of the shards in their order."""
    return sorted((path / SITE / "c").glob("*/0"), key=lambda file: int(file.parent.name))


def evict(path: Path) -> None:
    """Drop the shards from the page cache."""
    for file in shard_files(path):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def disk_bytes() -> int:
    """Count the bytes that this process has fetched from the disk so far."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["read_bytes"])


def timed(batches: Iterator[object]) -> Measured:
    """Go through all batches."""
    before, start, cpu = disk_bytes(), time.perf_counter(), time.process_time()
    next(batches)
    first_s = time.perf_counter() - start
    for _ in batches:
        pass
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    return Measured(seconds, first_s, cpu_s, disk_bytes() - before)


def plain(task: Task) -> Measured:
    """Read all shards, from first to last byte."""
    files = shard_files(task.path)
    piece_bytes = PIECE_ROWS * ActivationStore(task.path).site(SITE).width * 2
    local = threading.local()
    descriptors = [os.open(file, os.O_RDONLY) for file in files]
    pieces = [(d, at) for d in descriptors for at in range(0, os.fstat(d).st_size, piece_bytes)]

    def read(piece: tuple[int, int]) -> int:
        if not hasattr(local, "buffer"):
            local.buffer = bytearray(piece_bytes)
        return os.preadv(piece[0], [local.buffer], piece[1])

    def read_all() -> Iterator[int]:
        yield from pool.map(read, pieces)  # starts when the first piece is asked for

    with ThreadPoolExecutor(task.n_readers) as pool:
        measured = timed(read_all())
    for descriptor in descriptors:
        os.close(descriptor)
    return measured


def loader_of(task: Task) -> Loader:
    """Open the training loader over the store."""
    torch.set_num_threads(1)
    stream.READERS = task.n_readers
    sizes = {"batch_tokens": task.batch_tokens, "buffer_tokens": task.buffer_tokens}
    return open_epochs(ActivationStore(task.path), [SITE], NOTHING_LEFT_OUT, **sizes, seed=0)


def epoch(loader: Loader) -> Iterator[torch.Tensor]:
    """Read the whole batches of the first epoch."""
    return (loader.batch(i)[SITE] for i in range(loader.epoch_tokens // loader.batch_tokens))


def loaded(task: Task) -> Measured:
    """Read an epoch of batches from the loader."""
    with closing(loader_of(task)) as loader:
        return timed(epoch(loader))


def paced(task: Task) -> dict[str, float]:
    """Read an epoch as a trainer does that takes `STEP_SECONDS` for a batch: how long it waits for batches,
    and by how much the loader raises the process's peak of memory. The first two windows are apart: their
    memory is new."""
    with closing(loader_of(task)) as loader:
        before, batches, waits = process_bytes(), epoch(loader), []
        while True:
            start = time.perf_counter()
            if next(batches, None) is None:
                break
            waits.append(time.perf_counter() - start)
            time.sleep(STEP_SECONDS)
        n_bytes = process_bytes() - before
    windows, n_new = 2 * task.buffer_tokens * loader.sites[SITE].columns * 2, 2 * task.buffer_tokens
    later = waits[n_new // task.batch_tokens + 1 :]
    return {
        "new_s": sum(waits) - sum(later),
        "median_s": statistics.median(later),
        "mean_s": statistics.mean(later),
        "most_s": max(later),
        "bytes": n_bytes,
        "share_of_windows": n_bytes / windows,
    }


def mixed(task: Task) -> dict[str, dict[str, float]]:
    """Measure how batches mix: of the loader, of rows in their stored order, and of rows in the order of the
    text."""
    with closing(loader_of(task)) as loader:
        shuffled = np.concatenate([stores.addresses(x_TD) for x_TD in epoch(loader)])
        store = loader.store
    if not np.array_equal(np.unique(shuffled), np.sort(shuffled)):
        raise SystemExit("the loader gave a row twice in one epoch")
    size = store.shard_tokens
    stored = np.concatenate([s * size + store.permutation(s) for s in range(store.n_shards)])
    orders = {"the loader": shuffled, "stored order": stored, "order of the text": np.arange(store.n_tokens)}
    cut = len(shuffled)
    figures = {
        name: mixing.measure(order[:cut].reshape(-1, task.batch_tokens)) for name, order in orders.items()
    }
    figures["a full shuffle, expected"] = mixing.of_full_shuffle(store.n_tokens, task.batch_tokens)
    figures["the loader, expected"] = mixing.of_windows(
        store.n_tokens, size, task.batch_tokens, task.buffer_tokens
    )
    return figures


def work_seconds(task: Task) -> dict[str, float]:
    """Measure the CPU seconds per GiB of each piece of the loader's work, by one thread: medians of warm
    windows."""
    torch.set_num_threads(1)
    store = ActivationStore(task.path)
    per_shard, n_blocks = store.shard_tokens // BLOCK_TOKENS, task.buffer_tokens // BLOCK_TOKENS
    order = permutation(store.n_shards * per_shard, 0)
    windows = [order[i : i + n_blocks] for i in range(0, len(order) - n_blocks + 1, n_blocks)]
    site = store.site(SITE)
    timings = [
        window_seconds(site, [divmod(int(number), per_shard) for number in window], task.batch_tokens)
        for window in windows[:N_WINDOWS]
    ]
    return {name: statistics.median(window[name] for window in timings) for name in timings[0]}


def window_seconds(site: SiteArray, blocks: list[tuple[int, int]], batch_tokens: int) -> dict[str, float]:
    """Time each piece of the loader's work on one window's blocks. A buffer is new when it is first
    written."""
    n_rows = len(blocks) * BLOCK_TOKENS
    rows: list[NDArray[Any]] = []
    shuffled = zeros(n_rows, site.columns, dtype=site.stored)
    places = stream.Places.of(permutation(n_rows, 1))
    each = [places.of_rows(start, start + BLOCK_TOKENS) for start in range(0, n_rows, BLOCK_TOKENS)]

    def read() -> None:
        rows.extend(site.array.block(*block) for block in blocks)

    def check() -> None:
        for block in rows:
            xxhash.xxh3_64_intdigest(block.data)

    def deal() -> None:
        for block, own in zip(rows, each, strict=True):
            as_numpy(shuffled)[own.place_N] = block

    def cut() -> None:
        for start in range(0, n_rows, batch_tokens):
            torch.empty(batch_tokens, site.columns, dtype=site.stored).copy_(
                shuffled[start : start + batch_tokens]
            )

    def seconds_per_gib(work: Callable[[], None]) -> float:
        start = time.process_time()
        work()
        return (time.process_time() - start) * GIB / shuffled.nbytes

    works = {
        "read blocks, into new memory": read,
        "hash each block": check,
        "deal rows to their places in a new window": deal,
        "deal them to the same window again": deal,
        "cut batches": cut,
    }
    return {name: seconds_per_gib(work) for name, work in works.items()}


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run work in a process of its own, so that no other map or buffer is in the way."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def measure(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Measure all kinds of reading, in turns."""
    sizes = {"batch_tokens": args.batch, "buffer_tokens": args.buffer}
    passes: list[dict[str, Any]] = []
    for turn in range(args.rounds):
        for n_readers in args.readers:
            task = Task(path, n_readers=n_readers, **sizes)
            for cache in ("cold", "warm"):
                for reader in (plain, loaded):
                    if cache == "cold":
                        evict(path)
                    print(f"round {turn + 1}, {cache}, {n_readers} readers, {reader.__name__}", flush=True)
                    about = {"turn": turn, "cache": cache, "readers": n_readers, "way": reader.__name__}
                    passes.append(about | asdict(alone(reader, task)))
    task = Task(path, n_readers=1, **sizes)
    n_bytes = sum(file.stat().st_size for file in shard_files(path))
    return {
        "bytes": n_bytes,
        "passes": passes,
        "paced": _paced(path, task),
        "parts": alone(work_seconds, task),
        "mixing": alone(mixed, task),
    }


def _paced(path: Path, task: Task) -> dict[str, dict[str, float]]:
    """Measure a trainer's waits from the disk and from the page cache."""
    evict(path)
    return {cache: alone(paced, task) for cache in ("cold", "warm")}


def paced_table(results: dict[str, Any]) -> list[str]:
    """Render what a trainer waits for, and the memory."""
    rows = [
        [
            cache,
            f"{found['new_s']:.2f}",
            *(f"{1000 * found[key]:.2f}" for key in ("median_s", "mean_s", "most_s")),
            f"{found['bytes'] / GIB:.2f}",
            f"{found['share_of_windows']:.2f}",
        ]
        for cache, found in results["paced"].items()
    ]
    head = [
        "page cache",
        "s in all for two windows, in new memory",
        "ms per later batch, median",
        "mean",
        "most",
    ]
    return table([*head, "peak of memory, GiB", "÷ two windows"], rows, 1)


def speed_table(args: argparse.Namespace, results: dict[str, Any]) -> list[str]:
    """Render rates, their ratio round by round, and what they took."""
    gib = results["bytes"] / GIB

    def values(cache: str, readers: int, reader: str, key: str) -> list[float]:
        chosen = {"cache": cache, "readers": readers, "way": reader}
        return [p[key] for p in results["passes"] if chosen.items() <= p.items()]

    rows = []
    for cache in ("cold", "warm"):
        alone_s = values(cache, args.readers[0], "plain", "seconds")
        for n in args.readers:
            seconds = {reader: values(cache, n, reader, "seconds") for reader in ("plain", "loaded")}
            rates = [f"{gib * 1024 / statistics.median(seconds[reader]):,.0f}" for reader in seconds]
            ratios = [
                sorted(p / own for p, own in zip(reads, seconds["loaded"], strict=True))
                for reads in (seconds["plain"], alone_s)
            ]
            cells = [f"{statistics.median(r):.2f} ({r[0]:.2f}–{r[-1]:.2f})" for r in ratios]
            cpu_s = [statistics.median(values(cache, n, reader, "cpu_s")) / gib for reader in seconds]
            disk = [statistics.median(values(cache, n, w, "disk_bytes")) / results["bytes"] for w in seconds]
            first_s = statistics.median(values(cache, n, "loaded", "first_s"))
            shares = " / ".join(f"{share:.0%}" for share in disk)
            cpu = " / ".join(f"{spent:.2f}" for spent in cpu_s)
            rows.append([cache, str(n), *rates, *cells, f"{first_s:.2f}", cpu, shares])
    head = ["page cache", "readers", "plain, MiB/s", "loader, MiB/s", "of plain with as many readers (range)"]
    head += [f"of plain with {args.readers[0]}", "s to the loader's first batch"]
    return table([*head, "CPU-s per GiB, plain / loader", "from disk, plain / loader"], rows, 1)


def mixing_table(results: dict[str, Any]) -> list[str]:
    """Render the figures of `mixing`, by order."""
    columns = {
        "same": "other rows of a row's document in its batch",
        "next": "rows of it in the next batch",
        "documents": "documents in a batch",
        "positions": "χ² of places in documents, per degree of freedom",
    }
    rows = [
        [name, *(f"{figures[key]:,.3f}" if key in figures else "" for key in columns)]
        for name, figures in results["mixing"].items()
    ]
    return table(["order of rows", *columns.values()], rows, 1)


def report(args: argparse.Namespace, results: dict[str, Any]) -> list[str]:
    """Render all tables."""
    n_documents = args.tokens // DOCUMENT_TOKENS
    lines = [machine(), ""]
    lines += [
        f"{args.tokens:,} rows of D {args.width} in bf16, {results['bytes'] / GIB:.2f} GiB, in "
        f"{n_documents:,} documents of {DOCUMENT_TOKENS}; {args.batch:,} rows per batch, a window of "
        f"{args.buffer:,}; "
        f"{args.rounds} rounds, medians. Load of the machine at the end: {os.getloadavg()[0]:.1f}.",
        "",
    ]
    lines += speed_table(args, results)
    lines += [f"A trainer that takes {1000 * STEP_SECONDS:.0f} ms for a batch, one reader, waits:", ""]
    lines += paced_table(results)
    rows = [[name, f"{seconds:.2f}"] for name, seconds in results["parts"].items()]
    lines += table(["the loader's work on a warm window, one thread", "CPU-s per GiB"], rows, 1)
    return lines + mixing_table(results)


def parse() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2**21, help="rows of the store")
    parser.add_argument("--width", type=int, default=768, help="D")
    parser.add_argument(
        "--readers", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 3, 4]
    )
    parser.add_argument("--batch", type=int, default=4096, help="rows per batch")
    parser.add_argument("--buffer", type=int, default=262_144, help="rows per window of the loader")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder, on the disk to be measured")
    args = parser.parse_args()
    if args.tokens < 4 * args.buffer:
        parser.error("--tokens must be at least four times --buffer, since two windows are in new memory")
    if args.tokens % args.buffer or args.buffer % args.batch or args.batch % BLOCK_TOKENS:
        parser.error("--tokens must be a multiple of --buffer, that of --batch, and that of 256")
    return args


def main() -> None:
    """Make the store, read it, write the tables."""
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        path = alone(stores.make, Path(folder), args.tokens, args.width)
        results = measure(args, path)
    lines = report(args, results)
    (args.out / "results.md").write_text("\n".join(lines))
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
