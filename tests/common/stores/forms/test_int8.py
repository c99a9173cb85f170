"""int8: what is read of codes, how far that is from what was written, and what a calibration heeds."""

from base64 import b64decode

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from saemill.common.records import encode_array
from saemill.common.stores.forms.form import empty, form_of, rounded
from saemill.common.stores.forms.int8 import Calibration, calibrate, decoded_by_torch

shapes = st.tuples(st.integers(1, 30), st.integers(1, 9), st.integers(0, 2**32 - 1))


def random_rows(n: int, width: int, seed: int) -> Tensor:
    """Dimensions of very different sizes and means, and rows of very different lengths."""
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(n, width)) * 10.0 ** generator.uniform(-3, 3, width)
    rows = rows * 10.0 ** generator.uniform(0, 2, (n, 1)) + generator.normal(size=width) * 100
    return torch.from_numpy(rows.astype(np.float32))


def parts_of(calibration: Calibration) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    mean_D, scale_D = (
        np.frombuffer(b64decode(text), "<f4").copy() for text in (calibration.mean, calibration.scale)
    )
    return mean_D, scale_D


@given(shapes)
@settings(max_examples=60)
def test_codes_are_decoded_as_the_format_says(shape: tuple[int, int, int]) -> None:
    """Oracle: code · step · scale + mean in numpy's float32, bit by bit; by torch too, as on a GPU."""
    n, width, seed = shape
    generator = np.random.default_rng(seed)
    calibration = calibrate(random_rows(50, width, seed))
    mean_D, scale_D = parts_of(calibration)
    codes = generator.integers(-127, 128, (n, width)).astype(np.int8)
    step = (10.0 ** generator.uniform(-6, 3, (n, 1))).astype("<f4")
    stored = torch.from_numpy(np.concatenate([codes, step.view(np.int8)], axis=1))
    wanted = codes.astype(np.float32) * step * scale_D + mean_D
    found = form_of("int8", width, calibration).decode(stored).numpy()
    assert found.tobytes() == wanted.tobytes()
    by_torch = decoded_by_torch(stored, torch.from_numpy(mean_D), torch.from_numpy(scale_D))
    assert by_torch.numpy().tobytes() == wanted.tobytes()


@given(shapes)
@settings(max_examples=60)
def test_no_value_is_further_off_than_half_a_step(shape: tuple[int, int, int]) -> None:
    """Oracle: the half step of each row, a 254th of its largest z, times the dimension's scale; in float64.
    What the subtraction of the mean costs in float32 is allowed for."""
    n, width, seed = shape
    x_TD = random_rows(n, width, seed)
    calibration = calibrate(random_rows(50, width, seed + 1))
    mean_D, scale_D = (part.astype(np.float64) for part in parts_of(calibration))
    z_TD = np.abs(x_TD.double().numpy() - mean_D) / scale_D
    most_TD = z_TD.max(1, keepdims=True) / 254 * scale_D
    least_TD = 2.0**-22 * (
        np.abs(x_TD.double().numpy()) + np.abs(mean_D) + z_TD.max(1, keepdims=True) * scale_D
    )
    off_TD = np.abs(
        rounded(form_of("int8", width, calibration), x_TD).double().numpy() - x_TD.double().numpy()
    )
    assert (off_TD <= most_TD * 1.0001 + least_TD).all()


def relative_error(x_TD: Tensor, again_TD: Tensor, dimensions: Tensor, rows: Tensor) -> float:
    """Mean squared error over the variance, of some dimensions and rows."""
    true, found = x_TD[rows][:, dimensions].double(), again_TD[rows][:, dimensions].double()
    return float((true - found).square().mean() / true.var(0).mean())


