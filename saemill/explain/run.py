"""`saemill explain`: a language model explains the latents that an assessment shows; each explanation is
tested on contexts that it was not written from."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from saemill.assess.config import AssessConfig
from saemill.assess.evalset import EvalSet
from saemill.assess.explained import summary
from saemill.assess.inputs import open_run
from saemill.assess.write import show_explanations
from saemill.common import durable, records
from saemill.common.errors import ConfigError, MissingError, StoreError
from saemill.common.log import say
from saemill.common.ranges import parsed
from saemill.common.setting import identity
from saemill.common.signals import stop_on_signal
from saemill.common.stores import assessments, explanations, runs
from saemill.common.stores import features as shown_latents
from saemill.common.stores.explanations import Explained, Explanations
from saemill.common.stores.features import Features, Latent
from saemill.common.stores.followed import FollowedStore
from saemill.common.world import World
from saemill.explain import scores
from saemill.explain.answers import Answers
from saemill.explain.asking import Asking
from saemill.explain.config import N_LATENTS, ExplainConfig
from saemill.explain.contexts import divide
from saemill.explain.endpoint import Endpoint
from saemill.explain.neighbours import Neighbours
from saemill.explain.rounds import Divided, explained
from saemill.explain.silent import Silent


def run(config: ExplainConfig) -> Explanations:
    """Explain latents, score the explanations, and show both on the assessment's page.

    Every answer is on disk before the next question is asked; what is there is not asked again.

    Returns: the content of `explanations.json`.

    Raises:
        StoreError: the run was not assessed, or something of it is missing or damaged.
        ConfigError: settings that do not fit.
        EndpointError: the endpoint does not answer, or not as it should.
        Interrupted: a signal came; the same command goes on.
    """
    if (n := World.here().size) > 1:
        raise ConfigError(f"explain is of one process, got {n}; start it without torchrun or srun")
    key, folder = config.key, config.run.absolute()
    shown = _shown(folder)
    latents = _chosen(config, shown)
    with durable.exclusive(folder), stop_on_signal() as stop:
        found = _found(config, folder)
        if found is None:
            sides = _sides(config, folder, shown, latents)
            endpoint = Endpoint(config.url, key, config.api_key_env, config.timeout_seconds, stop)
            asking = Asking(endpoint, Answers(folder / runs.ANSWERS), config.at_once, stop)
            try:
                found = _write(config, folder, shown, explained(config, sides, asking))
            finally:
                asking.close()
        show_explanations(folder)
    say(f"{summary(found)}\n{folder / runs.EXPLANATIONS}, {runs.ANSWERS}; shown in {runs.REPORT}")
    return found


def _shown(folder: Path) -> Features:
    """Read the latents that an assessment shows.

    Raises:
        StoreError: there is no assessment, or it is damaged.
        ConfigError: it is of other tokens than the cache's, or shows none.
    """
    if not (folder / assessments.FILE).exists():
        raise MissingError(
            f"{folder} has no {assessments.FILE}, whose latents are explained; run `saemill assess {folder}`"
        )
    if not runs.is_finished(folder):
        raise StoreError(
            f"{folder} holds an assessment that was written elsewhere than into its run; name a run that was "
            "assessed without --out"
        )
    # A page that was being written anew when a crash came is written once more at the end.
    bad = [line for line in assessments.problems(folder) if not line.startswith(str(folder / runs.REPORT))]
    if bad:
        raise StoreError("\n".join([*bad, assessments.REPAIR]))
    if assessments.load(folder).settings.get("tokens") is not None:
        raise ConfigError(
            f"{folder} was assessed on other tokens than those that are cached, where it cannot be checked "
            "that a latent is silent; name a run that was assessed without --tokens"
        )
    shown = shown_latents.load(folder)
    if not shown.latents:
        raise ConfigError(
            f"the assessment of {folder} shows no latents; run `saemill assess` with --n-latents"
        )
    if any(latent.smallest < 0 for latent in shown.latents):
        raise ConfigError(
            f"latents of {shown.variant} fire above and below 0, which one explanation cannot tell of; name "
            "a run that was assessed with --variant of another architecture"
        )
    return shown


def _chosen(config: ExplainConfig, shown: Features) -> list[Latent]:
    """Choose the latents to explain, in the order of the page.

    Raises:
        ConfigError: one is named that the page does not show.
    """
    if not config.latents:
        return list(shown.latents[: config.n_latents or N_LATENTS])
    asked = {latent for item in config.latents for latent in parsed(item)}
    chosen = [latent for latent in shown.latents if latent.latent in asked]
    if missing := sorted(asked - {latent.latent for latent in chosen}):
        raise ConfigError(
            f"latents: the assessment does not show {', '.join(map(str, missing[:5]))}"
            f"{', …' if len(missing) > 5 else ''} of {shown.variant}; run `saemill assess` with --latents "
            f"{missing[0]}, or name those on the page"
        )
    return chosen


def _found(config: ExplainConfig, folder: Path) -> Explanations | None:
    """Read explanations that are there already, of the same contexts by the same settings."""
    path = folder / runs.EXPLANATIONS
    if not path.exists() or explanations.problems(folder):
        return None
    found = explanations.load(folder)
    same = (found.features, found.settings) == (durable.hash_file(folder / runs.FEATURES), identity(config))
    if same:
        say(f"{path} is there already, of these latents and settings")
    return found if same else None


def _sides(config: ExplainConfig, folder: Path, shown: Features, latents: Sequence[Latent]) -> Divided:
    """Divide the contexts of each latent, silent ones checked on the cache."""
    task = AssessConfig(
        run=folder,
        acts=config.acts,
        with_acts=config.with_acts,
        local_cache=config.local_cache,
        variant=shown.variant,
    )
    world = World.here()
    device = world.device(config.device)
    with world.connected(device) as everyone:
        trained = open_run(task, device)
        if isinstance(trained.store, FollowedStore):
            raise ConfigError(
                f"shards of {trained.store.path} were removed when they had been trained on, so that it "
                "cannot be checked where a latent is silent; cache them again"
            )
        sae = trained.saes[shown.variant]
        evalset = EvalSet(trained.store, None, None, trained.mask, [str(sae.site)], 1, everyone)
        silent, neighbours = Silent(sae, evalset), Neighbours(sae, evalset, latents)
        return {latent.latent: divide(latent, silent, neighbours) for latent in latents}


def _write(
    config: ExplainConfig, folder: Path, shown: Features, latents: Sequence[Explained]
) -> Explanations:
    """Write `explanations.json`, which answers for the file of answers."""
    answers = (folder / runs.ANSWERS).read_bytes() if (folder / runs.ANSWERS).exists() else b""
    silent = scores.means([(each.score, each.shuffled) for each in latents])
    near = scores.means([(each.near_score, each.near_shuffled) for each in latents])
    found = Explanations(
        of=shown.of,
        variant=shown.variant,
        features=durable.hash_file(folder / runs.FEATURES),
        url=config.url,
        model=config.model,
        settings=identity(config),
        latents=tuple(latents),
        score=silent.score,
        shuffled=silent.shuffled,
        difference=silent.difference,
        near_score=near.score,
        near_shuffled=near.shuffled,
        near_difference=near.difference,
        answers_bytes=len(answers),
        answers_xxh3=durable.hash_bytes(answers),
        version=version("saemill"),
    )
    records.write(folder / runs.EXPLANATIONS, found)
    return found
