"""The cache: the values that it stores, and the same store from one run or several."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tensorstore
import torch
import transformers
import zarr
from caching import BATCH, CTX_LEN, N_ROWS, N_SHARDS, SHARD, cache, hidden_states, marks, tokenized, with_zarr
from crashes import file_hashes
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from saemill.cache import run as cache_run
from saemill.cache.config import CacheConfig
from saemill.cache.fill import batch_rows
from saemill.common.errors import ConfigError
from saemill.common.stores.activations import SHUFFLE_KEY, ActivationStore
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.permutation import permutation
from saemill.common.stores.shards import ShardedArray
from saemill.common.stores.token_writer import write_token_store
from saemill.common.stores.tokens import TokenizerInfo, TokenStore
from saemill.show import describe

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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
@hypothesis_settings(max_examples=60)
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
    again = tokenized(corpus, tokenizer_folder, tmp_path / "tokens")
    cache(again, neox, tmp_path / "acts", layers=(0, 1))
    shutil.rmtree(tmp_path / "tokens")
    (tmp_path / "acts").rename(tmp_path / "elsewhere")
    moved = ActivationStore(tmp_path / "elsewhere")
    assert torch.equal(moved.read("layers.0", 100, 900), made.read("layers.0", 100, 900))
    assert moved.fingerprint == made.fingerprint


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


def test_the_fingerprint_names_settings_and_tokens(
    made: ActivationStore, tokens: TokenStore, neox: str, tmp_path: Path
) -> None:
    """Oracle: another mask, another amount; a site more is the same store."""
    other = cache(tokens, neox, tmp_path / "mask", mask=MaskConfig(first_positions=2))
    fewer = cache(tokens, neox, tmp_path / "fewer", max_tokens=3200)
    assert len({made.fingerprint, other.fingerprint, fewer.fingerprint}) == 3
    assert cache(tokens, neox, tmp_path / "same", layers=(2,)).fingerprint == made.fingerprint
    assert dataclasses.asdict(made.mask) == dataclasses.asdict(MaskConfig())


def test_rows_per_pass_are_those_of_2048_tokens_on_a_cpu() -> None:
    """Oracle: by hand. What is asked for is taken, on a GPU 16 rows if nothing is, and a long row is one."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    found = [
        batch_rows(*given) for given in ((None, 512, cpu), (None, 4096, cpu), (None, 512, gpu), (3, 512, cpu))
    ]
    assert found == [4, 1, 16, 3]
