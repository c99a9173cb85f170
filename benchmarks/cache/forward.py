"""Caching beside its limit, the bare forward pass, and beside SAELens' cache runner.

    python -m benchmarks.cache.forward --model MODEL --text TEXT [--dtypes fp32,bf16] -o DIR
    python -m benchmarks.cache.forward --model MODEL --width 768 --blocks 12 --text TEXT -o DIR

With a width and a number of blocks it takes MODEL's architecture and tokenizer in that size, with random
weights: products take as long as those of trained ones.

The bare pass is transformers' alone: the model without its head, cut off after the last block that is
cached, nothing kept. `saemill cache` writes the residual stream after one block, after three, and after all
of them, in bf16; its start counts, but for loading the model. SAELens' `CacheActivationsRunner` writes the
same single block in fp32, since Arrow has no bf16, with TransformerLens' model (its default) and with
transformers'; its start does not count. It takes part where the model is a GPT-NeoX. All run with one thread
and take turns; the best of each counts, in tokens per second of CPU time, which other programs disturb less.
saemill writes a shard in a thread of its own while the model computes the next one: beside a second core the
clock shows less of it, which the last column tells.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers

from benchmarks.report import machine, table
from benchmarks.settings import OWN_OF_PEERS
from saemill.cache.config import CacheConfig
from saemill.cache.run import run as cache
from saemill.common.models.model import LanguageModel
from saemill.common.models.structure import base_of, block_names
from saemill.common.stores.tokens import TokenStore
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.run import run as tokenize

BATCH_ROWS = 4
SAELENS = ("HookedTransformer", "AutoModel")
"""Classes of models that SAELens runs; names as its `model_class_name` begins."""
BY_CLOCK = "saemill / bare by the clock"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resized(args: argparse.Namespace) -> str:
    """Make a model of MODEL's architecture in another size, once, with heads of 64. Returns its folder."""
    folder = args.out / "model"
    if not folder.exists():
        config = transformers.AutoConfig.from_pretrained(args.model)
        config.update(
            {
                "hidden_size": args.width,
                "intermediate_size": 4 * args.width,
                "num_attention_heads": args.width // 64,
                "num_hidden_layers": args.blocks,
            }
        )
        transformers.set_seed(0)
        is_causal = any("CausalLM" in name for name in config.architectures or ())
        kind = transformers.AutoModelForCausalLM if is_causal else transformers.AutoModel
        kind.from_config(config).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(args.model).save_pretrained(folder)
    return str(folder)


def tokens_of(args: argparse.Namespace) -> TokenStore:
    """Tokenize the text once."""
    config = TokenizeConfig(
        dataset=args.text, tokenizer=args.model, out=args.out / "tokens", max_tokens=args.max_tokens,
        ctx_len=args.ctx_len,
    )  # fmt: skip
    return tokenize(config)


def blocks_of(model: str) -> list[str]:
    """List the model's blocks."""
    config = transformers.AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        return block_names(transformers.AutoModel.from_config(config))


class Seconds(NamedTuple):
    """What some work took."""

    cpu: float
    clock: float

    @classmethod
    def now(cls) -> "Seconds":
        """Read both clocks."""
        return cls(time.process_time(), time.perf_counter())

    def since(self, start: "Seconds") -> "Seconds":
        """Subtract an earlier reading, or what other work took."""
        return Seconds(self.cpu - start.cpu, self.clock - start.clock)


def bare_seconds(args: argparse.Namespace, store: TokenStore, dtype: str, n_blocks: int) -> Seconds:
    """Time forward passes over all rows through the first blocks; nothing is kept."""
    model = transformers.AutoModel.from_pretrained(args.model, dtype=DTYPES[dtype]).eval()
    base = base_of(model)
    last = block_names(base)[n_blocks - 1]
    parent, _, number = last.rpartition(".")
    holder, _, name = parent.rpartition(".")
    setattr(base.get_submodule(holder), name, base.get_submodule(parent)[: int(number) + 1])
    with torch.inference_mode():
        model(torch.from_numpy(store.rows(0, BATCH_ROWS).astype("int64")))
        start = Seconds.now()
        for row in range(0, store.n_rows, BATCH_ROWS):
            model(torch.from_numpy(store.rows(row, min(row + BATCH_ROWS, store.n_rows)).astype("int64")))
        return Seconds.now().since(start)


