"""sparsify's layout (eai-sparsify 1.3), and saemill's own: `cfg.json`, `sae.safetensors`.

    encoder.weight [F, D]   encoder.bias [F]   W_dec [F, D]   b_dec [D]   threshold float32 [F]

Its encoder is the one of `Sae`. `num_latents` 0 stands for d_in × expansion_factor. What saemill wrote
carries a seal (`seal`), which is checked. `activation` "jumprelu", with `threshold` and no `k`, is saemill's
own: sparsify has TopK alone, and its loader refuses a tensor that it does not know.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from saemill.common import durable
from saemill.common.errors import StoreError
from saemill.common.records import CHECKSUM
from saemill.common.sae.formats import seal
from saemill.common.sae.formats.checks import (
    check_shape,
    check_weights,
    count,
    expect,
    noted,
    one_of,
    provenance,
    read_config,
    read_tensors,
    text,
    traits,
)
from saemill.common.sae.formats.hooks import layer_of
from saemill.common.sae.parts import Parts, SaeConfig, apart

WEIGHTS = "sae.safetensors"
JUMPRELU = "jumprelu"
REFUSED: tuple[tuple[str, Any, Any, str], ...] = (
    (
        "transcode",
        False,
        False,
        "it predicts a module's output from its input, with no b_dec before encoding",
    ),
    ("skip_connection", False, False, "it adds a linear map of its input (W_skip) to the reconstruction"),
    ("signed", False, False, "its latents may be negative"),
)
"""Checks of a config: field, the value that can be represented, what its absence means, what others mean."""


def read(folder: Path) -> Parts:
    """Read the SAE of a folder, on the CPU, in the dtype of its file.

    Raises:
        StoreError, ConfigError: as `formats.load`.
    """
    file = folder / "cfg.json"
    cfg = read_config(file)
    own = seal.checked(cfg, folder, folder / WEIGHTS)
    own = cfg.get("saemill") if own is None else own
    for field, wanted, default, why in REFUSED:
        expect(cfg, field, wanted, default, why, file)
    d_in = count(cfg, "d_in", file)
    if cfg.get("num_latents"):
        num_latents = count(cfg, "num_latents", file)
    else:
        num_latents = d_in * count(cfg, "expansion_factor", file)
    activation = one_of(cfg, "activation", ("topk", JUMPRELU), "topk", file)
    has_threshold = activation == JUMPRELU
    config = SaeConfig(
        d_in=d_in,
        num_latents=num_latents,
        k=None if has_threshold else count(cfg, "k", file),
        provenance=provenance("sparsify", cfg, own, file, **_known(folder)),
        **traits(cfg, activation, file),
    )
    weights = read_tensors(folder / WEIGHTS)
    wide, narrow = (num_latents, d_in), (d_in,)
    shapes = {"encoder.weight": wide, "encoder.bias": wide[:1], "W_dec": wide, "b_dec": narrow}
    optional = ("threshold",) if has_threshold else ()
    W_enc, b_enc, W_dec, b_dec = check_weights(folder / WEIGHTS, weights, shapes, optional).values()
    threshold = check_shape(folder / WEIGHTS, weights, "threshold", wide[:1]) if has_threshold else None
    return Parts(config, W_enc, b_enc, W_dec, b_dec, threshold)


def check(folder: Path) -> None:
    """Refuse an SAE that saemill saved and whose files are not as they were written.

    Raises:
        StoreError: they are not, or one is missing.
    """
    if not (folder / WEIGHTS).is_file():
        raise StoreError(f"{folder / WEIGHTS}: file is missing. {seal.REPAIR}")
    seal.checked(read_config(folder / "cfg.json"), folder, folder / WEIGHTS)


def _known(folder: Path) -> dict[str, Any]:
    """Collect what sparsify stores beside the SAE: its folder's name is the site, the run's config is above
    it."""
    site = folder.name if layer_of(folder.name) is not None else None
    file = folder.parent / "config.json"
    run = read_config(file) if site and file.is_file() else {}
    known = {"site": site} | {name: text(run, name, file) for name in ("model", "dataset")}
    return known | {"ctx_len": count(run, "ctx_len", file) if "ctx_len" in run else None}


def write(parts: Parts, folder: Path) -> str:
    """Write `cfg.json` and `sae.safetensors`, whatever the weights are.

    Returns: the config's checksum.
    """
    weights = {
        "encoder.weight": parts.W_enc,
        "encoder.bias": parts.b_enc,
        "W_dec": parts.W_dec,
        "b_dec": parts.b_dec,
    }
    if parts.threshold is not None:
        weights["threshold"] = parts.threshold
    folder.mkdir(parents=True, exist_ok=True)
    with durable.replacing(folder / WEIGHTS, sum(w.nbytes for w in weights.values())) as partial:
        save_file(apart(weights), partial, seal.MADE_BY)
        n_bytes, xxh3 = partial.stat().st_size, durable.hash_file(partial)
    config = parts.config
    norms = parts.W_dec.detach().float().norm(dim=1)
    activation = "topk" if parts.threshold is None else JUMPRELU
    cfg = {
        "activation": activation,
        "expansion_factor": config.num_latents / config.d_in,
        "normalize_decoder": bool(torch.allclose(norms, torch.ones_like(norms), atol=1e-2)),
        "num_latents": config.num_latents,
        **({} if config.k is None else {"k": config.k}),
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": config.d_in,
        **noted(config, activation),
        "saemill": config.provenance,
    }
    sealed = seal.seal(cfg, n_bytes, xxh3)
    durable.write_json(folder / "cfg.json", sealed)
    return str(sealed["saemill"][seal.KEY][CHECKSUM])
