"""The whole pipeline as one command: run; and many of them: matrix."""

from pathlib import Path
from typing import Annotated

import typer

from saemill.commands.flags import Config, collected, option

SETTINGS = {
    "tokenizer": ("tokenize.tokenizer",),
    "split": ("tokenize.split",),
    "subset": ("tokenize.subset",),
    "text_column": ("tokenize.text_column",),
    "ctx_len": ("tokenize.ctx_len",),
    "max_tokens": ("tokenize.max_tokens",),
    "streaming": ("tokenize.streaming",),
    "shuffle_seed": ("tokenize.shuffle_seed",),
    "held_out_fraction": ("tokenize.held_out_fraction",),
    "repack": ("tokenize.repack",),
    "num_proc": ("tokenize.num_proc",),
    "revision": ("cache.revision",),
    "layers": ("cache.layers",),
    "layer_stride": ("cache.layer_stride",),
    "sites": ("cache.sites",),
    "load_in_8bit": ("cache.load_in_8bit",),
    "k": ("train.k",),
    "expansion_factor": ("train.expansion_factor",),
    "num_latents": ("train.num_latents",),
    "lr": ("train.lr",),
    "seeds": ("train.seeds",),
    "batch_size": ("train.batch_size",),
    "grad_acc_steps": ("train.grad_acc_steps",),
    "epochs": ("train.epochs",),
    "optimizer": ("train.optimizer",),
    "weight_decay": ("train.weight_decay",),
    "warmup_steps": ("train.warmup_steps",),
    "auxk_alpha": ("train.auxk_alpha",),
    "dead_after_tokens": ("train.dead_after_tokens",),
    "loss": ("train.loss",),
    "save_every": ("train.save_every",),
    "resume": ("train.resume",),
    "log_to_wandb": ("train.log_to_wandb",),
    "wandb_project": ("train.wandb_project",),
    "wandb_log_frequency": ("train.log_every",),
    "dead_percentage_threshold": ("assess.dead_percentage_threshold",),
    "device": ("device",),
    "save_dir": ("run.save_dir",),
    "run_name": ("run.run_name",),
}
"""What each flag sets; any other setting goes by `--set stage.key=value`."""


def run(
    model: Annotated[
        str | None, typer.Argument(help="Hub id or folder of the model; or a config file, alone.")
    ] = None,
    dataset: Annotated[str | None, typer.Argument(help="Hub id, file or folder of the text.")] = None,
    layers: Annotated[
        list[str] | None, option("Residual stream after these blocks: 2,4; -1 is the last.", "I,J")
    ] = None,
    layer_stride: Annotated[str | None, option("Every N-th block, from block 0.")] = None,
    sites: Annotated[
        list[str] | None,
        option("Globs over module paths: 'layers.*.mlp'.", "GLOBS", "--sites", "--hookpoints"),
    ] = None,
    k: Annotated[list[str] | None, option("Active latents per token [32].", "K,…")] = None,
    expansion_factor: Annotated[list[str] | None, option("Latents as multiples of D [8].", "N,…")] = None,
    num_latents: Annotated[list[str] | None, option("Latents, in place of the factor.", "N,…")] = None,
    seeds: Annotated[
        list[str] | None, option("Seeds of the initial weights [0].", "N,…", "--seeds", "--init-seeds")
    ] = None,
    lr: Annotated[list[str] | None, option("Peak learning rates [auto].", "LR,…")] = None,
    max_tokens: Annotated[str | None, option("Tokens to read and cache [all of the dataset].")] = None,
    epochs: Annotated[str | None, option("Passes of training over them [1].")] = None,
    ctx_len: Annotated[
        str | None, option("Tokens per row [512, or the length of the rows of ids, where all have one].")
    ] = None,
    batch_size: Annotated[str | None, option("Tokens, not rows, per batch [4096].")] = None,
    grad_acc_steps: Annotated[str | None, option("Batches per optimizer step [1].")] = None,
    split: Annotated[str | None, option("Split of the dataset [train].", "NAME")] = None,
    subset: Annotated[str | None, option("The hub dataset's configuration.", "NAME")] = None,
    text_column: Annotated[str | None, option("Column that holds the text [text].", "NAME")] = None,
    streaming: Annotated[bool | None, typer.Option(help="Read no more than max-tokens needs.")] = None,
    held_out_fraction: Annotated[str | None, option("Share of documents to assess on [0.05].", "X")] = None,
    shuffle_seed: Annotated[str | None, option("Order of the documents [42].")] = None,
    repack: Annotated[
        bool | None, typer.Option("--repack", help="Pack rows of ids anew, even where all have ctx-len.")
    ] = None,
    num_proc: Annotated[
        str | None, option("Processes that tokenize [1].", "N", "--num-proc", "--data-preprocessing-num-proc")
    ] = None,
    tokenizer: Annotated[str | None, option("Hub id or folder [the model's own].", "NAME")] = None,
    revision: Annotated[str | None, option("The hub model's revision.", "REV")] = None,
    load_in_8bit: Annotated[bool | None, typer.Option(help="Model in 8 bit: bitsandbytes, CUDA.")] = None,
    loss: Annotated[str | None, option("fvu or mse [fvu].", "KIND", "--loss", "--loss-fn")] = None,
    optimizer: Annotated[str | None, option("adam or sgd [adam].", "NAME")] = None,
    weight_decay: Annotated[str | None, option("Of the encoder's weights [0].", "X")] = None,
    warmup_steps: Annotated[
        str | None,
        option("Steps of warm-up [a 20th of the run].", "N", "--warmup-steps", "--lr-warmup-steps"),
    ] = None,
    auxk_alpha: Annotated[str | None, option("Weight of the loss on dead latents [1/32].", "X")] = None,
    dead_after_tokens: Annotated[
        str | None,
        option(
            "Dead in training after so many idle tokens [a 10th of the run].",
            "N",
            "--dead-after-tokens",
            "--dead-feature-threshold",
        ),
    ] = None,
    dead_percentage_threshold: Annotated[
        str | None, option("Dead when assessed below this share of tokens [0.0005].", "X")
    ] = None,
    save_every: Annotated[str | None, option("Steps between checkpoints [1000].")] = None,
    save_dir: Annotated[
        str | None, option("Folder of tokens, activations and runs [saemill-out].", "DIR")
    ] = None,
    run_name: Annotated[
        str | None, option("The run's folder in it, and wandb's group [by content].", "NAME")
    ] = None,
    resume: Annotated[bool | None, typer.Option(help="Off trains anew.")] = None,
    log_to_wandb: Annotated[bool | None, typer.Option(help="One wandb run per variant, in a group.")] = None,
    wandb_project: Annotated[str | None, option("The project [saemill].", "NAME")] = None,
    wandb_log_frequency: Annotated[
        str | None, option("Steps between log lines, there and here [10].")
    ] = None,
    device: Annotated[str | None, option("auto, cpu, cuda, cuda:1, …", "NAME")] = None,
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

    values = collected(locals())
    file, named = _config_file(model, dataset, config)
    flags = {target: values[name] for name, targets in SETTINGS.items() for target in targets}
    run_all(named, dataset, flags, file, set_ or ())


def _config_file(
    model: str | None, dataset: str | None, config: Path | None
) -> tuple[Path | None, str | None]:
    """The config file and the model: `saemill run CONFIG.yaml` has the former in the latter's place."""
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
