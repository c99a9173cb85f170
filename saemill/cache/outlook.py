"""What caching needs: from the numbers that decide it, whether the tokens are there already or not."""

from collections.abc import Mapping

import torch

from saemill.cache.config import CacheConfig
from saemill.cache.placing import spool, spooled_bytes
from saemill.common import durable
from saemill.common.addresses import address_of
from saemill.common.device import is_fast_at_bf16
from saemill.common.log import counted
from saemill.common.outlook import Outlook, free_bytes, process_bytes, shown
from saemill.common.stores.forms.packing import BLOCK_TOKENS
from saemill.common.stores.site_records import Site
from saemill.common.stores.tokens import TokenStore

FILES_PER_SHARD, FILES_PER_SITE, FILES_PER_STORE = 2, 3, 1
"""A shard has a commit, a site a record, a manifest and a description, a store its settings."""
RECORD_BYTES = 2 * 4 / 3 + 8 * 4 / 3 / BLOCK_TOKENS
"""Bytes of a token in a shard's record, in base64: its norm, and its part of a block's hash."""
STATISTICS_BYTES = 2 * 8 * 4 / 3
"""Bytes of a dimension there: mean and squared deviations."""
RECORDS, COPY = "records", "copy of the tokens"
"""Names of what is written beside the shards."""
BITS = {"load_in_8bit": 8, "load_in_4bit": 4}
"""Settings of weights in fewer bits."""


def outlook_of(
    config: CacheConfig,
    sites: list[Site],
    row_bytes: Mapping[str, int],
    n_rows: int,
    ctx_len: int,
    identity: Mapping[str, object],
    n_weights: int,
    device: torch.device,
    tokens_bytes: int,
) -> Outlook:
    """Work out what caching writes and how much memory it takes.

    Args:
        config: of the stage.
        sites: in the model's order.
        row_bytes: bytes of a token's stored activation at each site.
        n_rows: rows that are cached.
        ctx_len: tokens per row.
        identity: of the store, with its `dtype` and `shard_tokens`.
        n_weights: of the model.
        device: that it runs on.
        tokens_bytes: of the copy of the tokens; 0 where nobody knows yet.
    """
    shard_tokens = int(str(identity["shard_tokens"]))
    n_shards = -(-n_rows * ctx_len // shard_tokens)
    disk = {site.name: n_shards * shard_tokens * row_bytes[site.name] for site in sites}
    records = sum(n_shards * (shard_tokens * RECORD_BYTES + site.width * STATISTICS_BYTES) for site in sites)
    shards = [shard_tokens * row_bytes[site.name] for site in sites]
    written = disk | {RECORDS: round(records), COPY: tokens_bytes}
    model = {"model": model_bytes(n_weights, identity)}
    # One shard of each site is computed while the one before is written, a site at a time, permuted.
    buffers = {"shards": sum(shards) * min(2, n_shards) + max(shards)}
    on_gpu = device.type == "cuda"
    compression = identity.get("compression")
    padded = ", the last one padded" if n_rows * ctx_len % shard_tokens and not compression else ""
    packed = f" compressed by {compression} (sizes before that)" if compression else ""
    what = (
        f"{counted(n_rows, 'row')} of {ctx_len}, {n_rows * ctx_len:,} tokens, stored as {identity['dtype']}"
        f"{packed}, per site in {counted(n_shards, 'shard')} of {shard_tokens:,} tokens{padded}:",
        *(f"  {s.name:32} D {s.width:6,}  {disk[s.name] / 2**20:12,.1f} MiB" for s in sites),
    )
    limit = config.max_disk_bytes
    if limit is not None and limit < sum(disk.values()):
        what = (*what, f"  at most {shown(limit)} of them at once; what is read is removed")
    if address := address_of(config.out):
        here = spooled_bytes(address, max(shards), mirrored_bytes(written))
        on_the_way = (
            f"{shown(here)} at once on the disk here, in {spool()}, {shown(free_bytes(spool()))} free"
        )
        what = (*what, f"  {on_the_way}: a shard before it is sent, the records, the tokens")
    is_new = not (config.out / "zarr.json").exists()
    if identity["model_dtype"] == "float32" and config.model_dtype == "auto" and is_new:
        if is_fast_at_bf16(device):
            what = (*what, "  the model computes in fp32; --model-dtype bf16 is faster here, and less exact")
    return Outlook(
        stage="cache",
        what=what,
        folder=config.out,
        amounts={"max_tokens": n_rows * ctx_len},
        least=ctx_len,
        disk=written,
        n_files=FILES_PER_STORE + len(sites) * (FILES_PER_SITE + FILES_PER_SHARD * n_shards),
        memory={"libraries": process_bytes()} | buffers | ({} if on_gpu else model),
        gpu=model if on_gpu else {},
    )


def mirrored_bytes(disk: Mapping[str, int]) -> int:
    """Add up the bytes of what is written that the mirror of an address holds too."""
    return disk[RECORDS] + disk[COPY]


def bytes_of_copy(tokens: TokenStore, n_rows: int) -> int:
    """Estimate the bytes of a copy of so many rows: the tokenizer whole, the rest by their share."""
    tokenizer = durable.folder_bytes(tokens.tokenizer_folder)
    rest = durable.folder_bytes(tokens.path) - tokenizer
    return tokenizer + rest * n_rows // tokens.n_rows


def model_bytes(n_weights: int, settings: Mapping[str, object]) -> int:
    """Compute the bytes of a model's weights in memory.

    Args:
        n_weights: how many there are.
        settings: of a store: `model_dtype`, and whether they are held in fewer bits.
    """
    n_bits = next((bits for name, bits in BITS.items() if settings.get(name)), None)
    n_bits = n_bits or 8 * getattr(torch, str(settings["model_dtype"])).itemsize
    return n_weights * n_bits // 8
