"""The tokens to assess on: the store's held-out rows, or all rows of another token store."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saemill.common.activations import ActivationStore
from saemill.common.errors import ConfigError
from saemill.common.log import counted
from saemill.common.mask import MaskConfig
from saemill.common.model import LanguageModel, attention_of
from saemill.common.shards import as_tensor
from saemill.common.tokens import TokenStore


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some unmasked tokens in address order."""

    addresses_T: NDArray[np.int64]
    x: dict[str, Tensor]
    """Per site [T, D], in the stored dtype."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows with all their positions."""

    ids_RS: Tensor
    keep_RS: NDArray[np.bool_]
    """Unmasked positions of documents that training did not see."""
    addresses_RS: NDArray[np.int64]


def is_cached(store: ActivationStore, other: TokenStore | None) -> bool:
    """Whether the activations of the evaluation tokens are in the store; `other` may be its own tokens."""
    return other is None or other.fingerprint == store.settings["tokens_fingerprint"]


def check_tokens(store: ActivationStore, other: TokenStore | None, with_model: bool) -> None:
    """Refuse what cannot be assessed on, before a model is loaded.

    Args:
        store: the activations that training read.
        other: tokens to assess on instead of the store's held-out rows.
        with_model: whether a model will be at hand.

    Raises:
        ConfigError: no row is held out, or `other` needs a model or another tokenizer.
    """
    if other is None or is_cached(store, other):
        if not store.tokens.held_out_R.any():
            raise ConfigError(
                f"{store.path} has no held-out rows; tokenize with --held-out-fraction above 0, or name "
                "other text with --tokens"
            )
        return
    mine, theirs = other.tokenizer, store.tokens.tokenizer
    if mine.hash != theirs.hash:
        raise ConfigError(
            f"{other.path} was made with the tokenizer {mine.name!r}, the activations with "
            f"{theirs.name!r}; tokenize the text with the latter"
        )
    mine_are_ids, theirs_are_ids = (
        tokens.manifest["source"]["column"] == "input_ids" for tokens in (other, store.tokens)
    )
    if mine_are_ids != theirs_are_ids:
        raise ConfigError(
            f"{other.path} and the activations' tokens were not both made from text (or both from "
            "ids), so documents that training saw cannot be told; tokenize the text itself"
        )
    if not with_model:
        raise ConfigError("activations of other tokens need the model; leave out --no-model")


