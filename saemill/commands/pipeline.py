"""The stages: tokenize, cache, train, assess; and all of them on what ships."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from saemill.assess.config import AssessConfig
from saemill.cache.config import CacheConfig
from saemill.commands.flags import (
    OUT,
    Config,
    DryRun,
    NoProbe,
    Sets,
    argument,
    flag,
    is_planned,
    stage_command,
    with_flags,
)
from saemill.tokenize.config import TokenizeConfig
from saemill.train.config import TrainConfig


@with_flags(
    TokenizeConfig,
    OUT,
    *("tokenizer", "subset", "split", "text_column", "chat_column", "chat_template", "source_column"),
    *("words_column", "word_labels"),
    *("special_tokens_in_text", "row_start", "document_start", "separator"),
    *("ctx_len", "max_tokens", "streaming", "shuffle_seed", "held_out_fraction"),
    flag("repack", "--repack"),
    *("num_proc", "revision", "tokenizer_revision"),
)
def tokenize(
    *,
    dataset: Annotated[
        list[str] | None,
        typer.Argument(
            help="Hub id, or file or folder: parquet, jsonl(.gz), csv, arrow, txt, `save_to_disk`. Several "
            "with their shares, A:0.7 B:0.3, are mixed."
        ),
    ] = None,
    mix: Annotated[
        Path | None,
        typer.Option(help="YAML file with a list of datasets to mix: dataset, share, and what each needs."),
    ] = None,
    flags: Mapping[str, Any],
    config: Config = None,
    set_: Sets = None,
    dry_run: DryRun = False,
    no_probe: NoProbe = False,
) -> None:
    """Turn documents into packed rows of token ids.

    Documents are joined by the tokenizer's separator into full rows, framed as the model expects.
    Where each document starts, and which are held out, is kept.

    Example: `saemill tokenize corpus.jsonl.gz --tokenizer gpt2 --ctx-len 512 -o tokens`

    Example: `saemill tokenize web.parquet:0.7 code.jsonl:0.3 --tokenizer gpt2 -o tokens`
    """
    from saemill.common.config import resolve
    from saemill.tokenize.named import named
    from saemill.tokenize.run import run

    settings = resolve(TokenizeConfig, "tokenize", {**flags, **named(dataset or (), mix)}, config, set_ or ())
    if is_planned(dry_run, no_probe):
        from saemill.plan.run import plan

        plan({"tokenize": settings}, not no_probe)
    else:
        run(settings)


@stage_command(
    CacheConfig,
    "cache",
    argument("tokens"),
    "model",
    OUT,
    *("layers", "sites", "layer_stride", "dtype", "compression", "model_dtype"),
    *("max_tokens", "batch_size", "shard_tokens", "max_disk"),
    flag("delete_consumed", "--delete-consumed"),
    "device",
    flag("allow_other_tokenizer", "--allow-other-tokenizer"),
    *("load_in_8bit", "load_in_4bit", "device_map", "max_memory", "attn_implementation", "revision"),
    flag("trust_remote_code", "--trust-remote-code"),
)
def cache(config: CacheConfig) -> None:
    """Run a transformer over the rows once and store the activations of chosen sites.

    Killed at any moment, the same command continues; started several times at once, on one machine or
    many, the processes share out the shards. Run again with other layers, it adds them, with the store's
    settings where you name none; run on a finished store, it checks every shard and writes the damaged
    ones again.

    Example: `saemill cache tokens --model EleutherAI/pythia-160m --layers 4,8 -o acts`
    """
    from saemill.cache.run import run

    run(config)


@stage_command(
    TrainConfig,
    "train",
    argument("acts"),
    "site",
    "with_acts",
    "target_site",
    "cross_layer",
    "skip_connection",
    OUT,
    *("init_from", "architecture", "k", "expansion_factor", "num_latents", "lr", "seeds"),
    *("k_anneal_steps", "multi_topk", "nested_k", "prefixes", "matryoshka_rule"),
    flag("mask.roles", "--train-on"),
    *("target_l0", "l0_coefficient", "sparsity_penalty", "bandwidth", "preact_coefficient", "most_density"),
    *("l1_coefficient", "lp_norm", "decoder_rows", "penalty_warmup_steps"),
    *("batch_size", "max_tokens", "epochs", "grad_acc_steps"),
    flag("follow", "--follow"),
    "follow_tokens",
    *("optimizer", "optimizer_state", "adam_betas", "weight_decay", "clip_grad_norm", "weight_average"),
    *("warmup_steps", "lr_schedule", "lr_end", "lr_cycles", "lr_decay", "lr_decay_fraction"),
    *("auxk_alpha", "k_aux", "dead_after_tokens", "loss", "b_dec_init", "decoder"),
    *("buffer_tokens", "local_cache", "shuffle_seed", "save_every", "log_every", "resume"),
    *("eval_every", "eval_tokens", "eval_losses_every", "model", "n_checkpoints"),
    flag("profile", "--profile"),
    *("halving", "halving_metric", "data_ranks", "latent_ranks"),
    *("log_to_wandb", "wandb_project", "wandb_entity", "run_name", "wandb_log_frequency"),
    flag("wandb_artifacts", "--wandb-artifacts"),
    flag("log_to_tensorboard", "--log-to-tensorboard"),
    *("device", "precision", "kernels"),
)
def train(config: TrainConfig) -> None:
    """Train many SAEs at once over one shuffled stream of cached activations.

    Lists form a grid; a config file may list variants one by one. SIGTERM or Ctrl-C saves a
    checkpoint and exits with code 75; the same command continues.

    Example: `saemill train acts --site layers.4 --k 16,32,64 --expansion-factor 8,32 -o runs/first`

    Example: `saemill train acts --architecture topk,batchtopk,jumprelu --k 32 --target-l0 32 -o runs/mixed`
    """
    from saemill.train.run import run

    run(config)


@stage_command(
    AssessConfig,
    "assess",
    argument("run"),
    "model",
    flag("with_model", "--with-model/--no-model"),
    *("tokens", "acts", "with_acts", "with_acts_model", "local_cache"),
    OUT,
    *("max_tokens", "model_tokens", "batch_size", "dead_percentage_threshold"),
    *("thresholds.min_loss_recovered", "thresholds.min_l0", "thresholds.max_l0"),
    *("thresholds.max_dead_fraction", "thresholds.max_decoder_cosine"),
    flag("together", "--together"),
    flag("probes", "--probes"),
    "probe_k",
    flag("absorption", "--absorption"),
    "probe_examples",
    *("variant", "latents", "n_latents", "n_contexts", "n_samples", "context_tokens", "page_bytes"),
    "most_beside",
    *("log_to_wandb", "device", "device_map", "max_memory"),
)
def assess(config: AssessConfig) -> None:
    """Measure every SAE of a run on tokens that training did not see, and give a verdict.

    Writes `final_assessment.json`, `report.html` and the sums they follow from.

    Example: `saemill assess runs/first`
    Example: `saemill assess runs/first --probes --absorption`
    """
    from saemill.assess.run import run
    from saemill.assess.table import contexts_text
    from saemill.common.log import say
    from saemill.common.stores import features

    run(config)
    if contexts := contexts_text(features.load(config.folder), 4, 4):
        say(contexts)


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the stores and the run.")] = Path(
        "demo-run"
    ),
) -> None:
    """Run the whole pipeline on a small language model and public-domain text that ship with saemill."""
    from saemill.demo import run

    run(out)
