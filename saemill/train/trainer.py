"""The loop: read a batch, step every bank, log now and then, save now and then."""

import threading
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from saemill.common.errors import Interrupted
from saemill.common.log import say
from saemill.train import checkpoint
from saemill.train.bank import Bank
from saemill.train.feed import Feed
from saemill.train.loader import Loader
from saemill.train.metrics import Record, Sink
from saemill.train.profile import part, profiling
from saemill.train.schedule import Schedule


@dataclass(slots=True)
class Trainer:
    """One training run over banks that share a stream."""

    loader: Loader
    feed: Feed
    """Its batches on the device."""
    banks: list[Bank]
    schedule: Schedule
    log_every: int
    """Steps between log lines."""
    save_every: int
    """Steps between checkpoints."""
    checkpoint_path: Path
    device: torch.device
    stop: threading.Event
    """When set, the run saves and ends after the step in hand."""
    sinks: list[Sink] = field(default_factory=list)
    step: int = 0
    """Steps done."""
    seconds: float = 0.0
    """Time spent in them, earlier runs included."""
    profile: bool = False
    """Whether to write where the time goes beside the checkpoint."""
    _mark: tuple[int, float] = (0, 0.0)
    """`step` and `seconds` at the last log line."""

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        if self.checkpoint_path.exists():
            state = checkpoint.load(self.checkpoint_path, self.banks, self.device)
            self.step, self.seconds = state["step"], state["seconds"]

    def run(self) -> None:
        """Train to the end.

        Raises:
            Interrupted: `stop` was set; a checkpoint was written.
        """
        with torch.no_grad(), self._profiler() as profiler:
            self._mark = self.step, self.seconds
            while self.step < self.schedule.n_steps:
                started = time.perf_counter()
                self._one_step()
                self.seconds += time.perf_counter() - started
                with part("logging"):
                    self._after_step()
                if profiler is not None:
                    profiler.step()

    def _profiler(self) -> AbstractContextManager[torch.profiler.profile | None]:
        folder = self.checkpoint_path.parent
        return profiling(folder, self.device) if self.profile else nullcontext()

    def _after_step(self) -> None:
        """Log, save and stop, where it is time for it."""
        finished = self.step == self.schedule.n_steps
        if self.step % self.log_every == 0 or finished:
            self._log()
        if self.step % self.save_every == 0 or finished or self.stop.is_set():
            checkpoint.save(self.checkpoint_path, self.step, self.banks, self.seconds)
        if self.stop.is_set() and not finished:
            raise Interrupted(
                f"stopped by a signal after step {self.step:,}; the same command continues from "
                f"{self.checkpoint_path}"
            )

    def _one_step(self) -> None:
        with part("wait for data"):
            batch = self.feed.batch(self.step)
        for bank in self.banks:
            with part("copy"):
                x_TD = bank.frame.enter(batch[bank.variants[0].site])
            bank.step(x_TD, self.schedule.factor(self.step), self.step)
        self.step += 1
        if self.step < self.schedule.n_steps:
            self.feed.prefetch(self.step)

    def _log(self) -> None:
        n_steps = self.step - (self.step - 1) // self.log_every * self.log_every
        step_before, seconds_before = self._mark
        self._mark = self.step, self.seconds
        n_tokens = (self.step - step_before) * self.loader.batch_tokens
        factor = self.schedule.factor(self.step - 1)
        variants: dict[str, dict[str, float | None]] = {}
        for bank in self.banks:
            for variant, at in bank.freeze_diverged():
                say(f"{variant.name} diverged at step {at:,}: its loss is not finite. The others go on.")
            for i, variant in enumerate(bank.variants):
                totals = bank.totals_V[i].take(bank.b_VD.shape[1], n_steps)
                if bank.frozen[i]:
                    totals = dict.fromkeys(totals)
                variants[variant.name] = {
                    **totals,
                    "dead_fraction": bank.dead_fraction(i),
                    "lr": 0.0 if bank.frozen[i] else variant.lr * factor,
                }
        record: Record = {
            "step": self.step,
            "tokens": self.step * self.loader.batch_tokens,
            "tokens_per_s": n_tokens / (self.seconds - seconds_before),
            "seconds": self.seconds,
            "variants": variants,
        }
        for sink in self.sinks:
            sink.log(record)
