"""A team: the processes that train the same variants, each on its share of the tokens and latents.

Latents are split first: a process holds some rows of the encoder and decoder with their moments, finds
its own best latents of each token, and the team agrees which of them are among the k best of all. What
each decodes is added up; from there on every gradient, update and norm belongs to one process.

Tokens are split by replicas: each sees its share of the batch, then residuals and codes are exchanged in
place of gradients, T·(D + 3K) numbers where gradients would be 2·F·D, and every replica makes the whole
update. So replicas stay equal bit by bit.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saemill.common.sae.topk import topk
from saemill.common.world import Group

ONE = Group([0], 0)


class Team(NamedTuple):
    """The two groups of a team that this process belongs to. A team of one is the default."""

    tokens: Group = ONE
    """Processes with the same latents and other tokens."""
    latents: Group = ONE
    """Processes with the same tokens and other latents."""

    @property
    def is_first(self) -> bool:
        """Tell whether this process speaks for the team."""
        return self.tokens.rank == self.latents.rank == 0

    def among_all(self, val_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Tell which of this process's candidates are among the K best of all the team's.

        Args:
            val_TK: 0 or more; each process's K best latents for the same tokens, in any order.

        Returns: bool [T, K]; and how many of all that were chosen are above 0.
        """
        n_tokens, k = val_TK.shape
        n = self.latents.size
        every = self.latents.all_gather(val_TK, n * n_tokens).view(n, n_tokens, k)
        best_TK, places_TK = topk(every.transpose(0, 1).reshape(n_tokens, n * k), k)
        chosen = torch.zeros(n_tokens, n * k, dtype=torch.bool, device=val_TK.device)
        chosen.scatter_(1, places_TK, value=True)
        return chosen.view(n_tokens, n, k)[:, self.latents.rank], (best_TK > 0).sum()


ALONE = Team()
