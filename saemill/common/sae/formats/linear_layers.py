"""SAEs as one pickle with an encoder and a decoder layer and no config, as Goodfire's and qresearch's are,
`Llama-3.1-8B-Instruct-SAE-l19.pth`.

    encoder_linear.weight [F, D]   encoder_linear.bias [F]
    decoder_linear.weight [D, F]   decoder_linear.bias [D]   or encoder.…, decoder.…

A ReLU after the encoder; the decoder's bias is not subtracted before it. The file's name tells model and
layer.
"""

import re
from pathlib import Path
from typing import Any

import torch

from saemill.common.sae.formats.checks import check_weights, provenance
from saemill.common.sae.formats.folding import Tensors, centred
from saemill.common.sae.formats.tensor_files import names_in_pickle, read_pickle, sizes, tensors_of
from saemill.common.sae.parts import Parts, SaeConfig

NAME = "linear-layers"
LAYERS = (("encoder_linear", "decoder_linear"), ("encoder", "decoder"))
"""Names of the layers."""
OWNERS = {"DeepSeek-R1-Distill-Llama-8B": "deepseek-ai", "Llama": "meta-llama"}
"""Owners of the models on the hub, by what their names begin with."""


def holds(place: Path) -> bool:
    """Tell whether a file is of this format, by the names of its tensors."""
    return names_in_pickle(place) in [_names(*layers) for layers in LAYERS]


def _names(encoder: str, decoder: str) -> set[str]:
    return {f"{layer}.{part}" for layer in (encoder, decoder) for part in ("weight", "bias")}


def read(file: Path) -> Parts:
    """Read the SAE of a file, on the CPU.

    Raises:
        StoreError, ConfigError: as `formats.load`.
    """
    found = tensors_of(file, read_pickle(file))
    encoder, decoder = next((layers for layers in LAYERS if f"{layers[0]}.weight" in found), LAYERS[0])
    f, d = sizes(file, found, f"{encoder}.weight", "[F, D]")
    shapes = {f"{encoder}.weight": (f, d), f"{encoder}.bias": (f,)}
    shapes |= {f"{decoder}.weight": (d, f), f"{decoder}.bias": (d,)}
    W_enc, b_enc, W_dec, b_dec = check_weights(file, found, shapes).values()
    config = SaeConfig(
        d_in=d,
        num_latents=f,
        k=None,
        architecture="relu",
        provenance=provenance(NAME, {"file": file.name}, None, file, **_known(file)),
    )
    return Parts(config, *centred(Tensors(W_enc, b_enc, W_dec.T.contiguous(), b_dec, torch.zeros(f))))


def _known(file: Path) -> dict[str, Any]:
    """Derive model and hook from the file's name, as far as it tells them."""
    match = re.fullmatch(r"(.+)-SAE-l(\d+)", file.stem)
    if match is None:
        return {}
    name, layer = match.groups()
    owner = next((owner for begin, owner in OWNERS.items() if name.startswith(begin)), None)
    return {"model": f"{owner}/{name}" if owner else name, "hook_name": f"blocks.{layer}.hook_resid_post"}
