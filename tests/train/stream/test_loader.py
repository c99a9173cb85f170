"""The stream: complete, shuffled, masked, and a pure function of (seed, store, i)."""

from concurrent.futures import wait
from pathlib import Path

import numpy as np
import pytest
import torch
from stores import make_store

from saemill.common.errors import ConfigError, StoreError
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.mask import MaskConfig
from saemill.train.stream.epochs import open_epochs
from saemill.train.stream.feed import Feed
from saemill.train.stream.loader import Loader
from saemill.train.stream.whole_rows import WholeRows


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Synthetic activations of which dimension 0 and 1 tell the address."""
    return make_store(tmp_path_factory.mktemp("loader"), n_rows=150, ctx_len=32, d=6, shard_tokens=1000)


def loader(store: ActivationStore, **changes: int) -> Loader:
    settings = {"batch_tokens": 100, "buffer_tokens": 1024, "seed": 5} | changes
    return open_epochs(store, ["a", "b"], store.mask, **settings)


def addresses(batch: torch.Tensor) -> list[int]:
    return (batch[:, 0] * 256 + batch[:, 1]).int().tolist()


def expected_addresses(store: ActivationStore, mask: MaskConfig) -> set[int]:
    """Oracle: a loop over rows and positions."""
    found = set()
    for row in range(store.tokens.n_rows):
        ids = store.tokens.rows(row, row + 1)[0]
        for position, token in enumerate(ids):
            masked = mask.special_tokens and token in store.tokens.tokenizer.special_ids
            if not (store.tokens.held_out_R[row] or masked or position < mask.first_positions):
                found.add(row * store.ctx_len + position)
    return found


@pytest.mark.parametrize("mask", [MaskConfig(), MaskConfig(special_tokens=False, first_positions=5)])
def test_an_epoch_is_every_unmasked_training_token_once(store: ActivationStore, mask: MaskConfig) -> None:
    """Oracle: a plain loop over rows; the values name their own address."""
    stream = open_epochs(store, ["a"], mask, batch_tokens=64, buffer_tokens=700, seed=1)
    wanted = expected_addresses(store, mask)
    assert stream.epoch_tokens == len(wanted)
    n_batches = -(-len(wanted) // 64)
    seen = [a for i in range(n_batches) for a in addresses(stream.batch(i)["a"])]
    assert sorted(seen[: len(wanted)]) == sorted(wanted)
    second = [a for i in range(n_batches, 2 * n_batches) for a in addresses(stream.batch(i)["a"])]
    assert second[: len(wanted)] != seen[: len(wanted)]


def test_batches_are_a_pure_function_of_their_number(store: ActivationStore) -> None:
    """Oracle: a fresh loader asked for the same batches in another order."""
    one, other = loader(store), loader(store)
    first = [{name: rows.clone() for name, rows in one.batch(i).items()} for i in range(60)]
    for i in (59, 3, 31, 0, 58):
        for name in ("a", "b"):
            assert torch.equal(other.batch(i)[name], first[i][name])
    assert addresses(first[0]["a"]) != addresses(loader(store, seed=6).batch(0)["a"])


def test_sites_share_addresses(store: ActivationStore) -> None:
    """Oracle: site b holds site a's values plus a constant."""
    batch = loader(store).batch(7)
    torch.testing.assert_close(batch["b"], batch["a"] + 1)


def test_a_loader_of_some_sites_has_the_same_stream(store: ActivationStore) -> None:
    """Oracle: the loader of both sites, before and after; a process of many reads only what it trains."""
    whole, part = loader(store), loader(store)
    part.restrict(["b"])
    assert list(part.batch(3)) == ["b"]
    assert torch.equal(part.batch(3)["b"], whole.batch(3)["b"])
    part.restrict(["a", "b"])
    assert torch.equal(part.batch(4)["a"], whole.batch(4)["a"])


@pytest.mark.parametrize("form", [("int8", None), ("int8", "zstd"), ("bf16", "lz4")])
def test_batches_are_those_of_the_values_that_are_read(form: tuple[str, str | None], tmp_path: Path) -> None:
    """Oracle: a raw fp32 store of what is read of each address; batches of tokens, of whole rows, of sites
    joined, and those that the feed hands over."""
    sizes = {"n_rows": 100, "ctx_len": 32, "d": 6, "shard_tokens": 1024}
    packed = make_store(tmp_path / "packed", **sizes, form=form)
    a_TD, b_TD = (packed.read(site, 0, packed.n_tokens).float() for site in "ab")
    plain = make_store(tmp_path / "plain", **sizes, values_TD=a_TD, b_TD=b_TD)
    settings = {"batch_tokens": 96, "buffer_tokens": 700, "seed": 2}
    for opened, sites in (open_epochs, ["a", "b", "a+b"]), (WholeRows, ["a", "b"]):
        found, wanted = (opened(store, sites, plain.mask, **settings) for store in (packed, plain))
        feed = Feed(found, torch.device("cpu"))
        for i in (0, 7, 31, 60):
            for name in sites:
                assert torch.equal(feed.batch(i)[name].float(), wanted.batch(i)[name])
                assert torch.equal(found.stretch(i, i + 40)[name].float(), wanted.stretch(i, i + 40)[name])
        found.close()
        wanted.close()


