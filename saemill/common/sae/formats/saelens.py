"""SAELens' layout (6.54): `cfg.json`, `sae_weights.safetensors`.

    W_enc [D, F]   b_enc [F]   W_dec [F, D]   b_dec [D]   threshold [F] (jumprelu)
    b_gate, b_mag, r_mag [F] in place of b_enc (gated)   topk_threshold float64 [] (batchtopk in training)
    W_dec [F, E]   b_dec [E]   W_skip [E, D] (transcoders, which subtract no b_dec)

What its SAEs do beside the encoder of `Sae` is linear and is folded into the weights when read:
`rescale_acts_by_decoder_norm`, `apply_b_dec_to_input` false, and the factor that a checkpoint in
mid-training multiplies activations by (`expected_average_only_in`, in `activation_scaler.json`). A norm
computed from each activation is not, and is refused.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from saemill.common import durable
from saemill.common.errors import ConfigError
from saemill.common.sae.formats.checks import (
    check_shape,
    check_weights,
    count,
    counts,
    expect,
    flag,
    group,
    noted,
    one_of,
    provenance,
    read_config,
    read_tensors,
    text,
    traits,
)
from saemill.common.sae.formats.folding import gated, non_negative, unit_rows
from saemill.common.sae.formats.hooks import Hook
from saemill.common.sae.parts import Parts, SaeConfig, apart

WEIGHTS = "sae_weights.safetensors"
SCALER = "activation_scaler.json"
LARGEST = 1e30
"""Largest factor on activations that can be folded."""
MATRYOSHKA = "matryoshka_batchtopk"
NAMES = {
    "topk": "topk",
    "batchtopk": "batchtopk",
    MATRYOSHKA: "matryoshka",
    "jumprelu": "jumprelu",
    "standard": "relu",
    "gated": "gated",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
"""`SaeConfig.architecture` by SAELens' name."""
BIASES = dict.fromkeys(NAMES, ("b_enc",)) | {"gated": ("b_gate", "b_mag", "r_mag")}
"""Tensors [F] beside the weights, by architecture."""
TRANSCODERS = tuple(name for name in NAMES if name.endswith("transcoder"))
IN_TRAINING = ("batchtopk", MATRYOSHKA)
"""Architectures that a checkpoint alone has: a finished SAE is jumprelu."""
RESCALED = ("topk", *IN_TRAINING)
"""Architectures that have `rescale_acts_by_decoder_norm`."""
TRAITS = "saemill_traits"
"""Field of the metadata with what SAELens has no word for."""
VERSION = "6.54.12"
"""Version of SAELens whose layout is written. SAELens reads a config without a version as one of before
6.0."""


def read(folder: Path) -> Parts:
    """Read the SAE of a folder, on the CPU, in the dtype of its file.

    Raises:
        StoreError, ConfigError: as `formats.load`.
    """
    file = folder / "cfg.json"
    raw = read_config(file)
    cfg = _since_6(raw, file)
    kind = one_of(cfg, "architecture", BIASES, "standard", file)
    one_of(cfg, "reshape_activations", ("none", "hook_z"), "none", file)  # heads: the SAE sees them joined
    config = _config(cfg, raw, kind, file)
    weights = _weights(folder / WEIGHTS, kind, config)
    if kind in TRANSCODERS:
        return _transcoder(config, weights, cfg, file)
    scale = _input_scale(folder, cfg.get("normalize_activations") or "none")
    centred = flag(cfg, "apply_b_dec_to_input", True, file)
    rescaled = kind in RESCALED and flag(cfg, "rescale_acts_by_decoder_norm", False, file)
    W_enc, b_enc, W_dec, b_dec, threshold = _folded(weights, centred, rescaled, scale)
    return Parts(config, W_enc, b_enc, W_dec, b_dec, None if kind == "topk" else non_negative(threshold))


def _transcoder(config: SaeConfig, weights: dict[str, Tensor], cfg: dict[str, Any], file: Path) -> Parts:
    """Make a transcoder, which has nothing to be folded."""
    why = "a transcoder's input and output are in units of their own"
    expect(cfg, "normalize_activations", "none", "none", why, file)
    threshold = non_negative(weights.pop("threshold").expand(config.num_latents))
    own = {name: weight.contiguous() for name, weight in weights.items()}
    return Parts(config, **own, threshold=threshold)


