"""The page: its sections put together, in one file that fetches nothing."""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup
from numpy import float64
from numpy.typing import NDArray

from saemill.assess.explained import summary
from saemill.assess.report import charts, compared, latents, variants
from saemill.assess.report.judged import judged
from saemill.assess.report.picture import SIZE
from saemill.assess.report.shards import Shards
from saemill.assess.report.visible import visible
from saemill.assess.sums import number
from saemill.assess.table import are_crosscoders, are_several, columns_of, notes, thresholds
from saemill.assess.verdict import TITLES
from saemill.common import durable
from saemill.common.log import counted
from saemill.common.page import render
from saemill.common.stores.explanations import Explanations
from saemill.common.stores.features import Features


@dataclass(frozen=True, slots=True)
class Live:
    """What a page with a server behind it can do."""

    n_latents: int
    no_model: str | None
    """Why no text can be tried, if so."""
    no_steering: str | None
    """Why no latent can be added, if that is known."""


def write_html(
    path: Path,
    assessment: dict[str, Any],
    features: Features,
    densities: Mapping[str, NDArray[float64]],
    explained: Explanations | None,
    most_bytes: int,
    shards: Shards | None = None,
) -> None:
    """Write the page.

    Args:
        path: the file.
        assessment: the content of `final_assessment.json`.
        features: the latents to show.
        densities: variant → share of tokens on which each latent fired, [F].
        explained: what a language model said of the latents, if one was asked.
        most_bytes: size from which on latents are left out.
        shards: all latents, where they lie beside it.
    """
    page = _page(assessment, features, densities, explained, most_bytes, shards, None)
    durable.write_bytes(path, [page.encode()])


def live_page(
    assessment: dict[str, Any],
    features: Features,
    densities: Mapping[str, NDArray[float64]],
    explained: Explanations | None,
    most_bytes: int,
    live: Live,
) -> str:
    """Render the page of `saemill view`, which asks its server for what is not on it; see `write_html`."""
    return _page(assessment, features, densities, explained, most_bytes, None, live)


def _page(
    assessment: dict[str, Any],
    features: Features,
    densities: Mapping[str, NDArray[float64]],
    explained: Explanations | None,
    most_bytes: int,
    shards: Shards | None,
    live: Live | None,
) -> str:
    values = {
        **_sections(assessment, densities),
        "shown": features,
        "word": _word(features),
        "drawn": _drawn(features),
        "explained": summary(explained) if explained else "",
        "shards": shards,
        "live": live,
        **_script("live.js" if live else "shards.js"),
    }
    without = render("assess/report/report.html", **values, latents="", left_out="")
    html, n = latents.pages(features, explained, most_bytes - len(without.encode()) - 1000)
    left_out = _left_out(len(features.latents) - n, most_bytes)
    others = _others(features.variant, shards, live)
    return render("assess/report/report.html", **values, latents=html, left_out=f"{left_out}{others}")


def _sections(assessment: dict[str, Any], densities: Mapping[str, NDArray[float64]]) -> dict[str, Any]:
    """Lay out the sections before the latents, by the names that the templates have."""
    shown, data = columns_of(assessment), assessment["data"]
    return {
        "headline": compared.headline(assessment),
        "reasons": compared.reasons(assessment),
        "trust": compared.trust(assessment),
        "notes": notes(assessment),
        "thresholds": thresholds(assessment),
        "data": data,
        "charts": [chart for metric in charts.METRICS if (chart := charts.against_l0(assessment, metric))],
        "size": SIZE,
        "columns": shown,
        "architectures": are_several(assessment["variants"]),
        "transcoders": any(entry.get("target_site") for entry in assessment["variants"]),
        "crosscoders": are_crosscoders(assessment["variants"]),
        "variants": variants.rows(assessment["variants"], shown, densities, data),
        "baselines": variants.rows(assessment["controls"], shown, {}, data),
        **judged(assessment),
        "check_text": check_text,
        "number": number,
        "visible": visible,
    }


def check_text(check: Mapping[str, Any]) -> str:
    """Say what a check of the verdict found."""
    title = TITLES[check["metric"]]
    if check["value"] is None:
        return f"{title}: unknown, {check['reason']}"
    value = f"{check['value']:.3f}"
    if check["against"]:
        ends = "" if check["hi"] is None else f" ({check['lo']:.3f}–{check['hi']:.3f})"
        limit = check["threshold"].partition(" of ")[0]
        return f"{title} is {value}{ends} of that of {check['against']}; passes {limit}"
    return f"{title}: {value}; passes {check['threshold']}" + (
        f"; {check['reason']}" if check.get("reason") else ""
    )


def _drawn(features: Features) -> str:
    """Say how the latents were chosen."""
    asked = sum(latent.asked for latent in features.latents)
    n = len(features.latents) - asked
    drawn = (
        f"{counted(n, 'latent')} drawn at random from {features.n_live:,} live ones (seed {features.seed})"
    )
    if asked:
        drawn += f", and {counted(asked, 'latent')} that {'was' if asked == 1 else 'were'} asked for"
    return f"{drawn}, in the order of the draw; none is picked by hand. Searched: {features.searched}."


def _left_out(n: int, most_bytes: int) -> str:
    """Say how many latents had no room."""
    size = f"{most_bytes / 1e6:g} MB"
    return f"{counted(n, 'more latent')} of the draw had no room on a page of {size}. " if n else ""


def _others(variant: str, shards: Shards | None, live: Live | None) -> str:
    """Say where all other latents are."""
    if live is not None:
        return f"The search finds all {live.n_latents:,}, those that never fire too."
    if shards is None:
        return f"saemill latent and saemill view show any latent of {variant}."
    return (
        f"All {shards.n_latents:,} latents of it, those that never fire too, are in the folder "
        f"{shards.folder} beside this page: the search, and links to latents, find them there."
    )


def write_latents(path: Path, features: Features, explained: Explanations | None) -> None:
    """Write a page with these latents alone."""
    html, _ = latents.pages(features, explained, None)
    page = render(
        "assess/report/latents.html",
        shown=features,
        explained=summary(explained) if explained else "",
        word=_word(features),
        latents=html,
        shards=None,
        live=None,
        **_script("shards.js"),
    )
    durable.write_bytes(path, [page.encode()])


def _word(features: Features) -> str:
    """Return what latents are searched by beside their number."""
    return "word" if features.unit == "passage" else "token"


def _script(source: str) -> dict[str, Any]:
    """Return the page's script, and the hash by which the page lets it run.

    Args:
        source: file of the part that gets latents from where they are.
    """
    folder = files("saemill.assess.report")
    script = "".join((folder / name).read_text() for name in ("script.js", source, "search.js"))
    digest = hashlib.sha256(script.encode()).digest()
    return {"script": Markup(script), "script_hash": base64.b64encode(digest).decode()}
