"""The pages of reports: that their templates ship, and that no text in them becomes HTML."""

import tomllib
from pathlib import Path

import pytest
from pages import Page

import saemill
from saemill.common.page import write_page
from saemill.compare import report
from saemill.hub.names import Names

ROOT = Path(saemill.__file__).parent
ODD = ["<b>bold</b>", 'it\'s "odd" & <i>', "{{ 1 + 1 }}", "{% raw %}", "a/b c", "é\u202e"]


def comparison(name: str) -> dict[str, object]:
    """Two dictionaries, the first of this name."""
    matched = {
        "share": 1.0,
        "share_above": 1.0,
        "histogram": [0] * 39 + [1],
        "shares": {"0.3": 1.0, "0.95": 1.0},
    }
    figures = {"mean_max": [1.0, 1.0], "mutual_nearest": matched, "assignment": matched | {"mean": 1.0}}
    pair = figures | {
        "a": name, "b": "other", "n_latents": [1, 1], "differs_in": [name],
        "mean_max_adjusted": [{"same_covariance": 1.0}] * 2, "chance": {"same_covariance": figures},
    }  # fmt: skip
    settings = {"by": "decoder", "matching": "assignment", "threshold": 0.7, "acts": []}
    dictionaries = [{"name": name}, {"name": "other"}]
    stable = {"dictionary": name, "n_others": 1, "n_latents": 2, "found_in": [1, 1], "by_chance": 0.0}
    return {
        "pairs": [pair], "dictionaries": dictionaries, "settings": settings, "notes": [name],
        "stability": [stable],
    }  # fmt: skip


def test_every_file_that_is_no_code_ships() -> None:
    """Oracle: the globs of pyproject.toml against the files there are."""
    globs = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    shipped = {file for pattern in globs["saemill"] for file in ROOT.glob(pattern)}
    files = {file for file in ROOT.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    assert {file for file in files if file.suffix != ".py"} - shipped == set()
    assert {ROOT / "common" / "page.html", ROOT / "assess" / "report" / "report.html"} <= shipped


@pytest.mark.parametrize("name", ODD)
def test_a_name_on_a_page_is_text(tmp_path: Path, name: str) -> None:
    """Oracle: Python's HTML parser gives the name back, wherever it stands, and finds the tags of a plain
    name's page."""
    pages = {}
    for at, shown in (("odd", name), ("plain", "plain")):
        report.write_html(tmp_path / at, comparison(shown))
        pages[at] = Page((tmp_path / at).read_text())
    assert pages["odd"].tags == pages["plain"].tags
    assert pages["odd"].texts.count(name) == pages["plain"].texts.count("plain") == 3
    assert f"{name} – other" in pages["odd"].texts


def test_a_value_that_is_missing_is_an_error(tmp_path: Path) -> None:
    """Oracle: jinja2 names the value; nothing is written."""
    with pytest.raises(Exception, match="'legend' is undefined"):
        write_page(tmp_path / "page.html", "compare/report.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["/home/it's me/acts", '/data/a "b" & c/acts'])
def test_a_path_on_a_page_becomes_a_name(tmp_path: Path, path: str) -> None:
    """Oracle: the page of the path's last part."""
    for at, shown in (("path", path), ("name", "acts")):
        report.write_html(tmp_path / at, comparison(shown))
    assert Names({"acts": path}).in_text((tmp_path / "path").read_text()) == (tmp_path / "name").read_text()
