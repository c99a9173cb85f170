"""The stages: tokenize, cache, train, assess; and all of them on what ships."""

from pathlib import Path
from typing import Annotated

import typer

from saemill.commands.flags import Config, Device, Sets, option, resolved


def tokenize(
    dataset: Annotated[
        str | None, typer.Argument(help="Hub id, or file or folder: parquet, jsonl(.gz), csv, arrow, txt.")
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder to write.")] = None,
    tokenizer: Annotated[str | None, option("Hub id or folder of the tokenizer.", "NAME")] = None,
    subset: Annotated[str | None, option("The hub dataset's configuration.", "NAME")] = None,
    split: Annotated[str | None, option("Split of the dataset [train].", "NAME")] = None,
    text_column: Annotated[str | None, option("Column that holds the text [text].", "NAME")] = None,
    ctx_len: Annotated[
        str | None, option("Tokens per row [512, or the length of the rows of ids, where all have one].")
    ] = None,
    max_tokens: Annotated[str | None, option("Stop after so many tokens.")] = None,
    streaming: Annotated[bool | None, typer.Option(help="Read no more than max-tokens needs.")] = None,
    shuffle_seed: Annotated[
        str | None, option("Order of the documents; none keeps the source's [42].")
    ] = None,
    held_out_fraction: Annotated[
        str | None, option("Share of documents never trained on [0.05].", "X")
    ] = None,
    repack: Annotated[
        bool | None, typer.Option("--repack", help="Pack rows of ids anew, even where all have ctx-len.")
    ] = None,
    num_proc: Annotated[str | None, option("Processes that tokenize [1].")] = None,
    revision: Annotated[str | None, option("The hub dataset's revision.", "REV")] = None,
    tokenizer_revision: Annotated[str | None, option("The hub tokenizer's revision.", "REV")] = None,
    config: Config = None,
    set_: Sets = None,
) -> None:
    """Turn documents into packed rows of token ids.

    Documents are joined by the tokenizer's separator into full rows, framed as the model expects.
    Where each document starts, and which are held out, is kept.

    Example: `saemill tokenize corpus.jsonl.gz --tokenizer gpt2 --ctx-len 512 -o tokens`
    """
    from saemill.tokenize.run import TokenizeConfig, run

    run(resolved(TokenizeConfig, "tokenize", locals()))


def cache(
    tokens: Annotated[Path | None, typer.Argument(help="A folder made by `saemill tokenize`.")] = None,
    model: Annotated[str | None, option("Hub id or folder of the model.", "NAME")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Activation store, new or to be added to.")
    ] = None,
    layers: Annotated[
        list[str] | None, option("Residual stream after these blocks: 2,4; -1 is the last.", "I,J")
    ] = None,
    sites: Annotated[
        list[str] | None, option("Globs over module paths and residual.N: 'layers.*.mlp'.", "GLOBS")
    ] = None,
    layer_stride: Annotated[str | None, option("Every N-th block, from block 0.")] = None,
    dtype: Annotated[
        str | None, option("Stored type: bf16, fp16, fp32 [the store's, or bf16].", "TYPE")
    ] = None,
    model_dtype: Annotated[
        str | None,
        option("Type the model computes in [auto: the store's, or bf16 on GPU, fp32 on CPU].", "TYPE"),
    ] = None,
    max_tokens: Annotated[
        str | None, option("Cache only the first rows, at most so many tokens [the store's, or all].")
    ] = None,
    batch_size: Annotated[str | None, option("Rows per forward pass [16].", "ROWS")] = None,
    shard_tokens: Annotated[str | None, option("Tokens per shard file [the store's, or 65536].")] = None,
    device: Device = None,
    allow_other_tokenizer: Annotated[
        bool | None,
        typer.Option("--allow-other-tokenizer", help="Take tokens of another tokenizer than the model's."),
    ] = None,
    load_in_8bit: Annotated[
        bool | None,
        typer.Option(help="Weights as 8-bit integers, by bitsandbytes on CUDA [the store's, or off]."),
    ] = None,
    revision: Annotated[str | None, option("The hub model's revision.", "REV")] = None,
    config: Config = None,
    set_: Sets = None,
) -> None:
    """Run a transformer over the rows once and store the activations of chosen sites.

    Killed at any moment, the same command continues; started several times at once, on one machine or
    many, the processes share out the shards. Run again with other layers, it adds them, with the store's
    settings where you name none; run on a finished store, it checks every shard and writes the damaged
    ones again.

    Example: `saemill cache tokens --model EleutherAI/pythia-160m --layers 4,8 -o acts`
    """
    from saemill.cache.config import CacheConfig
    from saemill.cache.run import run

    run(resolved(CacheConfig, "cache", locals()))


def train(
    acts: Annotated[Path | None, typer.Argument(help="A folder made by `saemill cache`.")] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(help="Site to train on; repeat or separate by commas.", metavar="SITE,…"),
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder of the run.")] = None,
    k: Annotated[list[str] | None, option("Active latents per token [32].", "K,…")] = None,
    expansion_factor: Annotated[list[str] | None, option("Latents as multiples of D [8].", "N,…")] = None,
    num_latents: Annotated[list[str] | None, option("Latents, in place of the factor.", "N,…")] = None,
    lr: Annotated[
        list[str] | None, option("Peak learning rates; auto goes by width, latents and steps [auto].", "LR,…")
    ] = None,
    seeds: Annotated[list[str] | None, option("Seeds of the initial weights [0].", "N,…")] = None,
    batch_size: Annotated[str | None, option("Tokens per batch [4096].")] = None,
    max_tokens: Annotated[str | None, option("Tokens to train on [one epoch].")] = None,
    epochs: Annotated[str | None, option("Passes over the store, in place of max-tokens.")] = None,
    grad_acc_steps: Annotated[str | None, option("Batches per optimizer step [1].")] = None,
    optimizer: Annotated[str | None, option("adam or sgd [adam].", "NAME")] = None,
    optimizer_state: Annotated[
        str | None, option("How Adam's moments are kept: fp32, bf16 or 8bit [fp32].", "TYPE")
    ] = None,
    adam_betas: Annotated[
        list[str] | None, option("What Adam's two moments keep at each step [0.8,0.95].", "X,X")
    ] = None,
    weight_decay: Annotated[str | None, option("Decoupled decay of the encoder's weights [0].", "X")] = None,
    warmup_steps: Annotated[str | None, option("Steps of linear warm-up [a 20th of the run].")] = None,
    lr_decay: Annotated[
        str | None, option("none, linear or cosine, over the last part [linear].", "KIND")
    ] = None,
    lr_decay_fraction: Annotated[str | None, option("That part [0.2].", "X")] = None,
    auxk_alpha: Annotated[str | None, option("Weight of the loss on dead latents [1/32].", "X")] = None,
    k_aux: Annotated[str | None, option("Dead latents per token in it [D/2].")] = None,
    dead_after_tokens: Annotated[
        str | None, option("Dead after so many idle tokens [a 10th of the run].")
    ] = None,
    loss: Annotated[str | None, option("fvu or mse [fvu].", "KIND")] = None,
    b_dec_init: Annotated[str | None, option("mean or geometric_median [mean].", "KIND")] = None,
    buffer_tokens: Annotated[str | None, option("Rows of the shuffling buffer [262144].")] = None,
    shuffle_seed: Annotated[str | None, option("Order of the stream [0].")] = None,
    save_every: Annotated[str | None, option("Steps between checkpoints [1000].")] = None,
    log_every: Annotated[str | None, option("Steps between log lines [10].")] = None,
    resume: Annotated[
        bool | None, typer.Option(help="Go on from the run's checkpoint [on]; off starts anew.")
    ] = None,
    cuda_graph: Annotated[
        bool | None,
        typer.Option("--cuda-graph", help="On a GPU: capture each variant's step once, then replay it."),
    ] = None,
    profile: Annotated[
        bool | None, typer.Option("--profile", help="Show where the time of a step goes; write a trace.")
    ] = None,
    halving: Annotated[
        str | None, option("Times that the worse half of each site and k is stopped early [0].")
    ] = None,
    halving_metric: Annotated[str | None, option("By fvu, loss or dead_fraction [fvu].", "NAME")] = None,
    data_ranks: Annotated[
        str | None, option("Of several processes, how many share each batch's tokens [1].")
    ] = None,
    latent_ranks: Annotated[
        str | None, option("How many share each SAE's latents [by estimated time].")
    ] = None,
    log_to_wandb: Annotated[bool | None, typer.Option(help="One wandb run per variant, in a group.")] = None,
    wandb_project: Annotated[str | None, option("The project [saemill].", "NAME")] = None,
    wandb_entity: Annotated[str | None, option("User or team [wandb's default].", "NAME")] = None,
    run_name: Annotated[str | None, option("The group [the folder's name].", "NAME")] = None,
    wandb_log_frequency: Annotated[str | None, option("Steps between points in wandb [log-every].")] = None,
    wandb_artifacts: Annotated[
        bool | None, typer.Option("--wandb-artifacts", help="Upload each SAE as an artifact.")
    ] = None,
    log_to_tensorboard: Annotated[
        bool | None, typer.Option("--log-to-tensorboard", help="Events for TensorBoard, in RUN/tensorboard.")
    ] = None,
    device: Device = None,
    precision: Annotated[
        str | None, option("Of the encoder's product: fp32, bf16 [bf16 where it is fast].", "TYPE")
    ] = None,
    kernels: Annotated[
        str | None, option("Of a step: torch, numba, triton [the fastest installed].", "NAME")
    ] = None,
    config: Config = None,
    set_: Sets = None,
) -> None:
    """Train many TopK SAEs at once over one shuffled stream of cached activations.

    Lists form a grid; a config file may list variants one by one. SIGTERM or Ctrl-C saves a
    checkpoint and exits with code 75; the same command continues.

    Example: `saemill train acts --site layers.4 --k 16,32,64 --expansion-factor 8,32 -o runs/first`
    """
    from saemill.train.config import TrainConfig
    from saemill.train.run import run

    run(resolved(TrainConfig, "train", locals()))


def assess(
    run: Annotated[Path | None, typer.Argument(help="A folder made by `saemill train`.")] = None,
    model: Annotated[str | None, option("The model, if not where it was cached from.", "NAME")] = None,
    with_model: Annotated[
        bool | None,
        typer.Option("--with-model/--no-model", help="Measure losses with the SAE spliced in [on]."),
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="Assess on this token store, not the held-out rows.")
    ] = None,
    acts: Annotated[Path | None, typer.Option(help="The activation store, if it moved.")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Where to write [the run's folder].")
    ] = None,
    max_tokens: Annotated[str | None, option("Most tokens for reconstruction [1M].")] = None,
    model_tokens: Annotated[str | None, option("Most tokens for the losses [100k].")] = None,
    batch_size: Annotated[str | None, option("Rows per forward pass [8].", "ROWS")] = None,
    dead_percentage_threshold: Annotated[
        str | None, option("A latent active on a smaller share of tokens is dead [0.0005].", "X")
    ] = None,
    min_loss_recovered: Annotated[str | None, option("Threshold of the verdict [0.60].", "X")] = None,
    min_l0: Annotated[str | None, option("Threshold [20].", "X")] = None,
    max_l0: Annotated[str | None, option("Threshold [200].", "X")] = None,
    max_dead_fraction: Annotated[str | None, option("Threshold [0.20].", "X")] = None,
    max_absorption: Annotated[str | None, option("Threshold [0.25].", "X")] = None,
    variant: Annotated[str | None, option("Whose latents are shown [the best].", "NAME")] = None,
    latents: Annotated[list[str] | None, option("Latents to show beside random ones.", "I,J")] = None,
    n_latents: Annotated[str | None, option("Random live latents to show [12].")] = None,
    n_contexts: Annotated[str | None, option("Contexts per latent [8].")] = None,
    context_tokens: Annotated[str | None, option("Most tokens searched for contexts [500k].")] = None,
    log_to_wandb: Annotated[
        bool | None, typer.Option(help="Add it to the run's wandb runs [as the run was].")
    ] = None,
    device: Device = None,
    config: Config = None,
    set_: Sets = None,
) -> None:
    """Measure every SAE of a run on tokens that training did not see, and give a verdict.

    Writes `final_assessment.json`, `report.html` and the sums they follow from.

    Example: `saemill assess runs/first`
    """
    from saemill.assess.report import contexts_text
    from saemill.assess.run import AssessConfig
    from saemill.assess.run import run as run_assess
    from saemill.common.log import say

    values = locals()
    for name in ("min_loss_recovered", "min_l0", "max_l0", "max_dead_fraction", "max_absorption"):
        values[f"thresholds.{name}"] = values.pop(name)
    assessment = run_assess(resolved(AssessConfig, "assess", values))
    if contexts := contexts_text(assessment["features"], 4, 4):
        say(contexts)


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the stores and the run.")] = Path(
        "demo-run"
    ),
) -> None:
    """The whole pipeline on a small language model and public-domain text that ship with saemill."""
    from saemill.demo import run

    run(out)
