"""Other tools' figures, by their definitions, from saemill's own model pass and SAE.

Where a figure of saemill's differs from another tool's of the same name, the two choose differently which
positions count, which are replaced, or how sums are formed. Here each choice can be made either way, so
that a difference can be taken apart and the rest shown to be rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saemill.common.models.model import LanguageModel
from saemill.common.sae.sae import Sae
from saemill.common.stores.mask import MaskConfig

Figures = dict[str, float]
Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Choices:
    """What definitions differ in; as given here they are saemill's."""

    first_positions: bool = False
    """Count and replace what the run's mask leaves out at the start of a row."""
    rounded: bool = True
    """Reconstruct activations as the cache stores them."""
    zeros_everywhere: bool = False
    """The baseline of loss recovered puts zeros at special tokens as well."""
    kl_at_end: bool = False
    """Count the KL at a row's last position, where there is nothing to predict."""
    special_replaced: bool = False
    """Replace special tokens' activations as well (losses are not counted there)."""

    @property
    def counted(self) -> str:
        """Return the place where figures are counted and, but for these choices, activations replaced."""
        return "ordinary" if self.first_positions else "kept"


STEPS = {
    "saemill": Choices(),
    "+ first positions": Choices(first_positions=True),
    "+ not rounded": Choices(first_positions=True, rounded=False),
    "+ zeros everywhere": Choices(first_positions=True, rounded=False, zeros_everywhere=True),
    "+ KL at row ends": Choices(True, False, True, True),
}
"""From saemill's definitions to SAELens', one choice after another."""
SPECIAL_REPLACED = Choices(True, False, True, True, True)


PLACES = ("kept", "ordinary", "everywhere")
"""Positions that the run's mask keeps; those without a special token; all."""


@dataclass(frozen=True)
class Loss:
    """The rows through the model, edited or not."""

    ce_RS: Tensor
    """Nats for the token after each position; nan at the last."""
    kl_RS: Tensor
    """KL(p ‖ p_edited) in nats."""


class Site:
    """One site of a model on some rows: activations at all positions, and losses when they are edited.

    Args:
        ids_RS: token ids, int64.
        mask: the run's.
        special_ids: the tokenizer's special tokens.
        stored: the dtype that activations were cached in.
        batch_rows: rows per forward pass.
    """

    def __init__(
        self,
        model: LanguageModel,
        site: str,
        ids_RS: Tensor,
        mask: MaskConfig,
        special_ids: tuple[int, ...],
        stored: torch.dtype,
        batch_rows: int,
    ) -> None:
        self.model, self.site, self.ids_RS, self.stored = model, site, ids_RS, stored
        self.batch_rows = batch_rows
        ordinary = MaskConfig(first_positions=0).keep(ids_RS.numpy(), special_ids)
        unmasked = mask.keep(ids_RS.numpy(), special_ids)
        masks = (unmasked, ordinary, np.ones_like(unmasked))
        self.places = {
            place: torch.from_numpy(positions) for place, positions in zip(PLACES, masks, strict=True)
        }
        batches = ids_RS.split(batch_rows)
        self.x_RSD = torch.cat([model.capture(ids, [site], None)[site].float() for ids in batches])

    def x(self, choices: Choices) -> Tensor:
        """Return the activations at the positions that count. fp32 [T, D]."""
        x_TD = self.x_RSD[self.places[choices.counted]]
        return x_TD.to(self.stored).float() if choices.rounded else x_TD

    def run(self, saes: dict[str, Sae]) -> dict[str, Loss]:
        """Compute losses as the model is ("clean"), and with zeros or an SAE's reconstruction ("zero
        everywhere", "NAME kept", …)."""
        edits: dict[str, Edit] = {"zero": torch.zeros_like} | {n: _edit(sae) for n, sae in saes.items()}
        passes: dict[str, list[tuple[Tensor, Tensor]]] = {"clean": []}
        for start in range(0, len(self.ids_RS), self.batch_rows):
            rows = slice(start, start + self.batch_rows)
            clean = self.model.logits(self.ids_RS[rows], None).float().log_softmax(-1)
            passes["clean"].append(_loss(clean, clean, self.ids_RS[rows]))
            for what, edit in edits.items():
                for place, replaced_RS in self.places.items():
                    logits = self._edited(rows, edit, replaced_RS[rows])
                    loss = _loss(clean, logits.float().log_softmax(-1), self.ids_RS[rows])
                    passes.setdefault(f"{what} {place}", []).append(loss)
        return {key: Loss(*map(torch.cat, zip(*batches, strict=True))) for key, batches in passes.items()}

    def _edited(self, rows: slice, edit: Edit, replaced_RS: Tensor) -> Tensor:
        def change(x_RSD: Tensor) -> Tensor:
            return torch.where(replaced_RS[..., None], edit(x_RSD), x_RSD)

        with self.model.splice(self.site, change):
            return self.model.logits(self.ids_RS[rows], None)


def _edit(sae: Sae) -> Edit:
    return lambda x_RSD: sae(x_RSD.float()).reconstruction.to(x_RSD.dtype)


