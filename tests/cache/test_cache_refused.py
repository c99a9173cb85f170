"""What is not cached: values that are none, folders, models and tokens that do not fit."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from caching import N_ROWS, SHARD, cache, changed_model, marks, tokenized
from crashes import file_hashes
from torch import Tensor

from saemill.cache import run as cache_run
from saemill.cache.config import CacheConfig
from saemill.common import durable
from saemill.common.errors import ConfigError, DataError, StoreError
from saemill.common.models.model import check_fit
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.tokens import TokenStore
from saemill.plan.planner import checked
from saemill.show import problems

pytestmark = pytest.mark.usefixtures("one_thread")


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
    """Oracle: 4,800 tokens of 32 values of 2 bytes at two sites, beside their records and a copy of the
    tokens; what is on the disk already counts."""
    needed = 4800 * 32 * 2
    config = CacheConfig(
        tokens=tokens.path, model=neox, out=tmp_path / "deep" / "acts", layers=(0, 1), shard_tokens=SHARD
    )
    disk = checked("cache", config).disk
    for free in (needed * 2 - 1, sum(disk.values()) - 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda _path, free=free: SimpleNamespace(free=free))
        with pytest.raises(ConfigError, match=r"MiB are needed .* choose fewer sites or --max-tokens"):
            cache(tokens, neox, tmp_path / "deep" / "acts", layers=(0, 1))
    assert not (tmp_path / "deep").exists()
    free = sum(disk.values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=free))
    cache(tokens, neox, tmp_path / "acts", layers=(0,))
    cache(tokens, neox, tmp_path / "acts", layers=(0, 1))
    cache(tokens, neox, tmp_path / "packed", compression="lz4")
    free = 0
    cache(tokens, neox, tmp_path / "acts", layers=(0, 1))
    cache(tokens, neox, tmp_path / "packed")


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
    other = tokenized(corpus, tokenizer_folder, tmp_path / "tokens", shuffle_seed=7)
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
    own = tokenized(corpus, tokenizer_folder, tmp_path / "work" / "tokens", shuffle_seed=9)
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