def cache_seconds(args: argparse.Namespace, store: TokenStore, dtype: str, sites: list[str]) -> Seconds:
    """Time `saemill cache` into a fresh folder, but for loading the model."""
    folder = Path(tempfile.mkdtemp(dir=args.out))
    config = CacheConfig(
        tokens=store.path, model=args.model, out=folder / "acts", sites=tuple(sites), batch_size=BATCH_ROWS,
        device="cpu", shard_tokens=args.shard_tokens, model_dtype=dtype,  # type: ignore[arg-type]
    )  # fmt: skip
    start = Seconds.now()
    LanguageModel(args.model, revision=None, dtype=DTYPES[dtype], device=torch.device("cpu"))
    loaded = Seconds.now()
    cache(config)
    seconds = Seconds.now().since(loaded).since(loaded.since(start))
    shutil.rmtree(folder)
    return seconds


def saelens_seconds(args: argparse.Namespace, store: TokenStore, dtype: str, block: str, by: str) -> Seconds:
    """Time SAELens' runner on the same rows, with a class of models, but for loading the model."""
    folder = Path(tempfile.mkdtemp(dir=args.out))
    np.save(folder / "ids.npy", store.rows(0, store.n_rows).astype("int64"))
    script = Path(__file__).with_name("saelens_runner.py")
    name = str(DTYPES[dtype]).removeprefix("torch.")
    command = [args.peers_python, script, folder, args.model, block, str(BATCH_ROWS), name, by]
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    shutil.rmtree(folder)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return Seconds(float(done.stdout.splitlines()[-1]), math.nan)


def measure(args: argparse.Namespace, store: TokenStore) -> dict[str, dict[str, float]]:
    """Take turns. Returns: the best tokens per CPU second, by what is cached and by who, and saemill's share
    of the bare pass by the clock."""
    blocks = blocks_of(args.model)
    third = len(blocks) // 3
    wanted = {"1": blocks[2 * third : 2 * third + 1], "3": blocks[third - 1 :: third][:3], "all": blocks}
    took: dict[tuple[str, str], list[Seconds]] = {}
    is_neox = transformers.AutoConfig.from_pretrained(args.model).model_type == "gpt_neox"
    peers = SAELENS if is_neox and args.peers_python.exists() else ()
    for turn in range(args.rounds):
        for dtype in args.dtypes:
            for what, sites in wanted.items():
                n_blocks = blocks.index(sites[-1]) + 1
                row = f"{what} of {len(blocks)} blocks, {dtype}"
                for who, seconds in (
                    ("bare", bare_seconds(args, store, dtype, n_blocks)),
                    ("saemill", cache_seconds(args, store, dtype, sites)),
                ):
                    took.setdefault((row, who), []).append(seconds)
                    print(turn, row, who, round(store.n_tokens / seconds.cpu), flush=True)
            for by in peers:
                row = f"1 of {len(blocks)} blocks, {dtype}"
                seconds = saelens_seconds(args, store, dtype, wanted["1"][0], by)
                took.setdefault((row, f"SAELens, {by}"), []).append(seconds)
    rates: dict[str, dict[str, float]] = {}
    for (row, who), every in took.items():
        rates.setdefault(row, {})[who] = store.n_tokens / min(seconds.cpu for seconds in every)
    for row, by in rates.items():
        bare, ours = (min(s.clock for s in took[row, who]) for who in ("bare", "saemill"))
        by[BY_CLOCK] = bare / ours
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, help="text file or dataset")
    parser.add_argument("--width", type=int, help="of a model of random weights, a multiple of 64")
    parser.add_argument("--blocks", type=int, help="of it")
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=list(DTYPES))
    parser.add_argument("--ctx-len", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=131_072)
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=16_384,
        help="of saemill; few, so that memory is used again, as in a long run",
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peers-python", type=Path, default=OWN_OF_PEERS)
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if (args.width is None) != (args.blocks is None):
        parser.error("--width and --blocks go together")
    if args.width:
        args.model = resized(args)
    torch.set_num_threads(1)
    rates = measure(args, tokens_of(args))
    (args.out / "results.json").write_text(json.dumps(rates))
    who = ["bare", "saemill", *(f"SAELens, {by}" for by in SAELENS)]
    rows = [
        [row, *(f"{by[name]:,.0f}" if name in by else "" for name in who)]
        + [f"{by['saemill'] / by[name]:.2f}" if name in by else "" for name in who if name != "saemill"]
        + [f"{by[BY_CLOCK]:.2f}"]
        for row, by in rates.items()
    ]
    head = ["cached", *who, *(f"saemill / {name}" for name in who if name != "saemill"), BY_CLOCK]
    lines = [
        machine(),
        "",
        "Tokens per second of CPU time; the last column is by the clock.",
        "",
        *table(head, rows, 1),
    ]
    (args.out / "results.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
