"""The stream in whole rows of text, for losses of the model: batch i is a function of (seed, store, i).

Rows are not mixed within shards here: a shard is read from its beginning to its end and put back into the
order of its rows. Shards are visited in a keyed order, and the rows of as many as make `buffer_tokens`, one
shard at least, are shuffled. So every block of the store is read once per epoch, and memory is two such
windows per site.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.permutation import inverse, permutation
from saemill.common.stores.shards import as_tensor
from saemill.train.batch import rows_per_batch
from saemill.train.stream.rows import TrainingRows

SHARD_ORDER, ROW_ORDER = 3, 4


class Text(NamedTuple):
    """The tokens of a batch of whole rows."""

    ids_RS: Tensor
    """int64, token ids."""
    keep_RS: Tensor
    """bool, where activations are trained on; elsewhere they stay as they are."""


@dataclass(frozen=True, slots=True)
class _Epoch:
    """The order of shards in one epoch, and where in its rows each window starts."""

    windows: list[NDArray[np.int64]]
    """Shards of each window."""
    starts: NDArray[np.int64]
    """Rows before each window, and at last all."""


class _Window(NamedTuple):
    """Rows of some shards, shuffled."""

    text: Text
    rows: Mapping[str, Tensor]
    """Stored rows, per site [R, S, C]."""


class WholeRows:
    """Batches of whole rows that are not held out, the same rows at every site.

    Args:
        store: where they are read.
        sites: names of finished sites.
        mask: positions left out; a token that is too long is left out as well. They stay in their rows.
        norm_over_median: as `Loader` has it.
        batch_tokens: tokens per batch, those left out included: a whole number of rows.
        buffer_tokens: about as many tokens are shuffled, in whole shards.
        seed: decides the order.

    Raises:
        StoreError: a site is missing or damaged, or nothing is left to train on.
        ConfigError: the batch is no whole number of rows.
    """

    def __init__(
        self,
        store: ActivationStore,
        sites: list[str],
        mask: MaskConfig,
        *,
        norm_over_median: float | None = None,
        batch_tokens: int,
        buffer_tokens: int,
        seed: int,
    ) -> None:
        self.store, self.mask, self.seed = store, mask, seed
        self.batch_tokens, self.n_rows = batch_tokens, rows_per_batch(batch_tokens, store.ctx_len)
        self.every_site = {name: store.array(name) for name in sites}
        self.sites = self.every_site
        self.rows = TrainingRows(store, self.every_site, mask, norm_over_median)
        self.shards_per_window = max(1, buffer_tokens // store.shard_tokens)
        held_out_R = store.tokens.held_out_R
        self._own_rows = [
            np.array(store.rows_of(i))[~_of(held_out_R, store, i)] for i in range(store.n_shards)
        ]
        for shard, own in enumerate(self._own_rows):  # a batch of rows without a token has no loss
            self._own_rows[shard] = own[self.rows.kept.of_shard(shard)[self._places(shard)].any(1)]
        self.epoch_tokens = sum(map(len, self._own_rows)) * store.ctx_len
        self._epoch = lru_cache(2)(self._plan_epoch)
        self._pool = ThreadPoolExecutor(1, "saemill-window")
        self._windows: dict[tuple[int, int], Future[_Window]] = {}
        self._texts: dict[int, Text] = {}
        """Those of the latest batches, by number: the windows that they were in may be gone."""

    def batch(self, i: int) -> dict[str, Tensor]:
        """Read batch number i.

        Returns: per site [R · S, D] as the store's rows are read, on the CPU; `text` has the rows' tokens.
        """
        return {name: self.sites[name].decode(rows_TC) for name, rows_TC in self.stored(i).items()}

    def stored(self, i: int) -> dict[str, Tensor]:
        """Read batch number i in stored rows, per site [R · S, C]; its `decode` makes activations of them."""
        pieces = [
            (window.rows, some) for window, some in self._pieces(i * self.n_rows, (i + 1) * self.n_rows)
        ]
        return {
            name: torch.cat([rows[name][some] for rows, some in pieces]).flatten(0, 1) for name in self.sites
        }

    def text(self, i: int) -> Text:
        """Return the tokens of batch number i."""
        if i not in self._texts:
            self._texts[i] = _text_of(self._pieces(i * self.n_rows, (i + 1) * self.n_rows))
        return self._texts[i]

    def stretch(self, position: int, end: int) -> dict[str, Tensor]:
        """Read the activations that are trained on of the rows that tokens `position` to `end` of the stream
        lie in, per site [T, D]."""
        first, last = position // self.store.ctx_len, -(-end // self.store.ctx_len)
        pieces = self._pieces(first, last)
        return {
            name: site.decode(torch.cat([w.rows[name][some][w.text.keep_RS[some]] for w, some in pieces]))
            for name, site in self.sites.items()
        }

    def n_left_out(self, position: int) -> int:
        """Count the tokens left out for their norm in the windows that the stream up to a position is of."""
        if not self.rows.n_long or position == 0:
            return 0
        epoch, offset = divmod(position - 1, self.epoch_tokens)
        plan = self._epoch(epoch)
        window = int(np.searchsorted(plan.starts, offset // self.store.ctx_len, side="right")) - 1
        shards = np.concatenate(plan.windows[: window + 1])
        return epoch * self.rows.n_long + sum(len(self.rows.long.get(int(shard), ())) for shard in shards)

    def n_long(self, position: int) -> int:
        """Count the store's rows left out for their norm, each once."""
        return self.rows.n_long

    def is_there(self, i: int) -> bool:
        """Tell that batch number i can be read: the whole store is there."""
        return True

    def sample(self, n_tokens: int, position: int) -> dict[str, Tensor]:
        """Read rows from which SAEs start, the stream's first ones, per site [T, D]; see `stretch`."""
        return self.stretch(0, min(n_tokens, self.epoch_tokens))

    def restrict(self, sites: list[str]) -> None:
        """Read these of the sites only from now on; the stream's order does not depend on them."""
        self.sites = {name: self.every_site[name] for name in sites}
        self._windows.clear()

    def close(self) -> None:
        """End the reading thread."""
        self._pool.shutdown(cancel_futures=True)

    def _pieces(self, row: int, end: int) -> list[tuple[_Window, slice]]:
        """List where rows `row` to `end` of the stream lie."""
        pieces, per_epoch = [], self.epoch_tokens // self.store.ctx_len
        while row < end:
            epoch, offset = divmod(row, per_epoch)
            starts = self._epoch(epoch).starts
            window = int(np.searchsorted(starts, offset, side="right")) - 1
            stop = min(offset + end - row, int(starts[window + 1]))
            pieces.append(
                (self._window(epoch, window), slice(offset - starts[window], stop - starts[window]))
            )
            row += stop - offset
        return pieces

    def _plan_epoch(self, epoch: int) -> _Epoch:
        shards = permutation(self.store.n_shards, self.seed, SHARD_ORDER, epoch)
        windows = np.split(shards, range(self.shards_per_window, len(shards), self.shards_per_window))
        lengths = [sum(len(self._own_rows[shard]) for shard in window) for window in windows]
        return _Epoch(windows, np.concatenate([[0], np.cumsum(lengths)]))

    def _window(self, epoch: int, window: int) -> _Window:
        """Return a window's shuffled rows; the next one starts to be read in the background."""
        n_windows = len(self._epoch(epoch).windows)
        following = (epoch, window + 1) if window + 1 < n_windows else (epoch + 1, 0)
        for key in ((epoch, window), following):
            if key not in self._windows:
                self._windows[key] = self._pool.submit(self._read_window, *key)
        for key in list(self._windows):
            if key not in ((epoch, window), following):
                del self._windows[key]
        return self._windows[epoch, window].result()

    def _read_window(self, epoch: int, window: int) -> _Window:
        shards = [int(shard) for shard in self._epoch(epoch).windows[window]]
        order = permutation(sum(len(self._own_rows[i]) for i in shards), self.seed, ROW_ORDER, epoch, window)
        texts = [self._text(shard) for shard in shards]
        text = Text(*(torch.cat(parts)[order] for parts in zip(*texts, strict=True)))
        return _Window(
            text, {name: torch.cat([self._rows(name, i) for i in shards])[order] for name in self.sites}
        )

    def _text(self, shard: int) -> Text:
        """Read the tokens of a shard's rows that are not held out, in their order."""
        rows, own = self.store.rows_of(shard), self._own_rows[shard]
        ids_RS = self.store.tokens.rows(rows.start, rows.stop)[own - rows.start].astype(np.int64)
        keep_RS = self.rows.kept.of_shard(shard)[self._places(shard)]
        return Text(torch.from_numpy(ids_RS), torch.from_numpy(keep_RS))

    def _rows(self, site: str, shard: int) -> Tensor:
        """Read the stored rows of a shard's rows that are not held out, in their order. [R, S, C]."""
        array, places_RS = self.sites[site], self._places(shard)
        flat_TC = as_tensor(array.stored_at(shard, places_RS.flatten()), array.stored)
        return flat_TC.view(*places_RS.shape, array.columns)

    def _places(self, shard: int) -> NDArray[np.int64]:
        """Find the places of the tokens of a shard's rows that are not held out. int64 [R, S]."""
        places_RS = inverse(self.store.permutation(shard)).reshape(-1, self.store.ctx_len)
        own: NDArray[np.int64] = places_RS[self._own_rows[shard] - self.store.rows_of(shard).start]
        return own


def _text_of(pieces: list[tuple[_Window, slice]]) -> Text:
    """Put the tokens of some rows together."""
    texts = [window.text for window, _ in pieces]
    ids, keep = (
        [rows[some] for rows, (_, some) in zip(each, pieces, strict=True)]
        for each in zip(*texts, strict=True)
    )
    return Text(torch.cat(ids), torch.cat(keep))


def _of(values_R: NDArray[np.bool_], store: ActivationStore, shard: int) -> NDArray[np.bool_]:
    """Select the values of a shard's rows."""
    rows = store.rows_of(shard)
    return values_R[rows.start : rows.stop]
