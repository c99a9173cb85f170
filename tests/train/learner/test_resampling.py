"""Dead latents of a ReLU SAE that begin again: where they begin, who is drawn, and what is forgotten."""

import pytest
import torch
from steps import make_bank, planted, silence, train
from torch import Tensor

from saemill.train.learner.learner import Learner
from saemill.train.learner.resampling import _draw, resample
from saemill.train.sweep.variant import Variant

T, D, F = 64, 12, 40
RELU = Variant(
    name="v", site="s", architecture="relu", num_latents=F, lr=1e-2, l1_coefficient=0.05, resample_at=(4,)
)


def trained(variant: Variant = RELU) -> tuple[Learner, Tensor]:
    """A learner after some steps, some of whose latents are dead, and another batch."""
    batches = planted(5, T, D)
    bank = make_bank([variant], batches[0], dead_after=T)
    for learner in silence(bank).learners:
        learner.parameters.b_enc_F[: F // 4] = -1
        learner.weights.refresh()
    train(bank, batches[:4])
    (learner,) = bank.learners
    return learner, batches[4]


@pytest.mark.parametrize("decoder_rows", ["unit", "free"])
def test_dead_latents_begin_at_tokens_of_their_own(decoder_rows: str) -> None:
    """Oracle: the procedure by hand, in float64: the directions of different tokens less b, a fifth of the
    other encoder rows' mean length, no bias; everything else as it was, bit by bit."""
    learner, x_TD = trained(
        Variant(
            name="v", site="s", architecture="relu", num_latents=F, lr=1e-2, l1_coefficient=0.05,
            decoder_rows=decoder_rows,  # type: ignore[arg-type]
        )
    )  # fmt: skip
    dead_F = learner.idle_tokens_F > learner.dead_after_tokens
    before = {name: p.clone() for name, p in learner.parameters.named.items()}
    assert 3 < dead_F.sum() < F
    with torch.no_grad():
        resample(learner, learner.backend.prepare(x_TD), 4)
    p = learner.parameters
    for name, own in before.items():
        kept = ~dead_F if name != "b" else slice(None)
        assert torch.equal(p.named[name][kept], own[kept])
        if name != "b":
            assert all(not moment[dead_F].any() for moment in learner.optimizer.tensors()[name])
            assert any(moment[~dead_F].any() for moment in learner.optimizer.tensors()[name])
    read_TD = (x_TD - before["b"]).double()
    unit_TD = read_TD / read_TD.norm(dim=1, keepdim=True)
    decoder_length, encoder_length = (
        before[name][~dead_F].double().norm(dim=1).mean() for name in ("w_dec", "w_enc")
    )
    chosen = (p.w_dec_FD[dead_F].double() @ unit_TD.T).argmax(1)
    assert len(chosen.unique()) == dead_F.sum()
    torch.testing.assert_close(
        p.w_dec_FD[dead_F].double(), unit_TD[chosen] * decoder_length, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        p.w_enc_FD[dead_F].double(), unit_TD[chosen] * 0.2 * encoder_length, rtol=0, atol=1e-5
    )
    assert not p.b_enc_F[dead_F].any()
    assert not learner.idle_tokens_F[dead_F].any()
    assert torch.equal(learner.weights.product_FD, p.w_enc_FD)


def test_a_step_resamples_at_its_number_alone() -> None:
    """Oracle: the numbers of idle tokens: they begin again at step 4, and at no other."""
    (learner, x_TD), (other, _) = trained(), trained()
    batch = learner.backend.prepare(x_TD)
    with torch.no_grad():
        learner.step(batch, 0.0, 4)
        other.step(batch, 0.0, 5)
    assert learner.dead_fraction() == 0
    assert other.dead_fraction() > 0.1


def test_tokens_are_drawn_by_the_square_of_their_error() -> None:
    """Oracle: the shares of the weights, over 20,000 draws of one token; 5 standard deviations."""
    error_T = torch.tensor([1.0, 2.0, 0.0, 3.0])
    n, weight_T = 20_000, torch.tensor([1.0, 4.0, 0.0, 9.0]) / 14
    counts_T = torch.bincount(torch.cat([_draw(error_T, 1, key) for key in range(n)]), minlength=4)
    deviation_T = (n * weight_T * (1 - weight_T)).sqrt()
    assert bool(((counts_T - n * weight_T).abs() <= 5 * deviation_T).all())


def test_no_token_is_drawn_twice_nor_one_without_an_error() -> None:
    """Oracle: the tokens with an error that is a number, by hand; the same key draws the same."""
    error_T = torch.tensor([1.0, 0.0, 2.0, torch.nan, torch.inf, 5.0])
    assert sorted(_draw(error_T, 6, 1).tolist()) == [0, 2, 5]
    assert torch.equal(_draw(error_T, 2, 7), _draw(error_T, 2, 7))
    assert len(_draw(torch.zeros(3), 2, 0)) == 0
