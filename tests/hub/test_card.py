"""Names in a card: whatever is in them, they are names and nothing else."""

from typing import Any

import pytest
import yaml
from huggingface_hub import CardData
from hypothesis import given
from hypothesis import strategies as st

from saemill.hub.card import code, front_matter, keep_metadata, rows, span, words

ODD = [
    "a|b",
    "a`b``c",
    "`",
    "[x](http://y)",
    "<script>",
    "a\nb",
    "\x1b[31mred",
    "*b*",
    "---",
    "$x$ & y",
    "_a_",
]
EVERY = st.one_of(st.sampled_from(ODD), st.text(max_size=12).filter(bool))


def rendered(line: str) -> str:
    """What a code span shows, by CommonMark's rule: between fences of backticks of one length, with one
    blank on both sides taken away."""
    fence = line[: len(line) - len(line.lstrip("`"))]
    assert line.endswith(fence)
    inner = line[len(fence) : -len(fence)]
    assert f"`{fence}" not in inner
    assert fence not in inner.replace(f"`{fence}", "")
    return inner[1:-1] if inner.startswith(" ") and inner.endswith(" ") and inner.strip() else inner


@given(EVERY)
def test_a_span_holds_its_name(name: str) -> None:
    """Oracle: CommonMark's rule for code spans, written out above; the name has no line end or control."""
    line = span(name)
    assert line.isprintable() or all(ord(character) >= 32 for character in line)
    if name.isprintable() and not name.startswith(" "):
        assert rendered(line) == name


@pytest.mark.parametrize("name", ODD)
def test_words_are_no_markup(name: str) -> None:
    """Oracle: each sign of Markdown and HTML has a backslash before it; a line stays one."""
    line = words(name)
    assert "\n" not in line
    assert "\x1b" not in line
    for place, sign in enumerate(line):
        if sign in "`*_[]<>&|~":
            assert line[place - 1] == "\\"


def test_a_cell_ends_where_it_should() -> None:
    """Oracle: the number of unescaped bars in each line of a table of two columns."""
    lines = rows([["a", "b"], [span("x|y"), "z"]]).splitlines()
    assert [line.replace("\\|", "").count("|") for line in lines] == [3, 3, 3]


def test_a_block_ends_where_it_should() -> None:
    """Oracle: the only line that is the fence is the last."""
    lines = code("", "a\n```\nb").splitlines()
    assert lines.count(lines[0]) == 2
    assert lines[-1] == lines[0] == "````"


@pytest.mark.parametrize("value", ["a---", "---\nx: 1", "x: y", "- a", "\x1b", "a\n---\nb"])
def test_the_front_matter_holds_its_values(value: str) -> None:
    """Oracle: PyYAML reads the values back, also after another card's fields were added."""
    kept: dict[str, Any] = {"license": value}
    card = keep_metadata(front_matter(CardData(base_model=value)) + "\n\ntext\n---\nmore", kept)
    fields, text = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(fields) == {"base_model": value, "license": value}
    assert text == "\ntext\n---\nmore"
