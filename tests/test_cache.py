"""The cache: its values, its statistics, and what it does when it is killed, damaged or misused."""

import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import tensorstore
import torch
import transformers
import zarr
from crashes import Crash, bury, check_crashes, crash_at, file_hashes
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from waiting import wait_until

from saemill.cache import run as cache_run
from saemill.cache.claims.worker import Worker
from saemill.cache.run import CacheConfig
from saemill.common import durable
from saemill.common.errors import ConfigError, DataError, StoreError
from saemill.common.models.model import check_fit
from saemill.common.stores.activations import SHUFFLE_KEY, ActivationStore, Moments, Statistics
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.permutation import permutation
from saemill.common.stores.shards import ShardedArray
from saemill.common.stores.token_writer import write_token_store
from saemill.common.stores.tokens import TokenizerInfo, TokenStore
from saemill.show import describe, problems
from saemill.tokenize.run import TokenizeConfig
from saemill.tokenize.run import run as tokenize

pytestmark = pytest.mark.usefixtures("one_thread")

N_ROWS, CTX_LEN, SHARD, BATCH = 150, 32, 512, 5
N_SHARDS = 10
"""Nine shards of 16 rows and one of 6."""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def make_tokens(corpus: Path, tokenizer: str, out: Path, **changes: Any) -> TokenStore:
    settings: dict[str, Any] = {"ctx_len": CTX_LEN, "max_tokens": N_ROWS * CTX_LEN, "held_out_fraction": 0.2}
    return tokenize(TokenizeConfig(dataset=str(corpus), tokenizer=tokenizer, out=out, **settings | changes))


