"""Studies of several models, texts and seeds: generate, compare."""

from saemill.commands.flags import OUT, argument, command
from saemill.compare.config import CompareConfig
from saemill.generate.config import GenerateConfig


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
    *("by", "matching", "assignment_limit", "threshold", "acts", "max_tokens", "seed", "device"),
)
def compare(config: CompareConfig) -> None:
    """Match the latents of every two SAEs, of other seeds, sources or layers, beside what chance matches.

    Example: `saemill compare runs/seed-0/layers.4-k32-f2048-s0 runs/both-seeds -o comparison`
    """
    from saemill.compare.run import run

    run(config)
