"""Gemma Scope 2: `params.safetensors` and `config.json` in a folder for each SAE or transcoder.

    w_enc [D, F]   b_enc [F]   w_dec [F, E]   b_dec [E]   threshold [F]
    affine_skip_connection [D, E] (transcoders with `affine_connection`)

b_dec is not subtracted before encoding. The config names the modules of transformers that are read and
predicted, `model.layers.17.output`; where it is missing, the folder's name tells them. Cross-layer
transcoders and crosscoders have matrices for several layers.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from saemill.common.errors import ConfigError, StoreError
from saemill.common.sae.formats.checks import (
    check_shape,
    check_weights,
    expect,
    flag,
    provenance,
    read_config,
    text,
)
from saemill.common.sae.formats.folding import Tensors, centred, non_negative
from saemill.common.sae.formats.tensor_files import names_in, read_tensors, sizes
from saemill.common.sae.parts import Parts, SaeConfig

NAME = "gemma-scope-2"
WEIGHTS = "params.safetensors"
BESIDE = ("config.json",)
"""Files that may be there beside the weights."""
SKIP = "affine_skip_connection"
TENSORS = {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"}
KINDS = {
    "resid_post": ("output", None),
    "attn_out": ("self_attn.o_proj.input", None),
    "mlp_out": ("post_feedforward_layernorm.output", None),
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
}
"""What is read in the layer, and what is predicted, by the folder's name."""
HOOKS = {
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "pre_feedforward_layernorm.output": "mlp.hook_in",
    "post_feedforward_layernorm.output": "hook_mlp_out",
}
"""The same in TransformerLens' terms."""


def holds(place: Path) -> bool:
    """Tell whether a folder, or a file of cross-layer transcoders, is of this format."""
    if place.is_file():
        return place.suffix == ".safetensors" and names_in(place) >= TENSORS
    return (place / WEIGHTS).is_file()


def read(place: Path) -> Parts:
    """Read the SAE of a folder, on the CPU.

    Raises:
        StoreError, ConfigError: as `formats.load`.
    """
    file = place if place.is_file() else place / WEIGHTS
    found = read_tensors(file)
    _check_of_one_layer(found, file)
    cfg_file = file.with_name(BESIDE[0])
    cfg = read_config(cfg_file) if cfg_file.is_file() else _config_of(file.parent)
    expect(cfg, "architecture", "jump_relu", "jump_relu", "its latents are chosen in another way", cfg_file)
    d, f = sizes(file, found, "w_enc", "[D, F]")
    reads, predicts = (text(cfg, f"hf_hook_point_{end}", cfg_file) for end in ("in", "out"))
    is_transcoder = predicts not in (None, reads)
    e = sizes(file, found, "w_dec", "[F, E]")[1] if is_transcoder else d
    has_skip = flag(cfg, "affine_connection", False, cfg_file)
    if has_skip and not is_transcoder:
        raise StoreError(f"{cfg_file}: affine_connection must be false of an SAE, got true")
    shapes = {"w_enc": (d, f), "b_enc": (f,), "w_dec": (f, e), "b_dec": (e,)}
    shapes |= {SKIP: (d, e)} if has_skip else {}
    W_enc, b_enc, W_dec, b_dec, *skip = check_weights(file, found, shapes, optional=("threshold",)).values()
    threshold = non_negative(check_shape(file, found, "threshold", (f,)))
    W_skip = skip[0].T.contiguous() if skip else None
    tensors = Tensors(W_enc.T.contiguous(), b_enc, W_dec, b_dec, threshold, W_skip)
    known = _place("", reads) | (_place("target_", predicts) if is_transcoder else {})
    config = SaeConfig(
        d_in=d,
        d_out=e if is_transcoder else None,
        num_latents=f,
        k=None,
        architecture="jumprelu",
        provenance=provenance(
            NAME, cfg, None, cfg_file, model=_model(text(cfg, "model_name", cfg_file)), **known
        ),
    )
    return Parts(config, *(tensors if is_transcoder else centred(tensors)))


def _check_of_one_layer(found: Mapping[str, Tensor], file: Path) -> None:
    """Refuse weights of several layers."""
    for name in ("w_enc", "w_dec"):
        if name in found and found[name].dim() == 3:
            raise ConfigError(
                f"{file}: {name} must be a matrix, got {tuple(found[name].shape)}: it is of a cross-layer "
                "transcoder or a crosscoder, which reads or writes several layers"
            )


def _config_of(folder: Path) -> dict[str, Any]:
    """Derive from a folder's name what its config would say; nothing where it does not tell."""
    path = folder.absolute().as_posix()
    kind = next((kind for kind in KINDS if f"/{kind}" in path), None)
    layer = re.search(r"/layer_(\d+)[^/]*$", path)
    repository = re.search(r"gemma-scope-2-([^/]+)", path)
    cfg: dict[str, Any] = {"affine_connection": True} if folder.name.endswith("_affine") else {}
    if repository:
        cfg["model_name"] = f"google/gemma-3-{repository[1]}"
    if kind and layer:
        reads, predicts = KINDS[kind]
        cfg["hf_hook_point_in"] = f"model.layers.{layer[1]}.{reads}"
        cfg |= {"hf_hook_point_out": f"model.layers.{layer[1]}.{predicts}"} if predicts else {}
    return cfg


def _place(of: str, point: str | None) -> dict[str, str]:
    """Name a point as a site of the model's body and as TransformerLens does.

    Args:
        of: "", or "target_" of what is predicted.
        point: `model.layers.17.output`; None where it is not known.
    """
    match = re.fullmatch(r"model\.(layers\.(\d+)\.?(.*))", point or "")
    if match is None:
        return {}
    path, layer, within = match.groups()
    module, _, end = path.rpartition(".")
    known = {f"{of}site": module if end == "output" else f"{module}:in"}
    if within in HOOKS:
        known["hook_name_out" if of else "hook_name"] = f"blocks.{layer}.{HOOKS[within]}"
    return known


def _model(name: str | None) -> str | None:
    """Write a model's name as the hub does, which some of the configs do not."""
    if name is None:
        return None
    name = (name if "/" in name else f"google/{name}").replace("-v3", "-3")
    return name.removesuffix("-pt") if "270m" in name else name
