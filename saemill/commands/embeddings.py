"""Embeddings: import-activations, embed."""

from pathlib import Path
from typing import Annotated

import typer

from saemill.commands.flags import Config, Device, Sets, option, resolved

Out = Annotated[Path | None, typer.Option("-o", "--out", help="Activation store to write.")]
Normalize = Annotated[bool | None, typer.Option("--normalize", help="Divide each vector by its length.")]
HeldOut = Annotated[str | None, option("Share of the rows never trained on [0.1].", "X")]
ShardRows = Annotated[str | None, option("Rows per shard file [64 MiB of them].")]
MaxRows = Annotated[str | None, option("Take only so many rows, the first ones.")]
Subset = Annotated[str | None, option("The hub dataset's configuration.", "NAME")]
Split = Annotated[str | None, option("Split of a dataset [train].", "NAME")]
Revision = Annotated[str | None, option("The hub dataset's revision.", "REV")]


def import_activations(
    source: Annotated[
        str | None,
        typer.Argument(
            help="File, folder or glob: parquet, arrow, jsonl(.gz), npy, npz, pt, safetensors or raw rows; "
            "a saved dataset or a hub id."
        ),
    ] = None,
    out: Out = None,
    column: Annotated[
        str | None,
        option("Column of the vectors, or name of the array [embedding, or the only one].", "NAME"),
    ] = None,
    site: Annotated[str | None, option("What they are called in the store [as the column].", "NAME")] = None,
    id_column: Annotated[str | None, option("Column of ids [id, if there is one].", "NAME")] = None,
    text_column: Annotated[str | None, option("Column of texts [text, if there is one].", "NAME")] = None,
    texts: Annotated[
        str | None,
        option("Table of the texts, if elsewhere: joined by id, or by order if there are no ids.", "FILE"),
    ] = None,
    normalize: Normalize = None,
    dtype: Annotated[
        str | None,
        option("Stored type: bf16, fp16, fp32 [as they come; float64 and normalized: fp32].", "TYPE"),
    ] = None,
    width: Annotated[str | None, option("Values per vector of raw rows.")] = None,
    raw_dtype: Annotated[str | None, option("Type of raw rows: fp32, fp16, bf16, fp64.", "TYPE")] = None,
    subset: Subset = None,
    split: Split = None,
    revision: Revision = None,
    max_rows: MaxRows = None,
    held_out_fraction: HeldOut = None,
    shard_rows: ShardRows = None,
    config: Config = None,
    set_: Sets = None,
) -> None:
    """Take over embeddings that are stored already, with their texts or ids.

    Every row is checked before the first is written. Killed at any moment, the same command continues.
    Then `saemill train STORE --site embedding` and `saemill assess` work as with tokens.

    Example: `saemill import-activations embeddings.parquet --texts passages.parquet -o acts`
    """
    from saemill.embeddings.run import ImportConfig, run

    run(resolved(ImportConfig, "import-activations", locals()))


def embed(
    dataset: Annotated[
        str | None, typer.Argument(help="Hub id, or file or folder: parquet, jsonl(.gz), csv, arrow, txt.")
    ] = None,
    model: Annotated[str | None, option("Hub id or folder of a sentence-transformers model.", "NAME")] = None,
    out: Out = None,
    text_column: Annotated[str | None, option("Column that holds the text [text].", "NAME")] = None,
    id_column: Annotated[str | None, option("Column of ids [id, if there is one].", "NAME")] = None,
    prompt: Annotated[str | None, option("Put before each text, as some encoders want it.", "TEXT")] = None,
    normalize: Normalize = None,
    dtype: Annotated[str | None, option("Stored type: bf16, fp16, fp32 [fp32].", "TYPE")] = None,
    model_dtype: Annotated[
        str | None, option("Type the model computes in: bf16, fp16, fp32 [fp32].", "TYPE")
    ] = None,
    site: Annotated[str | None, option("What they are called in the store [embedding].", "NAME")] = None,
    batch_size: Annotated[str | None, option("Texts per forward pass [32].")] = None,
    device: Device = None,
    subset: Subset = None,
    split: Split = None,
    revision: Revision = None,
    model_revision: Annotated[str | None, option("The hub model's revision.", "REV")] = None,
    max_rows: MaxRows = None,
    held_out_fraction: HeldOut = None,
    shard_rows: ShardRows = None,
    config: Config = None,
    set_: Sets = None,
) -> None:
    """Embed texts with an encoder of sentence-transformers, which must be installed.

    The texts are kept beside the vectors. Killed at any moment, the same command continues.

    Example: `saemill embed passages.parquet --model sentence-transformers/all-MiniLM-L6-v2 -o acts`
    """
    from saemill.embeddings.embed import EmbedConfig, run

    run(resolved(EmbedConfig, "embed", locals()))
