"""dictionary_learning's layout (0.1): `config.json`, `ae.pt`, a pickled dict of tensors.

The config names one of its classes (`dictionary_classes`), whose tensors the dict holds. A checkpoint,
`checkpoints/ae_200.pt`, is such a dict as well. Later versions write backups in mid-training to
`ae.pt`: {step, ae, optimizer, config, norm_factor}, where `ae` sees activations divided by `norm_factor`.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saemill.common import durable
from saemill.common.errors import StoreError
from saemill.common.sae.formats import dictionary_classes as classes
from saemill.common.sae.formats.checks import (
    count,
    group,
    noted,
    one_of,
    provenance,
    read_config,
    text,
    traits,
)
from saemill.common.sae.formats.hooks import Hook, layer_of
from saemill.common.sae.formats.tensor_files import read_pickle, tensors_of
from saemill.common.sae.parts import Parts, SaeConfig
from saemill.common.stores.site_names import is_input, module_of

NAME = "dictionary_learning"
WEIGHTS = "ae.pt"
CHECKPOINT = r"checkpoints/ae_\d+\.pt"
"""Path of a checkpoint below the folder."""
BESIDE = ("config.json",)
"""Files beside the weights."""
NAMED = ("resid_post", "mlp_out", "attn_out")
"""Kinds of hooks that its demo has names for."""
TRAINERS = {
    classes.TOPK: "TopKTrainer",
    classes.BATCHTOPK: "BatchTopKTrainer",
    classes.MATRYOSHKA: "MatryoshkaBatchTopKTrainer",
    classes.JUMPRELU: "JumpReluTrainer",
    classes.RELU: "StandardTrainer",
}


def holds(place: Path) -> bool:
    """Tell whether a folder, or a checkpoint's file within it, is of this format, by the names of files."""
    return (place / WEIGHTS).is_file() or (place.is_file() and _folder(place) != place)


def _folder(place: Path) -> Path:
    """Find the folder of the config: of `checkpoints/ae_200.pt` the one above; of anything else itself."""
    is_checkpoint = re.fullmatch(CHECKPOINT, "/".join(place.parts[-2:])) is not None
    return place.parent.parent if is_checkpoint else place


def read(place: Path) -> Parts:
    """Read the SAE of a folder, or a checkpoint of it, on the CPU, in the dtype of its file. Nothing but
    tensors and plain values is unpickled.

    Raises:
        StoreError, ConfigError: as `formats.load`.
    """
    folder = _folder(place)
    file, weights = folder / "config.json", place / WEIGHTS if folder == place else place
    whole = read_config(file)
    trainer = whole.get("trainer")
    if not isinstance(trainer, dict):
        raise StoreError(f"{file}: trainer must be a group of settings, got {trainer!r:.80}")
    kind = one_of(trainer, "dict_class", classes.ARCHITECTURES, "", file)
    state = _state(weights)
    d_in, num_latents = count(trainer, "activation_dim", file), count(trainer, "dict_size", file)
    k = _k(weights, state, trainer, file) if kind in classes.WITH_K else None
    tensors = classes.read(weights, state, kind, d_in, num_latents)
    noted_traits = traits(trainer, classes.ARCHITECTURES[kind], file)
    if kind == classes.MATRYOSHKA:
        noted_traits["prefixes"] = classes.prefixes(weights, state, num_latents)
    buffer = group(whole, "buffer", file)
    known = {
        "hook_name": _hook_name(text(trainer, "submodule_name", file)),
        "model": text(trainer, "lm_name", file),
        "ctx_len": count(buffer, "ctx_len", file) if buffer.get("ctx_len") is not None else None,
        "k": k if kind != classes.TOPK else None,
    }
    config = SaeConfig(
        d_in=d_in,
        num_latents=num_latents,
        k=k if kind == classes.TOPK else None,
        provenance=provenance(NAME, whole, whole.get("saemill"), file, **known),
        **noted_traits,
    )
    return Parts(config, *tensors)


def _k(weights: Path, state: dict[str, Tensor], trainer: dict[str, Any], file: Path) -> int:
    """Read the number of active latents, which both files hold."""
    k = count(trainer, "k", file)
    if "k" in state and state["k"].numel() != 1:
        raise StoreError(f"{weights}: k must be one number, got {tuple(state['k'].shape)}")
    if "k" in state and (got := state["k"].item()) != k:
        raise StoreError(f"{weights}: k must be {k} by the config beside it, got {got}")
    return k


def _state(file: Path) -> dict[str, Tensor]:
    """Read the tensors of an `ae.pt`; of a backup in mid-training in the activations' own units."""
    found = read_pickle(file)
    if "ae" not in found:
        return tensors_of(file, found)
    state, factor = found["ae"], 1.0 if found.get("norm_factor") is None else found["norm_factor"]
    is_number = isinstance(factor, int | float) and not isinstance(factor, bool) and 0 < factor < math.inf
    if not isinstance(state, dict) or not is_number:
        raise StoreError(
            f"{file}: a backup in mid-training must hold its SAE and a norm_factor above 0, got "
            f"{type(state).__name__} and {factor!r:.80}"
        )
    return classes.in_own_units(tensors_of(file, state), factor)


def _hook_name(submodule_name: str | None) -> str | None:
    """Translate a submodule's name, written as dictionary_learning's demo writes it, to TransformerLens'
    name."""
    match = re.fullmatch(rf"({'|'.join(NAMED)})_layer_(\d+)", submodule_name or "")
    return f"blocks.{match[2]}.hook_{match[1]}" if match else None


def write(parts: Parts, folder: Path, hook: Hook | None) -> None:
    """Write `config.json` and `ae.pt`."""
    trained_k = _trained_k(parts.config)
    kind, state = classes.write(parts, trained_k)
    folder.mkdir(parents=True, exist_ok=True)
    with durable.replacing(folder / WEIGHTS) as partial, partial.open("wb") as opened:
        torch.save(state, opened)  # to an opened file, whose errors tell of a full disk
    durable.write_json(folder / "config.json", _config(parts.config, kind, trained_k, hook))


def _trained_k(config: SaeConfig) -> int | None:
    """Find the mean number of active latents that an SAE was trained for, where its origin tells it."""
    variant = config.provenance.get("variant") or {}
    k = config.provenance.get("k", variant.get("k"))
    is_count = isinstance(k, int) and not isinstance(k, bool) and 1 <= k <= config.num_latents
    return k if is_count else None


def _config(config: SaeConfig, kind: str, trained_k: int | None, hook: Hook | None) -> dict[str, Any]:
    origin = config.provenance
    site = origin.get("site")
    known = "prefixes" if kind == classes.MATRYOSHKA else ""  # the file of weights has them
    notes = {key: value for key, value in noted(config, classes.ARCHITECTURES[kind]).items() if key != known}
    named = f"{hook.kind}_layer_{hook.layer}" if hook and hook.kind in NAMED else None
    trainer = {
        "trainer_class": TRAINERS[kind],
        "dict_class": kind,
        "activation_dim": config.d_in,
        "dict_size": config.num_latents,
        **({"k": config.k or trained_k} if kind in classes.WITH_K else {}),
        **notes,
        "layer": hook.layer if hook else layer_of(site or ""),
        "lm_name": origin.get("model"),
        "submodule_name": named or (site and module_of(site)),
    }
    takes = not named and site is not None and is_input(site)
    buffer = {"d_submodule": config.d_in, "io": "in" if takes else "out", "ctx_len": origin.get("ctx_len")}
    return {"trainer": trainer, "buffer": buffer, "saemill": origin}
