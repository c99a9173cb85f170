"""What loops and kernels share: chunks, and the encoder's product in bfloat16."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from saemill.train.backends.base import chunks
from saemill.train.backends.codes import Largest
from saemill.train.backends.sparse import encode, fold_bias


def test_bf16_product_finds_nearly_the_same_latents() -> None:
    """Oracle: the float32 product, with inputs far from the origin and b there too: overlap of the
    chosen latents stays above 95%, which a bias of unrounded weights would miss."""
    generator = torch.Generator().manual_seed(2)
    x, w_enc = torch.randn(200, 64, generator=generator), torch.randn(1024, 64, generator=generator) / 8
    b_enc, b = 0.1 * torch.randn(1024, generator=generator), 0.03 * torch.randn(64, generator=generator)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        w = w_enc.to(dtype)
        found.append(
            encode(
                x.to(dtype), w, fold_bias(w, b_enc, b), Largest(32), torch.empty(200, 1024, dtype=dtype)
            ).idx_TK
        )
    shared = sum(len(set(a.tolist()) & set(r.tolist())) for a, r in zip(*found, strict=True))
    assert shared / found[0].numel() > 0.95


@given(st.integers(0, 10_000), st.integers(1, 500), st.integers(1, 5000))
def test_chunks_cover_all_rows_once_in_order(n_rows: int, row_bytes: int, chunk_bytes: int) -> None:
    """Oracle: range(n_rows); no chunk is over its bytes unless it is a single row."""
    found = list(chunks(n_rows, row_bytes, chunk_bytes))
    assert [i for chunk in found for i in range(n_rows)[chunk]] == list(range(n_rows))
    longest = max((chunk.stop - chunk.start for chunk in found), default=1)
    assert longest == 1 or longest * row_bytes <= chunk_bytes
