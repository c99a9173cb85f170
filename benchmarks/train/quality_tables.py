"""The tables of `quality`: each architecture at equal L0, and every SAE as it was measured."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.report import machine, table
from benchmarks.train.equal_l0 import Found, Point, at

COLUMNS = {
    "fvu": "FVU",
    "delta_ce": "ΔCE, nats",
    "loss_recovered": "loss recovered",
    "dead_fraction": "dead",
    "max_decoder_cosine": "max decoder cosine",
}
"""Figures that are shown, by name."""


@dataclass(frozen=True)
class Trained:
    """One SAE of a contestant."""

    contestant: str
    member: str
    level: float
    folder: Path
    seconds: float
    """Time of its training, or its share of the time of all that trained with it."""
    figures: dict[str, Any] = field(default_factory=dict)
    """As the yardstick gives them."""

    @property
    def name(self) -> str:
        """Name it in the tables and among files."""
        return f"{self.contestant}-{self.member}-{self.level:g}"

    @property
    def plain(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {"name": self.name} | self.__dict__


def lines(args: argparse.Namespace, words: str, every: list[Trained]) -> list[str]:
    """Render the report."""
    head = [
        machine(),
        "",
        f"{args.latents:,} latents, {args.tokens:,} tokens of {words}, {args.batch:,} per ",
    ]
    head[-1] += f"step, {args.threads} threads. Brackets are 95% intervals over documents."
    found = {
        (member, l0): at_l0(every, member, l0, args.contestants) for member in args.members for l0 in args.l0
    }
    return [
        *head,
        "",
        *summary(args, found, "fvu"),
        *summary(args, found, "delta_ce"),
        *(line for member in args.members for line in member_table(args, member, found)),
        *as_measured(every),
    ]


Both = dict[str, Found]
"""Figures at one L0, by contestant; those that do not reach it are left out."""


def at_l0(every: list[Trained], member: str, l0: float, contestants: list[str]) -> Both:
    """Find every contestant's figures of an architecture at an L0."""
    found = {}
    for contestant in contestants:
        points = [
            Point(sae.figures["l0"]["value"], sae.figures)
            for sae in every
            if (sae.contestant, sae.member) == (contestant, member) and "unusable" not in sae.figures
        ]
        if result := at(points, l0):
            found[contestant] = result
    return found


def summary(args: argparse.Namespace, found: dict[tuple[str, float], Both], what: str) -> list[str]:
    """Render saemill's figure beside the best peer's, of each architecture at each L0."""
    cells = []
    for member in args.members:
        cells.append([member])
        for l0 in args.l0:
            values = {name: it.metrics[what].get("value") for name, it in found[member, l0].items()}
            known = {name: value for name, value in values.items() if value is not None}
            own = known.pop("saemill", None)
            peer = min(known, key=lambda name: known[name], default=None)
            beside = "–" if peer is None else f"{known[peer]:.4f} ({peer})"
            cells[-1].append(f"{'–' if own is None else f'{own:.4f}'} / {beside}")
    head = ["", *(f"L0 {l0:g}" for l0 in args.l0)]
    return [f"## {COLUMNS[what]}: saemill / the best peer", "", *table(head, cells, 1)]


def member_table(args: argparse.Namespace, member: str, found: dict[tuple[str, float], Both]) -> list[str]:
    """Render one architecture."""
    cells = []
    for l0 in args.l0:
        for contestant, it in found[member, l0].items():
            cells.append([f"{l0:g}", contestant, it.how, *(cell(it.metrics[name]) for name in COLUMNS)])
    return [f"## {member}", "", *table(["L0", "contestant", "how", *COLUMNS.values()], cells, 3)]


def cell(figure: dict[str, Any]) -> str:
    """Format a figure with its interval."""
    value = figure.get("value")
    if value is None:
        return "–"
    ends = [figure.get(end) for end in ("lo", "hi")]
    interval = "" if None in ends else f" ({ends[0]:.4f}–{ends[1]:.4f})"
    return f"{value:.4f}{interval}"


def as_measured(every: list[Trained]) -> list[str]:
    """Render every SAE at the L0 that it has."""
    cells = []
    for sae in every:
        first = [sae.member, sae.contestant, f"{sae.level:g}"]
        if "unusable" in sae.figures:
            cells.append([*first, *["–"] * (1 + len(COLUMNS)), f"{sae.seconds:,.0f}"])
            continue
        figures = [cell(sae.figures[name]) for name in COLUMNS]
        cells.append([*first, f"{sae.figures['l0']['value']:.1f}", *figures, f"{sae.seconds:,.0f}"])
    head = ["", "contestant", "k, target or weight", "L0", *COLUMNS.values(), "seconds of training"]
    notes = [f"{sae.name}: {sae.figures['unusable']}" for sae in every if "unusable" in sae.figures]
    return ["## Every SAE as it was measured", "", *table(head, cells, 3), *notes, ""]
