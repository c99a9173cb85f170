"""The assessment for people, in the terminal: tables, and what latents are."""

import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.console import JustifyMethod
from rich.table import Table

from saemill.assess.health import health_rows, least_c_dec_sentences
from saemill.assess.probes.tables import absorption_rows, examples_sentences, probe_rows
from saemill.assess.sums import Figure, number
from saemill.assess.verdict import BESIDE, TITLES, replaced
from saemill.common.log import console, counted
from saemill.common.stores.features import Context, Features, Passage, Snippet
from saemill.common.stores.site_names import abridged, is_joined

COLUMNS = {
    "fvu": "FVU",
    "fvu_skip": "of W_skip",
    "delta_ce": "ΔCE nats",
    "loss_recovered": "loss rec.",
    "l0": "L0",
    "dead_fraction": "dead",
    "cosine": "cosine",
    "max_decoder_cosine": "max_decoder_cosine",
    "max_decoder_cosine_random": "(random)",
}
ABSENT: Figure = {"value": None}
"""Figure that an SAE of another kind has not."""
CONTROLS = {
    "together": "transcoders of one layer each, all at once",
    "frozen": "SAEs whose decoder was frozen",
    "random": "random dictionaries",
    "pca": "PCA with k directions",
}
CUT_COLUMNS = {"fvu": "FVU", "l0": "L0"}
"""Metrics of SAEs within an SAE."""
SOURCE_COLUMNS = CUT_COLUMNS | {"delta_ce": "ΔCE nats"}
"""Metrics per source."""
AT_SITES = {"delta_ce": "ΔCE nats", "fvu_replaced": "FVU, all replaced"}
"""Those at each of several sites, beside these."""
MEAN_OVER_SITES = (
    "ΔCE of a crosscoder is the mean over its sites, each in turn replaced by its part of the reconstruction"
)
OF_OTHER_SITES = (
    "SAEs that replace different sites, or one site and several, are not compared: each site has a best of "
    "its own"
)
PASSAGE_LETTERS = 110
"""Characters shown of a passage."""


def interval(figure: Figure) -> str:
    """Format a figure's 95% interval; empty where it has none."""
    if figure.get("lo") is None or figure["lo"] == figure["hi"]:
        return ""
    digits = 1 if abs(figure["hi"]) >= 10 else 3
    return f"{figure['lo']:.{digits}f}–{figure['hi']:.{digits}f}"


def table(assessment: dict[str, Any]) -> str:
    """Render the variants as a text table, best first."""
    data, titles = assessment["data"], columns_of(assessment)
    shown = Table(title=f"{counted(data['n_tokens'], data['unit'])}: {data['chosen']}")
    shown.add_column("variant", overflow="fold")  # long names take a second line, not the figures' room
    several = are_several(assessment["variants"])
    if several:
        shown.add_column("architecture", no_wrap=True)
    for title in titles.values():
        shown.add_column(title, justify="right", no_wrap=True)
    shown.add_column("verdict", no_wrap=True)
    variants = assessment["variants"]
    sections = {i for i, (a, b) in enumerate(pairwise(variants)) if replaced(a) != replaced(b)}
    for i, entry in enumerate(variants + assessment["controls"]):
        values = [entry.get("architecture", "topk")] if several else []
        values += [number(entry["metrics"].get(name, ABSENT)) for name in titles]
        shown.add_row(entry["name"], *values, entry["verdict"])
        if i in sections or i == len(variants) - 1:
            shown.add_section()
    terminal = console(width=150, no_color=True, record=True, file=io.StringIO())
    terminal.print(shown)
    lines = [terminal.export_text().rstrip(), controls(assessment), *described_bests(assessment)]
    of_parts = [
        *_text_table("SAEs within an SAE", cuts(assessment["variants"] + assessment["controls"])),
        *_text_table("Figures per source", by_source(assessment["variants"])),
        *_text_table("Dictionary health", health_rows(assessment["variants"] + assessment["controls"])),
        *least_c_dec_sentences(assessment["least_c_dec"]),
        *_text_table("Mean AUC of probes on k latents", probe_rows(assessment)),
        *_text_table("Absorption, mean over concepts", absorption_rows(assessment)),
        *examples_sentences(assessment),
    ]
    return "\n".join([*lines, *of_parts, thresholds(assessment), *notes(assessment)])


def controls(assessment: Mapping[str, Any]) -> str:
    """Say what stands below the line."""
    there = {entry.get("control") for entry in assessment["controls"]}
    return (
        f"below the line, controls: {', '.join(words for kind, words in CONTROLS.items() if kind in there)}"
    )


