"""The whole pipeline as one command: run, or plan; and many of them: matrix."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from saemill.assess.config import AssessConfig
from saemill.cache.config import CacheConfig
from saemill.commands.flags import Config, DryRun, NoProbe, flag, is_planned, option, with_flags
from saemill.common.setting import DEVICE, marks_of
from saemill.common.weights import Weights
from saemill.pipeline.config import RunConfig
from saemill.tokenize.config import TokenizeConfig
from saemill.train.config import TrainConfig

CONFIGS = {
    "tokenize": TokenizeConfig,
    "cache": CacheConfig,
    "train": TrainConfig,
    "assess": AssessConfig,
    "run": RunConfig,
}
FLAGS = (
    *("cache.layers", "cache.layer_stride"),
    flag("cache.sites", "--sites", "--hookpoints"),
    *("train.architecture", "train.k", "train.target_l0", "train.expansion_factor", "train.num_latents"),
    flag("train.seeds", "--seeds", "--init-seeds"),
    "train.lr",
    flag("tokenize.max_tokens", help="Tokens to read and cache", by_default="all of the dataset"),
    flag("train.epochs", help="Passes of training over them", by_default="1"),
    "tokenize.ctx_len",
    flag("train.batch_size", help="Tokens, not rows, per batch"),
    "train.grad_acc_steps",
    *("tokenize.split", "tokenize.subset", "tokenize.text_column", "tokenize.chat_column"),
    flag("train.mask.roles", "--train-on"),
    "tokenize.streaming",
    *("tokenize.held_out_fraction", "tokenize.shuffle_seed"),
    flag("tokenize.repack", "--repack"),
    flag("tokenize.num_proc", "--num-proc", "--data-preprocessing-num-proc"),
    flag("tokenize.tokenizer", by_default="the model's own"),
    "cache.revision",
    flag("cache.load_in_8bit", by_default="off"),
    flag("cache.load_in_4bit", by_default="off"),
    flag("cache.attn_implementation", by_default="transformers' choice"),
    flag("cache.trust_remote_code", "--trust-remote-code"),
    flag("train.loss", "--loss", "--loss-fn"),
    *("train.optimizer", "train.weight_decay"),
    flag("train.warmup_steps", "--warmup-steps", "--lr-warmup-steps"),
    "train.auxk_alpha",
    flag("train.dead_after_tokens", "--dead-after-tokens", "--dead-feature-threshold"),
    flag(
        "assess.dead_percentage_threshold",
        help="A latent active on a smaller share of tokens is dead when assessed",
    ),
    flag("run.follow", "--follow"),
    "train.follow_tokens",
    "cache.max_disk",
    flag("cache.delete_consumed", "--delete-consumed"),
    *("train.save_every", "run.save_dir", "run.run_name", "train.resume"),
    *("train.eval_every", "train.n_checkpoints"),
    *("train.log_to_wandb", "train.wandb_project"),
    flag("train.log_every", "--wandb-log-frequency", help="Steps between log lines, there and here"),
)
"""What `run` has flags for, in the order of its help; any other setting goes by `--set stage.key=value`."""


Model = Annotated[str | None, typer.Argument(help="Hub id or folder of the model; or a config file, alone.")]
Dataset = Annotated[str | None, typer.Argument(help="Hub id, file or folder of the text.")]
Device = Annotated[str | None, option(f"{DEVICE} [auto].", "NAME")]
DeviceMap = Annotated[str | None, option(f"{marks_of(Weights, 'device_map').help}.", "auto")]
MaxMemory = Annotated[list[str] | None, option(f"{marks_of(Weights, 'max_memory').help}.", "DEVICE=SIZE,…")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="STAGE.KEY=VALUE", help="Any setting of any stage: train.lr_decay=cosine."),
]


@with_flags(CONFIGS, *FLAGS)
def run(
    *,
    model: Model = None,
    dataset: Dataset = None,
    flags: Mapping[str, Any],
    device: Device = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    config: Config = None,
    set_: Sets = None,
    dry_run: DryRun = False,
    no_probe: NoProbe = False,
) -> None:
    """All stages at once: tokenize, cache, train, assess. What was done before is found again.

    Tokens, activations and runs are kept in `--save-dir` by what they were made of: the same command with
    another k goes straight to training. Flags of sparsify and saetrain are known; batches count tokens.

    Example: `saemill run EleutherAI/pythia-160m corpus.jsonl.gz --layers 6 --max-tokens 1M --k 16,64`

    Example: `saemill run configs/pythia-160m.yaml`
    """
    is_plan = is_planned(dry_run, no_probe)
    chain = _chain(model, dataset, flags, _once(device, device_map, max_memory), config, set_, is_plan)
    if is_plan:
        _plan(chain, no_probe)
    else:
        chain()


@with_flags(CONFIGS, *FLAGS)
def plan(
    *,
    model: Model = None,
    dataset: Dataset = None,
    flags: Mapping[str, Any],
    device: Device = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    config: Config = None,
    set_: Sets = None,
    no_probe: Annotated[
        bool, typer.Option("--no-probe", help="Do not run a little of each stage to estimate its time.")
    ] = False,
) -> None:
    """Tell what `saemill run` with the same words would do, need and take; nothing is written.

    Everything is checked as in a real run. Then each stage's disk, files and memory follow from the settings,
    and its time from a little of it that is run in a temporary folder. `--device cuda` plans for a GPU of
    another machine, without times.

    Example: `saemill plan configs/pythia-160m.yaml`

    Example: `saemill plan EleutherAI/pythia-160m corpus.jsonl.gz --layers 6 --max-tokens 1M --k 16,64`
    """
    once = _once(device, device_map, max_memory)
    _plan(_chain(model, dataset, flags, once, config, set_, is_plan=True), no_probe)


def _once(device: str | None, device_map: str | None, max_memory: list[str] | None) -> dict[str, Any]:
    """Collect what is said once for several stages."""
    return {"device": device, "device_map": device_map, "max_memory": ",".join(max_memory or ()) or None}


def _chain(
    model: str | None,
    dataset: str | None,
    flags: Mapping[str, Any],
    once: Mapping[str, Any],
    config: Path | None,
    sets: list[str] | None,
    is_plan: bool,
) -> Any:
    """Make the stages that the words of a command mean."""
    from saemill.pipeline.run import chain_of

    file, named = _config_file(model, dataset, config)
    return chain_of(named, dataset, {**flags, **once}, file, sets or (), is_plan)


def _plan(chain: Any, no_probe: bool) -> None:
    """Tell the plan of some stages."""
    from saemill.plan.run import of_chain

    of_chain(chain, not no_probe)


def _config_file(
    model: str | None, dataset: str | None, config: Path | None
) -> tuple[Path | None, str | None]:
    """Tell the config file from the model: `saemill run CONFIG.yaml` has the former in the latter's place."""
    if model and dataset is None and Path(model).suffix in (".yaml", ".yml"):
        if config:
            raise typer.BadParameter(f"two config files: {model} and {config}; name one")
        return Path(model), None
    return config, model


def matrix(
    config: Annotated[Path, typer.Argument(help="YAML file with the section matrix.")],
    target: Annotated[
        list[str] | None, typer.Option(help="Only this model of it; repeat for several.", metavar="NAME")
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option(help="Only this dataset of it; repeat for several.", metavar="NAME")
    ] = None,
    dry_run: DryRun = False,
    no_probe: NoProbe = False,
) -> None:
    """Models × datasets × layers × seeds: every pair cached once, all its SAEs trained at once.

    Goes on where it was; pairs that are done are not done again, even when their stores were deleted.
    Ends with a table over seeds, and how alike the dictionaries of different seeds and sources are.

    Example: `saemill matrix configs/matrix.yaml`
    """
    names = tuple(target or ()), tuple(source or ())
    if is_planned(dry_run, no_probe):
        from saemill.plan.run import of_matrix

        of_matrix(config, *names, measures=not no_probe)
    else:
        from saemill.pipeline.matrix import run as run_all

        run_all(config, *names)
