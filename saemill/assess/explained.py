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
    n_firing = sum(case.fires for case in explained.tested)
    n_near = sum(case.neighbour is not None for case in explained.tested)
    n_silent, n_unread = (
        len(explained.tested) - n_firing - n_near,
        sum(c.said is None for c in explained.tested),
    )
    on = f"{n_firing} firing and {n_silent} silent contexts of other documents"
    words = f"balanced accuracy {_with_other(explained.score, explained.shuffled)} on {on}"
    if explained.near_score.value is not None:
        near = _with_other(explained.near_score, explained.near_shuffled)
        words += f"; {near} beside {n_near} silent ones where a similar latent fires"
    return words + (f"; {counted(n_unread, 'context')} got no readable answer" if n_unread else "")


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
    if found.near_score.value is not None:
        words += f". Where a similar latent fires in the silent contexts: {_figure(found.near_score)}"
    if found.near_shuffled.value is not None:
        words += f", by another's {_figure(found.near_shuffled)}"
    if found.near_difference.value is not None:
        words += f"; difference {_figure(found.near_difference)}"
    return words


def _with_other(own: Figure, other: Figure) -> str:
    """Format the figure of a latent's explanation, with that of another's."""
    return _figure(own) + ("" if other.value is None else f" [another latent's explanation {_figure(other)}]")


def _figure(figure: Figure) -> str:
    """Format a figure with its interval, where it has one."""
    values = figure.model_dump()
    ends = interval(values)
    return number(values, 2) + (f" ({ends})" if ends else "")
