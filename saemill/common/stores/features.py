"""`features.json`: the latents that an assessment shows, and what was found about each; and its reader."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from saemill.common import records
from saemill.common.records import Count, Hash, Name, Record
from saemill.common.stores.runs import FEATURES

REPAIR = "Run `saemill assess` again."


class Snippet(Record):
    """A token of a text with its neighbours."""

    address: Count
    document: Count
    source: str | None
    """Name of the document's source, where there are several."""
    tokens: tuple[str, ...]
    """Texts of the tokens; tokens that make up one character are one."""
    at: Count
    """Place of the token itself among them."""

    @model_validator(mode="after")
    def _has_the_token(self) -> "Snippet":
        if self.at >= len(self.tokens):
            raise ValueError("at must be the place of a token")
        return self


class Passage(Record):
    """An embedded passage."""

    address: Count
    id: str | None
    text: str | None


class Context(Record):
    """A place where a latent fires."""

    activation: float
    values: tuple[float, ...]
    """Activation at each token of the place, 0 where the latent does not fire; empty of a passage."""
    place: Snippet | Passage

    @model_validator(mode="after")
    def _fits(self) -> "Context":
        if len(self.values) != (len(self.place.tokens) if isinstance(self.place, Snippet) else 0):
            raise ValueError("values must be of the tokens")
        return self


class Stratum(Record):
    """Places drawn at random among those whose activation lies in an interval."""

    low: float
    high: float
    """Ends of the interval: quantiles of the activations that are not zero."""
    share: float
    """Share of the latent's firings in it."""
    contexts: tuple[Context, ...]


class Token(Record):
    """A token that a latent makes more or less probable."""

    text: str
    logit: float
    """What an activation of 1 adds to its logit, up to a factor that all tokens and latents share."""


class Effect(Record):
    """The tokens that a latent makes more and less probable by what it writes to one place."""

    promoted: tuple[Token, ...]
    suppressed: tuple[Token, ...]


class Vocabulary(Record):
    """A place that latents write to, and whether it is known which tokens that promotes."""

    at: str
    """What is written to: a site; of a cross-layer transcoder all sites that it predicts."""
    missing: str | None
    """Reason why no token is promoted or suppressed."""


class Near(Record):
    """Another latent of the same SAE with a similar decoder row."""

    latent: Count
    cosine: float


class Together(Record):
    """Another latent of the same SAE that fires on the same tokens."""

    latent: Count
    phi: float
    """Correlation of whether the two fire."""
    share: float
    """Share of the shown latent's firings on which the other fires too."""


class Counterpart(Record):
    """The nearest latent of an SAE that differs in the seed alone."""

    variant: Name
    latent: Count
    cosine: float
    """Cosine of the decoder rows."""
    mutual: bool
    """Whether the shown latent is the nearest one of that latent too."""


class Latent(Record):
    """A latent that is shown."""

    latent: Count
    asked: bool
    """Whether it was asked for, and not drawn at random."""
    n_active: Count
    """Number of the searched tokens on which it fires."""
    density: float
    """The same as a share of the searched tokens."""
    mean_when_active: float
    smallest: float = 0.0
    """0 where none is below 0."""
    largest: float
    """0 where none is above 0."""
    n_sampled: Count
    """Number of its firings that histogram and strata are made of; all, where they are not more than that."""
    histogram: tuple[Count, ...]
    """Counts of those by their activation, in bins of one width from the smallest to the largest."""
    contexts: tuple[Context, ...]
    """Places where it fires most above 0, at most one per document."""
    below: tuple[Context, ...] = ()
    """The same below 0, the farthest from it first."""
    strata: tuple[Stratum, ...]
    """Places of each quantile of its activations, the highest first."""
    by_position: tuple[float | None, ...]
    """Share of the tokens at each group of positions on which it fires; None where there are no tokens."""
    by_source: tuple[float | None, ...]
    """The same by source."""
    effects: tuple[Effect, ...]
    """What it makes more and less probable from each of `Features.vocabularies`; empty where that is not
    known."""
    nearest: tuple[Near, ...]
    opposite: Near | None
    """Latent with the most opposite decoder row; None where there is no other."""
    together: tuple[Together, ...]
    counterparts: tuple[Counterpart, ...]
    encoder_cosine: float | None
    """Cosine of its encoder and decoder rows; None where they are of different spaces."""
    norm_shares: tuple[float, ...]
    """Of a crosscoder, shares of its sites in the lengths of the parts of its decoder row."""


class Features(Record):
    """All latents that are shown, of one SAE."""

    format: Literal["saemill features 2"] = "saemill features 2"
    of: Hash
    """Hash of what was assessed, as `final_assessment.json` has it."""
    variant: Name
    unit: Literal["token", "passage"]
    searched: str
    """Sentence on the tokens that were searched."""
    n_searched: Count
    n_live: Count
    """Number of latents that were drawn from."""
    seed: Count
    """Seed of the draw."""
    positions: tuple[str, ...]
    """Groups of positions in a row."""
    sources: tuple[str, ...]
    sites: tuple[str, ...]
    """Sites of a crosscoder."""
    prefixes: tuple[Count, ...] = ()
    """Numbers of latents of a Matryoshka SAE's prefixes, the whole included."""
    vocabularies: tuple[Vocabulary, ...]
    """The places that latents write to: one, of a crosscoder each of its sites."""
    latents: tuple[Latent, ...] = Field(default=())

    @model_validator(mode="after")
    def _has_effects(self) -> "Features":
        n = len(self.vocabularies)
        if bad := [latent.latent for latent in self.latents if len(latent.effects) != n]:
            raise ValueError(f"effects must be of the {n} vocabularies, not so of latent {bad[0]}")
        return self


def load(folder: Path) -> Features:
    """Load the latents that the assessment in a folder shows.

    Raises:
        MissingError: there is no such file.
        StoreError: it is damaged, or of another version.
    """
    return records.read(folder / FEATURES, Features, REPAIR)
