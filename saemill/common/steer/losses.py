"""What a model loses, token by token, when other activations take the place of its own at a site.

Activations are replaced at the unmasked positions, the same ones in every run, and losses are counted at
those: next-token for causal models; for masked ones a fixed 15% of the unmasked positions are replaced by
[MASK] and predicted.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saemill.common.errors import ConfigError, DataError
from saemill.common.models.cached import check_model, load_model
from saemill.common.models.model import LanguageModel, attention_of
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.permutation import hashes
from saemill.common.stores.tokens import TokenizerInfo, TokenStore

MASKED_SHARE = 0.15
MASK_KEY = 15
IDENTITY_TOLERANCE = 1e-3
"""Most nats per token that splicing the true activation may change."""
CACHE_BYTES = 1 << 20
"""Bytes of float32 values that go through several operations while they are in a CPU's cache."""


@dataclass(frozen=True, slots=True)
class Task:
    """Some rows on their way through the model."""

    ids_RS: Tensor
    attention_RS: Tensor | None
    target_T: Tensor
    """int64, the tokens to predict at the counted positions."""
    counted_RS: Tensor
    """bool: where losses are counted."""
    keep_RS: Tensor
    """bool: where activations are replaced."""
    activations: dict[str, Tensor]
    """Per site the true ones, [R, S, D]."""


def check_mask_token(model: LanguageModel, tokens: TokenStore) -> None:
    """Refuse a masked LM whose tokenizer has no mask token, before anything is measured.

    Raises:
        ConfigError: naming the model.
    """
    if model.head == "masked" and tokens.tokenizer.mask_id is None:
        raise ConfigError(f"{model.name} is a masked LM, but its tokenizer has no mask token")


def no_loss(model: LanguageModel, tokens: TokenStore, row: int) -> str | None:
    """Say why next-token losses of a model mean nothing, if it sees the tokens that it is to predict.

    Args:
        model: with its LM head.
        tokens: what it reads.
        row: number of a row to try it on.
    """
    ids_RS = torch.from_numpy(tokens.rows(row, row + 1).astype(np.int64))
    if model.head == "causal" and model.sees_later_tokens(ids_RS):
        return f"{model.name} sees the tokens after each position, so it has no next-token loss"
    return None


def load_with_losses(
    name: str | None, store: ActivationStore, device: torch.device, setting: str
) -> LanguageModel:
    """Load the model of a store, and refuse one whose losses mean nothing.

    Args:
        name: another name of it; None for the one that was cached.
        store: its activations.
        device: where it runs.
        setting: what asks for the losses.

    Raises:
        ConfigError: it cannot be loaded, is another model, has no losses, or cannot be given its tokens.
    """
    model = load_model(name, store, None, device)
    check_model(name, model, store)
    check_mask_token(model, store.tokens)
    held_out_R = store.tokens.held_out_R
    why = no_loss(model, store.tokens, int(np.flatnonzero(held_out_R)[0]) if held_out_R.any() else 0)
    if model.head is None:
        why = f"{model.name} has no language-model head"
    if why:
        raise ConfigError(f"{setting}: {why}; leave it out")
    return model


