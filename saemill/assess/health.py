"""The dictionary's health: tables of how its rows lie to one another, and the L0 that they speak for."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from saemill.assess.sums import Figure, number

TITLES = {
    "c_dec": "c_dec",
    "c_dec_random": "(random)",
    "duplicate_fraction": "duplicates",
    "antipodal_fraction": "antipodal",
}
KINDS = ("antipodal", "position", "length", "component", "other")
MOST_DENSE = 40
"""Dense latents that a table shows of an SAE."""
SPARSITY = ("name", "k", "target_l0", "l0_coefficient", "l1_coefficient")
"""Settings in which SAEs differ that differ in their sparsity alone."""
LEAST_SPARSITIES = 3
"""Fewest different L0 among which one may be the least."""
NONE: Figure = {"value": None}
Entry = Mapping[str, Any]


def health_rows(entries: Sequence[Entry]) -> list[list[str]]:
    """List how the decoder rows of some SAEs lie, and what their dense latents follow, below the titles of
    the columns; empty where no SAE has such figures."""
    titles = ["SAE", *TITLES.values(), "dense", *(f"by {kind}" for kind in KINDS[1:-1]), "in pairs", "other"]
    rows = []
    for entry in entries:
        if entry["not_measured"] or "c_dec" not in entry["metrics"]:
            continue
        kinds = Counter(latent["kind"] for latent in entry.get("dense", ()))
        counts = [kinds[kind] for kind in (*KINDS[1:-1], KINDS[0], KINDS[-1])]
        figures = [_figure(name, entry["metrics"].get(name, NONE)) for name in TITLES]
        rows.append([entry["name"], *figures, str(kinds.total()), *map(str, counts)])
    return [titles, *rows] if rows else []


def _figure(name: str, figure: Figure) -> str:
    """Format a figure: of fractions the percentage."""
    if figure["value"] is None or not name.endswith("fraction"):
        return number(figure)
    return f"{figure['value']:.1%}"


def dense_rows(entry: Entry) -> list[list[str]]:
    """List the dense latents of an SAE that fire most often, `MOST_DENSE` at most, below the titles of the
    columns; empty where there are none."""
    titles = ["latent", "fires on", "follows", "antipode (decoder, encoder cosine)"]
    titles += ["r with position", "r with length", "cosine with component 1"]
    rows = [
        [
            str(latent["latent"]),
            f"{latent['density']:.1%}",
            latent["kind"],
            f"{latent['antipode']} ({latent['decoder_cosine']:.2f}, {latent['encoder_cosine']:.2f})",
            *(
                "–" if latent[name] is None else f"{latent[name]:.2f}"
                for name in ("with_position", "with_length", "with_component")
            ),
        ]
        for latent in entry.get("dense", ())[:MOST_DENSE]
    ]
    return [titles, *rows] if rows else []


def least_c_dec(
    entries: Sequence[Entry], settings: Mapping[str, Mapping[str, object]]
) -> list[dict[str, Any]]:
    """Find the L0 with the smallest c_dec among SAEs that differ in their sparsity alone.

    Args:
        entries: of the SAEs, the better first.
        settings: by which each was trained, by name.

    Returns: one finding for each such group of three or more: its `variants` in order of L0, the `least` of
    them, and whether that is the sparsest or the densest (`at_end`), beyond which a smaller one may lie.
    """
    groups: dict[str, dict[int, Entry]] = defaultdict(dict)
    for entry in entries:
        metrics = entry["metrics"]
        known = settings[entry["name"]] and not entry["not_measured"]
        if known and metrics["c_dec"]["value"] is not None and metrics["l0"]["value"]:
            others = {key: value for key, value in settings[entry["name"]].items() if key not in SPARSITY}
            groups[json.dumps(others, sort_keys=True)].setdefault(round(metrics["l0"]["value"]), entry)
    found = []
    for by_l0 in groups.values():
        sorted_entries = [by_l0[l0] for l0 in sorted(by_l0)]
        if len(sorted_entries) < LEAST_SPARSITIES:
            continue
        least = min(sorted_entries, key=lambda entry: entry["metrics"]["c_dec"]["value"])
        found.append(
            {
                "variants": [entry["name"] for entry in sorted_entries],
                "least": least["name"],
                "l0": least["metrics"]["l0"]["value"],
                "c_dec": least["metrics"]["c_dec"]["value"],
                "at_end": least is sorted_entries[0] or least is sorted_entries[-1],
            }
        )
    return found


def least_c_dec_sentences(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say at which L0 c_dec is least, and that it may be less beyond the ends of the sweep."""
    return [
        f"c_dec is least at L0 {each['l0']:.0f} ({each['least']}, {each['c_dec']:.4f}) of "
        f"{len(each['variants'])} SAEs that differ in sparsity alone"
        + (
            ": an end of what was trained, so that the L0 that fits may lie beyond it"
            if each["at_end"]
            else ", which speaks for an L0 near it"
        )
        for each in found
    ]
