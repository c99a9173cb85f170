"""The section `run`: where results are that the stages' settings do not name."""

from dataclasses import dataclass
from pathlib import Path

from saemill.common.errors import ConfigError
from saemill.common.setting import setting


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Settings of `saemill run` itself."""

    save_dir: Path = setting(
        Path("saemill-out"),
        "Folder of tokens, activations and runs",
        by_default="saemill-out",
        metavar="DIR",
    )
    run_name: str | None = setting(None, "The run's folder in it, and wandb's group", by_default="by content")

    follow: bool = setting(
        False,
        "Train while the activations are being cached, as `train --follow` does, in a process beside it",
    )

    def __post_init__(self) -> None:
        if self.run_name is None:
            return
        from saemill.common.records import single  # not above: help is quick

        try:
            single(self.run_name)
        except ValueError:
            raise ConfigError(
                "run_name must be the name of a folder, without slashes and not beginning with a dot; got "
                f"{self.run_name!r}"
            ) from None
