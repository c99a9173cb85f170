"""SAEs and tokens to and from other tools: export, import, export-tokens."""

from pathlib import Path
from typing import Annotated

import typer

from saemill.commands.flags import option


def export(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...",
            help="An SAE's folder: RUN/VARIANT, or hf://user/repo/VARIANT. For circuit-tracer a run, or "
            "several folders: a transcoder of each layer.",
        ),
    ],
    format_: Annotated[
        str,
        typer.Option(
            "--format", metavar="NAME", help="sparsify, saelens, dictionary_learning or circuit-tracer."
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write, new or empty.")],
    model: Annotated[str | None, option("The model, if not where it was cached from.", "NAME")] = None,
) -> None:
    """Write an SAE in the format of another tool, or a set of transcoders for circuit-tracer.

    Example: `saemill export runs/first/layers.8-k32-f6144-s0 --format saelens -o for-saelens`,
    `saemill export runs/transcoders --format circuit-tracer -o set`
    """
    from saemill import convert, transcoder_set
    from saemill.common.errors import ConfigError

    if format_ == "circuit-tracer":
        transcoder_set.export(paths, out, model)
    elif len(paths) > 1:
        raise ConfigError(f"{format_} has a folder for each SAE, got {len(paths)} SAEs; export one at a time")
    else:
        convert.export(paths[0], format_, out, model)


def import_(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="SAE...",
            help="An SAE's folder, or hf://user/repo/…; its file where the format has one for each: a "
            "layer of a circuit-tracer set, a pickle. Several with --acts.",
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write, new or empty.")],
    model: Annotated[
        str | None, option("The model it was trained on; its config tells the SAE's site.", "NAME")
    ] = None,
    acts: Annotated[
        str | None,
        option(
            "Cached activations: the SAEs become a run on these, for assess, latent, view and others.",
            "STORE",
        ),
    ] = None,
    with_acts: Annotated[
        str | None,
        option("With --acts: the second model's activations, of crosscoders of two models.", "STORE"),
    ] = None,
    site: Annotated[
        str | None, option("With --acts: the site that they read, where their files do not tell.", "SITE")
    ] = None,
    target_site: Annotated[
        str | None, option("With --acts: the site that transcoders predict, likewise.", "SITE")
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="What it is, where its files could be of several formats: sparsify, saelens, "
            "dictionary_learning, circuit-tracer, gemma-scope, gemma-scope-2, llama-scope, openai, "
            "qwen-scope, linear-layers (Goodfire, DeepSeek-R1) or attention-z. Default: as recognised.",
        ),
    ] = None,
) -> None:
    """Take over an SAE of another tool, or a published one.

    With `--acts` SAEs become a run on cached activations, under the names of their folders: `assess` gives
    their figures, verdict and page, `latent`, `view`, `explain` and `compare` take them too.

    Example: `saemill import downloaded/blocks.8.hook_resid_post --model EleutherAI/pythia-160m -o sae`,
    `saemill import hf://google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71 -o sae`,
    `saemill import downloaded/* --acts acts -o theirs; saemill assess theirs`,
    `saemill import crosscoder --acts acts/base --with-acts acts/chat -o both`
    """
    from saemill.common.errors import ConfigError
    from saemill.convert import import_ as take
    from saemill.imported_run import import_run

    if acts is not None:
        sites = {"site": site, "target_site": target_site}
        import_run(paths, acts, out, with_acts=with_acts, model=model, format=format_, **sites)
        return
    for name, value in (("with-acts", with_acts), ("site", site), ("target-site", target_site)):
        if value is not None:
            raise ConfigError(f"--{name} has no effect without --acts; leave it out")
    if len(paths) > 1:
        raise ConfigError(
            f"several SAEs make up a run on cached activations, got {len(paths)}; name these with --acts, or "
            "import one at a time"
        )
    take(paths[0], out, model, format_)


def export_tokens(
    tokens: Annotated[Path, typer.Argument(help="A token store.")],
    out: Annotated[Path, typer.Argument(help="Folder to write, new or empty.")],
    held_out: Annotated[
        bool, typer.Option("--held-out", help="The held-out rows, in place of those that are trained on.")
    ] = False,
    push_to_hub: Annotated[
        str | None, option("Upload it as a dataset too; created if it is not there.", "USER/REPO")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
) -> None:
    """Write a token store's rows as a dataset that SAELens and sparsify train on.

    It is a `save_to_disk` folder with the column `input_ids`, and SAELens' metadata of it.

    Example: `saemill export-tokens tokens for-saelens`
    """
    from saemill import token_export
    from saemill.common.errors import ConfigError
    from saemill.hub.exported import push_exported
    from saemill.hub.push import check_may_push, check_repo

    if private and push_to_hub is None:
        raise ConfigError("--private has no effect without --push-to-hub; leave it out")
    if push_to_hub is not None:
        check_repo(push_to_hub)
        check_may_push()
    rows = token_export.export(tokens, out, held_out)
    if push_to_hub is not None:
        push_exported(rows, out, push_to_hub, private)
