"""Equivalents of other tools' settings: the table that error messages and docs/migration.md share.

Names are those of the tools' own config classes: sparsify's `RunConfig` (and its older and saetrain's flags),
SAELens' runner configs and dictionary_learning's `trainSAE`, trainers and buffer.
"""

import difflib
import re
from collections.abc import Iterable
from typing import NamedTuple

from saemill.common import saelens_5


class Setting(NamedTuple):
    """A setting of another tool."""

    equivalent: str
    """Equivalent in saemill: flags of `saemill run` or commands, in Markdown; empty where there is none."""
    why: str = ""
    """Difference, or the reason why there is no equivalent."""


SAME = "the same"
BY_PROCESSES = "several processes share out the SAEs, or split large ones, by themselves"
OFFLINE = "activations are cached once, and every SAE reads them"
PREFIXES = Setting("`--set train.prefixes=`", "numbers of latents, or shares of F")
L1 = "of the loss FVU + x · Σ f, in units in which E‖x‖² = 1; with relu and gated"
PENALTY_WARMUP = Setting("`--set train.penalty_warmup_steps=`", "a 10th of the run by default")
BANDWIDTH = Setting(
    "`--set train.bandwidth=`", "where E‖x‖² = 1; half of each threshold by default; with jumprelu"
)
TARGET_SITE = Setting(
    "`--set train.target_site=`",
    "the module whose output is predicted, with `--set train.site=` its input: `layers.6.mlp` and "
    "`layers.6.mlp:in`, both in `--sites`",
)
ANNEALING = Setting("", "the penalty's power is the same over the whole run: `--set train.lp_norm=`")

