"""What the SAEs of a run are, in the words of its card, by the `cfg.json` of each."""

from collections.abc import Mapping
from typing import Any

Cfg = Mapping[str, Any]
"""Content of a `cfg.json`."""
ADJECTIVES = {
    "topk": "TopK ",
    "batchtopk": "BatchTopK ",
    "matryoshka": "Matryoshka ",
    "jumprelu": "JumpReLU ",
    "relu": "ReLU ",
    "gated": "Gated ",
}
FORMULAS = {
    True: "f = ReLU(TopK(W_enc (x − b_dec) + b_enc))",
    False: "f = z · 1[z > θ] with z = W_enc (x − b_dec) + b_enc and a threshold θ per latent",
}
"""Choice of the active latents, by whether an SAE has a k."""


def architecture(cfg: Cfg) -> str:
    """Return what an SAE was trained as; where that is the name of its activation, it has no other."""
    return str(cfg.get("architecture", cfg["activation"]))


def architectures(saes: Mapping[str, Cfg]) -> list[str]:
    """List what the SAEs were trained as, each once."""
    return list(dict.fromkeys(architecture(cfg) for cfg in saes.values()))


def adjective(saes: Mapping[str, Cfg]) -> str:
    """Write what all of the SAEs are; empty where they are several things."""
    several = architectures(saes)
    return ADJECTIVES[several[0]] if len(several) == 1 else ""


def has_k(cfg: Cfg) -> bool:
    """Tell whether an SAE has a k; else its latents have thresholds."""
    return "k" in cfg


def formula(saes: Mapping[str, Cfg]) -> str:
    """Write how the SAEs choose their active latents."""
    used = {has_k(cfg) for cfg in saes.values()}
    if len(used) == 1:
        return FORMULAS[used.pop()]
    return f"{FORMULAS[True]} where there is a k, else {FORMULAS[False]}"