@pytest.fixture(scope="module")
def tokens(corpus: Path, tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """150 rows of 32 tokens, some held out."""
    store = make_tokens(corpus, tokenizer_folder, tmp_path_factory.mktemp("tokens") / "tokens")
    assert store.n_rows == N_ROWS
    assert 10 < store.held_out_R.sum() < 100
    return store


@pytest.fixture(scope="module")
def neox(tiny_models: dict[str, str]) -> str:
    return tiny_models["neox"]


def cache(tokens: TokenStore | Path, model: str, out: Path, **changes: Any) -> ActivationStore:
    """Cache with this file's settings, block 1 unless told otherwise."""
    path = tokens.path if isinstance(tokens, TokenStore) else tokens
    settings: dict[str, Any] = {"shard_tokens": SHARD, "batch_size": BATCH}
    if not changes.keys() & {"layers", "sites", "layer_stride"}:
        settings["layers"] = (1,)
    return cache_run.run(CacheConfig(tokens=path, model=model, out=out, **settings | changes))


@pytest.fixture(scope="module")
def made(tokens: TokenStore, neox: str, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """A finished store of two sites; tests that change one work on a copy."""
    return cache(tokens, neox, tmp_path_factory.mktemp("made") / "acts", layers=(0, 1))


@pytest.fixture
def copied(made: ActivationStore, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.path, tmp_path / "acts"))


def hidden_states(
    store: TokenStore, model: str, layer: int, n_rows: int = N_ROWS, mask: Tensor | None = None
) -> Tensor:
    """Oracle: transformers' hidden states after a block, in the batches that the cache makes.

    Returns: fp32 [n_rows * ctx_len, D], in address order.
    """
    network = transformers.AutoModel.from_pretrained(model).eval()
    ids = torch.from_numpy(store.rows(0, n_rows).astype(np.int64))
    found = []
    rows_per_shard = SHARD // store.ctx_len
    for first in range(0, n_rows, rows_per_shard):
        last = min(first + rows_per_shard, n_rows)
        for row in range(first, last, BATCH):
            chosen = slice(row, min(row + BATCH, last))
            attention = None if mask is None else mask[chosen]
            with torch.no_grad():
                output = network(ids[chosen], attention_mask=attention, output_hidden_states=True)
            found.append(output.hidden_states[layer + 1].flatten(0, 1))
    return torch.cat(found)


@pytest.fixture(scope="module")
def truth(tokens: TokenStore, neox: str) -> dict[str, Tensor]:
    """fp32 hidden states of the two sites of `made`."""
    return {f"layers.{i}": hidden_states(tokens, neox, i) for i in (0, 1)}


def marks(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file: both change when it is written again."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(f.relative_to(folder)): (f.stat().st_ino, f.stat().st_mtime_ns) for f in files}


# Values


@pytest.mark.parametrize("kind", ["neox", "llama", "gpt2", "bert"])
def test_the_store_holds_the_models_hidden_states(
    kind: str, tokens: TokenStore, tiny_models: dict[str, str], tmp_path: Path
) -> None:
    """Oracle: transformers' `output_hidden_states` in fp32, rounded to bf16."""
    store = cache(tokens, tiny_models[kind], tmp_path / "acts", sites=("residual.1",))
    (site,) = store.sites
    values = store.read(site, 0, store.n_tokens)
    assert values.dtype is torch.bfloat16
    assert torch.equal(values, hidden_states(tokens, tiny_models[kind], 1).to(torch.bfloat16))
    assert np.array_equal(store.tokens.rows(0, N_ROWS), tokens.rows(0, N_ROWS))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_stored_type_rounds_the_same_values(
    dtype: str, tokens: TokenStore, neox: str, truth: dict[str, Tensor], tmp_path: Path
) -> None:
    """Oracle: the fp32 hidden states, converted by torch."""
    store = cache(tokens, neox, tmp_path / "acts", dtype=dtype)
    values = store.read("layers.1", 0, store.n_tokens)
    assert values.dtype is DTYPES[dtype]
    assert torch.equal(values, truth["layers.1"].to(DTYPES[dtype]))


@given(st.tuples(st.integers(0, N_ROWS * CTX_LEN), st.integers(0, N_ROWS * CTX_LEN)).map(sorted))
@hypothesis_settings(deadline=None, max_examples=60)
def test_any_range_is_read_in_address_order(
    made: ActivationStore, truth: dict[str, Tensor], ends: list[int]
) -> None:
    """Oracle: the same slice of the hidden states."""
    start, stop = ends
    values = made.read("layers.0", start, stop)
    assert values.shape == (stop - start, 32)
    assert torch.equal(values, truth["layers.0"][start:stop].to(torch.bfloat16))


@pytest.mark.parametrize(("start", "stop"), [(-1, 4), (5, 4), (0, N_ROWS * CTX_LEN + 1)])
def test_addresses_outside_the_store_are_refused(made: ActivationStore, start: int, stop: int) -> None:
    """Oracle: the store's addresses are 0..4,800."""
    with pytest.raises(IndexError, match=r"within 0\.\.4800"):
        made.read("layers.0", start, stop)


def with_zarr(path: Path) -> NDArray[Any]:
    return np.asarray(zarr.open_array(str(path), mode="r")[:])


def with_tensorstore(path: Path) -> NDArray[Any]:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return np.asarray(tensorstore.open(spec, read=True).result().read().result())


@pytest.mark.parametrize("reader", [with_zarr, with_tensorstore])
def test_other_zarr_readers_find_each_address_at_its_documented_place(
    reader: Callable[[Path], NDArray[Any]], made: ActivationStore, truth: dict[str, Tensor]
) -> None:
    """Oracle: `shard * shard_tokens + permutation(n, SHUFFLE_KEY, shard)[p]` and the hidden states."""
    addresses = []
    for shard in range(N_SHARDS):
        n = min(SHARD, N_ROWS * CTX_LEN - shard * SHARD)
        addresses.append(shard * SHARD + permutation(n, SHUFFLE_KEY, shard))
    address_of_place = np.concatenate(addresses)
    assert sorted(address_of_place) == list(range(N_ROWS * CTX_LEN))
    assert (address_of_place != np.arange(N_ROWS * CTX_LEN)).mean() > 0.9
    for site in ("layers.0", "layers.1"):
        stored = reader(made.path / site)
        assert stored.dtype == np.uint16
        expected = truth[site].to(torch.bfloat16)[torch.from_numpy(address_of_place)]
        assert np.array_equal(stored, expected.view(torch.uint16).numpy())
    group = zarr.open_group(str(made.path), mode="r")
    assert {name for name, _ in group.arrays()} == {"layers.0", "layers.1"}
    assert group["layers.0"].attrs["torch_dtype"] == "bfloat16"


def test_an_encoders_padding_is_hidden_from_attention(
    tiny_models: dict[str, str], tokenizer_folder: str, tmp_path: Path
) -> None:
    """Oracle: BERT run with `attention_mask` 0 on padding; without it the values differ."""
    ids = np.random.default_rng(0).integers(10, 8192, (20, CTX_LEN))
    lengths = np.arange(20) % 7 * 5 + 2
    ids[np.arange(CTX_LEN) >= lengths[:, None]] = 3
    store = encoder_tokens(tmp_path / "tokens", ids, tokenizer_folder)
    acts = cache(store, tiny_models["bert"], tmp_path / "acts", sites=("residual.1",))
    values = acts.read("encoder.layer.1", 0, acts.n_tokens)
    mask = torch.from_numpy(ids != 3).long()
    masked = hidden_states(store, tiny_models["bert"], 1, 20, mask).to(torch.bfloat16)
    unmasked = hidden_states(store, tiny_models["bert"], 1, 20).to(torch.bfloat16)
    assert torch.equal(values, masked)
    assert not torch.equal(values, unmasked)
    counted = int(((ids != 3) & (np.arange(CTX_LEN) > 0)).sum())
    assert acts.site("encoder.layer.1").statistics.n_tokens == counted


def encoder_tokens(path: Path, ids: NDArray[Any], tokenizer_folder: str) -> TokenStore:
    """A token store with padding (id 3), of one document."""
    array = ShardedArray.create(path / "tokens", ids.shape, len(ids), torch.uint16, {})
    array.write_shard(0, ids.astype(np.uint16))
    shutil.copytree(tokenizer_folder, path / "tokenizer")
    info = TokenizerInfo(
        name="hand-made", hash="", vocab_size=8192, prefix_ids=(), suffix_ids=(), separator_id=2,
        special_ids=(3,), pad_id=3, mask_id=4,
    )  # fmt: skip
    document = {"source_index": [0], "start": [0], "n_tokens": [ids.size], "held_out": [False]}
    write_token_store(
        path,
        tokens=array,
        held_out_R=np.zeros(len(ids), bool),
        segments=pa.table({"start": [0], "document": [0]}),
        documents=pa.table(document | {"text_hash": ["0"]}),
        tokenizer=info,
        extra={
            "document": "text",
            "n_used_ids": int(ids.max()) + 1,
            "source": {"name": "hand-made", "fingerprint": ""},
            "settings": {"held_out_fraction": 0},
            "versions": {},
        },
    )
    return TokenStore(path)


def test_rows_keep_whole_in_shards(tokens: TokenStore, neox: str, tmp_path: Path) -> None:
    """Oracle: 500 tokens a shard round down to 15 rows; the read values to the model, run alone."""
    store = cache(tokens, neox, tmp_path / "acts", shard_tokens=500, dtype="fp32", batch_size=150)
    assert store.shard_tokens == 480
    assert store.n_shards == 10
    network = transformers.AutoModel.from_pretrained(neox).eval()
    ids = torch.from_numpy(tokens.rows(0, N_ROWS).astype(np.int64))
    with torch.no_grad():
        states = network(ids, output_hidden_states=True).hidden_states[2].flatten(0, 1)
    torch.testing.assert_close(store.read("layers.1", 0, store.n_tokens), states)


@pytest.mark.parametrize("shard_tokens", [1, 10**9])
def test_a_shard_has_at_least_a_row_and_at_most_all(
    shard_tokens: int, tokens: TokenStore, neox: str, tmp_path: Path
) -> None:
    """Oracle: one row a shard, or one shard; the file is no larger than the data."""
    store = cache(tokens, neox, tmp_path / "acts", shard_tokens=shard_tokens, max_tokens=96)
    assert store.n_shards == (3 if shard_tokens == 1 else 1)
    n_bytes = sum(
        file.stat().st_size for file in (store.path / "layers.1" / "c").rglob("0") if file.is_file()
    )
    assert n_bytes == 96 * 32 * 2


def test_max_tokens_takes_the_first_whole_rows(
    tokens: TokenStore, neox: str, truth: dict[str, Tensor], tmp_path: Path
) -> None:
    """Oracle: 1,000 tokens are 31 rows of 32; their hidden states and token ids."""
    store = cache(tokens, neox, tmp_path / "acts", max_tokens=1000, batch_size=16, dtype="fp32")
    assert (store.n_tokens, store.tokens.n_rows, store.n_shards) == (992, 31, 2)
    torch.testing.assert_close(store.read("layers.1", 0, 992), truth["layers.1"][:992])
    assert np.array_equal(store.tokens.rows(0, 31), tokens.rows(0, 31))
    assert np.array_equal(store.tokens.held_out_R, tokens.held_out_R[:31])
    addresses = np.arange(992)
    assert np.array_equal(store.tokens.document_of(addresses), tokens.document_of(addresses))


@pytest.mark.parametrize("max_tokens", [31, 4801, 0, -5])
def test_max_tokens_outside_the_store_is_refused(
    max_tokens: int, tokens: TokenStore, neox: str, tmp_path: Path
) -> None:
    """Oracle: a row has 32 tokens, the store 4,800; nothing is written."""
    with pytest.raises(ConfigError, match=r"max_tokens must be between one row \(32\) and .* 4,800"):
        cache(tokens, neox, tmp_path / "acts", max_tokens=max_tokens)
    assert not (tmp_path / "acts").exists()


def test_layer_stride_takes_every_so_many_blocks(tokens: TokenStore, neox: str, tmp_path: Path) -> None:
    """Oracle: blocks 0 and 2 of 3."""
    assert cache(tokens, neox, tmp_path / "acts", layer_stride=2, max_tokens=64).sites == [
        "layers.0",
        "layers.2",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "name what to cache"),
        ({"layer_stride": 2, "layers": (0,)}, "leave out layers"),
        ({"layer_stride": 2, "sites": ("embed_in",)}, "leave out sites"),
        ({"layer_stride": 0, "layers": (0,)}, "layer_stride must be 1 or more, got 0"),
        ({"layers": (0,), "batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"layers": (0,), "shard_tokens": -1}, "shard_tokens must be 1 or more, got -1"),
    ],
)
def test_options_that_contradict_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Oracle: the option that is wrong, named before anything is opened."""
    with pytest.raises(ConfigError, match=message):
        CacheConfig(tokens=tmp_path, model="none", out=tmp_path, **settings)


# Statistics


def kept(tokens: TokenStore, first_positions: int, left_out: set[int]) -> NDArray[np.bool_]:
    """Oracle: the training positions, token by token. bool [n_tokens]."""
    rows = tokens.rows(0, tokens.n_rows)
    return np.array(
        [
            not tokens.held_out_R[row] and position >= first_positions and int(token) not in left_out
            for row in range(tokens.n_rows)
            for position, token in enumerate(rows[row])
        ]
    )


def assert_moments(found: Statistics, rows: NDArray[np.float64]) -> None:
    """Compare with numpy's two passes in float64."""
    assert found.n_tokens == len(rows)
    np.testing.assert_allclose(found.mean_D.numpy(), rows.mean(0), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(found.variance_D.numpy(), rows.var(0), rtol=1e-9)
    np.testing.assert_allclose(found.mean_squared_norm, (rows**2).sum(1).mean(), rtol=1e-11)
    np.testing.assert_allclose(found.total_variance, rows.var(0).sum(), rtol=1e-9)


@pytest.mark.parametrize("site", ["layers.0", "layers.1"])
def test_statistics_are_those_of_the_training_positions(
    site: str, made: ActivationStore, tokens: TokenStore, truth: dict[str, Tensor]
) -> None:
    """Oracle: numpy in float64 over the stored values, first positions, separators and held-out rows out."""
    keep = kept(tokens, 1, {tokens.tokenizer.separator_id})
    assert 0.5 < keep.mean() < 0.95
    assert_moments(made.site(site).statistics, truth[site].bfloat16().double().numpy()[keep])


@pytest.mark.parametrize("mask", [
    MaskConfig(special_tokens=False, first_positions=0),
    MaskConfig(first_positions=3, token_ids=(17, 300)),
])  # fmt: skip
def test_statistics_under_another_mask(
    mask: MaskConfig, made: ActivationStore, tokens: TokenStore, truth: dict[str, Tensor]
) -> None:
    """Oracle: numpy over the positions of that mask, counted token by token."""
    left_out = {*mask.token_ids, *([tokens.tokenizer.separator_id] if mask.special_tokens else [])}
    keep = kept(tokens, mask.first_positions, left_out)
    found = made.site("layers.1").statistics_under(mask)
    assert_moments(found, truth["layers.1"].bfloat16().double().numpy()[keep])
    assert found.n_tokens != made.site("layers.1").statistics.n_tokens


def test_the_stores_own_mask_is_a_setting(
    tokens: TokenStore, neox: str, truth: dict[str, Tensor], tmp_path: Path
) -> None:
    """Oracle: numpy over that mask's positions; the rows on disk are the same under any mask."""
    mask = MaskConfig(special_tokens=False, first_positions=4, token_ids=(5,))
    store = cache(tokens, neox, tmp_path / "acts", mask=mask)
    assert ActivationStore(store.path).mask == mask
    keep = kept(tokens, 4, {5})
    site = store.site("layers.1")
    assert_moments(site.statistics, truth["layers.1"].bfloat16().double().numpy()[keep])
    assert site.statistics_under(mask) is site.statistics
    assert torch.equal(site.read(0, 4800), truth["layers.1"].to(torch.bfloat16))


def test_nothing_to_count_is_refused(made: ActivationStore) -> None:
    """Oracle: a mask of whole rows leaves no position; nor does one of every id."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConfigError, match=f"less than the {CTX_LEN} tokens of a row, got {CTX_LEN}"):
            made.site("layers.0").statistics_under(MaskConfig(first_positions=CTX_LEN))
        every_id = tuple(range(made.tokens.tokenizer.vocab_size))
        with pytest.raises(StoreError, match="every position is masked or held out"):
            made.site("layers.0").statistics_under(MaskConfig(token_ids=every_id))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"first_positions": CTX_LEN}, f"less than the {CTX_LEN} tokens of a row, got {CTX_LEN}"),
        ({"token_ids": (9, 8192, 9999)}, r"in 0\.\.8191, the ids of the tokenizer, got 8192, 9999"),
        ({"token_ids": tuple(range(8192))}, "leave no position of these tokens to train on"),
    ],
)
def test_a_mask_that_cannot_be_meant_is_refused_before_the_pass(
    mask: dict[str, Any], message: str, tokens: TokenStore, neox: str, made: ActivationStore, tmp_path: Path
) -> None:
    """Oracle: rows of 32 tokens, 8,192 ids; nothing is written, and a store that is there is not read."""
    with pytest.raises(ConfigError, match=message):
        cache(tokens, neox, tmp_path / "acts", mask=MaskConfig(**mask))
    assert not (tmp_path / "acts").exists()
    with pytest.raises(ConfigError, match=r"0 or more, .*got -1"):
        MaskConfig(token_ids=(-1, 5))
    if "leave" not in message:
        with pytest.raises(ConfigError, match=message):
            made.keep(0, MaskConfig(**mask), held_out=False)


def test_a_worker_knows_whether_others_live(tmp_path: Path) -> None:
    """Oracle: one worker, two, one again; only the last may clear a store that holds no shard."""
    with Worker(tmp_path / "claims", threading.Event()) as first:
        assert first.is_alone()
        with Worker(tmp_path / "claims", threading.Event()) as second:
            assert not first.is_alone()
            assert not second.is_alone()
        assert first.is_alone()


def test_a_shard_without_training_positions_adds_nothing(
    tokens: TokenStore, neox: str, truth: dict[str, Tensor], tmp_path: Path
) -> None:
    """Oracle: shards of one row, of which held-out ones have none; numpy without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = cache(tokens, neox, tmp_path / "acts", shard_tokens=CTX_LEN, max_tokens=40 * CTX_LEN)
    assert store.tokens.held_out_R[:40].any()
    keep = kept(tokens, 1, {tokens.tokenizer.separator_id})[: 40 * CTX_LEN]
    values = store.read("layers.1", 0, store.n_tokens).double().numpy()
    assert_moments(store.site("layers.1").statistics, values[keep])


@given(
    seed=st.integers(0, 2**32 - 1),
    cuts=st.lists(st.integers(0, 500), max_size=6),
    sigmas=st.sampled_from([0.0, 1.0, 100.0, 1e4]),
    n=st.integers(1, 500),
)
@hypothesis_settings(deadline=None, max_examples=60)
def test_moments_of_parts_are_those_of_the_whole(seed: int, cuts: list[int], sigmas: float, n: int) -> None:
    """Oracle: numpy's two passes in float64 over all rows, the mean many sigma from zero."""
    rows = np.random.default_rng(seed).normal(size=(n, 3)) + sigmas * np.array([1.0, -1.0, 0.5])
    edges = sorted({0, n, *(min(cut, n) for cut in cuts)})
    whole, half = Moments(3), Moments(3)
    for i, (start, stop) in enumerate(itertools.pairwise(edges)):
        target = whole if i % 2 else half
        target.add(torch.from_numpy(rows[start:stop]))
    whole.merge(half.n, half.mean_D, half.deviations_D, half.distances)
    whole.merge(0, np.full(3, np.nan), np.full(3, np.nan), {})
    found = whole.statistics()
    assert found.n_tokens == n
    np.testing.assert_allclose(found.mean_D.numpy(), rows.mean(0), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(found.variance_D.numpy(), rows.var(0), rtol=1e-7, atol=1e-20)
    np.testing.assert_allclose(found.mean_squared_norm, (rows**2).sum(1).mean(), rtol=1e-12)


def test_moments_of_many_bf16_rows_with_a_mean_of_100_sigma() -> None:
    """Oracle: numpy in float64; sums in fp32, or squares less the squared mean in it, would be far off."""
    rows = (torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0)) + 100).to(torch.bfloat16)
    moments = Moments(4)
    moments.add(rows)
    assert_moments(moments.statistics(), rows.double().numpy())


def test_distances_tell_of_rows_far_from_the_others() -> None:
    """Oracle: numpy's norms of the same rows about their mean."""
    rows = np.random.default_rng(0).normal(size=(20_000, 64))
    rows[:20] *= 100
    moments = Moments(64)
    moments.add(torch.from_numpy(rows))
    found = moments.statistics()
    distances = np.linalg.norm(rows - rows.mean(0), axis=1)
    assert found.median_distance == pytest.approx(np.median(distances), rel=0.1)
    assert found.largest_distance == pytest.approx(distances.max(), rel=0.1)
    assert found.share_beyond(10) == 20 / 20_000
    assert found.share_beyond(1000) == 0


# One run or several


def test_sites_added_later_are_the_same_bytes(
    made: ActivationStore, tokens: TokenStore, neox: str, tmp_path: Path
) -> None:
    """Oracle: the store that one run made of both sites; the first site is not touched."""
    cache(tokens, neox, tmp_path / "acts", layers=(1,))
    before = marks(tmp_path / "acts")
    store = cache(tokens, neox, tmp_path / "acts", sites=("residual.0",))
    assert store.sites == ["layers.0", "layers.1"]
    assert marks(tmp_path / "acts").items() >= before.items()
    assert file_hashes(tmp_path / "acts") == file_hashes(made.path)
    assert store.fingerprint == made.fingerprint


def test_settings_left_open_are_those_of_the_store(tokens: TokenStore, neox: str, tmp_path: Path) -> None:
    """Oracle: a store that one run made of both sites, with every setting given."""
    given: dict[str, Any] = {
        "shard_tokens": 96, "dtype": "fp16", "max_tokens": 1000, "mask": MaskConfig(first_positions=2),
        "model_dtype": "bf16",
    }  # fmt: skip
    whole = cache(tokens, neox, tmp_path / "whole", layers=(0, 1), **given)
    cache(tokens, neox, tmp_path / "acts", layers=(0,), **given)
    store = cache_run.run(
        CacheConfig(tokens=tokens.path, model=neox, out=tmp_path / "acts", layers=(1,), batch_size=BATCH)
    )
    assert file_hashes(store.path) == file_hashes(whole.path)
    for key, value in (given | {"shard_tokens": 64, "dtype": "bf16", "max_tokens": 4800}).items():
        if value != given[key]:
            with pytest.raises(ConfigError, match="was made with other settings"):
                cache(tokens, neox, tmp_path / "acts", **given | {key: value})


def test_a_finished_store_is_left_as_it_is(
    copied: Path,
    tokens: TokenStore,
    neox: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Oracle: inodes and times before; the model is not even loaded."""
    before = marks(copied)
    monkeypatch.setattr(cache_run, "LanguageModel", None)
    cache(tokens, neox, copied, layers=(0, 1))
    assert marks(copied) == before
    assert "nothing to do, every shard was checked" in capsys.readouterr().out


def test_the_store_needs_nothing_but_itself(
    made: ActivationStore, corpus: Path, tokenizer_folder: str, neox: str, tmp_path: Path
) -> None:
    """Oracle: the same store, made from tokens that are gone and moved elsewhere."""
    again = make_tokens(corpus, tokenizer_folder, tmp_path / "tokens")
    cache(again, neox, tmp_path / "acts", layers=(0, 1))
    shutil.rmtree(tmp_path / "tokens")
    (tmp_path / "acts").rename(tmp_path / "elsewhere")
    moved = ActivationStore(tmp_path / "elsewhere")
    assert torch.equal(moved.read("layers.0", 100, 900), made.read("layers.0", 100, 900))
    assert moved.fingerprint == made.fingerprint


# Killed


def test_a_killed_run_goes_on_to_the_same_bytes(tokens: TokenStore, neox: str, tmp_path: Path) -> None:
    """Oracle: the store of a run that nobody killed, file by file."""
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    options = {"layers": (0, 2), "shard_tokens": 2 * CTX_LEN, "batch_size": 16}
    cache(tokens, neox, whole, **options)
    command = [
        sys.executable, "-m", "saemill", "cache", str(tokens.path), "--model", neox, "--layers", "0,2",
        "--shard-tokens", str(2 * CTX_LEN), "-o", str(torn),
    ]  # fmt: skip
    generator = random.Random(0)
    reached = 0
    for goal in (0, generator.randint(1, 60), generator.randint(80, 120)):
        reached = kill_at(command, torn, goal)
        assert not (torn / "layers.2" / "manifest.json").exists()
    assert 80 <= reached < 150
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert "complete; " in done.stdout
    assert file_hashes(torn) == file_hashes(whole)
    assert problems(torn) == []


def kill_at(command: list[str], out: Path, n_commits: int) -> int:
    """Run a command and kill it once so many shards are committed; how many there are then."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    wait_until(lambda: out.exists() and len(list(out.glob("*/commits/*.json"))) >= n_commits, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return len(list(out.glob("*/commits/*.json")))


def test_a_crash_at_any_step_leaves_a_store_that_is_finished_later(
    tokens: TokenStore, neox: str, tmp_path: Path
) -> None:
    """Oracle: the store of a run without a crash, file by file, for a crash before each disk operation."""
    options = {"layers": (0, 2), "max_tokens": 3 * CTX_LEN, "shard_tokens": 2 * CTX_LEN}
    check_crashes(lambda out: cache(tokens, neox, out, **options), tmp_path)


def test_left_over_pieces_do_no_harm(
    copied: Path,
    made: ActivationStore,
    tokens: TokenStore,
    neox: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Oracle: the finished store; pieces as a kill leaves them, before, during and after a rename."""
    for site in ("layers.0", "layers.1"):
        (copied / site / "manifest.json").unlink()
        for shard in (2, 5, 9):
            (copied / site / "commits" / f"{shard}.json").unlink()
        whole = (copied / site / "c" / "2" / "0").read_bytes()
        (copied / site / "c" / "2" / "0").write_bytes(whole[: len(whole) // 2])
        (copied / site / "c" / "5" / "0").unlink()
        (copied / site / "c" / "9" / "0").write_bytes(bytes(len(whole)))
    dead = "worker-0123456789abcdef"
    (copied / "claims" / f"{dead}.partial-2").mkdir(parents=True)
    (copied / "claims" / f"{dead}.partial-0").write_text('{"shard": 2, "n_to')
    (copied / "claims" / f".{dead}.partial-1.partial").write_bytes(bytes(100))
    kept_marks = {
        name: mark
        for name, mark in marks(copied).items()
        if "/c/" in name and name.split("/")[2] not in ("2", "5", "9")
    }
    with pytest.raises(StoreError, match="unfinished"):
        ActivationStore(copied).site("layers.0")
    capsys.readouterr()
    cache(tokens, neox, copied, layers=(0, 1))
    assert "layers.1: 7 of 10 shards are there, continuing with shard 2" in capsys.readouterr().out
    assert file_hashes(copied) == file_hashes(made.path)
    assert marks(copied).items() >= kept_marks.items()


def test_only_what_is_lacking_is_computed(
    copied: Path, tokens: TokenStore, neox: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the token ids that the model is given: those of the two shards that lack, in order."""
    for site, shard in (("layers.0", 7), ("layers.1", 4)):
        (copied / site / "c" / str(shard) / "0").unlink()
    seen: list[tuple[Tensor, list[str]]] = []
    capture = cache_run.LanguageModel.capture

    def watched(model: Any, ids_RS: Tensor, sites: list[str], attention_RS: Tensor | None) -> Any:
        seen.append((ids_RS, sites))
        return capture(model, ids_RS, sites, attention_RS)

    monkeypatch.setattr(cache_run.LanguageModel, "capture", watched)
    monkeypatch.setattr(cache_run.names, "warnings", lambda *_: [])  # which looks at a few tokens first
    cache(tokens, neox, copied, layers=(0, 1))
    rows = tokens.rows(0, N_ROWS).astype(np.int64)
    expected = np.concatenate([rows[4 * 16 : 5 * 16], rows[7 * 16 : 8 * 16]])
    assert np.array_equal(torch.cat([ids for ids, _ in seen]).numpy(), expected)
    assert [sites for _, sites in seen] == [["layers.1"]] * 4 + [["layers.0"]] * 4


@pytest.mark.parametrize("begun", ["tokens", "claims/worker-0123456789abcdef.partial-0.partial"])
def test_a_folder_that_was_just_begun_is_gone_on_with(
    begun: str, made: ActivationStore, tokens: TokenStore, neox: str, tmp_path: Path
) -> None:
    """Oracle: the finished store; the tokens are copied or half copied, not yet described."""
    shutil.copytree(made.path / "tokens", tmp_path / "acts" / begun)
    if begun != "tokens":
        (tmp_path / "acts" / begun / "manifest.json").unlink()
    cache(tokens, neox, tmp_path / "acts", layers=(0, 1))
    assert file_hashes(tmp_path / "acts") == file_hashes(made.path)


# Damaged


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[100] ^= 0x10
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "bit flip": (flip_bit, "content differs from its hash"),
    "truncated": (truncate, "file has 32,767 bytes, expected 32,768"),
    "empty": (empty, "file has 0 bytes, expected 32,768"),
    "missing": (Path.unlink, "file is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_refused_and_mended(
    kind: str, copied: Path, made: ActivationStore, tokens: TokenStore, neox: str
) -> None:
    """Oracle: the shards that were damaged; the whole store's bytes; the other files' inodes and times."""
    damage, problem = DAMAGE[kind]
    for shard in (3, 9):
        damage(copied / "layers.1" / "c" / str(shard) / "0")
    found = problems(copied)
    assert found[:2] == [f"layers.1 shard 3: {problem}", f"layers.1 shard 9: {problem}"]
    assert len(found) == 3
    assert "saemill cache" in found[2]
    with pytest.raises(StoreError, match=r"layers\.1/c/3/0: ") as error:
        ActivationStore(copied).read("layers.1", 0, 4800)
    assert "saemill cache" in str(error.value)
    if kind != "bit flip":
        with pytest.raises(StoreError, match="2 of 10 shards"):
            ActivationStore(copied).site("layers.1")
    assert torch.equal(ActivationStore(copied).read("layers.0", 0, 4800), made.read("layers.0", 0, 4800))
    bad = [f"layers.1/c/{shard}/0" for shard in (3, 9)]
    before = {name: mark for name, mark in marks(copied).items() if "/c/" in name and name not in bad}
    cache(tokens, neox, copied, layers=(0, 1))
    assert file_hashes(copied) == file_hashes(made.path)
    assert marks(copied).items() >= before.items()
    assert problems(copied) == []


def test_a_block_is_checked_whenever_it_is_read(copied: Path, made: ActivationStore) -> None:
    """Oracle: the one block of 256 rows whose bit was turned; other blocks read as before."""
    file = copied / "layers.0" / "c" / "4" / "0"
    content = bytearray(file.read_bytes())
    content[300 * 64] ^= 1
    file.write_bytes(content)
    site, whole = ActivationStore(copied).site("layers.0"), made.site("layers.0")
    assert np.array_equal(site.block(4, 0), whole.block(4, 0))
    with pytest.raises(StoreError, match=r"c/4/0: block 1 differs from its hash"):
        site.block(4, 1)
    address = 4 * SHARD + int(permutation(SHARD, SHUFFLE_KEY, 4)[300])
    with pytest.raises(StoreError, match="saemill verify"):
        site.read(address, address + 1)
    with pytest.raises(StoreError, match="block 1"):
        site.statistics_under(MaskConfig(first_positions=2))


def test_a_file_that_goes_missing_later_is_no_zeros(copied: Path) -> None:
    """Oracle: zarr itself reads zeros there; the store, opened before, raises."""
    site = ActivationStore(copied).site("layers.0")
    (copied / "layers.0" / "c" / "6" / "0").unlink()
    assert not with_zarr(copied / "layers.0")[6 * SHARD : 7 * SHARD].any()
    with pytest.raises(StoreError, match="c/6/0: file is missing"):
        site.read(6 * SHARD, 6 * SHARD + 1)


def test_damage_in_the_padding_of_the_last_shard_is_found_too(
    copied: Path, made: ActivationStore, tokens: TokenStore, neox: str
) -> None:
    """Oracle: a byte after the last of the 192 rows, which no reader sees but a hash of the file does."""
    with (copied / "layers.0" / "c" / "9" / "0").open("rb+") as file:
        file.seek(200 * 64)
        file.write(b"x")
    assert problems(copied)[0] == "layers.0 shard 9: content differs from its hash"
    cache(tokens, neox, copied, layers=(0,))
    assert file_hashes(copied) == file_hashes(made.path)


def test_a_crash_while_mending_forgets_no_damaged_shard(
    copied: Path, made: ActivationStore, tokens: TokenStore, neox: str
) -> None:
    """Oracle: the whole store; a second damaged shard of the right size is still known to be damaged."""
    for n_steps in range(4):
        for shard in (3, 5):
            flip_bit(copied / "layers.1" / "c" / str(shard) / "0")
        with pytest.MonkeyPatch.context() as patch:
            crash_at(n_steps, patch)
            with pytest.raises(Crash):
                cache(tokens, neox, copied, layers=(1,))
        bury(copied)
        cache(tokens, neox, copied, layers=(1,))
        assert file_hashes(copied) == file_hashes(made.path), f"after a crash at step {n_steps}"


def test_a_missing_array_description_is_named_and_mended(
    copied: Path, made: ActivationStore, tokens: TokenStore, neox: str
) -> None:
    """Oracle: the file that was removed, without which the site cannot be read."""
    (copied / "layers.0" / "zarr.json").unlink()
    with pytest.raises(StoreError, match=r"layers\.0/zarr\.json: file is missing"):
        ActivationStore(copied).read("layers.0", 0, 1)
    assert any("layers.0" in line and "zarr.json" in line for line in problems(copied))
    cache(tokens, neox, copied, layers=(0,))
    assert file_hashes(copied) == file_hashes(made.path)


@pytest.mark.parametrize("damage", [flip_bit, truncate, Path.unlink])
@pytest.mark.parametrize("name", ["tokens/c/0/0", "segments.parquet"])
def test_damage_in_the_stores_tokens_is_named_and_mended(
    name: str,
    damage: Callable[[Path], None],
    copied: Path,
    made: ActivationStore,
    tokens: TokenStore,
    neox: str,
) -> None:
    """Oracle: the damaged file, and the whole store; the shards of activations are not touched."""
    damage(copied / "tokens" / name)
    before = {file: mark for file, mark in marks(copied).items() if file.startswith("layers")}
    found = problems(copied)
    assert f"tokens/{name}: " in found[0]
    assert "saemill cache" in found[-1]
    cache(tokens, neox, copied, layers=(1,))
    assert file_hashes(copied) == file_hashes(made.path)
    assert marks(copied).items() >= before.items()


# Refused


def changed_model(folder: str, out: Path, name: str, change: Callable[[Tensor], Tensor]) -> str:
    """A copy of a checkpoint with one tensor changed."""
    shutil.copytree(folder, out)
    weights = safetensors.torch.load_file(out / "model.safetensors")
    weights[name] = change(weights[name])
    safetensors.torch.save_file(weights, out / "model.safetensors", {"format": "pt"})
    return str(out)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_nan_is_refused_and_nothing_committed(
    dtype: str, tokens: TokenStore, neox: str, tmp_path: Path
) -> None:
    """Oracle: a NaN in a weight of block 1; block 0 is cached as ever, block 1 is not."""
    weight = "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"
    model = changed_model(
        neox, tmp_path / "model", weight, lambda w: w.index_fill(0, torch.tensor(3), torch.nan)
    )
    out = tmp_path / "acts"
    with pytest.raises(DataError, match=r"layers\.1, shard 0; the model itself computes them: try") as error:
        cache(tokens, model, out, dtype=dtype)
    assert "512 values of 512 tokens are NaN or infinite" in str(error.value)
    assert not list((out / "layers.1").glob("c/*/*"))
    assert not (out / "layers.1" / "commits").exists()
    assert cache(tokens, model, out, layers=(0,), dtype=dtype).sites == ["layers.0"]


def test_a_store_that_is_given_up_leaves_other_files(
    tokens: TokenStore, neox: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the files that came into the folder meanwhile; of the store, which holds no shard, none is
    left."""
    weight = "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"
    model = changed_model(neox, tmp_path / "model", weight, lambda w: w * torch.nan)
    out, load = tmp_path / "acts", cache_run._load

    def with_notes(*arguments: Any) -> Any:
        (out / "mine" / "commits").mkdir(parents=True)
        (out / "mine" / "commits" / "notes.json").touch()
        (out / "notes.txt").touch()
        return load(*arguments)

    monkeypatch.setattr(cache_run, "_load", with_notes)
    with pytest.raises(DataError, match="NaN or infinite"):
        cache(tokens, model, out)
    left = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
    assert left == ["mine", "mine/commits", "mine/commits/notes.json", "notes.txt"]


def test_a_site_is_compared_with_those_that_are_finished(
    tokens: TokenStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: BLOOM's MLP returns what its block returns, which is cached by an earlier call."""
    config = transformers.BloomConfig(
        vocab_size=tokens.tokenizer.vocab_size, hidden_size=16, n_layer=2, n_head=2
    )
    transformers.BloomModel(config).save_pretrained(tmp_path / "bloom")
    cache(tokens, str(tmp_path / "bloom"), tmp_path / "acts", layers=(1,), max_tokens=SHARD)
    assert "warning" not in capsys.readouterr().out
    cache(tokens, str(tmp_path / "bloom"), tmp_path / "acts", sites=("h.1.mlp",))
    told = "warning: h.1.mlp and h.1 give the same activations: one of them is enough"
    assert told in capsys.readouterr().out


def test_overflow_of_fp16_is_refused_and_the_advice_helps(
    tokens: TokenStore, neox: str, tmp_path: Path
) -> None:
    """Oracle: a bias of 70,000, beyond fp16's 65,504; bf16 holds it."""
    bias = "gpt_neox.layers.1.mlp.dense_4h_to_h.bias"
    model = changed_model(neox, tmp_path / "model", bias, lambda b: b.index_fill(0, torch.tensor(3), 7e4))
    out = tmp_path / "acts"
    with pytest.raises(DataError, match="fp16 ends at 65,504: store with --dtype bf16"):
        cache(tokens, model, out, dtype="fp16")
    assert not list((out / "layers.1").glob("c/*/*"))
    assert not (out / "layers.1" / "commits").exists()
    store = cache(tokens, model, out, dtype="bf16")
    assert store.read("layers.1", 0, 4800)[:, 3].min() > 65_504
    both = tmp_path / "both"
    cache(tokens, model, both, layers=(0,), dtype="fp16")
    with pytest.raises(DataError, match="with --dtype bf16, in another folder, as this store has shards"):
        cache(tokens, model, both, layers=(1,), dtype="fp16")
    assert ActivationStore(both).sites == ["layers.0"]


def test_a_bad_shard_later_leaves_the_good_ones(
    tokens: TokenStore, neox: str, truth: dict[str, Tensor], tmp_path: Path
) -> None:
    """Oracle: a token that first occurs in shard 4; shards 0 to 3 stay, and the site is unfinished."""
    ids = tokens.rows(0, N_ROWS).reshape(-1)
    first = {int(token): int(np.argmax(ids == token)) // SHARD for token in np.unique(ids)}
    token = next(token for token, shard in first.items() if shard == 4)
    model = changed_model(
        neox, tmp_path / "model", "gpt_neox.embed_in.weight",
        lambda w: w.index_fill(0, torch.tensor(token), torch.inf),
    )  # fmt: skip
    with pytest.raises(DataError, match=r"layers\.1, shard 4; .*keeps its finished ones"):
        cache(tokens, model, tmp_path / "acts")
    commits = (tmp_path / "acts" / "layers.1" / "commits").iterdir()
    assert sorted(file.name for file in commits) == [f"{i}.json" for i in range(4)]
    assert ActivationStore(tmp_path / "acts").sites == []
    assert problems(tmp_path / "acts")[0] == "layers.1: unfinished, 4 of 10 shards are there"


def test_too_little_disk_is_refused(
    tokens: TokenStore, neox: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: 4,800 tokens of 32 values of 2 bytes at two sites; what is on the disk already counts."""
    needed = 4800 * 32 * 2
    free = needed * 2 - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=free))
    with pytest.raises(ConfigError, match=r"0\.6 MiB are needed .* choose fewer sites or --max-tokens"):
        cache(tokens, neox, tmp_path / "deep" / "acts", layers=(0, 1))
    assert not (tmp_path / "deep").exists()
    cache(tokens, neox, tmp_path / "acts", layers=(0,))
    cache(tokens, neox, tmp_path / "acts", layers=(0, 1))
    free = 0
    cache(tokens, neox, tmp_path / "acts", layers=(0, 1))


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("dtype", {"dtype": "fp16"}),
        ("shard_tokens", {"shard_tokens": 1024}),
        ("n_rows", {"max_tokens": 3200}),
        ("mask", {"mask": MaskConfig(first_positions=2)}),
        ("model_dtype", {"model_dtype": "bf16"}),
    ],
)
def test_other_settings_in_the_same_place_are_refused(
    key: str, changes: dict[str, Any], copied: Path, tokens: TokenStore, neox: str
) -> None:
    """Oracle: the one key that differs, and the store as it was."""
    before = marks(copied)
    with pytest.raises(ConfigError, match="was made with other settings") as error:
        cache(tokens, neox, copied, layers=(0, 2), **changes)
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith(f"  {key}: there ")
    assert marks(copied) == before


def test_another_model_or_other_tokens_are_refused(
    copied: Path, tokens: TokenStore, neox: str, corpus: Path, tokenizer_folder: str, tmp_path: Path
) -> None:
    """Oracle: one weight changed; another order of the documents."""
    bias = "gpt_neox.layers.1.mlp.dense_4h_to_h.bias"
    model = changed_model(neox, tmp_path / "model", bias, lambda b: b + 1)
    other = make_tokens(corpus, tokenizer_folder, tmp_path / "tokens", shuffle_seed=7)
    before = marks(copied)
    with pytest.raises(ConfigError, match=r"other settings:\n  model_fingerprint: there .*\nUse"):
        cache(tokens, model, copied)
    with pytest.raises(ConfigError, match=r"other settings:\n  tokens_fingerprint: there .*\nUse"):
        cache(other, neox, copied)
    assert marks(copied) == before


def test_tokens_that_the_model_cannot_take_are_refused(
    tokens: TokenStore, corpus: Path, tokenizer_folder: str, tmp_path: Path
) -> None:
    """Oracle: a model of 16 positions, and one that lacks the largest id in the rows, which the message shows
    as text; nothing is written. What the tokenizer has beyond that does no harm."""
    largest = max(int(tokens.rows(row, row + 1).max()) for row in range(tokens.n_rows))
    token = transformers.AutoTokenizer.from_pretrained(tokenizer_folder).convert_ids_to_tokens(largest)
    too_large = rf"the id {largest} \({re.escape(repr(token))}\), but .* the ids 0\.\.{largest - 1};"
    small = {"vocab_size": 8192, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    for i, (changes, message) in enumerate(
        [({"max_position_embeddings": 16}, "at most 16"), ({"vocab_size": largest}, too_large)]
    ):
        transformers.GPTNeoXConfig(**small | changes).save_pretrained(tmp_path / str(i))
        with pytest.raises(ConfigError, match=message):
            cache(tokens, str(tmp_path / str(i)), tmp_path / "acts")
    assert not (tmp_path / "acts").exists()
    assert tokens.tokenizer.vocab_size > largest + 1
    check_fit(transformers.GPTNeoXConfig(**small | {"vocab_size": largest + 1}), "m", tokens)


def with_tokenizer(model: str, out: Path, tokenizer: str, change: Callable[[str], str] = str) -> str:
    """A copy of a checkpoint with a tokenizer beside it, whose serialisation is changed."""
    shutil.copytree(model, out)
    shutil.copy(Path(tokenizer) / "tokenizer_config.json", out)
    text = (Path(tokenizer) / "tokenizer.json").read_text()
    (out / "tokenizer.json").write_text(change(text))
    return str(out)


def test_tokens_of_another_tokenizer_are_refused(
    tokens: TokenStore, neox: str, tokenizer_folder: str, tmp_path: Path
) -> None:
    """Oracle: the same tokenizer, and one with two ids exchanged; the flag takes just the second."""
    mine = with_tokenizer(neox, tmp_path / "mine", tokenizer_folder)

    def exchange(text: str) -> str:
        serialised = json.loads(text)
        ids = serialised["model"]["vocab"]
        ids["a"], ids["b"] = ids["b"], ids["a"]
        return json.dumps(serialised)

    other = with_tokenizer(neox, tmp_path / "other", tokenizer_folder, exchange)
    with pytest.raises(ConfigError, match=f"comes with another one, .* --tokenizer {other}, or say --allow"):
        cache(tokens, other, tmp_path / "acts")
    with pytest.raises(ConfigError, match="allow_other_tokenizer has no effect"):
        cache(tokens, mine, tmp_path / "acts", allow_other_tokenizer=True)
    with pytest.raises(ConfigError, match=f"has no effect: none comes with {neox}; leave it out"):
        cache(tokens, neox, tmp_path / "acts", allow_other_tokenizer=True)
    assert not (tmp_path / "acts").exists()
    cache(tokens, mine, tmp_path / "acts", max_tokens=64)
    cache(tokens, other, tmp_path / "acts2", max_tokens=64, allow_other_tokenizer=True)
    assert file_hashes(tmp_path / "acts" / "layers.1") == file_hashes(tmp_path / "acts2" / "layers.1")


@pytest.mark.parametrize("kind", ["neox", "llama", "gpt2", "bert"])
def test_a_model_without_tokenizer_is_told_and_taken(
    kind: str,
    tokens: TokenStore,
    tiny_models: dict[str, str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Oracle: folders with weights alone, of which transformers makes empty tokenizers; no bars either."""
    model = tiny_models[kind]
    cache(tokens, model, tmp_path / "acts", layers=(), sites=("residual.1",), max_tokens=64)
    shown = capfd.readouterr()
    assert f"no tokenizer comes with {model}: whether the tokens were made for it was not" in shown.out
    assert "Loading weights" not in shown.err


def test_the_plan_is_what_show_tells(
    tokens: TokenStore, neox: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the sizes of the shard files, the last one padded."""
    store = cache(tokens, neox, tmp_path / "acts", dtype="fp32", sites=("layers.1.mlp.dense_h_to_4h",))
    plan = capsys.readouterr().out
    n_bytes = sum(file.stat().st_size for file in tmp_path.glob("acts/*/c/*/0"))
    size = f"{n_bytes / 2**20:,.1f} MiB"
    assert "per site in 10 shards of 512 tokens, the last one padded:" in plan
    assert f"D     64  {size:>16}" in plan
    assert f"D 64, {size}," in describe(store.path)


def test_folders_are_refused_before_the_model_is_looked_at(tokens: TokenStore, tmp_path: Path) -> None:
    """Oracle: a model that does not exist would be the next error; and a file where the store would go."""
    (tmp_path / "file").write_text("keep me")
    with pytest.raises(ConfigError, match=r"out must be a folder, but .*file is a file"):
        cache(tokens, "./no-model", tmp_path / "file" / "acts")
    with pytest.raises(StoreError, match="holds other files"):
        cache(tokens, "./no-model", tmp_path)
    with pytest.raises(StoreError, match="is not a finished token store"):
        cache(tmp_path / "no-tokens", "./no-model", tmp_path / "acts")


def test_a_folder_with_other_files_is_refused(
    tokens: TokenStore, neox: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the file that was there."""
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(StoreError, match=r"holds other files \(notes.txt\); choose a new folder"):
        cache(tokens, neox, tmp_path)
    assert capsys.readouterr().out == "", "no plan is told for a folder that is refused"
    assert file_hashes(tmp_path).keys() == {"notes.txt"}


@pytest.mark.parametrize("same", [True, False])
def test_a_token_store_of_the_users_own_is_never_deleted(
    same: bool, tokens: TokenStore, neox: str, corpus: Path, tokenizer_folder: str, tmp_path: Path
) -> None:
    """Oracle: its files before; it lies where the copy of the tokens would go."""
    own = make_tokens(corpus, tokenizer_folder, tmp_path / "work" / "tokens", shuffle_seed=9)
    before = marks(own.path)
    with pytest.raises(StoreError, match="choose a new folder"):
        cache(own if same else tokens, neox, tmp_path / "work")
    assert marks(own.path) == before


def test_an_unfinished_or_unknown_site_is_told_apart(copied: Path) -> None:
    """Oracle: the names of the finished sites in the message."""
    (copied / "layers.0" / "manifest.json").unlink()
    store = ActivationStore(copied)
    with pytest.raises(StoreError, match=r"site 'layers.0' .* is unfinished; finished: layers.1\. "):
        store.site("layers.0")
    with pytest.raises(StoreError, match=r"site 'layers.7' .* is not in the store; finished: layers.1\. "):
        store.site("layers.7")


def test_a_store_of_another_format_is_refused(copied: Path) -> None:
    """Oracle: the format's name changed in the settings; and a folder that is none."""
    meta = durable.read_json(copied / "zarr.json")
    meta["attributes"]["saemill"]["format"] = "saemill activations 0"
    (copied / "zarr.json").write_text(json.dumps(meta))
    with pytest.raises(StoreError, match="format 'saemill activations 0', but this version"):
        ActivationStore(copied)
    with pytest.raises(StoreError, match="is no activation store"):
        ActivationStore(copied / "tokens")


def test_the_fingerprint_names_settings_and_tokens(
    made: ActivationStore, tokens: TokenStore, neox: str, tmp_path: Path
) -> None:
    """Oracle: another mask, another amount; a site more is the same store."""
    other = cache(tokens, neox, tmp_path / "mask", mask=MaskConfig(first_positions=2))
    fewer = cache(tokens, neox, tmp_path / "fewer", max_tokens=3200)
    assert len({made.fingerprint, other.fingerprint, fewer.fingerprint}) == 3
    assert cache(tokens, neox, tmp_path / "same", layers=(2,)).fingerprint == made.fingerprint
    assert dataclasses.asdict(made.mask) == dataclasses.asdict(MaskConfig())
