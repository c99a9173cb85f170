"""Rows that are too long: which are left out, of what, and what is told of them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import finish, launch
from numpy.typing import NDArray
from stores import make_store, make_tokens
from training import config, files, killed_at, structured
from without_norms import forget_norms

from saemill.cli import app
from saemill.common import records
from saemill.common.config import resolve
from saemill.common.errors import ConfigError, StoreError
from saemill.common.stores import runs
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.mask import TrainingMask
from saemill.common.stores.site_records import Commit
from saemill.show import problems
from saemill.train.config import TrainConfig
from saemill.train.run import run
from saemill.train.stream.epochs import open_epochs
from saemill.train.stream.loader import Loader
from saemill.train.stream.rows import TrainingRows

N_ROWS, CTX_LEN, D = 256, 32, 16
LONG_IDS = tuple(range(100, 260))
"""Tokens at which rows are long, so that a mask of ids can name the same ones."""
ONLY_IDS = TrainingMask(token_ids=LONG_IDS, norm_over_median=None)
OFF = TrainingMask(norm_over_median=None)


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.int64]:
    """The token at each address of the stores below."""
    tokens = make_tokens(tmp_path_factory.mktemp("ids") / "tokens", N_ROWS, CTX_LEN)
    return tokens.rows(0, N_ROWS).astype(np.int64).reshape(-1)


@pytest.fixture(scope="module")
def planted(ids: NDArray[np.int64], tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Rows a hundred times as long at some tokens: at site a the first half of them, at b all but a tenth."""
    values_TD = structured(len(ids))
    a_TD, b_TD = values_TD.clone(), values_TD + 1
    a_TD[np.isin(ids, LONG_IDS[:80])] *= 100
    b_TD[np.isin(ids, LONG_IDS[16:])] *= 100
    return make_store(tmp_path_factory.mktemp("planted"), N_ROWS, CTX_LEN, D, 2048, a_TD, b_TD)


def loader(store: ActivationStore, mask: TrainingMask, sites: tuple[str, ...] = ("a", "b")) -> Loader:
    settings = {"batch_tokens": 256, "buffer_tokens": 1024, "seed": 3}
    positions = mask.positions(store.mask)
    return open_epochs(store, list(sites), positions, norm_over_median=mask.norm_over_median, **settings)


def weights(out: Path) -> dict[str, bytes]:
    return {name: content for name, content in files(out).items() if name != "metrics"}


