"""Llama Scope and what its library, Llamascopium (lm-saes), writes, in two layouts.

    hyperparams.json, checkpoints/final.safetensors   Llama Scope of 2024
        encoder.weight [F, D]   encoder.bias [F]   decoder.weight [D, F]   decoder.bias [D]
    config.json, sae_weights.safetensors              since then
        the same names, or W_E [D, F]   b_E [F]   W_D [F, D]   b_D [D]
        log_jumprelu_threshold [F] (jumprelu)   dataset_average_activation_norm.<hook> [] of each hook

b_dec is not subtracted before encoding. With `norm_activation` "dataset-wise" the SAE sees activations times
√D over their mean norm, which is folded here; with "inference" that was done already. With
`sparsity_include_decoder_norm` latents are chosen by activation × length of their decoder row.

The threshold in a `hyperparams.json` is one number for all latents, of pre-activations before that factor:
over the layers it grows with the norm of the activations.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saemill.common.errors import ConfigError, StoreError
from saemill.common.sae.formats.checks import (
    MOST_SIZE,
    check_shape,
    check_weights,
    count,
    expect,
    flag,
    group,
    one_of,
    provenance,
    read_config,
    text,
)
from saemill.common.sae.formats.folding import (
    Tensors,
    centred,
    lengths,
    non_negative,
    scaled,
    unit_rows,
    widened,
)
from saemill.common.sae.formats.tensor_files import read_tensors
from saemill.common.sae.norms import RESCALE
from saemill.common.sae.parts import Parts, SaeConfig

NAME = "llama-scope"
OLD, NEW = "hyperparams.json", "config.json"
"""Names of the configs."""
WEIGHTS = ("sae_weights.safetensors", "checkpoints/final.safetensors", "checkpoints/pruned.safetensors")
"""Names of the weights, of which one is there."""
NORM = "dataset_average_activation_norm"
LOG_THRESHOLD = ("log_jumprelu_threshold", "activation_function.log_jumprelu_threshold")
LAYERS = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
PLAIN = ("W_E", "b_E", "W_D", "b_D")
SUBLAYERS = "Llama3_1-8B-Base-L"
"""What the names of Llama Scope's folders begin with, which tells the model."""


def holds(place: Path) -> bool:
    """Tell whether a folder is of this format, by the names of its files."""
    has_config = (place / OLD).is_file() or ((place / NEW).is_file() and not (place / "cfg.json").is_file())
    return has_config and any((place / name).is_file() for name in WEIGHTS)


def read(folder: Path) -> Parts:
    """Read the SAE or transcoder of a folder, on the CPU.

    Raises:
        StoreError, ConfigError: as `formats.load`.
    """
    file = folder / (OLD if (folder / OLD).is_file() else NEW)
    cfg = read_config(file)
    expect(cfg, "sae_type", "sae", "sae", "it is no SAE or transcoder of one site", file)
    expect(cfg, "use_glu_encoder", False, False, "its encoder is gated by a sigmoid (GLU)", file)
    expect(cfg, "apply_decoder_bias_to_pre_encoder", False, False, "no published SAE has it", file)
    rule = one_of(cfg, "act_fn", ("jumprelu", "topk", "relu"), "relu", file)
    norm = one_of(cfg, "norm_activation", ("dataset-wise", "inference", "token-wise"), "dataset-wise", file)
    hooks = tuple(text(cfg, f"hook_point_{end}", file) for end in ("in", "out"))
    is_transcoder = hooks[1] not in (None, hooks[0])
    if is_transcoder and norm == "token-wise":
        raise ConfigError(f"{file}: norm_activation is 'token-wise' of a transcoder, whose output it divides")
    config = SaeConfig(
        d_in=count(cfg, "d_model", file),
        d_out=count(cfg, "d_model", file) if is_transcoder else None,
        num_latents=_num_latents(cfg, file),
        k=count(cfg, "top_k", file) if rule == "topk" else None,
        architecture=rule,
        norm=RESCALE if norm == "token-wise" else None,
        provenance=provenance(NAME, cfg, None, file, **_known(folder, hooks, is_transcoder)),
    )
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), folder / WEIGHTS[0])
    found = read_tensors(weights)
    norms = {name.removeprefix(f"{NORM}."): found.pop(name) for name in [*found] if name.startswith(NORM)}
    told = norms or group(cfg, NORM, file)
    factors = _factors(told, hooks, config.d_in, file) if norm == "dataset-wise" else (1.0, 1.0)
    tensors = _tensors(weights, found, cfg, config, file, factors[0])
    if flag(cfg, "sparsity_include_decoder_norm", True, file):
        tensors = _by_length(tensors)
    tensors = scaled(tensors, *factors)
    return Parts(config, *(tensors if is_transcoder else centred(tensors)))


