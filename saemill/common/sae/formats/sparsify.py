"""sparsify's layout (eai-sparsify 1.3), and saemill's own: `cfg.json`, `sae.safetensors`.

    encoder.weight [F, D]   encoder.bias [F]   W_dec [F, D]   b_dec [D]   threshold float32 [F]
    W_skip [D, D] (skip_connection)

Its encoder is the one of `Sae`. `num_latents` 0 stands for d_in × expansion_factor. What saemill wrote
carries a seal (`seal`), which is checked. With `transcode` it predicts a module's output from its input.

`activation` is "topk" or "groupmax". Three things are saemill's own. `activation` "jumprelu", with
`threshold` and no `k`: sparsify has no thresholds, and its loader refuses a tensor that it does not know.
`d_out`, of a transcoder: its E, which may not be D. `joined`, of a crosscoder: the sites whose vectors follow
each other in its input, with widths and scales.
"""

from dataclasses import asdict
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
    flag,
    joined,
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
REFUSED: tuple[tuple[str, Any, Any, str], ...] = (("signed", False, False, "its latents may be negative"),)
SKIP = "it adds a linear map of its input (W_skip) to the reconstruction of the same"
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
    activation = one_of(cfg, "activation", ("topk", "groupmax", JUMPRELU), "topk", file)
    has_threshold = activation == JUMPRELU
    is_transcoder, has_skip = flag(cfg, "transcode", False, file), flag(cfg, "skip_connection", False, file)
    if not is_transcoder:
        expect(cfg, "skip_connection", False, False, SKIP, file)
    d_out = count(cfg, "d_out", file) if is_transcoder and "d_out" in cfg else d_in
    config = SaeConfig(
        d_in=d_in,
        d_out=d_out if is_transcoder else None,
        num_latents=num_latents,
        k=None if has_threshold else count(cfg, "k", file),
        provenance=provenance("sparsify", cfg, own, file, **_known(folder, is_transcoder)),
        joined=joined(cfg, file),
        **traits(cfg, activation, file),
    )
    weights = read_tensors(folder / WEIGHTS)
    shapes = {"encoder.weight": (num_latents, d_in), "encoder.bias": (num_latents,)}
    shapes |= {"W_dec": (num_latents, d_out), "b_dec": (d_out,)}
    shapes |= {"W_skip": (d_out, d_in)} if has_skip else {}
    optional = ("threshold",) if has_threshold else ()
    W_enc, b_enc, W_dec, b_dec, *skip = check_weights(folder / WEIGHTS, weights, shapes, optional).values()
    threshold = None
    if has_threshold:
        threshold = check_shape(folder / WEIGHTS, weights, "threshold", (num_latents,))
    return Parts(config, W_enc, b_enc, W_dec, b_dec, threshold, *skip)


def check(folder: Path) -> None:
    """Refuse an SAE that saemill saved and whose files are not as they were written.

    Raises:
        StoreError: they are not, or one is missing.
    """
    if not (folder / WEIGHTS).is_file():
        raise StoreError(f"{folder / WEIGHTS}: file is missing. {seal.REPAIR}")
    seal.checked(read_config(folder / "cfg.json"), folder, folder / WEIGHTS)


def _known(folder: Path, is_transcoder: bool) -> dict[str, Any]:
    """Collect what sparsify stores beside the SAE: its folder's name is the site, of a transcoder the one
    that it predicts; the run's config is above it."""
    site = folder.name if layer_of(folder.name) is not None else None
    file = folder.parent / "config.json"
    run = read_config(file) if site and file.is_file() else {}
    known = {"target_site" if is_transcoder else "site": site} | {
        name: text(run, name, file) for name in ("model", "dataset")
    }
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
    optional = {"threshold": parts.threshold, "W_skip": parts.W_skip}
    weights |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    folder.mkdir(parents=True, exist_ok=True)
    with durable.replacing(folder / WEIGHTS, sum(w.nbytes for w in weights.values())) as partial:
        save_file(apart(weights), partial, seal.MADE_BY)
        n_bytes, xxh3 = partial.stat().st_size, durable.hash_file(partial)
    config = parts.config
    norms = parts.W_dec.detach().float().norm(dim=1)
    by_k = "groupmax" if config.architecture == "groupmax" else "topk"
    activation = by_k if parts.threshold is None else JUMPRELU
    cfg = {
        "activation": activation,
        "expansion_factor": config.num_latents / config.d_in,
        "normalize_decoder": bool(torch.allclose(norms, torch.ones_like(norms), atol=1e-2)),
        "num_latents": config.num_latents,
        **({} if config.k is None else {"k": config.k}),
        "multi_topk": False,
        "skip_connection": parts.W_skip is not None,
        "transcode": config.d_out is not None,
        "d_in": config.d_in,
        **({} if config.d_out is None else {"d_out": config.d_out}),
        **({"joined": [asdict(part) for part in config.joined]} if config.joined else {}),
        **noted(config, activation),
        "saemill": config.provenance,
    }
    sealed = seal.seal(cfg, n_bytes, xxh3)
    durable.write_json(folder / "cfg.json", sealed)
    return str(sealed["saemill"][seal.KEY][CHECKSUM])
