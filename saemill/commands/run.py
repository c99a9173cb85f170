"""The whole pipeline as one command: run; and many of them: matrix."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from saemill.assess.config import AssessConfig
from saemill.cache.config import CacheConfig
from saemill.commands.flags import Config, flag, option, with_flags
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


@with_flags(CONFIGS, *FLAGS)
def run(
    *,
    model: Annotated[
        str | None, typer.Argument(help="Hub id or folder of the model; or a config file, alone.")
    ] = None,
    dataset: Annotated[str | None, typer.Argument(help="Hub id, file or folder of the text.")] = None,
    flags: Mapping[str, Any],
    device: Annotated[str | None, option(f"{DEVICE} [auto].", "NAME")] = None,
    device_map: Annotated[str | None, option(f"{marks_of(Weights, 'device_map').help}.", "auto")] = None,
    max_memory: Annotated[
        list[str] | None, option(f"{marks_of(Weights, 'max_memory').help}.", "DEVICE=SIZE,…")
    ] = None,
    config: Config = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="STAGE.KEY=VALUE", help="Any setting of any stage: train.lr_decay=cosine."
        ),
    ] = None,
) -> None:
    """All stages at once: tokenize, cache, train, assess. What was done before is found again.

    Tokens, activations and runs are kept in `--save-dir` by what they were made of: the same command with
    another k goes straight to training. Flags of sparsify and saetrain are known; batches count tokens.

    Example: `saemill run EleutherAI/pythia-160m corpus.jsonl.gz --layers 6 --max-tokens 1M --k 16,64`

    Example: `saemill run configs/pythia-160m.yaml`
    """
    from saemill.pipeline.run import run as run_all

    file, named = _config_file(model, dataset, config)
    once = {"device": device, "device_map": device_map, "max_memory": ",".join(max_memory or ()) or None}
    run_all(named, dataset, {**flags, **once}, file, set_ or ())


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
) -> None:
    """Models × datasets × layers × seeds: every pair cached once, all its SAEs trained at once.

    Goes on where it was; pairs that are done are not done again, even when their stores were deleted.
    Ends with a table over seeds, and how alike the dictionaries of different seeds and sources are.

    Example: `saemill matrix configs/matrix.yaml`
    """
    from saemill.pipeline.matrix import run as run_all

    run_all(config, tuple(target or ()), tuple(source or ()))
