"""Gemma Scope: `params.npz` in a folder for each SAE,
`gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71`.

    W_enc [D, F]   b_enc [F]   W_dec [F, D]   b_dec [D]   threshold [F]

b_dec is not subtracted before encoding. Which model and site it is of, the path alone tells: the repository's
name, `res`, `mlp`, `att` or `transcoders` at its end, and the layer's folder. The SAE of a path without that
name is read as one whose site is not known.
"""

import re
from pathlib import Path
from typing import Any

from saemill.common.errors import ConfigError
from saemill.common.sae.formats.checks import check_shape, check_weights, provenance
from saemill.common.sae.formats.folding import Tensors, centred, non_negative
from saemill.common.sae.formats.tensor_files import read_npz, sizes, without_ones
from saemill.common.sae.parts import Parts, SaeConfig

NAME = "gemma-scope"
WEIGHTS = "params.npz"
REPOSITORY = r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)"
HOOKS = {
    "res": ("hook_resid_post", None),
    "mlp": ("hook_mlp_out", None),
    "att": ("attn.hook_z", None),
    "transcoders": ("ln2.hook_normalized", "hook_mlp_out"),
}
"""Hook within the block, and the one that is predicted, by the end of the repository's name."""


def holds(place: Path) -> bool:
    """Tell whether a folder is of this format, by the names of its files."""
    return (place / WEIGHTS).is_file()


def read(folder: Path) -> Parts:
    """Read the SAE of a folder, on the CPU.

    Raises:
        StoreError, ConfigError: as `formats.load`.
    """
    file = folder / WEIGHTS
    found = {_upper(name): array for name, array in without_ones(file, read_npz(file)).items()}
    d, f = sizes(file, found, "W_enc", "[D, F]")
    known = known_of(folder)
    is_transcoder = "hook_name_out" in known
    e = sizes(file, found, "W_dec", "[F, E]")[1] if is_transcoder else d
    shapes = {"W_enc": (d, f), "b_enc": (f,), "W_dec": (f, e), "b_dec": (e,)}
    W_enc, b_enc, W_dec, b_dec = check_weights(file, found, shapes, optional=("threshold",)).values()
    threshold = non_negative(check_shape(file, found, "threshold", (f,)))
    tensors = Tensors(W_enc.T.contiguous(), b_enc, W_dec, b_dec, threshold)
    config = SaeConfig(
        d_in=d,
        d_out=e if is_transcoder else None,
        num_latents=f,
        k=None,
        architecture="jumprelu",
        provenance=provenance(NAME, {"path": _path(folder)}, None, file, **known),
    )
    return Parts(config, *(tensors if is_transcoder else centred(tensors)))


def _upper(name: str) -> str:
    """Write a weight's name as most of the files do."""
    return name.replace("w_", "W_", 1) if name.startswith("w_") else name


def known_of(folder: Path) -> dict[str, Any]:
    """Derive model and hooks from a path, as far as it tells them.

    Raises:
        ConfigError: they are of no site.
    """
    path = str(folder.absolute())
    repository, layer = re.search(REPOSITORY, path), re.search(r"layer_(\d+)", path)
    if repository is None:
        return {}
    size, tuning, kind = repository.groups()
    known: dict[str, Any] = {"model": f"google/gemma-2-{size}{'-it' if tuning == 'it' else ''}"}
    if "/embedding/" in path:
        raise ConfigError(
            f"{folder}: it is an SAE of embeddings before the model multiplies them by √D, a tensor that is "
            "no module's output; whether its b_dec is of these as well, no file tells"
        )
    if layer:
        reads, predicts = HOOKS[kind]
        known["hook_name"] = f"blocks.{layer[1]}.{reads}"
        known |= {"hook_name_out": f"blocks.{layer[1]}.{predicts}"} if predicts else {}
    return known


def _path(folder: Path) -> str:
    """Return the part of a path that the repository names, from its own name on."""
    path = folder.absolute().as_posix()
    found = re.search(REPOSITORY, path)
    return path[found.start() :] if found else folder.name
