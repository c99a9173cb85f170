"""Runs that start from finished SAEs: what they take from these, what is refused, and killed runs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import Hub
from training import D, config, files, killed_at, structured_store

from saemill.common.errors import ConfigError, StoreError
from saemill.common.sae.formats import saelens
from saemill.common.sae.parts import Parts, SaeConfig
from saemill.common.sae.sae import Sae
from saemill.common.stores import runs
from saemill.common.stores.activations import ActivationStore
from saemill.train.config import TrainConfig
from saemill.train.run import run
from saemill.train.sweep.sources import sources_of
from saemill.train.sweep.variant import Variant
from saemill.train.sweep.variants import of_config

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 14


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return structured_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def source(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six SAEs at two sites."""
    out = tmp_path_factory.mktemp("runs") / "source"
    run(
        started(
            store,
            out,
            None,
            site=("a", "b"),
            architecture=("topk", "batchtopk", "jumprelu"),
            k=(4,),
            target_l0=(5.0,),
            num_latents=(48,),
            max_tokens=256 * 150,
        )
    )
    return out


def started(store: ActivationStore, out: Path, source: Path | str | None, **changes: Any) -> TrainConfig:
    """Settings of a run that leaves open what a source tells."""
    settings: dict[str, Any] = {
        "site": (), "k": (), "num_latents": (), "max_tokens": 256 * STEPS,
        "init_from": None if source is None else str(source),
    }  # fmt: skip
    return config(store, out, **settings | changes)


def variants(
    store: ActivationStore, source: Path | str, sites: tuple[str, ...] = ("a",), **changes: Any
) -> list[Variant]:
    """The variants of a run that starts from a source, at some sites or where they are listed."""
    settings = started(store, Path("out"), source, **{"site": sites} | changes)
    return of_config(settings, dict.fromkeys(sites, D), STEPS, sources_of(settings))


def test_a_run_starts_from_every_sae_of_another(store: ActivationStore, source: Path, tmp_path: Path) -> None:
    """Oracle: the names and settings of the source's variants; and its weights, from which a rate of almost 0
    does not lead away."""
    out = tmp_path / "run"
    run(started(store, out, source, lr=(1e-12,), auxk_alpha=0.0))
    names = runs.finished(source).variants
    assert runs.finished(out).variants == tuple(name.replace("lr0.003", "lr1e-12") for name in names)
    for name in names:
        before, after = Sae.load(source / name), Sae.load(out / name.replace("lr0.003", "lr1e-12"))
        assert after.config.provenance["variant"]["init_from"] == str(source / name)
        for part, weights in before.parts.weights.items():
            if part == "threshold" and before.config.architecture == "batchtopk":
                continue  # an average that goes on
            torch.testing.assert_close(after.parts.weights[part], weights, rtol=1e-4, atol=1e-4)


def test_another_k_and_other_data(store: ActivationStore, source: Path, tmp_path: Path) -> None:
    """Oracle: FVU, lower at the first steps than from random directions; the new k in what is saved."""
    other = structured_store(tmp_path / "other")
    name = "a-k4-f48-s0-lr0.003"
    out = tmp_path / "run"
    (folder,) = run(started(other, out, source / name, site=("b",), k=(6,), lr=(1e-4,)))
    assert Sae.load(folder).config.k == 6
    (anew,) = run(started(other, tmp_path / "anew", None, site=("b",), k=(6,), num_latents=(48,), lr=(1e-4,)))

    def first_fvu(folder: Path) -> float:
        line = json.loads((folder.parent / "metrics.jsonl").read_text().splitlines()[0])
        return float(line["variants"][folder.name]["fvu"])

    assert first_fvu(folder) < 0.8 * first_fvu(anew)


def test_what_is_taken_and_what_is_chosen(store: ActivationStore, source: Path) -> None:
    """Oracle: settings of each variant by hand."""
    found = variants(store, source / "a-batchtopk-k4-f48-s0-lr0.003", k=(2, 4.5), sites=("a", "b"))
    assert [(v.site, v.architecture, v.k, v.num_latents) for v in found] == [
        ("a", "batchtopk", 2, 48), ("a", "batchtopk", 4.5, 48),
        ("b", "batchtopk", 2, 48), ("b", "batchtopk", 4.5, 48),
    ]  # fmt: skip
    found = variants(store, source)
    assert {(v.site, v.architecture, v.k, v.target_l0) for v in found} == {
        ("a", "topk", 4, None), ("a", "batchtopk", 4, None), ("a", "jumprelu", None, 5.0),
    }  # fmt: skip
    (one,) = variants(
        store, source / "a-batchtopk-k4-f48-s0-lr0.003", architecture=("jumprelu",), target_l0=(3.0,)
    )
    assert (one.architecture, one.target_l0, one.k) == ("jumprelu", 3.0, None)
    listed = variants(
        store,
        source,
        sites=("a", "b"),
        site=(),
        variants=(
            {"site": "a", "name": "a-k4-f48-s0-lr0.003"},
            {"init_from": str(source / "b-k4-f48-s0-lr0.003"), "k": 3},
        ),
    )
    assert [(v.name, v.site, v.k) for v in listed] == [
        ("a-k4-f48-s0-lr0.003", "a", 4),
        ("b-k3-f48-s0-lr0.003", "b", 3),
    ]


