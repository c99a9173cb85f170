"""The step in loops compiled by numba: near the definition, whatever the threads; divergence."""

from dataclasses import replace
from threading import Barrier

import pytest
import torch
from cpu_weights import DTYPES, weights_of
from steps import make_bank, planted, silence, train

from saemill.train.arch.topk import TopK
from saemill.train.backends.architecture import Dead, Slopes
from saemill.train.backends.base import Rates, Task
from saemill.train.backends.codes import Largest
from saemill.train.backends.cpu import backend as cpu
from saemill.train.backends.cpu import update
from saemill.train.backends.cpu.threads import each, number, one_in_torch
from saemill.train.backends.sparse import Forward
from saemill.train.learner.bank import Bank
from saemill.train.optim.optimizer import Adam
from saemill.train.sweep.variant import Variant

D, F, T = 24, 280, 120
BASE = Variant(name="v", site="s", k=6, num_latents=F, lr=3e-3, seed=0, k_aux=D // 2)


def trained(variants: list[Variant], dtype: torch.dtype, kernels: str, n_steps: int) -> Bank:
    """Steps with dead latents."""
    data = planted(n_steps, T, D)
    return train(silence(make_bank(variants, data[0], kernels=kernels, dtype=dtype, dead_after=2 * T)), data)


@pytest.fixture(params=["8-bit", "whole"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to multiply, whatever this CPU is fast at."""
    kind: str = request.param
    monkeypatch.setattr(cpu, "chooses_by_8_bits", lambda *shape: kind == "8-bit")
    return kind


@pytest.mark.parametrize("variant", [BASE, replace(BASE, optimizer_state="bf16", seed=1)])
def test_steps_stay_near_steps_in_torch(variant: Variant, product: str) -> None:
    """Oracle: the definition by autograd, in float32, over 7 steps with dead latents; counters and sums."""
    mine, theirs = (
        trained([variant], torch.float32, kernels, 7).learners[0] for kernels in ("numba", "torch")
    )
    assert len(theirs.dead.latents_S) > 0
    for a, b in zip(mine.parameters, theirs.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-4)
    assert torch.equal(mine.idle_tokens_F, theirs.idle_tokens_F)
    assert mine.totals.pop() == pytest.approx(theirs.totals.pop(), rel=1e-4)


def test_bf16_steps_lead_to_the_same_error(product: str) -> None:
    """Oracle: the definition with the same bf16 product; the mean FVU of 9 steps within 1%."""
    mine, theirs = (
        trained([BASE], torch.bfloat16, kernels, 9).learners[0].totals.pop()["fvu"]
        for kernels in ("numba", "torch")
    )
    assert mine == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_the_result(
    dtype: torch.dtype, product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: one thread, bitwise: codes, errors, and rows after an update; enough pieces for three threads.
    With b = 0 no product of torch's with an order of its own is in them."""
    monkeypatch.setattr(cpu, "CHUNK_TOKENS", 20)
    monkeypatch.setattr(update, "BLOCK_BYTES", 30 * D * 4)
    before, found = torch.get_num_threads(), []
    for n_threads in (1, 3):
        weights = weights_of(F, D, dtype, 4)
        parameters = weights.parameters
        parameters.b_D.zero_()
        optimizer = Adam(parameters.named, "bf16")
        optimizer.begin_step(0.1)
        backend = cpu.Cpu(dtype)
        torch.set_num_threads(n_threads)
        try:
            batch = backend.prepare(planted(1, T, D)[0])
            codes = backend.largest(batch, weights, backend.bias(weights), Largest(6))
            e_TD, dot_TK, sse = backend.reconstruct(codes, batch, weights)
            forward = Forward(codes, e_TD, dot_TK, sse, (codes.val_TK > 0).sum(), backend.bias(weights))
            rates, healthy = Rates(0.05, 1e-2, 0.0), torch.tensor(True)
            dead = Dead(torch.zeros(0, dtype=torch.int64), 0)
            task = Task(batch, weights, TopK(6), optimizer, dead, healthy, rates)
            backend.update(task, forward, Slopes(0.1 * dot_TK.where(codes.val_TK > 0, 0)), None)
            assert torch.get_num_threads() == n_threads
        finally:
            torch.set_num_threads(before)
        found.append([*codes[:2], forward.e_TD, forward.dot_TK, parameters.w_enc_FD, parameters.w_dec_FD])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_an_error_in_a_thread_is_raised() -> None:
    """Oracle: the error itself, from a piece that another thread works; torch's threads are as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)

    def work(piece: int, thread: int) -> None:
        if piece == 3:
            raise ValueError("piece 3")

    try:
        with pytest.raises(ValueError, match="piece 3"):
            each(range(5), work)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_torch_has_one_thread_around_pieces_and_its_own_again_after() -> None:
    """Oracle: torch's count, and the threads that pieces ran in: a piece waits until the other has begun."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    together = Barrier(2, timeout=60)
    seen = []

    def work(_piece: int, _thread: int) -> None:
        together.wait()
        seen.append(torch.get_num_threads())

    try:
        with one_in_torch():
            seen.append(torch.get_num_threads())
            each(range(2), work)
            seen.append(torch.get_num_threads())
        assert seen == [1, 1, 1, 1]
        assert torch.get_num_threads() == number() == 2
        with pytest.raises(ValueError), one_in_torch():
            raise ValueError
        assert torch.get_num_threads() == number() == 2
    finally:
        torch.set_num_threads(before)


def test_a_diverged_variant_is_found_and_changes_no_more(product: str) -> None:
    """Oracle: its weights from before, which are no longer finite; the healthy one beside it goes on."""
    bank = trained([replace(BASE, optimizer="sgd", lr=1e30), BASE], torch.float32, "numba", 4)
    wild, healthy = bank.learners
    assert 0 < int(wild.diverged_step) <= 3
    of_wild, of_healthy = wild.parameters.w_dec_FD.clone(), healthy.parameters.w_enc_FD.clone()
    with torch.no_grad():
        bank.step(planted(1, T, D)[0], 1.0, 4)
    assert torch.equal(wild.parameters.w_dec_FD.isnan(), of_wild.isnan())
    assert torch.equal(wild.parameters.w_dec_FD.nan_to_num(), of_wild.nan_to_num())
    assert not torch.equal(healthy.parameters.w_enc_FD, of_healthy)
    assert int(healthy.diverged_step) == -1


@pytest.mark.parametrize("spoilt", ["w_enc_FD", "b_enc_F", "b_D"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_found(spoilt: str, value: float, product: str) -> None:
    """Oracle: the squared error, which must not be finite, though no score of a NaN is ever chosen."""
    bank = trained([BASE], torch.float32, "numba", 1)
    (learner,) = bank.learners
    getattr(learner.parameters, spoilt).view(-1)[3] = value
    learner.weights.refresh()
    with torch.no_grad():
        bank.step(planted(1, T, D)[0], 1.0, 5)
    assert int(learner.diverged_step) == 5
