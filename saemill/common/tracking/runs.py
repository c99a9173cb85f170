"""One wandb run per variant, in a group; the step of all is the number of training tokens."""

import os
import re
from pathlib import Path
from typing import Any

from saemill.common.tracking import record
from saemill.common.tracking.record import Logged, WandbSettings

EXIT_CODES = {"finished": 0, "interrupted": 75}
UNSAFE = re.compile(r"[^\w.-]+")
"""Characters that the name of an artifact may not hold."""


class Runs:
    """The wandb runs of one of our runs, opened when something is to be logged to them.

    Args:
        folder: of the run.
        quiet: without figures of the machine, where it is not that of the run.
    """

    def __init__(self, folder: Path, quiet: bool = False) -> None:
        self.folder, self.quiet = folder, quiet
        self.settings = record.settings(folder)
        self.open: dict[str, Any] = {}
        logged = record.logged(folder)
        self.logged_tokens = logged.tokens
        """Training tokens at the last line that went to wandb, here or in an earlier process."""
        self.ended = list(logged.ended)
        """Variants whose wandb runs have all of training."""
        self._next_tokens: dict[str, int] = {}

    def run(self, name: str) -> Any:
        """Open a variant's wandb run, new or resumed."""
        if name not in self.open:
            entry = self.settings.runs[name]
            quiet = self.quiet or bool(self.open)
            run = start(self.folder, self.settings, name, entry.id, "train", entry.config, quiet)
            run.define_metric("tokens")
            run.define_metric("*", step_metric="tokens")
            self.open[name] = run
            # The server knows what it has; a run that is offline begins anew in each process.
            self._next_tokens[name] = self.logged_tokens + 1 if run.offline else run.starting_step
        return self.open[name]

    def log(self, line: dict[str, Any]) -> None:
        """Log a line of metrics.jsonl to the variants in it, but for what their runs have already."""
        for name in line["variants"]:
            if name in self.ended:
                continue
            run = self.run(name)
            if line["tokens"] >= self._next_tokens[name]:
                run.log(values(line, name), step=line["tokens"])
                self._next_tokens[name] = line["tokens"] + 1
        self.logged_tokens = max(self.logged_tokens, line["tokens"])
        self._note()

    def _note(self) -> None:
        """Record the progress in `wandb-logged.json`."""
        record.note(self.folder, Logged(tokens=self.logged_tokens, ended=tuple(self.ended)))

    def end(self, name: str, word: str, is_last: bool, **summary: Any) -> None:
        """End a variant's run.

        Args:
            name: of the variant.
            word: finished, interrupted (it will go on), or anything else for failed.
            is_last: whether there is nothing more to come from training.
            summary: what to add to the run's summary.
        """
        run = self.open.pop(name)
        run.summary.update(summary)
        if word == "interrupted":
            run.mark_preempting()
        elif is_last and self.settings.artifacts:
            self._log_sae(run, name)
        run.finish(exit_code=EXIT_CODES.get(word, 1))
        if is_last:
            self.ended.append(name)
            self._note()

    def _log_sae(self, run: Any, name: str) -> None:
        sae = self.folder / name
        title = f"{self.settings.group}-{self.settings.prefix}{name}"
        log_artifact(run, title, "sae", [sae / "cfg.json", sae / "sae.safetensors"])


def values(record: dict[str, Any], name: str) -> dict[str, Any]:
    """Select a variant's values from a line of metrics.jsonl, with the values that all share; None is left
    out."""
    flat = {key: value for key, value in record.items() if key != "variants"} | record["variants"][name]
    return {key: value for key, value in flat.items() if value is not None}


def start(
    folder: Path,
    settings: WandbSettings,
    name: str,
    run_id: str,
    job_type: str,
    config: dict[str, Any],
    quiet: bool,
) -> Any:
    """Begin a wandb run, or go on with it.

    Args:
        folder: of the run; wandb's files are in `wandb` there.
        settings: the content of `wandb.json`.
        name: that is shown.
        run_id: wandb's.
        job_type: train or assess.
        config: its settings.
        quiet: without figures of the machine: one run of a group has them.
    """
    import wandb

    return wandb.init(
        project=settings.project,
        entity=settings.entity,
        group=settings.group,
        name=settings.prefix + name,
        id=run_id,
        job_type=job_type,
        resume="allow",
        config=config,
        dir=str(folder),
        reinit="create_new",
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_stats=quiet,
            x_stats_pid=os.getppid(),
        ),
    )


def log_artifact(run: Any, name: str, kind: str, files: list[Path]) -> None:
    """Log files as an artifact, without a copy of them on disk."""
    import wandb

    artifact = wandb.Artifact(UNSAFE.sub("-", name)[-128:], type=kind)
    for file in files:
        artifact.add_file(str(file), policy="immutable")
    run.log_artifact(artifact)