def _config(cfg: dict[str, Any], raw: dict[str, Any], kind: str, file: Path) -> SaeConfig:
    """Read shape and origin of an SAE, and what it was trained as."""
    metadata = group(cfg, "metadata", file)
    known = {
        "hook_name": text(metadata, "hook_name", file),
        "hook_name_out": text(metadata, "hook_name_out", file),
        "model": text(metadata, "model_name", file),
        "dataset": text(metadata, "dataset_path", file),
        "ctx_len": count(metadata, "context_size", file) if metadata.get("context_size") else None,
    }
    noted_traits = group(metadata, TRAITS, file)
    return SaeConfig(
        d_in=count(cfg, "d_in", file),
        d_out=count(cfg, "d_out", file) if kind in TRANSCODERS else None,
        num_latents=count(cfg, "d_sae", file),
        k=count(cfg, "k", file) if kind == "topk" else None,
        provenance=provenance("saelens", raw, metadata.get("saemill"), file, **known),
        **(
            traits(noted_traits, NAMES[kind], file)
            if noted_traits
            else _trained_as(cfg, metadata, kind, file)
        ),
    )


def _trained_as(cfg: dict[str, Any], metadata: dict[str, Any], kind: str, file: Path) -> dict[str, Any]:
    """Read what an SAE was trained as; of a finished jumprelu one, its metadata tell.

    Returns: arguments of `SaeConfig`.
    """
    trained_as = text(metadata, "training_architecture", file) if kind == "jumprelu" else kind
    if trained_as not in IN_TRAINING:
        return {"architecture": NAMES[kind]}
    details = group(metadata, "training_architecture_details", file) | cfg
    prefixes = counts(details, "matryoshka_widths", file) if trained_as == MATRYOSHKA else ()
    return {"architecture": "matryoshka" if prefixes else "batchtopk", "prefixes": prefixes}


def _weights(file: Path, kind: str, config: SaeConfig) -> dict[str, Tensor]:
    """Read the tensors of an SAE; of a Gated one, its encoder with the gate folded into a threshold.

    Returns: W_enc [F, D], b_enc [F], W_dec [F, E], b_dec [E], W_skip [E, D] where it is, in the dtype of the
    file; threshold [F] or [].
    """
    d, f, e = config.d_in, config.num_latents, config.d_out or config.d_in
    found = read_tensors(file)
    shapes = {"W_enc": (d, f), "W_dec": (f, e), "b_dec": (e,)} | dict.fromkeys(BIASES[kind], (f,))
    shapes |= {"W_skip": (e, d)} if "skip" in kind else {}
    name, shape = "", tuple[int, ...]()
    if kind in IN_TRAINING:
        name = "topk_threshold"
    elif kind.startswith("jumprelu"):
        name, shape = "threshold", (f,)
    weights = check_weights(file, found, shapes, optional=(name,))
    weights["W_enc"] = weights["W_enc"].T
    threshold = check_shape(file, found, name, shape) if name else torch.zeros(f)
    if kind == "gated":
        gate = [weights.pop(bias) for bias in BIASES["gated"]]
        dtype = weights["W_enc"].dtype
        W_enc, b_enc, threshold = gated(weights["W_enc"].double(), *(bias.double() for bias in gate))
        weights |= {"W_enc": W_enc.to(dtype), "b_enc": b_enc.to(dtype)}
    return weights | {"threshold": threshold}


def _since_6(cfg: dict[str, Any], file: Path) -> dict[str, Any]:
    """Translate a config of an SAELens before 6.0 to today's terms."""
    if "metadata" in cfg:
        return cfg
    old = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
    cfg = {old.get(key, key): value for key, value in cfg.items()}
    if cfg.get("activation_fn") == "topk":
        k = group(cfg, "activation_fn_kwargs", file).get("k", cfg.get("k"))
        cfg |= {"architecture": "topk", "k": k}
    else:
        expect(cfg, "activation_fn", "relu", "relu", "SAELens itself reads it as a ReLU by now", file)
    normalized = cfg.get("normalize_activations")
    if isinstance(normalized, bool):
        cfg["normalize_activations"] = "expected_average_only_in" if normalized else "none"
    if "hook_z" in (text(cfg, "hook_name", file) or ""):
        cfg.setdefault("reshape_activations", "hook_z")
    return cfg | {"metadata": cfg}


