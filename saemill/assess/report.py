"""The assessment for people: a table for the terminal, and one self-contained HTML page."""

import html
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from saemill.assess.sums import Figure
from saemill.common import durable

COLUMNS = {
    "fvu": "FVU",
    "delta_ce": "ΔCE nats",
    "loss_recovered": "loss rec.",
    "l0": "L0",
    "dead_fraction": "dead",
    "cosine": "cosine",
    "absorption": "absorption",
}


def number(figure: Figure, digits: int = 3) -> str:
    """A figure's value, or an en dash."""
    value = figure["value"]
    if value is None:
        return "–"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.{digits}f}"


def interval(figure: Figure) -> str:
    """A figure's 95% interval, or nothing."""
    if figure.get("lo") is None or figure["lo"] == figure["hi"]:
        return ""
    digits = 1 if abs(figure["hi"]) >= 10 else 3
    return f"{figure['lo']:.{digits}f}–{figure['hi']:.{digits}f}"


def table(assessment: dict[str, Any]) -> str:
    """The variants as a text table, best first."""
    shown = Table(title=f"{assessment['data']['n_tokens']:,} tokens: {assessment['data']['chosen']}")
    shown.add_column("variant", no_wrap=True)
    for title in COLUMNS.values():
        shown.add_column(title, justify="right", no_wrap=True)
    shown.add_column("verdict", no_wrap=True)
    for entry in assessment["variants"]:
        values = [number(entry["metrics"][name]) for name in COLUMNS]
        note = " (diverged)" if entry["diverged_at_step"] is not None else ""
        shown.add_row(entry["name"], *values, entry["verdict"] + note)
    console = Console(width=150, no_color=True, record=True, file=io.StringIO())
    console.print(shown)
    lines = [console.export_text().rstrip(), f"best: {assessment['best_variant']}"]
    lines += [f"not run: {reason}" for reason in _reasons(assessment)]
    return "\n".join(lines)


def _reasons(assessment: dict[str, Any]) -> list[str]:
    found = {
        f"{check['name']}: {check['reason']}"
        for entry in assessment["variants"]
        for check in entry["checks"]
        if check["passed"] is None
    }
    return sorted(found)


def contexts_text(features: dict[str, Any], n_latents: int, n_contexts: int) -> str:
    """Some latents with the snippets where they fire most."""
    lines = [f"where latents of {features['variant']} fire most ({features['searched']}):"]
    for latent in features["latents"][:n_latents]:
        lines.append(f"\n  latent {latent['latent']}, active on {latent['density']:.2%} of tokens")
        for context in latent["contexts"][:n_contexts]:
            before, token, after = (
                " ".join(context[part].split("\n")) for part in ("before", "token", "after")
            )
            lines.append(f"    {context['activation']:7.2f}  …{before[-48:]}«{token}»{after[:40]}…")
    return "\n".join(lines)


def write_html(path: Path, assessment: dict[str, Any], densities: Mapping[str, NDArray[np.float64]]) -> None:
    """One HTML page with no scripts and nothing to fetch: tables, charts, contexts."""
    sections = [
        _summary(assessment),
        _variants_table(assessment),
        _pareto(assessment, "fvu", "FVU"),
        _pareto(assessment, "delta_ce", "ΔCE, nats per token"),
        _densities(assessment, densities),
        _contexts(assessment["features"]),
    ]
    page = PAGE.replace("{{body}}", "\n".join(sections))
    durable.write_bytes(path, [page.encode()])


