"""SAELens' layout (6.54): `cfg.json`, `sae_weights.safetensors`.

    W_enc [D, F]   b_enc [F]   W_dec [F, D]   b_dec [D]

What its TopK SAE does beside the encoder of `Sae` is linear and is folded into the weights when read:
`rescale_acts_by_decoder_norm`, `apply_b_dec_to_input` false, and the factor that a checkpoint in
mid-training multiplies activations by (`expected_average_only_in`, in `activation_scaler.json`). A norm
computed from each activation is not, and is refused.
"""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from saemill.common import durable
from saemill.common.errors import ConfigError
from saemill.common.sae.formats.checks import (
    check_weights,
    count,
    expect,
    flag,
    group,
    provenance,
    read_config,
    read_tensors,
    text,
)
from saemill.common.sae.formats.hooks import Hook
from saemill.common.sae.parts import Parts, SaeConfig, apart

WEIGHTS = "sae_weights.safetensors"
SCALER = "activation_scaler.json"
LARGEST = 1e30
"""Largest factor on activations that can be folded."""
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
    expect(cfg, "architecture", "topk", "standard", "only TopK SAEs can be represented", file)
    expect(
        cfg, "reshape_activations", "none", "none", "it takes attention heads, not one vector per token", file
    )
    scale = _input_scale(folder, cfg.get("normalize_activations") or "none")
    centred = flag(cfg, "apply_b_dec_to_input", True, file)
    rescaled = flag(cfg, "rescale_acts_by_decoder_norm", False, file)
    d_in, d_sae = count(cfg, "d_in", file), count(cfg, "d_sae", file)
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    weights = check_weights(folder / WEIGHTS, read_tensors(folder / WEIGHTS), shapes)
    metadata = group(cfg, "metadata", file)
    known = {
        "hook_name": text(metadata, "hook_name", file),
        "model": text(metadata, "model_name", file),
        "dataset": text(metadata, "dataset_path", file),
        "ctx_len": count(metadata, "context_size", file) if metadata.get("context_size") else None,
    }
    config = SaeConfig(
        d_in=d_in,
        num_latents=d_sae,
        k=count(cfg, "k", file),
        provenance=provenance("saelens", raw, metadata.get("saemill"), file, **known),
    )
    return Parts(config, *_folded(weights, centred, rescaled, scale))


def _since_6(cfg: dict[str, Any], file: Path) -> dict[str, Any]:
    """Translate a config of an SAELens before 6.0 to today's terms."""
    if "metadata" in cfg:
        return cfg
    old = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
    cfg = {old.get(key, key): value for key, value in cfg.items()}
    if cfg.get("activation_fn") == "topk":
        k = group(cfg, "activation_fn_kwargs", file).get("k", cfg.get("k"))
        cfg |= {"architecture": "topk", "k": k}
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

    Returns: W_enc [F, D], b_enc [F], W_dec [F, D], b_dec [D] of the `Sae` that computes the same.
    """
    dtype = weights["W_enc"].dtype
    W_enc, b_enc = weights["W_enc"].T.double() * scale, weights["b_enc"].double()
    W_dec, b_dec = weights["W_dec"].double() / scale, weights["b_dec"].double() / scale
    if not centred:
        b_enc = b_enc + W_enc @ b_dec
    if rescaled:
        # As SAELens itself folds them; the bound keeps latents without a decoder finite.
        norms = W_dec.norm(dim=1).clamp(min=1e-8)
        W_enc, b_enc, W_dec = W_enc * norms[:, None], b_enc * norms, W_dec / norms[:, None]
    return tuple(w.to(dtype).contiguous() for w in (W_enc, b_enc, W_dec, b_dec))


def write(parts: Parts, folder: Path, hook: Hook | None) -> None:
    """Write `cfg.json` and `sae_weights.safetensors` as SAELens saves an SAE for inference."""
    weights = {"W_enc": parts.W_enc.T, "b_enc": parts.b_enc, "W_dec": parts.W_dec, "b_dec": parts.b_dec}
    folder.mkdir(parents=True, exist_ok=True)
    with durable.replacing(folder / WEIGHTS, sum(w.nbytes for w in weights.values())) as partial:
        save_file(apart(weights), partial)
    origin = parts.config.provenance
    metadata = {
        "sae_lens_version": VERSION,
        "model_name": origin.get("model"),
        "model_class_name": "HookedTransformer" if hook else None,
        "hook_name": hook.name if hook else None,
        "hook_head_index": None,
        "dataset_path": origin.get("dataset"),
        "context_size": origin.get("ctx_len"),
        "prepend_bos": origin.get("prepend_bos"),
        "saemill": origin,
    }
    cfg = {
        "architecture": "topk",
        "d_in": parts.config.d_in,
        "d_sae": parts.config.num_latents,
        "k": parts.config.k,
        "dtype": str(parts.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "rescale_acts_by_decoder_norm": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {key: value for key, value in metadata.items() if value is not None},
    }
    durable.write_json(folder / "cfg.json", cfg)
