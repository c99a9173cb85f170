"""The forward pass of one variant: tokens to codes, codes to residuals.

Notation, for one variant: x_TD inputs (centred and scaled), b_D = b_dec − centre,
pre = (x − b) W_encᵀ + b_enc, the k largest kept and rectified: values val_TK of latents idx_TK,
x̂ = val · W_dec[idx] + b, e = x̂ − x.
"""

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from saemill.common.sae.topk import topk
from saemill.train.backends.team import ALONE, Team
from saemill.train.profile import part

if TYPE_CHECKING:
    from saemill.train.backends.cpu.loops.quantise import Quantised

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)

CHUNK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 29}
"""Most bytes of pre-activations in memory at once: what stays in a CPU's last cache, what fills a GPU."""
GATHER_BYTES = 1 << 23
"""Most bytes of decoder rows gathered between their first use and their second."""


class Batch(NamedTuple):
    """Activations in training units."""

    x_TD: Tensor
    """float32."""
    product_TD: Tensor
    """The same in the product's dtype."""
    quantised_TD: "Quantised | None" = None
    """The same in 8 bits, where those choose the candidates."""

    def tokens(self, part: slice) -> "Batch":
        """Some of the tokens."""
        quantised = None if self.quantised_TD is None else self.quantised_TD.rows(part)
        return Batch(self.x_TD[part], self.product_TD[part], quantised)


class Codes(NamedTuple):
    """The active latents of some tokens."""

    val_TK: Tensor
    """float32, 0 or more."""
    idx_TK: Tensor
    """int64, latents' numbers."""


class Weights(NamedTuple):
    """One variant's parameters, in training units, and the copies that products use."""

    w_enc_FD: Tensor
    b_enc_F: Tensor
    w_dec_FD: Tensor
    """Rows of unit length."""
    b_D: Tensor
    """b_dec − centre."""
    product_FD: Tensor
    """w_enc in the product's dtype; w_enc itself where that is float32."""
    gathered_FD: Tensor
    """w_dec as it is decoded with: w_dec itself on a CPU, in the product's dtype on a GPU."""
    quantised_FD: "Quantised | None" = None
    """product_FD in 8 bits, where those choose the candidates."""

    def refresh(self, rows: slice) -> None:
        """Make some latents' copies anew."""
        for copy_FD, of_FD in ((self.product_FD, self.w_enc_FD), (self.gathered_FD, self.w_dec_FD)):
            if copy_FD.dtype != of_FD.dtype:
                copy_FD[rows].copy_(of_FD[rows])
        if self.quantised_FD is not None:
            self.quantised_FD.rows(rows).take(self.product_FD[rows])


class Forward(NamedTuple):
    """A batch seen by one variant: all that its gradients need."""

    codes: Codes
    e_TD: Tensor
    """x̂ − x; float32, with kernels or compiled loops in the product's dtype."""
    dot_TK: Tensor
    """⟨e_t, W_dec[idx_tk]⟩, float32."""
    sse: Tensor
    """Σ e², float32."""
    n_active: Tensor
    """Codes above 0, those on other processes included."""
    bias_F: Tensor
    """From `fold_bias`."""


def prepare(x_TD: Tensor, dtype: torch.dtype) -> Batch:
    """A batch in training units, with its copy for products in `dtype`."""
    return Batch(x_TD, x_TD.to(dtype))


def not_quantised(n_latents: int, d: int) -> None:
    """Nothing is kept in 8 bits here."""


def fold_bias(w_enc_FD: Tensor, b_enc_F: Tensor, b_D: Tensor) -> Tensor:
    """b_enc − W_enc b: what the product with x misses.

    `w_enc_FD` holds the same rounded weights as the product uses; with others the error of each
    latent would be systematic. float32 [F].
    """
    return b_enc_F - torch.mv(w_enc_FD, b_D.to(w_enc_FD.dtype)).float()


