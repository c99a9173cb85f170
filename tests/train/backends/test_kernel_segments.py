"""The GPU's kernels that sort pairs by latent and sum over them, against torch."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from kernel_inputs import BF16, DEVICE, dense_codes, distinct, hyper, randn, random_pairs

from saemill.train.backends.gpu.kernels.segments import (
    AuxGradients,
    Segments,
    Terms,
    chunk_sums,
    latent_sums,
    segments,
)

pytestmark = [pytest.mark.no_cover, pytest.mark.usefixtures("seeded")]  # slow enough without being traced


def chunk_ranges(pairs: Segments) -> dict[int, list[int]]:
    """The places in `order_P` that each hot latent's chunks cover, as the kernels compute them."""
    covered: dict[int, list[int]] = {}
    for chunk in range(int(pairs.n_chunks)):
        latent = int(pairs.chunk_latent_C[chunk])
        start = int(pairs.starts[latent]) + (chunk - int(pairs.first_chunk_F[latent])) * pairs.chunk_pairs
        end = min(start + pairs.chunk_pairs, int(pairs.starts[latent + 1]))
        assert start < end
        covered.setdefault(latent, []).extend(range(start, end))
    return covered


@pytest.mark.parametrize(("n_tokens", "f", "k", "chunk"), [(30, 40, 3, 4), (50, 9, 5, 7), (1, 100, 1, 256)])
def test_segments_hold_each_pair_once(n_tokens: int, f: int, k: int, chunk: int) -> None:
    """Oracle: pairs collected per latent in Python, in the order of their numbers."""
    idx = distinct(n_tokens, f, k, hot=f // 2)
    pairs = segments(idx, f, chunk)
    flat = idx.flatten().tolist()
    counts = [flat.count(latent) for latent in range(f)]
    for latent in range(f):
        start, end = pairs.starts[latent : latent + 2].tolist()
        assert pairs.order_P[start:end].tolist() == [p for p, at in enumerate(flat) if at == latent]
    assert [counts[latent] for latent in pairs.latents_F.tolist()] == sorted(counts, reverse=True)
    covered = chunk_ranges(pairs)
    hot = {latent for latent in range(f) if counts[latent] > chunk}
    assert set(covered) == hot
    for latent, places in covered.items():
        assert places == list(range(int(pairs.starts[latent]), int(pairs.starts[latent + 1])))
    assert all(tensor.dtype == torch.int32 for tensor in pairs if isinstance(tensor, Tensor))


@pytest.mark.parametrize("chunk", [1, 2, 16])
def test_chunk_table_holds_the_worst_case(chunk: int) -> None:
    """Oracle: latents with one pair more than a chunk each, which need the most chunks per pair."""
    idx = torch.arange(6, dtype=torch.int32).repeat_interleave(chunk + 1)[:, None].to(DEVICE)
    pairs = segments(idx, 6, chunk)
    assert int(pairs.n_chunks) == 12 == len(pairs.chunk_latent_C)
    assert sum(map(len, chunk_ranges(pairs).values())) == len(idx)


def test_segments_refuse_int64() -> None:
    """Oracle: the sentence."""
    with pytest.raises(TypeError, match="idx_TK must be int32"):
        segments(distinct(2, 4, 1).long(), 4)


@pytest.mark.parametrize("n_shown", [None, 2])
def test_latent_sums_equal_scattered_sums(n_shown: int | None) -> None:
    """Oracle: float64 index_add over the unsorted pairs; one latent has more pairs than a block. Gradients
    are where no code is, too."""
    f, k = 30, 3
    idx, val, dot = random_pairs(300, f, k, hot=4)
    val[idx == 9] = 0
    dpre = randn(300, k)
    aux = AuxGradients(torch.full((f,), -1, dtype=torch.int32), randn(2, 5), randn(2), randn(2, 5))
    aux.slot_F[[29, 7]] = torch.tensor([0, 1], dtype=torch.int32)
    aux = aux._replace(slot_F=aux.slot_F.to(DEVICE))
    found = latent_sums(val, dot, dpre, segments(idx, f), hyper(), aux, n_shown)

    def scattered(values: Tensor) -> Tensor:
        total = torch.zeros(f, dtype=torch.float64, device=DEVICE)
        return total.index_add(0, idx.flatten().long(), values.double().flatten())

    db = scattered(dpre)
    db[[29, 7]] += aux.b_S
    toward = -0.37 * scattered(val * dot)
    assert found.toward_F is not None
    for mine, expected in ((found.dpre_F, scattered(dpre)), (found.toward_F, toward), (found.db_enc_F, db)):
        torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=1e-5)
    shown = val * (torch.arange(k, device=DEVICE) < (n_shown or k))
    assert torch.equal(found.fired_F, scattered(shown) > 0)
    assert n_shown is None or not torch.equal(found.fired_F, scattered(val) > 0)


@pytest.mark.parametrize("n_groups", [1, 3])
def test_chunk_sums_add_up_to_the_latents_gradients(n_groups: int) -> None:
    """Oracle: float64 products of the dense codes with inputs and errors, for the hot latents; with groups
    those of each group apart."""
    f, k, d, n_tokens = 12, 3, 300, 40
    idx, val, dpre = random_pairs(n_tokens, f, k, hot=4)
    x, e = randn(n_tokens, d, dtype=BF16), randn(n_groups * n_tokens, d, dtype=BF16)
    group = torch.randint(0, n_groups, idx.shape, device=DEVICE)
    row = (group * n_tokens + torch.arange(n_tokens, device=DEVICE)[:, None]).int()
    pairs = segments(idx, f, 8)
    partial = chunk_sums(pairs, Terms(x, e, val, dpre, row if n_groups > 1 else None))
    partial = partial[: int(pairs.n_chunks)].double()
    latent = pairs.chunk_latent_C[: int(pairs.n_chunks)].long()
    found = torch.zeros(f, 2, d, dtype=torch.float64, device=DEVICE).index_add(0, latent, partial)
    codes = torch.cat([dense_codes(idx, val * (group == g), f) for g in range(n_groups)])
    expected = torch.stack((dense_codes(idx, dpre, f).T @ x.double(), codes.T @ e.double()), 1)
    hot = (pairs.starts[1:] - pairs.starts[:-1]) > 8
    assert 0 < int(hot.sum()) < f
    torch.testing.assert_close(found, expected * hot[:, None, None], rtol=1e-5, atol=1e-5)
