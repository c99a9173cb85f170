"""The kind of each latent of a crosscoder: shared by its two sides, or of one alone.

**Relative norm**: ‖W_B‖ / (‖W_A‖ + ‖W_B‖) of the two parts of its decoder row; 0 if it writes to A alone, 1
if to B alone (Lindsey et al. 2024). It misleads by itself: a latent may write to one side though the other
has the same direction, which its training left out of that part of the row, or gave to other latents.

**Latent scaling** (after Minder et al. 2025, arXiv 2504.02922) tells these apart. With d the part of the row
in the side where it is longer, and a target y of each side,

    β = argmin Σ ‖y − β f d‖²  =  Σ f ⟨d, y⟩ / (Σ f² ‖d‖²)

    on the error            y = x − x̂ + f W     what the side holds and the other latents do not reconstruct
    on the reconstruction   y = x̂ − b_dec       what the side's latents put there, this one included

and ν = β of the other side / β of the side where d is longer. A latent of one side alone has both ν near 0:
its direction is neither left over in the other side when it fires, nor put there by other latents. The
bounds, 0.2 and 0.5, are a choice: a latent just beyond them is not of another kind than one just within.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from saemill.diff.measure import Sums

MIN_FIRINGS = 30
"""Fewest tokens on which a latent fires for its figures to mean something."""
ONLY = 0.1
"""Relative norm up to which a latent writes to A alone, and 1 − that from which to B alone."""
SHARED = (0.4, 0.6)
"""Relative norms between which both parts are about as long."""
MOST_IN_ERROR, MOST_IN_RECONSTRUCTION = 0.2, 0.5
"""Largest ν of a latent of one side alone."""
KINDS = {
    "A only": "writes to A alone, and B has no trace of it",
    "B only": "writes to B alone, and A has no trace of it",
    "A by its norm": "writes to A alone, but B has its direction too: in its error, or through other latents",
    "B by its norm": "writes to B alone, but A has its direction too: in its error, or through other latents",
    "shared": f"about as long in both: a relative norm from {SHARED[0]:g} to {SHARED[1]:g}",
    "uneven": "longer in one of them",
    "rare": f"active on fewer than {MIN_FIRINGS} of the tokens: nothing can be told",
}
"""Kinds of latents, and what each means; those of one side alone first."""
TURNED = "turned"
"""Name of the shared latents that are shown since the cosine of their parts is low."""
Column = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Latents:
    """Figures of all latents, [F] each; NaN where there is none."""

    count: NDArray[np.int64]
    """Tokens on which it is active."""
    norms: tuple[Column, Column]
    """Lengths of the two parts of its decoder row: what a code of 1 adds to each side, in training units."""
    energy: Column
    """Share of what all latents add, Σ f² ‖W‖² by the longer part."""
    cosine: Column
    """Cosine of the two parts; NaN of sides of two widths."""
    beta_error: tuple[Column, Column]
    beta_reconstruction: tuple[Column, Column]
    nu_error: Column
    nu_reconstruction: Column

    @classmethod
    def of(cls, sums: Sums) -> "Latents":
        """Compute them from the sums over tokens."""
        a_FD, b_FD = (rows_FD.double() for rows_FD in sums.sides.decoders)
        norm_a, norm_b = a_FD.norm(dim=1), b_FD.norm(dim=1)
        longer, squares = norm_a.maximum(norm_b).cpu().numpy(), sums.squares_F.cpu().numpy()
        energy = squares * longer**2
        norms = norm_a.cpu().numpy(), norm_b.cpu().numpy()
        count, share = sums.count_F.cpu().numpy(), energy / max(energy.sum(), 1e-300)
        if not sums.sides.share_a_room:
            none = np.full(len(longer), np.nan)
            return cls(count, norms, share, none, (none, none), (none, none), none, none)
        cosine = _quotient((a_FD * b_FD).sum(1).cpu().numpy(), norms[0] * norms[1])
        direction_FD = sums.sides.direction_FD.double()
        own = [squares * (direction_FD * rows_FD).sum(1).cpu().numpy() for rows_FD in (a_FD, b_FD)]
        on_error = [total + put for total, put in zip(sums.on_error_MF.cpu().numpy(), own, strict=True)]
        (error_a, error_b), (codes_a, codes_b) = (
            [_quotient(total, energy) for total in totals]
            for totals in (on_error, sums.on_codes_MF.cpu().numpy())
        )
        is_b = sums.sides.is_b_longer_F.cpu().numpy()
        nu_error, nu_reconstruction = (
            np.where(is_b, _quotient(beta_a, beta_b), _quotient(beta_b, beta_a))
            for beta_a, beta_b in ((error_a, error_b), (codes_a, codes_b))
        )
        betas = (error_a, error_b), (codes_a, codes_b)
        return cls(count, norms, share, cosine, *betas, nu_error, nu_reconstruction)

    @property
    def relative_norm(self) -> Column:
        """Share of B in the lengths of both parts."""
        return _quotient(self.norms[1], self.norms[0] + self.norms[1])

    @property
    def kinds(self) -> NDArray[np.str_]:
        """Kind of each latent, by its name in `KINDS`. Where sides are of two widths, one that writes to one
        side is so by its norm alone."""
        relative = self.relative_norm
        kinds = np.full(len(relative), "uneven", dtype="<U13")
        kinds[(relative >= SHARED[0]) & (relative <= SHARED[1])] = "shared"
        # Not so where ν is NaN; a β of the other way round is no trace either.
        is_alone = (self.nu_error < MOST_IN_ERROR) & (self.nu_reconstruction < MOST_IN_RECONSTRUCTION)
        for side, extreme in (("A", relative <= ONLY), ("B", relative >= 1 - ONLY)):
            kinds[extreme & is_alone] = f"{side} only"
            kinds[extreme & ~is_alone] = f"{side} by its norm"
        kinds[self.count < MIN_FIRINGS] = "rare"
        return kinds

    def table(self) -> pa.Table:
        """Tabulate all figures, a line per latent."""
        return pa.table(
            {
                "latent": np.arange(len(self.count)),
                "kind": self.kinds.tolist(),
                "n_active": self.count,
                "energy": self.energy,
                "norm_a": self.norms[0],
                "norm_b": self.norms[1],
                "relative_norm": self.relative_norm,
                "cosine": self.cosine,
                "beta_error_a": self.beta_error[0],
                "beta_error_b": self.beta_error[1],
                "beta_reconstruction_a": self.beta_reconstruction[0],
                "beta_reconstruction_b": self.beta_reconstruction[1],
                "nu_error": self.nu_error,
                "nu_reconstruction": self.nu_reconstruction,
            }
        )

    def strongest(self, kind: str, n: int) -> list[int]:
        """List the latents of a kind that add most to the activations."""
        of_kind = np.flatnonzero(self.kinds == kind)
        return [int(i) for i in of_kind[np.argsort(-self.energy[of_kind], kind="stable")][:n]]

    def turned(self, n: int) -> list[int]:
        """List the shared latents whose two parts point furthest apart."""
        shared = np.flatnonzero((self.kinds == "shared") & np.isfinite(self.cosine))
        return [int(i) for i in shared[np.argsort(self.cosine[shared], kind="stable")][:n]]


def _quotient(above: Column, below: Column) -> Column:
    """Divide, with NaN where the divisor is 0."""
    quotient = np.full(len(above), np.nan)
    np.divide(above, below, out=quotient, where=below != 0)
    return quotient
