"""What each form of a store costs: bytes, and the rates of its codec and of the training loader.

    python -m benchmarks.cache.forms --acts STORE --site layers.4 -o DIR [--rounds 5]

STORE holds real activations, best as fp32; each form is made of it by `saemill convert-store`, in DIR.

Codecs: the first shard's blocks, compressed one by one in one thread by CPU time. Which of Blosc's shuffles
helps depends on the activations: bits that are shuffled help lz4, and may hide from zstd's entropy coder the
few exponents that there are.

Reading: all shards of the raw bf16 store by plain `readinto`, from first to last byte, and an epoch of the
loader over each form, which checks, decompresses, shuffles and decodes; in turn, round after round, from the
page cache, by the CPU time of all threads. Shown are the rows per CPU second, and these as a share of the
plain reads' and of the loader's over raw bf16 in the same round; medians of the rounds. The result is
`DIR/forms.md`.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numcodecs.blosc
import numpy as np
import torch
from numcodecs.blosc import BITSHUFFLE, SHUFFLE, Blosc

from benchmarks.report import machine, table
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.forms.packing import BLOCK_TOKENS
from saemill.common.stores.mask import MaskConfig
from saemill.convert_store.config import ConvertConfig
from saemill.convert_store.run import run as convert
from saemill.train.stream.epochs import open_epochs

FORMS = {
    "bf16": {"dtype": "bf16", "compression": "raw"},
    "bf16 lz4": {"dtype": "bf16", "compression": "lz4"},
    "bf16 zstd": {"dtype": "bf16", "compression": "zstd"},
    "fp16": {"dtype": "fp16", "compression": "raw"},
    "fp16 zstd": {"dtype": "fp16", "compression": "zstd"},
    "int8": {"dtype": "int8", "compression": "raw"},
    "int8 zstd": {"dtype": "int8", "compression": "zstd"},
}
CODECS = [("lz4", 5, "bits"), ("lz4", 5, "bytes"), ("zstd", 1, "bits"), ("zstd", 3, "bits"),
          ("zstd", 1, "bytes"), ("zstd", 3, "bytes")]  # fmt: skip
SHUFFLES = {"bits": BITSHUFFLE, "bytes": SHUFFLE}
NOTHING_LEFT_OUT = MaskConfig(special_tokens=False, first_positions=0)
MIB = 2**20
WINDOW_TOKENS = 32_768
PLAIN = "plain reads of bf16"


def made(args: argparse.Namespace) -> dict[str, ActivationStore]:
    """Make the store of each form."""
    stores = {}
    for name, form in FORMS.items():
        out = args.out / name.replace(" ", "-")
        stores[name] = convert(ConvertConfig(source=args.acts, out=out, **form))
    return stores


def codec_rows(name: str, store: ActivationStore, site: str) -> Iterator[list[str]]:
    """Measure all codecs on the first shard of a raw store."""
    numcodecs.blosc.use_threads = False
    array = store.array(site)
    blocks = [np.array(array.block(0, block)) for block in range(array.array.n_blocks(0))]
    n_bytes, out = sum(block.nbytes for block in blocks), np.empty_like(blocks[0])
    for codec, level, shuffle in CODECS:
        blosc = Blosc(codec, level, SHUFFLES[shuffle])
        start = time.process_time()
        packed = [blosc.encode(block) for block in blocks]
        encoding, start = time.process_time() - start, time.process_time()
        for content, block in zip(packed, blocks, strict=True):
            blosc.decode(content, out=out[: len(block)])
        decoding = time.process_time() - start
        rates = [f"{n_bytes / seconds / MIB:,.0f}" for seconds in (encoding, decoding)]
        yield [name, f"{codec} {level}, {shuffle} shuffled", f"{sum(map(len, packed)) / n_bytes:.3f}", *rates]


def plain_rate(store: ActivationStore, site: str) -> float:
    """Read all shards' files into one buffer that is used again. Rows per CPU second."""
    array = store.array(site).array
    buffer = bytearray(16 * MIB)
    start = time.process_time()
    for shard in range(store.n_shards):
        with array.shard_path(shard).open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return store.n_tokens / (time.process_time() - start)


def loader_rate(store: ActivationStore, site: str, batch_tokens: int) -> float:
    """Read the whole batches of an epoch. Rows per CPU second."""
    sizes = {"batch_tokens": batch_tokens, "buffer_tokens": WINDOW_TOKENS, "seed": 0}
    with closing(open_epochs(store, [site], NOTHING_LEFT_OUT, **sizes)) as loader:
        start, n_batches = time.process_time(), loader.epoch_tokens // batch_tokens
        for i in range(n_batches):
            loader.batch(i)
        return n_batches * batch_tokens / (time.process_time() - start)


def rates(args: argparse.Namespace, stores: dict[str, ActivationStore]) -> dict[str, list[float]]:
    """Measure the rates of plain reads of raw bf16 and of the loader over each form, round by round."""
    found: dict[str, list[float]] = {PLAIN: [], **{name: [] for name in stores}}
    for number in range(args.rounds + 1):
        round_rates = {PLAIN: plain_rate(stores["bf16"], args.site)}
        round_rates |= {name: loader_rate(store, args.site, args.batch) for name, store in stores.items()}
        for name, rate in (
            round_rates.items() if number else ()
        ):  # the first compiles and fills the page cache
            found[name].append(rate)
    return found


def report(args: argparse.Namespace) -> list[str]:
    """Measure everything and render it."""
    stores = made(args)
    source, raw = ActivationStore(args.acts).array(args.site), stores["bf16"].array(args.site)
    lines = [machine(), ""]
    lines += [f"{source.store.n_tokens:,} rows of {source.width} values, blocks of {BLOCK_TOKENS} rows", ""]
    head = ["stored rows", "codec", "of the bytes", "packing, MiB/s", "unpacking, MiB/s"]
    every = [row for name in ("bf16", "fp16", "int8") for row in codec_rows(name, stores[name], args.site)]
    lines += table(head, every)
    found = rates(args, stores)
    rows = []
    for name, store in stores.items():
        shares = (
            statistics.median(mine / theirs for mine, theirs in zip(found[name], found[other], strict=True))
            for other in (PLAIN, "bf16")
        )
        rate = statistics.median(found[name])
        size = store.array(args.site).n_bytes / raw.n_bytes
        rows.append([name, f"{size:.3f}", f"{rate / 1e6:.2f}", *(f"{share:.2f}" for share in shares)])
    head = ["form", "of bf16's bytes", "million rows per CPU s", "÷ plain reads", "÷ loader of bf16"]
    return lines + table(head, rows, n_text=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--acts", type=Path, required=True)
    parser.add_argument("--site", required=True)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4096)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    text = "\n".join(report(args))
    (args.out / "forms.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
