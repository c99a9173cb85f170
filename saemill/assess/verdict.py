"""The health verdict: each variant against thresholds, the variants in order, the best one named."""

import math
from collections.abc import Mapping
from typing import Any

from saemill.assess.config import Thresholds
from saemill.assess.sums import NOT_FINITE, Figure

Check = dict[str, Any]
"""`name`, `value`, `threshold`, `passed`: true, false, or null with a `reason`.

Where the random baseline took the place of the threshold of absorption, `reason` says so."""


def checks(metrics: dict[str, Figure], thresholds: Thresholds, unseen: str | None = None) -> list[Check]:
    """Run the four health checks of one variant.

    No SAE is failed for an absorption that as many random directions show as well: in a narrow space
    that is more than the threshold. Nor is one failed for latents that look dead on too few tokens.

    Args:
        metrics: its figures.
        thresholds: what they are checked against.
        unseen: why latents that fire may look dead.
    """
    t = thresholds
    random = metrics["absorption_random"]["value"] or 0.0  # null where absorption is
    limits: dict[str, tuple[float | None, float | None]] = {
        "loss_recovered": (t.min_loss_recovered, None),
        "l0": (t.min_l0, t.max_l0),
        "dead_fraction": (None, t.max_dead_fraction),
        "absorption": (None, max(t.max_absorption, random)),
    }
    results = {name: _check(name, metrics[name], *limit) for name, limit in limits.items()}
    if random > t.max_absorption:
        why = f"as many random directions show {random:.3f}, more than the threshold of {t.max_absorption:g}"
        results["absorption"].setdefault("reason", why)
    if unseen and results["dead_fraction"]["passed"] is False:
        results["dead_fraction"] |= {"passed": None, "reason": unseen}
    return list(results.values())


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


def summary(results: list[Check]) -> str:
    """Summarise as `passed 2/3, 1 unknown`. A check whose figure is null is neither passed nor failed."""
    n_known = sum(check["passed"] is not None for check in results)
    if n_known == 0:
        return "unknown"
    text = f"passed {sum(check['passed'] is True for check in results)}/{n_known}"
    return text if n_known == len(results) else f"{text}, {len(results) - n_known} unknown"


def order(entries: list[dict[str, Any]], losses: Mapping[str, float]) -> list[dict[str, Any]]:
    """Sort variants best first: more checks passed, then the smaller loss.

    Args:
        entries: the variants.
        losses: name → loss; one that was not measured has none and comes last.
    """

    def key(entry: dict[str, Any]) -> tuple[bool, int, float]:
        loss = losses.get(entry["name"], math.inf)
        n_passed = sum(check["passed"] is True for check in entry["checks"])
        return entry["not_measured"] is not None, -n_passed, loss if math.isfinite(loss) else math.inf

    return sorted(entries, key=key)
