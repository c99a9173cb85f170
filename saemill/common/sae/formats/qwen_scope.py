"""Qwen Scope: one pickle for each layer, `SAE-Res-Qwen3-1.7B-Base-W32K-L0_50/layer0.sae.pt`.

    W_enc [F, D]   b_enc [F]   W_dec [D, F]   b_dec [D]

A TopK SAE that does not subtract b_dec before encoding. Its k is in the name of the repository alone.
"""

import re
from pathlib import Path

from saemill.common.errors import ConfigError
from saemill.common.sae.formats.checks import check_weights, count, provenance
from saemill.common.sae.formats.folding import Tensors, centred
from saemill.common.sae.formats.tensor_files import is_pickle, read_pickle, sizes, tensors_of
from saemill.common.sae.parts import Parts, SaeConfig

NAME = "qwen-scope"
SUFFIX = ".sae.pt"
"""What names of files end with."""


def holds(place: Path) -> bool:
    """Tell whether a file is of this format, by its name."""
    return place.name.endswith(SUFFIX) and is_pickle(place)


def read(file: Path) -> Parts:
    """Read the SAE of a file, on the CPU.

    Raises:
        StoreError, ConfigError: as `formats.load`.
    """
    repository = re.search(r"SAE-Res-([^/]+)-W\d+K-L0_(\d+)", file.absolute().as_posix())
    if repository is None:
        raise ConfigError(
            f"{file}: the SAE's k is in the name of its repository alone; put the file into a folder of that "
            "name, as SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
        )
    name, k = repository.groups()
    found = tensors_of(file, read_pickle(file))
    f, d = sizes(file, found, "W_enc", "[F, D]")
    shapes = {"W_enc": (f, d), "b_enc": (f,), "W_dec": (d, f), "b_dec": (d,)}
    W_enc, b_enc, W_dec, b_dec = check_weights(file, found, shapes).values()
    layer = re.fullmatch(r"layer(\d+)", file.name.removesuffix(SUFFIX))
    config = SaeConfig(
        d_in=d,
        num_latents=f,
        k=count({"k": int(k)}, "k", file),
        provenance=provenance(
            NAME,
            {"path": f"{repository[0]}/{file.name}"},
            None,
            file,
            model=f"Qwen/{name}",
            hook_name=f"blocks.{layer[1]}.hook_resid_post" if layer else None,
        ),
    )
    return Parts(config, *centred(Tensors(W_enc, b_enc, W_dec.T.contiguous(), b_dec)))
