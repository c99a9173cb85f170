"""The datasets that a command line names: one, several with their shares, or a file with a list of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saemill.common import yaml_text
from saemill.common.errors import ConfigError


def named(datasets: Sequence[str], file: Path | None) -> dict[str, Any]:
    """Make the settings `dataset` and `mix` from the words of a command line.

    Args:
        datasets: hub ids, files or folders; several have a share behind a colon each, as in `A:0.7 B:0.3`.
        file: YAML with a list of what `MixedDataset` holds.

    Raises:
        ConfigError: shares are missing or without effect, or the file holds no list of datasets.
    """
    if file is not None:
        if datasets:
            raise ConfigError(
                f"both datasets ({', '.join(datasets)}) and --mix {file} are named; leave one out"
            )
        return {"mix": _listed(file)}
    parts = [_share(name) for name in datasets]
    if len(parts) > 1 and (without := [name for name, share in parts if share is None]):
        raise ConfigError(
            f"several datasets are mixed by shares, as in A:0.7 B:0.3; {without[0]!r} has none: add it"
        )
    if len(parts) == 1 and parts[0][1] is not None:
        raise ConfigError(f"{datasets[0]}: a share has no effect on one dataset; leave it out, or name more")
    if len(parts) > 1:
        return {"mix": [{"dataset": name, "share": share} for name, share in parts]}
    return {"dataset": parts[0][0]} if parts else {}


def _share(word: str) -> tuple[str, str | None]:
    """Split a dataset's name and its share; a path that there is has none."""
    name, colon, share = word.rpartition(":")
    is_share = bool(colon and name) and share.replace(".", "", 1).replace("e-", "", 1).isdigit()
    return (name, share) if is_share and not Path(word).exists() else (word, None)


def _listed(file: Path) -> list[Any]:
    try:
        content = yaml_text.parse(file.read_bytes().decode("utf-8-sig"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--mix {file} cannot be read: {error}; name a YAML file") from error
    if not isinstance(content, list) or not content:
        raise ConfigError(
            f"--mix {file} must hold a list of datasets, each with `dataset` and `share`, got {content!r:.60}"
        )
    return content
