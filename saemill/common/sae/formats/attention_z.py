"""Kissane and Krzyzanowski's SAEs of GPT-2's attention heads: a pickle, and a config beside it of the same
name with `_cfg.json` in place of `.pt`.

    W_enc [D, F]   b_enc [F]   W_dec [F, D]   b_dec [D], subtracted before encoding

A ReLU of the heads' outputs side by side, before the output projection.
"""

from pathlib import Path

import torch

from saemill.common.sae.formats.checks import check_weights, count, provenance, read_config, text
from saemill.common.sae.formats.tensor_files import is_pickle, read_pickle, tensors_of
from saemill.common.sae.parts import Parts, SaeConfig

NAME = "attention-z"
CONFIG = "_cfg.json"
"""What the config's name ends with."""


def config_of(name: str) -> str:
    """Name the config beside a file, by its name."""
    return f"{name.removesuffix('.pt')}{CONFIG}"


def holds(place: Path) -> bool:
    """Tell whether a file is of this format, by the names of it and of its config."""
    return is_pickle(place) and _config(place).is_file()


def _config(file: Path) -> Path:
    return file.with_name(config_of(file.name))


def read(file: Path) -> Parts:
    """Read the SAE of a file, on the CPU.

    Raises:
        StoreError, ConfigError: as `formats.load`.
    """
    cfg_file = _config(file)
    cfg = read_config(cfg_file)
    d, f = count(cfg, "act_size", cfg_file), count(cfg, "dict_size", cfg_file)
    shapes = {"W_enc": (d, f), "b_enc": (f,), "W_dec": (f, d), "b_dec": (d,)}
    W_enc, b_enc, W_dec, b_dec = check_weights(file, tensors_of(file, read_pickle(file)), shapes).values()
    known = {"model": "gpt2", "hook_name": text(cfg, "act_name", cfg_file)}
    config = SaeConfig(
        d_in=d,
        num_latents=f,
        k=None,
        architecture="relu",
        provenance=provenance(NAME, cfg, None, cfg_file, **known),
    )
    return Parts(config, W_enc.T.contiguous(), b_enc, W_dec, b_dec, torch.zeros(f))
