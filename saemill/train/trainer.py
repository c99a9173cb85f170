"""The loop: read a batch, step every bank, log now and then, save now and then."""

import itertools
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from saemill.common.errors import Interrupted
from saemill.common.log import say
from saemill.common.records import File
from saemill.common.world import Group
from saemill.train.backends.team import ALONE, ONE, Team
from saemill.train.following import Following
from saemill.train.learner.bank import Bank
from saemill.train.learner.learner import Learner
from saemill.train.profile import profiling, region
from saemill.train.record import checkpoint
from saemill.train.record.metrics import JsonlSink, Record, Sink
from saemill.train.stream.feed import Feed
from saemill.train.stream.loader import Loader
from saemill.train.stream.whole_rows import WholeRows
from saemill.train.sweep.halving import window
from saemill.train.sweep.schedule import Schedule
from saemill.train.watch.watch import Watch

Metrics = dict[str, dict[str, float | None]]
"""Metrics of variants, by name."""


class Points(Protocol):
    """Writes the SAEs as they are after some steps of a run."""

    def after_step(self, trainer: "Trainer") -> None:
        """Write them, if it is time for it. All processes call it together."""


@dataclass(slots=True)
class Trainer:
    """One training run over banks that share a stream."""

    loader: Loader | WholeRows
    feed: Feed
    """The loader's batches, on the device."""
    banks: list[Bank]
    """Banks of this process."""
    names: list[str]
    """All variants of the run, in its order."""
    schedule: Schedule
    log_every: int
    """Steps between log lines."""
    save_every: int
    """Steps between checkpoints."""
    folder: Path
    """Folder of the run, for checkpoints and profiles."""
    device: torch.device
    stop: threading.Event
    """Event: when set, the run saves and ends after the step in hand."""
    everyone: Group = ONE
    """All processes of the run; the first logs for all."""
    team: Team = ALONE
    """Processes that train the same variants."""
    run_hash: str = ""
    """Hash by which the run's records name it."""
    log: JsonlSink | None = None
    """`metrics.jsonl`, on the first process."""
    sinks: list[Sink] = field(default_factory=list)
    """Other sinks of the metrics."""
    logged: File | None = None
    """The log as the checkpoint that the run goes on from knows it."""
    step: int = 0
    """Steps done."""
    seconds: float = 0.0
    """Time spent in them, in seconds, earlier runs included."""
    watch: Watch | None = None
    """Measurements on held-out text."""
    points: Points | None = None
    """What keeps SAEs on the way."""
    following: Following | None = None
    """What waits for shards, where the store is still being filled."""
    profile: bool = False
    """Whether to write where the time goes beside the checkpoint."""
    _mark: tuple[int, float] = (0, 0.0)
    """`step` and `seconds` at the last log line."""

    @property
    def learners(self) -> list[Learner]:
        """List the learners of this process."""
        return [learner for bank in self.banks for learner in bank.learners]

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        record = checkpoint.load(self.folder, self.learners, self.everyone)
        if record is not None:
            self.step, self.seconds, self.logged = record.step, record.seconds, record.metrics
            for bank in self.banks:
                bank.refresh()

    def run(self, end: int) -> None:
        """Train until `end` steps are done; at `window(end)` the longer sums start anew.

        Raises:
            Interrupted: `stop` was set; a checkpoint was written.
        """
        with torch.no_grad(), self._profiler() as profiler:
            self._mark = self.step, self.seconds
            while self.step < end:
                if self.step == window(end):
                    self._open_windows()
                self._wait_for_data()
                started = time.perf_counter()
                self._one_step()
                with region("wait for processes"):
                    stopped = self.everyone.any(self.stop.is_set())
                self.seconds += time.perf_counter() - started
                with region("logging"):
                    self._after_step(stopped, end)
                if profiler is not None:
                    profiler.step()

    def _profiler(self) -> AbstractContextManager[torch.profiler.profile | None]:
        enabled = self.profile and self.everyone.rank == 0
        return profiling(self.folder, self.device) if enabled else nullcontext()

    def _wait_for_data(self) -> None:
        """Wait until the next batch is on the disk, where the store is still being filled.

        Raises:
            Interrupted: a signal came; a checkpoint was written.
        """
        if self.following is None:
            return
        while self.everyone.any(not self.loader.is_there(self.step)):
            if self.everyone.any(self.stop.is_set()):
                if self.step:
                    self._save()
                raise self._interrupted()
            self.following.wait()
        self.following.waits = 0

    def _open_windows(self) -> None:
        for learner in self.learners:
            learner.totals.open_window()

    def scores(self, metric: str) -> dict[str, float | None]:
        """Return a metric of every variant of the run over the last steps, on all processes."""
        own_scores = {learner.variant.name: learner.score(metric) for learner in self.learners}
        return {
            name: score
            for each in self.everyone.all_gather_objects(own_scores)
            for name, score in each.items()
        }

    def _after_step(self, stopped: bool, end: int) -> None:
        """Log, save and stop where it is time for it."""
        finished = self.step == end
        if self.step % self.log_every == 0 or finished:
            self._log(finished)
        if self.points is not None:
            self.points.after_step(self)
        if self.step % self.save_every == 0 or finished or stopped or self._frees_shards():
            self._save()
        if stopped and not finished:
            raise self._interrupted()

    def _frees_shards(self) -> bool:
        """Tell whether a checkpoint now lets the store remove shards that are trained on."""
        following = self.following
        if following is None or not following.enters(self.step):
            return False
        return self.everyone.any(following.frees())

    def _save(self) -> None:
        """Write a checkpoint. All processes call it together."""
        checkpoint.save(
            self.folder, self.run_hash, self.step, self.learners, self.seconds, self.everyone, self.log
        )
        if self.following is not None:
            self.following.saved(self.step, self.everyone)

    def _interrupted(self) -> Interrupted:
        return Interrupted(
            f"stopped by a signal after step {self.step:,}; the same command continues from the "
            f"checkpoint in {self.folder} (without --no-resume)"
        )

    def _one_step(self) -> None:
        with region("wait for data"):
            batch, text = self.feed.batch(self.step), self.feed.text(self.step)
        for bank in self.banks:
            target_TE = None if bank.target is None else batch[bank.target[0]]
            bank.step(batch[bank.site], self.schedule.factor(self.step), self.step, target_TE, text)
        self.step += 1
        if self.step < self.schedule.n_steps and self.loader.is_there(self.step):
            self.feed.prefetch(self.step)

    def _log(self, is_last: bool) -> None:
        step_before, seconds_before = self._mark
        self._mark = self.step, self.seconds
        n_tokens = (self.step - step_before) * self.loader.batch_tokens
        diverged = [
            f"{learner.variant.name} diverged at step {int(learner.diverged_step):,}: "
            "its loss is not finite. The others go on."
            for bank in self.banks
            for learner in bank.freeze_diverged()
        ]
        own_metrics = self._metrics()
        if self.watch is not None:
            step_seconds = (self.seconds - seconds_before) / (self.step - step_before)
            measured = self.watch.measure(self.learners, self.step, is_last, step_seconds)
            for name, figures in measured.items():
                own_metrics[name] |= figures
        shared = self.everyone.all_gather_objects((own_metrics, diverged) if self.team.is_first else ({}, []))
        for message in itertools.chain(*(messages for _, messages in shared)):
            say(message)
        every = {name: metrics for each, _ in shared for name, metrics in each.items()}
        record: Record = {
            "step": self.step,
            "tokens": self.step * self.loader.batch_tokens,
            "left_out": self.loader.n_left_out(self.step * self.loader.batch_tokens),
            "tokens_per_s": n_tokens / (self.seconds - seconds_before),
            "seconds": self.seconds,
            "variants": {name: every[name] for name in self.names},
        }
        for sink in (self.log, *self.sinks):
            if sink is not None:
                sink.log(record)

    def _metrics(self) -> Metrics:
        """Compute what each learner has done since the last log line."""
        factor = self.schedule.factor(self.step - 1)
        metrics: Metrics = {}
        for learner in self.learners:
            means = learner.totals.pop()
            metrics[learner.variant.name] = {
                **(dict.fromkeys(means) if learner.frozen else means),
                "dead_fraction": learner.dead_fraction(),
                "lr": 0.0 if learner.frozen else learner.variant.lr * factor,
            }
        return metrics
