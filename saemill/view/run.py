"""`saemill view`: a run's page, served on this machine with every latent at hand."""

import time
from pathlib import Path

from saemill.assess.config import AssessConfig
from saemill.assess.evalset import EvalSet
from saemill.assess.features import Describer, Wanted, choose_latents
from saemill.assess.inputs import Trained, open_run
from saemill.assess.latent import sae_of
from saemill.assess.report.page import Live
from saemill.common.device import choose_device
from saemill.common.errors import MissingError, StoreError
from saemill.common.log import say
from saemill.common.sae.sae import Sae
from saemill.common.stores import assessments, explanations, features
from saemill.common.stores.assessments import Assessment
from saemill.common.world import Group
from saemill.view.config import ViewConfig
from saemill.view.page import LivePage
from saemill.view.server import Server
from saemill.view.trial import Trial


def run(config: ViewConfig) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        StoreError: the run is not assessed, or its activations are not to be found.
        ConfigError: it is not clear which SAE is meant, or the port is in use.
    """
    with open_server(config) as server:
        say(f"{server.address} has the page of {config.run}; Ctrl-C ends it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("ended")


def open_server(config: ViewConfig) -> Server:
    """Find where all latents of the SAE fire, and make a server of the page; see `run`."""
    folder, name = sae_of(config.run.absolute())
    assessment = _assessment(folder)
    started = time.perf_counter()
    device = choose_device(config.device)
    task = AssessConfig(
        run=folder, acts=config.acts, with_acts=config.with_acts, local_cache=config.local_cache, variant=name
    )
    trained = open_run(task, device)
    sae = trained.saes[name]
    densities = assessments.densities(folder)
    live = densities[name] >= assessment.data.dead_percentage_threshold
    describer = _describer(config, trained, name, int(live.sum()))
    shown = features.load(folder)
    same = shown.variant == name
    latents = (
        [latent.latent for latent in shown.latents]
        if same
        else choose_latents(live, (), max(1, len(shown.latents)))
    )
    described = describer.features(latents, assessment.of)
    page = LivePage(describer, described, explanations.beside(folder, described))
    trial = Trial(sae, trained.store, trained.mask, config.model, device)
    told = Live(page.n_latents, trial.missing, trial.no_steering)
    most_bytes = int(assessment.settings["page_bytes"])
    html = page.html(assessment.model_dump(mode="json"), densities, told, most_bytes)
    say(f"{page.n_latents:,} latents of {name} searched in {time.perf_counter() - started:.1f} s")
    return Server(config.port, html, page, trial)


def _assessment(folder: Path) -> Assessment:
    """Load the run's assessment.

    Raises:
        StoreError: it has none, or one of its files is damaged.
    """
    try:
        if bad := assessments.problems(folder):
            raise StoreError("\n".join([*bad, assessments.REPAIR]))
        return assessments.load(folder)
    except MissingError:
        raise StoreError(f"{folder} is not assessed; run `saemill assess {folder}` first") from None


def _describer(config: ViewConfig, trained: Trained, name: str, n_live: int) -> Describer:
    """Search the cache for the firings of all latents."""
    sae: Sae = trained.saes[name]
    wanted = Wanted(
        asked=(),
        n_live=n_live,
        n_contexts=config.n_contexts,
        n_samples=config.n_samples,
        context_tokens=config.context_tokens,
    )
    evalset = EvalSet(trained.store, None, None, trained.mask, [str(sae.site)], 1, Group([0], 0))
    latents = range(sae.config.num_latents)
    return Describer(wanted, latents, name, trained.saes, evalset, config.model)