def test_batches_mix_documents_from_the_whole_buffer(store: ActivationStore) -> None:
    """Oracle: a random sample of the epoch; mean distance between neighbours is a third of the store."""
    stream = loader(store, buffer_tokens=10_000)
    order = np.array([a for i in range(20) for a in addresses(stream.batch(i)["a"])])
    assert np.abs(np.diff(order)).mean() > 0.9 * store.n_tokens / 3


def test_the_order_is_pinned(store: ActivationStore) -> None:
    """Oracle: values written down once; a change of them breaks resuming of running jobs."""
    assert addresses(loader(store).batch(0)["a"])[:8] == PINNED


PINNED = [23, 513, 595, 1031, 1108, 1176, 1040, 1476]


def test_memory_is_two_windows(store: ActivationStore) -> None:
    """Oracle: the number of windows that the loader keeps after any access."""
    stream = loader(store)
    for i in (0, 5, 11, 12, 40):
        stream.batch(i)
        assert len(stream._windows) <= 2


def test_a_batch_stays_until_the_next_is_asked_for(store: ActivationStore) -> None:
    """Oracle: a copy from before the windows that follow were read, of two epochs."""
    stream = loader(store, buffer_tokens=512)
    for i in range(2 * stream.epoch_tokens // stream.batch_tokens):
        batch = stream.batch(i)
        copies = {name: rows.clone() for name, rows in batch.items()}
        wait([*stream._windows.values()])
        assert all(torch.equal(rows, copies[name]) for name, rows in batch.items())


def test_memory_of_windows_is_used_again(store: ActivationStore) -> None:
    """Oracle: a loader that is new at every batch; where the buffers of three epochs lie."""
    stream, places = loader(store, buffer_tokens=512), set()
    for i in range(3 * stream.epoch_tokens // stream.batch_tokens):
        if i % 5 == 0:
            fresh = loader(store, buffer_tokens=512)
            assert torch.equal(stream.batch(i)["a"], fresh.batch(i)["a"])
            fresh.close()
        stream.batch(i)
        places |= {future.result()["a"].data_ptr() for future in stream._windows.values()}
    assert len(places) < 3 * stream.epoch_tokens // 512 / 2


def test_a_damaged_shard_is_an_error(tmp_path: Path) -> None:
    """Oracle: a flipped bit, a cut file and a missing file raise; nothing reads as zeros."""
    store = make_store(tmp_path, n_rows=40, ctx_len=32, d=6, shard_tokens=1000)
    file = store.path / "a" / "c" / "0" / "0"
    content = bytearray(file.read_bytes())
    content[1234] ^= 1
    file.write_bytes(content)
    stream = open_epochs(store, ["a"], store.mask, batch_tokens=100, buffer_tokens=4096, seed=0)
    with pytest.raises(StoreError, match="differs from its hash"):
        stream.batch(0)
    for damage in (content[:-1], None):
        file.unlink()
        if damage is not None:
            file.write_bytes(damage)
        with pytest.raises(StoreError, match="damaged"):
            open_epochs(store, ["a"], store.mask, batch_tokens=100, buffer_tokens=4096, seed=0)


def test_nothing_left_is_an_error(store: ActivationStore) -> None:
    """Oracle: a mask over every position, and one over every token."""
    with pytest.raises(ConfigError, match="nothing would be left to train on"):
        open_epochs(store, ["a"], MaskConfig(first_positions=32), batch_tokens=1, buffer_tokens=1, seed=0)
    every = tuple(np.unique(store.tokens.rows(0, store.tokens.n_rows)).tolist())
    with pytest.raises(StoreError, match="nothing to train on"):
        open_epochs(store, ["a"], MaskConfig(token_ids=every), batch_tokens=1, buffer_tokens=1, seed=0)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
        ),
    ],
)
def test_feed_passes_on_the_loaders_batches(store: ActivationStore, device: str) -> None:
    """Oracle: the loader itself; batches asked for ahead, or not, or from the middle on."""
    feed, source = Feed(loader(store), torch.device(device)), loader(store)
    for i in (5, 6, 7, 8, 9):
        batch = feed.batch(i)
        if i % 2:
            feed.prefetch(i + 1)
        for site, rows in source.batch(i).items():
            assert batch[site].device.type == device
            assert torch.equal(batch[site].cpu(), rows)
