"""The config and tensors of an SAE, as files of any format hold them and `Sae` is made of.

However it was trained, a finished SAE chooses its latents in one of four ways: the k largest of each token
(`k`), the k largest by absolute value, with their signs (`k` of an `abs-topk`), the largest of each of k
groups (`k` of a `groupmax`), or all above a threshold of their own (`threshold`). A ReLU is the threshold 0,
BatchTopK one threshold for all, and the gate of a Gated SAE is a threshold on its magnitude
(`formats.gated`).

A transcoder is an SAE that predicts what another site has from what it reads at its own. A crosscoder is one
that reads and reconstructs several sites at once, side by side in one vector. A cross-layer transcoder is a
transcoder of several layers: `layers` has the shapes of its weights.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saemill.common.errors import ConfigError, SaemillError
from saemill.common.log import counted
from saemill.common.sae import layers
from saemill.common.sae.norms import NORMS
from saemill.common.stores.site_names import abridged

BY_K = ("topk", "abs-topk", "matryoshka", "groupmax")
BY_THRESHOLD = ("batchtopk", "matryoshka", "jumprelu", "relu", "gated")
ARCHITECTURES = tuple(dict.fromkeys(BY_K + BY_THRESHOLD))
CROSS_LAYER = ("topk", "batchtopk", "jumprelu", "relu", "gated")
"""Those that cross-layer transcoders have."""


@dataclass(frozen=True, slots=True)
class Joined:
    """One of the sites that a crosscoder joins, or that a cross-layer transcoder reads or predicts."""

    site: str
    """Name of the site; `with.<site>` of the second of two models."""
    width: int
    """Length of its activation vectors: its share of d_in."""
    scale: float
    """Factor that makes its activations' mean squared distance from their mean its width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaeConfig:
    """Shape and provenance of one SAE."""

    d_in: int
    """Length D of the activation vectors."""
    num_latents: int
    """Number F of latents."""
    k: int | None
    """Most latents active per token; None where each latent has a threshold. Of a cross-layer transcoder
    those of all layers, of each an equal number."""
    provenance: dict[str, Any]
    """Origin of the SAE: site, model, training settings, versions."""
    architecture: str = "topk"
    """Name of what it was trained as, one of `ARCHITECTURES`."""
    prefixes: tuple[int, ...] = ()
    """Numbers of latents that are each an SAE, ascending, of a Matryoshka SAE; the last is num_latents."""
    ks: tuple[int, ...] = ()
    """Numbers of active latents that it was trained for, ascending, where they are several; the last is k."""
    d_out: int | None = None
    """Length E of the vectors that a transcoder predicts from those that it reads; None of an SAE."""
    joined: tuple[Joined, ...] = ()
    """Sites that a crosscoder or a cross-layer transcoder reads, in the order in which their vectors follow
    each other; empty of an SAE."""
    predicted: tuple[Joined, ...] = ()
    """Sites that a cross-layer transcoder predicts: in the place of each of `joined` the one that its
    latents are the first to write to. Empty of others."""
    norm: str | None = None
    """Norm that each vector goes through before it is encoded, one of `norms.NORMS`; None of most SAEs."""

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ConfigError(
                f"architecture must be one of {', '.join(ARCHITECTURES)}, got {self.architecture!r:.80}"
            )
        if self.k is None and self.architecture not in BY_THRESHOLD:
            raise ConfigError(f"k must be in 1..num_latents ({self.num_latents}) of a TopK SAE, got None")
        if self.k is not None and self.architecture not in BY_K:
            raise ConfigError(
                f"k must be None where latents have thresholds ({self.architecture}), got {self.k}"
            )
        if self.k is not None and not 1 <= self.k <= self.num_latents:
            raise ConfigError(f"k must be in 1..num_latents ({self.num_latents}), got {self.k}")
        if self.architecture == "groupmax" and self.num_latents % (self.k or 1):
            raise ConfigError(
                f"k must divide num_latents ({self.num_latents}) of a GroupMax SAE, got {self.k}"
            )
        if (self.architecture == "matryoshka") != bool(self.prefixes):
            raise ConfigError(
                "prefixes must be there of a Matryoshka SAE and of no other, "
                f"got {self.prefixes} of {self.architecture}"
            )
        _check_ascending("prefixes", self.prefixes, "num_latents", self.num_latents)
        _check_ascending("ks", self.ks, "k", self.k)
        self._check_joined()
        if self.norm is not None and (self.norm not in NORMS or self.joined or self.d_out is not None):
            raise ConfigError(
                f"norm must be one of {', '.join(NORMS)} of an SAE of one site, and None of others, got "
                f"{self.norm!r:.80}"
            )

    def _check_joined(self) -> None:
        """Refuse sites that do not make up d_in, or what is predicted."""
        if self.joined:
            _check_sites("joined", self.joined, "d_in", self.d_in)
        if self.predicted:
            self._check_layers()
        elif self.joined and self.d_out is not None:
            names = ", ".join(part.site for part in self.joined)
            raise ConfigError(f"joined must be empty of a transcoder without predicted, got {names}")

    def _check_layers(self) -> None:
        """Refuse what is no cross-layer transcoder."""
        n, d_out = len(self.predicted), self.d_out or 0
        _check_sites("predicted", self.predicted, "d_out", d_out)
        shares = {"d_in": self.d_in, "d_out": d_out, "num_latents": self.num_latents, "k": self.k or 0}
        uneven = [f"{name} {value}" for name, value in shares.items() if value % n]
        widths = [{part.width for part in sites} for sites in (self.joined, self.predicted)]
        if len(self.joined) != n or uneven or max(map(len, widths)) > 1:
            raise ConfigError(
                "a cross-layer transcoder must read and predict as many sites, of one width, with equal "
                f"shares of latents and k, got {len(self.joined)} and {n} sites"
                f"{''.join(f', {each}' for each in uneven)}"
            )
        if self.architecture not in CROSS_LAYER or self.ks:
            raise ConfigError(
                f"architecture of a cross-layer transcoder must be one of {', '.join(CROSS_LAYER)}, with one "
                f"k, got {self.architecture}{f' with k {self.ks}' if self.ks else ''}"
            )

    @property
    def is_signed(self) -> bool:
        """Whether activations of latents may be below 0."""
        return self.architecture == "abs-topk"

    @property
    def n_layers(self) -> int:
        """Layers whose latents write to their own and to later ones; 1 unless it is a cross-layer
        transcoder."""
        return len(self.predicted) or 1

    @property
    def spans(self) -> str | None:
        """What an SAE of several sites is, in words: `a crosscoder over a and b`; None of one site."""
        if self.predicted:
            ends = f"{self.joined[0].site} to {self.predicted[-1].site}"
            return f"a cross-layer transcoder of {self.n_layers} layers ({ends})"
        sites = " and ".join(part.site for part in self.joined)
        return f"a crosscoder over {sites}" if sites else None

    @property
    def outputs(self) -> tuple[Joined, ...]:
        """Sites whose vectors follow each other in what it reconstructs or predicts; empty of one site."""
        return self.predicted or self.joined

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that every SAE has, by name."""
        f, n, e = self.num_latents, self.n_layers, self.d_out or self.d_in
        return {
            "W_enc": (f, self.d_in // n),
            "b_enc": (f,),
            "W_dec": (layers.n_rows(f, n), e // n),
            "b_dec": (e,),
        }

    @property
    def described(self) -> str:
        """Choice of latents and their number, in words: `k 32, 6,144 latents`."""
        words = [] if self.d_out is None else ["transcoder"]
        words = [f"cross-layer transcoder of {self.n_layers} layers"] if self.predicted else words
        words += ["crosscoder"] if self.joined and not self.predicted else []
        words += [] if self.architecture == "topk" else [self.architecture]
        words += [] if self.k is None else [f"k {self.k}"]
        words += [f"{self.num_latents:,} latents"]
        words += [] if self.norm is None else [f"inputs normed ({self.norm})"]
        words += [f"prefixes {', '.join(f'{n:,}' for n in self.prefixes)}"] if self.prefixes else []
        words += [f"also k {', '.join(map(str, self.ks[:-1]))}"] if self.ks[:-1] else []
        return ", ".join(words)


def place(origin: Mapping[str, Any]) -> str | None:
    """Write where an SAE belongs: its site, or the site that a transcoder reads and the one that it predicts,
    `layers.3.norm → layers.3.mlp`.

    Args:
        origin: what has the fields `site` and, of a transcoder, `target_site`; either may be unknown.
    """
    ends = filter(None, (origin.get("site"), origin.get("target_site")))
    return " → ".join(map(abridged, ends)) or None


def _check_sites(name: str, sites: tuple[Joined, ...], of: str, width: int) -> None:
    """Refuse sites that do not make up a width, or that have no scale."""
    widths = [part.width for part in sites]
    if len({part.site for part in sites}) < max(2, len(sites)) or sum(widths) != width or min(widths) < 1:
        raise ConfigError(
            f"{name} must be two or more sites whose widths add up to {of} ({width}), got "
            f"{', '.join(f'{part.width} of {part.site!r:.80}' for part in sites)}"
        )
    if not all(0 < part.scale < math.inf for part in sites):
        raise ConfigError(f"{name} must have scales above 0, got {[part.scale for part in sites]}")


def _check_ascending(name: str, values: tuple[int, ...], of: str, last: int | None) -> None:
    """Refuse values that do not rise from 1 or more to the last one that they must reach."""
    rising = all(low < high for low, high in zip((0, *values), values, strict=False))
    if values and not (rising and values[-1] == last):
        raise ConfigError(f"{name} must rise from 1 or more to {of} ({last}), got {values}")


@dataclass(frozen=True, slots=True)
class Parts:
    """An SAE as tensors."""

    config: SaeConfig
    W_enc: Tensor
    """Encoder weights [F, D]; of a cross-layer transcoder those that `layers` describes."""
    b_enc: Tensor
    """Encoder bias [F]."""
    W_dec: Tensor
    """Decoder weights [F, D], a row per latent; [F, E] of a transcoder; of a cross-layer transcoder as
    `layers` has them."""
    b_dec: Tensor
    """Decoder bias [D]; [E] of a transcoder."""
    threshold: Tensor | None = None
    """Pre-activations above which latents are active, float32 [F], 0 or more; there where k is None."""
    W_skip: Tensor | None = None
    """Linear map [E, D] of a transcoder, beside its latents, of a cross-layer transcoder as `layers` has it;
    None without."""

    def __post_init__(self) -> None:
        if (self.threshold is None) != (self.config.k is not None):
            raise ConfigError(
                f"threshold must be given exactly where k is None, got k {self.config.k} and "
                f"{'no threshold' if self.threshold is None else 'one'}"
            )
        if self.threshold is not None:
            self._check_threshold(self.threshold)
        if self.W_skip is not None and self.config.d_out is None:
            raise ConfigError("W_skip must be absent from an SAE: it would reconstruct by itself")

    def _check_threshold(self, threshold_F: Tensor) -> None:
        """Refuse thresholds that are none; a NaN, which a run that diverged leaves, is for `check_finite`."""
        got, wanted = tuple(threshold_F.shape), (self.config.num_latents,)
        if got != wanted or threshold_F.dtype != torch.float32:
            raise ConfigError(f"threshold must be float32 {wanted}, got {threshold_F.dtype} {got}")
        if threshold_F.is_meta:
            return
        if n_bad := int((threshold_F < 0).sum()):
            raise ConfigError(
                f"threshold must be 0 or more, got {counted(n_bad, 'negative value')}, {threshold_F.min():g} "
                "the least; with a ReLU before it a negative one is the same as 0"
            )
        if self.config.architecture == "relu" and bool((threshold_F > 0).any()):
            raise ConfigError(
                f"threshold must be 0 of a ReLU SAE, got up to {threshold_F.max():g}; "
                "its architecture is jumprelu"
            )

    @property
    def weights(self) -> dict[str, Tensor]:
        """Tensors by name."""
        weights = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        optional = {"threshold": self.threshold, "W_skip": self.W_skip}
        return weights | {name: tensor for name, tensor in optional.items() if tensor is not None}

    def check_finite(self, where: str, kind: type[SaemillError]) -> None:
        """Refuse weights with NaN or infinite values.

        Args:
            where: what the message begins with.
            kind: the error.
        """
        for name, weights in self.weights.items():
            n_bad = weights.numel() - int(weights.isfinite().sum())
            if n_bad:
                count = f"{counted(n_bad, 'value')} of {name} {'is' if n_bad == 1 else 'are'} NaN or infinite"
                raise kind(f"{where} is of no use: {count}")


def apart(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights as safetensors takes them: on the CPU, contiguous, none in another's memory (as those
    of an encoder tied to its decoder are)."""
    own: dict[str, Tensor] = {}
    taken = set()
    for name, weight in weights.items():
        plain = weight.detach().cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        own[name] = plain.clone() if place in taken else plain
        taken.add(place)
    return own