def _loss(clean: Tensor, edited: Tensor, ids_RS: Tensor) -> tuple[Tensor, Tensor]:
    """Compute cross-entropy and KL from log probabilities [R, S, W]."""
    ce_RS = torch.full(ids_RS.shape, torch.nan, dtype=torch.float64)
    ce_RS[:, :-1] = -edited[:, :-1].gather(-1, ids_RS[:, 1:, None])[..., 0].double()
    return ce_RS, (clean.exp() * (clean - edited)).sum(-1).double()


@torch.inference_mode()
def reconstruction(site: Site, sae: Sae, choices: Choices) -> Figures:
    """Compute figures of one SAE on the activations alone; `mse` is ‖x − x̂‖² per token, as SAELens has
    it."""
    x_TD = site.x(choices)
    output, acts, indices = sae(x_TD)
    x, error = x_TD.double(), (x_TD - output).double()
    fired = torch.bincount(indices[acts > 0], minlength=sae.config.num_latents)
    norms = [torch.linalg.vector_norm(y, dim=1).double() for y in (x_TD, output)]
    return {
        "explained_variance": float(1 - error.square().sum() / (x - x.mean(0)).square().sum()),
        "mse": float(error.square().sum() / len(x)),
        "cossim": float(((x_TD * output).sum(1) / (norms[0] * norms[1])).mean()),
        "l2_ratio": float((norms[1] / norms[0]).mean()),
        "l0": float((acts > 0).sum() / len(x)),
        "never_fired": float((fired == 0).double().mean()),
    }


def losses(site: Site, passes: dict[str, Loss], name: str, choices: Choices) -> Figures:
    """Compute figures of one SAE, of those that `Site.run` was given, in the model."""
    replaced = "everywhere" if choices.special_replaced else choices.counted
    zeroed = "everywhere" if choices.zeros_everywhere else choices.counted
    spliced = passes[f"{name} {replaced}"]
    counted = site.places[choices.counted]
    predicted = counted.clone()
    predicted[:, -1] = False
    counted_passes = (passes["clean"], spliced, passes[f"zero {zeroed}"])
    without, with_sae, ablated = (float(loss.ce_RS[predicted].mean()) for loss in counted_passes)
    return {
        "ce_loss_without_sae": without,
        "ce_loss_with_sae": with_sae,
        "delta_ce": with_sae - without,
        "ce_loss_with_ablation": ablated,
        "ce_loss_score": (ablated - with_sae) / (ablated - without),
        "kl_div_with_sae": float(spliced.kl_RS[counted if choices.kl_at_end else predicted].mean()),
    }


@torch.inference_mode()
def by_rows(site: Site, sae: Sae) -> dict[str, Figures]:
    """Compute what SAELens and SAEBench form from batches of rows: figures that depend on the batch."""
    masks = site.places["ordinary"].split(site.batch_rows)
    batches = [x[mask] for x, mask in zip(site.x_RSD.split(site.batch_rows), masks, strict=True)]
    outputs = [sae(x_TD).reconstruction for x_TD in batches]
    errors = [(x - y).double().square().sum(1) for x, y in zip(batches, outputs, strict=True)]
    spreads = [(x - x.mean(0)).double().square().sum(1) for x in batches]
    biases = [y.square().sum() / (x * y).sum() for x, y in zip(batches, outputs, strict=True)]
    squares = np.mean([x.double().square().sum(1).mean() for x in batches])
    per_dimension = np.mean([x.double().square().mean() for x in batches])
    legacy = torch.cat([1 - error / spread for error, spread in zip(errors, spreads, strict=True)])
    saelens = {
        "explained_variance_legacy": float(legacy.mean()),
        "relative_reconstruction_bias": float(torch.stack(biases).mean()),
    }
    saebench = {
        "explained_variance": float(1 - np.mean([e.mean() for e in errors]) / (squares - per_dimension**2)),
        "mse": float(torch.cat([error / len(error) for error in errors]).mean()),
    }
    return {"saelens": saelens, "saebench": saebench}


@torch.inference_mode()
def by_tokens(site: Site, sae: Sae, batch_tokens: int) -> dict[str, Figures]:
    """Compute what sparsify and dictionary_learning form from batches of tokens, those that saemill counts:
    means of each batch's figure."""
    fvu, by_batch = [], []
    for x in site.x(Choices()).split(batch_tokens):
        output, acts, _ = sae(x)
        error = (x - output).double()
        norms = [torch.linalg.vector_norm(y, dim=1) for y in (x, output)]
        fvu.append(error.square().sum() / (x - x.mean(0)).double().square().sum())
        by_batch.append(
            {
                "frac_variance_explained": 1 - error.var(0).sum() / x.double().var(0).sum(),
                "cossim": ((x * output).sum(1) / (norms[0] * norms[1])).double().mean(),
                "l2_ratio": (norms[1] / norms[0]).double().mean(),
                "l2_loss": error.square().sum(1).sqrt().mean(),
                "l0": (acts > 0).sum(1).double().mean(),
            }
        )
    means = {name: float(np.mean([figures[name] for figures in by_batch])) for name in by_batch[0]}
    return {"sparsify": {"fvu": float(np.mean(fvu))}, "dictionary_learning": means}