SPARSIFY = {
    "model": Setting("`MODEL`", "the first argument of `saemill run`; a folder as well as a hub id"),
    "dataset": Setting("`DATASET`", "the second; a file or folder as well as a hub id"),
    "split": Setting("`--split`", SAME),
    "text_column": Setting("`--text-column`", SAME),
    "ctx_len": Setting(
        "`--ctx-len`",
        "rows are packed full, documents joined by the separator; 512 tokens by default, theirs 2048",
    ),
    "max_examples": Setting("`--max-tokens`", "tokens, not examples"),
    "max_tokens": Setting(
        "`--max-tokens`", "tokens that are cached; of the documents 5% are held out (`--held-out-fraction`)"
    ),
    "shuffle_seed": Setting(
        "`--shuffle-seed`", "of the documents; the order of training is `--set train.shuffle_seed=`"
    ),
    "data_preprocessing_num_proc": Setting("`--num-proc`", "theirs works too; 1 by default"),
    "data_args": Setting(
        "", "`--split`, `--subset`, `--streaming` and `--set tokenize.revision=` name the data"
    ),
    "hf_token": Setting("", "log in with `hf auth login`, or set HF_TOKEN in the environment"),
    "revision": Setting("`--revision`", "the model's; the dataset's is `--set tokenize.revision=`"),
    "load_in_8bit": Setting(
        "`--load-in-8bit`", "the model while caching and assessing; needs `pip install 'saemill[large]'`"
    ),
    "attn_implementation": Setting("`--attn-implementation`", "of `cache` and `run`; assessed with the same"),
    "batch_size": Setting(
        "`--batch-size`",
        "**tokens, not sequences**: theirs × ctx_len; what is no more than a row and at most 512 is refused",
    ),
    "grad_acc_steps": Setting("`--grad-acc-steps`", "the same result as one large batch, bit by bit"),
    "micro_acc_steps": Setting("", "latents are computed in chunks in any case; leave it out"),
    "layers": Setting("`--layers`", "`--layers 6` is the residual stream after block 6, as theirs"),
    "layer_stride": Setting("`--layer-stride`", "beside `--layers` only as 1, which is theirs by default"),
    "hookpoints": Setting("`--sites`", "theirs works too; globs over module paths below the base model"),
    "sae": Setting("", "its settings are flags of their own: `--k`, `--expansion-factor`, `--num-latents`"),
    "k": Setting("`--k`", "a list: every combination is an SAE, and all are trained at once"),
    "expansion_factor": Setting("`--expansion-factor`", "a list; 8 by default, theirs 32"),
    "num_latents": Setting("`--num-latents`", "a list; it overrides the expansion factor"),
    "init_seeds": Setting("`--seeds`", "theirs works too"),
    "activation": Setting(
        "`--architecture`",
        "topk and groupmax, and abs-topk, batchtopk, matryoshka, jumprelu, relu and gated, which sparsify "
        "has not",
    ),
    "normalize_decoder": Setting(
        "", "always; with relu alone rows may be free: `--set train.decoder_rows=free`"
    ),
    "multi_topk": Setting("`--set train.multi_topk=true`", SAME),
    "skip_connection": Setting("`--set train.skip_connection=true`", "of transcoders"),
    "transcode": TARGET_SITE,
    "loss_fn": Setting(
        "`--loss`",
        "theirs works too: fvu, mse, ce, kl; of the model only the blocks after the site run",
    ),
    "optimizer": Setting(
        "`--optimizer`",
        "adam by default, theirs signum; adam's memories are shorter than theirs, which are "
        "`--set train.adam_betas=0.9,0.999`; adamw is adam with weight decay",
    ),
    "lr": Setting("`--lr`", "a list; adam's automatic rate also goes by D and by the number of steps"),
    "lr_warmup_steps": Setting(
        "`--warmup-steps`",
        "theirs works too; a twentieth of the run by default, with decay over the last fifth, whatever the "
        "optimizer; signum's rate is constant there, which is 0 with `--set train.lr_decay=none`",
    ),
    "weight_decay": Setting("`--weight-decay`", "decoupled, of the encoder"),
    "k_decay_steps": Setting(
        "`--set train.k_anneal_steps=`", "by equal factors from D; theirs by equal differences from 10 D"
    ),
    "auxk_alpha": Setting("`--auxk-alpha`", "1/32 by default, theirs 0"),
    "dead_feature_threshold": Setting(
        "`--dead-after-tokens`", "theirs works too; a tenth of the run, at most 10M"
    ),
    "dead_percentage_threshold": Setting(
        "`--dead-percentage-threshold`", "share of the tokens of the assessment, as a fraction"
    ),
    "exclude_tokens": Setting("`--set cache.mask.token_ids=`", "ids; special tokens are left out by default"),
    "distribute_modules": Setting("", BY_PROCESSES),
    "distribute_layers": Setting("", BY_PROCESSES),
    "save_every": Setting("`--save-every`", "checkpoints to go on from"),
    "save_best": Setting("", "the assessment tells which SAE is best"),
    "save_dir": Setting(
        "`--save-dir`", "`<save_dir>/runs/<run_name>/<variant>`, one folder per SAE in sparsify's layout"
    ),
    "run_name": Setting("`--run-name`", "the run's folder, and its group in wandb"),
    "resume": Setting("`--resume`", "always on; `--no-resume` trains anew"),
    "finetune": Setting(
        "`--set train.init_from=`", "an SAE of any format that is read, or a run, or `hf://…`"
    ),
    "log_to_wandb": Setting("`--log-to-wandb`", "off by default; one run per SAE, in a group"),
    "wandb_log_frequency": Setting("`--wandb-log-frequency`", "that of all logs"),
}
"""Flags of sparsify, and of saetrain, which followed it."""

