"""Steps replayed as a CUDA graph replays them, against the same steps done one by one."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stores import make_store
from torch import Tensor

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from recording import Eager, RecordedGraph, Waits, recorded, stand_in_for_cuda
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saemill.common.errors import ConfigError
from saemill.common.stores.activations import ActivationStore
from saemill.common.world import Group
from saemill.train.backends import auxk, codes
from saemill.train.backends.gpu.kernels.select import select_kernel
from saemill.train.config import TrainConfig
from saemill.train.graph import Graphs
from saemill.train.learner.bank import Bank, Frame
from saemill.train.run import _spread, check_machine, run
from saemill.train.sweep.variants import Variant

pytestmark = [pytest.mark.no_cover, pytest.mark.usefixtures("one_thread")]
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
D, F, T = 8, 12, 4
BASE = Variant(name="v", site="s", k=2, num_latents=F, lr=3e-2, seed=0, k_aux=4)


def batches(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(77)
    directions = torch.randn(20, D, generator=generator)
    picks = torch.randint(0, 20, (n, T, 3), generator=generator)
    noise = 0.1 * torch.randn(n, T, D, generator=generator)
    return list((directions[picks].sum(2) + noise).to(DEVICE))


def bank(variants: list[Variant], graphs: Any, dtype: torch.dtype = torch.bfloat16) -> Bank:
    frame = Frame(torch.zeros(D, device=DEVICE), 1.0)
    return Bank(variants, frame, dtype, 2 * T, batches(1)[0], kernels="triton", graphs=graphs)


def make_dead(made: Bank, n_dead: int) -> None:
    """The first latents have not fired for long, whatever they do."""
    made.idle_tokens_VF.zero_()
    made.idle_tokens_VF[:, :n_dead] = 2 * T + 1


def state(made: Bank) -> list[Tensor]:
    """All that outlives a step."""
    kept = [tensor for i in range(len(made.variants)) for part in made.kept(i) for tensor in part]
    return [*made.stacks, made.product_VFD, made.gathered_VFD, *kept]


@pytest.fixture(autouse=True)
def topk_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it goes through numpy, which no recorder sees; elsewhere through these operations."""

    def topk(pre_TF: Tensor, k: int) -> tuple[Tensor, Tensor]:
        indices = pre_TF.topk(k, sorted=False).indices
        return pre_TF.gather(1, indices).relu(), indices

    monkeypatch.setattr(auxk, "topk", topk)


KINDS = {
    "Adam": (torch.bfloat16, [BASE]),
    "bf16 moments, float32 products": (torch.float32, [replace(BASE, optimizer_state="bf16", loss="mse")]),
    "SGD, one diverges": (
        torch.bfloat16,
        [replace(BASE, optimizer="sgd", lr=0.1), replace(BASE, optimizer="sgd", lr=0.3, weight_decay=0.1)],
    ),
}
DEAD = (0, 5, 3, 7, 4, 0)
"""Dead latents at each look: none, rows for 8, for 4 (k_aux), then each again with another number."""


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_equal_steps_one_by_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the same bank stepped eagerly, bit by bit, with a rate that changes, dead latents that come and
    go, and a variant that diverges and is frozen."""
    captured: list[RecordedGraph] = [] if ON_GPU else stand_in_for_cuda(monkeypatch)
    monkeypatch.setattr("saemill.train.learner.bank.DEAD_EVERY_STEPS", 2)
    dtype, variants = KINDS[kind]
    mine, theirs = bank(variants, Graphs(DEVICE), dtype), bank(variants, Eager(), dtype)
    with torch.no_grad():
        for step, x_TD in enumerate(batches(2 * len(DEAD))):
            for each in (mine, theirs):
                if step % 2 == 0:
                    make_dead(each, DEAD[step // 2])
                if step == 6 and "diverges" in kind:
                    each.b_VD[0] = torch.inf
                each.step(x_TD.clone(), 1 / (step + 1), step)
                if step == 8:
                    stopped = each.freeze_diverged()
                    assert stopped == ([(variants[0], 6)] if "diverges" in kind else [])
            for a, b in zip(state(mine), state(theirs), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=f"after step {step}")
    of_the_last = captured[len(variants) - 1 :: len(variants)]
    assert ON_GPU or [graph.n_replays - 1 for graph in of_the_last] == [2, 2, 2]


def test_padded_rows_of_dead_latents_change_nothing() -> None:
    """Oracle: the same bank without padding, with kernels, above and below k_aux."""
    for n_dead, length in ((1, 1), (3, 4), (5, 8), (9, F)):
        padded, exact = bank([BASE], Eager()), bank([BASE], None)
        with torch.no_grad():
            for each in (padded, exact):
                make_dead(each, n_dead)
                each.step(batches(1)[0], 1.0, 0)
        assert (len(padded.dead_V[0]), len(exact.dead_V[0])) == (length, n_dead)
        for a, b in zip(state(padded), state(exact), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


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
@pytest.mark.parametrize("variant", [variants[-1] for _, variants in KINDS.values()])
def test_a_step_looks_at_no_value(variant: Variant, n_dead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the device meta, where shapes are all there is: a step that asked for a value, for a shape that
    depends on one, or for a copy to or from the host would fail."""
    meta = torch.device("meta")
    for module in (codes, auxk):
        monkeypatch.setitem(module.CHUNK_BYTES, "meta", 1 << 20)
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: nullcontext())
    monkeypatch.setattr(type(select_kernel), "run", lambda *_, **__: None)
    monkeypatch.setattr(Bank, "_initialise", lambda *_: None)
    monkeypatch.setattr(Bank, "_list_dead", lambda *_: None)
    frame = Frame(torch.zeros(D, device=meta), 1.0)
    made = Bank([variant], frame, torch.bfloat16, 2 * T, torch.zeros(1), kernels="triton", graphs=Eager())
    made.n_dead_V, made.dead_V = [n_dead], [made._pad_dead(0, torch.zeros(n_dead, dtype=int, device=meta))]
    made._set_numbers(T, 1.0, 0)
    batch = made._hold(torch.zeros(T, D, device=meta))
    with torch.no_grad(), OnlyThere():
        made._step_variant(0, batch, batch)


