"""The latents that are shown: which, where they fire, and what their weights tell."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saemill.assess import directions
from saemill.assess.evalset import EvalSet
from saemill.assess.firing import Firing, Places
from saemill.assess.reader import PassageReader, Reader, reader_of
from saemill.common.errors import ConfigError
from saemill.common.log import counted
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
    """Which latents are shown, and how much of each."""

    latents: list[int]
    asked: tuple[int, ...]
    """Those of them that were asked for."""
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


def describe(
    wanted: Wanted, name: str, saes: Mapping[str, Sae], evalset: EvalSet, model: str | None, of: str
) -> Features:
    """Describe some latents of an SAE, in one pass over the tokens that are searched.

    Args:
        wanted: which latents, and how much of each.
        name: the SAE.
        saes: it and those beside it, among which those of other seeds are looked for.
        evalset: where activations and texts come from.
        model: the model's folder or hub id, if it is not where it was cached from.
        of: hash of what is assessed.
    """
    sae, latents, text = saes[name], wanted.latents, evalset.text
    chunks = evalset.context_chunks(wanted.context_tokens) if latents else ()
    firing = Firing(sae, latents, evalset, SPARE * wanted.n_contexts).run(chunks)
    vocabulary = directions.Vocabulary.of(sae, evalset.store, model)
    reader = reader_of(text)
    among = f" of the cache, training {text.row}s included" if evalset.cached else " of the evaluation tokens"
    return Features(
        of=of,
        variant=name,
        unit="passage" if isinstance(text, PassageStore) else "token",
        searched=f"{counted(firing.n_tokens, text.unit)}{among}",
        n_searched=firing.n_tokens,
        n_live=wanted.n_live,
        seed=SEED,
        positions=tuple(firing.positions.labels) if text.ctx_len > 1 else (),
        sources=tuple(firing.source_names),
        sites=tuple(part.site for part in sae.config.outputs),
        no_tokens=vocabulary.missing,
        latents=tuple(_latents(wanted, sae, saes, name, firing, vocabulary, reader)),
    )


def _latents(
    wanted: Wanted,
    sae: Sae,
    saes: Mapping[str, Sae],
    name: str,
    firing: Firing,
    vocabulary: directions.Vocabulary,
    reader: Reader | PassageReader,
) -> list[Latent]:
    """Put together what is told of each latent."""
    latents = wanted.latents
    shares = directions.norm_shares(sae)
    tokens = vocabulary.tokens(sae, latents, reader.pieces) if isinstance(reader, Reader) else None
    told = zip(
        latents,
        directions.neighbours(sae, latents),
        directions.counterparts(sae, latents, directions.siblings(name, saes)),
        directions.encoder_cosines(sae, latents),
        tokens or [((), ())] * len(latents),
        strict=True,
    )
    return [
        Latent(
            latent=latent,
            asked=latent in wanted.asked,
            **_firing(firing, at, wanted, reader),
            promoted=promoted,
            suppressed=suppressed,
            nearest=near.nearest,
            opposite=near.opposite,
            counterparts=counterparts,
            encoder_cosine=cosine,
            norm_shares=() if shares is None else tuple(shares[latent].tolist()),
        )
        for at, (latent, near, counterparts, cosine, (promoted, suppressed)) in enumerate(told)
    ]


def _firing(firing: Firing, at: int, wanted: Wanted, reader: Reader | PassageReader) -> dict[str, Any]:
    """Describe where a latent fires, by its place in the list."""
    strongest, sampled, n = firing.strongest.of(at), firing.sampled.of(at), int(firing.count_L[at])
    largest = float(strongest["activation"][0]) if n else 0.0
    bars, _ = np.histogram(sampled["activation"], N_BARS, (0, largest or 1))
    contexts = _shown(strongest, wanted.n_contexts, reader)
    return {
        "n_active": n,
        "density": n / max(1, firing.n_tokens),
        "mean_when_active": float(firing.sum_L[at]) / max(1, n),
        "largest": largest,
        "n_sampled": len(sampled),
        "histogram": tuple(bars.tolist()),
        "contexts": contexts,
        "strata": strata(sampled, largest, wanted.n_samples, reader),
        "by_position": _shares(firing.by_position_LP, at) if firing.evalset.text.ctx_len > 1 else (),
        "by_source": _shares(firing.by_source_LS, at),
        "together": _together(firing, at),
    }


def strata(
    sampled: Places, largest: float, n_each: int, reader: Reader | PassageReader
) -> tuple[Stratum, ...]:
    """Divide the sampled firings of a latent at the quantiles of their activations, none of which is zero.

    Args:
        sampled: the firings, in random order.
        largest: of all its activations, also those that are not in the sample.
        n_each: places shown of each stratum, the first ones.
        reader: of the places.

    Returns: strata of about the same share of the firings, the highest first; an empty one is left out.
    """
    activations = sampled["activation"].astype(np.float64)
    if not len(activations):
        return ()
    edges = np.quantile(activations, np.linspace(0, 1, N_STRATA + 1))
    edges[-1] = largest
    stratum_N = np.clip(np.searchsorted(edges, activations, side="left") - 1, 0, N_STRATA - 1)
    return tuple(
        Stratum(
            low=float(edges[number]),
            high=float(edges[number + 1]),
            share=float((stratum_N == number).mean()),
            contexts=_by_activation(_shown(sampled[stratum_N == number], n_each, reader)),
        )
        for number in reversed(range(N_STRATA))
        if (stratum_N == number).any()
    )


def _by_activation(contexts: tuple[Context, ...]) -> tuple[Context, ...]:
    """Sort contexts, the strongest first."""
    return tuple(sorted(contexts, key=lambda context: -context.activation))


def _shown(places: Places, n: int, reader: Reader | PassageReader) -> tuple[Context, ...]:
    """Read the first places, those left out that have the same tokens around as one before."""
    shown: dict[Any, Context] = {}
    for place in places:
        context = reader.context(float(place["activation"]), int(place["address"]), place["around"])
        what = context.place
        shown.setdefault(what.tokens if isinstance(what, Snippet) else what.address, context)
        if len(shown) == n:
            break
    return tuple(shown.values())


def _shares(counts_LG: NDArray[np.int64], at: int) -> tuple[float | None, ...]:
    """Divide a latent's firings in groups of tokens by the tokens there, which are in the last row."""
    return tuple(
        int(fires) / int(n) if n else None for fires, n in zip(counts_LG[at], counts_LG[-1], strict=True)
    )


def _together(firing: Firing, at: int) -> tuple[Together, ...]:
    """Find the latents that fire most on the same tokens as one does, by the correlation of firing."""
    n, own = firing.n_together, int(firing.latents_L[at])
    both_F, fires_F = firing.together_LF[at].astype(np.float64), firing.fired_F.astype(np.float64)
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
