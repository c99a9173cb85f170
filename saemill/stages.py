"""The stages from Python: settings by keyword, results as objects.

    tokens = tokenize_text("corpus.parquet", "tokens", tokenizer="gpt2")
    acts = cache_activations(tokens, "acts", model="gpt2", layers=[6])  # or a model in memory
    run = train_saes(acts, "runs/first", site="layers.6", k=[16, 32])  # or both: cache_and_train
    assessment = assess_saes(run)

Each is what the command of its name does: the same settings (docs/settings.md), the same files, found again
or gone on with when it is called again. Settings may come as the stage's config in place of keywords.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
OF_A_NAMED_MODEL = (
    *("revision", "model_dtype", "load_in_8bit", "load_in_4bit", "device_map", "max_memory"),
    *("trust_remote_code", "attn_implementation"),
)
"""Settings of how a model is loaded."""
PathLike = Path | str


def tokenize_text(
    dataset: "PathLike | TokenizeConfig | Any", out: PathLike | None = None, **settings: Any
) -> "TokenStore":
    """Turn documents into packed rows of token ids, as `saemill tokenize` does.

    Args:
        dataset: a hub id, a file or a folder; a list of texts, or a `Dataset`, `DatasetDict` or
            `IterableDataset` of `datasets`, taken as it is; or a config with all settings.
        out: folder to write; a finished one is found again.
        settings: `tokenizer`, which is needed, and others by their names.

    Returns: the tokens.

    Raises:
        ConfigError: unknown settings, or such that do not fit the data.
        DataError: no text.
    """
    from saemill.tokenize import memory
    from saemill.tokenize.config import TokenizeConfig
    from saemill.tokenize.run import run

    if isinstance(dataset, str | Path | TokenizeConfig):
        return run(_config(TokenizeConfig, "tokenize", settings, dataset=dataset, out=out))
    return run(_config(TokenizeConfig, "tokenize", settings, dataset=memory.NAME, out=out), dataset)


def cache_activations(
    tokens: "TokenStore | PathLike | CacheConfig", out: PathLike | None = None, **settings: Any
) -> "ActivationStore":
    """Run a transformer over the rows once and store its activations, as `saemill cache` does.

    Args:
        tokens: the rows; or a config with all settings.
        out: activation store, new or to be added to.
        settings: `model`, a name or a transformers model that is taken as it is, where it is; one of
            `layers`, `sites`, `layer_stride`; and others by their names.

    Returns: the activations.

    Raises:
        ConfigError: unknown settings, or such that do not fit the model or the tokens.
        DataError: NaN or infinite activations.
        Interrupted: the kernel was interrupted; the same call goes on.
    """
    from saemill.cache.config import CacheConfig
    from saemill.cache.run import run

    model, settings = _model_in(settings, *OF_A_NAMED_MODEL, "device")
    if model is None:
        return run(_config(CacheConfig, "cache", settings, tokens=tokens, out=out))
    from saemill.common.models.model import name_of

    config = _config(CacheConfig, "cache", settings | {"model": name_of(model)}, tokens=tokens, out=out)
    with _evaluating(model):
        return run(config, model)


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


def cache_and_train(
    tokens: "TokenStore | PathLike",
    acts: PathLike,
    out: PathLike,
    *,
    cache: Mapping[str, Any],
    **settings: Any,
) -> "Run":
    """Train on activations while they are made, as `saemill run --follow` does: this process caches, another
    one trains.

    Args:
        tokens: the rows.
        acts: activation store, new or to be gone on with.
        out: folder of the run.
        cache: settings of the store, as of `cache_activations`: `model`, a name or a transformers model, is
            needed; `max_disk` and `delete_consumed` bound the room that it takes.
        settings: of the training, as of `train_saes`; `site` is needed.

    Returns: the run, with its SAEs by name.

    Raises:
        ConfigError: unknown settings, or such that do not fit.
        StoreError: training failed; what went wrong was printed by it.
        Interrupted: the kernel was interrupted; the same call goes on.
    """
    from saemill.cache.config import CacheConfig
    from saemill.pipeline import together
    from saemill.results import Run
    from saemill.train.config import TrainConfig

    model, caching = _model_in(dict(cache), *OF_A_NAMED_MODEL, "device")
    if model is not None:
        from saemill.common.models.model import name_of

        caching["model"] = name_of(model)
    training = _config(TrainConfig, "train", {"follow": True, **settings}, acts=acts, out=out)
    with _evaluating(model):
        config = _config(CacheConfig, "cache", caching, tokens=tokens, out=acts)
        together.check_room(config, training, model)
        together.cache_and_train(config, training, model)
    return Run(training.out)


def assess_saes(
    run: "Run | PathLike | AssessConfig", out: PathLike | None = None, **settings: Any
) -> "Assessment":
    """Measure each SAE of a run on tokens that training did not see, as `saemill assess` does.

    Args:
        run: the run; or a config with all settings.
        out: where to write the assessment and the report; by default the run's folder.
        settings: by their names; `model` may be a transformers model in memory.

    Returns: the assessment; `assessment["layers.6-k16-f6144-s0"].metrics["fvu"].value` is a figure of it.

    Raises:
        ConfigError: unknown settings, or such that do not fit the run.
        StoreError: the run is not finished, or its activations are not to be found.
    """
    from saemill.assess.config import AssessConfig
    from saemill.assess.run import run as run_stage
    from saemill.common.stores import assessments

    model, settings = _model_in(settings, "with_model", "device_map", "max_memory")
    config = _config(AssessConfig, "assess", settings, run=run, out=out)
    with _evaluating(model):
        return assessments.checked(run_stage(config, model))


def _model_in(settings: dict[str, Any], *without_effect: str) -> tuple[Any, dict[str, Any]]:
    """Part a model in memory, if one is given, from the other settings; those without effect beside it are
    refused.

    Raises:
        ConfigError: a setting has no effect on it.
    """
    model = settings.get("model")
    if model is None or isinstance(model, str | Path):
        return None, settings
    if not hasattr(model, "state_dict") or not hasattr(model, "config"):
        raise ConfigError(f"model must be a name or a transformers model, got {type(model).__name__}")
    if named := [name for name in without_effect if name in settings]:
        raise ConfigError(
            f"{named[0]} has no effect beside a model in memory, which is as it is; leave it out"
        )
    return model, {name: value for name, value in settings.items() if name != "model"}


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Put a model in memory into evaluation mode while the block runs."""
    was_training = model is not None and model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


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
