"""The picture of the charts, `pareto.svg`: the figures of the JSON at their places, and nothing that acts."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from assessments import brief, write_assessment
from pipeline import Pipeline

from saemill.assess.report.picture import pareto
from saemill.assess.run import run
from saemill.common.stores import assessments

SVG = "{http://www.w3.org/2000/svg}"
WORDS = {"fvu": "FVU", "delta_ce": "ΔCE, nats per token"}


@pytest.fixture(scope="module")
def assessed(causal: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An assessment of two SAEs."""
    out = tmp_path_factory.mktemp("picture") / "out"
    run(brief(causal, out))
    return out


def test_every_sae_is_drawn_with_its_interval(assessed: Path) -> None:
    """Oracle: `final_assessment.json`: the title of each mark, in XML that Python's parser reads."""
    picture = ElementTree.fromstring((assessed / "pareto.svg").read_text())
    titles = [element.text or "" for element in picture.iter(f"{SVG}title")]
    entries = json.loads((assessed / "final_assessment.json").read_text())
    for entry in entries["variants"] + entries["controls"]:
        for name in ("fvu", "delta_ce"):
            figure, l0 = entry["metrics"][name], entry["metrics"]["l0"]["value"]
            found = [t for t in titles if t.startswith(f"{entry['name']}: {WORDS[name]} ")]
            assert len(found) == (figure["value"] > 0), "what is not positive has no place on the axis"
            title = "".join(found)
            if not found:
                continue
            assert f"L0 {l0:.1f}" in title
            assert f"{figure['value']:.3f}" in title or abs(figure["value"]) >= 10
            assert figure["lo"] is None or f"{figure['lo']:.3f}" in title


def test_the_axis_is_where_the_figures_are(assessed: Path) -> None:
    """Oracle: marks by the ticks: between two ticks the place is linear in the logarithm."""
    chart = ElementTree.fromstring((assessed / "pareto.svg").read_text()).findall(f"{SVG}g")[0]
    labels = [t for t in chart.findall(f"{SVG}text") if t.get("text-anchor") == "end"]
    ticks = {float(t.text or "nan"): float(t.get("y", "nan")) - 4 for t in labels}
    (low, y_low), *_, (high, y_high) = sorted(ticks.items())
    entries = json.loads((assessed / "final_assessment.json").read_text())["variants"]
    for entry in entries:
        (mark,) = [g for g in chart.iter(f"{SVG}g") if _title(g).startswith(f"{entry['name']}: ")]
        shape = mark.findall(f"{SVG}circle")[-1]
        share = (float(shape.get("cy", "nan")) - y_low) / (y_high - y_low)
        assert low * (high / low) ** share == pytest.approx(entry["metrics"]["fvu"]["value"], rel=0.02)


def _title(group: Any) -> str:
    return group.findtext(f"{SVG}title") or ""


def test_the_picture_fetches_nothing_and_does_nothing(assessed: Path) -> None:
    """Oracle: Python's XML parser: no script, no link, no address but the name of SVG itself; and the record
    answers for the file."""
    text = (assessed / "pareto.svg").read_text()
    for element in ElementTree.fromstring(text).iter():
        assert element.tag.removeprefix(SVG) not in ("script", "a", "image", "use", "foreignObject")
        assert not any(name.startswith("on") or "href" in name for name in element.attrib)
    assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"]
    assert assessments.problems(assessed) == []
    (assessed / "pareto.svg").write_text(text + " ")
    try:
        assert "pareto.svg" in assessments.problems(assessed)[0]
    finally:
        (assessed / "pareto.svg").write_text(text)


def test_names_are_text_in_it(assessed: Path) -> None:
    """Oracle: Python's XML parser gives the names back."""
    values = json.loads((assessed / "final_assessment.json").read_text())
    odd = "<b>&\"'"
    values["variants"][0]["name"] = odd
    titles = [t.text or "" for t in ElementTree.fromstring(str(pareto(values))).iter(f"{SVG}title")]
    assert sum(title.startswith(f"{odd}: ") for title in titles) == 2


def test_without_figures_there_is_no_picture(tmp_path: Path) -> None:
    """Oracle: an assessment in which nothing was measured."""
    write_assessment(tmp_path, {"a": "unknown"})
    values = assessments.read(tmp_path)
    for entry in values["variants"]:
        entry["metrics"] = {
            name: {"value": None, "reason": "not measured"} for name in ("fvu", "l0", "delta_ce")
        }
    assert pareto(values) is None
