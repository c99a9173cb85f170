"""SAEs by the names of files, in a folder and in repositories of the hub: `hf://user/repo/folder`.

Only the files of the SAE that is asked for are fetched, into the hub's own cache; with HF_HUB_OFFLINE they
are taken from there.
"""

import glob
from collections.abc import Collection, Iterable
from pathlib import Path, PurePath, PurePosixPath

from saemill.common import hub
from saemill.common.errors import StoreError
from saemill.common.sae.formats import (
    attention_z,
    circuit_tracer,
    circuit_tracer_clt,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    qwen_scope,
    saelens,
    sparsify,
    tensor_files,
)

WEIGHTS = (
    sparsify.WEIGHTS,
    saelens.WEIGHTS,
    dictionary_learning.WEIGHTS,
    gemma_scope.WEIGHTS,
    gemma_scope_2.WEIGHTS,
    circuit_tracer_clt.WEIGHTS,
    *llama_scope.WEIGHTS[1:],  # the first is SAELens' as well
)
"""Files of weights below an SAE's folder."""
BESIDE = ("cfg.json", "config.json", llama_scope.OLD, *saelens.BESIDE)
"""Files that a format may have beside its weights."""
LOOKED_FOR = (
    f"{', '.join(WEIGHTS)}, {circuit_tracer.WEIGHTS.format('N')} of a circuit-tracer set, "
    f"or {' or '.join(tensor_files.PICKLES)} of a published SAE"
)
"""What an SAE is recognised by."""
DEPTH = 5
"""Most folders on the way to a file that is looked for."""


def places_in(folder: Path) -> list[Path]:
    """List the SAEs in a folder on this machine: folders, and files where a format has one for each."""
    files = (file for depth in range(1, DEPTH + 1) for file in folder.glob("/".join("*" * depth)))
    return [folder / place for place in _places(file.relative_to(folder) for file in files if file.is_file())]


def _places(files: Iterable[PurePath]) -> list[PurePath]:
    """List the SAEs that files are of, by their paths. Pickles, which may be anything, count where there is
    nothing else."""
    paths = set(files)
    saes = {file.parents[weights.count("/")] for weights in WEIGHTS for file in paths if file.match(weights)}
    layers = {file for file in paths if circuit_tracer.layer_of(file) is not None}
    configs = (circuit_tracer.CONFIG, *circuit_tracer.WANDB)
    saes |= {file for file in layers if any(file.with_name(name) in paths for name in configs)}
    pickles = {file for file in paths if file.suffix in tensor_files.PICKLES}
    saes |= {file for file in pickles if file.name.endswith(qwen_scope.SUFFIX)}
    saes |= {file for file in pickles if _beside(file) in paths}
    return sorted(saes or pickles)


def _beside(pickle: PurePath) -> PurePath:
    """Name the config that a pickle may have beside it."""
    return pickle.with_name(attention_z.config_of(pickle.name))


def fetch(address: str) -> Path:
    """Download an SAE.

    Args:
        address: as `common.hub.parse` reads it. The folder may be left out where the repository holds one
            SAE alone.

    Returns: its folder, or its file where the format has one for each, in the hub's cache.

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
    parts = _parts(sae, files)
    wanted = [glob.escape(file) for file in files if file in parts]
    with hub.asking(address):
        return Path(snapshot_download(**place, allow_patterns=wanted)) / sae


def _parts(sae: PurePath, files: Collection[str]) -> set[str]:
    """Name the files that an SAE may have, in a repository with these."""
    above = sae.parent / "config.json"  # sparsify's config of the run
    if sae.suffix == ".safetensors":
        beside = (circuit_tracer.CONFIG, *circuit_tracer.WANDB)
        return {str(sae), str(above), *(str(sae.with_name(name)) for name in beside)}
    if sae.suffix in tensor_files.PICKLES:
        return {str(sae), str(_beside(sae)), str(sae.parent.parent / "config.json")}
    if str(sae / circuit_tracer_clt.WEIGHTS) in files:
        of_layers = {file for file in map(PurePosixPath, files) if circuit_tracer_clt.is_part(file)}
        own = {str(file) for file in of_layers if file.parent == sae}
        return own | {str(sae / name) for name in (circuit_tracer.CONFIG, *BESIDE)}
    return {str(above), *(str(sae / name) for name in (*WEIGHTS, llama_scope.WEIGHTS[0], *BESIDE))}


def _files(place: dict[str, str]) -> list[str]:
    """List the paths of a repository's files; offline, of those that were downloaded."""
    from huggingface_hub import HfApi, is_offline_mode, snapshot_download

    if not is_offline_mode():
        return list(HfApi().list_repo_files(**place))
    root = Path(snapshot_download(**place, allow_patterns=[], local_files_only=True))
    return [str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()]


def _choose(files: Collection[str], path: str, address: str) -> PurePath:
    """Choose the SAE that is meant, a folder or a file: at `path`, or the only one below it."""
    from huggingface_hub import is_offline_mode

    saes = _places(map(PurePosixPath, files))
    named = PurePosixPath(path)
    is_file = path in files and named.suffix in (".safetensors", *tensor_files.PICKLES)
    if named in saes or (is_file and not any(named.match(weights) for weights in WEIGHTS)):
        return named
    below = [sae for sae in saes if sae.is_relative_to(path)]
    if len(below) == 1:
        return below[0]
    names = ", ".join(map(str, (below or saes)[:8])) + (", …" if len(below or saes) > 8 else "")
    if below:
        raise StoreError(f"{address} holds {len(below)} SAEs; name one after the repository: {names}")
    if not saes:
        raise StoreError(f"{address} holds no SAE: there is no {LOOKED_FOR}")
    known = "downloaded before" if is_offline_mode() else "there are"
    raise StoreError(f"{address} holds no SAE; {known}: {names}")
