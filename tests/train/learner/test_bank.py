"""A bank's steps against autograd with torch.optim, and against training each variant alone."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from saemill.train.backends import codes
from saemill.train.learner.bank import Bank, Frame
from saemill.train.optim.optimizer import ADAM_EPS
from saemill.train.sweep.schedule import Schedule
from saemill.train.sweep.variants import Variant

D, F, T = 16, 96, 128
BASE = Variant(name="v", site="s", k=6, num_latents=F, lr=3e-3, seed=0, k_aux=D // 2)


def batches(n: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(40, D, generator=generator)
    picks = torch.randint(0, 40, (n, T, 3), generator=generator)
    return list(directions[picks].sum(2) + 0.1 * torch.randn(n, T, D, generator=generator))


def make_bank(variants: list[Variant], dead_after: int = 10**9, scale: float = 1.0) -> Bank:
    frame = Frame(torch.zeros(D), scale)
    return Bank(variants, frame, torch.float32, dead_after, batches(1)[0])


def train(bank: Bank, data: list[Tensor]) -> Bank:
    with torch.no_grad():
        for step, x in enumerate(data):
            bank.step(x, 1.0, step)
    return bank


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_steps_equal_dense_autograd_with_torch_optimizers(optimizer: str) -> None:
    """Oracle: float32 autograd, the gradient's projection, torch.optim.Adam or SGD, renormalisation."""
    variant = replace(BASE, optimizer=optimizer, lr=3e-3 if optimizer == "adam" else 0.5)
    bank = make_bank([variant])
    w_enc, b_enc, w_dec, b = (torch.nn.Parameter(stack[0].clone()) for stack in bank.stacks)
    leaves = [w_enc, b_enc, w_dec, b]
    if optimizer == "adam":
        oracle: torch.optim.Optimizer = torch.optim.Adam(
            leaves, lr=variant.lr, eps=ADAM_EPS, betas=variant.adam_betas
        )
    else:
        oracle = torch.optim.SGD(leaves, lr=variant.lr, momentum=0.9)
    data = batches(5)
    for x in data:
        pre = (x - b) @ w_enc.T + b_enc
        mask = torch.zeros_like(pre).scatter(1, pre.topk(variant.k).indices, 1.0)
        error = torch.relu(pre * mask) @ w_dec + b - x
        oracle.zero_grad()
        (error.square().sum() / (T * D)).backward()
        assert w_dec.grad is not None
        w_dec.grad -= (w_dec.grad * w_dec).sum(1, keepdim=True) * w_dec.detach()
        oracle.step()
        with torch.no_grad():
            w_dec.div_(w_dec.norm(dim=1, keepdim=True))
    train(bank, data)
    for mine, leaf in zip(bank.stacks, leaves, strict=True):
        torch.testing.assert_close(mine[0], leaf.detach(), rtol=2e-3, atol=2e-5)


def test_each_variant_equals_training_it_alone() -> None:
    """Oracle: a bank of one, bit by bit, with different k, lr, seed, auxk and dead latents."""
    variants = [
        BASE,
        replace(BASE, k=1, lr=1e-2, seed=3),
        replace(BASE, k=20, auxk_alpha=0.0, adam_betas=(0.5, 0.999)),
        replace(BASE, k=2, b_dec_init="geometric_median", loss="mse", weight_decay=0.1),
    ]
    data = batches(8)
    together = train(make_bank(variants, dead_after=2 * T), data)
    assert int((together.idle_tokens_VF > 2 * T).sum()) > 0
    for i, variant in enumerate(variants):
        alone = train(make_bank([variant], dead_after=2 * T), data)
        for stacked, single in zip(together.stacks, alone.stacks, strict=True):
            assert torch.equal(stacked[i], single[0])


def test_idle_counters_count_tokens_since_a_latent_fired() -> None:
    """Oracle: a dense recount of which latents were positive in each batch."""
    bank = make_bank([BASE])
    expected = torch.zeros(F, dtype=torch.int64)
    with torch.no_grad():
        for step, x in enumerate(batches(4)):
            w_enc, b_enc, _, b = (stack[0] for stack in bank.stacks)
            pre = (x - b) @ w_enc.T + b_enc
            kept = torch.zeros_like(pre).scatter(1, pre.topk(BASE.k).indices, 1.0) * pre
            fired = (kept > 0).any(0)
            bank.step(x, 1.0, step)
            expected = torch.where(fired, 0, expected + T)
    assert torch.equal(bank.idle_tokens_VF[0], expected)


def test_auxk_revives_dead_latents() -> None:
    """Oracle: the same training without AuxK leaves more latents dead."""
    data = batches(60)
    dead = {}
    for alpha in (0.0, 1 / 32):
        bank = make_bank([replace(BASE, k=2, auxk_alpha=alpha, lr=1e-2)], dead_after=4 * T)
        bank.b_enc_VF[0, : F // 2] = -4.0
        train(bank, data)
        dead[alpha] = bank.dead_fraction(0)
    assert dead[1 / 32] < dead[0.0]
    assert dead[0.0] >= 0.5


def test_a_diverging_variant_is_frozen_and_the_others_go_on() -> None:
    """Oracle: the healthy variant trained alone; the diverged one keeps finite weights."""
    wild = replace(BASE, optimizer="sgd", lr=1e30)
    data = batches(12)
    bank = make_bank([wild, BASE])
    stopped: list[tuple[Variant, int]] = []
    with torch.no_grad():
        for step, x in enumerate(data):
            bank.step(x, 1.0, step)
            stopped += bank.freeze_diverged()
    assert [variant for variant, _ in stopped] == [wild]
    assert 0 < stopped[0][1] < 12
    alone = train(make_bank([BASE]), data)
    for stacked, single in zip(bank.stacks, alone.stacks, strict=True):
        assert torch.equal(stacked[1], single[0])


def test_export_gives_the_same_sae_in_the_activations_own_units() -> None:
    """Oracle: the trained parameters applied to centred, scaled inputs."""
    centre, scale = torch.randn(D) * 50, 0.02
    frame = Frame(centre, scale)
    raw = [x / scale + centre for x in batches(4)]
    bank = Bank([BASE], frame, torch.float32, 10**9, frame.enter(raw[0]))
    train(bank, [frame.enter(x) for x in raw])
    sae = bank.export(0, {})
    inside = frame.enter(raw[0])
    w_enc, b_enc, w_dec, b = (stack[0] for stack in bank.stacks)
    active = codes.encode(inside, w_enc, codes.fold_bias(w_enc, b_enc, b), BASE.k)
    expected = (codes.decode(active, w_dec) + b) / scale + centre
    output = sae(raw[0])
    torch.testing.assert_close(output.reconstruction, expected, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(
        output.top_acts.sort(1).values, (active.val_TK / scale).sort(1).values, rtol=1e-3, atol=1e-2
    )


def test_mse_and_fvu_differ_by_a_constant() -> None:
    """Oracle: fvu is mse over the variance per dimension, 1 / scale² in these units."""
    losses = {}
    for loss in ("fvu", "mse"):
        bank = make_bank([replace(BASE, loss=loss)], scale=0.25)
        train(bank, batches(1))
        losses[loss] = bank.totals_V[0].take(D)["loss"]
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
