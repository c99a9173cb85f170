"""The tokens to assess on: the store's held-out rows, or all rows of another token store."""

from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saemill.assess.dealing import Addresses, dealt
from saemill.common.errors import ConfigError, DataError
from saemill.common.log import counted
from saemill.common.models.model import LanguageModel, attention_of
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.followed import FollowedStore
from saemill.common.stores.joined import JoinedSite
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.site_array import SiteArray
from saemill.common.stores.site_names import is_joined, parts_of
from saemill.common.stores.tokens import TokenStore
from saemill.common.world import Group

CHUNK_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some unmasked tokens in address order."""

    addresses_T: Addresses
    x: dict[str, Tensor]
    """Per site [T, D], in the stored dtype."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows with all their positions."""

    ids_RS: Tensor
    keep_RS: NDArray[np.bool_]
    """Unmasked positions of documents that training did not see."""
    addresses_RS: Addresses


def factors_of(array: SiteArray | JoinedSite) -> Tensor:
    """Compute the factor of each dimension with which every site that is joined varies as much as it has
    dimensions. float64 [D]"""
    factors = [
        torch.full(
            (part.width,), (part.width / (part.statistics.total_variance or part.width)) ** 0.5
        ).double()
        for part in array.parts.values()
    ]
    return torch.cat(factors)


def is_cached(store: ActivationStore, other: TokenStore | None) -> bool:
    """Tell whether the store has the activations of the evaluation tokens; `other` may be its own tokens."""
    return other is None or other.fingerprint == store.settings.tokens_fingerprint


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
        if not store.text.held_out_R.any():
            raise ConfigError(
                f"{store.path} has no held-out {store.text.row}s; {store.text.hint_to_hold_out}"
            )
        if isinstance(store, FollowedStore) and not with_model:
            raise ConfigError(
                f"shards of {store.path} were removed when they had been trained on, and only the model can "
                "compute them again; leave out --no-model"
            )
        return
    tokenizer, cached_tokenizer = other.tokenizer, store.tokens.tokenizer
    if tokenizer.hash != cached_tokenizer.hash:
        raise ConfigError(
            f"{other.named} was made with the tokenizer {tokenizer.name!r}, the activations with "
            f"{cached_tokenizer.name!r}; tokenize the text with the latter"
        )
    document, trained_document = other.manifest.document, store.tokens.manifest.document
    # Hashes of texts, of rows and of rows without their frame do not compare.
    if document != trained_document:
        raise ConfigError(
            f"a document of {other.named} is a {document}, one of the activations' tokens a "
            f"{trained_document}, so those that training saw cannot be told; make the tokens in the same way"
        )
    if not with_model:
        raise ConfigError("activations of other tokens need the model; leave out --no-model")


