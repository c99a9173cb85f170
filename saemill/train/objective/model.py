"""The loss of the model with a reconstruction in the place of a site's activation.

The model goes on from the site, with the cached activation x and with x̂ where x is trained on: p and q are
what it predicts at a position then. Per predicted token, in nats:

    kl      KL(p ‖ q)
    ce      − log q(next token)
    mse+kl  ½ (MSE + α KL),   α = MSE/KL held fixed: both count alike (Karvonen 2025, arXiv 2503.17272)

Predicted are the positions of which `saemill assess` counts the losses, and x stays where it does there.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saemill.common.errors import ConfigError
from saemill.common.log import say
from saemill.common.models.model import LanguageModel
from saemill.common.steer.losses import Passes, Task, cross_entropy, load_with_losses
from saemill.common.stores.activations import ActivationStore
from saemill.train.losses import WITHOUT_SQUARES, Loss
from saemill.train.objective.at_output import AtOutput

TOKENS_AT_ONCE = 2048
"""Tokens of a forward and backward pass, in whole rows; one row at least."""


LEAST_NATS = 1e-9
"""KL that counts as none: it is divided by."""


class ModelLoss:
    """The model of a store.

    Args:
        store: what is trained on.
        name: of the model, if it is not where it was cached from.
        device: where it runs.

    Raises:
        ConfigError: it cannot be loaded, is another one, or predicts no next token.
    """

    def __init__(self, store: ActivationStore, name: str | None, device: torch.device) -> None:
        self.store = store
        self.model: LanguageModel = load_with_losses(name, store, device, "loss")
        if self.model.head != "causal":
            raise ConfigError(
                f"loss: {self.model.name} predicts masked tokens, of which the cache has no activations; "
                "take fvu or mse"
            )
        self.passes = Passes(self.model, store.tokens.tokenizer, store.sites)

    def check(self, site: str, ids_RS: Tensor, keep_RS: Tensor) -> None:
        """Find what of the model must run for a site, on a row, and say so.

        Raises:
            DataError: splicing the true activation changes the loss.
        """
        if site in self.passes.identity:
            return
        task = self.task(ids_RS[:1], keep_RS[:1])
        self.passes.check_identity(site, task, cross_entropy(self.passes.clean(task, [site]), task.target_T))
        runs = "the blocks after it" if self.skips_blocks(site) else "the whole model, from the tokens on"
        say(f"{site}: {runs} of {self.model.name} runs in every step, for the loss")

    def skips_blocks(self, site: str) -> bool:
        """Tell whether the model goes on from the site, without the blocks before it."""
        return site in self.passes.skippable and bool(self.model.blocks_to(site))

    def task(self, ids_RS: Tensor, keep_RS: Tensor) -> Task:
        """Set what is predicted in some rows."""
        return self.passes.task(ids_RS, keep_RS.numpy(), np.zeros(ids_RS.shape, np.int64))


class _Piece(NamedTuple):
    """Some rows of a batch."""

    task: Task
    y_RSE: Tensor
    """The cached activations, in the model's dtype."""
    tokens: slice
    """Where those of its tokens that are trained on lie among the batch's."""


class Passages:
    """The rows of one batch at one site, for all SAEs that are trained there.

    Args:
        above: the model.
        site: whose activations are replaced.
        ids_RS: int64, token ids.
        keep_RS: bool, where they are replaced.
        y_TE: the cached activations of all tokens, as they are stored, on the device.
    """

    def __init__(self, above: ModelLoss, site: str, ids_RS: Tensor, keep_RS: Tensor, y_TE: Tensor) -> None:
        self.above, self.site = above, site
        dtype: Any = above.model.model.dtype
        y_RSE = y_TE.view(*ids_RS.shape, -1).to(dtype)
        n_rows, ends_R = max(1, TOKENS_AT_ONCE // ids_RS.shape[1]), [0, *keep_RS.sum(1).cumsum(0).tolist()]
        self.pieces = []
        for first in range(0, len(ids_RS), n_rows):
            rows = slice(first, min(first + n_rows, len(ids_RS)))
            task = above.task(ids_RS[rows], keep_RS[rows])
            if len(task.target_T):
                self.pieces.append(_Piece(task, y_RSE[rows], slice(ends_R[rows.start], ends_R[rows.stop])))
        self.n_predicted = sum(len(piece.task.target_T) for piece in self.pieces)
        self._clean: list[Tensor] = []

    def loss(self, kind: Loss, xhat_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the mean of the model's losses, and its gradient at the reconstructions.

        Args:
            kind: whether CE or KL.
            xhat_TE: those of the tokens that are trained on, in the activations' own units.

        Returns: [], and [T, E] in the dtype of xhat_TE.
        """
        nats, gradient_TE = xhat_TE.new_zeros(()), torch.zeros_like(xhat_TE)
        for i, piece in enumerate(self.pieces):
            with torch.enable_grad():
                leaf_TE = xhat_TE[piece.tokens].detach().requires_grad_()
                changed_RSE = piece.y_RSE.masked_scatter(
                    piece.task.keep_RS[..., None], leaf_TE.to(piece.y_RSE.dtype)
                )
                log_q_TW = self.above.passes.changed(piece.task, self.site, changed_RSE, differentiable=True)
                if kind == "ce":
                    own = -log_q_TW.gather(1, piece.task.target_T[:, None]).sum() / self.n_predicted
                else:
                    log_p_TW = self._clean_of(i)
                    own = (log_p_TW.exp() * (log_p_TW - log_q_TW)).sum() / self.n_predicted
                (gradient_TE[piece.tokens],) = torch.autograd.grad(own, leaf_TE)
            nats += own.detach()
        return nats, gradient_TE

    def objective(self, kind: Loss, scale: float, centre_E: Tensor) -> "InModel":
        """Return the objective of an SAE in its training units; arguments as `InModel` has them."""
        return InModel(self, kind, scale, centre_E)

    def _clean_of(self, i: int) -> Tensor:
        """Return what the model predicts in a piece with the cached activations; computed once."""
        while len(self._clean) <= i:
            task, y_RSE, _ = self.pieces[len(self._clean)]
            self._clean.append(self.above.passes.changed(task, self.site, y_RSE.clone()))
        return self._clean[i]


class InModel(NamedTuple):
    """The objective of one SAE on one batch."""

    passages: Passages
    kind: Loss
    scale: float
    """Training units per unit of the activations."""
    centre_E: Tensor

    def at(self, xhat_TE: Tensor, squared: Tensor) -> AtOutput:
        """Compute the loss, and its gradient at x̂, as `Objective` has it."""
        nats, own_TE = self.passages.loss(self.kind, xhat_TE / self.scale + self.centre_E)
        gradient_TE = own_TE / self.scale
        if self.kind in WITHOUT_SQUARES:
            return AtOutput(gradient_TE, 0.0, nats, nats)
        weight = squared / nats.clamp(min=LEAST_NATS)
        return AtOutput(gradient_TE * (weight / 2), 0.5, (squared + weight * nats) / 2, nats)
