"""A step that is replayed as a CUDA graph replays it, against the same steps done one by one."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from recording import Eager, Tapes

from saemill.train import auxk
from saemill.train.bank import Bank, Frame
from saemill.train.graph import Graphs
from saemill.train.variants import Variant

pytestmark = [pytest.mark.no_cover, pytest.mark.usefixtures("one_thread")]
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
D, F, T = 8, 16, 6
BASE = Variant(name="v", site="s", k=2, num_latents=F, lr=3e-2, seed=0, k_aux=3)
N_STEPS = 16


def batches(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(77)
    directions = torch.randn(20, D, generator=generator)
    picks = torch.randint(0, 20, (n, T, 3), generator=generator)
    noise = 0.1 * torch.randn(n, T, D, generator=generator)
    return list((directions[picks].sum(2) + noise).to(DEVICE))


def as_on_a_gpu(pre_TF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`common.topk` for tensors that are not on a CPU, where it goes through numpy."""
    indices = pre_TF.topk(k, sorted=False).indices
    return pre_TF.gather(1, indices).relu(), indices


def bank(variants: list[Variant], graphs: Any, dtype: torch.dtype = torch.bfloat16) -> Bank:
    frame = Frame(torch.zeros(D, device=DEVICE), 1.0)
    return Bank(variants, frame, dtype, 2 * T, batches(1)[0], fused=True, graphs=graphs)


def tensors(made: Bank) -> list[Tensor]:
    """All that outlives a step."""
    kept = [tensor for i in range(len(made.variants)) for part in made.kept(i) for tensor in part]
    return [*made.stacks, made.product_VFD, made.gathered_VFD, *kept]


@pytest.fixture(autouse=True)
def gpu_topk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auxk, "topk", as_on_a_gpu)


KINDS = {
    "adam, float32 and AuxK off": [replace(BASE, auxk_alpha=0.0, weight_decay=0.1, loss="mse")],
    "bf16 moments": [replace(BASE, optimizer_state="bf16")],
    "two, of which one diverges": [
        replace(BASE, optimizer="sgd", lr=1e30, seed=1), replace(BASE, optimizer="sgd", lr=0.3),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_equal_steps_one_by_one(kind: str) -> None:
    """Oracle: the same bank stepped eagerly, bit by bit, over a changing rate, dead latents that come and go,
    and a variant that diverges and is frozen."""
    dtype = torch.float32 if "float32" in kind else torch.bfloat16
    graphs = Graphs(DEVICE) if ON_GPU else Tapes()
    mine, theirs = bank(KINDS[kind], graphs, dtype), bank(KINDS[kind], Eager(), dtype)
    n_dead = set()
    with torch.no_grad():
        for step, x_TD in enumerate(batches(N_STEPS)):
            for each in (mine, theirs):
                each.step(x_TD.clone(), 1 / (step + 1), step)
                each.freeze_diverged() if step % 5 == 4 else None
            n_dead.add(len(theirs.dead_V[0]))
            for a, b in zip(tensors(mine), tensors(theirs), strict=True):
                assert torch.equal(a.nan_to_num(), b.nan_to_num()), step
    print(n_dead, graphs.tapes.keys(), [len(t.names) for t in graphs.tapes.values() if t], graphs.n_replays)
