"""The cutoff of BatchTopK: the smallest of the k · T largest pre-activations of a batch."""

import torch
from torch import Tensor

from saemill.train.backends.team import Team


class Best:
    """The n largest of the numbers seen so far, those above 0.

    Args:
        n: how many.
        device: where they are.
    """

    def __init__(self, n: int, device: torch.device) -> None:
        self.n, self.values = n, torch.empty(0, device=device)

    def add(self, numbers: Tensor) -> None:
        """Take some numbers, of one dimension."""
        both = torch.cat([self.values, numbers[numbers > 0].float()])
        self.values = both if len(both) <= self.n else both.topk(self.n, sorted=False).values

    def cutoff(self, team: Team) -> tuple[Tensor, int]:
        """Find the smallest of the n largest that the team saw, 0 if there are fewer; and their number."""
        best = self.values
        for group in (team.latents, team.tokens):
            if group.size > 1:
                padded = best.new_zeros(self.n)
                padded[: len(best)] = best
                best = group.all_gather(padded, group.size * self.n).topk(self.n, sorted=False).values
                best = best[best > 0]
        return (best.min() if len(best) == self.n else best.new_zeros(())), len(best)
