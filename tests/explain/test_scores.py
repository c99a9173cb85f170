"""Figures of explanations against definitions, and prompts and answers read back."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from saemill.common.stores.features import Context, Passage, Snippet
from saemill.explain import prompts, scores
from saemill.explain.config import ExplainConfig
from saemill.explain.silent import Case

CONFIG = ExplainConfig(run=Path("r"), url="http://h/v1", model="m", max_answer_tokens=0)
CASES = st.lists(st.tuples(st.booleans(), st.sampled_from([True, False, None])), max_size=30)


@given(CASES)
def test_balanced_accuracy_is_its_definition(cases: list[tuple[bool, bool | None]]) -> None:
    """Oracle: the mean of recall and specificity, by counting; unread answers left out; null without one of
    the two sides."""
    read = [(fires, said) for fires, said in cases if said is not None]
    sides = [[said == fires for fires, said in read if fires is side] for side in (True, False)]
    found = scores.balanced_accuracy([fires for fires, _ in cases], [said for _, said in cases])
    if not all(sides):
        assert found.value is None
        assert found.reason
        return
    value = sum(sum(side) / len(side) for side in sides) / 2
    assert found.value == pytest.approx(value)
    assert found.lo is not None
    assert found.hi is not None
    assert -1e-12 <= found.lo <= value <= found.hi <= 1 + 1e-12


@pytest.mark.parametrize("n", [5, 8, 20])
def test_the_interval_covers(n: int) -> None:
    """Oracle: the exact probability, by the binomial distribution, that the interval holds the true figure:
    95% on average over many pairs of shares, and nowhere far less."""
    fires, counts = [True] * n + [False] * n, np.arange(n + 1)
    shares = np.linspace(0.05, 0.95, 10)
    held = np.zeros((len(shares), len(shares)))
    pmf = binom.pmf(counts[:, None], n, shares)
    true = (shares[:, None] + shares) / 2
    for a in counts:
        for b in counts:
            right = np.concatenate([counts[1:] <= a, counts[1:] <= b])
            found = scores.balanced_accuracy(fires, (right == fires).tolist())
            assert found.lo is not None
            assert found.hi is not None
            within = (found.lo - 1e-9 <= true) & (true <= found.hi + 1e-9)
            held += np.outer(pmf[a], pmf[b]) * within
    assert 0.945 < held.mean() < 0.975
    assert held.min() > 0.90


def test_the_mean_has_an_interval_where_latents_are_enough() -> None:
    """Oracle: the normal approximation of the mean of 400 values; a reason below 30."""
    values = np.random.default_rng(1).random(400)
    found = scores.mean(values.tolist())
    assert found.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert (found.lo, found.hi) == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 5)
    few = scores.mean([0.5, 0.7])
    assert (few.value, few.lo, few.reason) == (0.6, None, "only 2 latents; an interval needs 30")
    assert scores.mean([]).value is None


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.text(alphabet="abc []{}\n01,", max_size=20))
def test_judgements_are_read_back(said: list[bool], before: str) -> None:
    """Oracle: the list that is written last, as numbers and as truth values; no list of another length."""
    for written in (json.dumps([int(each) for each in said]), json.dumps(said)):
        answer = f"<think>[1, 0, [</think>{before.replace('[', '(')} {written}"
        assert prompts.verdicts(answer, len(said)) == said
        assert prompts.verdicts(answer, len(said) + 1) is None


@pytest.mark.parametrize("thought", ["", "<think>Is it?</think>", "Is it?\n</think>\n\n"])
def test_thoughts_are_no_part_of_an_explanation(thought: str) -> None:
    """Oracle: what was put behind the thought, which some servers leave without its beginning."""
    assert prompts.explanation(f"{thought}the word\n cat") == "the word cat"
    assert prompts.explanation(f"{thought}<think>Is it") is None


@pytest.mark.parametrize(
    "answer", ["", "yes", "[1, 2]", "[1, 0", "[0.5, 1]", "<think>[1, 1]", '["1", "0"]', "[null, 1]"]
)
def test_what_is_no_list_of_judgements_is_none(answer: str) -> None:
    """Oracle: the form that is asked for."""
    assert prompts.verdicts(answer, 2) is None


@given(st.lists(st.text(max_size=30), min_size=1, max_size=12))
def test_every_context_is_one_entry_of_the_list(texts: list[str]) -> None:
    """Oracle: the number of entries, whatever is in the texts, and that a request can be written of them."""
    cases = [Case(Passage(address=0, id=None, text=text), True) for text in texts]
    content = str(prompts.judge("all", cases, CONFIG)["messages"][1]["content"])
    content.encode()
    entries = content.split("\n\n")[1:]
    assert [entry.partition(". ")[0] for entry in entries] == [str(i + 1) for i in range(len(texts))]
    assert not any(len(entry.splitlines()) > 1 for entry in entries)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((0, 5, 4, 0), "a<<b c>> d"),
        ((0, 5, 1, 0), "a<<b>> c d"),
        ((5, 0, 0, 5), "<<a>>b c<< d>>"),
    ],
)
def test_marks_are_around_what_is_strong(values: tuple[float, ...], text: str) -> None:
    """Oracle: by hand: tokens from 0.3 of the largest activation on, neighbours together."""
    place = Snippet(address=0, document=0, source=None, tokens=("a", "b", " c", " d"), at=1)
    shown = [Context(activation=5.0, values=tuple(map(float, values)), place=place)]
    request = prompts.explain(shown, CONFIG)
    assert request["messages"][1]["content"] == f"1. {text}"
    assert set(request) == {"model", "messages", "temperature"}
