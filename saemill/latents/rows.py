"""Rows of tokens as judges number them, and the activations of their tokens.

A store's rows may be cut into several of `ctx` tokens. A token's place is `row * ctx + pos`, its row counted
among those that are exported: where all are, from the first, it is the token's address.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saemill.common.errors import ConfigError, DataError
from saemill.common.log import progress
from saemill.common.sae.sae import Sae
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.mask import MaskConfig

CHUNK_TOKENS = 2048
"""Tokens encoded at once, or one row where that is longer."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some unmasked tokens, by ascending place."""

    places_T: NDArray[np.int64]
    x_TD: Tensor
    """Activations at the site, in the stored dtype."""


@dataclass(frozen=True, slots=True)
class Entries:
    """Codes of some tokens: where latents are active, by ascending place, and by latent within one."""

    place_N: NDArray[np.int64]
    latent_N: NDArray[np.int64]
    act_N: NDArray[np.float32]


class Rows:
    """Some rows of a store.

    Args:
        store: the tokens and activations.
        mask: positions at which no latent counts as active.
        max_tokens: most tokens, in whole rows of the store; one row at least.
        ctx: tokens per row; None for the store's.
        held_out: only rows that training did not see.

    Raises:
        ConfigError: ctx does not divide the store's rows, or no row is held out.
    """

    def __init__(
        self, store: ActivationStore, mask: MaskConfig, max_tokens: int, ctx: int | None, held_out: bool
    ) -> None:
        self.store, self.mask = store, mask
        self.ctx = ctx or store.ctx_len
        if store.ctx_len % self.ctx:
            raise ConfigError(
                f"ctx must divide the {store.ctx_len} tokens of the store's rows, got {self.ctx}"
            )
        numbers_R = np.flatnonzero(store.text.held_out_R) if held_out else np.arange(store.text.n_rows)
        self.numbers_R = numbers_R[: max(1, max_tokens // store.ctx_len)]
        """Numbers of the rows in the store, ascending."""
        if not len(self.numbers_R):
            raise ConfigError(
                f"{store.path} has no held-out rows; {store.text.hint_to_hold_out}, or leave out --held-out"
            )
        self.n_rows = len(self.numbers_R) * (store.ctx_len // self.ctx)
        self.n_tokens = self.n_rows * self.ctx
        """Tokens in these rows, masked ones included."""

    def ids(self, start: int, stop: int) -> NDArray[Any]:
        """Read the token ids of the rows start..stop. Unsigned [stop - start, ctx]."""
        per_row = self.store.ctx_len // self.ctx
        first = start // per_row
        whole = [self.store.tokens.rows(row, row + 1) for row in self.numbers_R[first : -(-stop // per_row)]]
        return np.concatenate(whole).reshape(-1, self.ctx)[start - first * per_row : stop - first * per_row]

    def chunks(self, site: str, max_unmasked: int | None = None) -> Iterator[Chunk]:
        """Read the activations of all unmasked tokens, or of the first `max_unmasked`.

        A chunk has whole rows of the store, but for the one that `max_unmasked` cuts.
        """
        array, ctx_len = self.store.site(site), self.store.ctx_len
        left = self.n_tokens if max_unmasked is None else max_unmasked
        for first, numbers_R in self._batches():
            shard, start = numbers_R[0] * ctx_len // self.store.shard_tokens, numbers_R[0]
            keep_RS = self.store.text.keep(int(start), int(numbers_R[-1]) + 1, self.mask)[numbers_R - start]
            kept = np.flatnonzero(keep_RS)[:left]
            left -= len(kept)
            row, pos = np.divmod(kept, ctx_len)
            offsets = numbers_R[row] * ctx_len + pos - shard * self.store.shard_tokens
            if len(kept):
                x_TD = array.gather(int(shard), offsets)
                yield Chunk(first * ctx_len + kept, x_TD)

    def _batches(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """List rows of one shard each, with the place of the first among all."""
        at_once = max(1, CHUNK_TOKENS // self.store.ctx_len)
        shard_R = self.numbers_R * self.store.ctx_len // self.store.shard_tokens
        edges = np.flatnonzero(np.diff(shard_R, prepend=-1, append=-1))
        for start, stop in pairwise(edges):
            for first in range(start, stop, at_once):
                yield first, self.numbers_R[first : min(first + at_once, stop)]


def encode(sae: Sae, chunk: Chunk, least: float = 0.0) -> Entries:
    """Compute the codes of a chunk's tokens.

    Args:
        sae: the SAE.
        chunk: the tokens.
        least: an activation no larger than this counts as none.

    Raises:
        DataError: an activation is not finite.
    """
    with torch.inference_mode():
        acts_TK, latents_TK = sae.encode(chunk.x_TD.to(sae.W_enc.device, torch.float32))
    acts_TK, latents_TK = acts_TK.float().cpu(), latents_TK.cpu()
    if not bool(acts_TK.isfinite().all()):
        raise DataError(f"activations of latents at {sae.site} are not finite; train the SAE again")
    token, slot = (acts_TK > least).nonzero(as_tuple=True)
    place_N, latent_N = chunk.places_T[token.numpy()], latents_TK[token, slot].numpy()
    order = np.lexsort((latent_N, place_N))
    return Entries(place_N[order], latent_N[order], acts_TK[token, slot].numpy()[order])


def entries(sae: Sae, rows: Rows, label: str, least: float = 0.0) -> Iterator[tuple[Chunk, Entries]]:
    """Read and encode all unmasked tokens of some rows, and show progress.

    Args:
        sae: the SAE.
        rows: the tokens.
        label: what is being done.
        least: as of `encode`.

    Raises:
        ConfigError: all tokens are masked.
        DataError: an activation is not finite.
    """
    n_seen = 0
    with progress(label, rows.n_tokens, "tokens") as advance:
        for chunk in rows.chunks(str(sae.site)):
            yield chunk, encode(sae, chunk, least)
            n_done = int(chunk.places_T[-1]) + 1
            advance(n_done - n_seen)
            n_seen = n_done
    if not n_seen:
        raise ConfigError(f"the mask leaves none of {rows.n_tokens:,} tokens; take more, by --max-tokens")