def _input_scale(folder: Path, normalization: str) -> float:
    """Find the factor by which activations are multiplied before the SAE sees them."""
    if normalization == "none":
        return 1.0
    field = f"{folder / 'cfg.json'}: normalize_activations is {normalization!r:.80}"
    if normalization != "expected_average_only_in":
        raise ConfigError(
            f"{field}: each activation goes through a norm or a matrix that weights cannot hold; only 'none' "
            "can be represented, and 'expected_average_only_in' with its factor"
        )
    scale = read_config(folder / SCALER).get("scaling_factor") if (folder / SCALER).is_file() else None
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 < scale < LARGEST:
        raise ConfigError(
            f"{field}, but {SCALER} with its scaling_factor is not there; get it from the checkpoint, or "
            "fold the factor with SAELens: sae.fold_activation_norm_scaling_factor(…), then sae.save_model(…)"
        )
    return float(scale)


def _folded(weights: dict[str, Tensor], centred: bool, rescaled: bool, scale: float) -> tuple[Tensor, ...]:
    """Fold SAELens' other linear steps into the weights.

    Returns: W_enc [F, D], b_enc [F], W_dec [F, D], b_dec [D], threshold [F] of the `Sae` that computes the
    same.
    """
    dtype = weights["W_enc"].dtype
    W_enc, b_enc = weights["W_enc"].double() * scale, weights["b_enc"].double()
    W_dec, b_dec = weights["W_dec"].double() / scale, weights["b_dec"].double() / scale
    threshold = weights["threshold"].double().expand(len(b_enc))
    if not centred:
        b_enc = b_enc + W_enc @ b_dec
    if rescaled:
        W_enc, b_enc, W_dec = unit_rows(W_enc, b_enc, W_dec)
        threshold = threshold / scale  # which was of activations with the length of rows before the factor
    return (*(w.to(dtype).contiguous() for w in (W_enc, b_enc, W_dec, b_dec)), threshold)


def write(parts: Parts, folder: Path, hook: Hook | None, target: Hook | None = None) -> None:
    """Write `cfg.json` and `sae_weights.safetensors` as SAELens saves an SAE for inference: one with
    thresholds as JumpReLU, or as standard where it was trained with a ReLU.

    Raises:
        ConfigError: it is a transcoder with k.
    """
    config, kind = parts.config, _kind(parts)
    weights = {**parts.weights, "W_enc": parts.W_enc.T}
    if not kind.startswith("jumprelu"):
        weights.pop("threshold", None)
    folder.mkdir(parents=True, exist_ok=True)
    with durable.replacing(folder / WEIGHTS, sum(w.nbytes for w in weights.values())) as partial:
        save_file(apart(weights), partial)
    cfg = {
        "architecture": kind,
        "d_in": config.d_in,
        **({} if config.d_out is None else {"d_out": config.d_out}),
        "d_sae": config.num_latents,
        **({"k": config.k} if kind == "topk" else {}),
        "dtype": str(parts.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": config.d_out is None,
        **({"rescale_acts_by_decoder_norm": False} if kind == "topk" else {}),
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if hook and hook.kind == "z" else "none",
        "metadata": _metadata(config, kind, hook, target),
    }
    durable.write_json(folder / "cfg.json", cfg)


def _kind(parts: Parts) -> str:
    """Choose SAELens' architecture."""
    is_relu = parts.config.architecture == "relu"
    if parts.config.d_out is None:
        return "topk" if parts.threshold is None else "standard" if is_relu else "jumprelu"
    if parts.threshold is None:
        raise ConfigError(
            "SAELens has transcoders with thresholds, and none with k; export it as sparsify, or train one "
            "of batchtopk, jumprelu, relu or gated"
        )
    skip = "" if parts.W_skip is None else "skip_"
    return f"{'' if is_relu else 'jumprelu_'}{skip}transcoder"


def _metadata(config: SaeConfig, kind: str, hook: Hook | None, target: Hook | None) -> dict[str, Any]:
    """Describe an SAE's origin in SAELens' terms, as far as it is known."""
    origin = config.provenance
    metadata = {
        "sae_lens_version": VERSION,
        "model_name": origin.get("model"),
        "model_class_name": "HookedTransformer" if hook or target else None,
        "hook_name": hook.name if hook else None,
        "hook_name_out": target.name if target else None,
        "hook_head_index": None,
        "dataset_path": origin.get("dataset"),
        "context_size": origin.get("ctx_len"),
        "prepend_bos": origin.get("prepend_bos"),
        TRAITS: noted(config, NAMES[kind]) or None,
        "saemill": origin,
    }
    return {key: value for key, value in metadata.items() if value is not None}
