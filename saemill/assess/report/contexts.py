"""Contexts as the page shows them: tokens shaded by the activation of a latent."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from saemill.assess.report.visible import visible

N_LEVELS = 9
"""Shades of an activation."""
PASSAGE_LETTERS = 600
"""Letters shown of a passage."""


@dataclass(frozen=True, slots=True)
class Run:
    """Letters of one shade."""

    text: str
    level: int = 0
    """0 for tokens on which the latent does not fire."""
    value: str = ""
    is_below: bool = False
    """Whether it is an activation below 0."""
    is_peak: bool = False


@dataclass(frozen=True, slots=True)
class Shown:
    """A context as it is shown."""

    number: str
    """What stands before it."""
    runs: list[Run]
    source: str
    """What stands behind it."""


def of_tokens(
    number: str, source: str | None, tokens: Sequence[str], at: int, values: Sequence[float], largest: float
) -> Shown:
    """Shade tokens by their share of a latent's largest activation; those alike stand together.

    Args:
        number: what stands before it.
        source: what stands behind it.
        tokens: their texts.
        at: place of the token that is shown.
        values: activation at each of them.
        largest: the latent's largest activation, by absolute value.
    """
    runs: list[Run] = []
    for (level, is_peak), some in groupby(_shaded(tokens, at, values, largest), key=itemgetter(0)):
        if level or is_peak:
            runs += [Run(text, level, f"{value:.3g}", value < 0, is_peak) for _, text, value in some]
        else:
            runs.append(Run("".join(text for _, text, _ in some)))
    return Shown(number, runs, visible(source or ""))


def _shaded(
    tokens: Sequence[str], at: int, values: Sequence[float], largest: float
) -> Iterator[tuple[tuple[int, bool], str, float]]:
    """List the shade of each token, and whether it is the one that is shown; its text; its activation."""
    for place, (token, value) in enumerate(zip(tokens, values, strict=True)):
        text = visible(token.lstrip(" ") if place == 0 else token)
        level = min(N_LEVELS, max(1, round(N_LEVELS * abs(value) / (largest or 1)))) if value else 0
        yield (level, place == at), text, value


def of_passage(number: str, name: str, text: str | None) -> Shown:
    """Show a passage, which has no activations at its tokens."""
    return Shown(number, [Run(visible(text or "", PASSAGE_LETTERS))], visible(name))
