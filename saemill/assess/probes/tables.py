"""What probes found, as rows of text: for the terminal and the page."""

from collections.abc import Mapping, Sequence
from typing import Any

from saemill.assess.sums import Figure, number

Assessment = Mapping[str, Any]
Entry = Mapping[str, Any]
ABSORPTION = {
    "absorption_words": "absorbed",
    "absorption_words_full": "in full",
    "absorption_words_recall": "recall",
    "absorption_words_error": "in the error",
    "absorption_words_shuffled": "absorbed, shuffled",
    "absorption_first_letter": "first letters",
}


def cell(figure: Figure | None) -> str:
    """Format a figure with its interval, where it has one; an en dash where there is none."""
    if figure is None or figure["value"] is None:
        return "–"
    ends = f" ({figure['lo']:.3f}–{figure['hi']:.3f})" if figure.get("lo") is not None else ""
    return number(figure) + ends


def probe_rows(assessment: Assessment) -> list[list[str]]:
    """List mean AUCs of all dictionaries by the number of latents, below the titles of the columns, and in
    the last rows what the activations themselves tell; empty where labels were not probed for."""
    entries = [entry for entry in _all(assessment) if entry.get("probes")]
    if not entries:
        return []
    ks = assessment["probes"]["ks"]
    titles = [
        "dictionary",
        *(f"k = {k}" for k in ks),
        f"above random, k = {ks[-1]}",
        f"shuffled, k = {ks[-1]}",
    ]
    rows = [
        [
            entry["name"],
            *(number(entry["metrics"][f"probe_auc_k{k}"]) for k in ks[:-1]),
            cell(entry["metrics"][f"probe_auc_k{ks[-1]}"]),
            cell(entry["metrics"].get(f"probe_auc_k{ks[-1]}_above_random")),
            number(entry["metrics"]["probe_auc_shuffled"]),
        ]
        for entry in entries
    ]
    probed = {probe["label"] for entry in entries for probe in entry["probes"]}
    by_site: dict[str, list[Mapping[str, Any]]] = {}
    for label in assessment["probes"]["labels"]:
        if label["name"] in probed:
            for site, found in label["activations"].items():
                by_site.setdefault(site, []).append(found)
    for site, found in by_site.items():
        means = (sum(each[name]["value"] for each in found) / len(found) for name in ("auc", "auc_shuffled"))
        whole, shuffled = (number({"value": value}) for value in means)
        rows.append([f"all of {site}, no k", *["–"] * (len(ks) - 1), whole, "–", shuffled])
    return [titles, *rows]


def label_rows(assessment: Assessment, entry: Entry) -> list[list[str]]:
    """List the AUCs of one dictionary label by label, below the titles of the columns; empty where it has
    none."""
    by_label: dict[str, dict[int, Mapping[str, Any]]] = {}
    for probe in entry.get("probes", ()):
        by_label.setdefault(probe["label"], {})[probe["k"]] = probe
    if not by_label:
        return []
    ks = assessment["probes"]["ks"]
    whole = {
        label["name"]: label["activations"].get(entry["site"]) for label in assessment["probes"]["labels"]
    }
    titles = ["label", *(f"k = {k}" for k in ks), "activations", "best latents"]
    rows = [
        [
            label,
            *(cell(probes[k]["auc"]) for k in ks),
            cell(whole[label]["auc"]) if whole[label] else "–",
            ", ".join(map(str, probes[ks[-1]]["latents"][:3])),
        ]
        for label, probes in by_label.items()
    ]
    return [titles, *rows]


def absorption_rows(assessment: Assessment) -> list[list[str]]:
    """List the mean absorption of all dictionaries, below the titles of the columns; empty where it was not
    measured."""
    entries = [entry for entry in _all(assessment) if "absorption_words" in entry["metrics"]]
    rows = [[entry["name"], *(cell(entry["metrics"][name]) for name in ABSORPTION)] for entry in entries]
    return [["dictionary", *ABSORPTION.values()], *rows] if rows else []


def concept_rows(entry: Entry) -> list[list[str]]:
    """List the concepts whose absorption was measured, below the titles of the columns; empty where there are
    none."""
    titles = ["concept", "absorbed", "in full", "recall", "in the error", "shuffled", "words", "main latents"]
    rows = [
        [
            concept["concept"],
            *(cell(concept[name]) for name in ("fraction", "full", "recall")),
            f"{concept['error_share']:.1%}",
            cell(concept["fraction_shuffled"]),
            f"{concept['n_words']:,}",
            ", ".join(map(str, concept["main"])),
        ]
        for concept in entry.get("absorbed", ())
        if not concept.get("missing")
    ]
    return [titles, *rows] if rows else []


def probe_notes(assessment: Assessment) -> list[str]:
    """List labels that could not be probed for, and concepts that the model does not hold."""
    probes = assessment.get("probes")
    if not probes:
        return []
    lines = [
        f"not probed for: {label['name']}: {label['missing']}"
        for label in probes["labels"]
        if label["missing"]
    ]
    for label in probes["labels"]:
        for site, found in label["activations"].items():
            if found["not_held"]:
                lines.append(f"no absorption of “{label['name']}” at {site}: {found['not_held']}")
    return lines


def examples_sentences(assessment: Assessment) -> list[str]:
    """Say what probes were fitted to and tried on, and why there is no mean over first letters."""
    return [
        f"{_whose(each)} by {each['split_by']}: {each['n_groups']:,} of them; examples: "
        f"{each['n_fitted']:,} to fit, {each['n_chosen_by']:,} to choose by, {each['n_tried']:,} to try"
        for each in (assessment.get("probes") or {"examples": ()})["examples"]
    ] + sorted({f"no mean over first letters: {reason}" for reason in _no_letters(assessment)})


def _whose(examples: Mapping[str, Any]) -> str:
    column = examples["column"]
    return "Split" if column is None else f"Words that {column} labels, split"


def _no_letters(assessment: Assessment) -> list[str]:
    """List why dictionaries have no mean absorption over first letters."""
    figures = [entry["metrics"].get("absorption_first_letter") for entry in _all(assessment)]
    return [figure["reason"] for figure in figures if figure and figure["value"] is None]


def _all(assessment: Assessment) -> Sequence[Entry]:
    return [*assessment["variants"], *assessment["controls"]]