class EvalSet:
    """Rows of text that training did not see, as activations and as tokens; see `check_tokens`.

    Args:
        store: the activations that training read.
        other: assess on these tokens instead of the store's held-out rows. Documents that training
            saw (the same text) are left out.
        model: needed for other tokens, whose activations are computed.
        mask: positions left out.
        sites: where activations are wanted.
        batch_rows: rows per forward pass.
        everyone: the processes among which the tokens are dealt.
        is_training_known: whether training was on the store's other rows. Of SAEs that were trained
            elsewhere it is not known what they saw, and nothing is left out.
    """

    def __init__(
        self,
        store: ActivationStore,
        other: TokenStore | None,
        model: LanguageModel | None,
        mask: MaskConfig,
        sites: list[str],
        batch_rows: int,
        everyone: Group,
        *,
        is_training_known: bool = True,
    ) -> None:
        self.is_training_known = is_training_known
        self.store, self.model, self.mask, self.sites = store, model, mask, sites
        self.batch_rows, self.everyone, self.label_suffix = batch_rows, everyone, ""
        self.arrays = {name: store.site(name) for name in sites}
        self.factors = {name: factors_of(array) for name, array in self.arrays.items() if is_joined(name)}
        """Of joined sites, what brings each dimension to its own site's units: float64 [D]."""
        self.cached = is_cached(store, other)
        self._activations = self._compute if isinstance(store, FollowedStore) else self._read
        """Reads tokens of the cache; where shards were removed, the model computes them again."""
        self.text = store.text if self.cached or other is None else other
        self.n_seen_documents = 0
        if self.cached:
            self.rows_R = np.flatnonzero(store.text.held_out_R)
            self._seen = np.zeros(0, np.int64)
        else:
            self.rows_R = np.arange(self.text.n_rows)
            self._seen = self._seen_documents() if is_training_known else np.zeros(0, np.int64)
            self.n_seen_documents = len(self._seen)

    def again(self, label_suffix: str) -> "EvalSet":
        """Give the same tokens for another pass; `label_suffix` stands beside its progress."""
        same = copy(self)
        same.label_suffix = label_suffix
        return same

    @property
    def model_sites(self) -> list[str]:
        """List the sites that a model has, the second one's among them: those that are not joined."""
        return [site for site in self.sites if not is_joined(site)]

    @property
    def tokens(self) -> TokenStore:
        """Return the token store of the rows, which a model reads."""
        assert isinstance(self.text, TokenStore)
        return self.text

    @property
    def description(self) -> str:
        """Describe how these tokens were chosen."""
        whose = f"; of these the tokens of {', '.join(self.mask.roles)} alone" if self.mask.roles else ""
        saw = (
            "training never saw them" if self.is_training_known else "whether training saw them is not known"
        )
        if self.cached:
            return f"{self.text.how_held_out}; {saw}{whose}"
        name = Path(self.tokens.named).name
        if not self.is_training_known:
            return f"the tokens of {name}; {saw}{whose}"
        if self.n_seen_documents == 0:
            return f"the tokens of {name}, of whose documents training saw none{whose}"
        return (
            f"the tokens of {name}, without {counted(self.n_seen_documents, 'document')} "
            f"whose text training saw{whose}"
        )

    def n_kept(self) -> int:
        """Count the tokens that may be measured on; of tokens that are not cached, all."""
        if not self.cached:
            return len(self.rows_R) * self.tokens.ctx_len
        shards = range(self.store.n_shards)
        return sum(int(self.store.keep_addresses(shard, self.mask, True).sum()) for shard in shards)

    def _seen_documents(self) -> NDArray[np.int64]:
        trained = self.store.tokens.documents
        hashes = trained["text_hash"].to_numpy()[~trained["held_out"].to_numpy(zero_copy_only=False)]
        return np.flatnonzero(np.isin(self.tokens.documents["text_hash"].to_numpy(), hashes))

    def chunks(self, max_tokens: int) -> Iterator[Chunk]:
        """Read this process's share of the first `max_tokens` unmasked tokens, in address order."""
        return self._chunks(f"reconstruct{self.label_suffix}", (True,), max_tokens)

    def context_chunks(self, max_tokens: int) -> Iterator[Chunk]:
        """Read this process's share of the tokens to look for contexts in. Of a cache these are all rows,
        trained ones included."""
        return self._chunks("search contexts", (False, True), max_tokens)

    def training_chunks(self, max_tokens: int) -> Iterator[Chunk]:
        """Read the first cached tokens that training saw, the same for every process."""
        return map(self._activations, _limited(self._cached_batches((False,)), max_tokens))

    def rows(self, max_tokens: int) -> Iterator[Rows]:
        """Read this process's share of the first rows: at most `max_tokens` tokens, and one row at least."""
        batches = list(self._row_batches(self.rows_R[: max(1, max_tokens // self.tokens.ctx_len)]))
        for addresses_RS in dealt(f"splice{self.label_suffix}", batches, self.everyone, "tokens"):
            yield self._rows(addresses_RS)

    def batches(self, max_tokens: int) -> list[Addresses]:
        """List the first `max_tokens` unmasked tokens in batches, the same for every process."""
        return _limited(self._batches((True,)), max_tokens)

    def read(self, addresses_T: Addresses) -> Chunk:
        """Read tokens of one of the `batches`, ascending, or some of them."""
        return self._activations(addresses_T) if self.cached else self._compute(addresses_T)

    def _batches(self, held_out: tuple[bool, ...]) -> Iterator[Addresses]:
        return self._cached_batches(held_out) if self.cached else self._computed_batches()

    def _chunks(self, label: str, held_out: tuple[bool, ...], max_tokens: int) -> Iterator[Chunk]:
        batches = _limited(self._batches(held_out), max_tokens)
        for addresses_T in dealt(label, batches, self.everyone, f"{self.text.unit}s"):
            yield self.read(addresses_T)

    def _cached_batches(self, held_out: tuple[bool, ...]) -> Iterator[Addresses]:
        """List unmasked tokens of the cache, each batch from whole rows of one shard."""
        for shard in range(self.store.n_shards):
            keep = [self.store.keep_addresses(shard, self.mask, side) for side in held_out]
            addresses = np.flatnonzero(np.logical_or.reduce(keep)) + shard * self.store.shard_tokens
            while len(addresses):
                last = addresses[:CHUNK_TOKENS][-1]
                n = int(np.searchsorted(addresses, (last // self.text.ctx_len + 1) * self.text.ctx_len))
                yield addresses[:n]
                addresses = addresses[n:]

    def _computed_batches(self) -> Iterator[Addresses]:
        """List unmasked tokens, in batches of as many rows as one forward pass takes."""
        for addresses_RS in self._row_batches(self.rows_R):
            rows = self._rows(addresses_RS)
            yield rows.addresses_RS[rows.keep_RS]

    def _row_batches(self, numbers_R: NDArray[np.int64]) -> Iterator[Addresses]:
        for start in range(0, len(numbers_R), self.batch_rows):
            yield self._row_addresses(numbers_R[start : start + self.batch_rows])

    def _row_addresses(self, numbers_R: NDArray[np.int64]) -> Addresses:
        return numbers_R[:, None] * self.tokens.ctx_len + np.arange(self.tokens.ctx_len)

    def _read(self, addresses_T: Addresses) -> Chunk:
        """Read tokens of one shard from the cache."""
        shard = int(addresses_T[0]) // self.store.shard_tokens
        offsets = addresses_T - shard * self.store.shard_tokens
        x = {n: array.gather(shard, offsets) for n, array in self.arrays.items()}
        return Chunk(addresses_T, x)

    def _compute(self, addresses_T: Addresses) -> Chunk:
        """Compute the activations of tokens of some rows, in forward passes over the rows that hold them."""
        numbers_R = np.unique(addresses_T // self.tokens.ctx_len)
        rows = self._rows(self._row_addresses(numbers_R))
        parts = {name: parts_of(name) for name in self.sites}
        computed = self._capture(rows, list({part for each in parts.values() for part in each}))
        places = torch.from_numpy(np.searchsorted(rows.addresses_RS.reshape(-1), addresses_T))
        x = {
            name: array.rounded(torch.cat([computed[part][places] for part in parts[name]], 1))
            for name, array in self.arrays.items()
        }
        for site, x_TD in x.items():
            if n_bad := int((~torch.isfinite(x_TD)).any(1).sum()):
                raise DataError(
                    f"{self.tokens.named}: the activations of {counted(n_bad, 'token')} at {site} are NaN or "
                    f"beyond the type that the store has ({str(x_TD.dtype).removeprefix('torch.')})"
                )
        return Chunk(addresses_T, x)

    def _capture(self, rows: Rows, sites: list[str]) -> dict[str, Tensor]:
        """Run the model over rows. Return per site [T, D], of all their positions."""
        assert self.model is not None
        found: dict[str, list[Tensor]] = {site: [] for site in sites}
        for ids_RS in torch.split(rows.ids_RS, self.batch_rows):
            attention = attention_of(ids_RS, self.tokens.tokenizer)
            for site, x_RSD in self.model.capture(ids_RS, sites, attention).items():
                found[site].append(x_RSD.cpu().flatten(0, 1))
        return {site: torch.cat(pieces) for site, pieces in found.items()}

    def _rows(self, addresses_RS: Addresses) -> Rows:
        numbers = addresses_RS[:, 0] // self.tokens.ctx_len
        ids = np.concatenate([self.tokens.rows(row, row + 1) for row in numbers])
        keep = np.concatenate([self.tokens.keep(row, row + 1, self.mask) for row in numbers])
        if len(self._seen):
            keep &= ~np.isin(self.tokens.document_of(addresses_RS), self._seen)
        return Rows(torch.from_numpy(ids.astype(np.int64)), keep, addresses_RS)

    def units(self, addresses: NDArray[np.int64]) -> NDArray[Any]:
        """Return the unit of resampling of each address: its document's text hash. Copies count once."""
        hashes: NDArray[Any] = self.text.documents["text_hash"].to_numpy()
        return hashes[self.text.document_of(addresses)]


def _limited(batches: Iterable[Addresses], max_tokens: int) -> list[Addresses]:
    """Cut batches to `max_tokens` tokens in all; none is empty."""
    limited, left = [], max_tokens
    for batch in batches:
        if len(batch):
            limited.append(batch[:left])
            left -= len(limited[-1])
        if left == 0:
            break
    return limited
