"""Activations as 8-bit codes: half the bytes of bf16.

    z = (x − mean) / scale        each dimension by the site's calibration
    step = max |z| / 127          one float32 per row, stored behind the row's codes
    code = round(z / step)        −127 … 127
    x ≈ code · step · scale + mean

The calibration brings all dimensions to one size, so that a dimension a thousand times as large as the others
does not take their resolution away; the step does so for rows. Both are needed (see `docs/stores.md`).
"""

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor

from saemill.common import durable
from saemill.common.records import Record, decode_array, encode_array
from saemill.common.stores.statistics import FAR, Moments

LARGEST_CODE = 127
STEP_BYTES = 4
"""Bytes of a row's step, which follow its codes."""
LEAST_SCALE = 1 / 16
"""Smallest scale of a dimension, in medians of those of all. What hardly varies where a site is calibrated
may do so later, and would then take a whole row's resolution."""


class Calibration(Record):
    """The mean and scale of each dimension of a site, from its first training positions."""

    n_rows: int
    """Number of rows that it was computed from, those that are far from the others left out."""
    mean: str
    """float32 [D] in base64."""
    scale: str
    """float32 [D] in base64, above 0."""

    @model_validator(mode="after")
    def _check(self) -> "Calibration":
        mean_D, scale_D = decode_array(self.mean, "f4"), decode_array(self.scale, "f4")
        if len(mean_D) != len(scale_D):
            raise ValueError(f"{len(mean_D):,} dimensions have a mean, {len(scale_D):,} a scale")
        if not (np.isfinite(mean_D).all() and np.isfinite(scale_D).all() and (scale_D > 0).all()):
            raise ValueError("a mean or scale is not finite, or a scale not above 0")
        return self

    @property
    def width(self) -> int:
        """Number D of dimensions."""
        return len(decode_array(self.mean, "f4"))

    @property
    def hash(self) -> str:
        """Hash by which the records of shards name it."""
        return durable.hash_json(self.model_dump(mode="json"))


def calibrate(x_TD: Tensor) -> Calibration:
    """Compute mean and standard deviation of each dimension over the rows that are not far from the others.

    A row is far if its distance from the mean, in standard deviations of each dimension, is more than ten
    medians of all rows'. The far ones are left out and the rest is measured again, until none is far: one row
    may hide another.

    Args:
        x_TD: at least one row, on the CPU; what is not finite is left out.
    """
    rows_TD = x_TD[torch.isfinite(x_TD).all(1)].float()
    if len(rows_TD) == 0:  # a model that computes none is told when its first shard is written
        rows_TD = torch.zeros(1, x_TD.shape[1])
    while True:
        mean_D, scale_D = _moments(rows_TD)
        distance_T = torch.cat([((x - mean_D) / scale_D).norm(dim=1) for x in torch.split(rows_TD, 1024)])
        near_T = distance_T <= FAR * distance_T.median()
        if bool(near_T.all()):
            break
        rows_TD = rows_TD[near_T]
    return Calibration(
        n_rows=len(rows_TD), mean=encode_array(mean_D.numpy()), scale=encode_array(scale_D.numpy())
    )


def _moments(rows_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the mean of each dimension, and its standard deviation or, where that is next to nothing, the
    smallest that is taken. float32 [D] each."""
    moments = Moments(rows_TD.shape[1])
    moments.add(rows_TD)
    deviation_D = np.sqrt(moments.deviations_D / moments.n)
    varying = deviation_D[deviation_D > 0]
    least = LEAST_SCALE * float(np.median(varying)) if len(varying) else 1.0
    scale_D = np.maximum(deviation_D, least).astype(np.float32)
    smallest = np.finfo(np.float32).smallest_normal
    return torch.from_numpy(moments.mean_D).float(), torch.from_numpy(np.maximum(scale_D, smallest))


class Int8:
    """A form of 8-bit codes; the columns are D codes and the bytes of the row's step."""

    def __init__(self, width: int, calibration: Calibration | None) -> None:
        self.width, self.columns = width, width + STEP_BYTES
        self.stored, self.dtype = torch.int8, torch.float32
        self.calibration = calibration
        self.attributes = {"columns": "a code per dimension, then the row's step: float32, little-endian"}
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def _calibrated(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return mean and scale on a device. float32 [D] each."""
        assert self.calibration is not None
        if device not in self._on:
            texts = self.calibration.mean, self.calibration.scale
            mean_D, scale_D = (torch.from_numpy(decode_array(text, "f4").copy()) for text in texts)
            self._on[device] = mean_D.to(device), scale_D.to(device)
        return self._on[device]

    def encode(self, x_TD: Tensor, into_TC: Tensor) -> None:
        """Write each row's codes and step; see `Form`."""
        mean_D, scale_D = self._calibrated(x_TD.device)
        z_TD = (x_TD.float() - mean_D) / scale_D
        step_T1 = z_TD.abs().amax(1, keepdim=True) / LARGEST_CODE
        code_TD = torch.where(step_T1 > 0, z_TD / step_T1, 0).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)
        into_TC[:, : self.width] = code_TD.to(torch.int8)
        into_TC[:, self.width :] = step_T1.cpu().view(torch.int8)

    def decode(self, stored_TC: Tensor) -> Tensor:
        """Compute code · step · scale + mean, the same bits on every device. float32 [T, D]."""
        mean_D, scale_D = self._calibrated(stored_TC.device)
        if stored_TC.device.type == "cpu":
            from saemill.common.stores.forms.decoding import decode  # numba is loaded where it is used

            x_TD = torch.empty(len(stored_TC), self.width)
            decode(stored_TC.numpy(), mean_D.numpy(), scale_D.numpy(), x_TD.numpy())
            return x_TD
        return decoded_by_torch(stored_TC, mean_D, scale_D)


def decoded_by_torch(stored_TC: Tensor, mean_D: Tensor, scale_D: Tensor) -> Tensor:
    """Compute what `Int8.decode` does by torch's own operations. float32 [T, D], on the rows' device."""
    width = len(mean_D)
    step_T1 = stored_TC[:, width:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    return stored_TC[:, :width].to(torch.float32).mul_(step_T1).mul_(scale_D).add_(mean_D)
