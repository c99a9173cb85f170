"""The latents that are shown: which, where they fire, and what their weights tell."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saemill.assess import directions
from saemill.assess.evalset import EvalSet
from saemill.assess.firing import Beside, Fires, Firing
from saemill.assess.reader import PassageReader, Reader, reader_of
from saemill.assess.vocabulary import vocabularies
from saemill.common.errors import ConfigError
from saemill.common.log import counted, progress
from saemill.common.sae.sae import Sae
from saemill.common.stores.features import Context, Features, Latent, Snippet, Stratum, Together
from saemill.common.stores.passages import PassageStore

SEED = 11
N_STRATA = 5
N_BARS = 24
N_TOGETHER = 5
LEAST_TOGETHER = 5
"""Fewest tokens on which two latents fire for them to count as firing together: fewer may be chance."""
SPARE = 4
"""Candidates for each context that is shown, from which those with the same tokens around are dropped."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """How much is told of each latent, and which of them were asked for."""

    asked: tuple[int, ...]
    n_live: int
    """Latents that the others were drawn from."""
    n_contexts: int
    """Places where it fires most."""
    n_samples: int
    """Places of each stratum."""
    context_tokens: int
    """Most tokens that are searched."""


def check_latents(requested: tuple[int, ...], widths: list[int]) -> None:
    """Refuse latents that not every SAE that may be shown has.

    Args:
        requested: the latents' numbers.
        widths: how many latents each of those SAEs has.

    Raises:
        ConfigError: naming the latents that do not exist.
    """
    bad = [latent for latent in requested if not 0 <= latent < min(widths)]
    if bad:
        advice = "; name the variant they belong to with --variant" if len(set(widths)) > 1 else ""
        raise ConfigError(f"latents must be in 0..{min(widths) - 1}, got {', '.join(map(str, bad))}{advice}")


def choose_latents(live: NDArray[np.bool_], requested: tuple[int, ...], n_random: int) -> list[int]:
    """Choose the latents to show: those asked for, then live ones drawn at random (never hand-picked)."""
    candidates = np.flatnonzero(live)
    drawn = np.random.default_rng(SEED).permutation(candidates)[:n_random]
    return list(dict.fromkeys([*requested, *drawn.tolist()]))


class Describer:
    """Describes latents of an SAE, any of those whose firings it found in one pass over the tokens.

    Args:
        wanted: how much of each, and which were asked for.
        latents: those whose firings are kept.
        name: the SAE.
        saes: it and those beside it, among which those of other seeds are looked for.
        evalset: where activations and texts come from.
        model: the model's folder or hub id, if it is not where it was cached from.
    """

    def __init__(
        self,
        wanted: Wanted,
        latents: Sequence[int],
        name: str,
        saes: Mapping[str, Sae],
        evalset: EvalSet,
        model: str | None,
    ) -> None:
        self.wanted, self.name, self.sae, self.evalset = wanted, name, saes[name], evalset
        self._siblings = directions.siblings(name, saes)
        chunks = evalset.context_chunks(wanted.context_tokens) if latents else ()
        self.firing = Firing(self.sae, latents, evalset).run(chunks)
        self.reader = reader_of(evalset.text)
        self._vocabularies = vocabularies(self.sae, evalset.store, model)
        self._norm_shares = directions.norm_shares(self.sae)

    def features(self, latents: Sequence[int], of: str) -> Features:
        """Describe some latents, and what they were looked for in.

        Args:
            latents: which, in the order in which they are shown.
            of: hash of what is assessed.
        """
        text, firing = self.evalset.text, self.firing
        cache = f" of the cache, training {text.row}s included"
        among = cache if self.evalset.cached else " of the evaluation tokens"
        return Features(
            of=of,
            variant=self.name,
            unit="passage" if isinstance(text, PassageStore) else "token",
            searched=f"{counted(firing.n_tokens, text.unit)}{among}",
            n_searched=firing.n_tokens,
            n_live=self.wanted.n_live,
            seed=SEED,
            positions=tuple(firing.positions.labels) if text.ctx_len > 1 else (),
            sources=tuple(firing.source_names),
            sites=tuple(part.site for part in self.sae.config.outputs),
            prefixes=tuple(self.sae.config.prefixes),
            vocabularies=tuple(each.record for each in self._vocabularies),
            latents=tuple(self.latents(latents)),
        )

    def each(self, latents: Sequence[int]) -> Iterator[Latent]:
        """Describe latents one after the other, however many, and show progress."""
        with progress("describe latents", len(latents), "latents") as advance:
            for start in range(0, len(latents), directions.AT_ONCE):
                for latent in self.latents(latents[start : start + directions.AT_ONCE]):
                    yield latent
                    advance(1)

    def latents(self, latents: Sequence[int]) -> Iterator[Latent]:
        """Describe some latents, each when it is asked for."""
        pieces = self.reader.pieces if isinstance(self.reader, Reader) else None
        effects = [each.effects(latents, pieces) for each in self._vocabularies]
        shares = self._norm_shares
        told = zip(
            latents,
            directions.neighbours(self.sae, latents),
            directions.counterparts(self.sae, latents, self._siblings),
            directions.encoder_cosines(self.sae, latents),
            zip(*effects, strict=True),
            strict=True,
        )
        for latent, near, counterparts, cosine, its_effects in told:
            yield Latent(
                latent=latent,
                asked=latent in self.wanted.asked,
                **self._firing(latent),
                effects=its_effects,
                nearest=near.nearest,
                opposite=near.opposite,
                counterparts=counterparts,
                encoder_cosine=cosine,
                norm_shares=() if shares is None else tuple(shares[latent].tolist()),
            )

    def _firing(self, latent: int) -> dict[str, Any]:
        """Describe where a latent fires."""
        fires, firing, wanted = self.firing.of(latent), self.firing, self.wanted
        n, sampled = len(fires.acts_N), fires.sampled()
        ends = (fires.smallest, fires.largest if fires.largest or fires.smallest else 1.0)
        bars, _ = np.histogram(fires.acts_N[sampled], N_BARS, ends)
        most, reader = wanted.n_contexts, self.reader
        return {
            "n_active": n,
            "density": n / max(1, firing.n_tokens),
            "mean_when_active": fires.mean,
            "smallest": fires.smallest,
            "largest": fires.largest,
            "n_sampled": len(sampled),
            "histogram": tuple(bars.tolist()),
            "contexts": _shown(fires, fires.strongest(SPARE * most), most, reader),
            "below": _shown(fires, fires.strongest(SPARE * most, -1), most, reader),
            "strata": strata(fires, sampled, wanted.n_samples, reader),
            "by_position": firing.shares(latent, "position") if self.evalset.text.ctx_len > 1 else (),
            "by_source": firing.shares(latent, "source"),
            "together": _together(firing.beside(latent), latent),
        }


def strata(
    fires: Fires, sampled: NDArray[np.int64], n_each: int, reader: Reader | PassageReader
) -> tuple[Stratum, ...]:
    """Divide the sampled firings of a latent at the quantiles of their activations, none of which is zero.

    Args:
        fires: the firings.
        sampled: some of them, in random order. Indices.
        n_each: places shown of each stratum, the first ones.
        reader: of the places.

    Returns: strata of about the same share of the firings, the highest first; an empty one is left out.
    """
    activations = fires.acts_N[sampled].astype(np.float64)
    if not len(activations):
        return ()
    edges = np.quantile(activations, np.linspace(0, 1, N_STRATA + 1))
    edges[-1] = fires.largest
    edges[0] = fires.smallest or edges[0]
    stratum_N = np.clip(np.searchsorted(edges, activations, side="left") - 1, 0, N_STRATA - 1)
    return tuple(
        Stratum(
            low=float(edges[number]),
            high=float(edges[number + 1]),
            share=float((stratum_N == number).mean()),
            contexts=_by_activation(_shown(fires, sampled[stratum_N == number], n_each, reader)),
        )
        for number in reversed(range(N_STRATA))
        if (stratum_N == number).any()
    )


def _by_activation(contexts: tuple[Context, ...]) -> tuple[Context, ...]:
    """Sort contexts, the strongest first."""
    return tuple(sorted(contexts, key=lambda context: -context.activation))


def _shown(
    fires: Fires, places: NDArray[np.int64], n: int, reader: Reader | PassageReader
) -> tuple[Context, ...]:
    """Read the first places, those left out that have the same tokens around as one before."""
    shown: dict[Any, Context] = {}
    for at in places.tolist() if n else ():
        context = reader.context(fires, at)
        what = context.place
        shown.setdefault(what.tokens if isinstance(what, Snippet) else what.address, context)
        if len(shown) == n:
            break
    return tuple(shown.values())


def _together(beside: Beside, own: int) -> tuple[Together, ...]:
    """Find the latents that fire most on the same tokens as one does, by the correlation of firing."""
    n, both_F, fires_F = beside.n_tokens, beside.both_F.astype(np.float64), beside.fires_F.astype(np.float64)
    fires = fires_F[own]
    covariance_F = n * both_F - fires * fires_F
    spread_F = np.sqrt(fires * (n - fires) * fires_F * (n - fires_F))
    phi_F = np.divide(covariance_F, spread_F, out=np.zeros_like(both_F), where=spread_F > 0)
    phi_F[(both_F < LEAST_TOGETHER) | (phi_F <= 0)] = 0
    phi_F[own] = 0
    best = np.argsort(-phi_F, kind="stable")[:N_TOGETHER]
    return tuple(
        Together(latent=int(i), phi=float(phi_F[i]), share=float(both_F[i] / fires))
        for i in best
        if phi_F[i] > 0
    )