def test_the_recorder_repeats_what_a_graph_repeats() -> None:
    """Oracle: by hand. A number is repeated as it was, a tensor as it is; a look at a value is refused."""
    weights, rate, lr, graph = torch.ones(3), torch.tensor(0.5), 0.5, RecordedGraph()
    with recorded(graph.tape):
        (weights[:2] * rate).add_(weights[1:], alpha=lr).mul_(1)
        weights[0] -= rate
        weights[1] -= lr
    rate, lr = rate.fill_(0.25), 0.25
    graph.tape.replay()
    assert weights.tolist() == [0.25, 0.0, 1.0]
    for look in (bool, float, int, Tensor.tolist, Tensor.item, Tensor.cpu, Tensor.nonzero, torch.unique):
        with pytest.raises(Waits), recorded(graph.tape):
            look(rate)
    for step in (lambda: torch.tensor(lr), lambda: weights[weights > 0], lambda: weights.new_tensor(lr)):
        with pytest.raises(Waits), recorded(graph.tape):
            step()


def test_no_effect_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    acts = make_store(tmp_path, n_rows=16, ctx_len=16, d=D, shard_tokens=128).path
    with pytest.raises(ConfigError, match="cuda_graph has no effect on cpu"):
        run(
            TrainConfig(
                acts=acts,
                out=tmp_path / "r",
                site=("a",),
                k=(2,),
                device="cpu",
                batch_size=32,
                cuda_graph=True,
            )
        )
    assert not (tmp_path / "r").exists()
    with pytest.raises(ConfigError, match="profile cannot see"):
        TrainConfig(acts=acts, out=tmp_path / "r", profile=True, cuda_graph=True)
    plain, variants = TrainConfig(acts=acts, out=tmp_path / "r", cuda_graph=True), [replace(BASE, site="a")]
    split, cpu = replace(plain, latent_ranks=2), torch.device("cpu")
    with pytest.raises(ConfigError, match="a team, here of 2 processes, is not captured"):
        _spread(split, ActivationStore(acts), variants, Group([0, 1], 0), cpu)
    on_gpus = SimpleNamespace(size=2, device=lambda name: torch.device("cuda"))
    monkeypatch.setattr("saemill.train.run.World", SimpleNamespace(here=lambda: on_gpus))
    with pytest.raises(ConfigError, match="does not go with torch"):
        check_machine(replace(plain, kernels="torch"))
    with pytest.raises(ConfigError, match="does not go with halving in several processes"):
        check_machine(replace(plain, halving=1))
    check_machine(plain)