class Passes:
    """Forward passes of a model, with its own activations and with others.

    Args:
        model: with its LM head; see `check_mask_token`.
        tokenizer: of the rows.
        sites: where activations are replaced.
        prefix: what their names begin with here, and not in the model: `with.` of the model of a store beside
            another.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: TokenizerInfo, sites: Iterable[str], prefix: str = ""
    ) -> None:
        self.model, self.tokenizer, self.prefix = model, tokenizer, prefix
        self.identity: dict[str, float] = {}
        """What splicing the true activation changed, in nats per token, by site."""
        self.sites = tuple(sites)
        self.skippable = set(self.sites)
        """Sites before which blocks may be left out."""

    def task(self, ids_RS: Tensor, keep_RS: NDArray[np.bool_], addresses_RS: NDArray[np.int64]) -> Task:
        """Set what is to be predicted in some rows.

        Args:
            ids_RS: token ids, int64.
            keep_RS: the unmasked positions.
            addresses_RS: of the tokens, which decide what a masked LM predicts.
        """
        if self.model.head == "causal":
            target_RS, counted_RS = ids_RS.roll(-1, 1), keep_RS.copy()
            counted_RS[:, -1] = False
        else:
            mask_id = self.tokenizer.mask_id
            assert mask_id is not None
            drawn = hashes(int(addresses_RS.max()) + 1, MASK_KEY)[addresses_RS]
            counted_RS = keep_RS & (drawn < np.uint64(MASKED_SHARE * 2**64))
            target_RS, ids_RS = ids_RS, torch.where(torch.from_numpy(counted_RS), mask_id, ids_RS)
        counted, device = torch.from_numpy(counted_RS), self.model.device
        attention_RS, keep = attention_of(ids_RS, self.tokenizer), torch.from_numpy(keep_RS)
        return Task(ids_RS, attention_RS, target_RS[counted].to(device), counted, keep.to(device), {})

    def clean(self, task: Task, sites: Iterable[str]) -> Tensor:
        """Compute log probabilities [T, W] of the untouched model; the sites' activations are kept."""
        with ExitStack() as stack:
            for site in sites:
                stack.enter_context(self._splice(site, partial(_note, task.activations, site)))
            clean = _log_probs(self.model.logits(task.ids_RS, task.attention_RS), task.counted_RS)
        self.skippable -= {self.prefix + site for site in self.model.tuple_sites}
        return clean

    def changed(self, task: Task, site: str, changed_RSD: Tensor, *, differentiable: bool = False) -> Tensor:
        """Compute log probabilities [T, W] of the model with other activations at the site.

        Args:
            task: the rows.
            site: its name.
            changed_RSD: the other activations.
            differentiable: whether gradients may be asked for.
        """
        own = site.removeprefix(self.prefix)
        skip = self.model.skip_blocks_to(own) if site in self.skippable else nullcontext()
        with skip, self._splice(site, lambda _: changed_RSD):
            logits_RSW = self.model.logits(task.ids_RS, task.attention_RS, differentiable=differentiable)
            return _log_probs(logits_RSW, task.counted_RS)

    def replaced(self, task: Task, edits: Mapping[str, Callable[[Tensor], Tensor]]) -> Tensor:
        """Compute log probabilities [T, W] of the model with several sites' activations replaced at once.

        Args:
            task: the rows.
            edits: what is done to the activations [R, S, D] at each site, by its name.
        """
        with ExitStack() as stack:
            for site, edit in edits.items():
                stack.enter_context(self._splice(site, edit))
            return _log_probs(self.model.logits(task.ids_RS, task.attention_RS), task.counted_RS)

    def _splice(self, site: str, edit: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
        """Replace the activation x_RSD at a site by `edit(x_RSD)` while the block runs."""
        return self.model.splice(site.removeprefix(self.prefix), edit)

    def check_identity(self, site: str, task: Task, clean_T: NDArray[np.float64]) -> None:
        """Splice the true activation, once for a site; where that needs the blocks before it, skip them no
        more.

        Args:
            site: its name.
            task: of whose activations `clean` has kept the site's.
            clean_T: the losses of the untouched model.

        Raises:
            DataError: splicing the true activation changes the loss.
        """
        if site in self.identity or not np.isfinite(clean_T).all():
            return  # losses that are not finite will be null; a task with losses may come
        self.identity[site] = self._effect_of_nothing(site, task, clean_T)
        if not self.identity[site] <= IDENTITY_TOLERANCE and site in self.skippable:
            self.skippable.remove(site)
            self.identity[site] = self._effect_of_nothing(site, task, clean_T)
        if not self.identity[site] <= IDENTITY_TOLERANCE:
            raise DataError(
                f"splicing the true activation at {site} changes the loss by {self.identity[site]:.4f} nats "
                "per token: the site is not where the model's forward pass reads it"
            )

    def _effect_of_nothing(self, site: str, task: Task, clean_T: NDArray[np.float64]) -> float:
        spliced = self.changed(task, site, task.activations[site].clone())
        return float(np.abs(cross_entropy(spliced, task.target_T) - clean_T).mean())


def cross_entropy(log_probs: Tensor, target_T: Tensor) -> NDArray[np.float64]:
    """Compute the loss of each token, in nats, from log probabilities [T, W]."""
    return -log_probs.gather(1, target_T[:, None])[:, 0].double().cpu().numpy()


def _note(activations: dict[str, Tensor], site: str, x_RSD: Tensor) -> Tensor:
    activations[site] = x_RSD.clone()
    return x_RSD


def _log_probs(logits_RSW: Tensor, counted_RS: Tensor) -> Tensor:
    """Compute log softmax in float32 at the counted positions. [T, vocabulary]."""
    counted_RS = counted_RS.to(logits_RSW.device)
    if logits_RSW.requires_grad:
        return logits_RSW[counted_RS].float().log_softmax(-1)
    logits_NW, places_T = logits_RSW.flatten(0, 1), counted_RS.flatten().nonzero()[:, 0]
    log_probs = logits_NW.new_empty(len(places_T), logits_NW.shape[1], dtype=torch.float32)
    for some in in_cache(log_probs):
        log_probs[some] = logits_NW[places_T[some]].float().log_softmax(-1)
    return log_probs


def in_cache(values_TW: Tensor) -> Iterator[slice]:
    """Yield the rows of float32 values in slices that a CPU's cache holds; on other devices all at once."""
    n_rows = max(1, len(values_TW))
    if values_TW.device.type == "cpu":
        n_rows = max(1, CACHE_BYTES // values_TW[:1].nbytes) if len(values_TW) else 1
    for start in range(0, len(values_TW), n_rows):
        yield slice(start, start + n_rows)
