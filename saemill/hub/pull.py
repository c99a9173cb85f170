"""`saemill pull`: a run or a store from the hub as a folder, checked."""

import shutil
from pathlib import Path
from typing import Any

from saemill.common import hub
from saemill.common.errors import ConfigError, StoreError
from saemill.common.log import say
from saemill.common.stores.runs import FINISHED
from saemill.show import describe, problems

LEFT_BY_THE_HUB = ".cache"
"""Where huggingface_hub notes in a folder what it has downloaded to it."""


def pull(repo: str, out: Path) -> None:
    """Download a repository that `saemill push` made, and check every file that has a hash.

    Interrupted, the same command goes on where it was.

    Args:
        repo: `user/repo` or `datasets/user/repo`, `@revision` after it as wanted.
        out: where to; new, empty, or left by an interrupted pull.

    Raises:
        ConfigError: the hub has no such repository or cannot be asked; the output is in use.
        StoreError: it holds nothing that saemill made, or a file is damaged.
    """
    from huggingface_hub import snapshot_download

    uri = hub.parse(repo if repo.startswith(hub.SCHEME) else hub.SCHEME + repo)
    if uri.path_in_repo:
        raise ConfigError(f"pull takes a whole repository, got {repo!r}; one SAE is had by `saemill import`")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not _interrupted(out))):
        raise ConfigError(f"the output must be a new or an empty folder, got {out}; name another")
    with hub.asking(repo):
        place = {"repo_id": uri.id, "revision": uri.revision, "repo_type": _type(repo, uri)}
        _check_kind(repo, place)
        snapshot_download(**place, local_dir=out, ignore_patterns=[".gitattributes"])
    if damage := problems(out):
        raise StoreError("\n".join([*damage, f"Remove {out} and pull again."]))
    shutil.rmtree(out / LEFT_BY_THE_HUB)
    say(describe(out))


def _interrupted(out: Path) -> bool:
    return (out / LEFT_BY_THE_HUB / "huggingface").is_dir()


def _type(repo: str, uri: Any) -> str:
    """Tell whether it is a model or a dataset: by the address, or by which of them there is."""
    from huggingface_hub import HfApi

    if uri.type == "dataset" or repo.removeprefix(hub.SCHEME).startswith("models/"):
        return str(uri.type)
    api = HfApi()
    kinds = [kind for kind in ("model", "dataset") if api.repo_exists(uri.id, repo_type=kind)]
    if len(kinds) > 1:
        raise ConfigError(f"{repo} is a model and a dataset; say models/{uri.id} or datasets/{uri.id}")
    return kinds[0] if kinds else "model"


def _check_kind(repo: str, place: dict[str, Any]) -> None:
    """Refuse a repository without what `push` uploads last, before anything is downloaded."""
    from huggingface_hub import HfApi

    files = HfApi().list_repo_files(**place)
    if not {FINISHED, "manifest.json", "zarr.json"} & set(files):
        raise StoreError(
            f"{repo} holds no run and no store, or its upload is not finished; an SAE of another tool is had "
            "by `saemill import`"
        )
