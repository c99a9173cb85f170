"""The passes over the evaluation tokens: all SAEs of the run, and the baselines of the best.

Where all SAEs are of one shape with one k, so are the best's baselines, whichever it is: they are fitted
beforehand and everything is measured in one pass. Of several shapes the best is known only after a first
pass, and so is the mean L0 of one without a k. A second then measures its two baselines alone, and reuses
from the first what does not depend on an SAE: the variance of the activations, the losses of the untouched
model, of zeros and of the mean.
"""

from saemill.assess.baselines import fit_baselines
from saemill.assess.config import AssessConfig
from saemill.assess.entries import Entry, Measured
from saemill.assess.evalset import EvalSet
from saemill.assess.reconstruction import Reconstruction
from saemill.assess.splicing import Splicing
from saemill.common.errors import ConfigError
from saemill.common.models.model import LanguageModel
from saemill.common.sae.sae import Sae
from saemill.common.steer.losses import no_loss
from saemill.common.stores.passages import PassageStore


def measure(
    config: AssessConfig,
    saes: dict[str, Sae],
    left_out: dict[str, tuple[Sae, str]],
    evalset: EvalSet,
    model: LanguageModel | None,
) -> tuple[Measured, list[Entry], Measured]:
    """Measure the SAEs of a run and the best's baselines.

    Args:
        config: how many tokens, and what counts as healthy.
        saes: variant name → SAE.
        left_out: variants that are only listed, each with the reason.
        evalset: the tokens.
        model: for the losses, if there are any.

    Returns: the SAEs' figures, their entries (best first), the baselines' figures.

    Raises:
        ConfigError: no token is left to measure on.
    """
    why_no_loss = None if model is None else no_loss(model, evalset.tokens, int(evalset.rows_R[0]))
    if baselines := _certain_baselines(saes, evalset):
        both = _pass(config, saes | baselines, evalset, model, why_no_loss)
        trained = both.only(saes)
        return trained, trained.ranking(left_out), both.only(baselines)
    trained = _pass(config, saes, evalset, model, why_no_loss)
    entries = trained.ranking(left_out)
    best = saes[entries[0]["name"]]
    site = site_of(best)
    site_evalset = evalset.at(site, " controls")
    baselines = fit_baselines(best, best.config.k or mean_k(entries[0]), site, site_evalset)
    return trained, entries, _pass(config, baselines, site_evalset, model, why_no_loss, known=trained)


def mean_k(entry: Entry) -> int:
    """Return how many latents of an SAE with thresholds are active per token: its L0, rounded, at least 1."""
    return max(1, round(entry["metrics"]["l0"]["value"] or 0))


def site_of(sae: Sae) -> str:
    """Return the site that an SAE of a run reconstructs, or a transcoder predicts."""
    return str(sae.target_site)


def _certain_baselines(saes: dict[str, Sae], evalset: EvalSet) -> dict[str, Sae]:
    """Fit the best variant's baselines ahead, if they are the same whichever it is and share no name with an
    SAE."""
    sae, *others = saes.values()
    k = sae.config.k
    if k is None or any(_shape(other) != _shape(sae) for other in others):
        return {}
    baselines = fit_baselines(sae, k, site_of(sae), evalset)
    return {} if baselines.keys() & saes.keys() else baselines


def _shape(sae: Sae) -> tuple[str, int | None, int]:
    """Return what the baselines of an SAE depend on."""
    return site_of(sae), sae.config.k, sae.config.num_latents


def _pass(
    config: AssessConfig,
    saes: dict[str, Sae],
    evalset: EvalSet,
    model: LanguageModel | None,
    why_no_loss: str | None,
    known: Measured | None = None,
) -> Measured:
    """Measure some SAEs on the evaluation tokens; the losses, or why there are none.

    Args:
        known: what another pass over the same tokens said of the activations and of the model.
    """
    sites = {name: site_of(sae) for name, sae in saes.items()}
    reconstruction = Reconstruction(saes, sites, evalset, known.reconstruction if known else None)
    reconstruction.run(evalset.chunks(config.max_tokens))
    if reconstruction.n_tokens == 0:
        raise ConfigError("every position of the evaluation tokens is masked or was seen in training")
    splicing = known.splicing if known else _losses(evalset, model)
    if not isinstance(splicing, str):
        assert model is not None
        splicing = Splicing(saes, sites, evalset, model, why_no_loss, splicing).run(config.model_tokens)
        if splicing.n_tokens == 0:
            splicing = "no position to predict in the evaluation rows"
    return Measured(reconstruction, splicing, config.thresholds, config.dead_percentage_threshold)


def _losses(evalset: EvalSet, model: LanguageModel | None) -> str | None:
    """Say why there are no losses, if there are none."""
    if isinstance(evalset.text, PassageStore):
        return "embeddings have no language model"
    if model is None:
        return "run with --no-model"
    return None if model.head is not None else f"{model.name} has no language-model head"
