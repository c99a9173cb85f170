"""`saemill diff` as a whole: two models of planted dictionaries, stops, damage, and what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from stores import make_embeddings, make_store
from torch import Tensor
from training import killed_at

from saemill.cli import app
from saemill.common.errors import ConfigError, SaemillError, StoreError
from saemill.common.sae.sae import Sae
from saemill.common.stores import diffs, runs
from saemill.common.stores.activations import ActivationStore
from saemill.diff.config import DiffConfig, configs_of, crosscoder_of
from saemill.diff.run import run
from saemill.show import describe, problems

pytestmark = pytest.mark.usefixtures("one_thread")
D, N_SHARED, N_ONLY = 32, 24, 8
SHAPE: dict[str, Any] = {"n_rows": 256, "ctx_len": 32, "d": D, "shard_tokens": 2048}
TRAINING: dict[str, Any] = {
    "k": 4, "num_latents": 80, "lr": 4e-3, "batch_size": 256, "max_tokens": 256 * 300, "precision": "fp32",
    "device": "cpu", "dead_after_tokens": 4096, "save_every": 100,
}  # fmt: skip
MEASURE: dict[str, Any] = {"n_latents": 2, "n_contexts": 2, "context_tokens": 2000}


def planted() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Activations of two models at the same tokens, and the directions of each: `N_SHARED` that both have,
    in B a little turned, then `N_ONLY` of its own. B is longer, and elsewhere."""
    generator = torch.Generator().manual_seed(5)
    n = SHAPE["n_rows"] * SHAPE["ctx_len"]

    def unit(rows: Tensor) -> Tensor:
        return torch.nn.functional.normalize(rows, dim=1)

    shared = unit(torch.randn(N_SHARED, D, generator=generator))
    turned = unit(shared + 0.05 * torch.randn(N_SHARED, D, generator=generator))
    only_a, only_b = (unit(torch.randn(N_ONLY, D, generator=generator)) for _ in "ab")
    n_codes = N_SHARED + 2 * N_ONLY
    active = torch.rand(n, n_codes, generator=generator) < 0.08
    codes = active * (1 + torch.rand(n, n_codes, generator=generator))
    of_shared, of_a, of_b = codes.split([N_SHARED, N_ONLY, N_ONLY], 1)
    noise = 0.02 * torch.randn(2, n, D, generator=generator)
    x_a = of_shared @ shared + of_a @ only_a + noise[0] + 3
    x_b = 5 * (of_shared @ turned + of_b @ only_b + noise[1]) - 2
    return x_a, x_b, torch.cat([shared, only_a]), torch.cat([turned, only_b])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[ActivationStore, ActivationStore]:
    """Stores of both models, with the site a."""
    x_a, x_b, _, _ = planted()
    stores = [
        make_store(tmp_path_factory.mktemp(name), values_TD=x_TD, model=f"{name}/hf", **SHAPE)
        for name, x_TD in (("base", x_a), ("chat", x_b))
    ]
    return stores[0], stores[1]


def asked(out: Path, pair: tuple[ActivationStore, ActivationStore], **changes: Any) -> Any:
    """Arguments of `run`: a diff of both models at the site a."""
    stores = {"acts": pair[0].path, "with_acts": pair[1].path, "site": "a"}
    return DiffConfig(out=out, **MEASURE), {**TRAINING, **stores, **changes}


