"""The classes of dictionary_learning: the tensors of each, and the SAE that computes the same.

    AutoEncoderTopK          encoder.weight [F, D]   encoder.bias [F]   decoder.weight [D, F]   b_dec [D]
    BatchTopKSAE             k int32 []   threshold []
    MatryoshkaBatchTopKSAE   W_enc [D, F]   b_enc [F]   W_dec [F, D]   b_dec [D]   k   threshold
                             group_sizes int64 [number of groups]
    JumpReluAutoEncoder      W_enc   b_enc   W_dec   b_dec (not subtracted before encoding)   threshold [F]
    AutoEncoder, a ReLU      encoder.weight   encoder.bias   decoder.weight   bias
    AutoEncoderNew, a ReLU   encoder.weight   encoder.bias   decoder.weight   decoder.bias (not subtracted)
    GatedAutoEncoder         encoder.weight   decoder.weight   decoder_bias   r_mag, gate_bias, mag_bias [F]

`threshold` of BatchTopK is the running mean of the smallest active latent, and -1 while it is unset. That of
an `AutoEncoderTopK` serves `encode(x, use_threshold=True)` alone: it is dropped when read, and written as -1.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from saemill.common.errors import ConfigError, StoreError
from saemill.common.sae.formats.checks import check_shape, check_weights
from saemill.common.sae.formats.folding import Tensors, are_unit, centred, gated, non_negative, unit_rows
from saemill.common.sae.parts import Parts

TOPK, BATCHTOPK, MATRYOSHKA = "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"
JUMPRELU, RELU, GATED = "JumpReluAutoEncoder", "AutoEncoder", "GatedAutoEncoder"
NEW = "AutoEncoderNew"
ARCHITECTURES = {
    TOPK: "topk",
    BATCHTOPK: "batchtopk",
    MATRYOSHKA: "matryoshka",
    JUMPRELU: "jumprelu",
    RELU: "relu",
    NEW: "relu",
    GATED: "gated",
}
"""`SaeConfig.architecture` of each class."""
WITH_K = (TOPK, BATCHTOPK, MATRYOSHKA)
PLAIN = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
LAYERS = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "b_dec"}
TENSORS = {
    TOPK: LAYERS,
    BATCHTOPK: LAYERS,
    MATRYOSHKA: PLAIN,
    JUMPRELU: PLAIN,
    RELU: LAYERS | {"b_dec": "bias"},
    NEW: LAYERS | {"b_dec": "decoder.bias"},
    GATED: LAYERS | {"b_enc": "mag_bias", "b_dec": "decoder_bias"},
}
"""Names of an SAE's tensors in the file. What layers call a weight is the transpose of what `PLAIN` does."""
BESIDE = {
    TOPK: ("k", "threshold"),
    BATCHTOPK: ("k", "threshold"),
    MATRYOSHKA: ("k", "threshold", "group_sizes"),
    JUMPRELU: ("threshold",),
    RELU: (),
    NEW: (),
    GATED: ("gate_bias", "r_mag"),
}
"""Names of the tensors beside these."""
IN_UNITS = {"b_enc", "b_dec", "bias", "encoder.bias", "decoder.bias", "decoder_bias", "gate_bias", "mag_bias",
            "threshold"}  # fmt: skip
"""Names of the tensors in units of activations: biases and thresholds; an unset one stays below 0."""


def read(file: Path, state: Mapping[str, Tensor], kind: str, d: int, f: int) -> Tensors:
    """Check the tensors of a class and fold them into those of the SAE that computes the same.

    Args:
        file: what messages begin with.
        state: tensors by the class's names.
        kind: the class.
        d, f: the width of activations and the number of latents, by the config.

    Raises:
        StoreError: tensors are missing or do not fit.
        ConfigError: there are more than the class has, or its threshold is unset.
    """
    names, layers = TENSORS[kind], TENSORS[kind]["W_enc"] == LAYERS["W_enc"]
    wide, deep = ((f, d), (d, f)) if layers else ((d, f), (f, d))
    shapes = {names["W_enc"]: wide, names["b_enc"]: (f,), names["W_dec"]: deep, names["b_dec"]: (d,)}
    found = check_weights(file, state, shapes, optional=BESIDE[kind])
    W_enc, b_enc, W_dec, b_dec = found.values()
    dtype = W_enc.dtype
    W_enc, W_dec = (W_enc, W_dec.T) if layers else (W_enc.T, W_dec)
    threshold: Tensor | None = None
    if kind in (BATCHTOPK, MATRYOSHKA):
        threshold = _set(file, check_shape(file, state, "threshold", ())).float().expand(f)
    elif kind == JUMPRELU:
        threshold = check_shape(file, state, "threshold", (f,))
    elif kind in (RELU, NEW):
        threshold = torch.zeros(f)
        if kind == RELU and not are_unit(W_dec):  # its own loader normalises them
            W_enc, b_enc, W_dec = unit_rows(W_enc.double(), b_enc.double(), W_dec.double())
    elif kind == GATED:
        gate, r_mag = (check_shape(file, state, name, (f,)).double() for name in BESIDE[GATED])
        W_enc, b_enc, threshold = gated(W_enc.double(), gate, b_enc.double(), r_mag)
    W_enc, b_enc, W_dec = (weights.to(dtype).contiguous() for weights in (W_enc, b_enc, W_dec))
    threshold = None if threshold is None else non_negative(threshold)
    tensors = Tensors(W_enc, b_enc, W_dec, b_dec, threshold)
    return centred(tensors) if kind in (JUMPRELU, NEW) else tensors


