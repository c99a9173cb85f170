"""circuit-tracer's sets of transcoders (2026-04): `config.yaml`, and `layer_0.safetensors` of each layer.

    W_enc [F, D]   b_enc [F]   W_dec [F, D]   b_dec [D]   activation_function.threshold [F] (jumprelu)
    W_skip [D, D] (skip transcoders)

A set has a transcoder for every layer of the model, all of one width, one number of latents and one way of
choosing them; the config names the two hooks, k and the model. circuit-tracer refuses a tensor that it does
not know, so what saemill notes of a transcoder stands in the metadata of its file.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from saemill.common import durable, yaml_text
from saemill.common.errors import ConfigError, DiskError, StoreError
from saemill.common.sae.formats.checks import (
    check_shape,
    check_weights,
    count,
    expect,
    noted,
    provenance,
    text,
    traits,
)
from saemill.common.sae.formats.folding import non_negative
from saemill.common.sae.formats.hooks import Hook
from saemill.common.sae.formats.tensor_files import first_line, read_tensors, sizes
from saemill.common.sae.parts import Parts, SaeConfig, apart

NAME = "circuit-tracer"
CONFIG = "config.yaml"
WANDB = ("wandb-config.yaml", "wanb-config.yaml")
"""Configs of training, of which some published sets have one alone; the second is a slip of theirs."""
WEIGHTS = "layer_{}.safetensors"
"""Name of a layer's file."""
THRESHOLD = "activation_function.threshold"
OWN = "saemill"
"""Key of the metadata with provenance and traits."""


def layer_of(file: PurePath) -> int | None:
    """Find the layer of a set that a file is by its name; None of any other file."""
    match = re.fullmatch(WEIGHTS.format(r"(0|[1-9]\d{0,5})"), file.name)
    return int(match[1]) if match else None


def layers_in(folder: Path) -> list[Path]:
    """List the files of a set in the order of their layers; none where a folder is no set."""
    files = folder.glob(WEIGHTS.format("*")) if (folder / CONFIG).is_file() else ()
    found = {layer: file for file in files if (layer := layer_of(file)) is not None}
    return [found[layer] for layer in sorted(found)]


def holds(place: Path) -> bool:
    """Tell whether a path is the file of a layer."""
    return layer_of(place) is not None and place.is_file()


def read(file: Path) -> Parts:
    """Read one transcoder of a set, on the CPU, in the dtype of its file.

    Args:
        file: of its layer; the set's config is beside it.

    Raises:
        StoreError, ConfigError: as `formats.load`.
    """
    cfg_file = file.parent / CONFIG
    cfg = read_config(cfg_file)
    expect(cfg, "model_kind", "transcoder_set", None, "its layers are no transcoders of one layer", cfg_file)
    found, notes = read_tensors(file), own(file)
    activation = text(cfg, "activation", cfg_file)
    has_k = activation == "topk"
    has_threshold = (
        activation not in ("topk", "relu") and THRESHOLD in found
    )  # which tells where it is neither
    f, d = sizes(file, found, "W_enc", "[F, D]")
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (f, d), "b_enc": (f,), "W_dec": (f, d), "b_dec": (d,)}
    shapes |= {"W_skip": (d, d)} if "W_skip" in found else {}
    weights = check_weights(file, found, shapes, optional=(THRESHOLD,) if has_threshold else ())
    threshold = None if has_k else torch.zeros(f)
    if has_threshold:
        threshold = non_negative(check_shape(file, found, THRESHOLD, (f,)))
    config = SaeConfig(
        d_in=d,
        d_out=d,
        num_latents=f,
        k=count(cfg, "k", cfg_file) if has_k else None,
        provenance=provenance(NAME, cfg, notes.get("provenance"), cfg_file, **_known(cfg, file)),
        **traits(notes, "topk" if has_k else "jumprelu" if has_threshold else "relu", file),
    )
    return Parts(config, **weights, threshold=threshold)


def read_config(file: Path) -> dict[str, Any]:
    """Read a set's config, but for the list of places of files that some have."""
    if not file.is_file() and any(file.with_name(name).is_file() for name in WANDB):
        return _without_config(file.parent)
    try:
        cfg = yaml_text.parse(file.read_text(encoding="utf-8"), str(file))
        json.dumps(cfg)  # as it will be kept
    except FileNotFoundError:
        raise StoreError(f"{file.parent} holds no transcoders: {file.name} is missing") from None
    except OSError as error:
        raise DiskError(f"{file} cannot be read: {error.strerror}") from error
    except (ConfigError, ValueError, TypeError) as error:
        raise StoreError(f"{file} is damaged: {error}") from error
    if not isinstance(cfg, dict):
        raise StoreError(f"{file} must hold settings, got {cfg!r:.80}")
    return {name: value for name, value in cfg.items() if name != "transcoders"}