def _summary(assessment: dict[str, Any]) -> str:
    data = assessment["data"]
    losses = f"; losses on {data['n_tokens_with_losses']:,} of them" if data["n_tokens_with_losses"] else ""
    reasons = "".join(f"<li>Not run: {html.escape(reason)}</li>" for reason in _reasons(assessment))
    return f"""<h1>saemill assessment</h1>
<p>Best variant: <b>{html.escape(assessment["best_variant"])}</b>. {data["n_tokens"]:,} tokens from
{data["n_documents"]:,} documents{losses}: {html.escape(data["chosen"])}.</p>
<ul class="notes"><li>Intervals (95%) resample documents, so they show how the text varies, not how training
does: with one seed the variance between seeds is unknown.</li>
<li>FVU = Σ‖x−x̂‖² / Σ‖x−x̄‖² over all evaluation tokens. ΔCE is what splicing the SAE costs the model.
Loss recovered compares with zero-ablation, a weak baseline; read ΔCE first.</li>
<li>Absorption is the mean, over live latents, of the largest cosine to another live decoder row; “random” is
what as many random directions score.</li>{reasons}</ul>"""


def _variants_table(assessment: dict[str, Any]) -> str:
    head = "".join(
        f"<th>{title}</th>" for title in ("variant", "k", "latents", *COLUMNS.values(), "(random)", "verdict")
    )
    rows = []
    for entry in assessment["variants"]:
        metrics = entry["metrics"]
        cells = [
            f"<td class='name'>{html.escape(entry['name'])}</td>",
            f"<td>{entry['k']}</td><td>{entry['num_latents']:,}</td>",
        ]
        failed = {check["name"] for check in entry["checks"] if check["passed"] is False}
        for name in COLUMNS:
            style = ' class="bad"' if name in failed else ""
            cells.append(f"<td{style}>{number(metrics[name])}<small>{interval(metrics[name])}</small></td>")
        cells.append(f"<td>{number(metrics['absorption_random'])}</td><td>{entry['verdict']}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<h2>Variants</h2><table><tr>{head}</tr>{''.join(rows)}</table>"


PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
WIDTH, HEIGHT, LEFT, BOTTOM = 560, 300, 70, 40


def _ticks(low: float, high: float) -> list[float]:
    """Round values of a logarithmic axis: 1, 2 and 5 times powers of ten."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]


def _pareto(assessment: dict[str, Any], metric: str, title: str) -> str:
    """A metric against L0, both logarithmic, one line per site and width, bars for intervals."""
    series: dict[str, list[tuple[float, Figure]]] = {}
    for entry in assessment["variants"]:
        figure, l0 = entry["metrics"][metric], entry["metrics"]["l0"]["value"]
        if figure["value"] is not None and figure["value"] > 0 and l0 > 0:
            series.setdefault(f"{entry['site']}, {entry['num_latents']:,} latents", []).append((l0, figure))
    if not series:
        return ""
    points = [point for line in series.values() for point in line]
    xs, ys = [x for x, _ in points], [figure["value"] for _, figure in points]
    x_low, x_high, y_low, y_high = min(xs) / 1.3, max(xs) * 1.3, min(ys) / 1.3, max(ys) * 1.3

    def x_of(x: float) -> float:
        return LEFT + (WIDTH - LEFT - 10) * math.log(x / x_low) / math.log(x_high / x_low)

    def y_of(y: float) -> float:
        share = math.log(min(max(y, y_low), y_high) / y_low) / math.log(y_high / y_low)
        return (HEIGHT - BOTTOM) - (HEIGHT - BOTTOM - 10) * share

    marks: list[str] = []
    marks += [
        f'<text x="{x_of(x):.1f}" y="{HEIGHT - 22}" text-anchor="middle">{x:g}</text>'
        for x in _ticks(x_low, x_high)
    ]
    for y in _ticks(y_low, y_high):
        marks.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 10}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}"/>'
        )
        marks.append(f'<text x="{LEFT - 6}" y="{y_of(y) + 4:.1f}" text-anchor="end">{y:.3g}</text>')
    legend = []
    for i, (name, line) in enumerate(sorted(series.items())):
        colour = PALETTE[i % len(PALETTE)]
        line.sort(key=lambda point: point[0])
        path = " ".join(f"{x_of(x):.1f},{y_of(figure['value']):.1f}" for x, figure in line)
        marks.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        for x, figure in line:
            marks.append(
                f'<circle cx="{x_of(x):.1f}" cy="{y_of(figure["value"]):.1f}" r="4" fill="{colour}"/>'
            )
            if figure.get("lo") is not None:
                ends = f'y1="{y_of(figure["lo"]):.1f}" y2="{y_of(figure["hi"]):.1f}"'
                place = f'x1="{x_of(x):.1f}" x2="{x_of(x):.1f}" {ends}'
                marks.append(f'<line {place} stroke="{colour}" stroke-width="2"/>')
        legend.append(f'<span style="color:{colour}">● {html.escape(name)}</span>')
    marks.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 4}" text-anchor="middle">L0</text>')
    return (
        f"<h2>{title} against L0</h2><p>{' &nbsp; '.join(legend)}</p>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title} against L0">'
        f"{''.join(marks)}</svg>"
    )


def _densities(assessment: dict[str, Any], densities: Mapping[str, NDArray[np.float64]]) -> str:
    """A histogram of log10 density per variant, never-firing latents in a bar of their own."""
    low = math.floor(math.log10(1 / max(2, assessment["data"]["n_tokens"])))
    edges = np.linspace(low, 0, 41)
    figures = []
    for entry in assessment["variants"]:
        density = densities[entry["name"]]
        counts, _ = np.histogram(np.log10(density[density > 0]), edges)
        never = int((density == 0).sum())
        top = max(1, counts.max(), never)
        bars = [
            (10, never, "#999999"),
            *((30 + 6.5 * i, int(c), PALETTE[0]) for i, c in enumerate(counts)),
        ]
        rects = "".join(
            f'<rect x="{x}" width="5.5" y="{90 - 80 * n / top:.1f}" height="{80 * n / top:.1f}" fill="{c}"/>'
            for x, n, c in bars
        )
        labels = "".join(
            f'<text x="{x}" y="104">{text}</text>'
            for x, text in ((8, f"never {never}"), (60, f"1e{low}"), (278, "1"))
        )
        figures.append(
            f"<figure><figcaption>{html.escape(entry['name'])}</figcaption>"
            f'<svg viewBox="0 0 300 108" class="small">{rects}{labels}</svg></figure>'
        )
    return f"<h2>Firing density of the latents (log scale)</h2><div class='grid'>{''.join(figures)}</div>"


def _contexts(features: dict[str, Any]) -> str:
    parts = [
        f"<h2>Where latents of {html.escape(features['variant'])} fire most</h2>",
        f"<p>Live latents drawn at random, and those asked for; searched "
        f"{html.escape(features['searched'])}; at most one context per document.</p>",
    ]
    for latent in features["latents"]:
        rows = "".join(
            f"<tr><td>{c['activation']:.2f}</td><td class='text'>{html.escape(c['before'])}"
            f"<mark>{html.escape(c['token'])}</mark>{html.escape(c['after'])}</td></tr>"
            for c in latent["contexts"]
        )
        parts.append(
            f"<h3>latent {latent['latent']} <small>active on {latent['density']:.3%} of tokens, "
            f"mean when active {latent['mean_when_active']:.2f}</small></h3><table>{rows}</table>"
        )
    return "".join(parts)


PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>saemill assessment</title><style>
body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.5em 0}td,th{padding:.25em .7em;border-bottom:1px solid #ddd;
text-align:right;vertical-align:top}td:first-child,th:first-child,td.text{text-align:left}
td small{display:block;color:#666;font-size:80%;white-space:nowrap}td.bad{background:#fde8e0}
h3 small{font-weight:normal;color:#666}td.name{white-space:nowrap}
mark{background:#ffd166;padding:0 1px}svg{max-width:640px;width:100%;font-size:11px}svg .grid{stroke:#eee}
.grid{display:flex;flex-wrap:wrap;gap:1em}figure{margin:0;width:300px}figcaption{font-size:85%}
.notes{color:#444;font-size:92%}td.text{font-size:92%}
</style></head><body>
{{body}}
</body></html>
"""
