"""Inputs of tiny models, an SAE for them, and splicing by a hook of one's own."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saemill import Sae, SaeConfig

KINDS = ("neox", "llama", "gpt2", "bert")
CAUSAL = ("neox", "llama", "gpt2")
BLOCKS = {"neox": "layers", "llama": "layers", "gpt2": "h", "bert": "encoder.layer"}
PARTS = {"neox": "layers.1.mlp", "llama": "layers.1.mlp", "gpt2": "h.1.attn", "bert": "embeddings"}
NORMS = {"neox": "final_layer_norm", "llama": "norm", "gpt2": "ln_f"}
D, F, K = 32, 96, 6
IDS = torch.randint(1, 8192, (3, 17), generator=torch.Generator().manual_seed(0))
RIGHT = (torch.arange(17) < torch.tensor([[17], [11], [5]])).long()
LEFT = RIGHT.flip(1)
LEFT_OUT = {"first_positions": 1, "token_ids": [0, int(IDS[0, 4])]}


def seeded_sae(seed: int = 0, d: int = D, **provenance: Any) -> Sae:
    """Make an SAE of random weights, another for each seed."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.nn.functional.normalize(torch.randn(F, d, generator=generator), dim=1)
    config = SaeConfig(d_in=d, num_latents=F, k=K, provenance=provenance)
    b_enc, b_dec = (torch.randn(n, generator=generator) * 0.1 for n in (F, d))
    return Sae(config, w.clone(), b_enc, w, b_dec)


def signed_sae() -> Sae:
    """Make the same SAE as one that takes the latents furthest from 0, with their signs."""
    parts = seeded_sae().parts
    return Sae.of(replace(parts, config=replace(parts.config, architecture="abs-topk")))


def dense(sae: Sae, x: Tensor) -> Tensor:
    """Oracle: relu(TopK(W (x − b_dec) + b)), the k largest by absolute value, or what is above the
    thresholds, in full. [..., F]."""
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    if sae.threshold is not None:
        return pre * (pre > sae.threshold)
    if sae.config.architecture == "abs-topk":
        return pre * torch.zeros_like(pre).scatter(-1, pre.abs().topk(K).indices, 1.0)
    return torch.relu(pre * torch.zeros_like(pre).scatter(-1, pre.topk(K).indices, 1.0))


def by_hand(model: Any, site: str, change: Callable[[Tensor], Tensor], run: Callable[[], Any]) -> Any:
    """Oracle: a forward hook of torch that replaces the module's output."""

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = model.base_model.get_submodule(site).register_forward_hook(hook)
    try:
        return run()
    finally:
        handle.remove()


def at(model: Any, site: str, run: Callable[[], Any]) -> Tensor:
    """The activation at a site, as later modules see it. [B, S, D]."""
    found = []
    by_hand(model, site, lambda x: found.append(x.clone()) or x, run)
    return found[0]


def n_hooks(model: Any) -> int:
    """How many there are; transformers may have left its own."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
