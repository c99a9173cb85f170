"""Latents of a crosscoder against dense least squares, and crosscoders whose truth is known."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saemill.common.sae.parts import Joined, SaeConfig
from saemill.common.sae.sae import Sae
from saemill.common.world import Group
from saemill.diff.latents import KINDS, Latents
from saemill.diff.measure import Sides, Sums

ALONE = Group([0], 0)
SCALES = (0.5, 3.0)


class Piece:
    """What `Sums` reads of a chunk."""

    def __init__(self, x_TD: Tensor) -> None:
        self.x = {"a+with.a": x_TD}


def measured(sae: Sae, x_TD: Tensor) -> tuple[Sums, Latents]:
    """The sums over some tokens, in two chunks, and the figures."""
    pieces: list[Any] = [Piece(some) for some in x_TD.split(700)]
    sums = Sums(Sides.of(sae)).run(pieces, ALONE)
    return sums, Latents.of(sums)


def crosscoder(rows_FD: Tensor, encoder_FD: Tensor, widths: tuple[int, int], k: int | None = None) -> Sae:
    """A crosscoder in training units, saved in the activations' own: `SCALES` of the two sites."""
    scale_D = torch.cat([torch.full((w,), s) for w, s in zip(widths, SCALES, strict=True)])
    centre_D = torch.linspace(-1, 2, sum(widths))
    joined = tuple(Joined(n, w, s) for n, w, s in zip(("a", "with.a"), widths, SCALES, strict=True))
    config = SaeConfig(
        d_in=sum(widths), num_latents=len(rows_FD), k=k, provenance={"site": "a+with.a"}, joined=joined,
        architecture="topk" if k else "jumprelu",
    )  # fmt: skip
    threshold = None if k else torch.full((len(rows_FD),), 1e-3)
    return Sae(
        config, encoder_FD * scale_D, torch.zeros(len(rows_FD)), rows_FD / scale_D, centre_D, threshold
    )


def stored(y_TD: Tensor, sae: Sae) -> Tensor:
    """Rows in training units as the activations have them."""
    scale_D = torch.cat([torch.full((p.width,), p.scale) for p in sae.config.joined])
    return y_TD / scale_D + sae.b_dec


def test_figures_are_those_of_dense_least_squares() -> None:
    """Oracle: numpy's lstsq of each target on a latent's code times its direction, in float64, latent by
    latent; and FVU, L0 by their formulas."""
    generator = torch.Generator().manual_seed(0)
    d, f, n, k = 6, 20, 2000, 4
    rows = torch.randn(f, 2 * d, generator=generator)
    sae = crosscoder(rows, torch.randn(f, 2 * d, generator=generator), (d, d), k)
    y = torch.randn(n, 2 * d, generator=generator)
    sums, latents = measured(sae, stored(y, sae))
    x = stored(y, sae)
    acts, indices = sae.encode(x)
    codes = torch.zeros(n, f).scatter(1, indices, acts).double().numpy()
    rows_of = np.split(rows.double().numpy(), 2, axis=1)
    y_of = np.split(y.double().numpy(), 2, axis=1)
    norms = [np.linalg.norm(each, axis=1) for each in rows_of]
    np.testing.assert_allclose(latents.relative_norm, norms[1] / (norms[0] + norms[1]), rtol=1e-5)
    for i in range(f):
        own = int(norms[1][i] > norms[0][i])
        direction = np.outer(codes[:, i], rows_of[own][i]).reshape(-1, 1)
        betas: dict[str, list[float]] = {"error": [], "made": []}
        for m in range(2):
            made = codes @ rows_of[m]
            without = y_of[m] - made + np.outer(codes[:, i], rows_of[m][i])
            for name, target in (("error", without), ("made", made)):
                betas[name].append(float(np.linalg.lstsq(direction, target.reshape(-1), rcond=None)[0][0]))
        for m in range(2):
            assert latents.beta_error[m][i] == pytest.approx(betas["error"][m], abs=2e-4)
            assert latents.beta_reconstruction[m][i] == pytest.approx(betas["made"][m], abs=2e-4)
        ratio = betas["error"][1 - own] / betas["error"][own]
        assert latents.nu_error[i] == pytest.approx(ratio, rel=1e-2, abs=2e-3)
        assert latents.count[i] == (codes[:, i] > 0).sum()
        assert latents.cosine[i] == pytest.approx(
            rows_of[0][i] @ rows_of[1][i] / norms[0][i] / norms[1][i], abs=1e-5
        )
    for m in range(2):
        error = y_of[m] - codes @ rows_of[m]
        spread = ((y_of[m] - y_of[m].mean(0)) ** 2).sum()
        assert sums.fvu[m] == pytest.approx((error**2).sum() / spread, rel=1e-4)
    assert sums.l0 == pytest.approx((codes > 0).sum() / n)


