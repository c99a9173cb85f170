"""Batches are counted in tokens: what was surely meant in sequences is refused."""

from saemill.common.errors import ConfigError

MOST_SEQUENCES = 512
"""No more make a batch where batches are counted in sequences."""


def check_batch(batch_size: int, ctx_len: int) -> None:
    """Refuse a batch that was surely meant in sequences, as sparsify counts them: it is no more than a row of
    tokens, and no more than sequences come in.

    Args:
        batch_size: tokens per batch.
        ctx_len: tokens per row; 1 where rows are passages.

    Raises:
        ConfigError: it was.
    """
    most = min(ctx_len, MOST_SEQUENCES)
    if batch_size > most or ctx_len == 1:
        return
    n_rows = batch_size if batch_size * ctx_len > most else 2
    raise ConfigError(
        f"batch_size counts tokens, and {batch_size} of them fill no more than one row of {ctx_len}; for "
        f"{n_rows} rows, as sparsify counts, say {n_rows * ctx_len}; if tokens are meant, take more than "
        f"{most}"
    )


def rows_per_batch(batch_tokens: int, ctx_len: int) -> int:
    """Count the rows of a batch.

    Raises:
        ConfigError: it is no whole number of them.
    """
    if batch_tokens % ctx_len:
        n_rows = max(1, round(batch_tokens / ctx_len))
        raise ConfigError(
            f"a loss of the model needs batches of whole rows, of {ctx_len} tokens each; {batch_tokens:,} "
            f"are no whole number of rows: say batch_size {n_rows * ctx_len} for {n_rows}"
        )
    return batch_tokens // ctx_len
