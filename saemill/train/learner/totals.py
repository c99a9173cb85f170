"""Sums over a learner's steps, on its device: since the last log line, over a window; a cutoff's average."""

import torch
from torch import Tensor

from saemill.train.backends.base import Groups

CUTOFF_DECAY = 0.99
"""Share of the moving average of the cutoff that a step keeps; younger averages weigh all steps in."""


class Totals:
    """Sums of one learner, on its device.

    Args:
        d: width of the site.
        device: where it trains.
        groups: of codes that fit alone, each with an FVU of its own; None where there is one.
    """

    def __init__(self, d: int, device: torch.device, groups: Groups | None = None) -> None:
        self.d = d
        ends, sign = ((), "") if groups is None else (groups.ends, "k" if groups.by_rank else "f")
        self.group_names = [f"fvu_{sign}{end}" for end in ends]
        """Names of the groups' errors among the metrics."""
        self.values = torch.zeros(2, 6 + len(ends), dtype=torch.float64, device=device)

    def add(
        self,
        n_tokens: int,
        sse: Tensor,
        loss: Tensor,
        auxk: Tensor,
        n_active: Tensor,
        sse_G: Tensor | None = None,
    ) -> None:
        """Count one batch."""
        batch_sums = [sse, loss, auxk, n_active]
        self.values[:, :4] += torch.stack([value.double() for value in batch_sums])
        self.values[:, 4] += n_tokens
        self.values[:, 5] += 1
        if sse_G is not None:
            self.values[:, 6:] += sse_G.double()

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
        sse, loss, auxk, active, n_tokens, n_steps, *sse_G = self.values[row].tolist()
        if n_tokens == 0:
            return dict.fromkeys(("fvu", "loss", "auxk", "l0", *self.group_names))
        return {
            "fvu": sse / (n_tokens * self.d),
            "loss": loss / n_steps,
            "auxk": auxk / n_steps,
            "l0": active / n_tokens,
            **{name: each / (n_tokens * self.d) for name, each in zip(self.group_names, sse_G, strict=True)},
        }


class CutoffAverage:
    """The moving average of BatchTopK's cutoff, which is its threshold after training.

    Args:
        device: where it trains.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        """The weighted sum, and the sum of the weights."""

    def add(self, cutoff: Tensor, healthy: Tensor) -> None:
        """Count a step, where it was healthy."""
        kept = self.sums * CUTOFF_DECAY + (1 - CUTOFF_DECAY) * torch.stack([cutoff.double(), self._one])
        self.sums.copy_(torch.where(healthy, kept, self.sums))

    @property
    def _one(self) -> Tensor:
        return self.sums.new_ones(())

    @property
    def value(self) -> float:
        """Return the average, 0 before the first step."""
        total, weight = self.sums.tolist()
        return total / weight if weight else 0.0