def in_own_units(state: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Bring an SAE in training, which sees activations divided by a factor, to the activations' own units."""
    return {name: tensor * factor if name in IN_UNITS else tensor for name, tensor in state.items()}


def _set(file: Path, threshold: Tensor) -> Tensor:
    """Return the threshold of BatchTopK, if training set it."""
    if threshold < 0:
        raise ConfigError(
            f"{file}: threshold must be 0 or more, got {threshold.item():g}, which means unset: without it "
            "the latents are chosen by batch. Train beyond threshold_start_step"
        )
    return threshold


def prefixes(file: Path, state: Mapping[str, Tensor], f: int) -> tuple[int, ...]:
    """Read the prefixes of a Matryoshka SAE, which its file holds as sizes of groups."""
    sizes = state.get("group_sizes")
    if sizes is None or sizes.dim() != 1 or sizes.dtype not in (torch.int64, torch.int32) or len(sizes) > f:
        raise StoreError(f"{file}: group_sizes must be whole numbers, one per group, got {sizes!r:.80}")
    if bool((sizes < 1).any()) or bool((sizes > f).any()) or int(sizes.sum()) != f:
        raise StoreError(
            f"{file}: group_sizes must be positive, and {f} in sum by the config, got {sizes.tolist()}"
        )
    return tuple(sizes.cumsum(0).tolist())


def write(parts: Parts, trained_k: int | None) -> tuple[str, dict[str, Tensor]]:
    """Choose the class that computes the same as an SAE, and make its tensors.

    Args:
        trained_k: mean number of active latents that an SAE with thresholds was trained for, if it is known;
            the classes of BatchTopK hold it.
    """
    config, threshold = parts.config, parts.threshold
    kind = _class_of(parts, trained_k)
    names, layers = TENSORS[kind], TENSORS[kind]["W_enc"] == LAYERS["W_enc"]
    b_enc = parts.b_enc
    if kind == JUMPRELU:
        b_enc = (b_enc.double() - parts.W_enc.double() @ parts.b_dec.double()).to(b_enc.dtype)
    W_enc, W_dec = (parts.W_enc, parts.W_dec.T) if layers else (parts.W_enc.T, parts.W_dec)
    weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": parts.b_dec}
    state = {names[name]: w.detach().cpu().contiguous() for name, w in weights.items()}
    k = config.k if kind == TOPK else trained_k
    beside = {
        "k": torch.tensor(k or 0, dtype=torch.int32),
        "threshold": torch.tensor(-1.0),
        "group_sizes": torch.tensor([0, *config.prefixes]).diff(),
    }
    if threshold is not None:
        own = threshold.detach().cpu().contiguous()
        beside["threshold"] = own if kind == JUMPRELU else own[0].clone()
    return kind, state | {name: beside[name] for name in BESIDE[kind]}


def _class_of(parts: Parts, trained_k: int | None) -> str:
    """Choose the class of an SAE: one that holds all of it, or JumpReLU's, which computes the same."""
    architecture, threshold = parts.config.architecture, parts.threshold
    if threshold is None:
        return TOPK
    is_one = trained_k is not None and bool((threshold == threshold[0]).all())
    if architecture in ("batchtopk", "matryoshka") and is_one:
        return BATCHTOPK if architecture == "batchtopk" else MATRYOSHKA
    # The loader of the other class normalises decoder rows, and so scales the codes.
    return RELU if architecture == "relu" and are_unit(parts.W_dec) else JUMPRELU
