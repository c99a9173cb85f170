"""Dense latents: each planted one is told for what it follows; correlations are those of whole columns."""

import numpy as np
import pytest
import torch
from reconstructions import reconstruct
from stores import make_store

from saemill.assess.dense import describe_dense
from saemill.common.sae.parts import SaeConfig
from saemill.common.sae.sae import Sae
from saemill.common.stores.activations import ActivationStore

D, CTX, ROWS = 12, 32, 128


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[ActivationStore, Sae]:
    """Activations of which dimension 0 is the position, 1 the distance from the mean, 2 of two signs, 3 has
    the most variance, 4 a coin toss; and an SAE with a latent on each, on 2 two."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS * CTX, D, generator=generator) * 0.01
    n = len(x)
    length = torch.rand(n, generator=generator)
    x[:, 0] = torch.log2(1.0 + torch.arange(n) % CTX)
    x[:, 3] = torch.randn(n, generator=generator) * 30
    x[:, 2] = torch.randn(n, generator=generator)
    x[:, 4] = (torch.rand(n, generator=generator) < 0.3).float()
    x[:, 1] = (x[:, 3].abs() / 30).square() + length * 0.01  # grows with the distance, whatever its sign
    rows = torch.zeros(6, D)
    for latent, (dimension, sign) in enumerate([(0, 1), (1, 1), (2, 1), (2, -1), (3, 1), (4, 1)]):
        rows[latent, dimension] = sign
    store = make_store(tmp_path_factory.mktemp("dense"), ROWS, CTX, D, 1000, values_TD=x)
    config = SaeConfig(d_in=D, num_latents=6, k=6, provenance={"site": "a"})
    return store, Sae(config, rows, torch.zeros(6), rows, torch.zeros(D))


def test_each_dense_latent_is_told_for_what_it_follows(planted: tuple[ActivationStore, Sae]) -> None:
    """Oracle: what the activations were made of."""
    store, sae = planted
    found = reconstruct(store, {"v": sae})
    component = torch.eye(D)[3]
    dense = describe_dense(sae, found.density("v"), found.correlations("v"), component)
    kinds = {latent["latent"]: latent["kind"] for latent in dense}
    assert kinds == {0: "position", 1: "length", 2: "antipodal", 3: "antipodal", 4: "component", 5: "other"}
    assert {latent["latent"]: latent["antipode"] for latent in dense if latent["kind"] == "antipodal"} == {
        2: 3, 3: 2
    }  # fmt: skip
    densities = [latent["density"] for latent in dense]
    assert densities == sorted(densities, reverse=True)
    assert {latent["with_component"] for latent in describe_dense(
        sae, found.density("v"), found.correlations("v"), None
    )} == {None}  # fmt: skip


def test_correlations_are_those_of_whole_columns(planted: tuple[ActivationStore, Sae]) -> None:
    """Oracle: numpy.corrcoef over all held-out tokens; a latent that is constant has none."""
    store, sae = planted
    found = reconstruct(store, {"v": sae})
    kept = [store.keep_addresses(i, store.mask, True) for i in range(store.n_shards)]
    address = np.flatnonzero(np.concatenate(kept))
    x = store.read("a", 0, store.n_tokens).double().numpy()[address]
    f = np.maximum(x @ sae.W_enc.double().numpy().T, 0)
    mean = store.site("a").statistics.mean_D.double().numpy()
    drivers = [np.log2(1 + address % CTX), np.linalg.norm(x - mean, axis=1)]
    expected = np.corrcoef(np.stack([*f.T, *drivers]))[:6, 6:]
    np.testing.assert_allclose(found.correlations("v"), expected, atol=1e-6)
    constant = describe_dense(sae, np.ones(6), np.full((6, 2), np.nan), None)
    assert {latent["with_position"] for latent in constant} == {None}


def test_a_latent_that_fires_on_a_tenth_or_less_is_not_dense(planted: tuple[ActivationStore, Sae]) -> None:
    """Oracle: the definition."""
    _, sae = planted
    density = np.array([0.1, 0.100001, 0, 0.05, 0.9, 0.02])
    found = describe_dense(sae, density, np.zeros((6, 2)), None)
    assert [latent["latent"] for latent in found] == [4, 1]