def room(n_latents: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for the pre-activations of a chunk, [T, F], made once: fresh pages cost more than filling
    them."""
    n_tokens = max(1, CHUNK_BYTES[device.type] // (n_latents * dtype.itemsize))
    return torch.empty(n_tokens, n_latents, dtype=dtype, device=device)


def encode(x_TD: Tensor, w_enc_FD: Tensor, bias_F: Tensor, k: int, room_TF: Tensor | None = None) -> Codes:
    """The codes of some tokens, by a dense product and an exact top-k.

    Args:
        x_TD, w_enc_FD: of the same dtype, the product's.
        bias_F: from `fold_bias`.
        k: active latents per token.
        room_TF: where the pre-activations go, for no fewer tokens.
    """
    out_TF = None if room_TF is None else room_TF[: len(x_TD)]
    with part("encode"):
        pre_TF = torch.addmm(bias_F.to(x_TD.dtype), x_TD, w_enc_FD.T, out=out_TF)
    with part("top-k"):
        values, indices = topk(pre_TF, k)
        return Codes(values.float(), indices)


def decode(codes: Codes, w_dec_FD: Tensor) -> Tensor:
    """Σ_k val · W_dec[idx], float32 [T, D]."""
    return embedding_bag(codes.idx_TK, w_dec_FD, per_sample_weights=codes.val_TK, mode="sum")


def forward(batch: Batch, weights: Weights, k: int, room_TF: Tensor, team: Team = ALONE) -> Forward:
    """A whole batch, in chunks that keep [T, F] out of memory.

    Args:
        batch: T tokens.
        weights: of the variant; where the team splits the latents, this process's rows.
        k: active latents per token, over all rows.
        room_TF: from `room`; no chunk is longer.
        team: the processes that split the latents.

    Returns: codes of this process's rows, 0 where another process has the latent; the residual of all.
    """
    x_TD, product_TD, _ = batch
    n_tokens = len(x_TD)
    bias_F = fold_bias(weights.product_FD, weights.b_enc_F, weights.b_D)
    val_TK = x_TD.new_empty(n_tokens, k)
    idx_TK = torch.empty(n_tokens, k, dtype=torch.int64, device=x_TD.device)
    for chunk in chunks(n_tokens, 1, len(room_TF)):
        val_TK[chunk], idx_TK[chunk] = encode(product_TD[chunk], weights.product_FD, bias_F, k, room_TF)
    codes, n_active = own_codes(Codes(val_TK, idx_TK), team)
    with part("decode"):
        e_TD, dot_TK = residual(codes, x_TD, weights.w_dec_FD, weights.b_D, team)
        sse = torch.linalg.vector_norm(e_TD, dim=1).square().sum()  # one sum of all would lose digits
    return Forward(codes, e_TD, dot_TK, sse, n_active, bias_F)


def own_codes(codes: Codes, team: Team) -> tuple[Codes, Tensor]:
    """Of this process's best latents those that are among the team's; the others are 0 at latent 0.

    Returns: the codes, and how many are above 0 in the whole team.
    """
    if team.latents.size == 1:
        return codes, (codes.val_TK > 0).sum()
    with part("exchange"):
        mine_TK, n_active = team.among_all(codes.val_TK)
    return Codes(codes.val_TK.where(mine_TK, 0), codes.idx_TK.where(mine_TK, 0)), n_active


def residual(codes: Codes, x_TD: Tensor, w_dec_FD: Tensor, b_D: Tensor, team: Team) -> tuple[Tensor, Tensor]:
    """e = x̂ − x and ⟨e_t, W_dec[idx_tk]⟩; where latents are split, x̂ is one sum over the team."""
    e_TD, dot_TK = torch.empty_like(x_TD), torch.empty_like(codes.val_TK)
    row_bytes = codes.val_TK.shape[1] * w_dec_FD[0].nbytes
    n_bytes = GATHER_BYTES if team.latents.size == 1 else row_bytes * len(x_TD)
    for chunk in chunks(len(x_TD), row_bytes, n_bytes):
        here = Codes(codes.val_TK[chunk], codes.idx_TK[chunk])
        decoded_TD = team.latents.sum_(decode(here, w_dec_FD))
        torch.sub(decoded_TD.add_(b_D), x_TD[chunk], out=e_TD[chunk])
        dot_TK[chunk] = row_dots(e_TD[chunk], here.idx_TK, w_dec_FD)
    return e_TD, dot_TK


def gather(passed: Forward, n_tokens: int, team: Team) -> Forward:
    """What every replica saw of its part of a batch of T tokens, put together."""
    if team.tokens.size == 1:
        return passed
    (val_TK, idx_TK), e_TD, dot_TK, sse, n_active, bias_F = passed
    with part("exchange"):
        val_TK, idx_TK, e_TD, dot_TK = (
            team.tokens.gather(part_T, n_tokens) for part_T in (val_TK, idx_TK, e_TD, dot_TK)
        )
        sse, n_active = team.tokens.sum_(sse), team.tokens.sum_(n_active)
    return Forward(Codes(val_TK, idx_TK), e_TD, dot_TK, sse, n_active, bias_F)


def row_dots(e_TD: Tensor, idx_TK: Tensor, w_dec_FD: Tensor) -> Tensor:
    """⟨e_t, W_dec[idx_tk]⟩, float32 [T, K]: entries of a product of which only these are computed."""
    n_tokens, k = idx_TK.shape
    starts = torch.arange(0, n_tokens * k + 1, k, device=e_TD.device)
    wanted = torch.sparse_csr_tensor(
        starts,
        idx_TK.reshape(-1),
        e_TD.new_zeros(n_tokens * k),
        (n_tokens, len(w_dec_FD)),
        check_invariants=False,
    )
    dots: Tensor = torch.sparse.sampled_addmm(wanted, e_TD, w_dec_FD.T, beta=0.0)
    return dots.values().view(n_tokens, k)


def chunks(n_rows: int, row_bytes: int, chunk_bytes: int) -> Iterator[slice]:
    """Slices of `n_rows` rows, of like size, each of no more than `chunk_bytes`, or of one row."""
    n_chunks = max(1, -(-n_rows // max(1, chunk_bytes // row_bytes)))
    step = max(1, -(-n_rows // n_chunks))
    return (slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step))
