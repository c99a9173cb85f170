"""Embeddings: import-activations, embed."""

from collections.abc import Mapping
from typing import Any

from saemill.commands.flags import OUT, Config, DryRun, Sets, argument, flag, with_flags
from saemill.common.config import resolve
from saemill.embeddings.config import EmbedConfig, ImportConfig


@with_flags(
    ImportConfig,
    argument("source"),
    OUT,
    *("column", "site", "id_column", "text_column", "source_column", "texts"),
    flag("normalize", "--normalize"),
    *("dtype", "width", "raw_dtype", "subset", "split", "revision"),
    *("max_rows", "held_out_fraction", "shard_rows", "compression"),
)
def import_activations(
    *, flags: Mapping[str, Any], config: Config = None, set_: Sets = None, dry_run: DryRun = False
) -> None:
    """Take over embeddings that are stored already, with their texts or ids.

    Every row is checked before the first is written. Killed at any moment, the same command continues.
    Then `saemill train STORE --site embedding` and `saemill assess` work as with tokens.

    Example: `saemill import-activations embeddings.parquet --texts passages.parquet -o acts`
    """
    settings = resolve(ImportConfig, "import-activations", flags, config, set_ or ())
    if dry_run:
        from saemill.common.outlook import tell
        from saemill.embeddings.run import outlook

        tell(outlook(settings))
        return
    from saemill.embeddings.run import run

    run(settings)


@with_flags(
    EmbedConfig,
    argument("dataset"),
    "model",
    OUT,
    *("text_column", "id_column", "source_column", "prompt"),
    flag("normalize", "--normalize"),
    *("dtype", "model_dtype", "site", "batch_size", "device"),
    *("subset", "split", "revision", "model_revision"),
    *("max_rows", "held_out_fraction", "shard_rows", "compression"),
)
def embed(
    *, flags: Mapping[str, Any], config: Config = None, set_: Sets = None, dry_run: DryRun = False
) -> None:
    """Embed texts with an encoder of sentence-transformers, which must be installed.

    The texts are kept beside the vectors. Killed at any moment, the same command continues.

    Example: `saemill embed passages.parquet --model sentence-transformers/all-MiniLM-L6-v2 -o acts`
    """
    settings = resolve(EmbedConfig, "embed", flags, config, set_ or ())
    if dry_run:
        from saemill.common.outlook import tell
        from saemill.embeddings.embed import outlook

        tell(outlook(settings))
        return
    from saemill.embeddings.embed import run

    run(settings)