class EvalSet:
    """Rows of text that training did not see, as activations and as tokens; see `check_tokens`.

    Args:
        store: the activations that training read.
        other: assess on these tokens instead of the store's held-out rows. Documents that training
            saw (the same text) are left out.
        model: needed for other tokens, whose activations are computed on the way.
        mask: positions left out.
        sites: where activations are wanted.
        batch_rows: rows per forward pass.
    """

    def __init__(
        self,
        store: ActivationStore,
        other: TokenStore | None,
        model: LanguageModel | None,
        mask: MaskConfig,
        sites: list[str],
        batch_rows: int,
    ) -> None:
        self.store, self.model, self.mask, self.sites = store, model, mask, sites
        self.batch_rows = batch_rows
        self.cached = is_cached(store, other)
        self.tokens = store.tokens if self.cached or other is None else other
        self.n_seen_documents = 0
        if self.cached:
            self.rows_R = np.flatnonzero(store.tokens.held_out_R)
            self._seen = np.zeros(0, np.int64)
        else:
            self.rows_R = np.arange(self.tokens.n_rows)
            self._seen = self._seen_documents()
            self.n_seen_documents = len(self._seen)

    @property
    def description(self) -> str:
        """How these tokens were chosen."""
        if self.cached:
            fraction = self.tokens.manifest["settings"]["held_out_fraction"]
            return (
                f"rows of documents held out when the tokens were made ({fraction:.0%} of documents, "
                "chosen by a hash of their text); training never saw them"
            )
        if self.n_seen_documents == 0:
            return f"the tokens of {self.tokens.path.name}, of whose documents training saw none"
        return (
            f"the tokens of {self.tokens.path.name}, without {counted(self.n_seen_documents, 'document')} "
            "whose text training saw"
        )

    def _seen_documents(self) -> NDArray[np.int64]:
        trained = self.store.tokens.documents
        hashes = trained["text_hash"].to_numpy()[~trained["held_out"].to_numpy(zero_copy_only=False)]
        return np.flatnonzero(np.isin(self.tokens.documents["text_hash"].to_numpy(), hashes))

    def chunks(self, max_tokens: int) -> Iterator[Chunk]:
        """Unmasked tokens in address order, at most `max_tokens` of them."""
        source = self._cached_chunks(held_out=True) if self.cached else self._computed_chunks()
        return _limited(source, max_tokens)

    def context_chunks(self, max_tokens: int) -> Iterator[Chunk]:
        """Tokens to look for contexts in: of the cache all rows, trained ones included."""
        if not self.cached:
            return self.chunks(max_tokens)
        return _limited(self._cached_chunks(held_out=None), max_tokens)

    def _cached_chunks(self, held_out: bool | None) -> Iterator[Chunk]:
        arrays = {name: self.store.site(name) for name in self.sites}
        for shard in range(self.store.n_shards):
            sides = (False, True) if held_out is None else (held_out,)
            keep = np.logical_or.reduce([self.store.keep_addresses(shard, self.mask, s) for s in sides])
            offsets = np.flatnonzero(keep)
            for start in range(0, len(offsets), CHUNK_TOKENS):
                part = offsets[start : start + CHUNK_TOKENS]
                x = {n: as_tensor(array.gather(shard, part), array.dtype) for n, array in arrays.items()}
                yield Chunk(part + shard * self.store.shard_tokens, x)

    def _computed_chunks(self) -> Iterator[Chunk]:
        assert self.model is not None
        dtype = {name: self.store.site(name).dtype for name in self.sites}
        for rows in self.rows(self.tokens.n_tokens):
            attention = attention_of(rows.ids_RS, self.tokens.tokenizer)
            captured = self.model.capture(rows.ids_RS, self.sites, attention)
            keep = torch.from_numpy(rows.keep_RS)
            x = {name: captured[name].cpu()[keep].to(dtype[name]) for name in self.sites}
            yield Chunk(rows.addresses_RS[rows.keep_RS], x)

    def rows(self, max_tokens: int) -> Iterator[Rows]:
        """Whole rows in order, at most `max_tokens` tokens of them (one row at least)."""
        ctx_len = self.tokens.ctx_len
        chosen = self.rows_R[: max(1, max_tokens // ctx_len)]
        for start in range(0, len(chosen), self.batch_rows):
            numbers = chosen[start : start + self.batch_rows]
            ids = np.concatenate([self.tokens.rows(row, row + 1) for row in numbers])
            addresses = numbers[:, None] * ctx_len + np.arange(ctx_len)
            keep = self.mask.keep(ids, self.tokens.tokenizer.special_ids)
            if len(self._seen):
                keep &= ~np.isin(self.tokens.document_of(addresses), self._seen)
            yield Rows(torch.from_numpy(ids.astype(np.int64)), keep, addresses)

    def units(self, addresses: NDArray[np.int64]) -> NDArray[Any]:
        """The unit of resampling of each address: its document's text hash, copies count once."""
        hashes: NDArray[Any] = self.tokens.documents["text_hash"].to_numpy()
        return hashes[self.tokens.document_of(addresses)]


CHUNK_TOKENS = 8192


def _limited(chunks: Iterator[Chunk], max_tokens: int) -> Iterator[Chunk]:
    left = max_tokens
    for chunk in chunks:
        n = min(left, len(chunk.addresses_T))
        if n:
            yield Chunk(chunk.addresses_T[:n], {name: x[:n] for name, x in chunk.x.items()})
        left -= n
        if left == 0:
            return
