"""Where latents of an SAE fire: every firing of theirs, found in one pass over its activations, in memory.

Of each latent all else follows from that: the places where it fires most, at most one per document; a uniform
sample of all of them, those whose addresses have the smallest hashes; counts by position in the row and by
source; the latents that fire together with it. Neither the order of the batches nor the number of processes
shows in any of it.

A firing takes 8 bytes, three times that while they are put together. Of the SAE's other latents those in one
row of four are kept, which tell what fires together.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray

from saemill.assess.by_source import sources_of
from saemill.assess.evalset import Chunk, EvalSet
from saemill.assess.positions import Positions
from saemill.assess.reconstruction import ROWS_AT_ONCE
from saemill.assess.scratch import Scratch
from saemill.common.sae.sae import Sae
from saemill.common.stores.permutation import hashed

AROUND = 12
"""Tokens on either side of a place whose activations are shown with it."""
N_SAMPLED = 512
"""Most places sampled of a latent."""
SEED = 11
EVERY = 4
"""One row of so many is looked at for latents that fire together."""
FIRING_BYTES = 24
"""Bytes of a firing of a latent that is shown, while they are put together."""
Sparse = Any
"""Matrix of scipy's, tokens by latents."""


@dataclass(frozen=True, slots=True)
class Fires:
    """All places where one latent fires, by address."""

    latent: int
    addresses_N: NDArray[np.int64]
    acts_N: NDArray[np.float32]
    documents_N: NDArray[np.uint64]
    """Hashes of their documents' texts."""
    key: int
    """Number that the places of this latent are hashed with: of all latents of the SAE."""
    ctx_len: int

    @property
    def largest(self) -> float:
        """Largest activation; 0 where it never fires."""
        return float(self.acts_N.max(initial=0))

    @property
    def smallest(self) -> float:
        """Smallest activation; 0 where it never fires below 0."""
        return float(self.acts_N.min(initial=0))

    @property
    def mean(self) -> float:
        """Mean activation where it fires; 0 where it never does."""
        return float(self.acts_N.sum(dtype=np.float64)) / max(1, len(self.acts_N))

    def strongest(self, n: int, sign: int = 1) -> NDArray[np.int64]:
        """Choose the places where it fires most above 0, or with sign −1 below it, at most one per document,
        the strongest first. Indices."""
        signed_N = self.acts_N if sign > 0 else -self.acts_N
        places = np.flatnonzero(signed_N > 0)
        if not len(places):
            return places
        # As addresses ascend, a document's places stand together: only the strongest of each are sorted.
        signed_P, documents_P = signed_N[places], self.documents_N[places]
        starts = np.flatnonzero(np.append(True, documents_P[1:] != documents_P[:-1]))
        most_D = np.maximum.reduceat(signed_P, starts)
        is_most_P = signed_P == np.repeat(most_D, np.diff(starts, append=len(places)))
        most = np.flatnonzero(is_most_P)
        most = most[np.searchsorted(most, starts)]  # the first of each document
        order = most[np.argsort(-most_D, kind="stable")]
        _, first = np.unique(documents_P[order], return_index=True)  # a text may be there twice
        return places[order[np.sort(first)[:n]]]

    def sampled(self) -> NDArray[np.int64]:
        """Draw a uniform sample of the places: those of the smallest hashes, by these. Indices."""
        numbers = self.addresses_N.astype(np.uint64) * np.uint64(self.key) + np.uint64(self.latent)
        keys = hashed(numbers, SEED)
        smallest = np.arange(len(keys))
        if len(keys) > N_SAMPLED:
            smallest = np.argpartition(keys, N_SAMPLED)[:N_SAMPLED]
        return smallest[np.argsort(keys[smallest], kind="stable")]

    def around(self, at: int) -> NDArray[np.float32]:
        """Look up the activations at the tokens around a place, in the same row.

        Returns: [2 · AROUND + 1], the place itself in the middle; 0 where the latent does not fire.
        """
        acts_A, near = np.zeros(2 * AROUND + 1, np.float32), slice(max(0, at - AROUND), at + AROUND + 1)
        addresses, address = self.addresses_N[near], self.addresses_N[at]
        steps = addresses - address
        inside = (abs(steps) <= AROUND) & (addresses // self.ctx_len == address // self.ctx_len)
        acts_A[AROUND + steps[inside]] = self.acts_N[near][inside]
        return acts_A


@dataclass(frozen=True, slots=True)
class Beside:
    """How often latents of the SAE fire on the same tokens as one of them does, in one row of `EVERY`."""

    n_tokens: int
    """Tokens that were looked at."""
    both_F: NDArray[np.int64]
    """Those on which both fire, by the other latent."""
    fires_F: NDArray[np.int64]
    """Those on which each latent fires."""


class Firing:
    """The firings of some latents of an SAE.

    Args:
        sae: the SAE.
        latents: the latents.
        evalset: where the activations come from.
    """

    def __init__(self, sae: Sae, latents: Sequence[int], evalset: EvalSet) -> None:
        self.sae, self.evalset, n_latents = sae, evalset, sae.config.num_latents
        self._scratch = Scratch()
        self._place_F = np.full(n_latents, -1)
        self._place_F[list(latents)] = np.arange(len(latents))
        self._found: list[tuple[NDArray[np.int64], Sparse, Sparse]] = []
        """Of each batch the addresses; the firings of the latents; those of all latents in the rows that are
        looked at."""
        self.positions = Positions(evalset.text.ctx_len)
        self.sources = sources_of(evalset)
        self.source_names = list(dict.fromkeys(self.sources.values()))

    def run(self, chunks: Iterable[Chunk]) -> "Firing":
        """Search this process's chunks, then put together what all processes found."""
        with torch.inference_mode():
            for chunk in chunks:
                self._add(chunk)
        self._merge()
        return self

    def _add(self, chunk: Chunk) -> None:
        token_N, latent_N, act_N = self._codes(chunk)
        looked = self._looked_at(chunk.addresses_T)[token_N]
        column_N = self._place_F[latent_N]
        shown, n_tokens = column_N >= 0, len(chunk.addresses_T)
        acts_TL = scipy.sparse.csr_array(
            (act_N[shown], (token_N[shown], column_N[shown])), (n_tokens, int(self._place_F.max()) + 1)
        )
        ones = np.ones(int(looked.sum()), np.int8)
        beside_TF = scipy.sparse.csr_array(
            (ones, (token_N[looked], latent_N[looked])), (n_tokens, len(self._place_F))
        )
        self._found.append((chunk.addresses_T, acts_TL, beside_TF))

    def _looked_at(self, addresses_T: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Choose the tokens that are looked at for latents that fire together."""
        looked_T: NDArray[np.bool_] = addresses_T // self.evalset.text.ctx_len % EVERY == 0
        return looked_T

    def _codes(self, chunk: Chunk) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Encode a chunk: the token, the latent and the activation of each firing."""
        found = []
        for start, x_TD in zip(
            range(0, len(chunk.addresses_T), ROWS_AT_ONCE),
            torch.split(chunk.x[str(self.sae.site)], ROWS_AT_ONCE),
            strict=True,
        ):
            pre_TF = self._scratch.pre_acts(self.sae, x_TD.to(self.sae.W_enc.device, torch.float32))
            codes = self.sae.select(pre_TF)
            active = codes.active & torch.isfinite(codes.top_acts)
            token = active.nonzero()[:, 0].cpu().numpy() + start
            found.append(
                (token, codes.top_indices[active].cpu().numpy(), codes.top_acts[active].cpu().numpy())
            )
        token_N, latent_N, act_N = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return token_N, latent_N, act_N

    def _merge(self) -> None:
        """Put the batches of all processes together, in the order of the addresses."""
        found = [batch for own in self.evalset.everyone.all_gather_objects(self._found) for batch in own]
        found.sort(key=lambda batch: int(batch[0][0]))
        self._found = []
        n_latents, n_shown = len(self._place_F), int(self._place_F.max(initial=-1)) + 1
        empty = (np.zeros(0, np.int64), *(scipy.sparse.csr_array((0, n)) for n in (n_shown, n_latents)))
        addresses, acts, beside = zip(*(found or [empty]), strict=True)
        self.addresses_T = np.concatenate(addresses)
        """Tokens that were searched."""
        self.documents_T = self.evalset.units(self.addresses_T)
        self._acts_TL = scipy.sparse.vstack(acts, format="csr").tocsc()
        self._beside_TF = scipy.sparse.vstack(beside, format="csr")
        self._fires_F = np.bincount(self._beside_TF.indices, minlength=n_latents)
        self._looked_T = self._looked_at(self.addresses_T)
        groups_T = {"position": self.positions.of(self.addresses_T)}
        if self.source_names:
            groups_T["source"] = self._source_of_T()
        sizes = {"position": len(self.positions.labels), "source": len(self.source_names)}
        self._groups = {by: (of_T, np.bincount(of_T, minlength=sizes[by])) for by, of_T in groups_T.items()}
        """Number of each token's group, and of the tokens of each group."""

    def _source_of_T(self) -> NDArray[np.int64]:
        """Look up the number of each token's source."""
        numbers = {name: number for number, name in enumerate(self.source_names)}
        documents, place_T = np.unique(self.documents_T, return_inverse=True)
        return np.array([numbers[self.sources[document]] for document in documents.tolist()], int)[place_T]

    @property
    def n_tokens(self) -> int:
        """Number of tokens that were searched."""
        return len(self.addresses_T)

    def of(self, latent: int) -> Fires:
        """Return the places where a latent fires."""
        token_N, acts_N = self._column(latent)
        return Fires(
            latent=latent,
            addresses_N=self.addresses_T[token_N],
            acts_N=acts_N,
            documents_N=self.documents_T[token_N],
            key=len(self._place_F),
            ctx_len=self.evalset.text.ctx_len,
        )

    def shares(self, latent: int, by: str) -> tuple[float | None, ...]:
        """Compute the share of the tokens of each group on which a latent fires; None where there are none.

        Args:
            latent: its number.
            by: position or source; nothing is returned where there is one source.
        """
        if by not in self._groups:
            return ()
        group_T, of_all = self._groups[by]
        fires = np.bincount(group_T[self._column(latent)[0]], minlength=len(of_all))
        pairs = zip(fires.tolist(), of_all.tolist(), strict=True)
        return tuple(own / every if every else None for own, every in pairs)

    def beside(self, latent: int) -> Beside:
        """Count which latents fire on the same tokens as one does."""
        token_N = self._column(latent)[0]
        rows = self._beside_TF[token_N[self._looked_T[token_N]]]
        both_F = np.bincount(rows.indices, minlength=len(self._place_F))
        return Beside(int(self._looked_T.sum()), both_F, self._fires_F)

    def share_on(self, chosen_T: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Compute the share of each latent's activation that is on some tokens; 0 where it never fires. [L],
        in the order in which they were given."""
        weights_T = chosen_T.astype(np.float64), np.ones(len(chosen_T))
        on_L, sum_L = (np.asarray(abs(self._acts_TL).T @ each_T) for each_T in weights_T)
        share_L: NDArray[np.float64] = np.divide(on_L, sum_L, out=np.zeros(len(on_L)), where=sum_L > 0)
        return share_L

    def _column(self, latent: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the numbers of the tokens on which a latent fires, ascending, and its activations there."""
        column = self._place_F[latent]
        assert column >= 0, latent
        own = slice(*self._acts_TL.indptr[column : column + 2])
        return self._acts_TL.indices[own], self._acts_TL.data[own]
