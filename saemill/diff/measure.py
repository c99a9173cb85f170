"""What each latent of a crosscoder does on held-out tokens, as sums over them.

Everything is in training units: each site in its own, in which it varies as much as it has dimensions. So
neither model counts for more since its activations are longer.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from saemill.assess.evalset import Chunk
from saemill.common.sae.sae import Sae
from saemill.common.world import Group

PAIR_VALUES = 1 << 22
"""Most values of gathered decoder rows at once."""
ROWS_AT_ONCE = 2048


@dataclass(frozen=True, slots=True)
class Sides:
    """A crosscoder of two sites, taken apart; in training units, float32, on its device."""

    sae: Sae
    site: str
    """Name of the joined site."""
    decoders: tuple[Tensor, Tensor]
    """Decoder rows of each side, [F, D] each."""
    centres: tuple[Tensor, Tensor]
    """b_dec of each side, as the activations have it."""
    scales: tuple[float, float]

    @classmethod
    def of(cls, sae: Sae) -> "Sides":
        """Take apart a crosscoder of two sites."""
        a, b = sae.config.joined
        widths = [a.width, b.width]
        rows = torch.split(sae.W_dec.detach().float(), widths, 1)
        centres = torch.split(sae.b_dec.detach().float(), widths)
        return cls(
            sae, f"{a.site}+{b.site}", (rows[0] * a.scale, rows[1] * b.scale), (centres[0], centres[1]),
            (a.scale, b.scale),
        )  # fmt: skip

    @property
    def share_a_room(self) -> bool:
        """Whether a direction of one side can be looked for in the other: they are of one width."""
        return len(self.centres[0]) == len(self.centres[1])

    @property
    def is_b_longer_F(self) -> Tensor:
        """Whether a latent's decoder row is longer in B. bool [F]"""
        norm_a, norm_b = (torch.linalg.vector_norm(rows_FD, dim=1) for rows_FD in self.decoders)
        is_longer_F: Tensor = norm_b > norm_a
        return is_longer_F

    @property
    def direction_FD(self) -> Tensor:
        """Decoder row of each latent in the side where it is longer; of sides of one width."""
        return torch.where(self.is_b_longer_F[:, None], self.decoders[1], self.decoders[0])

    def split(self, x_TD: Tensor) -> list[Tensor]:
        """Turn joined activations into those of both sides, around b_dec."""
        widths = [len(centre_D) for centre_D in self.centres]
        sides = zip(torch.split(x_TD.float(), widths, 1), self.centres, self.scales, strict=True)
        return [(part_TD - centre_D) * scale for part_TD, centre_D, scale in sides]


class Sums:
    """Sums of each latent over tokens, float64.

    Args:
        sides: the crosscoder.
    """

    def __init__(self, sides: Sides) -> None:
        self.sides = sides
        n, device = sides.sae.config.num_latents, sides.sae.W_enc.device
        self.n_tokens = torch.zeros(1, dtype=torch.int64, device=device)
        self.count_F = torch.zeros(n, dtype=torch.int64, device=device)
        """Tokens on which a latent is active."""
        self.squares_F = torch.zeros(n, dtype=torch.float64, device=device)
        """Σ f²."""
        self.on_error_MF = torch.zeros(2, n, dtype=torch.float64, device=device)
        """Σ f ⟨d, e⟩, with the error e of each side and the latent's `direction_FD` d."""
        self.on_codes_MF = torch.zeros(2, n, dtype=torch.float64, device=device)
        """Σ f ⟨d, x̂⟩, with the reconstruction of each side around b_dec."""
        self.sse_M = torch.zeros(2, dtype=torch.float64, device=device)
        """Σ‖e‖² of each side."""
        self.x_MD = [
            torch.zeros(len(centre_D), dtype=torch.float64, device=device) for centre_D in sides.centres
        ]
        """Σ x of each side, around b_dec."""
        self.xx_M = torch.zeros(2, dtype=torch.float64, device=device)
        """Σ‖x‖² of each side, around b_dec."""

    def run(self, chunks: Iterable[Chunk], everyone: Group) -> "Sums":
        """Count this process's chunks, then add up those of all processes."""
        sae, site = self.sides.sae, self.sides.site
        with torch.inference_mode():
            for chunk in chunks:
                for x_TD in torch.split(chunk.x[site], ROWS_AT_ONCE):
                    self._add(x_TD.to(sae.W_enc.device, torch.float32))
        for total in (self.n_tokens, self.count_F, self.squares_F, self.on_error_MF, self.on_codes_MF):
            everyone.all_reduce(total)
        for total in (self.sse_M, self.xx_M, *self.x_MD):
            everyone.all_reduce(total)
        return self

    def _add(self, x_TD: Tensor) -> None:
        """Count some tokens."""
        codes = self.sides.sae.encode(x_TD)
        x = self.sides.split(x_TD)
        made = self.sides.split(self.sides.sae.decode(*codes))
        self.n_tokens += len(x_TD)
        for m, (x_of, made_of) in enumerate(zip(x, made, strict=True)):
            self.sse_M[m] += (x_of - made_of).double().square().sum()
            self.xx_M[m] += x_of.double().square().sum()
            self.x_MD[m] += x_of.double().sum(0)
        active_TK = codes.active
        latent_P, act_P = codes.top_indices[active_TK], codes.top_acts[active_TK]
        self.count_F += torch.bincount(latent_P, minlength=len(self.count_F))
        self.squares_F.index_add_(0, latent_P, act_P.double().square())
        if self.sides.share_a_room:
            self._project(active_TK.nonzero()[:, 0], latent_P, act_P, x, made)

    def _project(
        self, token_P: Tensor, latent_P: Tensor, act_P: Tensor, x: list[Tensor], made: list[Tensor]
    ) -> None:
        """Add the products of errors and reconstructions with the directions of the latents that are active,
        in P pairs of a token and a latent."""
        direction_FD = self.sides.direction_FD
        n_at_once = max(1, PAIR_VALUES // direction_FD.shape[1])
        for first in range(0, len(token_P), n_at_once):
            pairs = slice(first, first + n_at_once)
            token, latent, act = token_P[pairs], latent_P[pairs], act_P[pairs]
            rows_PD = direction_FD[latent]
            for m, (x_of, made_of) in enumerate(zip(x, made, strict=True)):
                made_PD = made_of[token]
                for total_MF, target_PD in (
                    (self.on_error_MF, x_of[token] - made_PD),
                    (self.on_codes_MF, made_PD),
                ):
                    dot_P = torch.linalg.vecdot(rows_PD, target_PD)
                    total_MF[m].index_add_(0, latent, (act * dot_P).double())

    @property
    def fvu(self) -> list[float]:
        """Compute Σ‖e‖² / Σ‖x − x̄‖² of each side."""
        n = int(self.n_tokens)
        spread = [float(xx - x_D.square().sum() / n) for xx, x_D in zip(self.xx_M, self.x_MD, strict=True)]
        return [float(sse) / each for sse, each in zip(self.sse_M, spread, strict=True)]

    @property
    def l0(self) -> float:
        """Compute the mean number of active latents."""
        return int(self.count_F.sum()) / int(self.n_tokens)
