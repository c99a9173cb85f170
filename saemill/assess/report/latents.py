"""Latents as the page shows them: tokens shaded by activation, and what each latent is like."""

from collections import Counter
from dataclasses import dataclass

from markupsafe import Markup

from saemill.assess.directions import SAME
from saemill.assess.explained import score_words
from saemill.assess.report import contexts
from saemill.assess.report.bars import Bar, bars, outline
from saemill.assess.report.contexts import Shown
from saemill.assess.report.visible import visible
from saemill.assess.table import name_of
from saemill.common.page import render
from saemill.common.stores.explanations import Explained, Explanations
from saemill.common.stores.features import Context, Features, Latent, Passage, Snippet, Token

N_TOP_TOKENS = 3
EXPLANATION_LETTERS = 1000
N_OPEN = 3
"""Latents that are unfolded on the page."""


@dataclass(frozen=True, slots=True)
class Part:
    """Contexts below a heading."""

    title: str
    contexts: list[Shown]


def pages(features: Features, explained: Explanations | None, most_bytes: int | None) -> tuple[Markup, int]:
    """Render as many latents as there is room for, in their order; None for all of them.

    Returns: the HTML, and how many latents are in it.
    """
    said = {each.latent: each for each in explained.latents} if explained else {}
    rendered, n_bytes = [], 0
    for number, latent in enumerate(features.latents):
        html = page_of(latent, features, said.get(latent.latent), is_open=number < N_OPEN)
        n_bytes += len(html.encode())
        if most_bytes is not None and n_bytes > most_bytes:
            break
        rendered.append(html)
    return Markup("".join(rendered)), len(rendered)


def page_of(
    latent: Latent, features: Features, said: Explained | None = None, *, is_open: bool = False
) -> str:
    """Render one latent, with what a language model said of it."""
    view = View(latent, features, said)
    return render("assess/report/latent.html", latent=view, is_open=is_open, visible=visible)


def words_of(latent: Latent) -> str:
    """List what a latent is found by, a line each, in small letters: the tokens on which it fires, and those
    that it promotes and suppresses; of passages the words that two of them share."""
    every = (latent.contexts, latent.below, *(stratum.contexts for stratum in latent.strata))
    contexts = [context for some in every for context in some]
    places = [context.place for context in contexts]
    found = [token.text for effect in latent.effects for token in (*effect.promoted, *effect.suppressed)]
    found += [place.tokens[place.at] for place in places if isinstance(place, Snippet)]
    texts = [(place.text or "").lower().split() for place in places if isinstance(place, Passage)]
    shared = Counter(word for text in texts for word in dict.fromkeys(text))
    found += [word for word, n in shared.items() if n >= min(2, len(texts))]
    return "\n".join(dict.fromkeys(visible(word).strip().lower() for word in found))


@dataclass(frozen=True, slots=True)
class AtSite:
    """Tokens that a latent promotes and suppresses from one place."""

    at: str
    """Name of the place; empty where there is one alone."""
    promoted: tuple[Token, ...]
    suppressed: tuple[Token, ...]


class View:
    """What the template asks of a latent.

    Args:
        latent: the latent.
        features: it and its like.
        explained: what a language model said of it, if one was asked.
    """

    def __init__(self, latent: Latent, features: Features, explained: Explained | None) -> None:
        self.latent, self.features, self.explained = latent, features, explained

    @property
    def tokens(self) -> list[str]:
        """List the tokens on which it fires most often, among its contexts."""
        every = [
            self.latent.contexts,
            self.latent.below,
            *(stratum.contexts for stratum in self.latent.strata),
        ]
        peaks = [c.place.tokens[c.place.at] for some in every for c in some if isinstance(c.place, Snippet)]
        return [visible(token) for token, _ in Counter(peaks).most_common(N_TOP_TOKENS)]

    @property
    def explanation(self) -> str:
        """What a language model says of it, on one line; empty where it says nothing."""
        return visible((self.explained and self.explained.text) or "", EXPLANATION_LETTERS)

    @property
    def score(self) -> str:
        """Say how well that tells where it fires."""
        return score_words(self.explained) if self.explained else ""

    @property
    def outline(self) -> str:
        """Path of the histogram of its activations."""
        return outline(self.latent.histogram)

    @property
    def sampled(self) -> str:
        """Say what the histogram is made of."""
        latent = self.latent
        if latent.n_sampled == latent.n_active:
            return f"its {latent.n_active:,} activations"
        return f"{latent.n_sampled:,} of its {latent.n_active:,} activations, drawn at random"

    @property
    def parts(self) -> list[Part]:
        """List its contexts: the strongest, those below 0, then those of each stratum."""
        parts = [Part("Strongest", [self._shown(context) for context in self.latent.contexts])]
        parts.append(Part("Strongest below 0", [self._shown(context) for context in self.latent.below]))
        for stratum in self.latent.strata:
            title = f"{stratum.low:.3g} to {stratum.high:.3g}, {stratum.share:.0%} of its firings"
            parts.append(Part(title, [self._shown(context) for context in stratum.contexts]))
        return [part for part in parts if part.contexts]

    def _shown(self, context: Context) -> Shown:
        value = f"{context.activation:.2f}" if abs(context.activation) < 1000 else f"{context.activation:.3g}"
        place = context.place
        if isinstance(place, Passage):
            return contexts.of_passage(value, name_of(place), place.text)
        largest = max(self.latent.largest, -self.latent.smallest)
        return contexts.of_tokens(value, place.source, place.tokens, place.at, context.values, largest)

    @property
    def effects(self) -> list[AtSite]:
        """List the tokens that it promotes and suppresses, by place, where they are known."""
        places = self.features.vocabularies
        return [
            AtSite(place.at if len(places) > 1 else "", effect.promoted, effect.suppressed)
            for place, effect in zip(places, self.latent.effects, strict=True)
            if place.missing is None
        ]

    @property
    def positions(self) -> list[Bar]:
        """Bars of how often it fires, by position in the row."""
        return self._profile(self.latent.by_position, self.features.positions)

    @property
    def sources(self) -> list[Bar]:
        """Bars of how often it fires, by source."""
        return self._profile(self.latent.by_source, self.features.sources)

    def _profile(self, shares: tuple[float | None, ...], labels: tuple[str, ...]) -> list[Bar]:
        titles = [
            f"{visible(label)}: {'no tokens' if share is None else f'{share:.3%}'}"
            for share, label in zip(shares, labels, strict=True)
        ]
        return bars(shares, titles) if len(shares) > 1 else []

    @property
    def prefix(self) -> int | None:
        """Number of latents of the smallest SAE within a Matryoshka SAE that has it; None of others."""
        return next((n for n in self.features.prefixes if self.latent.latent < n), None)

    @property
    def stability(self) -> str:
        """Say in how many of the seeds it is found, its own among them."""
        counterparts = self.latent.counterparts
        if not counterparts:
            return ""
        n = sum(found.mutual and found.cosine > SAME for found in counterparts)
        return f"in {n + 1} of {len(counterparts) + 1} seeds"
