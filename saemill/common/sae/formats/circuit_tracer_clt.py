"""circuit-tracer's cross-layer transcoders (0.5): a folder with `config.yaml` and two files of each layer.

    W_enc_0.safetensors   W_enc_0 [F/L, D]   b_enc_0 [F/L]   b_dec_0 [D]   threshold_0 [F/L] (jump_relu)
    W_dec_0.safetensors   W_dec_0 [F/L, L, D]

In layer l's file W_dec_l is [F/L, L − l, D], what its latents write to l, l + 1, …. Without thresholds they
are ReLUs. What saemill notes stands in the metadata of W_enc_0.safetensors.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from saemill.common import durable
from saemill.common.errors import ConfigError, StoreError
from saemill.common.sae import layers
from saemill.common.sae.formats import circuit_tracer
from saemill.common.sae.formats.checks import (
    check_shape,
    check_weights,
    expect,
    joined,
    noted,
    provenance,
    text,
    traits,
)
from saemill.common.sae.formats.circuit_tracer import CONFIG, OWN
from saemill.common.sae.formats.folding import non_negative
from saemill.common.sae.formats.tensor_files import read_tensors, sizes
from saemill.common.sae.parts import Joined, Parts, SaeConfig, apart

NAME = "circuit-tracer-clt"
KIND = "cross_layer_transcoder"
ENCODER, DECODER = "W_enc_{}.safetensors", "W_dec_{}.safetensors"
"""Names of a layer's files."""
WEIGHTS = ENCODER.format(0)
"""Name of the file by which a folder is recognised."""


def is_part(file: PurePath) -> bool:
    """Tell whether a file is a layer's by its name."""
    return re.fullmatch(r"W_(enc|dec)_(0|[1-9]\d{0,5})\.safetensors", file.name) is not None


def holds(place: Path) -> bool:
    """Tell whether a folder is of this format, by the names of its files."""
    return (place / WEIGHTS).is_file()


def read(folder: Path) -> Parts:
    """Read a cross-layer transcoder, on the CPU, in the dtype of its files.

    Raises:
        StoreError, ConfigError: as `formats.load`.
    """
    cfg_file, first = folder / CONFIG, folder / WEIGHTS
    cfg = circuit_tracer.read_config(cfg_file)
    expect(cfg, "model_kind", KIND, None, "it is no cross-layer transcoder", cfg_file)
    own = circuit_tracer.own(first)
    n = _count_layers(folder)
    f, d = sizes(first, found := read_tensors(first), "W_enc_0", "[F, D]")
    has_threshold = "threshold_0" in found
    each = [_layer(folder, layer, n, (f, d), has_threshold=has_threshold) for layer in range(n)]
    tensors = {name: torch.cat([one[name] for one in each]) for name in each[0]}
    threshold = tensors.pop("threshold", None)
    config = SaeConfig(
        d_in=n * d,
        d_out=n * d,
        num_latents=n * f,
        k=None,
        provenance=provenance(
            NAME, cfg, own.get("provenance"), cfg_file, model=text(cfg, "model_name", cfg_file)
        ),
        joined=joined(own, "joined", first) or _hooks(cfg, "feature_input_hook", cfg_file, n, d),
        predicted=joined(own, "predicted", first) or _hooks(cfg, "feature_output_hook", cfg_file, n, d),
        **traits(own, "relu" if threshold is None else "jumprelu", first),
    )
    return Parts(
        config, **tensors, threshold=torch.zeros(n * f) if threshold is None else non_negative(threshold)
    )


def _count_layers(folder: Path) -> int:
    """Count the layers by their files, of which none may be missing."""
    names = {file.name for file in folder.iterdir() if is_part(file)}
    n = len(names) // 2
    wanted = {name.format(layer) for layer in range(max(n, 2)) for name in (ENCODER, DECODER)}
    if lone := sorted(names ^ wanted):
        raise StoreError(
            f"{folder} must hold {ENCODER.format('N')} and {DECODER.format('N')} of two or more layers, from "
            f"0 on; alone or missing: {', '.join(lone[:4])}"
        )
    return n


