"""The tokens that latents make more and less probable, by their decoder rows and the model's unembedding.

A latent adds its decoder row to the residual stream; γ of the final norm and the unembedding turn that into
logits. This is the direct path alone: what later blocks make of it is left out, and no pass of the model is
needed. A crosscoder has such a row at each of its sites. A cross-layer transcoder adds rows to the stream at
several layers, and their sum is what reaches the unembedding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from saemill.assess.reader import Pieces
from saemill.common.errors import ConfigError, StoreError
from saemill.common.models.unembedding import Unembedding, load_unembedding
from saemill.common.sae.sae import Sae
from saemill.common.stores import features
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.features import Effect, Token
from saemill.common.stores.passages import PassageStore
from saemill.common.stores.site_names import BESIDE
from saemill.common.stores.site_roles import Role

N_TOKENS = 10
AT_ONCE = 512
"""Latents whose logits are computed at once."""
IN_RESIDUAL_STREAM = ("residual", "holds_residual", "added")
"""Roles of sites whose activations are in the residual stream as they are, up to a factor."""
UNKNOWN = Effect(promoted=(), suppressed=())


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What latents write to one place, and the unembedding that reads it."""

    record: features.Vocabulary
    """The place, and why there is no unembedding to be used."""
    rows_FD: Tensor | None = None
    """What each latent adds there to the residual stream at an activation of 1, float32 [F, D]; None, as the
    unembedding, where no tokens are known."""
    unembedding: Unembedding | None = None

    def effects(self, latents: Sequence[int], pieces: Pieces | None) -> list[Effect]:
        """List the tokens that each latent promotes most, and those that it suppresses most.

        Args:
            latents: which.
            pieces: texts of tokens; None of passages, which have none.
        """
        if self.unembedding is None or self.rows_FD is None or pieces is None:
            return [UNKNOWN] * len(latents)
        found = []
        for start in range(0, len(latents), AT_ONCE):
            some = torch.tensor(latents[start : start + AT_ONCE], device=self.rows_FD.device)
            logits_LV = self.unembedding.logits(self.rows_FD[some].cpu())
            n = min(N_TOKENS, logits_LV.shape[1])
            up, down = (logits_LV.topk(n, 1, largest=largest) for largest in (True, False))
            found += [
                Effect(promoted=_tokens(most, highest, pieces), suppressed=_tokens(least, lowest, pieces))
                for most, highest, least, lowest in zip(
                    *(up.indices, up.values, down.indices, down.values), strict=True
                )
            ]
        return found


def _tokens(ids: Tensor, logits: Tensor, pieces: Pieces) -> tuple[Token, ...]:
    pairs = zip(ids.tolist(), logits.tolist(), strict=True)
    return tuple(Token(text=pieces.text(number), logit=logit) for number, logit in pairs)


def vocabularies(sae: Sae, store: ActivationStore, model: str | None) -> list[Vocabulary]:
    """Read the unembedding for each place that an SAE writes to, where that is what the unembedding reads.

    Args:
        sae: the SAE.
        store: what it was trained on.
        model: the model's folder or hub id, if it is not where it was cached from.

    Returns: one; of a crosscoder one per site, of a cross-layer transcoder one for all that it predicts.
    """
    outputs, models = sae.config.outputs, _Models(store, model)
    sites = [part.site for part in outputs] or [str(sae.target_site)]
    widths = [part.width for part in outputs] or [sae.W_dec.shape[1]]
    writes = dict(zip(sites, torch.split(sae.decoder_rows, widths, 1), strict=True))
    if sae.config.predicted:
        return [_vocabulary(f"{sites[0]} to {sites[-1]}, added up", writes, models)]
    return [_vocabulary(site, {site: rows_FD}, models) for site, rows_FD in writes.items()]


class _Models:
    """The models whose activations a store holds, by their unembeddings.

    Args:
        store: the activations.
        model: the first model's folder or hub id, if it is not where it was cached from.
    """

    def __init__(self, store: ActivationStore, model: str | None) -> None:
        self.store, self._model = store, model

    @cached_property
    def first(self) -> Unembedding | str:
        """Unembedding of the model; or why there is none."""
        return _unembedding(self.store, self._model)

    @cached_property
    def second(self) -> Unembedding | str:
        """The same of the model of the store beside."""
        return "" if self.store.beside is None else _unembedding(self.store.beside, None)


def _unembedding(store: ActivationStore, model: str | None) -> Unembedding | str:
    """Read the unembedding of the model that a store was cached from; or say why there is none."""
    settings = store.settings
    name, revision = model or str(settings.model), None if model else settings.revision
    try:
        return load_unembedding(name, revision, store.tokens.tokenizer.vocab_size)
    except (ConfigError, StoreError) as error:
        return str(error)


def _vocabulary(at: str, writes: Mapping[str, Tensor], models: _Models) -> Vocabulary:
    """Open the vocabulary of one place.

    Args:
        at: what the place is called.
        writes: site → what each latent writes there, [F, D]: one, or several that the residual stream sums.
        models: whose unembeddings there are.
    """
    if isinstance(models.store.text, PassageStore):
        return _unknown(at, "embeddings have no language model")
    roles = {site: models.store.site(site).role for site in writes}
    for site, role in roles.items():
        if missing := _elsewhere(site, role, has_others=len(writes) > 1):
            return _unknown(at, missing)
    unembedding = models.second if at.startswith(BESIDE) else models.first
    if isinstance(unembedding, str):
        return _unknown(at, unembedding)
    added = [writes[site].float() * role.factor for site, role in roles.items() if role is not None]
    rows_FD, width = torch.stack(added).sum(0), unembedding.weight_VD.shape[1]
    if rows_FD.shape[1] != width:
        return _unknown(at, f"{at} is {rows_FD.shape[1]} wide, and the unembedding reads {width}")
    return Vocabulary(features.Vocabulary(at=at, missing=None), rows_FD, unembedding)


def _unknown(at: str, missing: str) -> Vocabulary:
    return Vocabulary(features.Vocabulary(at=at, missing=missing))


def _elsewhere(site: str, role: Role | None, *, has_others: bool) -> str | None:
    """Say why what is written to a site is not added to the residual stream, or why that is not known."""
    if role is None:
        return f"what {site} is to the residual stream is not known"
    if role.kind not in IN_RESIDUAL_STREAM:
        return f"{site} is {role.described}, so its directions are not those of the residual stream"
    if has_others and role.kind != "added":
        return f"{site} is {role.described}, so what is written to it and to other sites is no sum"
    return None
