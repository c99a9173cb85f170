"""Where some latents of an SAE fire, found in one pass over its activations, in bounded memory.

Of each latent are kept the places where it fires most, at most one per document, and a uniform sample of all
places where it fires: those whose addresses have the smallest hashes. So neither the order of the batches nor
the number of processes shows in them. A place has the latent's activations at the tokens around it with it.
Beside these there are counts: by position in the row, by source, and of latents that fire together.

A place takes 136 bytes: 500 latents with 512 sampled places each take 35 MB, and twice that while places are
added. Counts of latents together take 4 bytes for each latent that is shown and each of the SAE.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray

from saemill.assess.by_source import sources_of
from saemill.assess.evalset import Chunk, EvalSet
from saemill.assess.positions import Positions
from saemill.assess.reconstruction import ROWS_AT_ONCE
from saemill.common.sae.sae import Sae
from saemill.common.stores.permutation import hashed

AROUND = 12
"""Tokens on either side of a place whose activations are kept with it."""
N_SAMPLED = 512
"""Most places sampled of a latent."""
SEED = 11
EVERY = 4
"""One row of so many is looked at for latents that fire together."""
PLACE = np.dtype(
    [
        ("latent", "<i4"),
        ("activation", "<f4"),
        ("address", "<i8"),
        ("document", "<u8"),
        ("score", "<f8"),
        ("around", "<f4", (2 * AROUND + 1,)),
    ]
)
"""A place where a latent fires: the latent's place in the list of those shown, its activation, the token's
address, the hash of its document's text, by what it is kept (the smallest), and the activations around it."""
Places = NDArray[Any]


@dataclass(slots=True)
class Kept:
    """The places of smallest score of each latent, at most `n_each`."""

    n_latents: int
    n_each: int
    one_per_document: bool
    places: Places = field(default_factory=lambda: np.empty(0, PLACE))
    _waiting: list[Places] = field(default_factory=list)
    _bar_L: NDArray[np.float64] = field(init=False)
    """Largest score that still enters, per latent."""

    def __post_init__(self) -> None:
        self._bar_L = np.full(self.n_latents, np.inf)

    def entering(self, latent_N: NDArray[np.int64], score_N: NDArray[np.float64]) -> NDArray[np.int64]:
        """Choose the places that may be among those kept. Indices."""
        return np.flatnonzero(score_N <= self._bar_L[latent_N])

    def add(self, places: Places) -> None:
        """Take places in, which others may push out again."""
        self._waiting.append(places)
        if sum(map(len, self._waiting)) > self.n_latents * self.n_each:
            self.cut()

    def cut(self) -> None:
        """Sort by latent and score, and keep the first of each latent."""
        places = np.concatenate([self.places, *self._waiting])
        self._waiting = []
        places = places[np.lexsort((places["address"], places["score"], places["latent"]))]
        if self.one_per_document:
            places = places[_firsts(places["latent"], places["document"])]
        starts_L = np.searchsorted(places["latent"], np.arange(self.n_latents))
        rank = np.arange(len(places)) - starts_L[places["latent"]]
        self.places = places[rank < self.n_each]
        last = places[rank == self.n_each - 1]
        self._bar_L[last["latent"]] = last["score"]

    def of(self, latent: int) -> Places:
        """Return the places of a latent, by its place in the list, the smallest score first."""
        start, stop = np.searchsorted(self.places["latent"], (latent, latent + 1))
        return self.places[start:stop]


def _firsts(latent_N: NDArray[Any], document_N: NDArray[Any]) -> NDArray[np.int64]:
    """Find the first place of each document of each latent. Ascending indices."""
    order = np.lexsort((document_N, latent_N))
    latent, document = latent_N[order], document_N[order]
    new = np.ones(len(order), bool)
    new[1:] = (latent[1:] != latent[:-1]) | (document[1:] != document[:-1])
    return np.sort(order[new])


