"""docs/models.md: its table says what the tests of families check."""

from pathlib import Path

import families

from saemill.common.sae.formats import hooks

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
HEAD = (
    "| model type | blocks | added to the residual stream | holds the whole stream | TransformerLens' names |"
)
ALONE = {"t5": ("SelfAttention", "DenseReluDense"), "bart": ("self_attn", "fc2")}
"""What the encoders add that are run alone."""


def row(family: str) -> str:
    """A family's line of the table."""
    names = (families.ADDED | families.ADDED_BEFORE_NORM | ALONE).get(family, ())
    added = ", ".join(f"`{name}`" for name in names) or "not told"
    if family in families.FACTOR:
        added += f", times {families.FACTOR[family]} here"
    if family in families.NORMED:
        added += ": norms of " + " and ".join(f"`{name}`" for name in families.NORMED[family])
    if family in families.ADDED_BEFORE_NORM or family == "bart":
        added += "; each sum is normed"
    holding = ", ".join(f"`{name}`" for name in families.HOLDING.get(family, ()))
    holding = "`layer.0`, `layer.1`" if family == "t5" else holding
    known = "yes" if family in hooks.BLOCKS else ""
    return f"| {family} | `{families.BLOCKS[family]}.*` | {added} | {holding} | {known} |"


def page() -> str:
    """The page, its table written anew."""
    before, _, after = PAGE.read_text().partition("| model type |")
    rest = after.partition("\n\n")[2]
    rows = [row(family) for family in (*families.CAUSAL, *families.MASKED, *ALONE)]
    return before + "\n".join([HEAD, "|---|---|---|---|---|", *rows]) + "\n\n" + rest


def test_the_page_lists_the_families() -> None:
    """Oracle: the tables that test_site_roles.py holds against transformers; `python -c 'import sys;
    sys.path.insert(0, "support"); import test_models_page as t; t.PAGE.write_text(t.page())'` in this folder
    writes the page anew."""
    assert page() == PAGE.read_text()
