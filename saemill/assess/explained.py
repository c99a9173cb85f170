"""What a language model said of latents, in words for the terminal and the page."""

from saemill.assess.sums import number
from saemill.assess.table import interval
from saemill.common.log import counted
from saemill.common.stores.assessments import Figure
from saemill.common.stores.explanations import Explained, Explanations


def score_words(explained: Explained) -> str:
    """Say how well a latent's explanation tells where it fires, beside another latent's."""
    if explained.score.value is None:
        return f"not scored: {explained.score.reason}"
    firing = sum(case.fires for case in explained.tested)
    on = f"{firing} firing and {len(explained.tested) - firing} silent contexts of other documents"
    unread = sum(case.said is None for case in explained.tested)
    words = f"balanced accuracy {_figure(explained.score)} on {on}"
    words += f", of which {unread} got no readable answer" if unread else ""
    return words + (
        f"; by another latent's explanation {_figure(explained.shuffled)}"
        if explained.shuffled.value is not None
        else ""
    )


def summary(found: Explanations) -> str:
    """Say how well the explanations tell on the whole where latents fire."""
    n = sum(each.text is not None for each in found.latents)
    words = f"{counted(n, 'latent')} of {found.variant} explained by {found.model}"
    if found.score.value is None:
        return f"{words}; none has a score"
    words += f": mean balanced accuracy {_figure(found.score)}"
    if found.shuffled.value is not None:
        words += f", by another latent's explanation {_figure(found.shuffled)}, where chance is 0.5"
    if found.difference.value is not None:
        words += f"; difference {_figure(found.difference)}"
    return words


def _figure(figure: Figure) -> str:
    """Format a figure with its interval, where it has one."""
    values = figure.model_dump()
    ends = interval(values)
    return number(values, 2) + (f" ({ends})" if ends else "")
