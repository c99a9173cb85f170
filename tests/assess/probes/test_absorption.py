"""Absorption of first letters in planted dictionaries: how much is absorbed is known to the word."""

from dataclasses import dataclass
from string import ascii_lowercase

import numpy as np
import pytest
import torch

from saemill.assess.probes.examples import TEST, Examples
from saemill.assess.probes.figures import described, of_dictionary
from saemill.assess.probes.labels import letter_labels, surface_labels
from saemill.assess.probes.run import Found, Pool, probe_pool
from saemill.common.sae.parts import SaeConfig
from saemill.common.sae.sae import Sae
from saemill.common.world import Group

PER_LETTER, D = 100, 52
CHILDREN = 4
"""Types of each letter, of `PER_LETTER`, that a latent of their own stands for."""


@dataclass(frozen=True)
class Planted:
    found: Found
    is_child_N: np.ndarray
    examples: Examples


def words() -> tuple[list[str], np.ndarray, np.ndarray]:
    """Two examples of each type: the word, the number of its letter, whether it is a child."""
    types = [(letter, n) for letter in range(26) for n in range(PER_LETTER)]
    texts = [
        ascii_lowercase[letter] + "".join(ascii_lowercase[int(c)] for c in f"{n:03}") for letter, n in types
    ]
    letters, numbers = np.array(types).T
    return (
        np.repeat(texts, 2).tolist(),
        np.repeat(letters, 2),
        np.repeat(numbers % (PER_LETTER // CHILDREN) == 3, 2),
    )


def planted_sae(absorbs: bool) -> Sae:
    """A latent per letter and one per letter's children. Where it absorbs, a letter's own latent is silent on
    its children, and their latent writes the letter as well; x̂ = x either way."""
    letter, child = torch.eye(D)[:26], torch.eye(D)[26:]
    encoders = [letter - 10 * child, child] if absorbs else [letter, child]
    decoders = [letter, (3 * letter + 2 * child) / 2] if absorbs else [letter, child]
    config = SaeConfig(d_in=D, num_latents=52, k=4, provenance={"site": "a"})
    bias = torch.full((D,), 5.0)
    return Sae(config, torch.cat(encoders), torch.zeros(52), torch.cat(decoders), bias)


def random_sae() -> Sae:
    rows = torch.nn.functional.normalize(
        torch.randn(52, D, generator=torch.Generator().manual_seed(0)), dim=1
    )
    config = SaeConfig(d_in=D, num_latents=52, k=4, provenance={"site": "a"})
    return Sae(config, rows, torch.zeros(52), rows, torch.full((D,), 5.0))


@pytest.fixture(scope="module")
def planted() -> Planted:
    """Activations 5 + 3 e_letter + 2 e_child."""
    texts, letter, is_child = words()
    x = np.full((len(texts), D), 5.0, np.float32)
    x[np.arange(len(texts)), letter] += 3
    x[is_child, 26 + letter[is_child]] += 2
    group = np.arange(len(texts)) // 2
    part = np.searchsorted((5, 7), group % 10, side="right")
    examples = Examples(
        "word type", np.arange(len(texts)), group, part, np.array(texts), np.unique(group).astype(np.uint64)
    )
    pool = Pool(examples, [], letter_labels(examples) + surface_labels(examples))
    saes = {"absorbs": planted_sae(True), "clean": planted_sae(False), "random": random_sae()}
    return Planted(probe_pool(pool, {"a": x}, saes, (1,), Group([0], 0)), is_child, examples)


def test_what_is_absorbed_is_the_children(planted: Planted) -> None:
    """Oracle: of each letter's words that are tried on, the share that are children, on which its own latent
    is silent and another accounts for all of p. All of it is reconstructed."""
    shares = []
    for letter in range(26):
        own, _ = planted.found.absorbed["absorbs"][f"begins with {ascii_lowercase[letter]}"]
        assert not isinstance(own, str)
        assert own.main == [letter]
        here = (planted.examples.part_N == TEST) & (
            np.arange(len(planted.is_child_N)) // 2 // PER_LETTER == letter
        )
        assert own.n_words == here.sum()
        share = planted.is_child_N[here].mean()
        assert share == 2 / 30
        shares.append(share)
        assert own.fraction.value == pytest.approx(share)
        assert own.full.value == pytest.approx(share)
        assert own.recall.value == pytest.approx(1 - share)
        assert own.error_share == pytest.approx(0, abs=1e-5)
    metrics, probes, concepts = of_dictionary([planted.found], "absorbs", "random")
    figure = metrics["absorption_first_letter"]
    assert figure["value"] == pytest.approx(np.mean(shares))
    assert figure["lo"] < figure["value"] < figure["hi"]
    assert probes == []
    assert [concept["concept"] for concept in concepts if "main" in concept] == [
        f"begins with {letter}" for letter in ascii_lowercase
    ]


def test_a_clean_dictionary_absorbs_nothing(planted: Planted) -> None:
    """Oracle: its latents fire on all of their words."""
    metrics, _, _ = of_dictionary([planted.found], "clean", "random")
    assert metrics["absorption_first_letter"]["value"] == 0
    for letter in ascii_lowercase:
        own, _ = planted.found.absorbed["clean"][f"begins with {letter}"]
        assert not isinstance(own, str)
        assert (own.recall.value, own.full.value) == (1, 0)


def test_a_random_dictionary_leaves_the_concept_in_its_error(planted: Planted) -> None:
    """Oracle: 4 of 52 random latents hold little of any direction."""
    shares = []
    for letter in ascii_lowercase:
        own, _ = planted.found.absorbed["random"][f"begins with {letter}"]
        if not isinstance(own, str):
            shares.append(own.error_share)
    assert np.mean(shares) > 0.3


def test_what_the_model_does_not_hold_is_null_with_the_reason(planted: Planted) -> None:
    """Oracle: activations know nothing of endings, of which these words have none either."""
    metrics, _, concepts = of_dictionary([planted.found], "absorbs", "random")
    missing = {concept["concept"]: concept["missing"] for concept in concepts if "missing" in concept}
    assert missing["ends in -tion"].startswith("only 0 word types with it among those that are fitted to")
    assert metrics["absorption_words"]["value"] is None
    labels = {label["name"]: label for label in described([planted.found], (1,))["labels"]}
    assert labels["begins with a"]["activations"]["a"]["f1"] == 1
    assert labels["begins with a"]["activations"]["a"]["not_held"] is None


def test_letters_that_are_not_held_pass_no_gate() -> None:
    """Oracle: activations of noise; the mean over letters says how many are held."""
    texts, _, _ = words()
    x = np.random.default_rng(0).standard_normal((len(texts), D)).astype(np.float32)
    group = np.arange(len(texts)) // 2
    part = np.searchsorted((5, 7), group % 10, side="right")
    examples = Examples(
        "word type", np.arange(len(texts)), group, part, np.array(texts), np.unique(group).astype(np.uint64)
    )
    pool = Pool(examples, [], letter_labels(examples)[:3])
    found = probe_pool(pool, {"a": x}, {"clean": planted_sae(False)}, (1,), Group([0], 0))
    metrics, _, _ = of_dictionary([found], "clean", None)
    assert metrics["absorption_first_letter"] == {
        "value": None, "reason": "the model holds 0 of 3 first letters as directions; a mean needs 20"
    }  # fmt: skip
    own, _ = found.absorbed["clean"]["begins with a"]
    assert isinstance(own, str)
    assert own.startswith("the model does not hold it: F1 0.0")