def test_rows_too_long_at_any_site_are_left_out_of_all(planted: ActivationStore) -> None:
    """Oracle: a mask that names the same tokens by their ids, bit by bit: batches, epoch; and numpy's count
    of rows by norm. A loader of one site alone, as one of several processes has, reads the same stream."""
    found, wanted = loader(planted, TrainingMask()), loader(planted, ONLY_IDS)
    assert found.epoch_tokens == wanted.epoch_tokens < loader(planted, OFF).epoch_tokens
    for i in (0, 7, found.epoch_tokens // 256, 40):
        for site in ("a", "b"):
            assert torch.equal(found.batch(i)[site], wanted.batch(i)[site])
    so_far = [found.n_left_out(found.epoch_tokens * i // 8) for i in range(17)]
    assert so_far == sorted(so_far)
    assert (so_far[0], so_far[8], so_far[16]) == (0, found.rows.n_long, 2 * found.rows.n_long)
    assert 0 < so_far[1] < so_far[4] < so_far[8]
    found.restrict(["a"])
    assert torch.equal(found.batch(9)["a"], wanted.batch(9)["a"])
    for site in ("a", "b"):
        norms = np.linalg.norm(planted.read(site, 0, planted.n_tokens).numpy(), axis=1)
        kept = [planted.keep_addresses(i, planted.mask, held_out=False) for i in range(planted.n_shards)]
        norms = norms[np.concatenate(kept)]
        assert found.rows.n_long_at[site] == (norms > 10 * np.median(norms)).sum() > 0
    assert found.rows.n_long == loader(planted, OFF).epoch_tokens - found.epoch_tokens
    assert "more than 10 times the median norm" in "".join(found.rows.describe())


def test_the_bound_is_a_setting(planted: ActivationStore) -> None:
    """Oracle: numpy over the rows' norms, those within the rounding of a norm left open."""
    norms = np.linalg.norm(planted.read("a", 0, planted.n_tokens).numpy(), axis=1)
    kept = np.concatenate(
        [planted.keep_addresses(i, planted.mask, held_out=False) for i in range(planted.n_shards)]
    )
    norms = norms[kept]
    for factor in (1.05, 2.0, 99.0, 1e4):
        n_long = loader(planted, TrainingMask(norm_over_median=factor), ("a",)).rows.n_long
        low, high = ((norms > factor * np.median(norms) * by).sum() for by in (1.008, 0.992))
        assert low <= n_long <= high


@pytest.mark.parametrize("mask", [TrainingMask(), TrainingMask(first_positions=3)], ids=str)
def test_statistics_are_those_of_the_rows_that_are_trained_on(
    mask: TrainingMask, planted: ActivationStore, ids: NDArray[np.int64]
) -> None:
    """Oracle: numpy in float64 over the kept rows, chosen by their tokens."""
    rows = loader(planted, mask).rows
    keep = np.concatenate(
        [
            planted.keep_addresses(i, mask.positions(planted.mask), held_out=False)
            for i in range(planted.n_shards)
        ]
    )
    keep &= ~np.isin(ids, LONG_IDS)
    for site in ("a", "b"):
        values = planted.read(site, 0, planted.n_tokens).double().numpy()[keep]
        found = rows.statistics(site)
        assert found.n_tokens == len(values) == rows.n_tokens
        np.testing.assert_allclose(found.mean_D.numpy(), values.mean(0), rtol=1e-10)
        np.testing.assert_allclose(found.variance_D.numpy(), values.var(0), rtol=1e-8)
        assert found.total_variance < 1e-3 * planted.site(site).statistics.total_variance


def test_rows_so_long_that_nothing_is_left_by_subtraction(
    tmp_path: Path, ids: NDArray[np.int64], capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: numpy in float64 over the other rows; subtraction would leave no digit of their variance."""
    values_TD = structured(len(ids))
    values_TD[np.isin(ids, LONG_IDS)] *= 1e12
    made = make_store(tmp_path, N_ROWS, CTX_LEN, D, 2048, values_TD)
    rows = loader(made, TrainingMask(), ("a",)).rows
    keep = np.concatenate([made.keep_addresses(i, made.mask, held_out=False) for i in range(made.n_shards)])
    kept = values_TD.double().numpy()[keep & ~np.isin(ids, LONG_IDS)]
    np.testing.assert_allclose(rows.statistics("a").variance_D.numpy(), kept.var(0), rtol=1e-9)
    assert "a: all its shards are read once" in capsys.readouterr().out


def test_an_sae_is_that_of_a_store_whose_long_tokens_are_masked(
    planted: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: a run whose mask names these tokens: every weight but for the rounding of centre and scale,
    which come by subtraction here. The plan, the log and the records tell how many are left out."""
    run(config(planted, tmp_path / "found", site=("a", "b")))
    told = capsys.readouterr().out
    run(config(planted, tmp_path / "wanted", site=("a", "b"), mask=ONLY_IDS))
    for name in runs.finished(tmp_path / "found").variants:
        found, wanted = ((tmp_path / out / name / "sae.safetensors") for out in ("found", "wanted"))
        tensors = [_tensors(file) for file in (found, wanted)]
        for key, value in tensors[1].items():
            torch.testing.assert_close(tensors[0][key], value, rtol=1e-5, atol=1e-5)
    n_long = loader(planted, TrainingMask()).rows.n_long
    assert f"{n_long:,} tokens (" in told
    finished = runs.finished(tmp_path / "found")
    assert (finished.norm_over_median, finished.n_long_tokens) == (10, n_long)
    lines = [json.loads(line) for line in (tmp_path / "found" / "metrics.jsonl").read_text().splitlines()]
    assert {line["left_out"] for line in lines} == {n_long}  # the store is one window
    off = runs.finished(tmp_path / "wanted")
    assert (off.norm_over_median, off.n_long_tokens) == (None, 0)


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def test_a_store_without_long_rows_is_trained_on_as_without_the_filter(
    store: ActivationStore, tmp_path: Path
) -> None:
    """Oracle: the filter turned off: the same bytes of weights and metrics."""
    run(config(store, tmp_path / "on"))
    run(config(store, tmp_path / "off", mask=OFF))
    assert files(tmp_path / "on") == files(tmp_path / "off")
    assert runs.identity(tmp_path / "on").run != runs.identity(tmp_path / "off").run


def test_a_run_killed_and_resumed_leaves_out_the_same(
    planted: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the run without a stop, over two epochs, bit by bit."""
    changes = {"site": ("a", "b"), "k": (2,), "num_latents": (48,), "max_tokens": None, "epochs": 2}
    run(config(planted, tmp_path / "whole", **changes))
    for step in (9, 40):
        killed_at(step, config(planted, tmp_path / "cut", **changes), monkeypatch)
    run(config(planted, tmp_path / "cut", **changes))
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    last = json.loads((tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["left_out"] == 2 * loader(planted, TrainingMask()).rows.n_long


def test_two_processes_leave_out_the_same(planted: ActivationStore, tmp_path: Path) -> None:
    """Oracle: one process, bit by bit. Each of the two reads the site of its own SAE alone."""
    command = [
        "train", str(planted.path), "--site", "a,b", "--k", "2", "--num-latents", "48", "--lr", "3e-3",
        "--batch-size", "256", "--max-tokens", "5k", "--save-every", "7", "--log-every", "5",
        "--device", "cpu", "--precision", "fp32",
    ]  # fmt: skip
    with pytest.raises(SystemExit, match=r"^0$"):
        app([*command, "-o", str(tmp_path / "one")])
    finish(launch(2, "-m", "saemill", *command, "-o", str(tmp_path / "two"), "--latent-ranks", "1"))
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert runs.finished(tmp_path / "two").n_long_tokens > 0


def test_a_store_of_before_norms_were_kept(
    planted: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the same store with its norms: rows and statistics; no file changes, and it is whole."""
    old = forget_norms(planted, tmp_path / "old")
    before = {file: file.read_bytes() for file in old.path.rglob("*") if file.is_file()}
    found, wanted = loader(old, TrainingMask()), loader(planted, TrainingMask())
    assert "hold no norms" in capsys.readouterr().out
    for i in range(planted.n_shards):
        assert np.array_equal(found.rows.kept.of_shard(i), wanted.rows.kept.of_shard(i))
    assert torch.equal(found.rows.statistics("a").mean_D, wanted.rows.statistics("a").mean_D)
    assert found.rows.n_long_at == wanted.rows.n_long_at
    assert before == {file: file.read_bytes() for file in old.path.rglob("*") if file.is_file()}
    assert problems(old.path) == []
    loader(old, OFF)
    assert "norms" not in capsys.readouterr().out


def _other_shard(commit: Commit) -> Commit:
    return commit.model_copy(update={"xxh3": "0" * 16})


def _cut(commit: Commit) -> Commit:
    return commit.model_copy(update={"norms": (commit.norms or "")[:-8]})


@pytest.mark.parametrize(
    ("change", "message"), [(_other_shard, "of another shard"), (_cut, "rows have a norm")]
)
def test_norms_that_are_not_the_rows_are_refused(
    change: Callable[[Commit], Commit], message: str, planted: ActivationStore, tmp_path: Path
) -> None:
    """Oracle: the message; the record is whole by its checksum."""
    copy = forget_norms(planted, tmp_path / "copy", keep=True)
    file = copy.path / "a" / "commits" / "1.json"
    records.write(file, change(records.read(file, Commit, "")))
    with pytest.raises(StoreError, match=message):
        loader(ActivationStore(copy.path), TrainingMask())


def test_a_median_of_0_is_refused(tmp_path: Path) -> None:
    """Oracle: the message, whose advice helps."""
    values_TD = torch.zeros(64 * CTX_LEN, D)
    values_TD[::3] = torch.randn(len(values_TD[::3]), D)
    made = make_store(tmp_path, 64, CTX_LEN, D, 2048, values_TD, values_TD)
    with pytest.raises(ConfigError, match=r"half of the tokens at a are 0 .*norm_over_median=none"):
        loader(made, TrainingMask())
    loader(made, OFF)


def test_how_it_is_set(planted: ActivationStore) -> None:
    """Oracle: by hand. Positions that are not given are the store's."""
    least = {"acts": "a", "out": "o"}
    for text, expected in (("none", None), ("5", 5.0), ("2.5", 2.5)):
        made = resolve(TrainConfig, "train", least, sets=[f"train.mask.norm_over_median={text}"])
        assert made.mask.norm_over_median == expected
        assert made.mask.positions(planted.mask) == planted.mask
    for bad in ("0.5", "off", "nan", "-3"):
        with pytest.raises(ConfigError, match="norm_over_median must be"):
            resolve(TrainConfig, "train", least, sets=[f"train.mask.norm_over_median={bad}"])
    given = TrainingMask(first_positions=4).positions(planted.mask)
    assert (given.first_positions, given.special_tokens) == (4, planted.mask.special_tokens)
    rows = TrainingRows(planted, {"a": planted.site("a")}, planted.mask, None)
    assert rows.describe() == []