def _without_config(folder: Path) -> dict[str, Any]:
    """Say what the configs of Hanna's other sets of Qwen 3 say, of one that has none."""
    size = re.search(r"qwen3-([\d.]+)b", folder.absolute().as_posix())
    model = {"model_name": f"Qwen/Qwen3-{size[1]}B"} if size else {}
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
    return {"model_kind": "transcoder_set", "activation": "relu", **hooks, **model}


def own(file: Path) -> dict[str, Any]:
    """Read what saemill noted in the metadata of a file; nothing where another tool wrote it."""
    try:
        with safe_open(file, "pt") as opened:
            noted_there = (opened.metadata() or {}).get(OWN, "{}")
        found = json.loads(noted_there)
    except Exception as error:  # the library has several kinds of its own
        raise StoreError(f"{file} is damaged: {first_line(error)}") from error
    return found if isinstance(found, dict) else {}


def _known(cfg: dict[str, Any], file: Path) -> dict[str, Any]:
    """Collect what a set tells of where a transcoder belongs."""
    cfg_file = file.parent / CONFIG
    reads, predicts = (text(cfg, f"feature_{end}_hook", cfg_file) for end in ("input", "output"))
    block = f"blocks.{layer_of(file)}"
    return {
        "hook_name": reads and f"{block}.{reads}",
        "hook_name_out": predicts and f"{block}.{predicts}",
        "model": text(cfg, "model_name", cfg_file),
    }


def write(transcoders: Sequence[Parts], folder: Path, output: str, model: str | None) -> None:
    """Write a set.

    Args:
        transcoders: of layer 0, 1, and so on; what each reads enters its MLP.
        folder: where to; created.
        output: the hook that they predict, by its name within the block.
        model: hub id or folder.

    Raises:
        ConfigError: a set cannot hold them.
        DiskError: the disk is full, or the folder may not be written to.
    """
    check(transcoders)
    activation = _activation(transcoders)
    folder.mkdir(parents=True, exist_ok=True)
    for layer, parts in enumerate(transcoders):
        weights = parts.weights
        threshold = weights.pop("threshold", None)
        if activation == "jumprelu" and threshold is not None:
            weights[THRESHOLD] = threshold
        notes = {"provenance": parts.config.provenance, **noted(parts.config, activation)}
        n_bytes = sum(w.nbytes for w in weights.values())
        with durable.replacing(folder / WEIGHTS.format(layer), n_bytes) as partial:
            save_file(apart(weights), partial, {OWN: json.dumps(notes)})
    cfg = {
        "model_name": model,
        "model_kind": "transcoder_set",
        "feature_input_hook": Hook(0, "mlp_in").in_block,
        "feature_output_hook": output,
        "activation": activation,
        "k": transcoders[0].config.k,
    }
    plain = yaml.safe_dump({name: value for name, value in cfg.items() if value is not None}, sort_keys=False)
    with durable.replacing(folder / CONFIG) as partial:
        partial.write_text(plain, encoding="utf-8")


def _activation(transcoders: Sequence[Parts]) -> str:
    """Name a set's way of choosing latents; a ReLU beside thresholds is a threshold of 0."""
    if transcoders[0].config.k is not None:
        return "topk"
    return "relu" if all(parts.config.architecture == "relu" for parts in transcoders) else "jumprelu"


def check(transcoders: Sequence[Parts]) -> None:
    """Refuse transcoders that a set cannot hold together.

    Raises:
        ConfigError: one predicts another width than it reads, or they differ in what all must share.
    """
    first = transcoders[0]
    for layer, parts in enumerate(transcoders):
        if parts.config.architecture == "groupmax":
            raise ConfigError(f"{NAME} has no GroupMax, got one at layer {layer}; export it as sparsify")
        if parts.config.is_signed:
            raise ConfigError(
                f"{NAME} has no transcoders whose activations may be negative, got "
                f"{parts.config.architecture} at layer {layer}; train another architecture"
            )
        if parts.config.d_out != parts.config.d_in:
            raise ConfigError(
                f"{NAME} has transcoders between sites of one width, got {parts.config.d_in} and "
                f"{parts.config.d_out} at layer {layer}"
            )
        for what, (wanted, got) in _shared(first, parts).items():
            if wanted != got:
                raise ConfigError(
                    f"all transcoders of a {NAME} set must have the same {what}, got {wanted} at layer 0 and "
                    f"{got} at layer {layer}; name those of one kind, a folder each"
                )


def _shared(first: Parts, other: Parts) -> dict[str, tuple[object, object]]:
    """Collect what all transcoders of a set must share, of two of them."""
    a, b = first.config, other.config
    return {
        "width": (a.d_in, b.d_in),
        "number of latents": (a.num_latents, b.num_latents),
        "k": (a.k or "thresholds", b.k or "thresholds"),
        "skip connection": ("one" if first.W_skip is not None else "none",
                            "one" if other.W_skip is not None else "none"),
    }  # fmt: skip
