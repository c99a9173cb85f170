"""Whole steps with the kernels against the same steps in torch."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from saemill.train.learner.bank import Bank, Frame
from saemill.train.sweep.variants import Variant

pytestmark = pytest.mark.no_cover  # the interpreter is slow enough without being traced
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
D, F, T = 24, 28, 12
BASE = Variant(name="v", site="s", k=6, num_latents=F, lr=3e-3, seed=0, k_aux=D // 2)


def batches(n: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(77)
    directions = torch.randn(60, D, generator=generator)
    picks = torch.randint(0, 60, (n, T, 3), generator=generator)
    return list(
        directions[picks].sum(2).to(DEVICE) + 0.1 * torch.randn(n, T, D, generator=generator).to(DEVICE)
    )


def bank(variants: list[Variant], dtype: torch.dtype, kernels: str) -> Bank:
    frame = Frame(torch.zeros(D, device=DEVICE), 1.0)
    made = Bank(variants, frame, dtype, 2 * T, batches(1)[0], kernels=kernels)
    made.w_enc_VFD[:, : F // 4] *= 0.01  # these die, so that AuxK runs
    made.refresh_copies()
    return made


def train(made: Bank, n_steps: int) -> Bank:
    with torch.no_grad():
        for step, x_TD in enumerate(batches(n_steps)):
            made.step(x_TD, 1.0, step)
    return made


@pytest.mark.parametrize(
    "variant",
    [
        BASE,
        replace(BASE, k=3, seed=3, weight_decay=0.1, loss="mse", adam_betas=(0.5, 0.999)),
        replace(BASE, optimizer="sgd", lr=0.3, auxk_alpha=0.0),
    ],
)
def test_steps_with_kernels_equal_steps_in_torch(variant: Variant) -> None:
    """Oracle: the passes in torch, in float32, over 7 steps with dead latents; counters and sums too."""
    mine, theirs = (train(bank([variant], torch.float32, kernels), 7) for kernels in ("triton", "torch"))
    assert len(theirs.dead_V[0]) > 0
    for a, b in zip(mine.stacks, theirs.stacks, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-4)
    assert torch.equal(mine.idle_tokens_VF, theirs.idle_tokens_VF)
    ours, expected = mine.totals_V[0].take(D), theirs.totals_V[0].take(D)
    assert ours == pytest.approx(expected, rel=1e-4)


def test_bf16_steps_with_kernels_lead_to_the_same_error() -> None:
    """Oracle: the passes in torch with the same bf16 product; the mean FVU of 7 steps within 2%."""
    found = [
        train(bank([BASE], torch.bfloat16, kernels), 7).totals_V[0].take(D) for kernels in ("triton", "torch")
    ]
    assert found[0]["fvu"] == pytest.approx(found[1]["fvu"], rel=0.02)


def test_short_moments_with_kernels_stay_near_float32() -> None:
    """Oracle: float32 moments; weights move alike, the mean FVU is the same within a bound."""
    bounds = {"fp32": (0.0, 0.0), "bf16": (0.005, 1e-4), "8bit": (0.06, 5e-4)}
    variants = [replace(BASE, optimizer_state=state) for state in bounds]
    start = bank([BASE], torch.float32, "triton").w_enc_VFD[0]
    trained = train(bank(variants, torch.float32, "triton"), 4)
    exact, fvu = trained.w_enc_VFD[0], trained.totals_V[0].window(D)["fvu"]
    for i, (weights, error) in enumerate(bounds.values()):
        assert float((trained.w_enc_VFD[i] - exact).norm() / (exact - start).norm()) <= weights
        assert trained.totals_V[i].window(D)["fvu"] == pytest.approx(fvu, rel=error)
    assert not torch.equal(trained.w_enc_VFD[2], trained.w_enc_VFD[1])


def test_8_bit_moments_with_kernels_go_on_bit_by_bit() -> None:
    """Oracle: the same steps without a stop; in between the state goes through what a checkpoint keeps."""
    variant, data = replace(BASE, optimizer_state="8bit"), batches(2)
    whole, again = (bank([variant], torch.float32, "triton") for _ in range(2))
    with torch.no_grad():
        whole.step(data[0], 1.0, 0)
        for kept, empty in zip(whole.kept(0), again.kept(0), strict=True):
            for full, tensor in zip(kept, empty, strict=True):
                tensor.copy_(full)
        again.optimizers[0].n_steps = 1
        again.refresh()
        for made in (whole, again):
            made.step(data[1], 1.0, 1)
    for expected, found in zip(whole.kept(0), again.kept(0), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_diverged_variant_changes_no_more() -> None:
    """Oracle: its own finite weights from before; the healthy one beside it goes on."""
    wild = replace(BASE, optimizer="sgd", lr=1e30)
    made = train(bank([wild, BASE], torch.float32, "triton"), 3)
    at = int(made.diverged_step_V[0])
    assert 0 < at <= 2
    before = [stack[0].clone() for stack in made.stacks]
    healthy = made.w_enc_VFD[1].clone()
    with torch.no_grad():
        made.step(batches(1)[0], 1.0, 3)
    for mine, was in zip(made.stacks, before, strict=True):
        assert torch.equal(mine[0], was)
    assert not torch.equal(made.w_enc_VFD[1], healthy)
