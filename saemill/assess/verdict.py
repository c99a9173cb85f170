"""The verdict: what speaks for each variant, beside dictionaries that nobody trained; the variants in order.

Those that replace the same sites are put in order among themselves, each group with a best of its own: what
it costs to replace one site does not compare with what another costs, nor with what all of them do.

Four thresholds are checked as well. They decide nothing, since a random dictionary may pass them.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from saemill.assess.config import Thresholds
from saemill.assess.sums import NOT_FINITE, Figure

Check = dict[str, Any]
"""`name`, `value`, `threshold`, `passed`: true, false, or null with a `reason`.

Where the random baseline took the place of the threshold of max_decoder_cosine, `reason` says so. A check
of the verdict has `metric` too, and where it compares with a baseline `lo`, `hi` and `against`, its name."""

MOST_OF = {"random": 0.9, "pca": 1.0, "frozen": 1.0}
"""Most of a baseline's error that a trained SAE may leave, by kind."""
MOST_OF_DENSE = 0.5
"""Most of all firings that may be those of dense latents."""
TITLES = {"fvu": "FVU", "delta_ce": "ΔCE", "dead_fraction": "dead latents", "dense_share": "dense latents"}
BESIDE = {"random": "a random dictionary", "pca": "PCA", "frozen": "the same with a frozen decoder"}
PASSED, FAILED, UNKNOWN = "passed", "failed", "unknown"


def thresholds_checks(
    metrics: dict[str, Figure], thresholds: Thresholds, unseen: str | None = None
) -> list[Check]:
    """Check one variant against the four thresholds.

    No SAE is failed for decoder rows that are as similar as so many random directions are: in a narrow
    space that is more than the threshold. Nor is one failed for latents that look dead on too few tokens.

    Args:
        metrics: its figures.
        thresholds: what they are checked against.
        unseen: why latents that fire may look dead.
    """
    t = thresholds
    random = metrics["max_decoder_cosine_random"]["value"] or 0.0  # null where the other is
    results = {
        "loss_recovered": _check("loss_recovered", metrics["loss_recovered"], t.min_loss_recovered, None),
        "l0": _check("l0", metrics["l0"], t.min_l0, t.max_l0),
        "dead_fraction": _dead_check(metrics, t, unseen),
        "max_decoder_cosine": _check(
            "max_decoder_cosine", metrics["max_decoder_cosine"], None, max(t.max_decoder_cosine, random)
        ),
    }
    if random > t.max_decoder_cosine:
        limit = f"{t.max_decoder_cosine:g}"
        why = f"as many random directions show {random:.3f}, more than the threshold of {limit}"
        results["max_decoder_cosine"].setdefault("reason", why)
    return list(results.values())


def _dead_check(metrics: dict[str, Figure], thresholds: Thresholds, unseen: str | None) -> Check:
    """Check that few latents are dead; unknown where latents that fire may look so."""
    check = _check("dead_fraction", metrics["dead_fraction"], None, thresholds.max_dead_fraction)
    return check | {"passed": None, "reason": unseen} if unseen and check["passed"] is False else check


def _check(name: str, figure: Figure, low: float | None, high: float | None) -> Check:
    words = [f"at least {low:g}"] if low is not None else []
    words += [f"at most {high:g}"] if high is not None else []
    check: Check = {"name": name, "value": figure["value"], "threshold": " and ".join(words)}
    if figure["value"] is None:
        return check | {"passed": None, "reason": figure["reason"]}
    value = figure["value"]
    if not math.isfinite(value):
        return check | {"value": None, "passed": None, "reason": NOT_FINITE}
    return check | {"passed": (low is None or value >= low) and (high is None or value <= high)}


def error_check(metric: str, kind: str, against: str, figure: Figure) -> Check:
    """Check that an SAE's error is surely below that of a baseline: the end of the interval counts.

    Args:
        metric: `fvu` or `delta_ce`.
        kind: of the baseline, `random`, `pca` or `frozen`.
        against: its name.
        figure: the SAE's error as a share of the baseline's, over the same documents.
    """
    most = MOST_OF[kind]
    check: Check = {"name": f"{metric}_beside_{kind}", "metric": metric, "against": against}
    check |= {"threshold": f"below {most:g} of that of {BESIDE[kind]}"}
    check |= {key: figure.get(key) for key in ("value", "lo", "hi")}
    if check["hi"] is None:
        return check | {"passed": None, "reason": figure["reason"]}
    return check | {"passed": check["hi"] < most}


def latent_checks(metrics: dict[str, Figure], thresholds: Thresholds, unseen: str | None) -> list[Check]:
    """Check that few latents are dead, and that dense ones are not what fires most.

    Args:
        metrics: the variant's figures.
        thresholds: how many may be dead.
        unseen: why latents that fire may look dead.
    """
    dense = _check("dense_share", metrics["dense_share"], None, MOST_OF_DENSE)
    return [check | {"metric": check["name"]} for check in (_dead_check(metrics, thresholds, unseen), dense)]


def conclude(evidence: list[Check]) -> str:
    """Conclude from the checks: `passed`, `failed: FVU, dead latents`, or `unknown`.

    One that failed decides; without that, FVU beside the baselines must be known. Others that are not are
    named: `passed, ΔCE unknown`.
    """
    if failed := _titles(evidence, passed=False):
        return f"{FAILED}: {failed}"
    if not evidence or any(check["passed"] is None and check["metric"] == "fvu" for check in evidence):
        return UNKNOWN
    unknown = _titles(evidence, passed=None)
    return f"{PASSED}, {unknown} unknown" if unknown else PASSED


def _titles(evidence: list[Check], passed: bool | None) -> str:
    """List what the checks of an outcome are about."""
    metrics = {check["metric"] for check in evidence if check["passed"] is passed}
    return ", ".join(title for metric, title in TITLES.items() if metric in metrics)


def summary(results: list[Check]) -> str:
    """Summarise the thresholds as `2/3, 1 unknown`. A check whose figure is null is neither passed nor
    failed."""
    n_known = sum(check["passed"] is not None for check in results)
    if n_known == 0:
        return UNKNOWN
    text = f"{sum(check['passed'] is True for check in results)}/{n_known}"
    return text if n_known == len(results) else f"{text}, {len(results) - n_known} unknown"


def replaced(entry: Mapping[str, Any]) -> str:
    """Name the site, or the joined sites, whose activations an SAE takes the place of."""
    return str(entry.get("target_site") or entry["site"])


def groups(entries: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Group variants by the sites that they replace. Figures of two groups do not compare."""
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        found.setdefault(replaced(entry), []).append(entry)
    return found


def order(entries: list[dict[str, Any]], losses: Mapping[str, float]) -> list[dict[str, Any]]:
    """Sort variants best first: those that pass, those of which too little is known, those that fail; of
    these the smaller loss first. Those that replace the same sites stay together, the group whose best has
    the better verdict first.

    Args:
        entries: the variants.
        losses: name → loss; one that was not measured has none and comes last.
    """

    def place(entry: dict[str, Any]) -> int:
        return [PASSED, UNKNOWN, FAILED].index(entry["verdict"].partition(",")[0].partition(":")[0])

    def key(entry: dict[str, Any]) -> tuple[int, float]:
        loss = losses.get(entry["name"], math.inf)
        return place(entry), loss if math.isfinite(loss) else math.inf

    measured = groups(entry for entry in entries if entry["not_measured"] is None).values()
    each = sorted((sorted(group, key=key) for group in measured), key=lambda group: place(group[0]))
    in_order = [entry for group in each for entry in group]
    return in_order + [entry for entry in entries if entry["not_measured"] is not None]
