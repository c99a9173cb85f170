"""What the SAEs of a run are, in the words of its card, by the `cfg.json` of each."""

from collections.abc import Mapping
from typing import Any

Cfg = Mapping[str, Any]
"""Content of a `cfg.json`."""
ADJECTIVES = {
    "topk": "TopK ",
    "batchtopk": "BatchTopK ",
    "matryoshka": "Matryoshka ",
    "groupmax": "GroupMax ",
    "jumprelu": "JumpReLU ",
    "relu": "ReLU ",
    "gated": "Gated ",
}
FORMULAS = {
    "groupmax": "f = ReLU(z) where it is the largest of its group of F/k, with z = W_enc (x − b_dec) + b_enc",
    "topk": "f = ReLU(TopK(W_enc (x − b_dec) + b_enc))",
    "threshold": "f = z · 1[z > θ] with z = W_enc (x − b_dec) + b_enc and a threshold θ per latent",
}
"""Choice of the active latents, by kind."""
WHERE = {"groupmax": "{} of GroupMax", "topk": "{} where there is a k", "threshold": "else {}"}
"""The same of SAEs beside those of another kind."""


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
    used = {_kind(cfg) for cfg in saes.values()}
    if len(used) == 1:
        return FORMULAS[used.pop()]
    return ", ".join(WHERE[kind].format(FORMULAS[kind]) for kind in FORMULAS if kind in used)


def _kind(cfg: Cfg) -> str:
    """Return the kind of an SAE, of `FORMULAS`."""
    if not has_k(cfg):
        return "threshold"
    return "groupmax" if architecture(cfg) == "groupmax" else "topk"
