"""FVU and ΔCE against L0 as a picture of its own, `pareto.svg`, for a README and for wandb.

It is SVG: small, drawn from the same marks as the page's charts, and shown by browsers and by the hub's cards
as an image. It has its own white ground, since a page around it may be dark.
"""

from collections.abc import Mapping
from typing import Any

from saemill.assess.report import charts
from saemill.assess.report.visible import visible
from saemill.common.page import render

SIZE = {
    "width": charts.WIDTH,
    "height": charts.HEIGHT,
    "left": charts.LEFT,
    "right": charts.RIGHT,
    "top": charts.TOP,
    "bottom": charts.BOTTOM,
}
ABOVE, ROW = 30, 22
"""Heights of the charts' titles and of a row of the legend."""


def pareto(assessment: Mapping[str, Any]) -> str | None:
    """Draw the charts beside one another, with their legend below, as SVG; None where no SAE has a figure."""
    drawn = [chart for metric in charts.METRICS if (chart := charts.against_l0(assessment, metric))]
    if not drawn:
        return None
    n_lines, columns = len(drawn[0].lines), 2 * len(drawn)
    return render(
        "assess/report/pareto.svg",
        title=f"{' and '.join(chart.title for chart in drawn)} against L0, with 95% intervals",
        charts=drawn,
        size=SIZE,
        data=assessment["data"],
        width=charts.WIDTH * len(drawn),
        height=ABOVE + charts.HEIGHT + 24 + ROW * -(-n_lines // columns),
        above=ABOVE,
        columns=columns,
        column=(charts.WIDTH * len(drawn) - charts.LEFT) // columns,
        row=ROW,
        visible=visible,
    ).lstrip()
