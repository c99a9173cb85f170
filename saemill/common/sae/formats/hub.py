"""SAEs in repositories of the hub, of any of the formats: `hf://user/repo/folder`.

Only the files of the SAE that is asked for are fetched, into the hub's own cache; with HF_HUB_OFFLINE they
are taken from there.
"""

import glob
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from saemill.common import hub
from saemill.common.errors import StoreError
from saemill.common.sae.formats import circuit_tracer, dictionary_learning, saelens, sparsify

WEIGHTS = (sparsify.WEIGHTS, saelens.WEIGHTS, dictionary_learning.WEIGHTS)
BESIDE = ("cfg.json", "config.json", saelens.SCALER)
"""Files that a format may have beside its weights."""


def fetch(address: str) -> Path:
    """Download an SAE.

    Args:
        address: as `common.hub.parse` reads it. The folder may be left out where the repository holds one
            SAE alone.

    Returns: its folder, or the file of a layer of a circuit-tracer set, in the hub's cache.

    Raises:
        StoreError: no SAE there, or several; the message names those that are.
        ConfigError: no such repository or revision, or the hub cannot be asked.
    """
    from huggingface_hub import snapshot_download

    uri = hub.parse(address)
    place = {"repo_id": uri.id, "repo_type": uri.type, "revision": uri.revision}
    with hub.asking(uri.id):
        files = _files(place)
    sae = _choose(files, uri.path_in_repo, address)
    parts = _parts(sae)
    wanted = [glob.escape(file) for file in files if file in parts]
    with hub.asking(address):
        return Path(snapshot_download(**place, allow_patterns=wanted)) / sae


def _parts(sae: PurePosixPath) -> set[str]:
    """Name the files that an SAE may have."""
    if circuit_tracer.layer_of(sae) is not None:
        return {str(sae), str(sae.with_name(circuit_tracer.CONFIG))}
    above = sae.parent / "config.json"  # sparsify's config of the run
    return {str(above), *(str(sae / name) for name in (*WEIGHTS, *BESIDE))}


def _files(place: dict[str, str]) -> list[str]:
    """List the paths of a repository's files; offline, of those that were downloaded."""
    from huggingface_hub import HfApi, is_offline_mode, snapshot_download

    if not is_offline_mode():
        return list(HfApi().list_repo_files(**place))
    root = Path(snapshot_download(**place, allow_patterns=[], local_files_only=True))
    return [str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()]


def _choose(files: Collection[str], path: str, address: str) -> PurePosixPath:
    """Choose the SAE that is meant, a folder or a layer's file: at `path`, or the only one below it."""
    from huggingface_hub import is_offline_mode

    paths = {PurePosixPath(file) for file in files}
    layers = {file for file in paths if circuit_tracer.layer_of(file) is not None}
    in_sets = {file for file in layers if file.with_name(circuit_tracer.CONFIG) in paths}
    saes = sorted({file.parent for file in paths if file.name in WEIGHTS} | in_sets)
    below = [sae for sae in saes if sae.is_relative_to(path)]
    if PurePosixPath(path) in saes:
        return PurePosixPath(path)
    if len(below) == 1:
        return below[0]
    names = ", ".join(map(str, (below or saes)[:8])) + (", …" if len(below or saes) > 8 else "")
    if below:
        raise StoreError(f"{address} holds {len(below)} SAEs; name one after the repository: {names}")
    if not saes:
        raise StoreError(f"{address} holds no SAE: there is no {', '.join(WEIGHTS[:-1])} or {WEIGHTS[-1]}")
    known = "downloaded before" if is_offline_mode() else "there are"
    raise StoreError(f"{address} holds no SAE; {known}: {names}")
