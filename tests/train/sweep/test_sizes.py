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
