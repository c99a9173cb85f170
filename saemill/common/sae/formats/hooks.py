"""Sites in TransformerLens' terms: `layers.6` of GPT-NeoX is `blocks.6.hook_resid_post`.

Only where both names denote the same tensor, for a model loaded without processing (no folded norms, no
centred weights): Gemma 2, say, normalizes the MLP's output before it is added, and TransformerLens hooks
what is added. Models whose blocks end in a norm, such as BERT, have no residual stream to name.
"""

import re
from typing import Literal, NamedTuple

Kind = Literal["resid_post", "attn_out", "mlp_in", "mlp_out"]


class Hook(NamedTuple):
    """A place in TransformerLens' terms."""

    layer: int
    """Number of the block."""
    kind: Kind
    """Point in the block: after it, what its MLP takes, or the output that its attention or its MLP adds."""

    @property
    def name(self) -> str:
        """Name as TransformerLens writes it."""
        return f"blocks.{self.layer}.{self.in_block}"

    @property
    def in_block(self) -> str:
        """Name within the block."""
        return "mlp.hook_in" if self.kind == "mlp_in" else f"hook_{self.kind}"


class Block(NamedTuple):
    """Modules of one transformer block, by their path in the base model."""

    path: str
    """Path of the block, `{}` for its number."""
    attn_out: str
    """Path, below the block, of the module whose output is what attention adds to the residual stream."""
    mlp_out: str
    mlp_in: str | None
    """The same of the norm whose output the MLP takes; None where it takes the residual stream."""


_LLAMA = Block("layers.{}", "self_attn", "mlp", "post_attention_layernorm")
_SANDWICH = Block(
    "layers.{}", "post_attention_layernorm", "post_feedforward_layernorm", "pre_feedforward_layernorm"
)
_GPT2 = Block("h.{}", "attn", "mlp", "ln_2")
BLOCKS = {
    "gpt_neox": Block("layers.{}", "attention", "mlp", "post_attention_layernorm"),
    "gpt2": _GPT2,
    "gpt_neo": _GPT2,
    "gptj": _GPT2._replace(mlp_in="ln_1"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "phi3": _LLAMA,
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "olmo2": _SANDWICH._replace(mlp_in=None),
}
"""Blocks by transformers' `model_type`; each was checked against TransformerLens (test_hooks.py)."""


def hook_of(site: str, model_type: str) -> Hook | None:
    """Find the hook that sees a site's activations; None where there is none, or the model is not known."""
    return next((hook for place, hook in _places(model_type, site) if place == site), None)


def site_of(name: str, model_type: str) -> str | None:
    """Find the site of a hook that is written as TransformerLens writes it; None where it has none.

    What enters block n is what leaves block n - 1.
    """
    if match := re.fullmatch(r"blocks\.([1-9]\d*)\.hook_resid_pre", name):
        name = Hook(int(match[1]) - 1, "resid_post").name
    return next((place for place, hook in _places(model_type, name) if hook.name == name), None)


def layer_of(site: str) -> int | None:
    """Find the number of the block in a module path: the first number in it."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", site)
    return int(match[1]) if match else None


def _places(model_type: str, name: str) -> list[tuple[str, Hook]]:
    """List the sites of the block that a name is in, each with its hook."""
    block, layer = BLOCKS.get(model_type), layer_of(name)
    if block is None or layer is None:
        return []
    path = block.path.format(layer)
    places = [
        (path, Hook(layer, "resid_post")),
        (f"{path}.{block.attn_out}", Hook(layer, "attn_out")),
        (f"{path}.{block.mlp_out}", Hook(layer, "mlp_out")),
    ]
    return places + ([(f"{path}.{block.mlp_in}", Hook(layer, "mlp_in"))] if block.mlp_in else [])
