"""Where latents fire: what one pass keeps of each, against all activations at once."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reconstructions import evalset, random_sae

from saemill.assess import firing
from saemill.assess.evalset import Chunk
from saemill.assess.features import N_STRATA, strata
from saemill.assess.firing import AROUND, EVERY, N_SAMPLED, PLACE, SEED, Firing, Kept
from saemill.assess.reader import Reader
from saemill.common.sae.sae import Sae
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.permutation import combine, mix

LATENTS = [7, 3, 20]


@dataclass(frozen=True)
class Dense:
    """All activations of an SAE on a store, 0 at masked tokens. [n_tokens, F]"""

    sae: Sae
    acts_TF: NDArray[np.float32]
    kept_T: NDArray[np.bool_]


@pytest.fixture(scope="module")
def dense(store: ActivationStore) -> Dense:
    sae = random_sae(4)
    sae.config.provenance["site"] = "a"
    kept = [
        store.keep_addresses(i, store.mask, False) | store.keep_addresses(i, store.mask, True)
        for i in range(store.n_shards)
    ]
    kept_T = np.concatenate(kept)
    with torch.no_grad():
        acts, indices = sae.encode(store.read("a", 0, store.n_tokens).float())
    acts_TF = torch.zeros(len(acts), sae.config.num_latents).scatter_(1, indices, acts).numpy()
    return Dense(sae, acts_TF * kept_T[:, None], kept_T)


def found(store: ActivationStore, sae: Sae, chunks: Iterable[Chunk] | None = None) -> Firing:
    chosen = evalset(store)
    return Firing(sae, LATENTS, chosen, 5).run(chosen.context_chunks(10**9) if chunks is None else chunks)


def test_the_strongest_places_are_those_of_a_full_sort(store: ActivationStore, dense: Dense) -> None:
    """Oracle: all activations of the latent sorted, the first of each text kept."""
    strongest = found(store, dense.sae).strongest
    hashes = store.tokens.documents["text_hash"].to_numpy()
    for at, latent in enumerate(LATENTS):
        best: dict[int, int] = {}
        for address in np.argsort(-dense.acts_TF[:, latent], kind="stable").tolist():
            text = int(hashes[store.tokens.document_of(np.array([address]))[0]])
            if dense.acts_TF[address, latent] > 0:
                best.setdefault(text, address)
        expected = list(best.values())[:5]
        assert len(expected) == 5
        assert strongest.of(at)["address"].tolist() == expected
        np.testing.assert_allclose(strongest.of(at)["activation"], dense.acts_TF[expected, latent], rtol=1e-5)


def test_the_sample_is_of_the_smallest_hashes(store: ActivationStore, dense: Dense) -> None:
    """Oracle: the hash of each firing by Python's integers; a latent that fires seldom is there whole."""
    kept = found(store, dense.sae).sampled
    for at, latent in enumerate(LATENTS):
        addresses = np.flatnonzero(dense.acts_TF[:, latent] > 0).tolist()
        key = {a: mix(combine(SEED) + a * dense.sae.config.num_latents + latent) for a in addresses}
        expected = sorted(addresses, key=key.__getitem__)[:N_SAMPLED]
        assert kept.of(at)["address"].tolist() == expected


