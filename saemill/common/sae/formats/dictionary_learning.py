"""dictionary_learning's layout (0.1): `config.json`, `ae.pt`, a pickled dict of tensors.

    encoder.weight [F, D]   encoder.bias [F]   decoder.weight [D, F]   b_dec [D]   k int32 []   threshold []

Its `AutoEncoderTopK` has the encoder of `Sae`. `threshold`, the running mean of the smallest active latent,
serves `encode(x, use_threshold=True)` alone: it is dropped when read, and written as -1, which means unset.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saemill.common import durable
from saemill.common.errors import ConfigError, DiskError, StoreError
from saemill.common.sae.formats.checks import (
    check_weights,
    count,
    expect,
    first_line,
    group,
    provenance,
    read_config,
    text,
)
from saemill.common.sae.formats.hooks import Hook, layer_of
from saemill.common.sae.parts import Parts, SaeConfig

WEIGHTS = "ae.pt"
CLASS = "AutoEncoderTopK"


def read(folder: Path) -> Parts:
    """Read the SAE of a folder, on the CPU, in the dtype of its file. Nothing but tensors is unpickled.

    Raises:
        StoreError, ConfigError: as `formats.load`.
    """
    file = folder / "config.json"
    whole = read_config(file)
    trainer = whole.get("trainer")
    if not isinstance(trainer, dict):
        raise StoreError(f"{file}: trainer must be a group of settings, got {trainer!r:.80}")
    expect(trainer, "dict_class", CLASS, None, "only TopK SAEs can be represented", file)
    state = _state(folder / WEIGHTS)
    d_in, num_latents = count(trainer, "activation_dim", file), count(trainer, "dict_size", file)
    k = count(trainer, "k", file)
    if "k" in state and state["k"].numel() != 1:
        raise StoreError(f"{folder / WEIGHTS}: k must be one number, got {tuple(state['k'].shape)}")
    if "k" in state and (got := state["k"].item()) != k:
        raise StoreError(f"{folder / WEIGHTS}: k must be {k} by the config beside it, got {got}")
    wide, narrow = (num_latents, d_in), (d_in,)
    shapes = {
        "encoder.weight": wide,
        "encoder.bias": wide[:1],
        "decoder.weight": wide[::-1],
        "b_dec": narrow,
    }
    weights = check_weights(folder / WEIGHTS, state, shapes, optional=("k", "threshold"))
    buffer = group(whole, "buffer", file)
    known = {
        "hook_name": _hook_name(text(trainer, "submodule_name", file)),
        "model": text(trainer, "lm_name", file),
        "ctx_len": count(buffer, "ctx_len", file) if buffer.get("ctx_len") is not None else None,
    }
    origin = provenance("dictionary_learning", whole, whole.get("saemill"), file, **known)
    config = SaeConfig(d_in=d_in, num_latents=num_latents, k=k, provenance=origin)
    W_enc, b_enc, W_dec, b_dec = weights.values()
    return Parts(config, W_enc, b_enc, W_dec.T.contiguous(), b_dec)


def _state(file: Path) -> dict[str, Tensor]:
    """Read the tensors of an `ae.pt`."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DiskError(
            durable.explained(error, file) or f"{file} cannot be read: {error.strerror}"
        ) from error
    except Exception as error:  # a pickle that is cut off or changed may raise anything
        raise StoreError(f"{file} holds no dict of tensors: {first_line(error)}") from error
    if isinstance(state, dict) and "ae" in state:
        raise ConfigError(
            f"{file} must hold a finished SAE, got a backup in mid-training ({', '.join(map(str, state))}), "
            "whose biases may be in other units; use the ae.pt that the training's end writes"
        )
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise StoreError(f"{file} must hold a dict of tensors, got {type(state).__name__}")
    return state


def _hook_name(submodule_name: str | None) -> str | None:
    """Translate a submodule's name, written as dictionary_learning's demo writes it, to TransformerLens'
    name."""
    match = re.fullmatch(r"(resid_post|mlp_out|attn_out)_layer_(\d+)", submodule_name or "")
    return f"blocks.{match[2]}.hook_{match[1]}" if match else None


def write(parts: Parts, folder: Path, hook: Hook | None) -> None:
    """Write `config.json` and `ae.pt`."""
    weights = {
        "encoder.weight": parts.W_enc,
        "encoder.bias": parts.b_enc,
        "decoder.weight": parts.W_dec.T,
        "b_dec": parts.b_dec,
    }
    state = {name: w.detach().cpu().contiguous() for name, w in weights.items()}
    state |= {"k": torch.tensor(parts.config.k, dtype=torch.int32), "threshold": torch.tensor(-1.0)}
    folder.mkdir(parents=True, exist_ok=True)
    with durable.replacing(folder / WEIGHTS) as partial, partial.open("wb") as opened:
        torch.save(state, opened)  # to an opened file, whose errors tell of a full disk
    durable.write_json(folder / "config.json", _config(parts, hook))


def _config(parts: Parts, hook: Hook | None) -> dict[str, Any]:
    origin = parts.config.provenance
    site = origin.get("site")
    trainer = {
        "trainer_class": "TopKTrainer",
        "dict_class": CLASS,
        "activation_dim": parts.config.d_in,
        "dict_size": parts.config.num_latents,
        "k": parts.config.k,
        "layer": hook.layer if hook else layer_of(site or ""),
        "lm_name": origin.get("model"),
        "submodule_name": f"{hook.kind}_layer_{hook.layer}" if hook else site,
    }
    buffer = {"d_submodule": parts.config.d_in, "io": "out", "ctx_len": origin.get("ctx_len")}
    return {"trainer": trainer, "buffer": buffer, "saemill": origin}
