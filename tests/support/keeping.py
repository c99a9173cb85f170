"""A process that fills a local cache, as light to start as can be."""

import os

import numpy as np

from saemill.common.stores.local_cache import LocalCache


def fill(cache: str, max_bytes: int, seed: int) -> None:
    """Keep 200 ranges of 500 bytes in an order of its own, each full of one number."""
    os.environ["XDG_CACHE_HOME"] = cache
    kept = LocalCache("s3://shared", ["object"], max_bytes)
    for start in np.random.default_rng(seed).permutation(200):
        kept.keep("object", int(start), np.full(500, start % 251, np.uint8))
