"""The folder that a run is trained into: whose it is, and what of an earlier start is in it."""

import json
import shutil
from contextlib import ExitStack
from functools import partial

from saemill.common import config as settings
from saemill.common import durable, records
from saemill.common.errors import ConfigError, StoreError
from saemill.common.log import counted, say
from saemill.common.stores import assessments, runs
from saemill.common.stores.runs import (
    CHECKPOINT,
    CONFIG,
    FINISHED,
    HALVING,
    IDENTITY,
    METRICS,
    STEPS,
    TENSORBOARD,
    UNITS,
    WANDB,
    WANDB_LOGGED,
    Finished,
    Identity,
    Looks,
)
from saemill.train.config import TrainConfig
from saemill.train.record import checkpoint, inspect
from saemill.train.record.checkpoint import Checkpoint
from saemill.train.sweep.sources import Sources
from saemill.train.sweep.sources import identity as identity_of

NAMING: dict[str, type[Checkpoint] | type[Finished] | type[Looks]] = {
    CHECKPOINT: Checkpoint,
    FINISHED: Finished,
    HALVING: Looks,
}
"""The records that name the run that they are of."""


class Folder:
    """The folder of one run. Nothing in it changes before it is locked.

    Args:
        config: the run's settings.
        acts_fingerprint: of what it is trained on.
        sources: what its SAEs start from.
    """

    def __init__(self, config: TrainConfig, acts_fingerprint: str, sources: Sources) -> None:
        self.config, self.path = config, config.out
        self._yaml = settings.as_yaml("train", settings.plain(config))
        self.identity = Identity(
            settings=json.loads(json.dumps(identity_of(config, sources))),
            acts_fingerprint=acts_fingerprint,
            config=durable.hash_bytes(self._yaml),
        )

    @property
    def run(self) -> str:
        """Return the hash by which the run's records name it."""
        return self.identity.run

    def is_finished(self) -> bool:
        """Tell whether the run is complete already, and is not to be trained anew.

        Raises:
            ConfigError: the folder holds another run, or what was asked for needs a new training.
            StoreError: it holds anything else.
        """
        settings.check_folder(self.path)
        self._check()
        if not self.config.resume or not runs.is_finished(self.path):
            return False
        if self.config.log_to_wandb and not (self.path / WANDB).exists():
            raise ConfigError(
                f"{self.path} is finished and was trained without wandb; leave log_to_wandb out, or train "
                "anew with --no-resume"
            )
        return True

    def mend(self) -> None:
        """Write again what is known of a finished run, and say that it is finished.

        Raises:
            StoreError: a file of it is damaged.
        """
        self._repair()
        if problems := inspect.problems(self.path):
            raise StoreError(f"{self.path} is finished but damaged: {'; '.join(problems)}")
        n_variants = len(runs.finished(self.path).variants)
        say(f"{self.path} is finished already: {counted(n_variants, 'variant')} (--no-resume trains anew)")

    def lock(self, resources: ExitStack) -> None:
        """Make the folder this run's own until `resources` is closed.

        Raises:
            StoreError: another process is training in it, or what was written before is damaged.
            ConfigError: another run was begun in it meanwhile.
        """
        resources.enter_context(durable.exclusive(self.path))
        self._check()
        if not self.config.resume:
            self._clear()
        self._write()
        checkpoint.tidy(self.path)
        for leftover in (self.path / STEPS).glob(durable.PARTIAL):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        if problems := inspect.stopped_problems(self.path):
            raise StoreError("; ".join(problems))

    def _check(self) -> None:
        """Refuse a folder that is not this run's, or not empty."""
        if not self.path.exists():
            return
        entries = set(self.path.iterdir()) - set(self.path.glob(durable.PARTIAL))
        if not runs.is_run(self.path):
            if entries:
                raise StoreError(f"{self.path} holds other files; choose a new folder")
            return
        try:
            identity = runs.identity(self.path)
        except StoreError as error:
            if not self._is_named():
                raise StoreError(
                    f"{error} And nothing else in {self.path} tells that it is of these settings: "
                    "use those that it was made with, or another folder"
                ) from error
            return
        wanted = {"init_from": None, **self.identity.content}
        settings.check_same(identity.content, wanted, self.path)

    def _is_named(self) -> bool:
        """Tell whether another file than the identity, which is lost, says that the folder is this run's.
        That is a record that names its run; where there is none yet, the settings beside it."""
        run_hashes: set[str] = set()
        for name, kind in NAMING.items():
            if record := records.if_whole(partial(records.read, self.path / name, kind, "")):
                run_hashes.add(record.run)
        return self.run in run_hashes if run_hashes else self._has_these_settings()

    def _has_these_settings(self) -> bool:
        """Tell whether `config.yaml` is of the settings that decide this run's result."""
        try:
            config = settings.resolve(TrainConfig, "train", {}, self.path / CONFIG)
        except ConfigError:
            return False
        return config.identity() == self.config.identity() and config.init_from == self.config.init_from

    def _repair(self) -> None:
        """Write again what is known of a finished run, and remove what a crash left behind its end."""
        left = (self.path / CHECKPOINT).exists() or any(self.path.glob(f"{runs.CHECKPOINTS}*"))
        damaged = inspect.settings_problems(self.path)
        if left or damaged:
            with durable.exclusive(self.path):
                if damaged:
                    say(f"written again: {'; '.join(damaged)}")
                    self._write()
                checkpoint.remove(self.path)

    def _write(self) -> None:
        """Write the identity first, which makes the folder a run, then the settings."""
        records.write(self.path / IDENTITY, self.identity)
        durable.write_bytes(self.path / CONFIG, [self._yaml])

    def _clear(self) -> None:
        """Remove what an earlier training left, the record of its end first."""
        for name in (FINISHED, assessments.FILE, WANDB, WANDB_LOGGED, HALVING, UNITS):
            (self.path / name).unlink(missing_ok=True)
        checkpoint.remove(self.path)
        (self.path / METRICS).unlink(missing_ok=True)
        for folder in (STEPS, TENSORBOARD):
            shutil.rmtree(self.path / folder, ignore_errors=True)
