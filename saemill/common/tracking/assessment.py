"""What `saemill assess` wrote, to wandb: each variant's summary and density, one table of all, the charts
against L0, and where some latents fire."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saemill.common import records
from saemill.common.errors import StoreError
from saemill.common.stores import assessments, features
from saemill.common.stores.assessments import ALIASES
from saemill.common.stores.features import Context, Passage
from saemill.common.stores.runs import ASSESSMENT, LATENTS, METRICS, PARETO, REPORT, WANDB
from saemill.common.tracking.follow import catch_up, state
from saemill.common.tracking.process import new_id
from saemill.common.tracking.record import Assessed, WandbSettings
from saemill.common.tracking.runs import Runs, log_artifact, start, values

N_BINS = 64
"""Number of bins of the histograms of density."""
FILES = (ASSESSMENT, REPORT, LATENTS)
N_LATENTS, N_CONTEXTS, LETTERS = 20, 3, 160
"""Latents in the table of contexts, contexts of each, and letters of a context."""


def log_assessment(folder: Path, out: Path) -> None:
    """Log an assessment.

    Args:
        folder: of the run.
        out: where its assessment was written.
    """
    prefix = "assess" if out == folder else out.name
    assessment = assessments.read(out)
    if bad := assessments.problems(out):
        raise StoreError("\n".join([*bad, assessments.REPAIR]))
    runs = Runs(folder)
    known = dict(runs.settings.assessments)
    known[prefix] = Assessed(id=known[prefix].id if prefix in known else new_id(), folder=str(out))
    runs.settings = runs.settings.model_copy(update={"assessments": known})
    records.write(folder / WANDB, runs.settings)
    catch_up(folder, runs)
    densities = assessments.densities(out)
    summaries = _summaries(folder, known)
    for name, summary in summaries.items():
        run = runs.run(name)
        run.summary.update(summary)
        if name in densities:
            histogram = _histogram(densities[name], assessment["data"]["n_tokens"])
            # A step after training's last, which is the x of the chart all the same.
            shown = {f"{prefix}/log10_density": histogram, "tokens": summary["tokens"]}
            run.log(shown, step=max(run.starting_step, summary["tokens"] + 1))
    for name, run in runs.open.items():
        run.finish(exit_code=int(summaries[name]["state"] == "diverged"))
    _log_table(folder, out, prefix, assessment, runs.settings)


def _summaries(folder: Path, known: dict[str, Assessed]) -> dict[str, dict[str, Any]]:
    """Collect each variant's whole summary: how training ended, and all that was assessed.

    Where a run is offline, `wandb sync` leaves of its summary what the last process wrote.
    """
    summaries: dict[str, dict[str, Any]] = {}
    for line in (folder / METRICS).read_text().splitlines():
        record = json.loads(line)
        for name in record["variants"]:
            summaries[name] = values(record, name)
    for name, summary in summaries.items():
        summary |= state(folder, name)
    for prefix, entry in known.items():
        folder_of = Path(entry.folder)
        if not (folder_of / assessments.FILE).exists():
            continue
        assessment = assessments.read(folder_of)
        frozen = [entry for entry in assessment["controls"] if entry.get("control") == "frozen"]
        for place, variant in enumerate([*assessment["variants"], *frozen]):
            for key, value in _summary(variant, place + 1).items():
                summaries[variant["name"]][f"{prefix}/{key}"] = value
    return summaries


def _summary(entry: dict[str, Any], place: int) -> dict[str, Any]:
    """Collect a variant's figures with the ends of their intervals, and its verdict."""
    summary: dict[str, Any] = {"verdict": entry["verdict"], "place": place}
    if entry["not_measured"]:
        return summary | {"not_measured": entry["not_measured"]}
    figures = {name: figure for name, figure in entry["metrics"].items() if name not in ALIASES}
    for cut in entry.get("cuts", ()):
        figures |= {f"{name}, {cut['name']}": figure for name, figure in cut["metrics"].items()}
    for name, figure in figures.items():
        if isinstance(figure["value"], int | float):
            summary[name] = figure["value"]
            if figure["lo"] is not None:
                summary |= {f"{name}_lo": figure["lo"], f"{name}_hi": figure["hi"]}
        elif figure["value"] is None:
            summary[f"{name}_reason"] = figure["reason"]
    return summary


