"""Three rounds of questions: explanations; judgements by them; judgements by another latent's explanation.

The third is the control. A judge who says what is likely of any text, whatever is described to it, gets as
much right there as in the second.
"""

from collections.abc import Sequence

from saemill.common.stores.assessments import Figure
from saemill.common.stores.explanations import Explained, Tested
from saemill.explain import prompts, scores
from saemill.explain.asking import Asking
from saemill.explain.config import ExplainConfig
from saemill.explain.contexts import LEAST_DOCUMENTS, Sides

Divided = dict[int, Sides | None]
"""Contexts of each latent; None of one that fires in too few documents."""
Said = dict[int, list[bool | None]]
"""Judgements of the contexts of each latent."""


def explained(config: ExplainConfig, sides: Divided, asking: Asking) -> list[Explained]:
    """Ask for explanations, then judge by each latent's own and by another's."""
    divided = [side for side in sides.values() if side is not None]
    requests = [prompts.explain(side.shown, config) for side in divided]
    texts = map(prompts.explanation, asking.ask("explain", requests))
    text_of = {side.latent: text for side, text in zip(divided, texts, strict=True) if text}
    other_of = _of_others(text_of)
    own = _judged(config, sides, text_of, "judge", asking)
    others = _judged(config, sides, other_of, "judge shuffled", asking)
    return [_of_one(latent, side, text_of, own, others) for latent, side in sides.items()]


def _of_others(text_of: dict[int, str]) -> dict[int, str]:
    """Give each latent the explanation of the next one on the page that says something else; none where there
    is no other. The page is in random order, and stays as it is where more latents are explained."""
    latents = list(text_of)
    others = {}
    for at, latent in enumerate(latents):
        following = [text_of[other] for other in latents[at + 1 :] + latents[:at]]
        if text := next((text for text in following if text != text_of[latent]), None):
            others[latent] = text
    return others


def _judged(
    config: ExplainConfig,
    sides: Divided,
    text_of: dict[int, str],
    label: str,
    asking: Asking,
) -> Said:
    """Judge the contexts of each latent by a text. Per latent one judgement of each case."""
    asked = [
        (latent, text, side.cases[start : start + prompts.AT_ONCE])
        for latent, text in text_of.items()
        if (side := sides[latent]) is not None
        for start in range(0, len(side.cases), prompts.AT_ONCE)
    ]
    contents = asking.ask(label, [prompts.judge(text, cases, config) for _, text, cases in asked])
    said: Said = {}
    for (latent, _, cases), content in zip(asked, contents, strict=True):
        read: Sequence[bool | None] = prompts.verdicts(content, len(cases)) or [None] * len(cases)
        said.setdefault(latent, []).extend(read)
    return said


def _of_one(
    latent: int,
    sides: Sides | None,
    text_of: dict[int, str],
    own: Said,
    others: Said,
) -> Explained:
    """Put together what was said of a latent."""
    if sides is None:
        none = Figure(value=None, reason=f"it fires in fewer than {LEAST_DOCUMENTS} documents that are shown")
        scores_of = dict.fromkeys(("score", "shuffled", "near_score", "near_shuffled"), none)
        return Explained(latent=latent, text=None, shown=(), tested=(), **scores_of)
    unread: list[bool | None] = [None] * len(sides.cases)
    told = zip(sides.cases, own.get(latent, unread), others.get(latent, unread), strict=True)
    tested = tuple(
        Tested(
            address=case.place.address,
            fires=case.fires,
            neighbour=case.neighbour,
            said=said,
            said_shuffled=other,
        )
        for case, said, other in told
    )
    return Explained(
        latent=latent,
        text=text_of.get(latent),
        shown=tuple(context.place.address for context in sides.shown),
        tested=tested,
        **_scores(tested, has_own=latent in own, has_other=latent in others),
    )


def _scores(tested: Sequence[Tested], *, has_own: bool, has_other: bool) -> dict[str, Figure]:
    """Score the judgements of a latent's firing contexts beside its silent ones, and beside those of its
    neighbours; by its own explanation, and by another's."""
    found = {}
    for kind, is_near in (("", False), ("near_", True)):
        some = [each for each in tested if each.fires or (each.neighbour is not None) == is_near]
        fires = [each.fires for each in some]
        found[f"{kind}score"] = Figure(value=None, reason="the answer holds no explanation")
        found[f"{kind}shuffled"] = Figure(value=None, reason="no other latent is explained otherwise")
        if has_own:
            found[f"{kind}score"] = scores.balanced_accuracy(fires, [each.said for each in some])
        if has_other:
            found[f"{kind}shuffled"] = scores.balanced_accuracy(fires, [each.said_shuffled for each in some])
    return found
