"""A bank's steps: each learner as if it were alone, dead latents, divergence, export."""

from dataclasses import replace

import pytest
import torch
from steps import make_bank, planted, train
from torch import Tensor

from saemill.common.sae.sae import Sae
from saemill.train.backends.codes import Largest
from saemill.train.backends.sparse import decode, encode, fold_bias
from saemill.train.learner.learner import Learner
from saemill.train.stream.scaling import Scaling
from saemill.train.sweep.schedule import Schedule
from saemill.train.sweep.variant import Variant

D, F, T = 16, 96, 128
BASE = Variant(name="v", site="s", k=6, num_latents=F, lr=3e-3, seed=0, k_aux=D // 2)


def batches(n: int) -> list[Tensor]:
    return planted(n, T, D)


def test_each_variant_equals_training_it_alone() -> None:
    """Oracle: a bank of one, bit by bit, with different k, width, lr, seed, auxk and dead latents."""
    variants = [
        BASE,
        replace(BASE, k=1, lr=1e-2, seed=3, num_latents=150),
        replace(BASE, k=20, auxk_alpha=0.0, adam_betas=(0.5, 0.999)),
        replace(BASE, k=2, b_dec_init="geometric_median", loss="mse", weight_decay=0.1),
    ]
    data = batches(8)
    together = train(make_bank(variants, data[0], dead_after=2 * T), data)
    assert sum(len(learner.dead.latents_S) for learner in together.learners) > 0
    for learner in together.learners:
        (alone,) = train(make_bank([learner.variant], data[0], dead_after=2 * T), data).learners
        same(learner, alone)


def same(mine: Learner, other: Learner) -> None:
    for a, b in zip(mine.parameters.named.values(), other.parameters.named.values(), strict=True):
        assert torch.equal(a, b)


def test_idle_counters_count_tokens_since_a_latent_fired() -> None:
    """Oracle: a dense recount of which latents were positive in each batch."""
    bank = make_bank([BASE], batches(1)[0])
    (learner,) = bank.learners
    expected = torch.zeros(F, dtype=torch.int64)
    with torch.no_grad():
        for step, x in enumerate(batches(4)):
            w_enc, b_enc, _, b, *_ = learner.parameters
            pre = (x - b) @ w_enc.T + b_enc
            kept = torch.zeros_like(pre).scatter(1, pre.topk(BASE.k).indices, 1.0) * pre
            fired = (kept > 0).any(0)
            bank.step(x, 1.0, step)
            expected = torch.where(fired, 0, expected + T)
    assert torch.equal(learner.idle_tokens_F, expected)


def test_auxk_revives_dead_latents() -> None:
    """Oracle: the same training without AuxK leaves more latents dead."""
    data = batches(60)
    dead = {}
    for alpha in (0.0, 1 / 32):
        bank = make_bank([replace(BASE, k=2, auxk_alpha=alpha, lr=1e-2)], data[0], dead_after=4 * T)
        bank.learners[0].parameters.b_enc_F[: F // 2] = -4.0
        train(bank, data)
        dead[alpha] = bank.learners[0].dead_fraction()
    assert dead[1 / 32] < dead[0.0]
    assert dead[0.0] >= 0.5


def test_a_diverging_variant_is_frozen_and_the_others_go_on() -> None:
    """Oracle: the healthy variant trained alone; the diverged one keeps finite weights."""
    wild = replace(BASE, optimizer="sgd", lr=1e30)
    data = batches(12)
    bank = make_bank([wild, BASE], data[0])
    stopped: list[Learner] = []
    with torch.no_grad():
        for step, x in enumerate(data):
            bank.step(x, 1.0, step)
            stopped += bank.freeze_diverged()
    assert [learner.variant for learner in stopped] == [wild]
    assert 0 < int(stopped[0].diverged_step) < 12
    (alone,) = train(make_bank([BASE], data[0]), data).learners
    same(bank.learners[1], alone)


def test_export_gives_the_same_sae_in_the_activations_own_units() -> None:
    """Oracle: the trained parameters applied to centred, scaled inputs."""
    scaling = Scaling(torch.randn(D, generator=torch.Generator().manual_seed(0)) * 50, 0.02)
    raw = [x / scaling.scale + scaling.centre_D for x in batches(4)]
    inside = scaling.standardise(raw[0])
    (learner,) = train(make_bank([BASE], inside, scaling=scaling), raw).learners
    parts = learner.export({})
    assert parts is not None
    w_enc, b_enc, w_dec, b, *_ = learner.parameters
    active = encode(inside, w_enc, fold_bias(w_enc, b_enc, b), Largest(BASE.k), torch.empty(T, F))
    expected = (decode(active, w_dec) + b) / scaling.scale + scaling.centre_D
    output = Sae.of(parts)(raw[0])
    torch.testing.assert_close(output.reconstruction, expected, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(
        output.top_acts.sort(1).values, (active.val_TK / scaling.scale).sort(1).values, rtol=1e-3, atol=1e-2
    )


def test_mse_and_fvu_differ_by_a_constant() -> None:
    """Oracle: fvu is mse over the variance per dimension, 1 / scale² in these units."""
    losses = {}
    for loss in ("fvu", "mse"):
        scaling = Scaling(torch.zeros(D), 0.25)
        stored = [x / scaling.scale for x in batches(1)]
        bank = train(make_bank([replace(BASE, loss=loss)], batches(1)[0], scaling=scaling), stored)
        losses[loss] = bank.learners[0].totals.pop()["loss"]
    assert losses["fvu"] is not None
    assert losses["mse"] == pytest.approx(losses["fvu"] * 16, rel=1e-5)


def test_schedule_warms_up_holds_and_decays() -> None:
    """Oracle: the stated shape at its corners."""
    linear = Schedule(n_steps=100, warmup_steps=9, decay="linear", decay_steps=20)
    assert linear.factor(0) == pytest.approx(0.1)
    assert linear.factor(9) == linear.factor(79) == 1.0
    assert linear.factor(80) == pytest.approx(20 / 21)
    assert linear.factor(99) == pytest.approx(1 / 21)
    cosine = Schedule(n_steps=100, warmup_steps=0, decay="cosine", decay_steps=100)
    assert cosine.factor(0) > 0.99
    assert cosine.factor(50) == pytest.approx(0.5, abs=0.02)
    flat = Schedule(n_steps=100, warmup_steps=0, decay="none", decay_steps=20)
    assert flat.factor(99) == 1.0