@pytest.mark.parametrize(
    "name", ["a-k4-f48-s0-lr0.003", "a-batchtopk-k4-f48-s0-lr0.003", "a-jumprelu-f48-s0-target5-lr0.003"]
)
def test_killed_and_resumed(
    name: str, store: ActivationStore, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: an uninterrupted run, byte by byte."""
    whole = started(store, tmp_path / "whole", source / name)
    run(whole)
    killed = replace(whole, out=tmp_path / "killed")
    killed_at(9, killed, monkeypatch)
    run(killed)
    assert files(killed.out) == files(whole.out)


def foreign(folder: Path, d: int) -> Path:
    """An SAE in SAELens' format, of width d, that tells no k of its own but one of JumpReLU."""
    generator = torch.Generator().manual_seed(1)
    W_dec = torch.randn(24, d, generator=generator)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    sae_config = SaeConfig(d_in=d, num_latents=24, k=None, provenance={}, architecture="jumprelu")
    threshold = torch.rand(24, generator=generator)
    saelens.write(
        Parts(sae_config, W_dec.clone(), torch.zeros(24), W_dec, torch.zeros(d), threshold),
        folder,
        None,
        None,
    )
    return folder


def test_an_export_of_another_tool(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: that it trains, at the site that is named, to the target that is named."""
    place = foreign(tmp_path / "saelens", D)
    (folder,) = run(started(store, tmp_path / "run", place, site=("a",), target_l0=(4.0,)))
    assert folder.name == "a-jumprelu-f24-s0-target4-lr0.003"
    with pytest.raises(ConfigError, match="does not tell the target_l0"):
        run(started(store, tmp_path / "other", place, site=("a",)))


def test_a_listed_variant_takes_the_latents_of_what_it_starts_from(
    store: ActivationStore, source: Path
) -> None:
    """Oracle: the source's number of latents, beside a variant whose number is the run's."""
    listed = ({"k": 3}, {"k": 2, "init_from": str(source / "a-k4-f48-s0-lr0.003"), "name": "from"})
    for width, anew in (({}, 8 * D), ({"num_latents": (24,)}, 24)):
        settings = started(store, Path("out"), None, site=("a",), variants=listed, **width)
        found = of_config(settings, {"a": D}, STEPS, sources_of(settings))
        assert [(v.name, v.num_latents) for v in found] == [(f"a-k3-f{anew}-s0-lr0.003", anew), ("from", 48)]


def test_a_penalty_of_another_kind_is_told(store: ActivationStore, source: Path) -> None:
    """Oracle: the message, and what it advises: a new weight."""
    place = source / "a-jumprelu-f48-s0-target5-lr0.003"
    with pytest.raises(ConfigError, match=r"was trained with target_l0 and sparsity_penalty step, .*; give"):
        variants(store, place, sparsity_penalty="tanh")
    (variant,) = variants(store, place, sparsity_penalty="tanh", l0_coefficient=(0.01,))
    assert (variant.target_l0, variant.l0_coefficient, variant.num_latents) == (None, 0.01, 48)


def test_an_sae_on_the_hub(store: ActivationStore, source: Path, hub: Hub, tmp_path: Path) -> None:
    """Oracle: the run from the same SAE in a folder, by its identity."""
    name = "a-k4-f48-s0-lr0.003"
    hub.put_folder("user/saes", source / name)
    out = tmp_path / "run"
    run(started(store, out, "hf://user/saes", site=("a",), max_tokens=256 * 2))
    run(started(store, out, source / name, site=("a",), max_tokens=256 * 2))


def test_bad_input(store: ActivationStore, source: Path, tmp_path: Path) -> None:
    """Oracle: the messages, by hand; nothing is written."""
    out = tmp_path / "out"
    wide = foreign(tmp_path / "wide", D + 3)
    one = source / "a-k4-f48-s0-lr0.003"
    cases: list[tuple[Path | str, dict[str, Any], str]] = [
        (wide, {"site": ("a",)}, "is of width 19, the activations at a are of width 16"),
        (tmp_path / "nowhere", {"site": ("a",)}, "init_from: .*there is no such folder"),
        ("some/name", {"site": ("a",)}, "an SAE on the hub is named hf://some/name"),
        (one, {"num_latents": (64,)}, "has 48 latents, not 64"),
        (one, {"architecture": ("jumprelu",)}, "is a topk SAE, which cannot be written as jumprelu"),
        (one, {"seeds": (1,)}, "seeds has no effect with init_from"),
        (one, {"b_dec_init": "geometric_median"}, "b_dec_init has no effect with init_from"),
        (one, {"target_l0": (3.0,)}, "target_l0 has no effect with topk"),
        (one, {"target_site": ("b",), "site": ("a",)}, "is an SAE; leave target_site out"),
        (one, {"k": (99,)}, "k must be in 1..48"),
        (source, {"site": ("c",)}, "site 'c' of .* is not in the store"),
        (source, {"k": (3,), "architecture": ("topk",)}, "which cannot be written as topk"),
        (source, {"variants": ({"site": "a"},)}, "could start from any of"),
    ]
    for place, changes, message in cases:
        with pytest.raises((ConfigError, StoreError), match=message):
            run(started(store, out, place, **changes))
        assert not out.exists()


def test_the_identity_has_the_content(store: ActivationStore, source: Path, tmp_path: Path) -> None:
    """Oracle: the same SAE at another place is the same run; another SAE, or none, is refused."""
    name, site = "a-k4-f48-s0-lr0.003", ("a",)
    shutil.copytree(source / name, tmp_path / "moved")
    out = tmp_path / "run"
    run(started(store, out, source / name, site=site))
    before = (out / "finished.json").read_bytes()
    run(started(store, out, tmp_path / "moved", site=site))
    assert (out / "finished.json").read_bytes() == before
    with pytest.raises(ConfigError, match="made with other settings:\n  init_from"):
        run(started(store, out, source / "b-k4-f48-s0-lr0.003", site=site))
    with pytest.raises(ConfigError, match="init_from"):
        run(started(store, out, None, site=site, k=(4,), num_latents=(48,)))