SAELENS = {
    # LanguageModelSAERunnerConfig
    "sae": Setting(
        "`--architecture`",
        "topk, abs-topk for their abstopk, batchtopk, matryoshka, jumprelu, gated, and relu for their "
        "standard; settings are flags of their own: `--k`, `--target-l0`, `--num-latents`",
    ),
    "model_name": Setting("`MODEL`", "the first argument of `saemill run`: a hub id or folder"),
    "model_class_name": Setting("", "models are loaded by transformers' AutoModel"),
    "model_kwargs": Setting(
        "",
        "`--revision`, `--load-in-8bit`, `--load-in-4bit`, `--device-map` and `--set cache.model_dtype=` are "
        "what there is",
    ),
    "model_from_pretrained_kwargs": Setting("", "as `model_kwargs`; models are loaded unprocessed"),
    "from_pretrained_path": Setting(
        "`--set train.init_from=`", "an SAE of any format that is read, or a run, or `hf://…`"
    ),
    "hook_name": Setting("`--layers`, `--sites`", "`blocks.6.hook_resid_post` is `--layers 6`"),
    "hook_eval": Setting("", "it has no effect there either"),
    "hook_head_index": Setting("", "sites give one vector per token; name the module with `--sites`"),
    "dataset_path": Setting("`DATASET`", "the second argument of `saemill run`"),
    "dataset_trust_remote_code": Setting("", "datasets' scripts are not run"),
    "streaming": Setting("`--streaming`", "off by default; with `--max-tokens`"),
    "is_dataset_tokenized": Setting("`--text-column`", "name the column of the ids: input_ids"),
    "use_chat_formatting": Setting("`--chat-column`", "and `--train-on assistant` for what it says alone"),
    "context_size": Setting("`--ctx-len`", SAME),
    "use_cached_activations": Setting(
        "", "always: `saemill cache`, or `saemill run`, which finds them again"
    ),
    "cached_activations_path": Setting("`saemill train ACTS`", "a store that `saemill cache` made"),
    "training_tokens": Setting("`--max-tokens`", "and `--epochs` to go over them again"),
    "train_batch_size_tokens": Setting("`--batch-size`", "tokens as well"),
    "store_batch_size_prompts": Setting("`--set cache.batch_size=`", "rows per forward pass"),
    "n_batches_in_buffer": Setting("`--set train.buffer_tokens=`", "in tokens"),
    "activations_mixing_fraction": Setting(
        "", "the buffer is emptied block by block: `--set train.buffer_tokens=`"
    ),
    "seqpos_slice": Setting("`--set cache.mask.first_positions=`", "positions left out at a row's start"),
    "disable_concat_sequences": Setting("", "rows are packed full; where documents start is kept"),
    "sequence_separator_token": Setting("`--set tokenize.separator=`", "after each document, by default EOS"),
    "prepend_bos": Setting("", "rows are framed as the model's tokenizer frames a text"),
    "begin_batch_token": Setting("`--set tokenize.row_start=`", "by default the tokenizer's own"),
    "begin_sequence_token": Setting("`--set tokenize.document_start=`", "none by default, as theirs"),
    "exclude_special_tokens": Setting("`--set cache.mask.special_tokens=`", "true by default"),
    "device": Setting("`--device`", SAME),
    "llm_device": Setting("`--set cache.device=`", "the model is not in memory while SAEs are trained"),
    "act_store_device": Setting("", OFFLINE),
    "prefetch_llm_batches": Setting("", OFFLINE),
    "seed": Setting("`--seeds`", "a list; of the documents `--shuffle-seed`"),
    "dtype": Setting("`--set cache.dtype=`", "of the store; weights are trained in fp32"),
    "autocast": Setting("`--set train.precision=bf16`", "of the encoder's product"),
    "autocast_lm": Setting("`--set cache.model_dtype=bf16`", "the model's weights are bf16 then"),
    "compile_llm": Setting("", OFFLINE),
    "llm_compilation_mode": Setting("", OFFLINE),
    "compile_sae": Setting("`--set train.kernels=`", "steps are compiled by numba or Triton anyway"),
    "sae_compilation_mode": Setting("", "see `compile_sae`"),
    "adam_beta1": Setting("`--set train.adam_betas=0.9,0.999`", "both; by default 0.8,0.95"),
    "adam_beta2": Setting("`--set train.adam_betas=0.9,0.999`", "both; by default 0.8,0.95"),
    "lr": Setting("`--lr`", "a list; automatic by default"),
    "lr_scheduler_name": Setting(
        "`--set train.lr_schedule=`",
        "constant, cosine for cosineannealing, cosine_restarts for cosineannealingwarmrestarts, or linear",
    ),
    "lr_warm_up_steps": Setting("`--warmup-steps`", "the peak comes a step later"),
    "lr_end": Setting("`--set train.lr_end=`", "as a share of the peak rate; 0.1 by default, as theirs"),
    "lr_decay_steps": Setting(
        "`--set train.lr_decay_fraction=`",
        "as a share of the run, 0.2 by default; without decay `--set train.lr_decay=none`",
    ),
    "n_restart_cycles": Setting(
        "`--set train.lr_cycles=`", "with cosine_restarts; of equal length, where theirs end with a rest"
    ),
    "dead_feature_window": Setting("`--dead-after-tokens`", "in tokens"),
    "dead_feature_threshold": Setting(
        "`--dead-percentage-threshold`", "of the assessment; sparsify's flag of this name counts tokens"
    ),
    "feature_sampling_window": Setting("", "firing is counted over all tokens since the last one"),
    "n_eval_batches": Setting(
        "`--set assess.model_tokens=`", "in tokens; while SAEs train, `--set train.eval_losses_tokens=`"
    ),
    "eval_batch_size_prompts": Setting("`--set assess.batch_size=`", "rows"),
    "n_batches_for_norm_estimate": Setting("", "`saemill cache` knows mean and variance of all tokens"),
    "logger": Setting("", "its settings are flags of their own: `--log-to-wandb`, `--wandb-project`"),
    "n_checkpoints": Setting(
        "`--n-checkpoints`", "SAEs kept on the way, as evenly spaced; each is a run that can be assessed"
    ),
    "checkpoint_path": Setting("`--save-dir`, `--run-name`", "checkpoints are in the run's folder"),
    "save_final_checkpoint": Setting("", "every SAE is written at the end"),
    "output_path": Setting("`--save-dir`, `--run-name`", "`saemill train -o`"),
    "resume_from_checkpoint": Setting("", "the same command goes on where it was"),
    "verbose": Setting("", "progress is on stderr"),
    "sae_lens_version": Setting("", "our version is in each SAE's cfg.json"),
    "sae_lens_training_version": Setting("", "our version is in each SAE's cfg.json"),
    # LoggingConfig
    "log_to_wandb": Setting("`--log-to-wandb`", "off by default"),
    "log_activations_store_to_wandb": Setting("", "`saemill push` uploads a store to the hub"),
    "log_optimizer_state_to_wandb": Setting("", "checkpoints stay on the disk"),
    "log_weights_to_wandb": Setting("`--set train.wandb_artifacts=true`", "with `--log-to-wandb`"),
    "wandb_project": Setting("`--wandb-project`", "with `--log-to-wandb`"),
    "wandb_id": Setting("", "the same command goes on with the same wandb runs"),
    "run_name": Setting("`--run-name`", "the run's folder, and its group in wandb"),
    "wandb_entity": Setting("`--set train.wandb_entity=`", "with `--log-to-wandb`"),
    "wandb_log_frequency": Setting("`--wandb-log-frequency`", "that of all logs"),
    "eval_every_n_wandb_logs": Setting(
        "`--eval-every`", "steps; on held-out tokens, with `--set train.eval_losses_every=` in the model too"
    ),
    # The training configs of their architectures
    "d_in": Setting("", "the site's width is found"),
    "d_sae": Setting("`--num-latents`", "a list, or `--expansion-factor`"),
    "k": Setting("`--k`", "a list; a fraction with batchtopk"),
    "apply_b_dec_to_input": Setting("`--set train.apply_b_dec_to_input=`", SAME),
    "normalize_activations": Setting("", "always; folded into the saved weights"),
    "reshape_activations": Setting("", "sites give one vector per token"),
    "metadata": Setting("", "each SAE's cfg.json tells how it was made"),
    "decoder_init_norm": Setting("", "rows have unit length"),
    "use_sparse_activations": Setting("", "always"),
    "rescale_acts_by_decoder_norm": Setting("", "the decoder's rows have unit length"),
    "aux_loss_coefficient": Setting("`--auxk-alpha`", "here it is in units of the variance"),
    "topk_threshold_lr": Setting("", "0.01, as theirs; the first steps weigh alike"),
    "matryoshka_widths": PREFIXES,
    "detach_matryoshka_losses": Setting("", "the error of every prefix moves all of its latents"),
    "use_matryoshka_aux_loss": Setting("", "dead latents fit the residual of all latents"),
    "l1_coefficient": Setting("`--set train.l1_coefficient=`", L1),
    "lp_norm": Setting("`--set train.lp_norm=`", "with relu"),
    "l1_warm_up_steps": PENALTY_WARMUP,
    "l0_coefficient": Setting(
        "`--set train.l0_coefficient=`", "of the loss FVU + x · L0; by default a target: `--target-l0`"
    ),
    "l0_warm_up_steps": PENALTY_WARMUP,
    "target_l0": Setting("`--target-l0`", "a list; with jumprelu, 32 by default"),
    "pre_act_loss_coefficient": Setting(
        "`--set train.preact_coefficient=`", "with jumprelu, of dead latents, in AuxK's place"
    ),
    "jumprelu_init_threshold": Setting("", "the threshold that the target L0 passes at the start"),
    "jumprelu_bandwidth": BANDWIDTH,
    "jumprelu_sparsity_loss_mode": Setting(
        "`--set train.sparsity_penalty=`", "step or tanh; their quadratic is what `--target-l0` does"
    ),
    "jumprelu_tanh_scale": Setting("", "4, as in Anthropic's"),
    "jumprelu_ste_to_input": Setting("", "the straight-through gradient is that of the thresholds alone"),
    # PretokenizeRunnerConfig and CacheActivationsRunnerConfig
    "tokenizer_name": Setting("`--tokenizer`", "by default the model's own"),
    "dataset_name": Setting("`--subset`", "the hub dataset's configuration"),
    "split": Setting("`--split`", SAME),
    "data_files": Setting("`DATASET`", "a file, or a folder of files"),
    "data_dir": Setting("`DATASET`", "a folder of files"),
    "num_proc": Setting("`--num-proc`", "1 by default"),
    "column_name": Setting("`--text-column`", SAME),
    "shuffle": Setting("`--shuffle-seed`", "none keeps the documents' order; training is always shuffled"),
    "pretokenize_batch_size": Setting("", "texts are tokenized in batches in any case"),
    "save_path": Setting("`saemill tokenize -o`", "or `--save-dir`"),
    "hf_repo_id": Setting(
        "`saemill push`", "uploads what is made; `saemill export-tokens --push-to-hub` in their form"
    ),
    "hf_num_shards": Setting("", "`saemill push` uploads shards as they are"),
    "hf_revision": Setting("`saemill push --revision`", "the branch"),
    "hf_is_private_repo": Setting("`saemill push --private`", SAME),
    "model_batch_size": Setting("`--set cache.batch_size=`", "rows per forward pass"),
    "new_cached_activations_path": Setting("`saemill cache -o`", "or `--save-dir`"),
    "buffer_size_gb": Setting("`--set cache.shard_tokens=`", "in tokens"),
    **{name: Setting(*row) for name, row in saelens_5.ROWS.items()},
}
"""SAELens' settings, of all its runners and of the SAEs it trains."""

