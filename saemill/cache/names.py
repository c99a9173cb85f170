"""Check of names: whether a module's output holds more than its name says.

BLOOM's and MPT's MLP returns the whole residual stream, with its own output added to it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from saemill.common.models.model import LanguageModel
from saemill.common.models.sites import first_output

N_TOKENS = 16
"""Tokens of the first row that are compared: what holds bit by bit there holds everywhere."""


def warnings(model: LanguageModel, sites: list[str], ids_RS: Tensor) -> list[str]:
    """Compute warnings about some sites, from a pass over a few tokens.

    Only what holds bit by bit is reported: a site whose output is another's, and a site whose output is the
    sum of one of its inputs and the output of a module inside it. Blocks are such sums by their nature, so
    for them the second is not reported.

    Args:
        model: the model.
        sites: module paths in its base model.
        ids_RS: token ids, int64.
    """
    candidates = [site for site in sites if site not in model.blocks]
    with _recording(model, candidates) as (inputs, inside):
        outputs = model.capture(ids_RS[:1, :N_TOKENS], sites, None)
    whole = [
        f"{site} gives the whole residual stream: what it computes, added to what went into it; what it adds "
        f"alone is at {added}"
        for site in candidates
        if (added := _added_output(outputs[site], inputs[site], inside[site]))
    ]
    return whole + [
        f"{a} and {b} give the same activations: one of them is enough"
        for a, b in combinations(sites, 2)
        if outputs[a].shape == outputs[b].shape and torch.equal(outputs[a], outputs[b])
    ]


def _added_output(x_RSD: Tensor, inputs: list[Tensor], outputs: dict[str, Tensor]) -> str | None:
    """Find the module inside a site whose output, added to one of the site's inputs, is the site's output."""
    for name, output in outputs.items():
        for input_RSD in inputs:
            if input_RSD.shape == output.shape == x_RSD.shape and torch.equal(input_RSD + output, x_RSD):
                return name
    return None


@contextmanager
def _recording(
    model: LanguageModel, sites: list[str]
) -> Iterator[tuple[dict[str, list[Tensor]], dict[str, dict[str, Tensor]]]]:
    """Record, while the block runs, the inputs of each site and the outputs of the modules with weights
    inside it."""
    inputs: dict[str, list[Tensor]] = {site: [] for site in sites}
    inside: dict[str, dict[str, Tensor]] = {site: {} for site in sites}

    def before(site: str) -> Callable[..., None]:
        def hook(_module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            inputs[site] = [x.clone() for x in (*arguments, *named.values()) if isinstance(x, Tensor)]

        return hook

    def after(site: str, name: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            if isinstance(first := first_output(output), Tensor):
                inside[site][name] = first.clone()

        return hook

    handles = []
    for site in sites:
        handles.append(model.modules[site].register_forward_pre_hook(before(site), with_kwargs=True))
        for name, module in model.modules.items():
            if name.startswith(f"{site}.") and any(True for _ in module.parameters()):
                handles.append(module.register_forward_hook(after(site, name)))
    try:
        yield inputs, inside
    finally:
        for handle in handles:
            handle.remove()