def truth() -> tuple[Sae, Tensor, list[str]]:
    """A crosscoder of orthogonal directions, rows of which the truth is known, and the kind of each latent.

    Latents 3 and 4 write to B alone though A has their direction: one in its error, the other through
    latent 5.
    """
    d, n = 9, 6000
    eye = torch.eye(d)
    parts = [  # of a latent: the direction, how much of it is written to A and to B, the kind
        (0, 1.0, 1.0, "shared"),
        (1, 1.0, 0.0, "A only"),
        (2, 0.0, 1.0, "B only"),
        (3, 0.0, 1.0, "B by its norm"),
        (4, 0.0, 1.0, "B by its norm"),
        (4, 1.0, 0.0, "A by its norm"),
        (6, 1.0, 0.3, "uneven"),
        (7, 1.0, 1.0, "rare"),
    ]
    rows = torch.stack([torch.cat([a * eye[i], b * eye[i]]) for i, a, b, _ in parts])
    encoder = torch.zeros_like(rows)
    for latent, (i, a, b, _) in enumerate(parts):
        encoder[latent, i if a > b else d + i] = 1.0
    generator = torch.Generator().manual_seed(1)
    codes = torch.rand(n, d, generator=generator) * (torch.rand(n, d, generator=generator) < 0.3)
    codes[:, 7] *= torch.arange(n) < 20
    in_a, in_b = torch.ones(d), torch.ones(d)
    in_a[2], in_b[1], in_b[6] = 0, 0, 0.3
    noise = 0.02 * torch.randn(n, 2 * d, generator=generator)
    y = torch.cat([codes * in_a, codes * in_b], 1) + noise
    y[:, 8], y[:, d + 8] = 0.1 * codes[:, 8], 0.1 * codes[:, 8]
    return crosscoder(rows, encoder, (d, d)), y, [kind for *_, kind in parts]


def test_exclusive_latents_are_told_from_those_that_only_look_so() -> None:
    """Oracle: the dictionary that was planted. By their norm latents 1 to 5 are all of one side alone."""
    sae, y, kinds = truth()
    sae.threshold.data += 0.1  # above the noise
    _, latents = measured(sae, stored(y, sae))
    assert list(latents.kinds) == kinds
    assert ((latents.relative_norm[1:6] == 0) | (latents.relative_norm[1:6] == 1)).all()
    assert latents.nu_error[3] == pytest.approx(1, abs=0.1)
    assert latents.nu_reconstruction[4] == pytest.approx(1, abs=0.1)
    assert set(kinds) == set(KINDS)
    assert latents.strongest("B by its norm", 5) in ([3, 4], [4, 3])


def test_sides_of_two_widths_have_norms_alone() -> None:
    """Oracle: the formula of the norm; no direction of one side is one of the other."""
    rows = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0, 0.0]])
    sae = crosscoder(rows, rows.clone(), (2, 3))
    y = torch.rand(400, 5, generator=torch.Generator().manual_seed(0))
    _, latents = measured(sae, stored(y, sae))
    assert latents.relative_norm.tolist() == [0.5, 0.0]
    assert np.isnan(latents.nu_error).all()
    assert list(latents.kinds) == ["shared", "A by its norm"]
