"""The latents beside the page: that all are there, as the page has them, and that a reader finds them."""

import base64
import gzip
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import MIDDLE, NARROW, WIDE, Browser, browser
from pipeline import Pipeline

from saemill.assess.config import AssessConfig, LatentConfig
from saemill.assess.latent import run as show
from saemill.assess.outlook import Amounts, Dictionary, outlook_of
from saemill.assess.report.latents import page_of
from saemill.assess.report.shards import PER_SHARD
from saemill.assess.run import run
from saemill.common.stores import assessments, features
from saemill.common.stores.features import Features, Snippet

N_LATENTS, N_DRAWN = 128, 12
CPU = torch.device("cpu")
SEARCH, FOUND = "#search input", "document.querySelector('#search output').value"


def config(causal: Pipeline, out: Path, **values: Any) -> AssessConfig:
    return AssessConfig(
        run=causal.out,
        device="cpu",
        model_tokens=500,
        n_latents=N_DRAWN,
        out=out,
        context_tokens=4000,
        **values,
    )


@pytest.fixture(scope="module")
def assessed(causal: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An assessment with few latents on its page."""
    out = tmp_path_factory.mktemp("assessed") / "out"
    run(config(causal, out))
    return out


@pytest.fixture(scope="module")
def every(causal: Pipeline, assessed: Path) -> Features:
    """All latents of the SAE that it shows."""
    sae = causal.out / features.load(assessed).variant
    return show(LatentConfig(run=sae, latents=(f"0-{N_LATENTS - 1}",), device="cpu", context_tokens=4000))


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def content(file: Path) -> dict[str, Any]:
    """What a shard hands over, read as its docstring has it."""
    name, packed = re.fullmatch(r'shard\("(\w+)", "([\w+/=]+)"\);\n', file.read_text()).groups()  # type: ignore[union-attr]
    assert name == file.stem
    read: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(packed)))
    return read


def test_every_latent_lies_beside_the_page(assessed: Path, every: Features, tmp_path: Path) -> None:
    """Oracle: `saemill latent` of them all, rendered as the page's own; the assessment's list of files."""
    folder = assessed / "report-latents"
    shards = [content(folder / f"{i}.js") for i in range(-(-N_LATENTS // PER_SHARD))]
    pages = {number: page for shard in shards for number, page in shard["latents"].items()}
    drawn = [latent.model_copy(update={"asked": False}) for latent in every.latents]
    assert pages == {str(latent.latent): page_of(latent, every) for latent in drawn}
    words = content(folder / "words.js")
    assert len(words["words"]) == N_LATENTS
    for latent, lines in zip(every.latents, words["words"], strict=True):
        for context in latent.contexts:
            assert isinstance(context.place, Snippet)
            token = context.place.tokens[context.place.at].strip().lower()
            assert token in lines or not token.isprintable()
    assert len({shard["stamp"] for shard in (*shards, words)}) == 1
    listed = {entry["path"] for entry in assessments.read(assessed)["files"]}
    assert {f"report-latents/{file.name}" for file in folder.iterdir()} <= listed
    shutil.copytree(assessed, tmp_path / "copy")
    (tmp_path / "copy" / "report-latents" / "1.js").unlink()
    assert any("report-latents/1.js" in problem for problem in assessments.problems(tmp_path / "copy"))


def test_a_wide_sae_has_none_beside_the_page(causal: Pipeline, tmp_path: Path, every: Features) -> None:
    """Oracle: the setting; what lay there of an assessment before is gone."""
    (tmp_path / "report-latents").mkdir()
    (tmp_path / "report-latents" / "0.js").write_text("old")
    run(config(causal, tmp_path, with_model=False, most_beside=N_LATENTS - 1))
    assert not (tmp_path / "report-latents").exists()
    page = (tmp_path / "report.html").read_text()
    assert "data-folder" not in page
    assert f"saemill latent and saemill view show any latent of {every.variant}" in page


def test_the_outlook_tells_their_size(causal: Pipeline, assessed: Path) -> None:
    """Oracle: the files; within a third of them, of an SAE whose text is not the usual."""
    folder = assessed / "report-latents"
    asked = config(causal, assessed)
    saes = [Dictionary("layers.1", 16, N_LATENTS, 16)]
    told = outlook_of(asked, saes, Amounts(4000, 500, 4000), CPU)
    assert told.n_files == len(list(folder.iterdir()))
    n_bytes = sum(file.stat().st_size for file in folder.iterdir())
    assert told.disk["latents beside the report"] == pytest.approx(n_bytes, rel=0.5)
    wide = outlook_of(config(causal, assessed, most_beside=64), saes, Amounts(4000, 500, 4000), CPU)
    assert (wide.disk, wide.n_files) == ({}, 0)


@pytest.mark.parametrize(
    ("size", "scheme"), [(WIDE, "light"), (NARROW, "dark"), (NARROW, "light"), (MIDDLE, "dark")]
)
def test_a_browser_shows_the_page(
    tab: Browser, assessed: Path, every: Features, size: tuple[int, int], scheme: str
) -> None:
    """Oracle: Chromium: nothing in its console, nothing asked of a network, nothing wider than the window, no
    table wider than its place from 1,000 px on; a latent is found by its number, and by a token where a
    sentence of Python finds it too."""
    page = assessed / "report.html"
    tab.open(page.as_uri(), size, scheme)
    assert tab.value("document.documentElement.scrollWidth <= innerWidth")
    tables = "[...document.querySelectorAll('.scroll')].some((each) => each.scrollWidth > each.clientWidth)"
    assert size == NARROW or not tab.value(tables)
    light = tab.value("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] > 128")
    assert light == (scheme == "light")
    shown = {latent.latent for latent in features.load(assessed).latents}
    other = next(latent for latent in every.latents if latent.latent not in shown and latent.contexts)
    tab.type(SEARCH, str(other.latent))
    tab.until(f"{FOUND} === '1 found'")
    visible = "[...document.querySelectorAll('.latent')].filter((one) => !one.hidden).map((one) => one.id)"
    assert tab.value(visible) == [f"latent-{other.latent}"]
    assert f"Fires on {100 * other.density:.3f}% of tokens" in tab.value(
        f"document.getElementById('latent-{other.latent}').textContent"
    )
    assert tab.value("document.documentElement.scrollWidth <= innerWidth")
    words = content(assessed / "report-latents" / "words.js")["words"]
    (token, *_) = words[other.latent].split("\n")
    expected = {number for number, lines in enumerate(words) if token in lines}
    tab.type(SEARCH, token)
    tab.until(f"{FOUND} === '{len(expected)} found'")
    more = "document.querySelector('.more')"
    while tab.value(f"!{more}.hidden"):
        left = tab.value(f"{more}.textContent")
        tab.value(f"{more}.click()")
        tab.until(f"{more}.hidden || {more}.textContent !== '{left}'")
    tab.until(f"{visible}.length === {len(expected)}")
    assert {int(name.removeprefix("latent-")) for name in tab.value(visible)} == expected
    assert tab.value("document.documentElement.scrollWidth <= innerWidth")
    assert tab.complaints == []
    assert all(address.startswith(assessed.as_uri()) for address in tab.requests)


def test_a_link_to_any_latent_leads_to_it(tab: Browser, assessed: Path) -> None:
    """Oracle: the neighbour that a latent on the page names, though it lies in a shard."""
    tab.open((assessed / "report.html").as_uri())
    ids = {f"latent-{latent.latent}" for latent in features.load(assessed).latents}
    links = tab.value("[...document.querySelectorAll('a.n')].map((link) => link.hash.slice(1))")
    target = next(link for link in links if link not in ids)
    tab.value(f"document.querySelector('a.n[href=\"#{target}\"]').click()")
    tab.until(f"document.getElementById('{target}')?.open")


@pytest.mark.parametrize(
    ("done", "told"),
    [
        ("gone", "is not beside this page: copy the whole folder to it"),
        ("cut", "is damaged: run saemill assess again"),
        ("bit", "is damaged: run saemill assess again"),
        ("other", "is of another assessment: copy the one that was written with it"),
    ],
)
def test_the_page_says_what_is_wrong_with_its_shards(
    tab: Browser, assessed: Path, tmp_path: Path, done: str, told: str
) -> None:
    """Oracle: the damage that was done to them; the page itself stays whole."""
    shutil.copytree(assessed, tmp_path / "copy")
    folder = tmp_path / "copy" / "report-latents"
    for file in folder.iterdir():
        text = file.read_text()
        changed = {
            "cut": text[: len(text) // 2],
            "bit": text.replace(text[300], "A" if text[300] != "A" else "B", 1),
            "other": text,
        }
        if done == "gone":
            file.unlink()
        elif done == "other":
            read = json.dumps(content(file) | {"stamp": "0" * 16}).encode()
            file.write_text(f'shard("{file.stem}", "{base64.b64encode(gzip.compress(read)).decode()}");\n')
        else:
            file.write_text(changed[done])
    tab.open((tmp_path / "copy" / "report.html").as_uri())
    tab.type(SEARCH, "a")
    tab.until(f"{FOUND}.includes('found on this page')")
    assert told in tab.value(FOUND)
    tab.type(SEARCH, str(N_LATENTS))
    tab.until(f"{FOUND} === 'there are latents 0 to {N_LATENTS - 1}'")


def test_a_page_without_shards_says_where_others_are(
    tab: Browser, causal: Pipeline, tmp_path: Path, every: Features
) -> None:
    """Oracle: the page of two latents: one is found, another is not, and no link leads nowhere."""
    page = tmp_path / "latents.html"
    show(LatentConfig(run=causal.out / every.variant, latents=("3", "4"), out=page, device="cpu"))
    tab.open(page.as_uri())
    tab.type(SEARCH, "4")
    tab.until(f"{FOUND} === '1 found'")
    tab.type(SEARCH, "5")
    tab.until(f"{FOUND} === 'not on this page: saemill latent RUN/SAE 5'")
    targets = "[...document.querySelectorAll('a.n')].map((link) => link.hash)"
    assert set(tab.value(targets)) <= {"#latent-3", "#latent-4"}
    assert tab.complaints == []