def test_large_dimensions_and_rows_take_no_resolution_away() -> None:
    """Oracle: the error without them, 6e-5 of the variance of normal values in 128 dimensions; with one scale
    per row alone it would be above a half. Two dimensions are 1000 times as large, and one row in 40 is."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(4096, 128, generator=generator) + 3
    plain = rounded(form_of("int8", 128, calibrate(x_TD)), x_TD)
    others, rows = torch.ones(128, dtype=torch.bool), torch.ones(4096, dtype=torch.bool)
    without = relative_error(x_TD, plain, others, rows)
    assert without < 1e-4
    x_TD[:, [5, 77]] *= 1000
    x_TD[::40] *= 1000
    others[[5, 77]] = False
    rows[::40] = False
    again = rounded(form_of("int8", 128, calibrate(x_TD)), x_TD)
    assert relative_error(x_TD, again, others, rows) < 1.1 * without
    step_T1 = x_TD.abs().amax(1, keepdim=True) / 127
    assert relative_error(x_TD, (x_TD / step_T1).round() * step_T1, others, rows) > 0.5


def test_a_calibration_is_that_of_the_rows_that_are_near() -> None:
    """Oracle: numpy's mean and standard deviation without the far rows, one of which hides the others."""
    generator = np.random.default_rng(0)
    near = generator.normal(size=(500, 6)) * [1, 1, 5, 1, 1, 1] + 2
    far = np.concatenate([near[:3] * 300, near[:1] * 1e6])
    rows = torch.from_numpy(np.concatenate([far, near, [[np.nan] * 6, [np.inf] * 6]]).astype(np.float32))
    calibration = calibrate(rows)
    mean_D, scale_D = parts_of(calibration)
    assert calibration.n_rows == 500
    np.testing.assert_allclose(mean_D, near.mean(0), rtol=1e-5)
    np.testing.assert_allclose(scale_D, near.std(0), rtol=1e-5)


def test_what_was_constant_may_vary_later() -> None:
    """Oracle: half a step by hand. A dimension that was always 7 becomes 8: its scale is no less than a 16th
    of the others', so that the row's other values are still told within an 8th of their deviation."""
    x_TD = torch.randn(1000, 32, generator=torch.Generator().manual_seed(0))
    x_TD[:, 3] = 7
    form = form_of("int8", 32, calibrate(x_TD))
    row = x_TD[:1].clone()
    row[:, 3] = 8
    assert float((rounded(form, row) - row).abs().max()) < 1 / 8
    exact = rounded(form, x_TD)[:, 3]
    assert torch.equal(exact, torch.full_like(exact, 7))


def test_all_alike_and_nothing_finite() -> None:
    """Oracle: rows equal to the mean are read as they are; what is not finite stays so, to be refused."""
    x_TD = torch.full((4, 3), 2.5)
    form = form_of("int8", 3, calibrate(x_TD))
    assert torch.equal(rounded(form, x_TD), x_TD)
    calibrate(torch.full((2, 3), torch.nan))
    x_TD[0, 1], x_TD[2, 2], x_TD[3, 0] = torch.nan, torch.inf, -torch.inf
    bad = ~torch.isfinite(rounded(form, x_TD)).all(1)
    assert bad.tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    ("mean", "scale", "told"),
    [
        ([0, 0], [1], "2 dimensions have a mean, 1 a scale"),
        ([0, np.nan], [1, 1], "not finite"),
        ([0, 0], [1, 0], "not above 0"),
        ([0, 0], [1, -1], "not above 0"),
        ([0, 0], [1, np.inf], "not finite"),
    ],
)
def test_calibrations_that_are_none(mean: list[float], scale: list[float], told: str) -> None:
    """Oracle: the sentence, by hand."""
    texts = [encode_array(np.array(values, np.float32)) for values in (mean, scale)]
    with pytest.raises(ValidationError, match=told):
        Calibration(n_rows=1, mean=texts[0], scale=texts[1])


def test_floats_are_not_copied() -> None:
    """Oracle: the address of the stored rows."""
    form = form_of("bf16", 4)
    stored_TC = empty(form, 3)
    form.encode(torch.ones(3, 4), stored_TC)
    assert form.decode(stored_TC).data_ptr() == stored_TC.data_ptr()
    assert stored_TC.float().sum() == 12
