"""Which backend is chosen: by device, and by what is installed."""

import sys
from typing import Any

import pytest
import torch

from saemill.common.errors import ConfigError
from saemill.train.backends.choose import choose_kernels


def test_numba_that_does_not_work_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the message has the reason and another way."""
    monkeypatch.setitem(sys.modules, "saemill.train.backends.cpu.backend", None)
    with pytest.raises(ConfigError, match="--kernels torch"):
        choose_kernels("auto", torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "device", "missing", "expected"),
    [
        ("auto", "cpu", (), "numba"),
        ("auto", "cpu", ("numba",), "pip install numba"),
        ("auto", "cuda", (), "triton"),
        ("auto", "cuda", ("triton",), "torch"),
        ("auto", "mps", (), "torch"),
        ("torch", "cuda", (), "torch"),
        ("numba", "cuda", (), "run on a CPU, not on cuda"),
        ("triton", "cpu", (), "run on a GPU, not on cpu"),
        ("numba", "cpu", ("numba",), "pip install numba"),
    ],
)
def test_kernels_are_chosen_by_device_and_installation(
    name: str, device: str, missing: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the table above; what cannot run is refused with what to do."""

    def find_spec(module: str) -> Any:
        return None if module in missing else object()

    monkeypatch.setattr("saemill.train.backends.choose.find_spec", find_spec)
    if " " in expected:
        with pytest.raises(ConfigError, match=expected):
            choose_kernels(name, torch.device(device))
    else:
        assert choose_kernels(name, torch.device(device)) == expected
