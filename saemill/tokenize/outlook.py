"""What tokenizing will write, where it is known how many rows there will be."""

from dataclasses import replace

from saemill.common import durable
from saemill.common.log import counted
from saemill.common.outlook import Outlook, process_bytes
from saemill.common.stores import word_labels
from saemill.common.stores.tokens import TokenStore
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.row_files import shard_rows_of
from saemill.tokenize.writer import id_type

FILES_BESIDE = 8
"""Files of a token store beside its shards and those of the tokenizer."""


def outlook_of(config: TokenizeConfig, vocab_size: int, ctx_len: int, n_rows: int | None) -> Outlook:
    """Work out what is written; without a number of rows, nothing but what is read.

    Args:
        config: of the stage.
        vocab_size: of the tokenizer.
        ctx_len: tokens per row.
        n_rows: how many there will be; None where nobody knows yet.
    """
    if n_rows is None:
        return Outlook(stage="tokenize", what=(f"{config.title} into rows of {ctx_len}",), folder=config.out)
    shard_rows = min(n_rows, shard_rows_of(ctx_len))
    n_shards = -(-n_rows // shard_rows)
    n_labels = len(config.word_labels)
    shard_bytes = (
        shard_rows * ctx_len * (id_type(vocab_size).itemsize + n_labels * word_labels.DTYPE.itemsize)
    )
    return Outlook(
        stage="tokenize",
        what=(
            f"{config.title} into {counted(n_rows, 'row')} of {ctx_len}, at most "
            f"{n_rows * ctx_len:,} tokens; a share of {config.held_out_fraction:g} held out",
        ),
        folder=config.out,
        amounts={"max_tokens": n_rows * ctx_len},
        least=ctx_len,
        disk={"tokens": n_shards * shard_bytes},
        n_files=n_shards * (1 + n_labels) + FILES_BESIDE,
        memory={"libraries": process_bytes(), "a shard": 2 * shard_bytes},
    )


def outlook_of_rows(config: TokenizeConfig, some: TokenStore, n_rows: int) -> Outlook:
    """Work out what is written from a store of some of the rows: its tokenizer, and by their share its
    tables."""
    outlook = outlook_of(config, some.tokenizer.vocab_size, some.ctx_len, n_rows)
    tokenizer = durable.folder_bytes(some.tokenizer_folder)
    tables = sum(file.stat().st_size for file in some.path.glob("*.parquet")) * n_rows // some.n_rows
    n_files = outlook.n_files + sum(1 for _ in some.tokenizer_folder.iterdir())
    return replace(outlook, disk={**outlook.disk, "tokenizer": tokenizer, "tables": tables}, n_files=n_files)