DICTIONARY_LEARNING = {
    # trainSAE
    "data": Setting("`saemill train ACTS`", "a store that `saemill cache` made"),
    "trainer_configs": Setting(
        "`--architecture`, `--k`, `--num-latents`, `--lr`, `--seeds`",
        "lists, or `variants:` in a config file",
    ),
    "trainer": Setting(
        "`--architecture`", "topk, batchtopk, matryoshka, jumprelu, relu for their standard, gated for gdm"
    ),
    "steps": Setting("`--max-tokens`, `--epochs`", "by tokens"),
    "use_wandb": Setting("`--log-to-wandb`", SAME),
    "wandb_entity": Setting("`--set train.wandb_entity=`", "with `--log-to-wandb`"),
    "wandb_project": Setting("`--wandb-project`", "with `--log-to-wandb`"),
    "save_steps": Setting(
        "`--n-checkpoints`", "by their number; `--save-every` is of the checkpoints to go on from"
    ),
    "save_dir": Setting("`--save-dir`", SAME),
    "log_steps": Setting("`--set train.log_every=`", SAME),
    "activations_split_by_head": Setting("", "sites give one vector per token"),
    "transcoder": TARGET_SITE,
    "run_cfg": Setting("", "each run's folder holds all settings"),
    "normalize_activations": Setting("", "always; folded into the saved weights"),
    "verbose": Setting("", "progress is on stderr"),
    "device": Setting("`--device`", SAME),
    "autocast_dtype": Setting("`--set train.precision=bf16`", "of the encoder's product"),
    # Trainers
    "activation_dim": Setting("", "the site's width is found"),
    "dict_size": Setting("`--num-latents`", "a list, or `--expansion-factor`"),
    "k": Setting("`--k`", "a list"),
    "layer": Setting("`--layers`", SAME),
    "lm_name": Setting("`MODEL`", "the first argument of `saemill run`"),
    "dict_class": Setting("`--architecture`", "it says what is trained and what comes out"),
    "lr": Setting("`--lr`", "a list; automatic by default"),
    "auxk_alpha": Setting("`--auxk-alpha`", SAME),
    "warmup_steps": Setting("`--warmup-steps`", SAME),
    "decay_start": Setting("`--set train.lr_decay_fraction=`", "as a share of the run, from its end"),
    "threshold_beta": Setting("", "0.99, where theirs is 0.999; the first steps weigh alike"),
    "threshold_start_step": Setting("", "the threshold is averaged from the first step on"),
    "group_fractions": Setting(
        "`--set train.prefixes=`", "where the groups end: the sums of theirs; by default their groups"
    ),
    "group_weights": Setting("", "all prefixes weigh alike"),
    "target_l0": Setting("`--target-l0`", "a list; 32 by default, theirs 20"),
    "bandwidth": BANDWIDTH,
    "sparsity_penalty": Setting(
        "", "2, theirs 1; `--set train.sparsity_penalty=` is the kind of penalty, not its weight"
    ),
    "seed": Setting("`--seeds`", "a list"),
    "wandb_name": Setting("`--run-name`", "the group of the runs"),
    "submodule_name": Setting("`--sites`", "the module's path below the base model"),
    "l1_penalty": Setting("`--set train.l1_coefficient=`", L1),
    "initial_sparsity_penalty": Setting("`--set train.l1_coefficient=`", L1),
    "sparsity_function": Setting("`--set train.lp_norm=`", "the power in Lp^p; with relu"),
    "p_start": Setting("`--set train.lp_norm=`", "the same over the whole run"),
    **dict.fromkeys(
        ("p_end", "anneal_start", "anneal_end", "n_sparsity_updates", "sparsity_queue_length"), ANNEALING
    ),
    "sparsity_warmup_steps": PENALTY_WARMUP,
    "resample_steps": Setting(
        "`--set train.resample_at=`",
        "the steps themselves, where theirs is the number between two; with relu",
    ),
    # ActivationBuffer
    "model": Setting("`MODEL`", "the first argument of `saemill run`"),
    "submodule": Setting("`--sites`", "`--sites layers.6.mlp`"),
    "d_submodule": Setting("", "the site's width is found"),
    "io": Setting("`--sites`", "`layers.6.mlp` is the module's output, `layers.6.mlp:in` its input"),
    "n_ctxs": Setting("`--set train.buffer_tokens=`", "in tokens"),
    "ctx_len": Setting("`--ctx-len`", SAME),
    "refresh_batch_size": Setting("`--set cache.batch_size=`", "rows per forward pass"),
    "out_batch_size": Setting("`--batch-size`", "tokens as well"),
    "remove_bos": Setting("`--set cache.mask.special_tokens=`", "true by default"),
}
"""dictionary_learning's: `trainSAE`, its trainers, `ActivationBuffer`."""

