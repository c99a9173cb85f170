"""The store that the tests of training share."""

import pytest
from training import structured_store

from saemill.common.stores.activations import ActivationStore


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Sites a and b, 8,192 tokens of width 16."""
    return structured_store(tmp_path_factory.mktemp("train"))
