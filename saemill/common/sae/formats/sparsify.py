"""sparsify's layout (eai-sparsify 1.3), and saemill's own: `cfg.json`, `sae.safetensors`.

    encoder.weight [F, D]   encoder.bias [F]   W_dec [F, D]   b_dec [D]   threshold float32 [F]
    W_skip [D, D] (skip_connection)

Its encoder is the one of `Sae`. `num_latents` 0 stands for d_in × expansion_factor. What saemill wrote
carries a seal (`seal`), which is checked. With `transcode` it predicts a module's output from its input.
Before version 1.0 the run's config alone said so, and transcoders subtracted b_dec, which is folded here.

`activation` is "topk" or "groupmax"; in older versions `signed` stood for the k largest by absolute value,
with their signs. Six things are saemill's own. `activation` "jumprelu", with `threshold` and no `k`: sparsify
has no thresholds, and its loader refuses a tensor that it does not know. `activation` "abs-topk", which it
does not know either.
`d_out`, of a transcoder: its E, which may not be D. `norm`, whose name stands before the activation's as
well, "layer_norm topk", so that sparsify refuses it. `joined`, of a crosscoder: the sites whose vectors
follow each other in its input, with widths and scales. `predicted`, of a cross-layer transcoder: those of
what it predicts; its weights are shaped as `layers` tells.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from saemill.common import durable
from saemill.common.errors import ConfigError, StoreError
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
    text,
    traits,
)
from saemill.common.sae.formats.folding import Tensors
from saemill.common.sae.formats.hooks import layer_of
from saemill.common.sae.formats.tensor_files import read_tensors
from saemill.common.sae.parts import Parts, SaeConfig, apart

WEIGHTS = "sae.safetensors"
NAME = "sparsify"
BESIDE = ("cfg.json", "../config.json")
"""Files that may be there beside the weights."""
RUN = "config.json"
"""Config of the run, in the folder above."""
JUMPRELU = "jumprelu"
ABS_TOPK = "abs-topk"
SKIP = "it adds a linear map of its input (W_skip) to the reconstruction of the same"
"""What `skip_connection` of an SAE means."""


def holds(place: Path) -> bool:
    """Tell whether a folder is of this format, by the names of its files."""
    return (place / WEIGHTS).is_file()


def read(folder: Path) -> Parts:
    """Read the SAE of a folder, on the CPU, in the dtype of its file.

    Raises:
        StoreError, ConfigError: as `formats.load`.
    """
    file = folder / "cfg.json"
    cfg = read_config(file)
    own = seal.checked(cfg, folder, folder / WEIGHTS)
    own = cfg.get("saemill") if own is None else own
    d_in, num_latents = _sizes(cfg, file)
    norm = text(cfg, "norm", file)
    activation = _activation(cfg, norm, file)
    has_threshold = activation == JUMPRELU
    is_old = "transcode" not in cfg and _run(folder).get("transcode") is True
    is_transcoder, has_skip = (
        is_old or flag(cfg, "transcode", False, file),
        flag(cfg, "skip_connection", False, file),
    )
    if not is_transcoder:
        expect(cfg, "skip_connection", False, False, SKIP, file)
    d_out = count(cfg, "d_out", file) if is_transcoder and "d_out" in cfg else d_in
    config = SaeConfig(
        d_in=d_in,
        d_out=d_out if is_transcoder else None,
        num_latents=num_latents,
        k=None if has_threshold else count(cfg, "k", file),
        provenance=provenance("sparsify", cfg, own, file, **_known(folder, is_transcoder)),
        joined=joined(cfg, "joined", file),
        predicted=joined(cfg, "predicted", file),
        norm=norm,
        **traits(cfg, activation, file),
    )
    tensors = _tensors(folder / WEIGHTS, config, has_skip)
    if is_old:
        b_enc = tensors.b_enc.double() - tensors.W_enc.double() @ tensors.b_dec.double()
        tensors = tensors._replace(b_enc=b_enc.to(tensors.b_enc.dtype))
    return Parts(config, *tensors)


def _tensors(file: Path, config: SaeConfig, has_skip: bool) -> Tensors:
    """Read the tensors of an SAE."""
    weights = read_tensors(file)
    f, d, e = config.num_latents, config.d_in, config.d_out or config.d_in
    own = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}
    shapes = {own.get(name, name): shape for name, shape in config.shapes.items()}
    shapes |= {"W_skip": (e, d // config.n_layers)} if has_skip else {}
    optional = ("threshold",) if config.k is None else ()
    W_enc, b_enc, W_dec, b_dec, *skip = check_weights(file, weights, shapes, optional).values()
    threshold = check_shape(file, weights, "threshold", (f,)) if config.k is None else None
    return Tensors(W_enc, b_enc, W_dec, b_dec, threshold, skip[0] if skip else None)


def _sizes(cfg: dict[str, Any], file: Path) -> tuple[int, int]:
    """Read D and F."""
    d_in = count(cfg, "d_in", file)
    if cfg.get("num_latents"):
        return d_in, count(cfg, "num_latents", file)
    return d_in, d_in * count(cfg, "expansion_factor", file)


def _activation(cfg: dict[str, Any], norm: str | None, file: Path) -> str:
    """Read the name of the activation, after that of a norm where there is one."""
    before = f"{norm} " if norm else ""
    known = tuple(f"{before}{name}" for name in ("topk", "groupmax", ABS_TOPK, JUMPRELU))
    name = one_of(cfg, "activation", known, "topk", file).removeprefix(before)
    if not flag(cfg, "signed", False, file):
        return name
    if name != "topk":
        raise ConfigError(f"{file}: signed must be False of {name}, got True: its latents may be negative")
    return ABS_TOPK


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
    file = folder.parent / RUN
    run = _run(folder) if site else {}
    known = {"target_site" if is_transcoder else "site": site} | {
        name: text(run, name, file) for name in ("model", "dataset")
    }
    return known | {"ctx_len": count(run, "ctx_len", file) if "ctx_len" in run else None}


def _run(folder: Path) -> dict[str, Any]:
    """Read the config of the run above an SAE; nothing where there is none."""
    return read_config(folder.parent / RUN) if (folder.parent / RUN).is_file() else {}


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
    by_k = config.architecture if config.architecture in ("groupmax", ABS_TOPK) else "topk"
    activation = by_k if parts.threshold is None else JUMPRELU
    cfg = {
        "activation": activation if config.norm is None else f"{config.norm} {activation}",
        "expansion_factor": config.num_latents / config.d_in,
        "normalize_decoder": bool(torch.allclose(norms, torch.ones_like(norms), atol=1e-2)),
        "num_latents": config.num_latents,
        **({} if config.k is None else {"k": config.k}),
        "multi_topk": False,
        "skip_connection": parts.W_skip is not None,
        "transcode": config.d_out is not None,
        "d_in": config.d_in,
        **({} if config.d_out is None else {"d_out": config.d_out}),
        **({} if config.norm is None else {"norm": config.norm}),
        **({"joined": [asdict(part) for part in config.joined]} if config.joined else {}),
        **({"predicted": [asdict(part) for part in config.predicted]} if config.predicted else {}),
        **noted(config, activation),
        "saemill": config.provenance,
    }
    sealed = seal.seal(cfg, n_bytes, xxh3)
    durable.write_json(folder / "cfg.json", sealed)
    return str(sealed["saemill"][seal.KEY][CHECKSUM])
