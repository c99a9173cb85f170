"""Where the bars of small charts are, in units of a drawing 100 wide and 32 high."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 100.0, 32.0


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar."""

    x: float
    width: float
    height: float
    title: str
    kind: str = ""
    """Class of its colour."""

    @property
    def y(self) -> float:
        """Upper end."""
        return round(HEIGHT - self.height, 2)


def bars(values: Sequence[float | None], titles: Iterable[str], kinds: Sequence[str] = ()) -> list[Bar]:
    """Lay out one bar per value, beside one another, the largest as high as the drawing.

    Args:
        values: 0 or more; None for a value that there is not.
        titles: what each bar says.
        kinds: classes of their colours.
    """
    largest = max((value for value in values if value), default=0.0)
    step = WIDTH / max(1, len(values))
    return [
        Bar(
            x=round(step * i + 0.08 * step, 2),
            width=round(0.84 * step, 2),
            height=round(max(0.4, HEIGHT * value / largest), 2) if value else 0.0,
            title=title,
            kind=kinds[i] if kinds else "",
        )
        for i, (value, title) in enumerate(zip(values, titles, strict=True))
    ]


def outline(counts: Sequence[int]) -> str:
    """Draw a histogram as the path of its outline: short, for the many of them."""
    largest, step = max([1, *counts]), WIDTH / max(1, len(counts))
    steps = "".join(f"V{HEIGHT - HEIGHT * count / largest:.3g}h{step:.4g}" for count in counts)
    return f"M0 {HEIGHT:g}{steps}V{HEIGHT:g}z"
