"""SAEs kept on the way: at some steps of a run, all as they are then, in a finished run of its own.

    steps/<step>/   identity.json, config.yaml, <variant>/…, finished.json: for all that takes a run
    steps/latest    a link to the last of them

A point is written into a hidden folder, which gets its name when everything is in it and flushed. So whoever
looks, at any time, finds whole SAEs, and a crash leaves nothing under such a name. A run that goes on from a
checkpoint before a point comes to it again and leaves it as it is.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from saemill.common import durable, records
from saemill.common.errors import ConfigError
from saemill.common.log import say
from saemill.common.stores.runs import CONFIG, FINISHED, IDENTITY, LATEST, STEPS, Finished
from saemill.train.export import finished_of, save_saes
from saemill.train.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Points:
    """The steps at which a run keeps its SAEs."""

    run: Path
    """Folder of the run."""
    steps: frozenset[int]

    def after_step(self, trainer: Trainer) -> None:
        """Write the SAEs where it is time for it. All processes call it together.

        Raises:
            DiskError: the disk is full; what was written before counts.
        """
        if trainer.step not in self.steps:
            return
        place = self.run / STEPS / str(trainer.step)
        if not trainer.everyone.first(lambda: (place / FINISHED).exists()):
            self._write(trainer, place)
        trainer.everyone.first(lambda: _link(place))

    def _write(self, trainer: Trainer, place: Path) -> None:
        partial = place.with_name(f".{place.name}.partial")
        everyone, store = trainer.everyone, trainer.loader.store
        everyone.first(lambda: shutil.rmtree(partial, ignore_errors=True))
        own_cfgs = save_saes(partial, trainer, store, set(trainer.names))
        finished = finished_of(trainer, trainer.names, own_cfgs, {})
        everyone.first(lambda: self._complete(partial, place, finished))

    def _complete(self, partial: Path, place: Path, finished: Finished) -> None:
        """Write what makes the folder a finished run, and give it its name."""
        for name in (IDENTITY, CONFIG):
            durable.write_bytes(partial / name, [(self.run / name).read_bytes()])
        records.write(partial / FINISHED, finished)
        with durable.writing(place):
            if place.exists():  # of a point that was damaged: it has no record
                shutil.rmtree(place)
            partial.replace(place)
            durable.sync_folder(place.parent)
        say(f"{place}: the SAEs after {finished.steps:,} steps")


def points_of(run: Path, n_points: int, n_steps: int) -> Points:
    """Choose the steps: n of them, evenly spaced, without the run's end, where every SAE is written anyway.

    Raises:
        ConfigError: there are not so many steps.
    """
    if n_points >= n_steps:
        raise ConfigError(
            f"n_checkpoints must be fewer than the run's {n_steps:,} steps, got {n_points:,}; "
            "lower --n-checkpoints"
        )
    return Points(run, frozenset(n_steps * i // (n_points + 1) for i in range(1, n_points + 1)))


def _link(place: Path) -> None:
    """Let `latest` lead to the point, in one move; a run that goes on may come to an earlier one again."""
    latest = place.with_name(LATEST)
    with durable.writing(latest):
        partial = latest.with_name(f".{LATEST}.partial")
        partial.unlink(missing_ok=True)
        partial.symlink_to(place.name)
        partial.replace(latest)
        durable.sync_folder(place.parent)