def thresholds(assessment: Mapping[str, Any]) -> str:
    """Say in a line how many of the four thresholds the best variant and its baselines reach."""
    best, limits = assessment["variants"][0], assessment["thresholds"]
    against = dict.fromkeys(check["against"] for check in best["evidence"] if check["against"])
    passed = {entry["name"]: entry["checks_passed"] for entry in [best, *assessment["controls"]]}
    reached = ", ".join(f"{name} {passed[name]}" for name in (best["name"], *against))
    return (
        f"thresholds, which decide nothing (loss recovered at least {limits['min_loss_recovered']:g}, L0 "
        f"{limits['min_l0']:g} to {limits['max_l0']:g}, dead at most {limits['max_dead_fraction']:g}, "
        f"max_decoder_cosine at most {limits['max_decoder_cosine']:g}): {reached}"
    )


def cuts(entries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """List the SAEs within some variants, below the titles of the columns: at each prefix and each k, a
    crosscoder at each of its sites, and whole. Empty where there are none."""
    with_cuts = [entry for entry in entries if entry.get("cuts")]
    known = _known(cut["metrics"] for entry in with_cuts for cut in entry["cuts"])
    shown = CUT_COLUMNS | {name: title for name, title in AT_SITES.items() if name in known}
    rows = [
        [entry["name"], cut["name"], *(_with_interval(cut["metrics"].get(name)) for name in shown)]
        for entry in with_cuts
        for cut in [*entry["cuts"], {"name": "whole", "metrics": entry["metrics"]}]
    ]
    return [["variant", "of it", *shown.values()], *rows] if rows else []


def _with_interval(figure: Figure | None) -> str:
    """Format a figure with its interval, where it has one; an en dash where there is none."""
    if figure is None:
        return "–"
    return number(figure) + (f" ({interval(figure)})" if interval(figure) else "")


def by_source(entries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """List the variants' figures on each source, below the titles of the columns, without rows and columns of
    which nothing is known (`unknown_by_source` says why); empty where there is one source."""
    known = _known(metrics for _, _, metrics in _each_source(entries))
    shown = {name: title for name, title in SOURCE_COLUMNS.items() if name in known}
    rows = [
        [name, source, *(_with_interval(metrics.get(what)) for what in shown)]
        for name, source, metrics in _each_source(entries)
        if _known([metrics])
    ]
    return [["variant", "source", *shown.values()], *rows] if rows else []


def unknown_by_source(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say which figures are not known on which sources, though they are on all together."""
    by_reason: dict[tuple[str, str], dict[str, None]] = {}
    for entry in entries:
        for source, metrics in (entry.get("by_source") or {}).items():
            for what, title in SOURCE_COLUMNS.items():
                if metrics[what]["value"] is None and entry["metrics"][what]["value"] is not None:
                    by_reason.setdefault((source, metrics[what]["reason"]), {})[title] = None
    return [f"no {', '.join(titles)} on {source}: {why}" for (source, why), titles in by_reason.items()]


def _each_source(entries: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, Mapping[str, Figure]]]:
    """List variant, source and figures."""
    return [
        (entry["name"], source, metrics)
        for entry in entries
        for source, metrics in (entry.get("by_source") or {}).items()
    ]


def _known(figures: Iterable[Mapping[str, Figure]]) -> set[str]:
    """Name the metrics of which a value is known."""
    return {name for each in figures for name, figure in each.items() if figure["value"] is not None}


def _text_table(title: str, titles_and_rows: list[list[str]]) -> list[str]:
    """Render rows below the titles of their columns as a text table; nothing where there are none."""
    titles, *rows = titles_and_rows or [[]]
    if not rows:
        return []
    shown = Table(title=title)
    for i, title in enumerate(titles):
        is_name = i == 0
        justify: JustifyMethod = "left" if i < 2 else "right"
        shown.add_column(
            title, no_wrap=not is_name, overflow="fold" if is_name else "ellipsis", justify=justify
        )
    for row in rows:
        shown.add_row(*row)
    terminal = console(width=150, no_color=True, record=True, file=io.StringIO())
    terminal.print(shown)
    return [terminal.export_text().rstrip()]


def are_several(entries: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether tables need a column with what each SAE was trained as: where one is not TopK."""
    return any(entry.get("architecture", "topk") != "topk" for entry in entries)


def are_crosscoders(entries: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether some reconstruct several sites, which are replaced one at a time."""
    return any(is_joined(entry["site"]) and not entry.get("target_site") for entry in entries)


def columns_of(assessment: dict[str, Any]) -> dict[str, str]:
    """Choose the columns of the tables: embeddings have no losses, and few SAEs a skip connection."""
    absent = ["delta_ce", "loss_recovered"] if assessment["data"]["unit"] == "passage" else []
    absent += [] if any("fvu_skip" in entry["metrics"] for entry in assessment["variants"]) else ["fvu_skip"]
    return {name: title for name, title in COLUMNS.items() if name not in absent}


def bests(assessment: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """List the best variant and, where others replace other sites, the best of each of these."""
    first = {
        "site": replaced(assessment["variants"][0]),
        "variant": assessment["best_variant"],
        "on_other_documents": assessment["best_on_other_documents"],
    }
    return [first, *assessment.get("best_at_other_sites", ())]


def described_bests(assessment: Mapping[str, Any]) -> list[str]:
    """Describe the best variant in a line; where others replace other sites, that of each in one."""
    each = bests(assessment)
    if len(each) == 1:
        return [f"best: {each[0]['variant']}, {described(each[0], assessment)}"]
    lines = [f"best at {abridged(b['site'])}: {b['variant']}, {described(b, assessment)}" for b in each]
    return [*lines, OF_OTHER_SITES]


def described(best: Mapping[str, Any], assessment: Mapping[str, Any]) -> str:
    """Describe one of the `bests` by its figures on the documents that it was not chosen on."""
    other, noun = best["on_other_documents"], assessment["data"]["document"]
    figures = [
        f"{COLUMNS[name]} {_with_interval(figure)}"
        for name, figure in other["metrics"].items()
        if name in ("fvu", "delta_ce") and figure["value"] is not None
    ]
    if other["overlap"]:
        return f"chosen and reported on the same {noun}s, which are too few to halve"
    return (
        f"chosen on {counted(other['n_documents_chosen_on'], noun)}; "
        f"on {counted(other['n_documents'], 'other')} {', '.join(figures)}"
    )


def notes(assessment: dict[str, Any]) -> list[str]:
    """List what the tables do not show: figures that are null or without interval, checks judged
    otherwise."""
    variants = assessment["variants"]
    lines = list(assessment["data"]["notes"])
    lines += [f"{entry['name']}: {entry['not_measured']}" for entry in variants if entry["not_measured"]]
    measured = [entry for entry in variants if not entry["not_measured"]]
    checks = [check for entry in measured for check in entry["checks"]]
    evidence = [check for entry in measured for check in entry["evidence"]]
    lines += _unknown([check for check in (*evidence, *checks) if check["passed"] is None])
    if any(check["passed"] is not None and check.get("reason") for check in checks):
        lines.append(
            f"max_decoder_cosine: where as many random directions show more than "
            f"{assessment['thresholds']['max_decoder_cosine']:g}, it is judged against (random)"
        )
    unknown = {check["name"] for check in (*evidence, *checks) if check["passed"] is None}
    titles: dict[tuple[str, str], dict[str, None]] = {}
    for entry in measured:
        for name, title in columns_of(assessment).items():
            figure = entry["metrics"].get(name, ABSENT)
            if figure.get("reason") and not (figure["value"] is None and name in unknown):
                lacking = "no" if figure["value"] is None else "no interval for"
                titles.setdefault((lacking, figure["reason"]), {})[title] = None
    lines += unknown_by_source(measured)
    if are_crosscoders(measured) and assessment["data"]["n_tokens_with_losses"]:
        lines.append(MEAN_OVER_SITES)
    return lines + [f"{lacking} {', '.join(which)}: {why}" for (lacking, why), which in titles.items()]


def _unknown(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say which checks are unknown, those for one reason in one line."""
    by_reason: dict[str, dict[str, dict[str, None]]] = {}
    for check in checks:
        what, _, kind = check["name"].partition("_beside_")
        beside = by_reason.setdefault(check["reason"], {}).setdefault(TITLES.get(what, what), {})
        beside |= {BESIDE[kind]: None} if kind else {}
    lines = []
    for why, each in by_reason.items():
        words = [f"{what} beside {', '.join(kinds)}" if kinds else what for what, kinds in each.items()]
        lines.append(f"unknown: {'; '.join(words)}: {why}")
    return lines


def contexts_text(features: Features, n_latents: int, n_contexts: int) -> str:
    """Render some latents with the snippets where they fire most; empty where none is shown."""
    if not features.latents:
        return ""
    lines = [f"where latents of {features.variant} fire most ({features.searched}):"]
    for latent in features.latents[:n_latents]:
        lines.append(f"\n  latent {latent.latent}, active on {latent.density:.2%} of {features.unit}s")
        lines += [context_line(context) for context in latent.contexts[:n_contexts]]
    return "\n".join(lines)


def context_line(context: Context) -> str:
    """Render a context in one line: a token between its neighbours, or the start of a passage."""
    return f"    {context.activation:7.2f}  {_snippet(context.place)}"


def _snippet(place: Snippet | Passage) -> str:
    if isinstance(place, Passage):
        shown = " ".join((place.text or "").split())
        return f"[{name_of(place)}] {shown[:PASSAGE_LETTERS]}{'…' if len(shown) > PASSAGE_LETTERS else ''}"
    parts = place.tokens[: place.at], place.tokens[place.at : place.at + 1], place.tokens[place.at + 1 :]
    before, token, after = (" ".join("".join(part).split("\n")) for part in parts)
    return f"…{before[-48:]}«{token}»{after[:40]}…"


def name_of(passage: Passage) -> str:
    """Return a passage's id, or its number in the source."""
    return f"passage {passage.address}" if passage.id is None else str(passage.id)
