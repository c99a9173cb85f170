"""Probes for the labels that the corpus gives to words: planted ones are found, shuffled ones are not."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from reconstructions import ALONE
from stores import make_store, make_tokens

from saemill.assess.config import AssessConfig
from saemill.assess.evalset import EvalSet
from saemill.assess.probes.figures import described, of_dictionary
from saemill.assess.probes.run import Found, Pool, prepare, probe
from saemill.assess.probes.tables import examples_sentences, probe_notes
from saemill.assess.probes.words import Vocabulary
from saemill.common.sae.parts import SaeConfig
from saemill.common.sae.sae import Sae
from saemill.common.stores import assessments
from saemill.common.stores.permutation import hashed

D, CTX, ROWS, KS = 16, 32, 2400, (1, 4)
NAMES = ("NOUN", "VERB", "X")


@dataclass(frozen=True)
class Planted:
    """An assessment's probes on tokens of which half of the words have a tag."""

    pools: list[Pool]
    found: list[Found]
    tag_of: dict[str, int]


def sae(rows: torch.Tensor) -> Sae:
    config = SaeConfig(d_in=D, num_latents=len(rows), k=4, provenance={"site": "a"})
    return Sae(config, rows, torch.zeros(len(rows)), rows, torch.zeros(D))


def in_tagged_rows(addresses_N: NDArray[np.int64]) -> NDArray[np.bool_]:
    held_out = addresses_N // CTX // 10  # of ten rows one
    return held_out % 2 == 0


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Activations are a word's own noise, and 4 e_0 for a verb. `upos` tags words in half of the rows, by a
    hash of their small letters; `noise` labels all words by another, of which the activations know nothing.
    """
    folder = tmp_path_factory.mktemp("tags")
    tokens = make_tokens(folder / "tokens", ROWS, CTX)
    ids = tokens.rows(0, ROWS).astype(np.int64)
    found = Vocabulary(tokens).find(ids, np.arange(ROWS * CTX).reshape(ROWS, CTX))
    types, type_N = np.unique([word.casefold() for word in found.texts_N.tolist()], return_inverse=True)
    by_type = hashed(np.arange(len(types), dtype=np.uint64), 5)
    tag_N, noise_N = by_type[type_N] % 2 + 1, (by_type[type_N] >> np.uint64(8)) % 2 + 1
    tagged_N = in_tagged_rows(found.addresses_N)
    labels = {name: np.zeros(ROWS * CTX, np.uint16) for name in ("upos", "noise", "none")}
    labels["upos"][found.addresses_N[tagged_N]] = tag_N[tagged_N]
    labels["noise"][found.addresses_N] = noise_N
    x = torch.randn(8192, D, generator=torch.Generator().manual_seed(0))[torch.from_numpy(ids.reshape(-1))]
    x[found.addresses_N[tag_N == 2], 0] += 4
    columns = {name: (NAMES, numbers.reshape(ROWS, CTX)) for name, numbers in labels.items()}
    store = make_store(folder, ROWS, CTX, D, 8000, values_TD=x, labels=columns)
    evalset = EvalSet(store, None, None, store.mask, ["a"], 4, ALONE)
    config = AssessConfig(run=folder, probes=True, probe_k=KS)
    pools = prepare(config, evalset)
    random = torch.nn.functional.normalize(torch.randn(24, D, generator=torch.Generator().manual_seed(1)))
    saes = {"own": sae(torch.eye(D)), "random": sae(random)}
    tag_of = dict(zip(types.tolist(), (by_type % 2 + 1).tolist(), strict=True))
    return Planted(pools, probe(pools, config, saes, evalset), tag_of)


def test_examples_are_the_words_that_the_column_labels(planted: Planted) -> None:
    """Oracle: the tags by word type, and the rows that have any. Parts share no word with each other, nor
    with other parts of other pools."""
    pools = {pool.examples.column: pool for pool in planted.pools}
    words, tagged = pools[None], pools["upos"]
    assert in_tagged_rows(tagged.examples.addresses_N).all()
    assert not in_tagged_rows(words.examples.addresses_N).all()
    labels = {label.name: label for label in tagged.labels}
    assert set(labels) == {"upos NOUN", "upos VERB"}
    tags = [planted.tag_of[word.casefold()] for word in tagged.examples.words_N.tolist()]
    np.testing.assert_array_equal(labels["upos VERB"].y_N, np.array(tags) == 2)
    parts: dict[str, set[int]] = {}
    for pool in (words, tagged, pools["noise"]):
        for word, part in zip(pool.examples.words_N.tolist(), pool.examples.part_N.tolist(), strict=True):
            parts.setdefault(word.casefold(), set()).add(part)
    assert {len(part) for part in parts.values()} == {1}


def test_planted_labels_are_found_and_others_are_not(planted: Planted) -> None:
    """Oracle: what is planted: verbs on e_0, one latent of the SAE; no direction for the other column."""
    _, probes, _ = of_dictionary(planted.found, "own", "random")
    by_label = {(each["label"], each["k"]): each for each in probes}
    verb = by_label["upos VERB", 1]
    assert verb["latents"] == [0]
    assert verb["auc"]["value"] > 0.95
    assert verb["above_random"]["lo"] > 0
    assert abs(by_label["noise NOUN", 4]["auc"]["value"] - 0.5) < 0.06
    results = {each.pool.examples.column: each for each in planted.found}
    for name in ("upos VERB", "upos NOUN"):
        assert results["upos"].dense["a"][name].area.value > 0.95
        assert abs(results["upos"].dense["a"][name].chance_area.value - 0.5) < 0.08
    assert all(abs(each.shuffled.value - 0.5) < 0.08 for each in results["upos"].sparse["own"])


def test_means_pair_the_words_of_all_pools(planted: Planted) -> None:
    """Oracle: the standard error of a mean over labels, with the influences added up word by word."""
    metrics, _, _ = of_dictionary(planted.found, "own", None)
    by_word: dict[int, float] = {}
    values = []
    n = sum(len(each.sparse["own"]) for each in planted.found)
    for each in planted.found:
        for result in each.sparse["own"]:
            values.append(result.areas[4].value)
            keys = each.pool.examples.key_G.tolist()
            for key, influence in zip(keys, (result.areas[4].influence_G / n).tolist(), strict=True):
                by_word[key] = by_word.get(key, 0.0) + influence
    figure, some = metrics["probe_auc_k4"], np.array([value for value in by_word.values() if value])
    half = 1.959964 * np.sqrt(np.square(some).sum() * len(some) / (len(some) - 1))
    assert figure["value"] == pytest.approx(np.mean(values))
    assert figure["hi"] - figure["value"] == pytest.approx(half)


def test_what_is_told_of_them(planted: Planted, tmp_path: Path) -> None:
    """Oracle: the record's own check; a column that labels no word is named, with the reason."""
    probes = described(planted.found, KS)
    record = assessments.Probes.model_validate_json(json.dumps(probes))
    assert [each.column for each in record.examples] == [None, "upos", "noise"]
    assessment: dict[str, Any] = {"probes": probes, "variants": [], "controls": []}
    sentences = examples_sentences(assessment)
    assert sentences[0].startswith("Split by word type: ")
    assert sentences[1].startswith("Words that upos labels, split by word type: ")
    assert "not probed for: none: it labels none of the words that are measured" in probe_notes(assessment)
