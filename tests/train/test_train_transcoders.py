"""Training transcoders: from a store of two sites to files that predict the one from the other."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from steps import outputs
from stores import make_store
from torch import Tensor
from training import D, config, files, killed_at, structured
from watching import held_out, lines

from saemill.common.errors import ConfigError, StoreError
from saemill.common.sae.sae import Sae
from saemill.common.stores import runs
from saemill.common.stores.activations import ActivationStore
from saemill.train.arch.initial import regression
from saemill.train.backends.architecture import Sample
from saemill.train.run import run

pytestmark = pytest.mark.usefixtures("one_thread")
E = 11
EVERY = ("topk", "abs-topk", "batchtopk", "matryoshka", "groupmax", "jumprelu", "relu", "gated")
TRANSCODERS: dict[str, Any] = {"target_site": ("b",), "k": (4,), "num_latents": (48,)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Site a, and at site b, of another width and scale, what a small network makes of it."""
    x_TD = structured(256 * 32)
    y_TE = 40 * outputs(x_TD - 30, E) - 7
    folder = tmp_path_factory.mktemp("pair")
    return make_store(folder, n_rows=256, ctx_len=32, d=D, shard_tokens=2048, values_TD=x_TD, b_TD=y_TE)


def trained_on(store: ActivationStore, site: str) -> Tensor:
    """All training rows of a site, in the order of their addresses."""
    keep = [store.keep_addresses(i, store.mask, held_out=False) for i in range(store.n_shards)]
    return store.read(site, 0, store.n_tokens)[torch.from_numpy(np.concatenate(keep))]


def fvu(predicted: Tensor, y: Tensor) -> float:
    return float((predicted - y).square().sum() / (y - y.mean(0)).square().sum())


@pytest.mark.parametrize("has_skip", [False, True])
def test_it_learns_what_one_site_makes_of_the_other(
    pair: ActivationStore, tmp_path: Path, has_skip: bool
) -> None:
    """Oracle: the mean, whose FVU is 1, and with W_skip the linear regression on all training rows by
    torch.linalg.lstsq, on which latents improve; and the saved files in float64 on the rows that are held
    out, whose FVU the run logged."""
    changes = TRANSCODERS | {"max_tokens": 256 * 150, "eval_every": 75, "log_every": 75, "eval_tokens": 300}
    (folder,) = run(config(pair, tmp_path / "r", skip_connection=has_skip, **changes))
    assert folder.name == f"a-to-b{'-skip' if has_skip else ''}-k4-f48-s0-lr0.003"
    sae = Sae.load(folder).double()
    assert (sae.config.d_in, sae.config.d_out, sae.W_skip is not None) == (D, E, has_skip)
    x, y = (trained_on(pair, site).double() for site in "ab")
    ones = torch.ones(len(x), 1)
    linear = torch.cat([x, ones], 1) @ torch.linalg.lstsq(torch.cat([x, ones], 1), y).solution
    mine = fvu(sae(x).reconstruction, y)
    assert mine < (0.5 * fvu(linear, y) if has_skip else 0.25)
    figures = lines(tmp_path / "r")[150][folder.name]
    held = {site: held_out(pair, site, 300).double() for site in "ab"}
    assert figures["eval_fvu"] == pytest.approx(fvu(sae(held["a"]).reconstruction, held["b"]), rel=1e-4)
    assert figures["fvu"] == pytest.approx(mine, rel=0.2)
    told = {name: sae.config.provenance[name] for name in ("site", "target_site")}
    assert told == {"site": "a", "target_site": "b"}


@pytest.mark.parametrize("kernels", ["torch", "numba"])
def test_every_architecture_resumes_bit_by_bit(
    pair: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    """Oracle: the same run without a stop, bit by bit: weights and metrics."""
    changes = TRANSCODERS | {
        "architecture": EVERY, "target_l0": (4.0,), "skip_connection": True, "kernels": kernels,
    }  # fmt: skip
    run(config(pair, tmp_path / "whole", **changes))
    killed_at(9, config(pair, tmp_path / "cut", **changes), monkeypatch)
    run(config(pair, tmp_path / "cut", **changes))
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_pairs_and_saes_in_one_run_equal_single_runs(pair: ActivationStore, tmp_path: Path) -> None:
    """Oracle: runs of one variant with the same settings, bit by bit."""
    listed = (
        {"site": "a", "target_site": "b", "skip_connection": True},
        {"site": "b", "target_site": "a"},
        {"site": "a"},
    )
    common: dict[str, Any] = {"k": (4,), "num_latents": (48,), "site": ()}
    together = run(config(pair, tmp_path / "all", variants=listed, **common))
    pairs = run(config(pair, tmp_path / "pairs", **common | {"site": ("a", "b"), "target_site": ("b", "a")}))
    assert [folder.name for folder in pairs] == ["a-to-b-k4-f48-s0-lr0.003", "b-to-a-k4-f48-s0-lr0.003"]
    for i, (entry, folder) in enumerate(zip(listed, together, strict=True)):
        (alone,) = run(config(pair, tmp_path / str(i), variants=(entry,), **common))
        assert (alone / "sae.safetensors").read_bytes() == (folder / "sae.safetensors").read_bytes()
    assert (pairs[1] / "sae.safetensors").read_bytes() == (together[1] / "sae.safetensors").read_bytes()


def test_the_start_is_the_regression() -> None:
    """Oracle: torch.linalg.lstsq with the ridge as further rows, in float64."""
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    y = outputs(x, 3)
    more = (0.01 * 60) ** 0.5 * torch.eye(5).double()
    rows, zeros = torch.cat([x.double(), more]), torch.zeros(5, 3).double()
    expected = torch.linalg.lstsq(rows, torch.cat([y.double(), zeros])).solution.T
    torch.testing.assert_close(regression(Sample(x, y)).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_site": ("a",)}, "target_site must be another site than site, got a as both"),
        ({"target_site": ("c",)}, "not in the store; finished: a, b"),
        ({"target_site": ("a", "b")}, "target_site names one site for each of site, in order; got 2 for 1"),
        ({"target_site": ("b", "b"), "site": ("a", "a")}, "each of site is named once"),
        ({"skip_connection": True}, "skip_connection has no effect without target_site"),
        (
            {"variants": ({"site": "a", "skip_connection": True}, {"site": "a", "target_site": "b"})},
            "skip_connection has no effect without target_site",
        ),
    ],
)
def test_refusals(pair: ActivationStore, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Oracle: the message; nothing was written."""
    with pytest.raises((ConfigError, StoreError), match=message):
        run(config(pair, tmp_path / "r", **{"k": (4,), "num_latents": (48,)} | changes))
    assert not (tmp_path / "r").exists()


def test_the_record_tells_of_the_pair(pair: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the settings that were given, in the run's identity and the transcoder's config."""
    (folder,) = run(config(pair, tmp_path / "r", skip_connection=True, **TRANSCODERS))
    content = runs.identity(tmp_path / "r").content
    assert (content["target_site"], content["skip_connection"]) == (["b"], True)
    variant = json.loads((folder / "cfg.json").read_text())["saemill"]["variant"]
    assert (variant["target_site"], variant["skip_connection"]) == ("b", True)
