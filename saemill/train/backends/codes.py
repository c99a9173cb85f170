"""The rules that turn pre-activations into codes, and the codes they leave."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saemill.train.backends.adding import sum_by_place


class Largest(NamedTuple):
    """The rule of TopK: the k largest pre-activations of each token, rectified."""

    k: int
    is_signed: bool = False
    """Whether these are the largest by absolute value, with their signs, and not rectified: AbsTopK."""


class LargestOfGroups(NamedTuple):
    """The rule of GroupMax: of each of k groups of F/k consecutive latents the largest pre-activation,
    rectified."""

    k: int


class BatchLargest(NamedTuple):
    """The rule of BatchTopK: the k · T largest pre-activations of a batch, rectified."""

    k: float
    """Mean number per token."""


class Above(NamedTuple):
    """The rule of thresholds: pre-activations above those of their latents."""

    threshold_F: Tensor
    bandwidth_F: Tensor
    """Widths around the thresholds in which pre-activations count for their gradients; 0 where none does."""

    @property
    def floor_F(self) -> Tensor:
        """Return the pre-activations from which a step looks at a latent."""
        return self.threshold_F - self.bandwidth_F / 2


Rule = Largest | LargestOfGroups | BatchLargest | Above
"""How pre-activations become codes."""


class Groups(NamedTuple):
    """Codes in nested groups: each reconstructs alone, and the squared errors are summed with weights."""

    ends: tuple[int, ...]
    """Ascending: group g holds what lies below ends[g]."""
    weights: tuple[float, ...]
    by_rank: bool
    """Whether ends count a token's codes by size, and not latents by number."""
    shown: int
    """The group whose error is reported as the SAE's."""


class Codes(NamedTuple):
    """The active latents of some tokens, in slots."""

    val_TK: Tensor
    """float32; 0 is an unused slot, or a latent that is not active."""
    idx_TK: Tensor
    """int64, or int32 on a GPU: latents' numbers."""
    pre_TK: Tensor | None = None
    """float32, the pre-activations of the slots; None where they are the codes."""
    n_T: Tensor | None = None
    """int64, slots in use; None where all are."""

    @property
    def active_TK(self) -> Tensor:
        """Tell which slots hold an active latent, whatever the sign of its code; a NaN is none."""
        return self.val_TK.abs() > 0

    @property
    def used_TK(self) -> Tensor:
        """Tell which slots are in use."""
        places_K = torch.arange(self.val_TK.shape[1], device=self.val_TK.device)
        every = torch.ones_like(self.val_TK, dtype=torch.bool)
        return every if self.n_T is None else places_K < self.n_T[:, None]

    def where(self, kept_TK: Tensor) -> "Codes":
        """Keep some slots; the others are 0 at latent 0."""
        return self._replace(val_TK=self.val_TK.where(kept_TK, 0), idx_TK=self.idx_TK.where(kept_TK, 0))

    def reaching(self, cutoff: Tensor) -> "Codes":
        """Keep the codes that reach a cutoff, at the front, in their order."""
        kept_TK = (self.val_TK >= cutoff) & (self.val_TK > 0)
        n_T = kept_TK.sum(1)
        n_slots = slots(int(n_T.max()))
        order_TK = (~kept_TK).to(torch.int8).argsort(dim=1, stable=True)[:, :n_slots]
        gathered = Codes(self.val_TK.gather(1, order_TK), self.idx_TK.gather(1, order_TK), n_T=n_T)
        return gathered.where(gathered.used_TK)

    def by_group(self, groups: "Groups") -> "Codes":
        """Put the codes in the order of their groups: by size, or by latent."""
        key_TK = -self.val_TK if groups.by_rank else self.idx_TK.where(self.active_TK, LAST)
        order_TK = key_TK.argsort(dim=1, stable=True)
        return self._replace(val_TK=self.val_TK.gather(1, order_TK), idx_TK=self.idx_TK.gather(1, order_TK))

    def group_TK(self, groups: "Groups") -> Tensor:
        """Find the group of each slot, the smallest that holds it. int64."""
        ends_G = torch.tensor(groups.ends, device=self.val_TK.device)
        if not groups.by_rank:
            return torch.bucketize(self.idx_TK.long(), ends_G, right=True)
        places_K = torch.arange(self.val_TK.shape[1], device=self.val_TK.device)
        return torch.bucketize(places_K, ends_G, right=True).expand_as(self.val_TK)

    def ends_of_layers(self, n_layers: int, n_each: int) -> Tensor:
        """Find where the slots of each layer's latents end, which come layer by layer. int64 [T, L]"""
        layer_TK = (self.idx_TK // n_each).where(self.used_TK, n_layers)
        return torch.stack([(layer_TK <= layer).sum(1) for layer in range(n_layers)], 1)

    def by_latent(self, numbers_TK: Tensor, n_latents: int) -> Tensor:
        """Sum numbers of slots, 0 where unused, over the tokens of each latent. float32 [F]."""
        return sum_by_place(numbers_TK.flatten(), self.idx_TK.flatten().long(), n_latents)


def side_by_side(parts: Sequence[Codes], n_each: int) -> Codes:
    """Put the codes of several layers behind each other, by numbers of all latents.

    Args:
        parts: of each layer, by numbers of its own latents.
        n_each: latents of a layer.
    """
    idx_TK = torch.cat([part.idx_TK + layer * n_each for layer, part in enumerate(parts)], 1)
    val_TK, counts = torch.cat([part.val_TK for part in parts], 1), [part.n_T for part in parts]
    if any(n_T is None for n_T in counts):
        return Codes(val_TK, idx_TK)
    ends_LT = torch.stack([n_T for n_T in counts if n_T is not None]).cumsum(0)
    n_slots, used_TK = slots(int(ends_LT[-1].max())), torch.cat([part.used_TK for part in parts], 1)
    places = [torch.arange(part.val_TK.shape[1], device=val_TK.device) for part in parts]
    firsts = [torch.zeros_like(ends_LT[0]), *ends_LT[:-1]]
    place_TK = torch.cat([n_T[:, None] + own_K for n_T, own_K in zip(firsts, places, strict=True)], 1)
    place_TK = place_TK.where(used_TK, n_slots)  # what is unused goes behind all
    val, idx = (
        numbers_TK.new_zeros(len(val_TK), n_slots + 1).scatter_(1, place_TK, numbers_TK)[:, :n_slots]
        for numbers_TK in (val_TK, idx_TK)
    )
    return Codes(val.contiguous(), idx.contiguous(), n_T=ends_LT[-1])


LAST = 2**31 - 1
"""Behind all latents."""


def slots(n: int) -> int:
    """Round a number of slots up: loops take four at a time, and must not sum in another order for more."""
    return max(4, -(-n // 4) * 4)
