"""OpenAI's autoencoders of GPT-2: one pickle for each, `resid_post_mlp_v5_32k/autoencoders/8.pt`.

    pre_bias [D]   encoder.weight [F, D]   latent_bias [F]   decoder.weight [D, F]
    activation "TopK" or "ReLU"   activation_state_dict {k, postact_fn}
    stats_last_nonzero, latents_activation_frequency, latents_mean_square [F]

pre_bias is subtracted before encoding. With TopK each activation vector goes through a layer norm first, and
the reconstruction back through it. The folders' names tell the site.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saemill.common.errors import ConfigError
from saemill.common.sae.formats.checks import check_weights, count, group, one_of, provenance
from saemill.common.sae.formats.tensor_files import names_in_pickle, read_pickle, sizes
from saemill.common.sae.norms import LAYER_NORM
from saemill.common.sae.parts import Parts, SaeConfig

NAME = "openai"
KEYS = {"pre_bias", "latent_bias"}
"""Names of tensors that no other format has."""
STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
SETTINGS = ("activation", "activation_state_dict")
SITES = {"resid_delta_attn": "attn_out", "resid_delta_mlp": "mlp_out", "resid_post_mlp": "resid_post",
         "resid_post_attn": "resid_mid"}  # fmt: skip
"""TransformerLens' hooks by the names of OpenAI's folders."""


def holds(place: Path) -> bool:
    """Tell whether a file is of this format, by the names of its tensors."""
    return names_in_pickle(place) >= KEYS


def read(file: Path) -> Parts:
    """Read the autoencoder of a file, on the CPU.

    Raises:
        StoreError, ConfigError: as `formats.load`.
    """
    found = read_pickle(file)
    settings = {name: found.pop(name) for name in SETTINGS if name in found}
    f, d = sizes(file, found, "encoder.weight", "[F, D]")
    shapes = {"encoder.weight": (f, d), "latent_bias": (f,), "decoder.weight": (d, f), "pre_bias": (d,)}
    if "decoder.weight" not in found:
        raise ConfigError(f"{file}: decoder.weight must be there; a decoder tied to the encoder has none")
    W_enc, b_enc, W_dec, b_dec = check_weights(file, found, shapes, optional=STATISTICS).values()
    is_topk = one_of(settings, "activation", ("TopK", "ReLU"), "ReLU", file) == "TopK"
    state = group(settings, "activation_state_dict", file)
    if is_topk:
        one_of(state, "postact_fn", ("ReLU",), "", file)
    k = state.get("k")
    config = SaeConfig(
        d_in=d,
        num_latents=f,
        k=count({"k": k.item() if isinstance(k, Tensor) else k}, "k", file) if is_topk else None,
        architecture="topk" if is_topk else "relu",
        norm=LAYER_NORM if is_topk else None,
        provenance=provenance(
            NAME, {"path": "/".join(file.absolute().parts[-4:])}, None, file, **_known(file)
        ),
    )
    return Parts(config, W_enc, b_enc, W_dec.T.contiguous(), b_dec, None if is_topk else torch.zeros(f))


def _known(file: Path) -> dict[str, Any]:
    """Derive model and hook from the path, as far as it tells them."""
    match = re.search(r"gpt2-small/(\w+?)(?:_v\d\w*)?/autoencoders/(\d+)\.pt$", file.absolute().as_posix())
    if match is None:
        return {}
    place, layer = match.groups()
    if place == "mlp_post_act":
        return {"model": "gpt2", "hook_name": f"blocks.{layer}.mlp.hook_post"}
    return {"model": "gpt2", "hook_name": f"blocks.{layer}.hook_{SITES[place]}"} if place in SITES else {}
