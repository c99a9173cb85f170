"""What is at a site: found by arithmetic, and the same as transformers' code says."""

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch import Tensor

from saemill.cache import names
from saemill.common.models.architecture import Architecture
from saemill.common.models.site_roles import roles_of
from saemill.common.models.sites import load_model_config
from saemill.common.models.structure import base_of

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(4, 60, (2, 24), generator=torch.Generator().manual_seed(0))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def by_name(folder: Path, family: str) -> tuple[str, dict[str, Any]]:
    """A block in the middle, and what is found at its sites and those of its neighbours."""
    architecture, model = Architecture(load_model_config(str(folder), None)), families.load(folder)
    assert architecture.blocks[1] == f"{families.BLOCKS[family]}.1"
    return architecture.blocks[1], roles_of(model, architecture.widths, IDS)


@pytest.mark.parametrize("family", [*sorted(families.ADDED), *sorted(families.ADDED_BEFORE_NORM)])
def test_what_is_added_is_found(family: str, made: Any) -> None:
    """Oracle: transformers' own block: what leaves it is what enters it and the outputs of these modules,
    times the config's factor; where sums are normed, what enters its last norm."""
    folder, whole = made(family)
    block, found = by_name(folder, family)
    factor, names = families.FACTOR.get(family, 1), (families.ADDED | families.ADDED_BEFORE_NORM)[family]
    own: dict[str, Tensor] = {}
    modules = dict(base_of(whole).get_submodule(block).named_modules())
    for name, module in modules.items():
        module.register_forward_pre_hook(
            lambda _m, given, named, name=name: own.update(
                {f"{name}:in": (given[0] if given else named.get("hidden_states"))}
            ),
            with_kwargs=True,
        )
        module.register_forward_hook(
            lambda _m, _g, out, name=name: own.update({name: (out[0] if type(out) is tuple else out).clone()})
        )
    with torch.no_grad():
        whole(input_ids=IDS)
    for module in modules.values():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    outputs = [own[name].view_as(own[""]) for name in names]
    if family in families.ADDED:
        close(own[":in"] + factor * sum(outputs, torch.zeros_like(own[""])), own[""])
    else:
        norms = [name for name, module in modules.items() if isinstance(module, torch.nn.LayerNorm)]
        close(own[":in"] + outputs[0], own[f"{norms[0]}:in"])
        close(own[norms[0]] + outputs[1], own[f"{norms[1]}:in"])
        assert torch.equal(own[norms[1]], own[""])
    for name in names:
        if (role := found.get(f"{block}.{name}")) is not None or own[name].dim() == 3:
            assert role is not None
            assert role.kind == "added"
            assert role.factor == pytest.approx(factor, rel=1e-3)


@pytest.mark.parametrize("family", [*families.CAUSAL, *families.MASKED])
def test_only_what_is_not_added_as_it_is_is_warned_of(family: str, made: Any) -> None:
    """Oracle: transformers' code, read: what adds the residual stream within itself, what norms follow."""
    folder, _ = made(family)
    block, found = by_name(folder, family)
    outputs = {site: role for site, role in found.items() if not site.endswith(":in")}
    told = names.warnings(families.load(folder), outputs, IDS)
    expected = families.HOLDING.get(family, {})
    holding = [line for line in told if "whole residual stream" in line]
    for name, part in expected.items():
        (line,) = [line for line in holding if line.startswith(f"{block}.{name} ")]
        assert line.endswith(f"at {block}.{part}")
        assert f"{block}.{part}" in outputs
        assert outputs[f"{block}.{part}"].kind == "added"
    assert len(holding) == families.N_LAYERS * len(expected)
    for name, norm in families.NORMED.get(family, {}).items():
        (line,) = [line for line in told if line.startswith(f"{block}.{name} is normed")]
        assert line.endswith(f"at {block}.{norm}")
    assert any(" is normed" in line for line in told) == (family in families.NORMED)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "t5",
            {
                "layer.0": "holds_residual",
                "layer.0.SelfAttention": "added",
                "layer.1.DenseReluDense": "added",
            },
        ),
        ("bart", {"self_attn": "added", "fc2": "added", "self_attn_layer_norm": "residual"}),
    ],
)
def test_what_an_encoder_adds_is_found(family: str, expected: dict[str, str], made: Any) -> None:
    """Oracle: transformers' code, read: T5's layers add what goes into them, BART norms each sum."""
    folder, _ = made(family)
    block = f"{families.BLOCKS[family]}.1"
    found = roles_of(families.load(folder), [f"{block}.{name}" for name in expected], IDS)
    assert {site.removeprefix(f"{block}."): role and role.kind for site, role in found.items()} == expected


def test_a_part_of_the_feed_forward_is_found(made: Any) -> None:
    """Oracle: DeepSeek's MLP is the sum of its shared experts and the routed ones; the first has none."""
    folder, _ = made("deepseek_v3")
    _, found = by_name(folder, "deepseek_v3")
    role = found["layers.1.mlp.shared_experts"]
    assert (role.kind, role.module, role.beside) == ("part", "layers.1.mlp", ("layers.1.mlp.experts",))
    assert found["layers.0.mlp.up_proj"].described == "within layers.0.mlp"


@pytest.mark.parametrize("family", ["granite", "gemma2", "bloom", "falcon", "bert"])
def test_roles_are_found_in_bf16_too(family: str, made: Any) -> None:
    """Oracle: those found in fp32; a factor within bf16's rounding."""
    folder, _ = made(family)
    _, exact = by_name(folder, family)
    rounded = families.load(folder, dtype=torch.bfloat16)
    for site, role in roles_of(rounded, exact, IDS).items():
        known = exact[site]
        assert (role and (role.kind, role.module)) == (known and (known.kind, known.module)), site
        assert role is None or role.factor == known.factor or 0.2 < role.factor < 0.24


def test_sites_with_the_same_activations_are_told_of(made: Any) -> None:
    """Oracle: BLOOM's MLP returns what its block returns; GPT-2's does not."""
    for family, same in (("bloom", True), ("gpt2", False)):
        model = families.load(made(family)[0])
        told = names.warnings(model, roles_of(model, ["h.1", "h.1.mlp", "h.2:in"], IDS), IDS)
        assert ("h.1 and h.1.mlp give the same activations: one of them is enough" in told) == same
        assert "h.1 and h.2:in give the same activations: one of them is enough" in told
