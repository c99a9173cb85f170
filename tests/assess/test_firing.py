"""Where latents fire: what one pass keeps of each, against all activations at once."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from reconstructions import evalset, random_sae

from saemill.assess.evalset import Chunk
from saemill.assess.features import N_STRATA, strata
from saemill.assess.firing import AROUND, EVERY, N_SAMPLED, SEED, Fires, Firing
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
    return Firing(sae, LATENTS, chosen).run(chosen.context_chunks(10**9) if chunks is None else chunks)


def test_the_strongest_places_are_those_of_a_full_sort(store: ActivationStore, dense: Dense) -> None:
    """Oracle: all activations of the latent sorted, the first of each text kept."""
    one = found(store, dense.sae)
    hashes = store.tokens.documents["text_hash"].to_numpy()
    for latent in LATENTS:
        best: dict[int, int] = {}
        for address in np.argsort(-dense.acts_TF[:, latent], kind="stable").tolist():
            text = int(hashes[store.tokens.document_of(np.array([address]))[0]])
            if dense.acts_TF[address, latent] > 0:
                best.setdefault(text, address)
        expected, fires = list(best.values())[:5], one.of(latent)
        strongest = fires.strongest(5)
        assert len(expected) == 5
        assert fires.addresses_N[strongest].tolist() == expected
        np.testing.assert_allclose(fires.acts_N[strongest], dense.acts_TF[expected, latent], rtol=1e-5)


def test_the_sample_is_of_the_smallest_hashes(store: ActivationStore, dense: Dense) -> None:
    """Oracle: the hash of each firing by Python's integers; a latent that fires seldom is there whole."""
    one = found(store, dense.sae)
    for latent in LATENTS:
        addresses = np.flatnonzero(dense.acts_TF[:, latent] > 0).tolist()
        key = {a: mix(combine(SEED) + a * dense.sae.config.num_latents + latent) for a in addresses}
        expected = sorted(addresses, key=key.__getitem__)[:N_SAMPLED]
        fires = one.of(latent)
        assert fires.addresses_N[fires.sampled()].tolist() == expected


