"""Sums over a learner's steps, on its device: since the last log line, over a window; a cutoff's average."""

import torch
from torch import Tensor

from saemill.train.backends.base import Sums
from saemill.train.backends.codes import Groups

CUTOFF_SHARE = 0.1
"""Share of the steps so far that the cutoff's average looks back on."""
START_STEPS = 100
"""Steps that a threshold counts for that a finished SAE brought: it is forgotten within tens of steps."""
MOST_CUTOFF_STEPS = 1000
"""Steps that it looks back on at most."""


class Totals:
    """Sums of one learner, on its device.

    Args:
        d: width of the site.
        device: where it trains.
        groups: of codes that fit alone, each with an FVU of its own; None where there is one.
        nats_name: name of the model's loss; empty where it is not minimised.
        has_penalty: whether a penalty keeps codes few or small.
    """

    def __init__(
        self,
        d: int,
        device: torch.device,
        groups: Groups | None = None,
        nats_name: str = "",
        has_penalty: bool = False,
    ) -> None:
        self.d = d
        ends, sign = ((), "") if groups is None else (groups.ends, "k" if groups.by_rank else "f")
        self.group_names = [f"fvu_{sign}{end}" for end in ends]
        """Names of the groups' errors among the metrics."""
        self.step_names = ["penalty"] * has_penalty + ([nats_name] if nats_name else [])
        """Names of what is a mean over steps, beside the losses that all have."""
        n_sums = 6 + len(ends) + len(self.step_names)
        self.values = torch.zeros(2, n_sums, dtype=torch.float64, device=device)

    def add(self, n_tokens: int, loss: Tensor, sums: Sums, nats: Tensor | None = None) -> None:
        """Count one batch: its loss, what the step did, and what the model loses."""
        batch_sums = [sums.sse, loss, sums.aux_loss, sums.n_active]
        self.values[:, :4] += torch.stack([value.double() for value in batch_sums])
        self.values[:, 4] += n_tokens
        self.values[:, 5] += 1
        own = [] if sums.sse_G is None else [*sums.sse_G]
        own += [value for value in (sums.penalty, nats) if value is not None]
        if own:
            self.values[:, 6:] += torch.stack([value.double() for value in own])

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
        sse, loss, auxk, active, n_tokens, n_steps, *rest = self.values[row].tolist()
        names = (*self.group_names, *self.step_names)
        if n_tokens == 0:
            return dict.fromkeys(("fvu", "loss", "auxk", "l0", *names))
        per = [n_tokens * self.d] * len(self.group_names) + [n_steps] * len(self.step_names)
        return {
            "fvu": sse / (n_tokens * self.d),
            "loss": loss / n_steps,
            "auxk": auxk / n_steps,
            "l0": active / n_tokens,
            **{name: total / n for name, total, n in zip(names, rest, per, strict=True)},
        }


class CutoffAverage:
    """The moving average of BatchTopK's cutoff, which is its threshold after training.

    It looks back on a share of the steps so far: the cutoff moves fast at first, and slowly later.

    Args:
        device: where it trains.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        """The average, and the number of steps that it has seen."""

    def start(self, threshold: float) -> None:
        """Start at the threshold of a finished SAE, as after `START_STEPS` steps."""
        self.sums.copy_(torch.tensor([threshold, START_STEPS]))

    def add(self, cutoff: Tensor, healthy: Tensor) -> None:
        """Count a step, where it was healthy."""
        average, n_steps = self.sums
        span = ((n_steps + 1) * CUTOFF_SHARE).clamp(1, MOST_CUTOFF_STEPS)
        moved = torch.stack([average + (cutoff.double() - average) / span, n_steps + 1])
        self.sums.copy_(torch.where(healthy, moved, self.sums))

    @property
    def value(self) -> float:
        """Return the average, 0 before the first step."""
        return float(self.sums[0])
