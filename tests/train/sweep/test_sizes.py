"""The bytes of an SAE in training, by formula and in a learner."""

from typing import Any

import pytest
import torch
from torch import Tensor

from saemill.train.backends.choose import make_backend
from saemill.train.learner.learner import Learner
from saemill.train.stream.scaling import Scaling
from saemill.train.sweep.sizes import sizes
from saemill.train.sweep.variant import Variant

KINDS: dict[str, dict[str, Any]] = {
    "topk": {"k": 8},
    "batchtopk": {"k": 8},
    "groupmax": {"k": 8},
    "abs-topk": {"k": 8},
    "matryoshka": {"k": 8, "prefixes": (32, 512)},
    "jumprelu": {"target_l0": 8.0},
    "relu": {"l1_coefficient": 0.05},
    "gated": {"l1_coefficient": 0.05},
}
OPTIMIZERS: list[dict[str, Any]] = [
    {},
    {"optimizer_state": "bf16"},
    {"optimizer_state": "8bit"},
    {"optimizer": "sgd"},
    {"optimizer": "signum"},
    {"optimizer": "muon"},
    {"weight_average": 0.99},
    {"decoder": "frozen"},
]
F, D = 512, 320
FEW = 1024
"""Bytes of sums and counts, of which the formula tells nothing."""


def tensors_in(thing: Any, seen: dict[int, Tensor]) -> dict[int, Tensor]:
    """All tensors that an object of ours holds, each memory once: by walking through its attributes."""
    if isinstance(thing, Tensor):
        seen.setdefault(thing.untyped_storage().data_ptr(), thing)
    elif isinstance(thing, dict):
        [tensors_in(value, seen) for value in thing.values()]
    elif isinstance(thing, list | tuple):
        [tensors_in(value, seen) for value in thing]
    elif type(thing).__module__.startswith("saemill.train") and hasattr(thing, "__dict__"):
        [tensors_in(value, seen) for value in vars(thing).values()]
    return seen


@pytest.mark.parametrize("kernels", ["torch", "numba"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: "-".join(map(str, o.values())) or "adam")
@pytest.mark.parametrize("architecture", KINDS)
def test_what_a_learner_keeps(architecture: str, optimizer: dict[str, Any], kernels: str) -> None:
    """Oracle: the bytes of every tensor that a real learner holds, its backend's scratch and the site's
    scaling apart."""
    settings = KINDS[architecture] | optimizer
    variant = Variant(
        name="v", site="s", architecture=architecture, num_latents=F, lr=1e-3, k_aux=16, **settings
    )  # type: ignore[arg-type]
    dtype = torch.bfloat16
    backend = make_backend(kernels, dtype)
    scaling = Scaling(torch.zeros(D), 1.0)
    learner = Learner(variant, scaling, backend, torch.randn(256, D), dead_after_tokens=1000)
    learner.backend = learner.scaling = None  # type: ignore[assignment]
    held = sum(t.untyped_storage().nbytes() for t in tensors_in(learner, {}).values())
    expected = sizes(variant, [D], kernels, dtype, learner.weights.quantised_FD is not None)
    assert held <= sum(expected) - expected.gradients + FEW
    assert held >= sum(expected) - expected.gradients


@pytest.mark.parametrize(("kernels", "own"), [("numba", "numba"), ("triton", "torch")])
@pytest.mark.parametrize("optimizer", [{}, {"optimizer_state": "8bit"}, {"decoder": "frozen"}])
def test_what_a_cross_layer_transcoder_keeps(optimizer: dict[str, Any], kernels: str, own: str) -> None:
    """Oracle: the bytes of every tensor that a real learner of three layers holds, which torch steps where
    Triton's kernels step others; fewer than those of whole matrices."""
    sites = {"site": "a+b+c", "target_site": "x+y+z"}
    variant = Variant(name="v", **sites, num_latents=F // 8 * 6, k=3, lr=1e-3, k_aux=16, **optimizer)
    ends = [Scaling(torch.zeros(3 * d), 1.0, ((d, 1.0),) * 3) for d in (40, 24)]
    samples = [torch.randn(256, 3 * d) for d in (40, 24)]
    backend = make_backend(own, torch.bfloat16)
    learner = Learner(variant, ends[0], backend, samples[0], 1000, (ends[1], samples[1]))
    learner.backend = learner.scaling = learner.target_scaling = None  # type: ignore[assignment]
    held = sum(t.untyped_storage().nbytes() for t in tensors_in(learner, {}).values())
    expected = sizes(variant, [120, 72], kernels, torch.bfloat16)
    kept = sum(expected) - expected.gradients
    assert kept <= held <= kept + FEW
    assert expected.weights < 4 * variant.num_latents * (120 + 72)
