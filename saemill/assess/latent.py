"""`saemill latent`: any latents of a run's SAE, in the terminal and on a page, from the cache."""

from pathlib import Path

from saemill.assess.config import AssessConfig, LatentConfig
from saemill.assess.done import hash_of
from saemill.assess.evalset import EvalSet
from saemill.assess.explained import score_words
from saemill.assess.features import Describer, Wanted
from saemill.assess.inputs import open_run
from saemill.assess.report.page import write_latents
from saemill.assess.table import context_line
from saemill.common.errors import ConfigError, StoreError
from saemill.common.log import counted, say
from saemill.common.ranges import parsed
from saemill.common.stores import explanations, runs
from saemill.common.stores import features as records
from saemill.common.stores.explanations import Explained
from saemill.common.stores.features import Features, Latent, Token
from saemill.common.world import World

MOST_LATENTS = 2000
"""Most latents shown at once: a page of so many has 17 MB, and browsers tarry over more."""


def run(config: LatentConfig) -> Features:
    """Show latents: print them, and write a page if one is named.

    Raises:
        StoreError: the run is not finished, or its activations are not to be found.
        ConfigError: it is not clear which SAE is meant, or it has no such latent.
    """
    folder, name = sae_of(config.run.absolute())
    numbers = _numbers(config.latents)
    task = AssessConfig(
        run=folder,
        acts=config.acts,
        with_acts=config.with_acts,
        local_cache=config.local_cache,
        variant=name,
        latents=numbers,
    )
    world = World.here()
    device = world.device(config.device)
    with world.connected(device) as everyone:
        trained = open_run(task, device)
        wanted = Wanted(
            asked=numbers,
            n_live=0,
            n_contexts=config.n_contexts,
            n_samples=config.n_samples,
            context_tokens=config.context_tokens,
        )
        site = str(trained.saes[name].site)
        evalset = EvalSet(trained.store, None, None, trained.mask, [site], 1, everyone)
        describer = Describer(wanted, numbers, name, trained.saes, evalset, config.model)
        found = describer.features(numbers, hash_of(task))
    explained = explanations.beside(folder, found)
    said = {each.latent: each for each in explained.latents} if explained else {}
    say("\n\n".join(text(latent, found, said.get(latent.latent)) for latent in found.latents))
    if config.out is not None:
        page = config.out
        everyone.first(lambda: write_latents(page, found, explained))
        say(f"{page} written")
    return found


def _numbers(items: tuple[str, ...]) -> tuple[int, ...]:
    """List the latents that are named, each once.

    Raises:
        ConfigError: so many that a page of them would be too large.
    """
    ranges = [parsed(item) for item in items]
    if (n := sum(map(len, ranges))) > MOST_LATENTS:
        raise ConfigError(
            f"latents must be at most {MOST_LATENTS:,} at once, got {n:,}; show them in several pages"
        )
    return tuple(dict.fromkeys(latent for some in ranges for latent in some))


def sae_of(path: Path) -> tuple[Path, str]:
    """Find the run and the SAE that a folder stands for: of a run its only SAE, or the one that its
    assessment shows.

    Raises:
        StoreError: it is neither.
        ConfigError: the run has several SAEs and was not assessed.
    """
    if not runs.is_run(path) and runs.is_run(path.parent):
        return path.parent, path.name
    if not runs.is_finished(path):
        raise StoreError(
            f"{path} is no finished run ({runs.FINISHED} is missing); name one, or the folder of an SAE in it"
        )
    names = runs.finished(path).variants
    if len(names) == 1:
        return path, names[0]
    if (path / runs.FEATURES).exists():
        return path, records.load(path).variant
    raise ConfigError(
        f"{path} has {counted(len(names), 'SAE')}; name the folder of one, as {path / names[0]}"
    )


def text(latent: Latent, features: Features, explained: Explained | None) -> str:
    """Write what is known of a latent as lines for the terminal."""
    unit = features.unit
    lines = [
        f"latent {latent.latent} of {features.variant}: active on {latent.density:.3%} of {unit}s "
        f"({latent.n_active:,} of {features.n_searched:,})"
    ]
    if not latent.n_active:
        return "\n".join([*lines, *_directions(latent, features)])
    lines[0] += f", {latent.mean_when_active:.3g} on average, "
    ends = f"{latent.smallest:.3g} to {latent.largest:.3g}"
    lines[0] += ends if latent.smallest else f"{latent.largest:.3g} at most"
    if explained:
        lines += [f"  “{explained.text}”"] if explained.text else []
        lines.append(f"  {score_words(explained)}")
    lines += ["  strongest", *map(context_line, latent.contexts)]
    if latent.below:
        lines += ["  strongest below 0", *map(context_line, latent.below)]
    for stratum in latent.strata:
        if stratum.contexts:
            lines.append(f"  {stratum.low:.3g} to {stratum.high:.3g}, {stratum.share:.0%} of its firings")
            lines += map(context_line, stratum.contexts)
    return "\n".join([*lines, *_directions(latent, features)])


def _directions(latent: Latent, features: Features) -> list[str]:
    """Write what its weights tell, and which latents it fires together with."""
    told = _effects(latent, features) | {
        "nearest decoder rows": ", ".join(f"{n.latent} ({n.cosine:.2f})" for n in latent.nearest),
        "fires together with": ", ".join(f"{t.latent} (φ {t.phi:.2f})" for t in latent.together),
        "in other seeds": ", ".join(
            f"{c.variant}: {c.latent} ({c.cosine:.2f}{', mutual' if c.mutual else ''})"
            for c in latent.counterparts
        ),
        "by source": ", ".join(
            f"{source} {share:.3%}"
            for source, share in zip(features.sources, latent.by_source, strict=True)
            if share is not None
        ),
    }
    return [f"  {what}: {values}" for what, values in told.items() if values]


def _effects(latent: Latent, features: Features) -> dict[str, str]:
    """Write which tokens it makes more and less probable, of several places that it writes to by place."""
    told = {}
    above = " above 0" if latent.smallest else ""
    for place, effect in zip(features.vocabularies, latent.effects, strict=True):
        at = above + f" at {place.at}" if len(features.vocabularies) > 1 else above
        told[f"promotes{at}"] = _tokens(effect.promoted)
        told[f"suppresses{at}"] = _tokens(effect.suppressed)
        if place.missing:
            told[f"promotes{at}"] = f"not known: {place.missing}"
    return told


def _tokens(tokens: tuple[Token, ...]) -> str:
    return ", ".join(f"{token.text!r} {token.logit:+.2f}" for token in tokens)
