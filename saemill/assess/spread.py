"""How a site's evaluation rows spread around their mean: document by document, exactly at any scale."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saemill.common.stores.statistics import FAR, Statistics
from saemill.common.world import Group


@dataclass(slots=True)
class _DocumentRows:
    """Rows of one document, near or far."""

    n: int
    mean_D: NDArray[np.float64]
    """Their mean minus the cached one."""
    squares: float
    """Σ of their squared distances from their own mean."""

    def merge(self, other: "_DocumentRows") -> None:
        """Add other rows (Chan, Golub and LeVeque 1979)."""
        total, delta_D = self.n + other.n, other.mean_D - self.mean_D
        self.squares += other.squares + float(delta_D @ delta_D) * (self.n * other.n / total)
        self.mean_D = self.mean_D + delta_D * (other.n / total)
        self.n = total


class Spread:
    """Rows of one site, counted chunk by chunk; those far from the mean apart.

    Far are rows that are more than `FAR` times as far from the cached mean as the median training row.
    Sums of squares are taken around means of few rows and then moved, which loses no digits; the sum over
    rows that are all alike is 0 and not what rounding leaves of it.

    Args:
        statistics: those of the site.
    """

    def __init__(self, statistics: Statistics) -> None:
        self.centre_D = statistics.mean_D
        self.median = statistics.median_distance
        self.largest = 0.0
        """Largest distance of a row from the cached mean."""
        self.n_zero = 0
        """Rows that are zero vectors."""
        self._rows: dict[tuple[int, bool], _DocumentRows] = {}
        self._ends: dict[bool, tuple[Tensor, Tensor]] = {}
        """The smallest and the largest value of each dimension, of near and of far rows."""

    def add(self, x_TD: Tensor, units: NDArray[Any]) -> NDArray[np.bool_]:
        """Count some rows.

        Args:
            x_TD: the rows, on the CPU, finite; float64 or what float32 holds.
            units: the document of each.

        Returns: which of them are far. bool [T].
        """
        x_TD = _wide(x_TD)
        squares_T = self.squared_distances(x_TD)
        far_T = self.far(squares_T)
        self.largest = max(self.largest, float(np.sqrt(squares_T.max())))
        self.n_zero += int((x_TD == 0).all(1).sum())
        for far in np.unique(far_T).tolist():
            self._count(far, x_TD, units, far_T == far)
        return far_T

    def squared_distances(self, x_TD: Tensor) -> NDArray[np.float64]:
        """Compute the squared distance of each row from the cached mean. [T]"""
        from saemill.assess.loops import rows  # numba is loaded where it is used

        squares_T = torch.empty(len(x_TD), dtype=torch.float64)
        rows.squared_distances(_wide(x_TD), self.centre_D, squares_T)
        return squares_T.numpy()

    def far(self, squares_T: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Tell which rows are far, by their squared distances from the cached mean, without counting them."""
        far_T: NDArray[np.bool_] = np.sqrt(squares_T) > (FAR * self.median if self.median else np.inf)
        return far_T

    def _stretch(self, far: bool, low_D: Tensor, high_D: Tensor) -> None:
        low, high = self._ends.get(far, (low_D, high_D))
        self._ends[far] = torch.minimum(low, low_D), torch.maximum(high, high_D)

    def _count(self, far: bool, x_TD: Tensor, units: NDArray[Any], some_T: NDArray[np.bool_]) -> None:
        """Count near or far rows, which are some of these."""
        from saemill.assess.loops import rows  # numba is loaded where it is used

        documents, group, n = np.unique(units[some_T], return_inverse=True, return_counts=True)
        group_T = torch.full((len(x_TD),), -1)
        group_T[torch.from_numpy(some_T)] = torch.from_numpy(group)
        low_D, high_D = (torch.full_like(self.centre_D, end) for end in (torch.inf, -torch.inf))
        rows.stretch(x_TD, group_T, low_D, high_D)
        self._stretch(far, low_D, high_D)
        mean_GD = torch.zeros(len(documents), x_TD.shape[1], dtype=torch.float64)
        squares_G = torch.zeros(len(documents), dtype=torch.float64)
        rows.around_means(x_TD, self.centre_D, group_T, torch.from_numpy(n), mean_GD, squares_G)
        for i, document in enumerate(documents.tolist()):
            its_rows = _DocumentRows(int(n[i]), mean_GD[i].numpy().copy(), float(squares_G[i]))
            known = self._rows.setdefault((document, far), its_rows)
            if known is not its_rows:
                known.merge(its_rows)

    def merge(self, everyone: Group) -> None:
        """Let every process know the extremes and the zero vectors of all; the rows stay where they are."""
        self.largest = max(everyone.all_gather_objects(self.largest))
        self.n_zero = sum(everyone.all_gather_objects(self.n_zero))
        for ends in everyone.all_gather_objects(self._ends):
            for far, (low_D, high_D) in ends.items():
                self._stretch(far, low_D, high_D)

    def squares(
        self, everyone: Group, counted: tuple[bool, ...], around: tuple[bool, ...]
    ) -> tuple[NDArray[np.uint64], NDArray[np.float64]]:
        """Compute this process's sums of squared distances, document by document; call after `merge`.

        Args:
            everyone: the processes, whose rows make the mean.
            counted: which rows' distances are summed: near ones (False), far ones (True), both.
            around: of which rows the mean is taken.

        Returns: documents (one may come twice) and Σ ‖x − x̄‖² of each; 0 where all those rows are alike.
        """
        total_D = torch.zeros(len(self.centre_D) + 1, dtype=torch.float64)
        for (_, far), rows in self._rows.items():
            if far in around:
                total_D[:-1] += rows.n * torch.from_numpy(rows.mean_D)
                total_D[-1] += rows.n
        total_D = everyone.all_reduce(total_D)
        mean_D = (total_D[:-1] / total_D[-1].clamp(min=1)).numpy()
        chosen = [(document, rows) for (document, far), rows in self._rows.items() if far in counted]
        sums = [rows.squares + rows.n * float(np.square(rows.mean_D - mean_D).sum()) for _, rows in chosen]
        if self._alike(around):
            sums = [0.0] * len(chosen)
        return np.array([document for document, _ in chosen], np.uint64), np.array(sums)

    def _alike(self, around: tuple[bool, ...]) -> bool:
        """Tell whether rows of all processes are equal, exactly."""
        ends = [self._ends[far] for far in around if far in self._ends]
        lows, highs = [low for low, _ in ends], [high for _, high in ends]
        return not ends or bool((torch.stack(lows).amin(0) == torch.stack(highs).amax(0)).all())

    def n_far(self) -> tuple[NDArray[np.uint64], NDArray[np.float64]]:
        """List this process's documents with far rows, and how many each has."""
        n_by_document = {document: rows.n for (document, far), rows in self._rows.items() if far}
        return np.array(list(n_by_document), np.uint64), np.array(list(n_by_document.values()), np.float64)


def _wide(x_TD: Tensor) -> Tensor:
    """Return rows in a dtype that loops read, without gaps."""
    return (x_TD if x_TD.dtype == torch.float64 else x_TD.float()).contiguous()
