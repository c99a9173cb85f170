"""Steps with kernels: short moments, resuming, and that the host never waits."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from steps import GPU, make_bank, planted, silence, train
from torch import Tensor

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saemill.train.arch.topk import TopK
from saemill.train.backends import auxk, sparse
from saemill.train.backends.architecture import Dead
from saemill.train.backends.gpu import backend as gpu
from saemill.train.backends.gpu import update
from saemill.train.backends.gpu.kernels.hyper import Hyper
from saemill.train.backends.gpu.kernels.select import select_kernel
from saemill.train.learner.bank import Bank
from saemill.train.sweep.variant import Variant

pytestmark = pytest.mark.no_cover  # the interpreter is slow enough without being traced
D, F, T = 12, 16, 6
BASE = Variant(name="v", site="s", k=3, num_latents=F, lr=3e-3, seed=0, k_aux=D // 2)


def bank(variants: list[Variant], dtype: torch.dtype = torch.float32) -> Bank:
    (sample_TD,) = planted(1, T, D, GPU)
    return silence(make_bank(variants, sample_TD, kernels="triton", dtype=dtype, dead_after=2 * T))


def test_short_moments_stay_near_float32() -> None:
    """Oracle: float32 moments; weights move alike, the mean FVU is the same within a bound."""
    bounds = {"fp32": (0.0, 0.0), "bf16": (0.01, 2e-4), "8bit": (0.1, 1e-3)}
    start = bank([BASE]).learners[0].parameters.w_enc_FD
    trained = train(bank([replace(BASE, optimizer_state=kind) for kind in bounds]), planted(4, T, D, GPU))
    exact = trained.learners[0]
    way = (exact.parameters.w_enc_FD - start).norm()
    for learner, (weights, error) in zip(trained.learners, bounds.values(), strict=True):
        off = (learner.parameters.w_enc_FD - exact.parameters.w_enc_FD).norm()
        assert float(off / way) <= weights
        assert learner.totals.window()["fvu"] == pytest.approx(exact.totals.window()["fvu"], rel=error)
    by_bf16, by_8bit = (learner.parameters.w_enc_FD for learner in trained.learners[1:])
    assert not torch.equal(by_bf16, by_8bit)


def test_8_bit_moments_go_on_bit_by_bit() -> None:
    """Oracle: the same steps without a stop; in between the state goes through what a checkpoint keeps."""
    variant, data = replace(BASE, optimizer_state="8bit"), planted(2, T, D, GPU)
    whole, again = bank([variant]), bank([variant])
    (mine,), (theirs,) = whole.learners, again.learners
    with torch.no_grad():
        whole.step(data[0], 1.0, 0)
        for saved, empty in zip(mine.checkpoint_tensors(), theirs.checkpoint_tensors(), strict=True):
            for full, tensor in zip(saved, empty, strict=True):
                tensor.copy_(full)
        theirs.optimizer.n_steps = 1
        again.refresh()
        for made in (whole, again):
            made.step(data[1], 1.0, 1)
    for expected, found in zip(mine.checkpoint_tensors(), theirs.checkpoint_tensors(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


JUMPRELU = replace(
    BASE, architecture="jumprelu", k=None, k_aux=None, target_l0=5.0, bandwidth=0.2, preact_coefficient=0.01
)


def test_more_codes_than_there_is_room_for_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the same step with room for all from the start, bit by bit."""
    monkeypatch.setattr(sparse, "DENSE_SHARE", 2.0)
    (x_TD,) = planted(1, T, D, GPU)
    wide = train(bank([JUMPRELU]), [x_TD]).learners[0]
    assert wide.totals.window()["l0"] > 1
    monkeypatch.setattr(gpu, "FIRST_SLOTS", 1)
    narrow = train(bank([JUMPRELU]), [x_TD]).learners[0]
    for name, parameter in wide.parameters.named.items():
        assert torch.equal(parameter, narrow.parameters.named[name])
    assert narrow.totals.window() == wide.totals.window()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_with_dense_codes_is_that_of_torch(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: `Plain` on the same device, bit by bit; the copies of the weights follow."""
    monkeypatch.setattr(sparse, "DENSE_SHARE", 0.0)
    (x_TD,) = planted(1, T, D, GPU)
    plain, dense = (
        train(make_bank([JUMPRELU], x_TD, kernels=kernels, dtype=dtype), [x_TD]).learners[0]
        for kernels in ("torch", "triton")
    )
    for name, parameter in plain.parameters.named.items():
        assert torch.equal(parameter, dense.parameters.named[name])
    assert torch.equal(dense.weights.product_FD, dense.parameters.w_enc_FD.to(dtype))
    assert torch.equal(dense.weights.gathered_FD, dense.parameters.w_dec_FD.to(dtype))


class OnlyThere(TorchDispatchMode):
    """Refuses tensors that are not on the device meta, where none has a value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._fused_adamw_.tensor_lr:  # not written for meta
            return None
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            assert not isinstance(leaf, Tensor) or leaf.is_meta, f"{func}: between the host and the device"
        return result


@pytest.mark.parametrize("n_dead", [0, 2, 5])
@pytest.mark.parametrize(
    "variant",
    [
        BASE,
        replace(BASE, optimizer_state="bf16", loss="mse"),
        replace(BASE, optimizer="sgd", weight_decay=0.1),
    ],
)
def test_a_step_makes_no_host_wait(variant: Variant, n_dead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the device meta, where shapes are all there is: a step that asked for a value, for a shape that
    depends on one, or for a copy to or from the host would fail. Only the step's rates are copied there."""
    meta = torch.device("meta")
    monkeypatch.setitem(auxk.CHUNK_BYTES, "meta", 1 << 20)
    monkeypatch.setattr(auxk, "topk", lambda pre, k: tuple(pre.topk(k, sorted=False)))
    monkeypatch.setattr(gpu, "topk", lambda pre, k: tuple(pre.topk(k, sorted=False)))
    monkeypatch.setattr(update, "_hyper", lambda *_: torch.zeros(len(Hyper), device=meta))
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: nullcontext())
    monkeypatch.setattr(type(select_kernel), "run", lambda *_, **__: None)
    monkeypatch.setattr(TopK, "initialise", lambda *_: None)
    made = make_bank([variant], torch.zeros(1, D, device=meta), kernels="triton", dtype=torch.bfloat16)
    (learner,) = made.learners
    learner.dead = Dead(torch.zeros(n_dead, dtype=torch.int64, device=meta), n_dead)
    x_TD = torch.zeros(T, D, device=meta)
    with torch.no_grad(), OnlyThere():
        learner.step(made.backend.prepare(x_TD), 1.0, 1)
