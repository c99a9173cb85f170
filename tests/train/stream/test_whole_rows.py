"""The stream of whole rows: complete, shuffled by row, masked, and a pure function of (seed, store, i)."""

import pytest
import torch
from stores import make_store

from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.mask import MaskConfig
from saemill.train.stream.whole_rows import WholeRows

CTX_LEN, PER_BATCH = 32, 4


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Synthetic activations of which dimension 0 and 1 tell the address; rows go over the ends of shards."""
    return make_store(tmp_path_factory.mktemp("whole"), n_rows=150, ctx_len=CTX_LEN, d=6, shard_tokens=1024)


def stream(store: ActivationStore, mask: MaskConfig | None = None, buffer_tokens: int = 3000) -> WholeRows:
    return WholeRows(
        store, ["a", "b"], mask or store.mask, batch_tokens=PER_BATCH * CTX_LEN, buffer_tokens=buffer_tokens,
        seed=5,
    )  # fmt: skip


def rows_of(batch: torch.Tensor) -> list[int]:
    """Numbers of a batch's rows, whose tokens must be in their order, one behind the other."""
    addresses_RS = (batch[:, 0] * 256 + batch[:, 1]).long().view(-1, CTX_LEN)
    assert torch.equal(addresses_RS, addresses_RS[:, :1] + torch.arange(CTX_LEN))
    return (addresses_RS[:, 0] // CTX_LEN).tolist()


def test_an_epoch_is_every_training_row_once(store: ActivationStore) -> None:
    """Oracle: the rows that are not held out; ids and masks by a plain loop; another order next time."""
    source = stream(store)
    wanted = [row for row in range(150) if not store.tokens.held_out_R[row]]
    n_batches = -(-len(wanted) // PER_BATCH)
    seen: list[int] = []
    for i in range(n_batches):
        batch, text = source.batch(i), source.text(i)
        assert torch.equal(batch["b"], batch["a"] + 1), "the same rows at every site"
        for row, ids, keep in zip(rows_of(batch["a"]), text.ids_RS, text.keep_RS, strict=True):
            true = store.tokens.rows(row, row + 1)[0]
            special = store.tokens.tokenizer.special_ids
            assert ids.tolist() == true.tolist()
            assert keep.tolist() == [
                not (store.mask.special_tokens and token in special) and place >= store.mask.first_positions
                for place, token in enumerate(true)
            ]
        seen += rows_of(batch["a"])
    assert sorted(seen[: len(wanted)]) == wanted
    assert source.epoch_tokens == len(wanted) * CTX_LEN
    later = [row for i in range(n_batches, 2 * n_batches) for row in rows_of(source.batch(i)["a"])]
    assert later[: len(wanted)] != seen[: len(wanted)]
    source.close()


def test_batches_are_a_pure_function_of_their_number(store: ActivationStore) -> None:
    """Oracle: a fresh stream asked for the same batches in another order."""
    one, other = stream(store), stream(store)
    first = [one.batch(i)["a"] for i in range(50)]
    for i in (49, 3, 30, 3, 48, 0):
        assert torch.equal(other.batch(i)["a"], first[i])
    one.close()
    other.close()


def test_a_row_without_a_token_to_train_on_is_in_no_batch(store: ActivationStore) -> None:
    """Oracle: the rows that hold a token beside those that are masked, by a plain loop."""
    first = next(row for row in range(150) if not store.tokens.held_out_R[row])
    masked = set(store.tokens.rows(first, first + 1)[0].tolist())
    mask = MaskConfig(special_tokens=False, token_ids=tuple(sorted(masked)))
    source = stream(store, mask)
    wanted = [
        row
        for row in range(150)
        if not store.tokens.held_out_R[row] and set(store.tokens.rows(row, row + 1)[0].tolist()) - masked
    ]
    assert first not in wanted
    seen = [row for i in range(len(wanted) // PER_BATCH) for row in rows_of(source.batch(i)["a"])]
    assert set(seen) <= set(wanted)
    assert source.epoch_tokens == len(wanted) * CTX_LEN
    source.close()
