"""What probes are fitted to: whole words by a reading of the text, and parts that share no word."""

import re
from pathlib import Path

import numpy as np
import pytest
from reconstructions import ALONE
from stores import make_store

from saemill.assess.evalset import EvalSet
from saemill.assess.probes.examples import (
    PER_DOCUMENT,
    PER_WORD,
    TEST,
    TRAIN,
    VALIDATION,
    Examples,
    document_examples,
    word_examples,
)
from saemill.assess.probes.labels import Label, letter_labels, shuffled, surface_labels
from saemill.assess.probes.probe import Standard, area, fit
from saemill.assess.probes.words import Vocabulary
from saemill.assess.reader import Pieces

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*['’]?")


@pytest.fixture(scope="module")
def evalset(tmp_path_factory: pytest.TempPathFactory) -> EvalSet:
    """Random tokens: 100 held-out rows of 32."""
    store = make_store(tmp_path_factory.mktemp("words"), 1000, 32, 4, 4000)
    return EvalSet(store, None, None, store.mask, ["a"], 4, ALONE)


def test_words_are_those_of_the_text(evalset: EvalSet) -> None:
    """Oracle: a regular expression over each row's text, where a word is one token's letters; the last token
    of a row may go on."""
    tokens, pieces, vocabulary = evalset.tokens, Pieces(evalset.tokens), Vocabulary(evalset.tokens)
    n = 0
    for row in range(60):
        ids = tokens.rows(row, row + 1).astype(np.int64)
        texts = [pieces.text(number) for number in ids[0].tolist()]
        starts = np.cumsum([0, *map(len, texts)])
        spans = {match.span() for match in WORD.finditer("".join(texts))}
        expected = []
        for at in range(1, 31):
            lead = len(texts[at]) - len(texts[at].lstrip())
            span = (starts[at] + lead, starts[at + 1])
            if span in spans and texts[at].strip().isalpha() and span[1] - span[0] > 1:
                expected.append((at, texts[at].strip()))
        found = vocabulary.find(ids, np.arange(32)[None])
        pairs = list(zip(found.addresses_N.tolist(), found.texts_N.tolist(), strict=True))
        assert [pair for pair in pairs if 0 < pair[0] < 31] == expected
        n += len(expected)
    assert n > 300


def test_parts_share_no_word_and_no_word_is_taken_often(evalset: EvalSet) -> None:
    """Oracle: the definitions; the shares of the parts are those of their hashes."""
    found = word_examples(evalset, Vocabulary(evalset.tokens), 10**6, 10**6)
    types = np.array([word.casefold() for word in found.words_N.tolist()])
    for number in range(found.n_groups):
        here = found.group_N == number
        assert len(set(types[here])) == 1
        assert len(set(found.part_N[here].tolist())) == 1
        assert here.sum() <= PER_WORD
    assert len(set(types)) == found.n_groups
    assert (np.diff(found.addresses_N) > 0).all()
    by_group = {int(g): int(p) for g, p in zip(found.group_N, found.part_N, strict=True)}
    shares = np.bincount(list(by_group.values())) / found.n_groups
    np.testing.assert_allclose(shares, [0.5, 0.2, 0.3], atol=0.06)
    held_out = np.flatnonzero(evalset.tokens.held_out_R)
    assert set(found.addresses_N // 32) <= set(held_out.tolist())
    fewer = word_examples(evalset, Vocabulary(evalset.tokens), 10**6, 200)
    assert 150 < len(fewer.addresses_N) <= 200
    assert set(fewer.addresses_N.tolist()) <= set(found.addresses_N.tolist())


def test_documents_are_split_whole(evalset: EvalSet) -> None:
    """Oracle: the texts' hashes; at most so many tokens of each."""
    found = document_examples(evalset, 10**6, 10**6)
    units = evalset.units(found.addresses_N)
    assert len(set(units.tolist())) == found.n_groups
    for unit in set(units.tolist()):
        assert len(set(found.part_N[units == unit].tolist())) == 1
        assert (units == unit).sum() <= PER_DOCUMENT


def test_labels_are_read_off_the_words(evalset: EvalSet) -> None:
    """Oracle: regular expressions."""
    found = word_examples(evalset, Vocabulary(evalset.tokens), 10**6, 10**6)
    labels = {label.name: label for label in surface_labels(found) + letter_labels(found)}
    patterns = {
        "capitalised": r"[A-ZÀ-Þ]\w+", "ends in -ed": r"(?i)\w\w+ed", "ends in -s": r"(?i)\w+[^\Ws]s",
        "7 letters or more": r"\w{7,}", "begins with t": r"[tT]\w*",
    }  # fmt: skip
    for name, pattern in patterns.items():
        expected = [re.fullmatch(pattern, word) is not None for word in found.words_N.tolist()]
        assert labels[name].y_N.tolist() == expected, name
    assert labels["7 letters or more"].missing is None
    assert labels["begins with x"].missing is not None


def test_a_probe_that_remembers_words_knows_none_that_it_never_saw() -> None:
    """Oracle: activations that name the word, and labels that mean nothing. Split by occurrence they are
    told, split by type they are not; nor are labels that were shuffled from type to type."""
    generator = np.random.default_rng(0)
    group = np.repeat(np.arange(300), 4)
    part = np.searchsorted((0.5, 0.7), generator.random(300))[group]
    found = Examples(
        "word type", np.arange(1200), group, part, np.full(1200, ""), np.unique(group).astype(np.uint64)
    )
    x = generator.standard_normal((300, 400))[group]
    label = Label("none", (generator.random(300) < 0.5)[group])
    by_occurrence = generator.random(len(x)) < 0.7
    train, test = part == TRAIN, part == TEST
    for fitted_to, tried_on, least, most in (
        (by_occurrence, ~by_occurrence, 0.9, 1), (train, test, 0.35, 0.65)
    ):  # fmt: skip
        (probe,) = fit(Standard.of(x, fitted_to), label.y_N[fitted_to], (1.0,))
        auc = area(probe.score(x[tried_on]), label.y_N[tried_on], group[tried_on], 300).value
        assert least < auc < most
    again = shuffled(label, found, 1)
    for some in (TRAIN, VALIDATION, TEST):
        assert again[part == some].mean() == label.y_N[part == some].mean()
    assert (again.reshape(300, 4) == again.reshape(300, 4)[:, :1]).all()  # a type keeps one label
    assert np.mean(again != label.y_N) == pytest.approx(0.5, abs=0.1)


def test_examples_do_not_depend_on_how_the_tokens_are_cut(tmp_path: Path) -> None:
    """Oracle: the same tokens in shards of another size."""
    found = []
    for shard_tokens in (4000, 700):
        store = make_store(tmp_path / str(shard_tokens), 400, 32, 4, shard_tokens)
        chosen = EvalSet(store, None, None, store.mask, ["a"], 4, ALONE)
        found.append(word_examples(chosen, Vocabulary(chosen.tokens), 10**6, 300))
    assert found[0].addresses_N.tolist() == found[1].addresses_N.tolist()
    assert found[0].part_N.tolist() == found[1].part_N.tolist()
