"""Studies of several models, texts and seeds: generate, compare, diff."""

from collections.abc import Mapping
from typing import Any

from saemill.commands.flags import OUT, Config, Sets, argument, command, flag, with_flags
from saemill.compare.config import CompareConfig
from saemill.diff.config import DiffConfig
from saemill.generate.config import GenerateConfig
from saemill.train.config import TrainConfig


@command(
    GenerateConfig,
    "generate",
    "model",
    OUT,
    *("n_samples", "tokens_per_dataset", "max_tokens", "seed", "temperature", "top_p", "stop_at_eos"),
    *("batch_size", "dtype", "device", "revision"),
)
def generate(config: GenerateConfig) -> None:
    """Write unconditional samples of each model as parquet, every dataset of the same number of tokens.

    A sample begins with BOS and is a function of the seed and its number. SIGTERM or Ctrl-C ends the
    command with code 75; the same command continues. `saemill tokenize OUT/MODEL.parquet` takes the texts,
    with `--text-column input_ids` the sampled ids themselves.

    Example: `saemill generate --model gpt2,distilgpt2 --n-samples 10k --max-tokens 512 -o samples`
    """
    from saemill.generate.run import run

    run(config)


@command(
    CompareConfig,
    "compare",
    argument("saes"),
    OUT,
    *(
        "by",
        "matching",
        "assignment_limit",
        "threshold",
        "acts",
        "local_cache",
        "max_tokens",
        "seed",
        "device",
    ),
)
def compare(config: CompareConfig) -> None:
    """Match the latents of every two SAEs, of other seeds, sources or layers, beside what chance matches.

    Example: `saemill compare runs/seed-0/layers.4-k32-f2048-s0 runs/both-seeds -o comparison`
    """
    from saemill.compare.run import run

    run(config)


@with_flags(
    {"train": TrainConfig, "diff": DiffConfig},
    argument("train.acts"),
    argument("train.with_acts"),
    flag("diff.out", "-o", "--out"),
    flag("train.site", help="Site in both stores; of one store two, joined by +", by_default="the only one"),
    flag("train.architecture", help="Architecture of the crosscoder", by_default="batchtopk"),
    *("train.k", "train.target_l0", "train.expansion_factor", "train.num_latents", "train.lr"),
    flag("train.seeds", "--seed", help="Seed of the initial weights"),
    *("train.batch_size", "train.max_tokens", "train.epochs", "train.save_every", "train.resume"),
    *("diff.measure_tokens", "diff.n_latents", "diff.n_contexts", "diff.context_tokens", "train.device"),
)
def diff(*, flags: Mapping[str, Any], config: Config = None, set_: Sets = None) -> None:
    """Tell what two models share, and what one has alone: a crosscoder over both, its latents, a page.

    Both stores hold the same tokens: `saemill cache` each model on them. Of every latent the page has the
    relative norm, the cosine of its parts and latent scaling, and where it fires. With one store it compares
    two of its sites. Any other setting of the training goes by `--set train.KEY=VALUE`. Killed at any moment,
    the same command goes on.

    Example: `saemill diff acts/base acts/chat --site layers.8 --k 64 -o diffs/chat`

    Example: `saemill diff acts --site layers.2+layers.4 -o diffs/layers`
    """
    from saemill.diff.config import configs_of
    from saemill.diff.run import run

    run(*configs_of(flags, config, set_ or ()))
