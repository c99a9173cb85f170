"""One worker's way through the shards: claim one, run the model over it, write it, until none is missing."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from saemill.cache.claims import Claim, Lost, Worker
from saemill.cache.writer import SiteWriter
from saemill.common.log import progress, say
from saemill.common.models.model import LanguageModel, attention_of
from saemill.common.stores.activations import ActivationStore
from saemill.common.world import World

LOOK_SECONDS = 1.0
"""Least time between two looks at what other workers have committed."""


class Filling:
    """The shards of a store that some of the sites lack; others may be filling in the same.

    Args:
        store: the store.
        writers: of the sites asked for.
        model: what computes them.
        worker: this process.
        world: the processes started with this one, who begin at different shards.
        batch_size: rows per forward pass.
    """

    def __init__(
        self,
        store: ActivationStore,
        writers: list[SiteWriter],
        model: LanguageModel,
        worker: Worker,
        world: World,
        batch_size: int,
    ) -> None:
        self.store, self.writers, self.model, self.worker = store, writers, model, worker
        self.batch_size = batch_size
        self.n_written = 0
        """Shards that this worker wrote, counted per site."""
        self._next = store.n_shards * world.rank // world.size
        self._counted: set[int] = set()
        self._looked = 0.0
        self._lacking: list[int] = []

    def run(self) -> None:
        """Return when every shard is committed at all sites, by whomever.

        Raises:
            DataError: NaN or infinite activations.
            Interrupted: a signal came; what was finished is committed.
        """
        total = self.store.n_tokens
        done = self._done()
        self._counted = set(done)
        n_waits = 0
        with (
            progress("cache", total, "tokens", sum(map(self.store.shard_length, done))) as advance,
            _background() as submit,
        ):
            while lacking := self._look(advance, fresh=True):
                if self._round(lacking, advance, submit):
                    n_waits = 0
                    submit(int)  # returns when the last shard is written
                    continue
                holders = self.worker.holders([f"shard-{shard}" for shard in lacking]) or "others"
                self.worker.wait(n_waits, f"waiting for {holders} to write the last shards")
                n_waits += 1

    def _done(self) -> set[int]:
        """Shards that all sites have."""
        return set.intersection(*(writer.committed() for writer in self.writers))

    def _look(self, advance: Callable[[int], None], fresh: bool = False) -> list[int]:
        """Shards that some site lacks; what others have committed is counted as progress."""
        if fresh or time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            done = self._done()
            self._lacking = [shard for shard in range(self.store.n_shards) if shard not in done]
            for shard in done - self._counted:
                advance(self.store.shard_length(shard))
            self._counted |= done
        return self._lacking

    def _round(self, lacking: list[int], advance: Callable[[int], None], submit: Any) -> bool:
        """Write those that nobody has claimed, beginning where the last round ended; whether any was."""
        taken = False
        for shard in sorted(lacking, key=lambda shard: (shard < self._next, shard)):
            self.worker.check_stop()
            if shard not in self._look(advance) or not (claim := self.worker.take(f"shard-{shard}")):
                continue
            needing = [writer for writer in self.writers if not writer.commit_path(shard).exists()]
            if not needing:  # another worker was quicker, and let go of it
                claim.release()
                continue
            captured = self._capture(shard, needing, advance)
            submit(self._write, shard, needing, captured, claim)
            self._next, taken = shard + 1, True
        return taken

    def _capture(
        self, shard: int, writers: list[SiteWriter], advance: Callable[[int], None]
    ) -> dict[str, Tensor]:
        """Activations of one shard in address order, per site [tokens, D] on the CPU.

        Batches start at the shard's first row, so that a shard's bytes do not depend on which shards
        were computed before it.
        """
        store = self.store
        n_tokens = store.shard_length(shard)
        first_row = shard * store.shard_tokens // store.ctx_len
        last_row = first_row + n_tokens // store.ctx_len
        names = [writer.site.name for writer in writers]
        out = {w.site.name: torch.empty(n_tokens, w.site.width, dtype=w.dtype) for w in writers}
        counts = shard not in self._counted
        self._counted.add(shard)
        for row in range(first_row, last_row, self.batch_size):
            self.worker.check_stop()
            stop = min(row + self.batch_size, last_row)
            ids_RS = torch.from_numpy(store.tokens.rows(row, stop).astype("int64"))
            captured = self.model.capture(ids_RS, names, attention_of(ids_RS, store.tokens.tokenizer))
            start = (row - first_row) * store.ctx_len
            for name, x_RSD in captured.items():
                out[name][start : start + ids_RS.numel()] = x_RSD.flatten(0, 1)
            advance(ids_RS.numel() if counts else 0)
        return out

    def _write(
        self, shard: int, writers: list[SiteWriter], captured: dict[str, Tensor], claim: Claim
    ) -> None:
        """Write a shard at some sites; if the claim was lost, what is not written yet is dropped."""
        try:
            for writer in writers:
                writer.write(shard, captured[writer.site.name], claim)
                self.n_written += 1
        except Lost as lost:
            say(f"{lost}; this worker's shard is dropped")
        claim.release()


@contextmanager
def _background() -> Iterator[Any]:
    """A function that runs one call at a time in a thread and raises what the last one raised."""
    pending: list[Future[None]] = []
    with ThreadPoolExecutor(1) as pool:

        def submit(function: Any, *arguments: Any) -> None:
            while pending:
                pending.pop().result()
            pending.append(pool.submit(function, *arguments))

        yield submit
        while pending:
            pending.pop().result()