TOOLS = {"sparsify": SPARSIFY, "SAELens": SAELENS, "dictionary_learning": DICTIONARY_LEARNING}
HOOK = re.compile(r"blocks\.(\d+)\.hook_(\w+)|blocks\.(\d+)\.[\w.]*hook_\w+|hook_\w+")


def answer(word: str) -> str | None:
    """Translate a setting or flag of another tool, as the end of a sentence; None if no tool has it.

    Args:
        word: its name, with or without dashes before it.
    """
    name = word.lstrip("-").replace("-", "_").rpartition(".")[2]
    meanings: dict[str, list[str]] = {}
    for tool, settings in TOOLS.items():
        if name in settings:
            equivalent, why = settings[name]
            meaning = f"is {equivalent} here" if equivalent else "has no equal here"
            meanings.setdefault(f"{meaning}: {why}" if why and why != SAME else meaning, []).append(tool)
    return "; ".join(f"{name} of {' and '.join(tools)} {what}" for what, tools in meanings.items()) or None


def of_hook(name: str) -> str | None:
    """Translate a hook of TransformerLens; None if the name is no such hook."""
    match = HOOK.fullmatch(name)
    if not match:
        return None
    layer, kind = match.group(1), match.group(2)
    if kind == "resid_post":
        equivalent = f"the residual stream after block {layer} is --layers {layer}"
    elif kind == "resid_pre" and int(layer):
        equivalent = f"the residual stream before block {layer} is --layers {int(layer) - 1}"
    else:
        equivalent = (
            "sites are module paths below transformers' base model, as in --sites 'layers.*.mlp'; "
            "`saemill sites MODEL` tells which of them are hooks there"
        )
    return f"{name} is a hook of TransformerLens; {equivalent}"


def near(word: str, known: Iterable[str]) -> list[str]:
    """List the names that are so near that a slip explains the difference, the nearest first. Dashes before a
    name are ignored."""
    bare = {name.lstrip("-"): name for name in known}
    return [bare[name] for name in difflib.get_close_matches(word.lstrip("-"), bare, n=3, cutoff=0.65)]
