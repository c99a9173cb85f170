"""Names of models and tokenizers: a folder on this machine, or an id on the Hugging Face hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from saemill.common.errors import ConfigError


@contextmanager
def loading(what: str, name: str) -> Iterator[None]:
    """While the block runs, a failure to load `name` becomes an error that says whether it was a path.

    Args:
        what: "model" or "tokenizer".
        name: hub id or local folder. A hub id has one slash at most, so what has more, or starts as
            paths do, is not looked for on the hub.

    Raises:
        ConfigError: there is no such folder, or neither folder nor hub has it.
    """
    path = Path(name)
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not path.exists():
        advice = "; ~ is not expanded here, write it out" if name.startswith("~") else ""
        raise ConfigError(f"cannot load the {what} {name!r}: no such folder{advice}")
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        typo = "/" in name and not path.exists() and path.parent.is_dir()
        why = f"no such folder in {path.parent}, and as a hub id: {error}" if typo else error
        raise ConfigError(f"cannot load the {what} {name!r}: {why}") from error