def _layer(
    folder: Path, layer: int, n_layers: int, shape: tuple[int, int], *, has_threshold: bool
) -> dict[str, Tensor]:
    """Read the tensors of a layer, by their names in `Parts`."""
    f, d = shape
    files = {"W_enc": folder / ENCODER.format(layer), "W_dec": folder / DECODER.format(layer)}
    encoder, decoder = (read_tensors(file) for file in files.values())
    optional = (f"threshold_{layer}",) if has_threshold else ()
    shapes = {f"W_enc_{layer}": (f, d), f"b_enc_{layer}": (f,), f"b_dec_{layer}": (d,)}
    weights = check_weights(files["W_enc"], encoder, shapes, optional)
    weights |= check_weights(files["W_dec"], decoder, {f"W_dec_{layer}": (f, n_layers - layer, d)})
    found = {name.removesuffix(f"_{layer}"): tensor for name, tensor in weights.items()}
    if has_threshold:
        threshold = check_shape(files["W_enc"], encoder, f"threshold_{layer}", (f,))
        found["threshold"] = threshold.float()
    return found | {"W_dec": found["W_dec"].flatten(0, 1)}


def _hooks(cfg: Mapping[str, Any], field: str, file: Path, n_layers: int, width: int) -> tuple[Joined, ...]:
    """List the sites of the layers by the hooks that a config names; their scales it does not tell."""
    hook = text(cfg, field, file)
    if hook is None:
        raise StoreError(f"{file}: {field} must name a hook, got nothing")
    return tuple(Joined(f"blocks.{layer}.{hook}", width, 1.0) for layer in range(n_layers))


def write(parts: Parts, folder: Path, hooks: tuple[str, str], model: str | None) -> None:
    """Write a cross-layer transcoder.

    Args:
        parts: the transcoder, of all layers of a model in their order.
        folder: where to; created.
        hooks: what its latents read and what they predict, by their names within the block.
        model: hub id or folder.

    Raises:
        ConfigError: circuit-tracer has none with k.
        DiskError: the disk is full, or the folder may not be written to.
    """
    check(parts)
    folder.mkdir(parents=True, exist_ok=True)
    config, n = parts.config, parts.config.n_layers
    sites = {name: [asdict(one) for one in getattr(config, name)] for name in ("joined", "predicted")}
    has_threshold = config.architecture != "relu"
    own = {"provenance": config.provenance, **sites, **noted(config, "jumprelu" if has_threshold else "relu")}
    named = {"W_enc": parts.W_enc, "b_enc": parts.b_enc, "b_dec": parts.b_dec}
    if has_threshold and parts.threshold is not None:
        named["threshold"] = parts.threshold
    cut = {name: tensor.chunk(n) for name, tensor in named.items()}
    for layer, rows in enumerate(layers.blocks(parts.W_dec, n)):
        encoder = {f"{name}_{layer}": tensors[layer] for name, tensors in cut.items()}
        metadata = {OWN: json.dumps(own)} if layer == 0 else None
        _save(folder / ENCODER.format(layer), encoder, metadata)
        _save(folder / DECODER.format(layer), {f"W_dec_{layer}": rows.view(len(rows), n - layer, -1)}, None)
    cfg = {
        "model_name": model,
        "model_kind": KIND,
        "feature_input_hook": hooks[0],
        "feature_output_hook": hooks[1],
    }
    plain = yaml.safe_dump({name: value for name, value in cfg.items() if value is not None}, sort_keys=False)
    with durable.replacing(folder / CONFIG) as partial:
        partial.write_text(plain, encoding="utf-8")


def _save(file: Path, weights: Mapping[str, Tensor], metadata: dict[str, str] | None) -> None:
    n_bytes = sum(w.nbytes for w in weights.values())
    with durable.replacing(file, n_bytes) as partial:
        save_file({name: tensor.clone() for name, tensor in apart(weights).items()}, partial, metadata)


def check(parts: Parts) -> None:
    """Refuse a cross-layer transcoder that circuit-tracer cannot hold.

    Raises:
        ConfigError: it has a k, a W_skip, or sites of two widths.
    """
    config = parts.config
    if parts.W_skip is not None:
        raise ConfigError(
            "circuit-tracer has cross-layer transcoders without a linear map beside their latents (W_skip); "
            "train one without skip_connection"
        )
    if config.k is not None:
        raise ConfigError(
            f"circuit-tracer has cross-layer transcoders with thresholds alone, got one with k {config.k}; "
            "train one as batchtopk or jumprelu"
        )
    if config.d_in != config.d_out:
        raise ConfigError(
            "circuit-tracer has cross-layer transcoders between sites of one width, got "
            f"{config.joined[0].width} and {config.predicted[0].width}"
        )
