"""Caching against its limit, interleaved in one process: the bare forward pass stopped at the site.

python -m benchmarks.cache.forward --tokens TOKENS --model MODEL --site layers.4 -o forward.json
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch

from saemill.cache.config import CacheConfig
from saemill.cache.run import run as cache
from saemill.common.models.model import LanguageModel
from saemill.common.stores.tokens import TokenStore

ROUNDS = 2
BATCH_ROWS = 16


def bare_seconds(model: LanguageModel, store: TokenStore, site: str, n_rows: int) -> float:
    """Time forward passes over the first rows; nothing is kept."""
    start = time.perf_counter()
    for row in range(0, n_rows, BATCH_ROWS):
        ids = torch.from_numpy(store.rows(row, min(row + BATCH_ROWS, n_rows)).astype("int64"))
        model.capture(ids, [site], None)
    return time.perf_counter() - start


def cache_seconds(args: argparse.Namespace, n_tokens: int) -> float:
    """Time `saemill cache` of one site into a fresh folder, model loading included."""
    folder = Path(tempfile.mkdtemp(dir=Path(args.out).parent))
    start = time.perf_counter()
    cache(
        CacheConfig(
            tokens=Path(args.tokens),
            model=args.model,
            out=folder / "acts",
            sites=(args.site,),
            max_tokens=n_tokens,
            batch_size=BATCH_ROWS,
            device="cpu",
        )
    )
    seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    return seconds


def main() -> None:
    """Interleave both and write the best rate of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--tokens", "--model", "--site"):
        parser.add_argument(name, required=True)
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("--max-tokens", type=int, default=131_072)
    args = parser.parse_args()
    store = TokenStore(args.tokens)
    n_rows = min(store.n_rows, args.max_tokens // store.ctx_len)
    device = torch.device("cpu")
    model = LanguageModel(args.model, revision=None, dtype=torch.float32, device=device)
    bare_seconds(model, store, args.site, BATCH_ROWS)
    pairs = [
        (bare_seconds(model, store, args.site, n_rows), cache_seconds(args, n_rows * store.ctx_len))
        for _ in range(ROUNDS)
    ]
    n_tokens = n_rows * store.ctx_len
    rates = {name: n_tokens / min(pair[i] for pair in pairs) for i, name in enumerate(("bare", "cache"))}
    Path(args.out).write_text(json.dumps(rates | {"pairs": pairs}))
    print(rates)


if __name__ == "__main__":
    main()
