"""Globs in place of a run's sites."""

from pathlib import Path
from typing import Any

import pytest

from saemill.common.errors import ConfigError
from saemill.train.config import TrainConfig
from saemill.train.sites import with_sites

LAYERS = range(12)
KNOWN = sorted(f"layers.{layer}{part}" for layer in LAYERS for part in ("", ".norm", ".mlp"))


def found(**sites: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    config = with_sites(TrainConfig(acts=Path("a"), out=Path("o"), **sites), KNOWN)
    return config.site, config.target_site


def test_globs_match_in_pairs_in_the_order_of_layers() -> None:
    """Oracle: the names written out, layer 10 after layer 9; plain names stay as they are."""
    norms, mlps = (tuple(f"layers.{layer}.{part}" for layer in LAYERS) for part in ("norm", "mlp"))
    assert found(site=("layers.*.norm",), target_site=("layers.*.mlp",)) == (norms, mlps)
    assert found(site=("layers.*.norm", "x"), target_site=("layers.*.mlp", "y")) == (
        (*norms, "x"),
        (*mlps, "y"),
    )
    assert found(site=("layers.*",)) == (tuple(f"layers.{layer}" for layer in LAYERS), ())
    assert found(site=("no.such",)) == (("no.such",), ())


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ({"site": ("layrs.*.mlp",)}, r"'layrs\.\*\.mlp' matches none of the sites; did you mean layers\."),
        ({"site": ("layers.1*.mlp",)}, r"whole part between dots, as layers\.\*\.mlp, got 'layers\.1"),
        ({"site": ("layers.*.norm",), "target_site": ("layers.3.mlp",)}, "must match in pairs"),
    ],
)
def test_what_matches_nothing_is_refused(sites: Any, message: str) -> None:
    """Oracle: the messages."""
    with pytest.raises(ConfigError, match=message):
        found(**sites)