@pytest.fixture(scope="module")
def diffed(pair: tuple[ActivationStore, ActivationStore], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a diff."""
    out = tmp_path_factory.mktemp("diffs") / "d"
    run(*asked(out, pair))
    return out


def test_planted_latents_are_found_and_told_apart(diffed: Path) -> None:
    """Oracle: the two dictionaries that were planted. Each planted direction's nearest latent, by the cosine
    with the side's decoder rows, is of the kind that the direction is of."""
    _, _, of_a, of_b = planted()
    (variant,) = runs.finished(diffed / "run").variants
    sae = Sae.load(diffed / "run" / variant)
    table = pq.read_table(diffed / "latents.parquet").to_pydict()
    kinds = np.array(table["kind"])
    live = np.flatnonzero(kinds != "rare")
    found = {}
    for side, directions, rows_FD in zip("AB", (of_a, of_b), sae.W_dec.split(D, 1), strict=True):
        unit_FD = torch.nn.functional.normalize(rows_FD, dim=1)[live]
        cosine, nearest = (directions @ unit_FD.T).max(1)
        assert (cosine > 0.9).float().mean() > 0.9
        found[side] = kinds[live[nearest.numpy()]]
    for side in "AB":
        assert (found[side][:N_SHARED] == "shared").mean() > 0.9
        assert (found[side][N_SHARED:] == f"{side} only").mean() > 0.9
    assert not set(found["A"][:N_SHARED]) & {"A only", "B only"}
    diff = diffs.read(diffed)
    assert diff.kinds["A only"] >= N_ONLY - 1
    assert all(side.fvu < 0.15 for side in diff.sides)
    assert [side.name for side in diff.sides] == ["base/hf a", "chat/hf a"]


def test_the_page_shows_them_with_contexts(diffed: Path) -> None:
    """Oracle: the record beside it; the page is whole HTML, loads nothing, and has each latent and place."""
    diff, page = diffs.read(diffed), (diffed / "report.html").read_text()
    assert "default-src 'none'" in page
    assert not re.search(r"<script|src=|href=", page)
    assert "The histogram alone misleads" in page
    groups = {shown.group for shown in diff.shown}
    assert {"A only", "B only", "shared"} <= groups
    for shown in diff.shown:
        assert f"latent {shown.latent} <small>" in page
        assert 1 <= len(shown.contexts) <= MEASURE["n_contexts"]
    assert page.count("<circle") == sum(diff.kinds[k] for k in diff.kinds if k[0] in "AB")
    assert "A only" in describe(diffed)


def test_a_stopped_diff_goes_on_to_the_same(
    diffed: Path,
    pair: tuple[ActivationStore, ActivationStore],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Oracle: the diff that was not stopped, bit by bit: weights and table; a third call does nothing."""
    config, training = asked(tmp_path / "d", pair)
    killed_at(170, crosscoder_of(config.out, training, ["a"]), monkeypatch)
    assert not (tmp_path / "d" / "diff.json").exists()
    run(config, training)
    for file in ("latents.parquet", "report.html"):
        assert (tmp_path / "d" / file).read_bytes() == (diffed / file).read_bytes()
    before = (tmp_path / "d" / "diff.json").read_bytes()
    capsys.readouterr()
    run(config, training)
    assert "is there already" in capsys.readouterr().out
    assert (tmp_path / "d" / "diff.json").read_bytes() == before


@pytest.mark.parametrize("name", ["latents.parquet", "report.html", "diff.json"])
def test_damage_is_found_and_mended(
    diffed: Path, pair: tuple[ActivationStore, ActivationStore], name: str
) -> None:
    """Oracle: the files as they were before a byte was changed; the same call writes them again."""
    assert problems(diffed) == []
    file = diffed / name
    before = file.read_bytes()
    damaged = bytearray(before)
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    (line,) = problems(diffed)
    assert name in line
    assert "Run the same `saemill diff` again" in line
    run(*asked(diffed, pair))
    assert file.read_bytes() == before
    assert problems(diffed) == []


def test_damage_of_its_run_is_found(diffed: Path) -> None:
    """Oracle: a byte of the weights."""
    (variant,) = runs.finished(diffed / "run").variants
    file = diffed / "run" / variant / "sae.safetensors"
    before = file.read_bytes()
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert any("sae.safetensors" in line for line in problems(diffed))
    file.write_bytes(before)
    assert problems(diffed) == []


def test_two_sites_of_one_store(tmp_path: Path) -> None:
    """Oracle: site b is site a plus 1, so every latent that is told of is shared; by the command line."""
    store = make_store(tmp_path, values_TD=planted()[0], **SHAPE)
    words = [
        "diff", str(store.path), "--site", "a+b", "-o", str(tmp_path / "d"), "--k", "4",
        "--num-latents", "48",
        "--batch-size", "256", "--max-tokens", "15k", "--n-latents", "1", "--n-contexts", "1",
        "--set", "train.precision=fp32", "--set", "diff.measure_tokens=500", "--device", "cpu",
    ]  # fmt: skip
    app(words, standalone_mode=False)
    diff = diffs.read(tmp_path / "d")
    assert [side.name for side in diff.sides] == ["a", "b"]
    assert diff.n_tokens == 500
    assert diff.kinds["shared"] + diff.kinds["rare"] == 48


def test_tokens_and_passages_do_not_mix(tmp_path: Path) -> None:
    """Oracle: the message."""
    (tmp_path / "a").mkdir()
    path, _ = make_embeddings(tmp_path / "a")
    with pytest.raises(ConfigError, match="one holds tokens, the other passages"):
        ActivationStore(path, make_store(tmp_path / "b", values_TD=planted()[0], **SHAPE).path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"site": None, "with_acts": None}, "name a second store to compare with, or two sites of the one"),
        ({"site": "a", "with_acts": None}, "name a second store to compare with"),
        ({"site": None}, "name a site of both stores with --site; both stores have a, b"),
        ({"site": "c"}, "site 'c' of .* is not in the store; finished: a, b"),
        ({"site": "a,b"}, "a diff is of one site, got a,b"),
        ({"site": "a+b+with.a"}, "a diff is of two sites, got a\\+b\\+with.a"),
        ({"site": "a+b"}, "with_acts has no effect"),
        ({"k": "2,4"}, "several values of k"),
        ({"acts": None}, "name a folder made by `saemill cache`, or two"),
        ({"num_latent": 4}, "did you mean num_latents"),
    ],
)
def test_refusals(
    pair: tuple[ActivationStore, ActivationStore], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Oracle: the message; nothing was written."""
    config, training = asked(tmp_path / "d", pair, **changes)
    given = {name: value for name, value in training.items() if value is not None}
    with pytest.raises(SaemillError, match=message):
        run(config, given)
    assert not (tmp_path / "d").exists()


def test_another_text_is_refused_before_any_work(
    pair: tuple[ActivationStore, ActivationStore], tmp_path: Path
) -> None:
    """Oracle: the message; nothing was written. So with a folder that holds other files."""
    other = make_store(tmp_path / "o", values_TD=planted()[1], model="chat", seed=9, **SHAPE)
    with pytest.raises(ConfigError, match="hashes of their tokens, or of what is held out, differ"):
        run(*asked(tmp_path / "d", pair, with_acts=other.path))
    assert not (tmp_path / "d").exists()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something else than a diff"):
        run(*asked(tmp_path / "d", pair))


def test_other_settings_do_not_mix(diffed: Path, pair: tuple[ActivationStore, ActivationStore]) -> None:
    """Oracle: the run's own refusal; other settings of the measurement measure anew."""
    with pytest.raises((ConfigError, StoreError), match="lr"):
        run(*asked(diffed, pair, lr=1e-3))
    config, training = asked(diffed, pair)
    again = run(DiffConfig(out=diffed, **MEASURE | {"n_latents": 1}), training)
    assert len(again.shown) < len(run(config, training).shown)


def test_settings_come_from_file_flags_and_set(tmp_path: Path) -> None:
    """Oracle: the words of each."""
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps({"train": {"k": 8, "lr": 0.1}, "diff": {"n_latents": 3}}))
    flags = {"train.k": "4", "diff.out": tmp_path, "train.site": None}
    config, training = configs_of(flags, file, ["train.lr_decay=none", "diff.n_contexts=1"])
    assert (config.n_latents, config.n_contexts, config.out) == (3, 1, tmp_path)
    assert training == {"k": "4", "lr": 0.1, "lr_decay": "none"}
    with pytest.raises(ConfigError, match=r"say train\.KEY or diff\.KEY"):
        configs_of(flags, file, ["k=3"])