class Firing:
    """The places where some latents of an SAE fire, and counts of them.

    Args:
        sae: the SAE.
        latents: the latents.
        evalset: where the activations come from.
        n_strongest: places kept of a latent where it fires most.
    """

    def __init__(self, sae: Sae, latents: list[int], evalset: EvalSet, n_strongest: int) -> None:
        self.sae, self.evalset, n = sae, evalset, len(latents)
        self.latents_L = np.array(latents, np.int64)
        self.place_F = np.full(sae.config.num_latents, -1)
        self.place_F[latents] = np.arange(n)
        self.strongest, self.sampled = Kept(n, n_strongest, True), Kept(n, N_SAMPLED, False)
        self.n_tokens = 0
        """Tokens that were searched."""
        self.count_L, self.sum_L = np.zeros(n, np.int64), np.zeros(n)
        """Firings of each latent, and the sum of its activations."""
        self.positions = Positions(evalset.text.ctx_len)
        self.sources = sources_of(evalset)
        self.source_names = list(dict.fromkeys(self.sources.values()))
        self.by_position_LP = np.zeros((n + 1, len(self.positions.labels)), np.int64)
        self.by_source_LS = np.zeros((n + 1, len(self.source_names)), np.int64)
        """Firings of each latent by group of tokens; in the last row the tokens themselves."""
        self.n_together = 0
        """Tokens looked at for latents that fire together."""
        self.together_LF = np.zeros((n, sae.config.num_latents), np.int32)
        self.fired_F = np.zeros(sae.config.num_latents, np.int64)
        """Of these, those on which both fire, and on which each latent of the SAE does."""

    def run(self, chunks: Iterable[Chunk]) -> "Firing":
        """Search this process's chunks, then put together what all processes found."""
        with torch.inference_mode():
            for chunk in chunks:
                self._add(chunk)
        self._merge()
        return self

    def _add(self, chunk: Chunk) -> None:
        token_N, latent_N, act_N = self._codes(chunk)
        groups = [(self.by_position_LP, self.positions.of(chunk.addresses_T))]
        if self.source_names:
            groups.append((self.by_source_LS, self._sources(chunk)))
        self.n_tokens += len(chunk.addresses_T)
        self._count_together(chunk, token_N, latent_N)
        shown = self.place_F[latent_N] >= 0
        token_N, at_N, act_N = token_N[shown], self.place_F[latent_N[shown]], act_N[shown]
        self.count_L += np.bincount(at_N, minlength=len(self.count_L))
        self.sum_L += np.bincount(at_N, act_N, len(self.sum_L))
        for counts_LG, group_T in groups:
            counts_LG[-1] += np.bincount(group_T, minlength=counts_LG.shape[1])
            np.add.at(counts_LG, (at_N, group_T[token_N]), 1)
        self._keep(chunk, token_N, at_N, act_N)

    def _codes(self, chunk: Chunk) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Encode a chunk: the token, the latent and the activation of each firing."""
        found = []
        for start, x_TD in zip(
            range(0, len(chunk.addresses_T), ROWS_AT_ONCE),
            torch.split(chunk.x[str(self.sae.site)], ROWS_AT_ONCE),
            strict=True,
        ):
            codes = self.sae.encode(x_TD.to(self.sae.W_enc.device, torch.float32))
            active = (codes.top_acts > 0) & torch.isfinite(codes.top_acts)
            token = active.nonzero()[:, 0].cpu().numpy() + start
            found.append(
                (token, codes.top_indices[active].cpu().numpy(), codes.top_acts[active].cpu().numpy())
            )
        token_N, latent_N, act_N = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return token_N, latent_N, act_N

    def _sources(self, chunk: Chunk) -> NDArray[np.int64]:
        """Look up the number of each token's source."""
        numbers = {name: number for number, name in enumerate(self.source_names)}
        documents, place_T = np.unique(self.evalset.units(chunk.addresses_T), return_inverse=True)
        return np.array([numbers[self.sources[document]] for document in documents.tolist()])[place_T]

    def _count_together(self, chunk: Chunk, token_N: NDArray[np.int64], latent_N: NDArray[np.int64]) -> None:
        """Count latents that fire on the same tokens, in one row of `EVERY`."""
        looked_T = chunk.addresses_T // self.evalset.text.ctx_len % EVERY == 0
        here = looked_T[token_N]
        ones, shape = np.ones(int(here.sum()), np.int32), (len(looked_T), len(self.place_F))
        fires_TF = scipy.sparse.csr_array((ones, (token_N[here], latent_N[here])), shape=shape)
        shown = np.flatnonzero(self.place_F >= 0)
        counts = (fires_TF[:, shown].T @ fires_TF).toarray()
        self.together_LF[self.place_F[shown]] += counts
        self.fired_F += np.bincount(latent_N[here], minlength=len(self.fired_F))
        self.n_together += int(looked_T.sum())

    def _keep(
        self,
        chunk: Chunk,
        token_N: NDArray[np.int64],
        at_N: NDArray[np.int64],
        act_N: NDArray[np.float32],
    ) -> None:
        """Offer the firings of a chunk to those that are kept."""
        order = np.lexsort((token_N, at_N))
        at_N, act_N, address_N = at_N[order], act_N[order], chunk.addresses_T[token_N[order]]
        document_N = self.evalset.units(address_N)
        number_N = address_N * len(self.place_F) + self.latents_L[at_N]
        keys = hashed(number_N.astype(np.uint64), SEED)
        for kept, score_N in ((self.strongest, -act_N.astype(np.float64)), (self.sampled, keys / 2.0**64)):
            chosen = kept.entering(at_N, score_N)
            places = np.empty(len(chosen), PLACE)
            places["latent"], places["activation"] = at_N[chosen], act_N[chosen]
            places["address"], places["document"] = address_N[chosen], document_N[chosen]
            places["score"] = score_N[chosen]
            places["around"] = around(at_N, address_N, act_N, chosen, self.evalset.text.ctx_len)
            kept.add(places)

    def _merge(self) -> None:
        everyone = self.evalset.everyone
        for kept in (self.strongest, self.sampled):
            kept.cut()
            kept.places = np.concatenate(everyone.all_gather_objects(kept.places))
            kept.cut()
        self.n_tokens = sum(everyone.all_gather_objects(self.n_tokens))
        self.n_together = sum(everyone.all_gather_objects(self.n_together))
        for counts in (self.count_L, self.sum_L, self.by_position_LP, self.by_source_LS, self.together_LF):
            counts[:] = everyone.all_reduce(torch.from_numpy(counts)).numpy()
        self.fired_F = everyone.all_reduce(torch.from_numpy(self.fired_F)).numpy()


def around(
    latent_N: NDArray[np.int64],
    address_N: NDArray[np.int64],
    act_N: NDArray[np.float32],
    chosen_M: NDArray[np.int64],
    ctx_len: int,
) -> NDArray[np.float32]:
    """Look up the activations at the tokens around some firings, in the same row.

    Args:
        latent_N, address_N, act_N: firings, by latent and then by address.
        chosen_M: indices of some of them.
        ctx_len: tokens per row.

    Returns: [M, 2 · AROUND + 1], the firing itself in the middle; 0 where the latent does not fire.
    """
    acts_MA = np.zeros((len(chosen_M), 2 * AROUND + 1), np.float32)
    for step in range(-AROUND, AROUND + 1):
        there_M = np.clip(chosen_M + step, 0, max(0, len(latent_N) - 1))
        distance_M = address_N[there_M] - address_N[chosen_M]
        near_M = (
            (latent_N[there_M] == latent_N[chosen_M])
            & (abs(distance_M) <= AROUND)
            & (address_N[there_M] // ctx_len == address_N[chosen_M] // ctx_len)
        )
        acts_MA[near_M, AROUND + distance_M[near_M]] = act_N[there_M[near_M]]
    return acts_MA