def _histogram(density: NDArray[np.float64], n_tokens: int) -> Any:
    """Count log10 of the latents' densities in bins; latents that never fired are at the left end, 1 / (2
    tokens)."""
    import wandb

    least = 1 / (2 * max(1, n_tokens))
    edges = np.linspace(np.log10(least), 0, N_BINS + 1)
    return wandb.Histogram(np_histogram=np.histogram(np.log10(np.maximum(density, least)), edges))


def _log_table(
    folder: Path, out: Path, prefix: str, assessment: dict[str, Any], settings: WandbSettings
) -> None:
    """Log a run of the group for the assessment as a whole: tables of variants and of contexts, the charts,
    and the page."""
    import wandb

    name = "assessment" if prefix == "assess" else f"assessment {prefix}"
    config = {key: assessment[key] for key in ("data", "thresholds", "versions")}
    run = start(folder, settings, name, settings.assessments[prefix].id, "assess", config, quiet=True)
    run.summary["best_variant"] = assessment["best_variant"]
    page = wandb.Html(_without_latents((out / REPORT).read_text()), inject=False, data_is_not_path=True)
    media = {"variants": _table(assessment), "report": page, "contexts": _contexts(out)}
    if (out / PARETO).exists():
        media["pareto"] = wandb.Html((out / PARETO).read_text(), inject=False, data_is_not_path=True)
    run.log({f"{prefix}/{what}": shown for what, shown in media.items()})
    if settings.artifacts:
        log_artifact(
            run, f"{settings.group}-{settings.prefix}{name}", "assessment", [out / file for file in FILES]
        )
    run.finish()


def _without_latents(page: str) -> str:
    """Cut the latents from a page, which are almost all of it: wandb keeps the page anew of each assessment,
    and shows it without the folder beside it. The artifact has the whole one."""
    before, found, rest = page.partition('<section id="latents"')
    if not found:
        return page
    start = before.replace('<a href="#latents">Latents</a>', "")
    note = "<section><h2>Latents</h2><p>They are on the page in the run's folder, report.html.</p></section>"
    return start + note + rest.partition("</section>")[2]


def _table(assessment: dict[str, Any]) -> Any:
    """Make a table with a row per variant, best first, then the baselines that were not trained."""
    import wandb

    entries = assessment["variants"] + assessment["controls"]
    first = assessment["variants"][0]["metrics"]
    metrics = [
        name
        for name, figure in first.items()
        if not isinstance(figure["value"], list) and name not in ALIASES
    ]
    shown = ("name", "site", "k", "num_latents", "tokens_trained", "verdict")
    rows = [
        [*(entry[key] for key in shown), *(entry["metrics"][name]["value"] for name in metrics)]
        for entry in entries
    ]
    return wandb.Table(columns=["variant", *shown[1:], *metrics], data=rows)


def _contexts(out: Path) -> Any:
    """Make a table of where some latents fire most: the first that were drawn at random, none picked."""
    import wandb

    shown = features.load(out)
    drawn = [latent for latent in shown.latents if not latent.asked][:N_LATENTS]
    rows = [
        [shown.variant, latent.latent, latent.density, context.activation, _text(context)]
        for latent in drawn
        for context in latent.contexts[:N_CONTEXTS]
    ]
    return wandb.Table(columns=["variant", "latent", "density", "activation", "context"], data=rows)


def _text(context: Context) -> str:
    """Write a place in a line, with the token at which the latent fires between « and »."""
    place = context.place
    if isinstance(place, Passage):
        return " ".join((place.text or str(place.address)).split())[:LETTERS]
    before, token, after = (
        "".join(part).replace("\n", " ")
        for part in (place.tokens[: place.at], place.tokens[place.at], place.tokens[place.at + 1 :])
    )
    return f"{before[-LETTERS // 2 :]}«{token}»{after[: LETTERS // 2]}"
