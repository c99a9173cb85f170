"""SAEs in repositories of the hub, of any of the formats: `hf://user/repo/folder`.

Only the files of the SAE that is asked for are fetched, into the hub's own cache; with HF_HUB_OFFLINE they
are taken from there.
"""

import glob
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from saemill.common import hub
from saemill.common.errors import StoreError
from saemill.common.sae.formats import dictionary_learning, saelens, sparsify

WEIGHTS = (sparsify.WEIGHTS, saelens.WEIGHTS, dictionary_learning.WEIGHTS)
BESIDE = ("cfg.json", "config.json", saelens.SCALER)
"""Files that a format may have beside its weights."""


def fetch(address: str) -> Path:
    """Download an SAE.

    Args:
        address: as `common.hub.parse` reads it. The folder may be left out where the repository holds one
            SAE alone.

    Returns: its folder, in the hub's cache.

    Raises:
        StoreError: no SAE there, or several; the message names those that are.
        ConfigError: no such repository or revision, or the hub cannot be asked.
    """
    from huggingface_hub import snapshot_download

    uri = hub.parse(address)
    place = {"repo_id": uri.id, "repo_type": uri.type, "revision": uri.revision}
    with hub.asking(uri.id):
        files = _files(place)
    folder = _choose(files, uri.path_in_repo, address)
    beside = {str(folder / name) for name in (*WEIGHTS, *BESIDE)}
    above = str(folder.parent / "config.json")  # sparsify's config of the run
    wanted = [glob.escape(file) for file in files if file in beside or file == above]
    with hub.asking(address):
        return Path(snapshot_download(**place, allow_patterns=wanted)) / folder


def _files(place: dict[str, str]) -> list[str]:
    """List the paths of a repository's files; offline, of those that were downloaded."""
    from huggingface_hub import HfApi, is_offline_mode, snapshot_download

    if not is_offline_mode():
        return list(HfApi().list_repo_files(**place))
    root = Path(snapshot_download(**place, allow_patterns=[], local_files_only=True))
    return [str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()]


def _choose(files: Collection[str], path: str, address: str) -> PurePosixPath:
    """Choose the folder of the SAE that is meant: at `path`, or the only one below it."""
    from huggingface_hub import is_offline_mode

    folders = sorted({PurePosixPath(f).parent for f in files if PurePosixPath(f).name in WEIGHTS})
    below = [folder for folder in folders if folder.is_relative_to(path)]
    if PurePosixPath(path) in folders:
        return PurePosixPath(path)
    if len(below) == 1:
        return below[0]
    names = ", ".join(map(str, (below or folders)[:8])) + (", …" if len(below or folders) > 8 else "")
    if below:
        raise StoreError(f"{address} holds {len(below)} SAEs; name one after the repository: {names}")
    if not folders:
        raise StoreError(f"{address} holds no SAE: there is no {', '.join(WEIGHTS[:-1])} or {WEIGHTS[-1]}")
    known = "downloaded before" if is_offline_mode() else "there are"
    raise StoreError(f"{address} holds no SAE; {known}: {names}")
