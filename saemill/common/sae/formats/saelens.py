"""SAELens' layout (6.54): `cfg.json`, `sae_weights.safetensors`.

    W_enc [D, F]   b_enc [F]   W_dec [F, D]   b_dec [D]   threshold [F] (jumprelu)
    b_gate, b_mag, r_mag [F] in place of b_enc (gated)   topk_threshold float64 [] (batchtopk in training)
    W_dec [F, E]   b_dec [E]   W_skip [E, D] (transcoders, which subtract no b_dec)

What its SAEs do beside the encoder of `Sae` is linear and is folded into the weights when read:
`rescale_acts_by_decoder_norm`, `apply_b_dec_to_input` false, and what is done to all activations alike
(`saelens_inputs`). A norm computed from each activation is not, and is a field of the SAE.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from saemill.common import durable
from saemill.common.errors import ConfigError
from saemill.common.sae.formats import saelens_inputs
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
    text,
    traits,
)
from saemill.common.sae.formats.folding import Tensors, centred, gated, non_negative
from saemill.common.sae.formats.hooks import Hook
from saemill.common.sae.formats.tensor_files import read_tensors, without_ones
from saemill.common.sae.norms import NORMS
from saemill.common.sae.parts import Parts, SaeConfig, apart

NAME = "saelens"
WEIGHTS = "sae_weights.safetensors"
NORMALIZATIONS = (saelens_inputs.NONE, saelens_inputs.AVERAGE, saelens_inputs.WHITENED, *NORMS)
"""What may be done to activations."""
BESIDE = ("cfg.json", saelens_inputs.SCALER, saelens_inputs.WHITENING)
"""Files that may be there beside the weights."""
MATRYOSHKA = "matryoshka_batchtopk"
NAMES = {
    "topk": "topk",
    "abstopk": "abs-topk",
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
WITH_K = ("topk", "abstopk")
RESCALED = (*WITH_K, *IN_TRAINING)
"""Architectures that have `rescale_acts_by_decoder_norm`."""
TRAITS = "saemill_traits"
"""Field of the metadata with what SAELens has no word for."""
VERSION = "6.54.12"
"""Version of SAELens whose layout is written. SAELens reads a config without a version as one of before
6.0."""


def holds(place: Path) -> bool:
    """Tell whether a folder is of this format, by the names of its files."""
    is_another = (place / "config.json").is_file() and not (place / "cfg.json").is_file()
    return (place / WEIGHTS).is_file() and not is_another


def read(folder: Path) -> Parts:
    """Read the SAE of a folder, on the CPU, in the dtype of its file; float32 at least where something is
    folded.

    Raises:
        StoreError, ConfigError: as `formats.load`.
    """
    file = folder / "cfg.json"
    raw = read_config(file)
    cfg = _since_6(raw, file)
    kind = one_of(cfg, "architecture", BIASES, "standard", file)
    cfg["normalize_activations"] = cfg.get("normalize_activations") or saelens_inputs.NONE  # null in some
    one_of(cfg, "normalize_activations", NORMALIZATIONS, saelens_inputs.NONE, file)
    one_of(cfg, "reshape_activations", ("none", "hook_z"), "none", file)  # heads: the SAE sees them joined
    if kind in TRANSCODERS:
        why = "a transcoder's input and output are in units of their own"
        expect(cfg, "normalize_activations", saelens_inputs.NONE, saelens_inputs.NONE, why, file)
    config = _config(cfg, raw, kind, file)
    tensors = _weights(folder / WEIGHTS, kind, config)
    if kind in TRANSCODERS:
        return Parts(config, *tensors)
    if not flag(cfg, "apply_b_dec_to_input", True, file):
        tensors = centred(tensors)
    is_rescaled = kind in RESCALED and flag(cfg, "rescale_acts_by_decoder_norm", False, file)
    return Parts(config, *saelens_inputs.fold(tensors, folder, cfg["normalize_activations"], is_rescaled))


def _config(cfg: dict[str, Any], raw: dict[str, Any], kind: str, file: Path) -> SaeConfig:
    """Read shape and origin of an SAE, and what it was trained as."""
    metadata = group(cfg, "metadata", file)
    known = {
        "hook_name": _hook_name(metadata, file),
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
        k=count(cfg, "k", file) if kind in WITH_K else None,
        norm=cfg["normalize_activations"] if cfg["normalize_activations"] in NORMS else None,
        provenance=provenance("saelens", raw, metadata.get("saemill"), file, **known),
        **(
            traits(noted_traits, NAMES[kind], file)
            if noted_traits
            else _trained_as(cfg, metadata, kind, file)
        ),
    )


def _hook_name(metadata: dict[str, Any], file: Path) -> str | None:
    """Read the hook, with the number of the head where it is one of several, which no site is."""
    name, head = text(metadata, "hook_name", file), metadata.get("hook_head_index")
    return f"{name}[{head}]" if name and head is not None else name


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


def _weights(file: Path, kind: str, config: SaeConfig) -> Tensors:
    """Read the tensors of an SAE, of a Gated one with the gate folded into a threshold, in the dtype of the
    file."""
    d, f, e = config.d_in, config.num_latents, config.d_out or config.d_in
    found = without_ones(file, read_tensors(file))
    if kind == "jumprelu" and "log_threshold" in found:  # of a checkpoint of before 6.5
        found["threshold"] = found.pop("log_threshold").exp()
    shapes = {"W_enc": (d, f), "W_dec": (f, e), "b_dec": (e,)} | dict.fromkeys(BIASES[kind], (f,))
    shapes |= {"W_skip": (e, d)} if "skip" in kind else {}
    name, shape = "", tuple[int, ...]()
    if kind in IN_TRAINING:
        name = "topk_threshold"
    elif kind.startswith("jumprelu"):
        name, shape = "threshold", (f,)
    weights = check_weights(file, found, shapes, optional=(name,))
    W_enc, biases = weights["W_enc"].T.contiguous(), [weights[bias] for bias in BIASES[kind]]
    threshold = check_shape(file, found, name, shape) if name else torch.zeros(f)
    if kind == "gated":
        dtype = W_enc.dtype
        W_enc, b_mag, threshold = gated(W_enc.double(), *(bias.double() for bias in biases))
        W_enc, biases = W_enc.to(dtype), [b_mag.to(dtype)]
    thresholds = None if kind in WITH_K else non_negative(threshold.expand(f))
    skip = weights.get("W_skip")
    return Tensors(W_enc, biases[0], weights["W_dec"], weights["b_dec"], thresholds, skip)


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
        cfg["normalize_activations"] = saelens_inputs.AVERAGE if normalized else saelens_inputs.NONE
    if "hook_z" in (text(cfg, "hook_name", file) or ""):
        cfg.setdefault("reshape_activations", "hook_z")
    return cfg | {"metadata": cfg}


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
        **({"k": config.k} if kind in WITH_K else {}),
        "dtype": str(parts.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": config.d_out is None,
        **({"rescale_acts_by_decoder_norm": False} if kind in WITH_K else {}),
        "normalize_activations": config.norm or saelens_inputs.NONE,
        "reshape_activations": "hook_z" if hook and hook.kind == "z" else "none",
        "metadata": _metadata(config, kind, hook, target),
    }
    durable.write_json(folder / "cfg.json", cfg)


def _kind(parts: Parts) -> str:
    """Choose SAELens' architecture."""
    is_relu = parts.config.architecture == "relu"
    if parts.config.d_out is None:
        by_k = "abstopk" if parts.config.is_signed else "topk"
        return by_k if parts.threshold is None else "standard" if is_relu else "jumprelu"
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
