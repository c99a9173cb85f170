"""Where an SAE errs, by groups of tokens and token by token, and what its weights tell of a latent."""

import numpy as np
import pytest
import torch
from reconstructions import held_out, random_sae, reconstruct

from saemill.assess import directions, vocabulary
from saemill.assess.profile import N_WORST
from saemill.assess.reader import Pieces
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.site_roles import Role


def test_fvu_by_groups_is_that_of_their_tokens(store: ActivationStore) -> None:
    """Oracle: numpy over the held-out tokens; tenths of the training tokens by numpy's quantiles."""
    x, addresses = held_out(store)
    sae = random_sae(0)
    profile = reconstruct(store, {"v": sae}).profile
    x, mean = x.double(), store.site("a").statistics.mean_D
    error_T = (x - sae(x.float()).reconstruction.double()).square().sum(1).numpy()
    square_T = (x - mean).square().sum(1).numpy()
    kept = np.concatenate([store.keep_addresses(i, store.mask, False) for i in range(store.n_shards)])
    norms = store.read("a", 0, store.n_tokens)[torch.from_numpy(kept)].double().norm(dim=1).numpy()
    edges = profile.lengths["a"].edges
    np.testing.assert_allclose(edges, np.quantile(norms, np.arange(0.1, 0.95, 0.1)), rtol=0.005)
    group_T = {
        "position": np.searchsorted([1, 2, 4, 8], addresses % 16, side="right"),
        "length": np.searchsorted(edges, x.norm(dim=1).to(torch.bfloat16).float().numpy()),
    }
    found = profile.groups("v")
    labels = [group["label"] for group in found if group["by"] == "position"]
    assert labels == ["0", "1", "2–3", "4–7", "8–15"]
    assert found[0] == {"by": "position", "label": "0", "n_tokens": 0, "fvu": None}
    for by in ("position", "length"):
        for number, group in enumerate(group for group in found if group["by"] == by):
            here_T = group_T[by] == number
            assert group["n_tokens"] == here_T.sum()
            if here_T.any():
                assert group["fvu"] == pytest.approx(error_T[here_T].sum() / square_T[here_T].sum())


def test_the_worst_tokens_are_those_of_a_full_sort(store: ActivationStore) -> None:
    """Oracle: all errors sorted, the first of each document kept."""
    x, addresses = held_out(store)
    sae = random_sae(0)
    found = reconstruct(store, {"v": sae}).profile.worst("v")
    error_T = (x.double() - sae(x).reconstruction.double()).square().sum(1).numpy()
    best: dict[int, int] = {}
    for i in np.argsort(-error_T, kind="stable").tolist():
        best.setdefault(int(store.tokens.document_of(addresses[i : i + 1])[0]), i)
    expected = list(best.values())[:N_WORST]
    assert [token.address for token in found] == addresses[expected].tolist()
    assert [token.error for token in found] == pytest.approx(error_T[expected].tolist(), rel=1e-5)


def test_neighbours_are_by_the_cosine_of_decoder_rows() -> None:
    """Oracle: numpy's cosines, all pairs."""
    sae = random_sae(1)
    rows = sae.W_dec.numpy() / np.linalg.norm(sae.W_dec.numpy(), axis=1, keepdims=True)
    cosine = rows @ rows.T
    for latent, found in zip([5, 0], directions.neighbours(sae, [5, 0]), strict=True):
        others = [i for i in np.argsort(-cosine[latent]).tolist() if i != latent]
        assert [near.latent for near in found.nearest] == others[:5]
        assert found.nearest[0].cosine == pytest.approx(cosine[latent, others[0]], abs=1e-6)
        assert found.opposite is not None
        assert found.opposite.latent == others[-1]
        assert directions.encoder_cosines(sae, [latent])[0] == pytest.approx(1)


def test_counterparts_are_nearest_in_saes_of_other_seeds() -> None:
    """Oracle: the other SAE is a shuffled copy whose first row is another direction: all but that latent is
    found, mutually; SAEs that differ in more than the seed are no siblings."""
    sae, other, third = random_sae(1), random_sae(1), random_sae(2)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    other.W_dec.data = other.W_dec.data[order]
    other.W_dec.data[0] = -other.W_dec.data[0]
    for seed, (some, k) in enumerate(((sae, 3), (other, 3), (third, 4))):
        some.config.provenance["variant"] = {"name": f"n{seed}", "seed": seed, "k": k}
    siblings = directions.siblings("x", {"x": sae, "y": other, "z": third})
    assert list(siblings) == ["y"]
    latents = list(range(24))
    again = directions.found_in(sae, [other, other])
    assert again.tolist() == [0 if latent == int(order[0]) else 2 for latent in latents]
    for latent, (found,) in zip(latents, directions.counterparts(sae, latents, siblings), strict=True):
        if latent != int(order[0]):
            assert (found.variant, int(order[found.latent]), found.mutual) == ("y", latent, True)
            assert found.cosine == pytest.approx(1, abs=1e-6)
        else:
            assert found.cosine < 0.99
            assert not found.mutual


@pytest.mark.parametrize(
    ("role", "told"),
    [
        (None, "what a is to the residual stream is not known"),
        (Role(kind="within", module="b"), "a is within b, so its directions are not those of the residual"),
    ],
)
def test_where_no_tokens_are_promoted_the_reason_is_told(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch, role: Role | None, told: str
) -> None:
    """Oracle: the role of the site; no unembedding is read."""
    sae = random_sae(1)
    sae.config.provenance["site"] = "a"
    monkeypatch.setattr(ActivationStore, "site", lambda *_: type("Site", (), {"role": role}))
    monkeypatch.setattr(vocabulary, "load_unembedding", lambda *_: pytest.fail("read the unembedding"))
    (found,) = vocabulary.vocabularies(sae, store, None)
    assert str(found.record.missing).startswith(told)
    assert found.effects([1, 2], Pieces(store.tokens)) == [vocabulary.UNKNOWN] * 2
