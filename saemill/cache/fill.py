"""Rows → model → activations → stored rows → shards: the loop of one worker, until no shard is missing.

Others may be filling in the same store; `sharing` says which shard is this worker's next.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from saemill.cache.claims.worker import Lost, Worker
from saemill.cache.room import Room
from saemill.cache.sharing import Share, Sharing
from saemill.cache.spare import Spare
from saemill.cache.writer import SiteWriter
from saemill.common.log import progress, say
from saemill.common.models.model import LanguageModel, attention_of
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.forms.form import Form

ROWS_AT_ONCE = 16
"""Rows per forward pass where nobody says."""
CPU_TOKENS = 2048
"""Tokens per forward pass of a CPU. The tensors of larger ones are handed back to the system in each block
and taken anew, page by page: a tenth of the time of a model of D 768."""


def batch_rows(asked: int | None, ctx_len: int, device: torch.device) -> int:
    """Choose the rows per forward pass.

    Args:
        asked: the setting.
        ctx_len: tokens per row.
        device: that the model runs on.
    """
    if asked is None and device.type == "cpu":
        return max(1, CPU_TOKENS // ctx_len)
    return asked or ROWS_AT_ONCE


class Filling:
    """The filling of a store: it writes the shards that some of the sites lack.

    Args:
        store: the store.
        writers: of the sites asked for.
        model: what computes them.
        worker: this process.
        room: that shards have on the disk; None where it is not bounded.
        batch_size: rows per forward pass.
    """

    def __init__(
        self,
        store: ActivationStore,
        writers: list[SiteWriter],
        model: LanguageModel,
        worker: Worker,
        room: Room | None,
        batch_size: int,
    ) -> None:
        self.store, self.model, self.worker, self.batch_size = store, model, worker, batch_size
        self.sharing = Sharing(store, writers, worker, room)
        self.permuted = Spare()
        self.n_written = 0
        """Number of shards that this worker wrote, counted per site."""

    def run(self) -> None:
        """Write shards until all are committed at all sites, by this worker or others; or, where those that
        are read are removed, all that some run will read.

        A shard is written in a thread while the model computes the next one.

        Raises:
            DataError: NaN or infinite activations.
            Interrupted: a signal came; what was finished is committed.
        """
        sharing = self.sharing
        one, other = Spare(), Spare()
        with (
            progress("cache", self.store.n_tokens, "tokens", sharing.n_tokens_done) as advance,
            _Background() as background,
        ):
            while sharing.look(advance):
                for share in sharing.claimed(advance):
                    forms = {writer.site.name: writer.form for writer in share.writers}
                    heed = self._heed(share, advance)
                    stored_TC = computed(
                        self.store, self.model, forms, share.shard, self.batch_size, heed, one
                    )
                    background.start(self._write, share, stored_TC)  # when the shard before is written
                    one, other = other, one
                background.wait()
                sharing.wait()

    def _heed(self, share: Share, advance: Callable[[int], None]) -> Callable[[int], None]:
        """Make what is called after each batch: it heeds signals, and counts tokens that are new."""

        def heed(n_tokens: int) -> None:
            self.worker.check_stop()
            if share.is_new:
                advance(n_tokens)

        return heed

    def _write(self, share: Share, stored_TC: dict[str, Tensor]) -> None:
        """Write a shard at the sites that lack it. If the claim was lost, the remaining sites are dropped."""
        n_rows = min(self.batch_size, len(self.store.rows_of(share.shard)))
        try:
            for writer in share.writers:
                stored = stored_TC[writer.site.name]
                writer.write(share.shard, stored, share.claim, self.permuted, n_rows)
                self.n_written += 1
        except Lost as lost:
            say(f"{lost}; this worker's shard is dropped")
        share.claim.release()


def computed(
    store: ActivationStore,
    model: LanguageModel,
    forms: Mapping[str, Form],
    shard: int,
    batch_size: int,
    done: Callable[[int], None],
    spare: Spare,
) -> dict[str, Tensor]:
    """Run the model over the rows of one shard.

    Batches start at the shard's first row, so that a shard's bytes do not depend on which shards were
    computed before it.

    Args:
        store: the store.
        model: what computes them.
        forms: of the activations, by site.
        shard: its number.
        batch_size: rows per forward pass.
        done: called with the number of tokens of each batch, when it is computed.
        spare: memory for the rows.

    Returns: per site the stored rows [tokens, C] in address order, on the CPU.
    """
    tokens, rows = store.tokens, store.rows_of(shard)
    stored_TC = {site: spare.empty(site, form, len(rows) * tokens.ctx_len) for site, form in forms.items()}
    for row in rows[::batch_size]:
        stop = min(row + batch_size, rows.stop)
        ids_RS = torch.from_numpy(tokens.rows(row, stop).astype("int64"))
        captured = model.capture(ids_RS, list(stored_TC), attention_of(ids_RS, tokens.tokenizer))
        start = (row - rows.start) * tokens.ctx_len
        for site, x_RSD in captured.items():
            forms[site].encode(x_RSD.flatten(0, 1), stored_TC[site][start : start + ids_RS.numel()])
        done(ids_RS.numel())
    return stored_TC


class _Background:
    """A thread that runs one task at a time beside this one; used as a context."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None

    def __enter__(self) -> "_Background":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._pool:  # which waits, whatever went wrong
            if kind is None:
                self.wait()

    def start(self, function: Callable[..., None], *arguments: Any) -> None:
        """Start the next task when the one before is done; the error of that one is raised here."""
        self.wait()
        self._running = self._pool.submit(function, *arguments)

    def wait(self) -> None:
        """Wait until no task runs; the error of the last one is raised here."""
        running, self._running = self._running, None
        if running is not None:
            running.result()