def _num_latents(cfg: dict[str, Any], file: Path) -> int:
    """Read the number of latents, which is d_model × expansion_factor where it is not told."""
    if "d_sae" in cfg:
        return count(cfg, "d_sae", file)
    factor = cfg.get("expansion_factor")
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 < factor < MOST_SIZE:
        raise StoreError(f"{file}: expansion_factor must be a number above 0, got {factor!r:.80}")
    return count({"d_sae": round(factor * count(cfg, "d_model", file))}, "d_sae", file)


def _factors(
    norms: Mapping[str, Any], hooks: tuple[str | None, ...], d: int, file: Path
) -> tuple[float, float]:
    """Find the factors on what is read and on what is predicted."""
    return _factor(norms, "in", hooks[0], d, file), _factor(norms, "out", hooks[1], d, file)


def _factor(norms: Mapping[str, Any], end: str, hook: str | None, d: int, file: Path) -> float:
    """Find the factor on activations of one end, √D over their mean norm."""
    norm = norms.get(hook or end, norms.get(end))
    norm = norm.item() if isinstance(norm, Tensor) and norm.numel() == 1 else norm
    if not isinstance(norm, int | float) or isinstance(norm, bool) or not 0 < norm < math.inf:
        raise StoreError(
            f"{file}: norm_activation is 'dataset-wise', but {NORM} of {hook or end} must be a number above "
            f"0, got {norm!r:.80}"
        )
    return math.sqrt(d) / norm


def _tensors(
    file: Path,
    found: dict[str, Tensor],
    cfg: dict[str, Any],
    config: SaeConfig,
    cfg_file: Path,
    factor: float,
) -> Tensors:
    """Read the tensors, of either naming, with the thresholds of scaled pre-activations.

    Args:
        file: of the weights.
        found: what it holds, but for norms.
        cfg: as it was read from `cfg_file`.
        config: shape of the SAE.
        factor: on activations.
    """
    d, f = config.d_in, config.num_latents
    are_layers = LAYERS[0] in found
    names = LAYERS if are_layers else PLAIN
    wide, deep = ((f, d), (d, f)) if are_layers else ((d, f), (f, d))
    shapes = dict(zip(names, (wide, (f,), deep, (d,)), strict=True))
    if not flag(cfg, "use_decoder_bias", True, cfg_file):
        del shapes[names[3]]
    threshold, optional = _threshold(file, found, cfg, config, cfg_file, factor)
    W_enc, b_enc, W_dec, *bias = check_weights(file, found, shapes, optional).values()
    W_enc, W_dec = (W_enc, W_dec.T) if are_layers else (W_enc.T, W_dec)
    b_dec = bias[0] if bias else torch.zeros(d, dtype=W_dec.dtype)
    return Tensors(W_enc.contiguous(), b_enc, W_dec.contiguous(), b_dec, threshold)


def _threshold(
    file: Path,
    found: dict[str, Tensor],
    cfg: dict[str, Any],
    config: SaeConfig,
    cfg_file: Path,
    factor: float,
) -> tuple[Tensor | None, tuple[str, ...]]:
    """Read the thresholds of scaled pre-activations, None with k, and the name of their tensor."""
    f = config.num_latents
    if config.architecture != "jumprelu":
        return (None if config.k else torch.zeros(f)), ()
    if cfg_file.name == OLD:
        one = cfg.get("jump_relu_threshold")
        if not isinstance(one, int | float) or isinstance(one, bool) or not 0 <= one < math.inf:
            raise StoreError(f"{cfg_file}: jump_relu_threshold must be a number, 0 or more, got {one!r:.80}")
        return torch.full((f,), float(one) * factor), ()
    name = next((name for name in LOG_THRESHOLD if name in found), LOG_THRESHOLD[0])
    return non_negative(check_shape(file, found, name, (f,)).float().exp()), (name,)


def _by_length(tensors: Tensors) -> Tensors:
    """Fold that latents are chosen by activation × length of their decoder row.

    A threshold is divided by the length. The k largest are those of an SAE with rows of unit length, whose
    activations are longer by as much.
    """
    if tensors.threshold is not None:
        return tensors._replace(threshold=tensors.threshold / lengths(tensors.W_dec.float()))
    rows = unit_rows(*(widened(weights) for weights in tensors[:3]))
    return Tensors(*rows, tensors.b_dec)


def _known(folder: Path, hooks: tuple[str | None, ...], is_transcoder: bool) -> dict[str, Any]:
    """Collect where an SAE belongs. Which model it is of, only Llama Scope's folders tell."""
    is_llama = folder.absolute().name.startswith(SUBLAYERS)
    return {
        "hook_name": hooks[0],
        "hook_name_out": hooks[1] if is_transcoder else None,
        "model": "meta-llama/Llama-3.1-8B" if is_llama else None,
    }
