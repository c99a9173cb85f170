"""What was compared and how far to trust it, in plain words."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from saemill.assess.sums import number
from saemill.assess.table import OF_OTHER_SITES, bests, described, interval
from saemill.assess.verdict import FAILED, PASSED, UNKNOWN, groups
from saemill.common.log import counted
from saemill.common.stores.site_names import abridged

Assessment = dict[str, Any]
MOST_SITES = 3
"""Most sites whose best SAEs a headline names."""
METRICS = {"delta_ce": "ΔCE", "fvu": "FVU"}


def outcome(entry: Mapping[str, Any]) -> str:
    """Return a verdict's first word: passed, failed or unknown; of one that was not measured that."""
    word = str(entry["verdict"]).partition(",")[0].partition(":")[0]
    return word if word in (PASSED, FAILED, UNKNOWN) else "not measured"


def headline(assessment: Assessment) -> str:
    """Say which SAE to take, or that none can be recommended; where they replace several sites, at each."""
    each = groups(assessment["variants"])
    if len(each) == 1:
        return _choice(assessment["variants"])
    if len(each) > MOST_SITES:
        return f"The best SAE at each of {len(each)} sites"
    return "; ".join(f"{abridged(site)}: {_choice(group)}" for site, group in each.items())


def _choice(variants: Sequence[Mapping[str, Any]]) -> str:
    """Say which of some variants to take, the best first."""
    entry, n = variants[0], len(variants)
    name = entry["name"]
    if outcome(entry) == PASSED:
        return f"Take {name}" if n > 1 else f"{name} passes"
    if outcome(entry) == FAILED:
        return "No SAE passes" if n > 1 else f"{name} fails"
    return f"No verdict: {name} looks best, but too little is known" if n > 1 else f"No verdict on {name}"


def reasons(assessment: Assessment) -> list[str]:
    """Say why: figures, how many pass, and which cannot be told from the best; where variants replace several
    sites, of each."""
    each, by_site = bests(assessment), groups(assessment["variants"])
    if len(each) == 1:
        return _reasons(assessment, each[0], assessment["variants"])
    lines = [
        " ".join(
            [
                f"{abridged(best['site'])}: {best['variant']}.",
                *_reasons(assessment, best, by_site[best["site"]]),
            ]
        )
        for best in each
    ]
    return [f"{OF_OTHER_SITES}.", *lines]


def _reasons(
    assessment: Assessment, best: Mapping[str, Any], variants: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Say why one is the best of some variants."""
    choice = described(best, assessment)
    sentences = [f"{choice[0].upper()}{choice[1:]}."]
    metric = best["on_other_documents"]["chosen_by"]
    if len(variants) > 1:
        outcomes = Counter(map(outcome, variants))
        words = [f"{n} {word}" for word, n in outcomes.items()]
        sentences.append(
            f"Of {counted(len(variants), 'SAE')}: {', '.join(words)}. {_why_failed(variants)}".strip()
        )
        sentences += _alike(variants, metric, assessment["data"]["document"])
        sentences += _by_sparsity(variants, metric)
    return sentences


def _why_failed(variants: Sequence[Mapping[str, Any]]) -> str:
    """Count what SAEs failed by."""
    failed = Counter(
        what
        for entry in variants
        if outcome(entry) == FAILED
        for what in entry["verdict"].partition(": ")[2].split(", ")
    )
    if not failed:
        return ""
    return "Failed by " + ", ".join(f"{what} ({n})" for what, n in failed.most_common()) + "."


def _alike(variants: Sequence[Mapping[str, Any]], metric: str, document: str) -> list[str]:
    """Say which variants are so near the best that their order may be chance."""
    versus = [
        (entry["name"], entry["versus_best"][metric])
        for entry in variants
        if entry.get("versus_best") and metric in entry["versus_best"]
    ]
    known = [(name, figure) for name, figure in versus if figure.get("lo") is not None]
    near = [name for name, figure in known if not figure["distinguishable"]]
    title = METRICS[metric]
    if near:
        return [
            f"By {title}, its difference from {', '.join(near)} is within the interval: these may be as good."
        ]
    if known:
        return [f"Every other SAE's {title} is surely another than its, over the same {document}s."]
    return (
        [f"Whether others are as good is not known: there are too few {document}s for intervals."]
        if versus
        else []
    )


def _by_sparsity(variants: Sequence[Mapping[str, Any]], metric: str) -> list[str]:
    """Name the first SAE of each octave of L0, where there are several: the fewer latents are active, the
    more an SAE leaves, so that the best of all is mostly one of the densest."""
    first: dict[int, str] = {}
    for entry in variants:
        l0, figure = entry["metrics"]["l0"]["value"], entry["metrics"][metric]
        if l0 and figure["value"] is not None and outcome(entry) != FAILED:
            words = f"{entry['name']} at L0 {l0:.0f} ({METRICS[metric]} {number(figure)})"
            first.setdefault(round(math.log2(l0)), words)
    if len(first) < 2:
        return []
    return [f"By sparsity, the first that did not fail: {', '.join(first[i] for i in sorted(first))}."]


def trust(assessment: Assessment) -> list[str]:
    """Say what the figures rest on, and what they do not show."""
    data = assessment["data"]
    tokens = counted(data["n_tokens"], data["unit"])
    measured = (
        f"Measured on {tokens} from {counted(data['n_documents'], data['document'])}: {data['chosen']}."
    )
    if data["n_tokens_with_losses"]:
        measured += f" Losses are over {data['n_tokens_with_losses']:,} of them."
    seen = data["n_documents_left_out_as_seen"]
    sentences = [measured]
    if seen:
        sentences.append(f"{counted(seen, data['document'])} that training saw were left out.")
    sentences.append(
        f"Intervals (95%) resample {data['document']}s: they show how the text varies, not how training does."
    )
    return [*sentences, _seeds(assessment["variants"])]


def _seeds(variants: Sequence[Mapping[str, Any]]) -> str:
    """Say how much the seed changes, where there are several."""
    by_name = {entry["name"]: entry for entry in variants}
    groups = {
        tuple(sorted([entry["name"], *entry.get("twins", ())])) for entry in variants if entry.get("twins")
    }
    if not groups:
        return "How training varies is unknown: there is one seed of each SAE."
    spreads = []
    for metric, title in METRICS.items():
        values = [[by_name[name]["metrics"][metric]["value"] for name in group] for group in groups]
        known = [[v for v in some if v is not None] for some in values]
        widest = max((max(some) - min(some) for some in known if len(some) > 1), default=None)
        if widest is not None:
            spreads.append(f"at most {widest:.2g} in {title}")
    seeds = max(map(len, groups))
    return f"Of {seeds} seeds each: SAEs that differ in the seed alone differ by {' and '.join(spreads)}."


def with_interval(figure: Mapping[str, Any]) -> str:
    """Format a figure with its interval, where it has one."""
    return number(dict(figure)) + (f" ({interval(dict(figure))})" if interval(dict(figure)) else "")
