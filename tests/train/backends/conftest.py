"""What the tests of the GPU's kernels share as fixtures."""

import pytest
import torch


@pytest.fixture
def seeded() -> None:
    """The same random numbers in every test."""
    torch.manual_seed(0)
