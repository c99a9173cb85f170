"""What the SAEs of a run are, in the words of its card, by the `cfg.json` of each."""

from collections.abc import Mapping
from typing import Any

from saemill.common.log import counted

Cfg = Mapping[str, Any]
"""Content of a `cfg.json`."""
ADJECTIVES = {
    "topk": "TopK ",
    "abs-topk": "AbsTopK ",
    "batchtopk": "BatchTopK ",
    "matryoshka": "Matryoshka ",
    "groupmax": "GroupMax ",
    "jumprelu": "JumpReLU ",
    "relu": "ReLU ",
    "gated": "Gated ",
}
TAKES = {
    "sparse autoencoder": "the SAEs take it as the model produces it",
    "transcoder": "a transcoder takes the first as the model produces it, and predicts the second",
    "cross-layer transcoder": "a cross-layer transcoder takes those of all layers that it reads side by "
    "side, as the model produces them, and predicts those of the second side by side",
}
FORMULAS = {
    "abs-topk": "f = z where |z| is among the k largest, with z = {z}",
    "groupmax": "f = ReLU(z) where it is the largest of its group of F/k, with z = {z}",
    "topk": "f = ReLU(TopK({z}))",
    "threshold": "f = z · 1[z > θ] with z = {z} and a threshold θ per latent",
}
"""Choice of the active latents, by kind."""
WHERE = {
    "abs-topk": "{} of AbsTopK",
    "groupmax": "{} of GroupMax",
    "topk": "{} where there is a k",
    "threshold": "else {}",
}
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


def is_transcoder(cfg: Cfg) -> bool:
    """Tell whether it predicts another site than it reads."""
    return bool(cfg["transcode"])


def is_cross_layer(cfg: Cfg) -> bool:
    """Tell whether it predicts the sites of several layers."""
    return bool(cfg.get("predicted"))


def _counts(saes: Mapping[str, Cfg]) -> dict[str, int]:
    """Count the SAEs and the transcoders, each if there is one."""
    n_transcoders, n_across = sum(map(is_transcoder, saes.values())), sum(map(is_cross_layer, saes.values()))
    counts = {
        "sparse autoencoder": len(saes) - n_transcoders,
        "transcoder": n_transcoders - n_across,
        "cross-layer transcoder": n_across,
    }
    return {noun: n for noun, n in counts.items() if n}


def title(saes: Mapping[str, Cfg]) -> str:
    """Name what the SAEs are."""
    return " and ".join(f"{noun}s" for noun in _counts(saes)).capitalize()


def number(saes: Mapping[str, Cfg]) -> str:
    """Write how many they are, and what."""
    return " and ".join(counted(n, f"{adjective(saes)}{noun}") for noun, n in _counts(saes).items())


def tags(saes: Mapping[str, Cfg]) -> list[str]:
    """List the hub's tags that say what the SAEs are."""
    return [*(["transcoder"] if any(map(is_transcoder, saes.values())) else []), *architectures(saes)]


def takes(saes: Mapping[str, Cfg]) -> str:
    """Say what the SAEs do with the activations of their sites."""
    return "; ".join(TAKES[noun] for noun in _counts(saes))


def formula(saes: Mapping[str, Cfg]) -> str:
    """Write how the SAEs choose their active latents, and what they make of them."""
    transcoders = {name: cfg for name, cfg in saes.items() if is_transcoder(cfg)}
    if 0 < len(transcoders) < len(saes):
        others = {name: cfg for name, cfg in saes.items() if name not in transcoders}
        return f"an SAE {formula(others)}; a transcoder {formula(transcoders)}"
    z = "W_enc x + b_enc" if transcoders else "W_enc (x − b_dec) + b_enc"
    used = {_kind(cfg) for cfg in saes.values()}
    of_kind = {kind: words.format(z=z) for kind, words in FORMULAS.items() if kind in used}
    codes = ", ".join(
        words if len(used) == 1 else WHERE[kind].format(words) for kind, words in of_kind.items()
    )
    skips = {cfg["skip_connection"] for cfg in saes.values()}
    skip = (
        " + W_skip x" if skips == {True} else " + W_skip x where there is a W_skip" if True in skips else ""
    )
    across = ", each layer's z of its own x and each ŷ of the f of its layer and those before it"
    across = across if any(map(is_cross_layer, saes.values())) else ""
    return f"{codes}, {'ŷ' if transcoders else 'x̂'} = W_decᵀ f + b_dec{skip}{across}"


def tools(cfg: Cfg) -> list[str]:
    """List the other tools that have an SAE of this kind; none has a crosscoder."""
    if cfg.get("joined"):
        return []
    of_one_width = cfg.get("d_out", cfg["d_in"]) == cfg["d_in"]
    has = {
        "sparsify": has_k(cfg) and of_one_width and _kind(cfg) != "abs-topk",
        "saelens": not (is_transcoder(cfg) and has_k(cfg)) and _kind(cfg) != "groupmax",
        "dictionary_learning": not is_transcoder(cfg) and _kind(cfg) not in ("groupmax", "abs-topk"),
    }
    return [tool for tool, does in has.items() if does]


def _kind(cfg: Cfg) -> str:
    """Return the kind of an SAE, of `FORMULAS`."""
    if not has_k(cfg):
        return "threshold"
    return architecture(cfg) if architecture(cfg) in ("groupmax", "abs-topk") else "topk"
