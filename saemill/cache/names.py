"""Check of names: whether what is at a site is what its name says.

BLOOM's and MPT's MLP returns the whole residual stream, with its own output added to it; what Gemma 2's MLP
returns is normed before it is added. `common.models.site_roles` finds that out.
"""

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor

from saemill.common.models.model import LanguageModel
from saemill.common.models.site_roles import N_TOKENS
from saemill.common.stores.site_roles import Role


def warnings(model: LanguageModel, roles: Mapping[str, Role | None], ids_RS: Tensor) -> list[str]:
    """Compute warnings about some sites: those that hold the residual stream, those whose output is not what
    is added to it, and those with the same activations.

    Args:
        model: the model.
        roles: what is there, by site.
        ids_RS: token ids, int64.
    """
    found = [f"{site} {problem}" for site, role in roles.items() if role and (problem := _problem(role))]
    outputs = model.capture(ids_RS[:1, :N_TOKENS], list(roles), None)
    return found + [
        f"{a} and {b} give the same activations: one of them is enough"
        for a, b in combinations(roles, 2)
        if outputs[a].shape == outputs[b].shape and torch.equal(outputs[a], outputs[b])
    ]


def _problem(role: Role) -> str | None:
    """Say what is unexpected of a role; None if nothing is."""
    if role.kind == "holds_residual":
        return (
            f"gives the whole residual stream, with what it computes added to it; what it adds alone is at "
            f"{role.module}"
        )
    if role.kind == "added_after_norm":
        return f"is normed before it is added to the residual stream; what is added is at {role.module}"
    return None