def test_counts_are_those_of_all_activations(store: ActivationStore, dense: Dense) -> None:
    """Oracle: numpy over the whole matrix."""
    one, fires_TF = found(store, dense.sae), dense.acts_TF > 0
    assert one.n_tokens == dense.kept_T.sum()
    np.testing.assert_array_equal(one.count_L, fires_TF[:, LATENTS].sum(0))
    np.testing.assert_allclose(one.sum_L, dense.acts_TF[:, LATENTS].sum(0), rtol=1e-5)
    position_T = np.arange(len(fires_TF)) % 16
    groups = [[0], [1], [2, 3], [4, 5, 6, 7], list(range(8, 16))]
    for number, group in enumerate(groups):
        here_T = np.isin(position_T, group)
        np.testing.assert_array_equal(one.by_position_LP[:-1, number], fires_TF[here_T][:, LATENTS].sum(0))
        assert one.by_position_LP[-1, number] == (dense.kept_T & here_T).sum()
    looked_T = dense.kept_T & (np.arange(len(fires_TF)) // 16 % EVERY == 0)
    both_LF = fires_TF[looked_T][:, LATENTS].T.astype(int) @ fires_TF[looked_T].astype(int)
    np.testing.assert_array_equal(one.together_LF, both_LF)
    np.testing.assert_array_equal(one.fired_F, fires_TF[looked_T].sum(0))
    assert one.n_together == looked_T.sum()


def test_a_place_has_the_activations_around_it(store: ActivationStore, dense: Dense) -> None:
    """Oracle: the column of the matrix, cut at the ends of the row."""
    for at, latent in enumerate(LATENTS):
        for place in found(store, dense.sae).sampled.of(at)[:50]:
            row = int(place["address"]) // 16
            for step, value in zip(range(-AROUND, AROUND + 1), place["around"], strict=True):
                address = int(place["address"]) + step
                inside = address // 16 == row
                expected = dense.acts_TF[address, latent] if inside else 0.0
                assert value == pytest.approx(expected, rel=1e-5)


def test_the_order_of_the_batches_does_not_show(
    store: ActivationStore, dense: Dense, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the same batches in order, with room for all places before the first is dropped."""
    chunks = list(evalset(store).context_chunks(10**9))
    monkeypatch.setattr(firing, "N_SAMPLED", 20)
    one, other = found(store, dense.sae, chunks), found(store, dense.sae, chunks[::-1])
    assert len(one.sampled.places) == 60
    for kept in ("strongest", "sampled"):
        assert getattr(one, kept).places.tobytes() == getattr(other, kept).places.tobytes()


PLACES = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(-2, 2)), max_size=60)


@settings(max_examples=100, deadline=None)
@given(PLACES, st.integers(1, 5), st.integers(1, 7), st.booleans(), st.booleans())
def test_what_is_kept_is_the_smallest_of_each_latent(
    entries: list[tuple[int, int, int]], n_each: int, size: int, one_per_document: bool, backwards: bool
) -> None:
    """Oracle: Python's sort of all places, in whatever order they came."""
    kept = Kept(3, n_each, one_per_document)
    places = np.zeros(len(entries), PLACE)
    places["address"] = np.arange(len(entries))
    for i, (latent, document, score) in enumerate(entries):
        places[i]["latent"], places[i]["document"], places[i]["score"] = latent, document, score
    starts = range(0, len(places), size)
    for start in reversed(starts) if backwards else starts:
        some = places[start : start + size]
        kept.add(some[kept.entering(some["latent"], some["score"])])
    kept.cut()
    expected = defaultdict(list)
    for address, (latent, document, _) in sorted(enumerate(entries), key=lambda e: (e[1][2], e[0])):
        taken = [entries[a][1] for a in expected[latent]]
        if len(taken) < n_each and not (one_per_document and document in taken):
            expected[latent].append(address)
    for latent in range(3):
        assert kept.of(latent)["address"].tolist() == expected[latent]


def test_strata_are_quantiles_of_what_is_not_zero(store: ActivationStore) -> None:
    """Oracle: numpy's quantiles of planted activations, some of them equal; each place lies in its own."""
    generator = np.random.default_rng(0)
    for activations in (generator.gamma(2, 1, 300), np.repeat([1.0, 2.0], 20), np.array([3.0]), np.ones(9)):
        places = np.zeros(len(activations), PLACE)
        places["activation"], places["address"] = activations, 16 * np.arange(len(activations)) + 5
        found = strata(places, float(places["activation"].max()), 3, Reader(store.tokens))
        edges = np.quantile(places["activation"].astype(float), np.linspace(0, 1, N_STRATA + 1))
        inside = [
            ((places["activation"] > low) | (number == 0)) & (places["activation"] <= high)
            for number, (low, high) in enumerate(pairwise(edges))
        ]
        expected = [
            (*ends, own.mean()) for ends, own in zip(pairwise(edges), inside, strict=True) if own.any()
        ]
        assert [(s.low, s.high, s.share) for s in found] == expected[::-1]
        for stratum in found:
            assert len(stratum.contexts) == min(3, round(stratum.share * len(activations)))
            assert all(stratum.low <= context.activation <= stratum.high for context in stratum.contexts)
    assert strata(np.empty(0, PLACE), 0.0, 3, Reader(store.tokens)) == ()
