"""What `saemill assess` wrote, to wandb: each variant's summary and density, and one table of all."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from saemill.common import durable
from saemill.common.wandb.follow import catch_up
from saemill.common.wandb.process import RECORD, new_id
from saemill.common.wandb.runs import Runs, log_artifact, start

N_BINS = 64
"""Of the histograms of density."""
FILES = ("final_assessment.json", "report.html", "latents.parquet")


def log_assessment(folder: Path, out: Path) -> None:
    """Log an assessment.

    Args:
        folder: of the run.
        out: where its assessment was written.
    """
    prefix = "assess" if out == folder else out.name
    assessment = durable.read_json(out / "final_assessment.json")
    runs = Runs(folder)
    catch_up(folder, runs)
    densities = _densities(out / "latents.parquet")
    for place, entry in enumerate(assessment["variants"]):
        run = runs.run(entry["name"])
        run.summary.update({f"{prefix}/{key}": value for key, value in _summary(entry, place + 1).items()})
        if entry["name"] in densities:
            histogram = _histogram(densities[entry["name"]], assessment["data"]["n_tokens"])
            # A step after training's last, which is the x of the chart all the same.
            shown = {f"{prefix}/log10_density": histogram, "tokens": entry["tokens_trained"]}
            run.log(shown, step=max(run.starting_step, entry["tokens_trained"] + 1))
    for run in runs.open.values():
        run.finish()
    _log_table(folder, out, prefix, assessment, runs.told)


def _summary(entry: dict[str, Any], place: int) -> dict[str, Any]:
    """A variant's figures with the ends of their intervals, and its verdict."""
    found: dict[str, Any] = {"verdict": entry["verdict"], "place": place}
    if entry["not_measured"]:
        return found | {"not_measured": entry["not_measured"]}
    for name, figure in entry["metrics"].items():
        if isinstance(figure["value"], int | float):
            found[name] = figure["value"]
            if figure.get("lo") is not None:
                found |= {f"{name}_lo": figure["lo"], f"{name}_hi": figure["hi"]}
    return found


def _densities(path: Path) -> dict[str, NDArray[np.float64]]:
    """Share of tokens on which each latent fired, by variant."""
    table = pq.read_table(path, columns=["variant", "density"])
    names, density = np.array(table["variant"]), table["density"].to_numpy()
    return {str(name): density[names == name] for name in np.unique(names)}


def _histogram(density: NDArray[np.float64], n_tokens: int) -> Any:
    """log10 of the latents' densities; those that never fired are at the left end, 1 / (2 tokens)."""
    import wandb

    least = 1 / (2 * max(1, n_tokens))
    edges = np.linspace(np.log10(least), 0, N_BINS + 1)
    return wandb.Histogram(np_histogram=np.histogram(np.log10(np.maximum(density, least)), edges))


def _log_table(folder: Path, out: Path, prefix: str, assessment: dict[str, Any], told: dict[str, Any]) -> None:
    """A run of the group for the assessment as a whole: the table of variants, and the page."""
    import wandb

    known = told["assessments"]
    if prefix not in known:
        known[prefix] = new_id()
        durable.write_json(folder / RECORD, told)
    name = "assessment" if prefix == "assess" else f"assessment {prefix}"
    config = {key: assessment[key] for key in ("data", "thresholds", "versions")}
    run = start(folder, told, name, known[prefix], "assess", config, quiet=True)
    run.summary["best_variant"] = assessment["best_variant"]
    page = wandb.Html(str(out / "report.html"), inject=False)
    run.log({f"{prefix}/variants": _table(assessment), f"{prefix}/report": page})
    if told["artifacts"]:
        log_artifact(run, f"{told['group']}-{name}", "assessment", [out / file for file in FILES])
    run.finish()


def _table(assessment: dict[str, Any]) -> Any:
    """A row per variant, best first, then what nobody trained."""
    import wandb

    entries = assessment["variants"] + assessment["controls"]
    first = assessment["variants"][0]["metrics"]
    metrics = [name for name, figure in first.items() if not isinstance(figure["value"], list)]
    shown = ("name", "site", "k", "num_latents", "tokens_trained", "verdict")
    rows = [
        [*(entry[key] for key in shown), *(entry["metrics"][name]["value"] for name in metrics)]
        for entry in entries
    ]
    return wandb.Table(columns=["variant", *shown[1:], *metrics], data=rows)
