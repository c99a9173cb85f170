"""The names of the architectures, and what some have in common."""

from typing import Literal

Architecture = Literal["topk", "abs-topk", "batchtopk", "matryoshka", "groupmax", "jumprelu", "relu", "gated"]
BY_K = ("topk", "abs-topk", "batchtopk", "matryoshka", "groupmax")
"""Architectures that keep a given number of latents."""
WITH_AUXK = (*BY_K, "jumprelu")
"""Architectures whose dead latents fit the residual."""
BY_L1 = ("relu", "gated")
"""Architectures whose codes are kept small by a penalty on their sum."""

PENALISED = ("jumprelu", *BY_L1)
"""Architectures whose codes are kept few or small by a penalty."""


def no_effect(name: str, architecture: str) -> str:
    """Say that a setting has no effect on an architecture, and what has."""
    instead = {
        ("k", "jumprelu"): "use target_l0",
        **{("k", one): "use l1_coefficient" for one in BY_L1},
        **{("target_l0", one): "use k" for one in BY_K},
        **{("target_l0", one): "use l1_coefficient" for one in BY_L1},
        ("l1_coefficient", "jumprelu"): "use target_l0, or l0_coefficient",
    }
    return f"{name} has no effect with {architecture}; {instead.get((name, architecture), 'leave it out')}"
