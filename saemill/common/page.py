"""A report as one HTML page with nothing to fetch; `page.html` is its frame."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from saemill.common import durable

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's colours, which colour-blind readers tell apart."""


def write_page(path: Path, template: str, **values: Any) -> None:
    """Fill in a template and write the page.

    Args:
        path: the file.
        template: its place in the package: `assess/report.html`.
        values: what it names. Text in them is shown as it is; none of it is HTML.
    """
    durable.write_bytes(path, [render(template, **values).encode()])


def render(template: str, **values: Any) -> str:
    """Fill in a template; see `write_page`."""
    return _pages().get_template(template).render(palette=PALETTE, **values)


@cache
def _pages() -> Environment:
    return Environment(
        loader=PackageLoader("saemill", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
