"""The stages from Python: settings by keyword, results as objects.

    tokens = tokenize_text("corpus.parquet", "tokens", tokenizer="gpt2")
    acts = cache_activations(tokens, "acts", model="gpt2", layers=[6])
    run = train_saes(acts, "runs/first", site="layers.6", k=[16, 32])
    assessment = assess_saes(run)

Each is what the command of its name does: the same settings (docs/settings.md), the same files, found again
or gone on with when it is called again. Settings may come as the stage's config in place of keywords.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from saemill.common.config import build
from saemill.common.errors import ConfigError

if TYPE_CHECKING:
    from saemill.assess.config import AssessConfig
    from saemill.cache.config import CacheConfig
    from saemill.common.stores.activations import ActivationStore
    from saemill.common.stores.assessments import Assessment
    from saemill.common.stores.tokens import TokenStore
    from saemill.results import Run
    from saemill.tokenize.config import TokenizeConfig
    from saemill.train.config import TrainConfig

C = TypeVar("C")
PathLike = Path | str


def tokenize_text(
    dataset: "PathLike | TokenizeConfig", out: PathLike | None = None, **settings: Any
) -> "TokenStore":
    """Turn documents into packed rows of token ids, as `saemill tokenize` does.

    Args:
        dataset: a hub id, a file or a folder; or a config with all settings.
        out: folder to write; a finished one is found again.
        settings: `tokenizer`, which is needed, and others by their names.

    Returns: the tokens.

    Raises:
        ConfigError: unknown settings, or such that do not fit the data.
        DataError: no text.
    """
    from saemill.tokenize.config import TokenizeConfig
    from saemill.tokenize.run import run

    return run(_config(TokenizeConfig, "tokenize", settings, dataset=dataset, out=out))


def cache_activations(
    tokens: "TokenStore | PathLike | CacheConfig", out: PathLike | None = None, **settings: Any
) -> "ActivationStore":
    """Run a transformer over the rows once and store its activations, as `saemill cache` does.

    Args:
        tokens: the rows; or a config with all settings.
        out: activation store, new or to be added to.
        settings: `model` and one of `layers`, `sites`, `layer_stride`, and others by their names.

    Returns: the activations.

    Raises:
        ConfigError: unknown settings, or such that do not fit the model or the tokens.
        DataError: NaN or infinite activations.
        Interrupted: the kernel was interrupted; the same call goes on.
    """
    from saemill.cache.config import CacheConfig
    from saemill.cache.run import run

    return run(_config(CacheConfig, "cache", settings, tokens=tokens, out=out))


def train_saes(
    acts: "ActivationStore | PathLike | TrainConfig", out: PathLike | None = None, **settings: Any
) -> "Run":
    """Train many SAEs at once over one shuffled stream of activations, as `saemill train` does.

    Args:
        acts: the activations; or a config with all settings.
        out: folder of the run; a finished one is found again, an unfinished one gone on with.
        settings: by their names; lists form a grid, `variants` is a list of SAEs one by one.

    Returns: the run, with its SAEs by name.

    Raises:
        ConfigError: unknown settings, or such that do not fit the activations.
        Interrupted: the kernel was interrupted; the same call goes on.
    """
    from saemill.results import Run
    from saemill.train.config import TrainConfig
    from saemill.train.run import run

    config = _config(TrainConfig, "train", settings, acts=acts, out=out)
    run(config)
    return Run(config.out)


def assess_saes(
    run: "Run | PathLike | AssessConfig", out: PathLike | None = None, **settings: Any
) -> "Assessment":
    """Measure each SAE of a run on tokens that training did not see, as `saemill assess` does.

    Args:
        run: the run; or a config with all settings.
        out: where to write the assessment and the report; by default the run's folder.
        settings: by their names.

    Returns: the assessment; `assessment["layers.6-k16-f6144-s0"].metrics["fvu"].value` is a figure of it.

    Raises:
        ConfigError: unknown settings, or such that do not fit the run.
        StoreError: the run is not finished, or its activations are not to be found.
    """
    from saemill.assess.config import AssessConfig
    from saemill.assess.run import run as run_stage
    from saemill.common.stores import assessments

    return assessments.checked(run_stage(_config(AssessConfig, "assess", settings, run=run, out=out)))


def _config(cls: type[C], section: str, settings: dict[str, Any], **own: Any) -> C:
    """Make a stage's config of its settings; a config in place of the first is taken as it is.

    Raises:
        ConfigError: settings beside a config, or such as the stage does not have.
    """
    first = next(iter(own.values()))
    given = {name: value for name, value in own.items() if value is not None}
    if not isinstance(first, cls):
        return build(cls, {name: _plain(value) for name, value in (given | settings).items()}, section)
    if len(given) > 1 or settings:
        beside = ", ".join([*list(given)[1:], *settings])
        raise ConfigError(f"{beside} beside a {cls.__name__}; put it into the config")
    return first


def _plain(value: Any) -> Any:
    """Turn a path, or a store or run that is given as an object, into the text that settings take."""
    value = getattr(value, "path", value)
    return str(value) if isinstance(value, Path) else value
