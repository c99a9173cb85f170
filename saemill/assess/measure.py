"""The passes over the evaluation tokens: all SAEs of the run, and the baselines of each.

Where every SAE has a k, the baselines are fitted beforehand and everything is measured in one pass. The mean
L0 of one without is known only after a first pass. A second then measures the baselines alone, and reuses
from the first what does not depend on an SAE: the variance of the activations, the losses of the untouched
model, of zeros and of the mean.

SAEs that were trained with a frozen decoder beside others alike are baselines as well, of these. Transcoders
of one layer each that are measured together stand beside them, and no verdict rests on them.
"""

from collections.abc import Sequence

from saemill.assess.baselines import fit_baselines, site_of
from saemill.assess.config import AssessConfig
from saemill.assess.entries import Beside, Entry, Measured
from saemill.assess.evalset import EvalSet
from saemill.assess.frozen import frozen_twins
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
    sets: dict[str, Sae],
    evalset: EvalSet,
    models: Sequence[LanguageModel],
) -> tuple[Measured, Beside, list[Entry]]:
    """Measure the SAEs of a run and their baselines.

    Args:
        config: how many tokens, and what counts as healthy.
        saes: variant name → SAE.
        sets: name → transcoders of some of these together, which are listed among the controls.
        evalset: the tokens.
        models: for the losses, if there are any; of a run on two models both.

    Returns: the SAEs' figures, the baselines', the baselines' entries.

    Raises:
        ConfigError: no token is left to measure on.
    """
    first = int(evalset.rows_R[0])
    why_no_loss = next((why for model in models if (why := no_loss(model, evalset.tokens, first))), None)
    measured = saes | sets
    if _are_known(measured):
        baselines = fit_baselines(measured, {}, evalset)
        every = untrained = _pass(config, measured | baselines.saes, evalset, models, why_no_loss)
    else:
        every = _pass(config, measured, evalset, models, why_no_loss)
        again = evalset.again(" controls")
        baselines = fit_baselines(measured, every.reconstruction.mean_l0s(), again)
        untrained = _pass(config, baselines.saes, again, models, why_no_loss, known=every)
    twins = frozen_twins(saes)
    frozen = list(dict.fromkeys(twins.values()))  # in one order on every process
    trained = every.only([name for name in saes if name not in frozen])
    of = {name: dict(kinds) for name, kinds in baselines.of.items()}
    for name, twin in twins.items():
        of[name]["frozen"] = twin
    own = [*sets, *frozen]
    beside = Beside(dict.fromkeys(own, every) | dict.fromkeys(baselines.saes, untrained), of)
    controls = every.only(own).entries(beside) if own else []
    controls += untrained.only(baselines.saes).entries(beside)
    kind_of = {other: kind for kinds in of.values() for kind, other in kinds.items()}
    kind_of |= dict.fromkeys(sets, "together")
    controls = [entry | {"control": kind_of[entry["name"]]} for entry in controls]
    return trained, beside, controls


def _are_known(saes: dict[str, Sae]) -> bool:
    """Tell whether the SAEs' own k say which baselines they need."""
    return all(sae.config.k is not None for sae in saes.values())


def _pass(
    config: AssessConfig,
    saes: dict[str, Sae],
    evalset: EvalSet,
    models: Sequence[LanguageModel],
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
    splicing = known.splicing if known else _losses(evalset, models)
    if not isinstance(splicing, str):
        splicing = Splicing(saes, sites, evalset, models, why_no_loss, splicing).run(config.model_tokens)
        if splicing.n_tokens == 0:
            splicing = "no position to predict in the evaluation rows"
    return Measured(reconstruction, splicing, config.thresholds, config.dead_percentage_threshold)


def _losses(evalset: EvalSet, models: Sequence[LanguageModel]) -> str | None:
    """Say why there are no losses, if there are none."""
    if isinstance(evalset.text, PassageStore):
        return "embeddings have no language model"
    if not models:
        return "run with --no-model"
    if without := [model.name for model in models if model.head is None]:
        return f"{without[0]} has no language-model head"
    if len({model.head for model in models}) > 1:
        names = " and ".join(f"{model.name} ({model.head})" for model in models)
        return f"the losses of {names} are of different tokens"
    return None
