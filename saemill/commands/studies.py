"""Studies of several models, texts and seeds: generate, compare."""

from pathlib import Path
from typing import Annotated

import typer

from saemill.commands.flags import Config, Device, Sets, option, resolved


def generate(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Hub id or folder of a causal model; repeat or separate by commas.", metavar="M,…"),
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder to write.")] = None,
    n_samples: Annotated[str | None, option("Samples per model, before the cut to one size.")] = None,
    tokens_per_dataset: Annotated[
        str | None, option("In place of n-samples: sample until each model has so many tokens.")
    ] = None,
    max_tokens: Annotated[str | None, option("Most tokens per sample [256].")] = None,
    seed: Annotated[str | None, option("Seed of the samples [42].")] = None,
    temperature: Annotated[str | None, option("Divides the logits [1.0].", "X")] = None,
    top_p: Annotated[
        str | None, option("Sample from the most probable tokens that sum to this; 1 from all [0.9].", "X")
    ] = None,
    stop_at_eos: Annotated[bool | None, typer.Option(help="A sample ends before an EOS [on].")] = None,
    batch_size: Annotated[str | None, option("Samples at once [32].")] = None,
    dtype: Annotated[
        str | None, option("bf16, fp16, fp32 [auto: bf16 on a GPU, fp32 on a CPU].", "TYPE")
    ] = None,
    device: Device = None,
    revision: Annotated[str | None, option("The hub models' revision.", "REV")] = None,
    config: Config = None,
    set_: Sets = None,
) -> None:
    """Write unconditional samples of each model as parquet, every dataset of the same number of tokens.

    A sample begins with BOS and is a function of the seed and its number. SIGTERM or Ctrl-C ends the
    command with code 75; the same command continues. `saemill tokenize OUT/MODEL.parquet` takes the texts,
    with `--text-column input_ids` the sampled ids themselves.

    Example: `saemill generate --model gpt2,distilgpt2 --n-samples 10k --max-tokens 512 -o samples`
    """
    from saemill.generate.run import GenerateConfig, run

    run(resolved(GenerateConfig, "generate", locals()))


def compare(
    saes: Annotated[
        list[Path] | None, typer.Argument(help="Folders of SAEs, and of runs for all of their SAEs.")
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for a report [none].")] = None,
    by: Annotated[
        str | None, option("Cosine of decoder or encoder rows, or activations [decoder].", "WHAT")
    ] = None,
    matching: Annotated[
        str | None, option("assignment, or nearest for wide dictionaries [assignment].", "KIND")
    ] = None,
    assignment_limit: Annotated[str | None, option("Most latents for an assignment [16384].")] = None,
    threshold: Annotated[
        str | None, option("Matched latents more similar than this are shared [0.7].", "X")
    ] = None,
    acts: Annotated[
        list[str] | None,
        typer.Option(
            help="Activation store of the SAEs' model: leaves out latents that its held-out tokens do not "
            "make fire; repeat for several models.",
            metavar="STORE",
        ),
    ] = None,
    max_tokens: Annotated[str | None, option("Most of these tokens [131072].")] = None,
    seed: Annotated[str | None, option("Seed of the random dictionaries [0].")] = None,
    device: Device = None,
    config: Config = None,
    set_: Sets = None,
) -> None:
    """Match the latents of every two SAEs, of other seeds, sources or layers, beside what chance matches.

    Example: `saemill compare runs/seed-0/layers.4-k32-f2048-s0 runs/both-seeds -o comparison`
    """
    from saemill.compare.run import CompareConfig, run

    run(
        resolved(
            CompareConfig,
            "compare",
            locals() | {"saes": tuple(saes or ()) or None, "acts": tuple(acts or ()) or None},
        )
    )
