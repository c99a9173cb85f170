"""The meaning of a sparse autoencoder, and its files on disk.

    z = W_enc (x − b_dec) + b_enc,    x̂ = W_decᵀ f + b_dec

    f = ReLU(TopK_k(z)),    after Gao et al. 2024, or
    f = z where |z| is among the k largest: AbsTopK, whose f may be negative, or
    f = ReLU(z) where it is the largest of its group, of k groups of consecutive latents: GroupMax, or
    f = z · 1[z > θ],       a threshold per latent: JumpReLU, and in other values ReLU, BatchTopK and Gated

A transcoder predicts the activations y of another site from x. It subtracts nothing from x, and may have a
linear map beside its latents:

    z = W_enc x + b_enc,    ŷ = W_decᵀ f + b_dec + W_skip x

A cross-layer transcoder has such latents at several layers, and each writes to its own layer's output and to
all later ones':

    z_l = W_enc,l x_l + b_enc,l,    ŷ_m = Σ_{l ≤ m} W_dec,l→mᵀ f_l + b_dec,m + W_skip,m x_m

It takes x_0, x_1, … side by side and predicts ŷ_0, ŷ_1, … side by side; of k latents each layer has an equal
share.

Some other tools' SAEs take each x through a norm first, and what is decoded back through it (`norms`).

A saved SAE takes activations as the model produces them: the scale and the centre that training
used are folded into the biases. The folder holds `cfg.json` and `sae.safetensors`, in the layout
that sparsify reads; `common.sae.formats` has that and the layouts of other tools.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Self
from urllib.parse import quote

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from saemill.common.errors import ConfigError, DataError
from saemill.common.sae import formats, layers
from saemill.common.sae.above import above
from saemill.common.sae.abs_topk import abs_topk
from saemill.common.sae.groupmax import groupmax
from saemill.common.sae.norms import normed
from saemill.common.sae.parts import Parts, SaeConfig
from saemill.common.sae.topk import topk


class Encoded(NamedTuple):
    """The active latents of some tokens."""

    top_acts: Tensor
    """Activations [..., k], in no particular order, of an `abs-topk` SAE of either sign, of others 0 or more;
    a 0 is an unused slot.

    Of an SAE with thresholds, k is the largest number of active latents among these tokens, at least 1.
    """
    top_indices: Tensor
    """Numbers of the latents, int64 [..., k]."""

    @property
    def active(self) -> Tensor:
        """Tell which slots hold an active latent, whatever the sign of its activation; a NaN is none. bool
        [..., k]"""
        return self.top_acts.abs() > 0


class SaeOutput(NamedTuple):
    """A reconstruction and the latents it is made of."""

    reconstruction: Tensor
    """Reconstruction x̂ [..., D]; of a transcoder its prediction ŷ [..., E]."""
    top_acts: Tensor
    """Activations of the latents [..., k]."""
    top_indices: Tensor
    """Numbers of the latents, int64 [..., k]."""


class Sae(nn.Module):
    """A sparse autoencoder. Its weights need no gradient unless asked for: `sae.requires_grad_()`.

    Args:
        config: its shape.
        W_enc: [F, D]; b_enc: [F]; W_dec: [F, D], its rows of unit length if saemill trained it; b_dec: [D].
        threshold: float32 [F], exactly where the config has no k. It stays float32 whatever the SAE is
            converted to.
        W_skip: [E, D] of a skip transcoder, whose W_dec is [F, E] and b_dec [E], as every transcoder's.
            `layers` has the shapes of a cross-layer transcoder.

    Raises:
        ConfigError: the threshold is missing, too many, of another shape, or negative.
    """

    def __init__(
        self,
        config: SaeConfig,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        threshold: Tensor | None = None,
        W_skip: Tensor | None = None,
    ) -> None:
        super().__init__()
        Parts(config, W_enc, b_enc, W_dec, b_dec, threshold, W_skip)  # which checks what is optional
        self.config = config
        self.W_enc = nn.Parameter(W_enc, requires_grad=False)
        self.b_enc = nn.Parameter(b_enc, requires_grad=False)
        self.W_dec = nn.Parameter(W_dec, requires_grad=False)
        self.b_dec = nn.Parameter(b_dec, requires_grad=False)
        self.threshold = None if threshold is None else nn.Parameter(threshold, requires_grad=False)
        self.W_skip = None if W_skip is None else nn.Parameter(W_skip, requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert or move the weights. A threshold that is rounded lets other latents through: it is only
        moved."""
        exact = None if self.threshold is None else self.threshold.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.threshold is not None and exact is not None:
            self.threshold.data = exact.to(self.W_enc.device)
        return self

    @classmethod
    def of(cls, parts: Parts) -> "Sae":
        """Make the SAE of a config and tensors."""
        return cls(parts.config, **parts.weights)

    @property
    def parts(self) -> Parts:
        """Config and tensors, as a file holds them."""
        return Parts(self.config, self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.threshold, self.W_skip)

    @property
    def is_transcoder(self) -> bool:
        """Whether it predicts another site's activations, and does not reconstruct those that it reads."""
        return self.config.d_out is not None

    @property
    def site(self) -> str | None:
        """Site that it reads, as far as its folder tells."""
        return self.config.provenance.get("site")

    @property
    def target_site(self) -> str | None:
        """Site that it reconstructs or predicts, as far as its folder tells."""
        return self.config.provenance.get("target_site") if self.is_transcoder else self.site

    def prefix(self, n: int) -> "Sae":
        """Cut a Matryoshka SAE to its first n latents.

        With thresholds its codes are the whole SAE's, those of the other latents left out. With k they are
        the k largest of the n, so that more of these may be active than in the whole SAE.

        Raises:
            ConfigError: it was not trained to be cut there.
        """
        prefixes = self.config.prefixes
        if n not in prefixes:
            known = f"one of {', '.join(map(str, prefixes))}" if prefixes else "of a Matryoshka SAE"
            raise ConfigError(f"the prefix must be {known}, got {n} of a {self.config.architecture} SAE")
        k, ks = self.config.k, self.config.ks
        if k is not None and n < k:
            k, ks = n, (*(each for each in ks if each < n), n) if ks else ()
        config = replace(self.config, num_latents=n, k=k, ks=ks, prefixes=prefixes[: prefixes.index(n) + 1])
        threshold = None if self.threshold is None else self.threshold[:n].data
        W_enc, b_enc, W_dec = (weights[:n].data for weights in (self.W_enc, self.b_enc, self.W_dec))
        W_skip = None if self.W_skip is None else self.W_skip.data
        return Sae(config, W_enc, b_enc, W_dec, self.b_dec.data, threshold, W_skip)

    def at_k(self, k: int) -> "Sae":
        """Take another number of active latents, of those that the SAE was trained for.

        Raises:
            ConfigError: it was not trained for this one.
        """
        ks = self.config.ks
        if k not in ks:
            known = f"one of {', '.join(map(str, ks))}" if ks else "of an SAE that was trained for several"
            raise ConfigError(f"k must be {known}, got {k} of an SAE with k {self.config.k}")
        config = replace(self.config, k=k, ks=ks[: ks.index(k) + 1])
        return Sae(config, **{name: weights.data for name, weights in self.parts.weights.items()})

    @property
    def cuts(self) -> dict[str, "Sae"]:
        """The SAEs within this one, itself left out, by name: at each prefix, and at each k."""
        prefixes, ks = self.config.prefixes[:-1], self.config.ks[:-1]
        return {f"first {n}": self.prefix(n) for n in prefixes} | {f"k {k}": self.at_k(k) for k in ks}

    @property
    def decoder_rows(self) -> Tensor:
        """Decoder weights with a row per latent, [F, E] over all that it reconstructs or predicts: W_dec, but
        of a cross-layer transcoder, in whose rows 0 stands for sites that a latent does not write to."""
        W_dec = self.W_dec.detach()
        return layers.whole_rows(W_dec, self.config.n_layers) if self.config.predicted else W_dec

    @property
    def layers(self) -> list["Sae"]:
        """Return the transcoders that add up to a cross-layer transcoder, one of each layer's latents: from
        its site to its target and all later ones, side by side. The first has the bias. Of another SAE itself
        alone."""
        n = self.config.n_layers
        if n == 1:
            return [self]
        d, f, e = (whole // n for whole in (self.config.d_in, self.config.num_latents, len(self.b_dec)))
        k = None if self.config.k is None else self.config.k // n
        found = []
        for layer, W_dec in enumerate(layers.blocks(self.W_dec.data, n)):
            own = slice(layer * f, (layer + 1) * f)
            config = replace(
                self.config, d_in=d, d_out=(n - layer) * e, num_latents=f, k=k, joined=(), predicted=()
            )
            b_dec = self.b_dec.data if layer == 0 else self.b_dec.new_zeros((n - layer) * e)
            threshold = None if self.threshold is None else self.threshold.data[own]
            weights = {"W_enc": self.W_enc.data[own], "b_enc": self.b_enc.data[own], "W_dec": W_dec}
            if self.W_skip is not None:  # to its own layer's output, the first of those that it writes to
                W_skip = self.W_skip.data[layer * e : (layer + 1) * e]
                weights["W_skip"] = nn.functional.pad(W_skip, (0, 0, 0, (n - layer - 1) * e))
            found.append(Sae(config, b_dec=b_dec, threshold=threshold, **weights))
        return found

    def pre_acts(self, x: Tensor | ArrayLike, out: Tensor | None = None) -> Tensor:
        """Compute W_enc (x − b_dec) + b_enc, of a transcoder W_enc x + b_enc. x: [..., D] → [..., F], in the
        weights' dtype.

        Args:
            x: a tensor; anything else (a numpy array, lists of numbers) is copied to the weights' device.
            out: memory for the result, [T, F], where x is [T, D] and no gradient is wanted.

        Raises:
            DataError: x is no array of numbers, or its last axis is not D long.
        """
        x = x if isinstance(x, Tensor) else self._tensor(x)
        if x.dim() == 0 or x.shape[-1] != self.config.d_in:
            raise DataError(
                f"activations must have {self.config.d_in:,} values each, the last axis; got the shape "
                f"{tuple(x.shape)}"
            )
        x = x.to(self.W_enc.dtype)
        if self.config.predicted:
            rows = layers.pre_activations(
                x.reshape(-1, x.shape[-1]), self.W_enc, self.b_enc, self.config.n_layers
            )
            rows = rows.view(*x.shape[:-1], -1)
            return rows if out is None else out.copy_(rows)
        x = x if self.config.norm is None else normed(x, self.config.norm).x
        x = x if self.is_transcoder else x - self.b_dec
        if out is None:
            return nn.functional.linear(x, self.W_enc, self.b_enc)
        return torch.addmm(self.b_enc, x, self.W_enc.T, out=out)

    def _tensor(self, x: ArrayLike) -> Tensor:
        try:
            return torch.tensor(np.asarray(x, np.float64), dtype=self.W_enc.dtype, device=self.W_enc.device)
        except (TypeError, ValueError) as error:
            raise DataError(f"activations must be a tensor or an array of numbers: {error}") from error

    def encode(self, x: Tensor | ArrayLike) -> Encoded:
        """Select the active latents of each token: the k largest pre-activations, or the largest of each of k
        groups, negative ones set to 0; the k largest by absolute value; or those above their thresholds.

        Args:
            x: [..., D], a tensor or what numpy takes for an array.

        Raises:
            DataError: as `pre_acts`, or weights are not finite.
        """
        return self.select(self.pre_acts(x))

    def select(self, pre: Tensor) -> Encoded:
        """Select the active latents of pre-activations [..., F], as `encode` does."""
        pre_TF = pre.flatten(0, -2) if pre.dim() > 1 else pre[None]
        if self.threshold is None:
            assert self.config.k is not None
            values, indices = self._largest(pre_TF, self.config.k)
        else:
            self._check_if_not_finite(self.threshold)
            values, indices = above(pre_TF, self.threshold)
        self._check_if_not_finite(values)
        shape = (*pre.shape[:-1], values.shape[-1])
        return Encoded(values.view(shape), indices.view(shape))

    def _largest(self, pre_TF: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Select the k largest pre-activations, an equal share of each group or layer that has one."""
        if self.config.architecture == "groupmax":
            return groupmax(pre_TF, k)
        if self.config.is_signed:
            return abs_topk(pre_TF, k)
        n = self.config.n_layers
        if n == 1:
            return topk(pre_TF, k)
        values, places = topk(pre_TF.reshape(-1, pre_TF.shape[1] // n), k // n)
        first_L1 = torch.arange(0, pre_TF.shape[1], pre_TF.shape[1] // n, device=places.device)[:, None]
        return values.view(-1, k), (places.view(-1, n, k // n) + first_L1).view(-1, k)

    def decode(self, top_acts: Tensor, top_indices: Tensor, x: Tensor | None = None) -> Tensor:
        """Decode active latents to x̂, or to a transcoder's ŷ. [..., k] and int64 [..., k] → [..., D], or
        [..., E].

        Args:
            top_acts, top_indices: of `encode`.
            x: what was encoded, [..., D]; needed by a transcoder with W_skip and by an SAE with a norm.

        Raises:
            DataError: weights are not finite.
            ConfigError: x is missing.
        """
        decoded, norm = self._decode(top_acts, top_indices), self.config.norm
        if x is None and (self.W_skip is not None or norm is not None):
            kind = "a transcoder with W_skip" if norm is None else "an SAE with a norm"
            raise ConfigError(f"{kind} decodes with its input: decode(acts, indices, x)")
        if self.W_skip is not None and x is not None:
            rows, n = x.to(self.W_skip.dtype).reshape(-1, x.shape[-1]), self.config.n_layers
            decoded = decoded + layers.skipped(rows, self.W_skip, n).view(decoded.shape)
        if norm is not None and x is not None:
            decoded = normed(x.to(decoded.dtype), norm).back(decoded)
        self._check_if_not_finite(decoded)
        return decoded

    def _decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        """Decode active latents, without W_skip or a norm."""
        shape = (*top_acts.shape[:-1], len(self.b_dec))
        if top_acts.numel() == 0:
            return self.b_dec.expand(shape).clone()
        k = top_acts.shape[-1]
        if self.config.predicted:
            slots = top_acts.reshape(-1, k), top_indices.reshape(-1, k)
            return layers.decode_active(*slots, self.W_dec, self.config.n_layers).view(shape) + self.b_dec
        bags = nn.functional.embedding_bag(
            top_indices.reshape(-1, k),
            self.W_dec,
            per_sample_weights=top_acts.reshape(-1, k).to(self.W_dec.dtype),
            mode="sum",
        )
        return bags.view(shape) + self.b_dec

    def _check_if_not_finite(self, result: Tensor) -> None:
        """Refuse weights that are not finite, where a result is not. A result may also fail to be finite
        through x: that is the caller's."""
        if not result.isfinite().all():
            self.parts.check_finite("the SAE", DataError)

    def forward(self, x: Tensor) -> SaeOutput:
        """Encode and decode. x: [..., D]."""
        encoded = self.encode(x)
        return SaeOutput(self.decode(*encoded, x), *encoded)

    def save(self, folder: Path | str) -> None:
        """Write `cfg.json` and `sae.safetensors`, of a TopK SAE in sparsify's layout.

        Raises:
            DataError: weights are not finite.
            DiskError: the disk is full, or the folder may not be written to.
        """
        formats.save_own(self.parts, Path(folder))

    @classmethod
    def load(cls, folder: Path | str, device: str | torch.device = "cpu", format: str | None = None) -> "Sae":
        """Read an SAE that saemill or another tool saved, or a published one (docs/formats.md).

        Args:
            folder: on this machine, or on the hub: `hf://user/repo[@revision][/folder]`, where the folder
                may be left out if the repository holds one SAE alone; a file where the format has one for
                each SAE.
            device: where its weights go.
            format: name of the format, where the files are of several.

        Raises:
            StoreError: the folder holds no SAE, a file of it is missing or damaged, weights do not fit the
                config, or they are not finite.
            ConfigError: it holds an SAE that cannot be represented; the hub has no such repository, or cannot
                be asked; no such format.
        """
        return cls.of(formats.load(folder, format)).to(device)

    @classmethod
    def from_pretrained(
        cls,
        repo: str,
        folder: str = "",
        revision: str | None = None,
        device: str | torch.device = "cpu",
    ) -> "Sae":
        """Read an SAE from the hub: `Sae.load` of `hf://repo@revision/folder`."""
        at = f"@{quote(revision, safe='')}" if revision else ""
        return cls.load(f"hf://{repo}{at}/{folder}".rstrip("/"), device)