def test_counts_are_those_of_all_activations(store: ActivationStore, dense: Dense) -> None:
    """Oracle: numpy over the whole matrix."""
    one, fires_TF = found(store, dense.sae), dense.acts_TF > 0
    assert one.n_tokens == dense.kept_T.sum()
    position_T = np.arange(len(fires_TF)) % 16
    groups = [[0], [1], [2, 3], [4, 5, 6, 7], list(range(8, 16))]
    looked_T = dense.kept_T & (np.arange(len(fires_TF)) // 16 % EVERY == 0)
    for latent in LATENTS:
        fires, acts_T = one.of(latent), dense.acts_TF[:, latent]
        np.testing.assert_array_equal(fires.addresses_N, np.flatnonzero(acts_T))
        np.testing.assert_allclose(fires.acts_N, acts_T[acts_T > 0], rtol=1e-5)
        assert fires.mean == pytest.approx(acts_T[acts_T > 0].mean(dtype=float), rel=1e-5)
        assert fires.largest == pytest.approx(acts_T.max())
        for share, group in zip(one.shares(latent, "position"), groups, strict=True):
            here_T = dense.kept_T & np.isin(position_T, group)
            expected = (acts_T[here_T] > 0).mean() if here_T.any() else None
            assert share == (None if expected is None else pytest.approx(expected))
        assert one.shares(latent, "source") == ()
        beside = one.beside(latent)
        np.testing.assert_array_equal(beside.both_F, fires_TF[looked_T & (acts_T > 0)].sum(0))
        np.testing.assert_array_equal(beside.fires_F, fires_TF[looked_T].sum(0))
        assert beside.n_tokens == looked_T.sum()


def test_a_place_has_the_activations_around_it(store: ActivationStore, dense: Dense) -> None:
    """Oracle: the column of the matrix, cut at the ends of the row."""
    one = found(store, dense.sae)
    for latent in LATENTS:
        fires = one.of(latent)
        for at in fires.sampled()[:50].tolist():
            row = int(fires.addresses_N[at]) // 16
            for step, value in zip(range(-AROUND, AROUND + 1), fires.around(at), strict=True):
                address = int(fires.addresses_N[at]) + step
                inside = address // 16 == row
                expected = dense.acts_TF[address, latent] if inside else 0.0
                assert value == pytest.approx(expected, rel=1e-5)


def test_the_order_of_the_batches_does_not_show(store: ActivationStore, dense: Dense) -> None:
    """Oracle: the same batches in order."""
    chunks = list(evalset(store).context_chunks(10**9))
    assert len(chunks) > 2
    one, other = found(store, dense.sae, chunks), found(store, dense.sae, chunks[::-1])
    for latent in LATENTS:
        assert one.of(latent).addresses_N.tobytes() == other.of(latent).addresses_N.tobytes()
        assert one.of(latent).acts_N.tobytes() == other.of(latent).acts_N.tobytes()
        assert one.beside(latent).both_F.tobytes() == other.beside(latent).both_F.tobytes()


def test_no_latent_and_no_token_is_no_error(store: ActivationStore, dense: Dense) -> None:
    """Oracle: nothing fires."""
    nothing = found(store, dense.sae, ())
    assert nothing.n_tokens == 0
    assert len(nothing.of(LATENTS[0]).strongest(3)) == len(nothing.of(LATENTS[0]).sampled()) == 0
    assert set(nothing.shares(LATENTS[0], "position")) == {None}
    assert not nothing.beside(LATENTS[0]).both_F.any()
    assert Firing(dense.sae, [], evalset(store)).run(()).n_tokens == 0


def test_strata_are_quantiles_of_what_is_not_zero(store: ActivationStore) -> None:
    """Oracle: numpy's quantiles of planted activations, some of them equal; each place lies in its own."""
    generator = np.random.default_rng(0)
    for planted in (generator.gamma(2, 1, 300), np.repeat([1.0, 2.0], 20), np.array([3.0]), np.ones(9)):
        activations = planted.astype(np.float32)
        n = len(activations)
        fires = Fires(0, 16 * np.arange(n) + 5, activations, np.arange(n, dtype=np.uint64), 1, 16)
        found = strata(fires, np.arange(n), 3, Reader(store.tokens))
        edges = np.quantile(activations.astype(float), np.linspace(0, 1, N_STRATA + 1))
        inside = [
            ((activations > low) | (number == 0)) & (activations <= high)
            for number, (low, high) in enumerate(pairwise(edges))
        ]
        expected = [
            (*ends, own.mean()) for ends, own in zip(pairwise(edges), inside, strict=True) if own.any()
        ]
        assert [(s.low, s.high, s.share) for s in found] == expected[::-1]
        for stratum in found:
            assert len(stratum.contexts) == min(3, round(stratum.share * n))
            assert all(stratum.low <= context.activation <= stratum.high for context in stratum.contexts)
        assert all(not stratum.contexts for stratum in strata(fires, np.arange(n), 0, Reader(store.tokens)))
    nowhere = Fires(0, *(np.zeros(0, kind) for kind in (np.int64, np.float32, np.uint64)), 1, 16)
    assert strata(nowhere, np.zeros(0, np.int64), 3, Reader(store.tokens)) == ()


def test_places_of_either_sign_are_apart() -> None:
    """Oracle: by hand: four documents, two places above 0 and two below."""
    acts_N = np.array([3, -2, 1, -5], np.float32)
    fires = Fires(0, np.arange(4), acts_N, np.arange(4).astype(np.uint64), key=1, ctx_len=4)
    assert (fires.strongest(9).tolist(), fires.strongest(9, -1).tolist()) == ([0, 2], [3, 1])
    assert (fires.largest, fires.smallest) == (3, -5)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(-2, 3).filter(bool)), max_size=30),
    st.sampled_from([1, -1]),
)
def test_the_strongest_of_each_text_with_ties(places: list[tuple[int, int]], sign: int) -> None:
    """Oracle: a stable sort of all places of that sign, the first of each text kept. Documents with the same
    text stand apart, and many places fire alike."""
    texts, acts = (np.array([place[i] for place in places], np.int64) for i in (0, 1))
    fires = Fires(
        0, np.arange(len(places)), acts.astype(np.float32), texts.astype(np.uint64), key=1, ctx_len=64
    )
    first: dict[int, int] = {}
    for place in sorted(range(len(places)), key=lambda place: -sign * acts[place]):
        if sign * acts[place] > 0:
            first.setdefault(int(texts[place]), place)
    assert fires.strongest(3, sign).tolist() == list(first.values())[:3]
