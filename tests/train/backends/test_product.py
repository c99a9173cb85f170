"""Which product chooses the codes: the faster one, measured once for a shape."""

from pathlib import Path

import pytest
import torch

from saemill.common import records
from saemill.train.backends.cpu import product
from saemill.train.backends.cpu.backend import Cpu
from saemill.train.backends.cpu.loops.quantise import LEAST_COLUMNS
from saemill.train.backends.cpu.product import REPAIR, Measured, chooses_by_8_bits
from saemill.train.backends.parameters import Shape

SHAPE = 512, LEAST_COLUMNS, torch.bfloat16


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, on a CPU that has the instruction."""
    monkeypatch.setattr(product, "folder", lambda: tmp_path / "products")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    return tmp_path / "products"


def measured_as(monkeypatch: pytest.MonkeyPatch, by_8_bits_s: float, whole_s: float) -> list[int]:
    """Have every measurement give these seconds. Returns: one entry for each, filled in as they are made."""
    made: list[int] = []

    def measure(n_latents: int, *_: object) -> Measured:
        made.append(n_latents)
        return Measured(by_8_bits_s=by_8_bits_s, whole_s=whole_s)

    monkeypatch.setattr(product, "measure", measure)
    return made


def test_the_faster_way_is_taken_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the seconds given; a second measurement, of other seconds, is not made."""
    made = measured_as(monkeypatch, 1.0, 2.0)
    assert chooses_by_8_bits(*SHAPE)
    measured_as(monkeypatch, 2.0, 1.0)
    assert chooses_by_8_bits(*SHAPE)
    assert not chooses_by_8_bits(1024, *SHAPE[1:]), "another shape is measured by itself"
    assert not chooses_by_8_bits(*SHAPE[:2], torch.float32), "and so is another dtype"
    assert made == [512]


def test_a_damaged_measurement_is_made_again(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the record read back, whole, with the later seconds."""
    measured_as(monkeypatch, 1.0, 2.0)
    assert chooses_by_8_bits(*SHAPE)
    (file,) = kept.iterdir()
    file.write_bytes(file.read_bytes().replace(b"2.0", b"0.5"))
    measured_as(monkeypatch, 2.0, 1.0)
    assert not chooses_by_8_bits(*SHAPE)
    assert records.read(file, Measured, REPAIR) == Measured(by_8_bits_s=2.0, whole_s=1.0)


def test_a_home_that_cannot_be_written_to_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a cache folder below a file, which no one can make."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(product, "folder", lambda: tmp_path / "file" / "products")
    made = measured_as(monkeypatch, 1.0, 2.0)
    assert chooses_by_8_bits(*SHAPE)
    assert chooses_by_8_bits(*SHAPE)
    assert made == [512, 512]


def test_rows_with_few_columns_are_not_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the bound on the error holds for sums of many; nothing is measured below `LEAST_COLUMNS`, nor
    on a CPU without the instruction."""
    made = measured_as(monkeypatch, 1.0, 2.0)
    assert not chooses_by_8_bits(512, LEAST_COLUMNS - 1, torch.bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert not chooses_by_8_bits(*SHAPE)
    assert not made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_are_timed(dtype: torch.dtype) -> None:
    """Oracle: times are above 0."""
    measured = product.measure(128, LEAST_COLUMNS, dtype)
    assert min(measured.by_8_bits_s, measured.whole_s) > 0


def test_widths_of_one_site_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the plan's words, and a batch with 8-bit copies only from when an SAE wants them."""
    backend, cpu = Cpu(torch.float32), torch.device("cpu")
    x_TD = torch.randn(4, LEAST_COLUMNS)
    measured_as(monkeypatch, 2.0, 1.0)
    assert backend.weights(Shape(512, LEAST_COLUMNS, LEAST_COLUMNS), cpu).quantised_FD is None
    assert backend.prepare(x_TD).quantised_TD is None
    assert "8-bit" not in backend.describe()
    measured_as(monkeypatch, 1.0, 2.0)
    assert backend.weights(Shape(1024, LEAST_COLUMNS, LEAST_COLUMNS), cpu).quantised_FD is not None
    assert backend.prepare(x_TD).quantised_TD is not None
    assert backend.describe() == "products in float32 by numba, codes of 1,024 latents from 8-bit products"
