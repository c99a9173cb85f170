"""A run that is finished, and one that was killed on its way."""

from pathlib import Path

import pytest
from training import halved, killed_at

from saemill.common.stores import runs
from saemill.common.stores.activations import ActivationStore
from saemill.train.run import run


@pytest.fixture(scope="module")
def whole(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two variants, of which halving stopped one."""
    out = tmp_path_factory.mktemp("whole") / "r"
    run(halved(store, out))
    return out


@pytest.fixture(scope="module")
def going(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, killed after the look and a checkpoint."""
    out = tmp_path_factory.mktemp("going") / "r"
    with pytest.MonkeyPatch.context() as patch:
        killed_at(23, halved(store, out), patch)
    assert runs.looks(out)
    return out
