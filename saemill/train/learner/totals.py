"""Sums over a learner's steps, on its device: since the last log line, and over a window."""

import torch
from torch import Tensor


class Totals:
    """Sums of one learner, on its device.

    Args:
        d: width of the site.
        device: where it trains.
    """

    def __init__(self, d: int, device: torch.device) -> None:
        self.d = d
        self.values = torch.zeros(2, 6, dtype=torch.float64, device=device)

    def add(self, n_tokens: int, sse: Tensor, loss: Tensor, auxk: Tensor, n_active: Tensor) -> None:
        """Count one batch."""
        batch_sums = [sse, loss, auxk, n_active]
        self.values[:, :4] += torch.stack([value.double() for value in batch_sums])
        self.values[:, 4] += n_tokens
        self.values[:, 5] += 1

    def pop(self) -> dict[str, float | None]:
        """Compute the means since the last call, and start anew."""
        means = self._means(0)
        self.values[0].zero_()
        return means

    def open_window(self) -> None:
        """Start the longer window anew."""
        self.values[1].zero_()

    def window(self) -> dict[str, float | None]:
        """Compute the means over the longer window."""
        return self._means(1)

    def _means(self, row: int) -> dict[str, float | None]:
        """Compute means; fvu is the squared error over the site's cached variance (D in training units)."""
        sse, loss, auxk, active, n_tokens, n_steps = self.values[row].tolist()
        if n_tokens == 0:
            return {"fvu": None, "loss": None, "auxk": None, "l0": None}
        return {
            "fvu": sse / (n_tokens * self.d),
            "loss": loss / n_steps,
            "auxk": auxk / n_steps,
            "l0": active / n_tokens,
        }
