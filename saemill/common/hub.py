"""The Hugging Face hub: names that may be folders or ids, places in repositories, and what it refuses."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saemill.common.errors import ConfigError, SaemillError

SCHEME = "hf://"
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@contextmanager
def loading(what: str, name: str) -> Iterator[None]:
    """Turn a failure to load `name`, while the block runs, into an error that says whether it was a path.

    Args:
        what: "model" or "tokenizer".
        name: hub id or local folder. A hub id has one slash at most, so what has more, or starts as
            paths do, is not looked for on the hub.

    Raises:
        ConfigError: there is no such folder, neither folder nor hub has it, its files are damaged or say
            what cannot be, or it brings code of its own.
    """
    path = Path(name)
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not path.exists():
        advice = "; ~ is not expanded here, write it out" if name.startswith("~") else ""
        raise ConfigError(f"cannot load the {what} {name!r}: no such folder{advice}")
    try:
        yield
    except (SaemillError, MemoryError):
        raise
    except Exception as error:  # damaged files, and settings that cannot be, raise errors of any kind
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"cannot load the {what} {name!r}: it brings code of its own, which is not run unasked; "
                + (
                    "read it, and give `saemill cache`, `sites` or `run` --trust-remote-code"
                    if what == "model"
                    else f"choose a {what} of a kind that transformers knows"
                )
            ) from error
        if not isinstance(error, OSError | ValueError | ImportError):
            message = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"cannot load the {what} {name!r}: its files are damaged, or its config says what cannot be "
                f"({type(error).__name__}: {message}); save or download it again"
            ) from error
        typo = "/" in name and not path.exists() and path.parent.is_dir()
        why = f"no such folder in {path.parent}, and as a hub id: {error}" if typo else error
        raise ConfigError(f"cannot load the {what} {name!r}: {why}") from error


def is_id(name: str) -> bool:
    """Tell whether a model or dataset is named as the hub names them, `owner/name`, and is no folder here."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not Path(name).exists()


def parse(address: str) -> Any:
    """Parse a place in a repository into huggingface_hub's `HfUri`: type, id, revision, path_in_repo.

    Args:
        address: `hf://user/repo`, with `@revision` and a folder's path after it as wanted; a dataset is
            `hf://datasets/user/repo`. A slash in a branch's name is written `%2F`.

    Raises:
        ConfigError: it is no such address, or one of something else than a model or a dataset.
    """
    from huggingface_hub import parse_hf_uri
    from huggingface_hub.errors import HfUriError

    try:
        uri = parse_hf_uri(address)
    except HfUriError as error:
        raise ConfigError(f"{address!r} is no place on the hub: {error}") from error
    if uri.type not in ("model", "dataset"):
        raise ConfigError(f"{address!r} must be a model or a dataset repository, got a {uri.type}")
    return uri


def check_local(path: Path | str) -> None:
    """Refuse an address on the hub, which pathlib writes `hf:/…`, where a store or a run is read.

    Raises:
        ConfigError: it is one.
    """
    if str(path).startswith("hf:"):
        place = str(path).removeprefix("hf:").strip("/")
        raise ConfigError(f"stores and runs are read here: fetch it with `saemill pull {place} -o FOLDER`")


@contextmanager
def asking(repo: str) -> Iterator[None]:
    """Turn a refusal of the hub, while the block runs, into an error that says how to repair it.

    No message holds a request's headers or its URL, which may be signed.

    Raises:
        ConfigError: no such repository or revision, no right to it, or the hub cannot be reached.
    """
    from huggingface_hub import errors

    try:
        yield
    except SaemillError:
        raise
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise ConfigError(
            f"{repo} is not, or not whole, among what was downloaded, and the hub is not asked: it cannot be "
            "reached, or HF_HUB_OFFLINE is set. Unset it and try again"
        ) from error
    except errors.GatedRepoError as error:
        raise ConfigError(
            f"{repo} is open only to those whom its owner lets in; ask on its page, then {LOG_IN}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(f"{repo} has no such revision; name another branch, tag or commit") from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"{repo} is not on the hub, or is private to others; check the name, and {LOG_IN}"
        ) from error
    except errors.HfHubHTTPError as error:
        raise ConfigError(f"{repo}: {_refusal(error)}") from error
    except errors.HTTPError as error:
        raise ConfigError(
            f"{repo}: the hub cannot be reached ({type(error).__name__}); try again. SAEs that were "
            "downloaded before are loaded with HF_HUB_OFFLINE=1"
        ) from error
    except (RuntimeError, ValueError) as error:  # what stops an upload or a download has no class of its own
        message = re.sub(r"[?]\S*", "", str(error)).rstrip(".")
        raise ConfigError(f"{repo}: {message}; what arrived is kept: run the command again") from error


def _refusal(error: Any) -> str:
    """Explain an HTTP status, with the hub's own words."""
    status = error.response.status_code
    detail = f" ({error.server_message})" if error.server_message else ""
    if status == 401:
        return f"the hub does not know your token{detail}; {LOG_IN} anew"
    if status == 403:
        return f"your token does not allow this{detail}; it needs write access: {LOG_IN} with one that has it"
    return f"the hub answered with status {status}{detail}; what arrived is kept: run the command again"
