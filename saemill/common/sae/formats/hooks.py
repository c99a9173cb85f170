"""Sites in TransformerLens' terms: `layers.6` of GPT-NeoX is `blocks.6.hook_resid_post`.

Only where both names denote the same tensor, for a model loaded without processing (no folded norms, no
centred weights): Gemma 2, say, normalizes the MLP's output before it is added, and TransformerLens hooks
what is added. Models whose blocks end in a norm, such as BERT, have no residual stream to name.
"""

import re
from typing import Literal, NamedTuple

from saemill.common.stores.site_names import INPUT
from saemill.common.stores.site_roles import Role

Kind = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_in", "mlp_out", "z", "post"]
IN_BLOCK: dict[Kind, str] = {"mlp_in": "mlp.hook_in", "z": "attn.hook_z", "post": "mlp.hook_post"}
"""Names within the block; others are `hook_` and the kind."""


class Hook(NamedTuple):
    """A place in TransformerLens' terms."""

    layer: int
    """Number of the block."""
    kind: Kind
    """Point in the block: the residual stream before, within or after it; what its MLP takes; the output that
    its attention or its MLP adds; the heads before they are projected; the MLP's neurons."""

    @property
    def name(self) -> str:
        """Name as TransformerLens writes it."""
        return f"blocks.{self.layer}.{self.in_block}"

    @property
    def in_block(self) -> str:
        """Name within the block."""
        return IN_BLOCK.get(self.kind, f"hook_{self.kind}")


class Block(NamedTuple):
    """Modules of one transformer block, by their path in the base model."""

    path: str
    """Path of the block, `{}` for its number."""
    attn_out: str
    """Path, below the block, of the module whose output is what attention adds to the residual stream."""
    mlp_out: str
    mlp_in: str
    """The same of the norm whose output the MLP takes; `mlp:in` where it takes the residual stream."""
    heads: str
    """The same of the module that projects the heads' outputs, which it takes side by side."""
    neurons: str
    """The same of the module that projects the MLP's neurons."""
    resid_mid: str | None
    """The same of the module that takes the residual stream between attention and MLP; None where the two
    stand side by side, or may."""


_LLAMA = Block(
    "layers.{}",
    attn_out="self_attn",
    mlp_out="mlp",
    mlp_in="post_attention_layernorm",
    heads="self_attn.o_proj",
    neurons="mlp.down_proj",
    resid_mid="post_attention_layernorm",
)
_SANDWICH = _LLAMA._replace(
    attn_out="post_attention_layernorm",
    mlp_out="post_feedforward_layernorm",
    mlp_in="pre_feedforward_layernorm",
    resid_mid="pre_feedforward_layernorm",
)
_GPT2 = Block("h.{}", "attn", "mlp", "ln_2", heads="attn.c_proj", neurons="mlp.c_proj", resid_mid="ln_2")
BLOCKS = {
    "gpt_neox": Block(
        "layers.{}",
        attn_out="attention",
        mlp_out="mlp",
        mlp_in="post_attention_layernorm",
        heads="attention.dense",
        neurons="mlp.dense_4h_to_h",
        resid_mid=None,
    ),
    "gpt2": _GPT2,
    "gpt_neo": _GPT2._replace(heads="attn.attention.out_proj"),
    "gptj": _GPT2._replace(mlp_in="ln_1", heads="attn.out_proj", neurons="mlp.fc_out", resid_mid=None),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "phi3": _LLAMA,
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "olmo2": _SANDWICH._replace(mlp_in="mlp:in", resid_mid="mlp"),
}
"""Blocks by transformers' `model_type`; each was checked against TransformerLens (test_hooks.py)."""


def hook_of(site: str, model_type: str) -> Hook | None:
    """Find the hook that sees a site's activations; None where there is none, or the model is not known."""
    return next((hook for place, hook in _places(model_type, site) if place == site), None)


def denotes(hook: Hook, role: Role | None) -> bool:
    """Tell whether a hook's name may be given to a site's activations, by what was found there: what
    TransformerLens calls an output is what is added to the residual stream.

    Args:
        hook: of the site, by its name.
        role: what is there; None where it is not known.
    """
    adds = hook.kind in ("attn_out", "mlp_out")
    return role is None or not adds or (role.kind == "added" and role.factor == 1)


def site_of(name: str, model_type: str) -> str | None:
    """Find the site of a hook that is written as TransformerLens writes it; None where it has none.

    What enters block n is what leaves block n - 1. What the MLP returns, whether or not a norm follows before
    it is added, is the module's.
    """
    block = BLOCKS.get(model_type)
    if block and (match := re.fullmatch(r"blocks\.(\d+)\.mlp\.hook_out", name)):
        return f"{block.path.format(match[1])}.mlp"
    if match := re.fullmatch(r"blocks\.([1-9]\d*)\.hook_resid_pre", name):
        name = Hook(int(match[1]) - 1, "resid_post").name
    return next((place for place, hook in _places(model_type, name) if hook.name == name), None)


def layer_of(site: str) -> int | None:
    """Find the number of the block in a module path: the first number in it."""
    match = re.search(r"(?:^|\.)(\d+)(?:[.:]|$)", site)
    return int(match[1]) if match else None


def _places(model_type: str, name: str) -> list[tuple[str, Hook]]:
    """List the sites of the block that a name is in, each with its hook; where several see the same, first
    the one that a hook is read as."""
    block, layer = BLOCKS.get(model_type), layer_of(name)
    if block is None or layer is None:
        return []
    path = block.path.format(layer)
    within: list[tuple[str | None, Kind]] = [
        (block.attn_out, "attn_out"),
        (block.mlp_out, "mlp_out"),
        (block.mlp_in, "mlp_in"),
        (block.heads + INPUT, "z"),
        (block.neurons + INPUT, "post"),
        (block.resid_mid and block.resid_mid + INPUT, "resid_mid"),
        ("mlp" + INPUT, "mlp_in"),
    ]
    places: list[tuple[str, Hook]] = [
        (path, Hook(layer, "resid_post")),
        (path + INPUT, Hook(layer, "resid_pre")),
    ]
    return places + [(f"{path}.{place}", Hook(layer, kind)) for place, kind in within if place]
