"""The page of an assessment: whole, self-contained, with the figures of the JSON, whatever a text holds."""

import base64
import hashlib
import json
import re
import unicodedata
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import Page
from pipeline import Pipeline

from saemill.assess.config import AssessConfig
from saemill.assess.report.bars import HEIGHT, WIDTH, bars, outline
from saemill.assess.report.charts import against_l0, styles_of
from saemill.assess.report.compared import headline, reasons, trust
from saemill.assess.report.latents import words_of
from saemill.assess.report.page import write_html
from saemill.assess.report.visible import MOST_LETTERS, visible
from saemill.assess.run import run
from saemill.common.stores import features
from saemill.common.stores.features import Context, Features, Passage

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><b onclick=x>",
    "--><!--",
    "{{ 7 * 7 }}",
    "\u202eevil\u2066",
    "\n\r\t\x00\x1b[31m",
    "\ufffd",
    "👩‍🚀",
    "\u0301" * 300,
    "x" * 5000,
    "&lt;i&gt;",
    '" onmouseover="x',
    "\ud800",
    "\u2028",
]


@pytest.fixture(scope="module")
def assessed(causal: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An assessment of two SAEs with some latents."""
    out = tmp_path_factory.mktemp("assessed") / "out"
    run(AssessConfig(run=causal.out, device="cpu", model_tokens=2000, n_latents=20, latents=(3,), out=out))
    return out


def densities(out: Path) -> dict[str, Any]:
    table = pq.read_table(out / "latents.parquet", columns=["variant", "density"])
    names = np.array(table["variant"])
    return {name: table["density"].to_numpy()[names == name] for name in dict.fromkeys(names.tolist())}


def page_of(assessed: Path, tmp_path: Path, shown: Features, most_bytes: int = 10**7) -> str:
    assessment = json.loads((assessed / "final_assessment.json").read_text())
    write_html(tmp_path / "page.html", assessment, shown, densities(assessed), None, most_bytes)
    return (tmp_path / "page.html").read_text()


def test_the_page_fetches_nothing_and_runs_its_own_script_alone(assessed: Path) -> None:
    """Oracle: Python's HTML parser: all links lead into the page, and to a place that is there; the policy
    lets nothing be loaded but scripts that lie beside the page, and no script in it run but the one with this
    hash."""
    text = (assessed / "report.html").read_text()
    page = Page(text)
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    for tag, attrs in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "srcset", "data", "action", "style"} & set(attrs)
        assert not any(name.startswith("on") for name in attrs)
        link = attrs.get("href") or ""
        assert link.startswith("#") == ("href" in attrs)
        assert link[1:] in ids or not link or "n" in str(attrs.get("class"))
    assert not re.search(r"url\(|@import|https?://", "".join(page.code))
    scripts = [code for code in page.code if "querySelector" in code]
    digest = base64.b64encode(hashlib.sha256("".join(scripts).encode()).digest()).decode()
    (policy,) = [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv")]
    assert (
        policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}' 'self' file:"
    )
    opened = [tag for tag, _ in page.tags]
    for tag in ("details", "table", "section", "svg", "p", "figure", "mark", "bdi"):
        assert opened.count(tag) == text.count(f"</{tag}>"), tag


def test_the_figures_are_those_of_the_json(assessed: Path) -> None:
    """Oracle: `final_assessment.json`: the number of each cell, the verdict of each row, in order."""
    assessment = json.loads((assessed / "final_assessment.json").read_text())
    text = (assessed / "report.html").read_text()
    rows = re.findall(r"<tr><td class=\"name\">.*?</tr>", text, re.DOTALL)
    entries = assessment["variants"] + assessment["controls"]
    for entry, row in zip(entries, rows, strict=False):
        assert entry["name"] in row
        assert f">{entry['verdict'].partition(':')[0].partition(',')[0]}</span>" in row
        values = [float(value) for value in re.findall(r'data-v="([^"]+)"', row)]
        names = ("fvu", "delta_ce", "loss_recovered", "l0", "dead_fraction", "cosine")
        expected = [entry["metrics"][name]["value"] for name in names]
        assert values[: len(names) + 2] == [entry["k"], entry["num_latents"], *expected]
    shown = features.load(assessed)
    assert f'id="latent-{shown.latents[0].latent}" open' in text
    for latent in shown.latents:
        assert f"Fires on {100 * latent.density:.3f}% of tokens" in text
        for context in latent.contexts:
            assert f'<span class="v">{context.activation:.2f}</span>' in text


def test_nothing_in_a_text_breaks_out(assessed: Path, tmp_path: Path) -> None:
    """Oracle: the page of plain words has the same tags with the same attributes but for titles, and the same
    code; each odd text is there as `visible` has it."""
    pages = {}
    for words in (HOSTILE, ["plain"]):
        values = features.load(assessed).model_dump()
        for latent, word in zip(values["latents"], cycle(words), strict=False):
            for effect in latent["effects"]:
                for token in (*effect["promoted"], *effect["suppressed"]):
                    token["text"] = word
            for context in latent["contexts"]:
                place = context["place"]
                tokens = list(place["tokens"])
                tokens[place["at"]], place["source"] = word, word
                place["tokens"] = tuple(tokens)
        pages[len(words)] = Page(page_of(assessed, tmp_path, Features.model_validate(values)))
    odd, plain = pages[len(HOSTILE)], pages[1]
    tags = [
        [(tag, {k: v for k, v in attrs.items() if k != "title"}) for tag, attrs in page.tags]
        for page in (odd, plain)
    ]
    assert tags[0] == tags[1]
    assert odd.code == plain.code
    for word in HOSTILE:
        assert sum(visible(word) in text for text in odd.texts) >= 20, word


@given(st.text())
def test_what_is_visible_moves_nothing(text: str) -> None:
    """Oracle: Unicode's categories of what has no shape; joiners aside."""
    shown = visible(text)
    assert len(shown) <= 8 * MOST_LETTERS + 2
    shown.encode()
    for letter in shown:
        assert letter in "\u200c\u200d" or unicodedata.category(letter)[0] != "C"
        assert unicodedata.bidirectional(letter) not in ("LRE", "RLE", "LRO", "RLO", "LRI", "RLI", "FSI")
        assert letter not in "\n\r\t\u2028\u2029"
    assert not shown or not unicodedata.combining(shown[0])


def test_a_page_has_as_many_latents_as_there_is_room_for(assessed: Path, tmp_path: Path) -> None:
    """Oracle: the file's size; the latents are the first of the draw, and the page says how many are not
    there."""
    shown = features.load(assessed)
    whole = page_of(assessed, tmp_path, shown)
    room = len(whole.encode()) - 30_000
    cut = page_of(assessed, tmp_path, shown, room)
    assert len(cut.encode()) <= room
    ids = [attrs["id"] for tag, attrs in Page(cut).tags if attrs.get("class") == "latent"]
    assert 0 < len(ids) < len(shown.latents)
    assert ids == [f"latent-{latent.latent}" for latent in shown.latents[: len(ids)]]
    assert f"{len(shown.latents) - len(ids)} more latents of the draw had no room" in cut
    assert "had no room" not in whole


def test_what_some_kinds_of_saes_have_beside_others(assessed: Path, tmp_path: Path) -> None:
    """Oracle: the planted figure of W_skip, and the planted prefixes: the first that has the latent."""
    assessment = json.loads((assessed / "final_assessment.json").read_text())
    assert "W_skip alone" not in (assessed / "report.html").read_text()
    assert "Among the first" not in (assessed / "report.html").read_text()
    figures = assessment["variants"][0]["metrics"]
    figures["fvu_skip"] = figures["fvu"] | {"value": 0.625}
    shown = features.load(assessed).model_copy(update={"prefixes": (16, 64, 128)})
    write_html(tmp_path / "page.html", assessment, shown, densities(assessed), None, 10**7)
    page = (tmp_path / "page.html").read_text()
    assert "W_skip alone, without latents, leaves an FVU of 0.625; with them it is" in page
    for latent in shown.latents:
        first = 16 if latent.latent < 16 else 64 if latent.latent < 64 else 128
        section = page.partition(f'id="latent-{latent.latent}"')[2].partition("</details>")[0]
        assert f"Among the first {first}." in section


def test_words_that_passages_share_find_a_latent(assessed: Path) -> None:
    """Oracle: three passages by hand."""
    latent = features.load(assessed).latents[0]
    contexts = [
        Context(activation=1.0, values=(), place=Passage(address=i, id=None, text=text))
        for i, text in enumerate(("The old man", "the OLD sea", "a man"))
    ]
    alone = {"strata": (), "effects": ()}
    assert words_of(latent.model_copy(update={"contexts": tuple(contexts), **alone})) == "the\nold\nman"
    assert words_of(latent.model_copy(update={"contexts": tuple(contexts[2:]), **alone})) == "a\nman"


def test_lines_of_a_chart_are_all_told_apart() -> None:
    """Oracle: the set of their styles; architectures keep their colours where there are enough."""
    keys = [("topk", 2**i, f"layers.{j}") for i in range(14) for j in range(15)]
    assert len(set(styles_of(keys).values())) == 210
    architectures = [(name, width, "s") for name in "abcdefg" for width in (1, 2, 4)]
    styles = styles_of(architectures)
    assert len(set(styles.values())) == 21
    for name in "abcdefg":
        assert len({styles[key].colour for key in architectures if key[0] == name}) == 1


def test_the_marks_of_a_chart_lie_where_logarithms_say(assessed: Path) -> None:
    """Oracle: of four values the logarithms' ratios equal those of the places, baselines among them."""
    assessment = json.loads((assessed / "final_assessment.json").read_text())
    chart = against_l0(assessment, "fvu")
    assert chart is not None
    entries = {e["name"]: e["metrics"] for e in assessment["variants"] + assessment["controls"]}
    marks = {mark.title.partition(":")[0]: mark for line in chart.lines for mark in line.marks}
    assert set(marks) == set(entries)
    for axis, metric in (("x", "l0"), ("y", "fvu")):
        values = np.log([entries[name][metric]["value"] for name in marks])
        places = np.array([getattr(mark, axis) for mark in marks.values()])
        slope, start = np.polyfit(values, places, 1)
        np.testing.assert_allclose(places, slope * values + start, atol=0.1)
        assert (slope > 0) == (axis == "x")
    assert sum(mark.best for mark in marks.values()) == 1


def test_bars_are_as_high_as_their_values() -> None:
    """Oracle: shares of the largest, by hand."""
    found = bars([1.0, None, 4.0], ["a", "b", "c"])
    assert [bar.height for bar in found] == [HEIGHT / 4, 0, HEIGHT]
    assert [bar.title for bar in found] == ["a", "b", "c"]
    assert found[-1].x + found[-1].width <= WIDTH
    assert outline([1, 2]) == "M0 32V16h50V0h50V32z"
    assert outline([]) == "M0 32V32z"


def entry(name: str, verdict: str, **more: Any) -> dict[str, Any]:
    metrics = {"fvu": {"value": 0.1}, "delta_ce": {"value": 0.2}, "l0": {"value": 32.0}}
    return {"name": name, "site": "x", "verdict": verdict, "metrics": metrics, "evidence": [], **more}


def test_what_was_compared_is_said_in_words() -> None:
    """Oracle: sentences by hand for a clear choice, one that may be chance, and none."""
    far = {"value": 0.1, "lo": 0.05, "hi": 0.2, "distinguishable": True}
    near = {"value": 0.1, "lo": -0.05, "hi": 0.2, "distinguishable": False}
    data = {
        "unit": "token", "document": "document", "n_tokens": 100, "n_documents": 40, "chosen": "these",
        "n_tokens_with_losses": 50, "n_documents_left_out_as_seen": 0,
    }  # fmt: skip
    other = {"chosen_by": "delta_ce", "overlap": True, "metrics": {}}
    variants = [
        entry("a", "passed", twins=["b"]),
        entry("b", "passed", twins=["a"], versus_best={"delta_ce": near}),
        entry("c", "failed: FVU, dead latents", versus_best={"delta_ce": far}),
    ]
    variants[1]["metrics"] = {"fvu": {"value": 0.12}, "delta_ce": {"value": 0.25}, "l0": {"value": 15.9}}
    assessment = {
        "variants": variants, "data": data, "best_on_other_documents": other, "best_variant": "a",
    }  # fmt: skip
    assert headline(assessment) == "Take a"
    said = reasons(assessment)
    assert "Of 3 SAEs: 2 passed, 1 failed. Failed by FVU (1), dead latents (1)." in said
    assert any(
        sentence.startswith("By ΔCE, its difference from b is within the interval") for sentence in said
    )
    assert said[-1] == (
        "By sparsity, the first that did not fail: b at L0 16 (ΔCE 0.250), a at L0 32 (ΔCE 0.200)."
    )
    assert trust(assessment)[-1].endswith("differ by at most 0.05 in ΔCE and at most 0.02 in FVU.")
    variants[1]["versus_best"] = {"delta_ce": far}
    assert any(s.startswith("Every other SAE's ΔCE is surely another") for s in reasons(assessment))
    assert headline(assessment | {"variants": [entry("a", "failed: FVU"), variants[2]]}) == "No SAE passes"
    assert headline(assessment | {"variants": [entry("a", "unknown")]}) == "No verdict on a"
    at_y = entry("d", "passed", target_site="y")
    several = assessment | {
        "variants": [*variants, at_y],
        "best_at_other_sites": [{"site": "y", "variant": "d", "on_other_documents": other}],
    }
    assert headline(several) == "x: Take a; y: d passes"
    apart, of_x, of_y = reasons(several)
    assert "are not compared" in apart
    assert of_x.startswith("x: a. Chosen and reported")
    assert "Of 3 SAEs: 2 passed" in of_x
    assert of_y.startswith("y: d. Chosen and reported")
    assert "SAEs:" not in of_y
    alone = trust(assessment | {"variants": [entry("a", "passed")]})[-1]
    assert alone == "How training varies is unknown: there is one seed of each SAE."
