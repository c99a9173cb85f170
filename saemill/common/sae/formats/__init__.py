"""SAEs as files: saemill's own, which is sparsify's layout, and those of SAELens, dictionary_learning and
circuit-tracer.

Each format is a module. `read` returns the tensors of an SAE, or refuses and names the field that has no
place in one; `write` makes files that the tool itself loads.

    sparsify.py, saelens.py, dictionary_learning.py   the formats, a folder for each SAE
    circuit_tracer.py   a folder for a set of transcoders, a file for each of them
    dictionary_classes.py   the classes of the last
    checks.py   what each asks of its files
    folding.py  their ways of choosing latents, as thresholds
    seal.py     the hashes of an SAE that saemill saved
    hooks.py    sites in TransformerLens' terms
    hub.py      the SAE that hf://user/repo/folder names
"""

from collections.abc import Callable
from pathlib import Path

from saemill.common.errors import ConfigError, DataError, SaemillError, StoreError
from saemill.common.hub import SCHEME, is_id
from saemill.common.sae.formats import circuit_tracer, dictionary_learning, hub, saelens, sparsify
from saemill.common.sae.formats.circuit_tracer import layers_in
from saemill.common.sae.formats.hooks import Hook
from saemill.common.sae.parts import Parts

NAMES = ("sparsify", "saelens", "dictionary_learning")
READERS = {
    sparsify.WEIGHTS: sparsify.read,
    saelens.WEIGHTS: saelens.read,
    dictionary_learning.WEIGHTS: dictionary_learning.read,
}
"""Readers by the name of the file of weights, by which a format is recognised."""


def load(folder: Path | str) -> Parts:
    """Read an SAE of any of the formats.

    Args:
        folder: on this machine, or `hf://user/repo[@revision][/folder]`; of a circuit-tracer set the file of
            a layer.

    Raises:
        StoreError: no file of weights, or several; a file is missing, is damaged or does not fit the config;
            weights are NaN or infinite.
        ConfigError: an SAE that cannot be represented, or a repository that cannot be had.
    """
    is_on_hub = isinstance(folder, str) and folder.startswith(SCHEME)
    folder = hub.fetch(str(folder)) if is_on_hub else Path(folder)
    parts = read(folder)
    parts.check_finite(str(folder), StoreError)
    return parts


def read(folder: Path) -> Parts:
    """Read an SAE as `load` does, on this machine, whatever the weights' values are.

    Raises:
        StoreError, ConfigError: as `load`.
    """
    reader = _reader(folder)
    try:
        return reader(folder)
    except ConfigError as error:
        if str(folder) in str(error):
            raise
        raise ConfigError(f"{folder}: {error}") from error  # of what contradicts itself, wherever it is from


def is_layer(path: Path) -> bool:
    """Tell whether a path is the file of a layer in a circuit-tracer set."""
    return circuit_tracer.layer_of(path) is not None and path.is_file()


def _reader(folder: Path) -> Callable[[Path], Parts]:
    """Recognise a format."""
    if is_layer(folder):
        return circuit_tracer.read
    present = [name for name in READERS if (folder / name).is_file()]
    if not present:
        raise StoreError(f"{folder} holds no SAE: {_instead(folder)}")
    if len(present) > 1:
        raise StoreError(f"{folder} holds the weights of several formats, {' and '.join(present)}; part them")
    return READERS[present[0]]


def problems(folder: Path) -> list[str]:
    """List what is wrong with the files of an SAE on this machine, of any of the formats; nothing if it
    loads."""
    try:
        load(folder)
    except SaemillError as error:
        return [str(error)]
    return []


def _instead(folder: Path) -> str:
    """Describe what is there in place of an SAE, and what to name instead."""
    if folder.is_file():
        return f"it is a file; name the folder that it is in, {folder.parent}"
    if not folder.exists():
        on_hub = f"; an SAE on the hub is named {SCHEME}{folder}" if is_id(str(folder)) else ""
        return f"there is no such folder{on_hub}"
    depths = ("*", "*/*")
    found = {str(file.parent) for name in READERS for at in depths for file in folder.glob(f"{at}/{name}")}
    if inside := sorted(found) or [str(file) for file in layers_in(folder)]:
        listed = ", ".join(inside[:8])
        return f"name one of the SAEs in it: {listed}{', …' if len(inside) > 8 else ''}"
    return f"one of {', '.join(READERS)} is missing"


def save_own(parts: Parts, folder: Path) -> None:
    """Write an SAE as saemill keeps it: in sparsify's layout, with thresholds where it has them.

    Raises:
        DataError, DiskError: as `save`.
    """
    parts.check_finite("the SAE", DataError)
    sparsify.write(parts, folder)


def save(parts: Parts, name: str, folder: Path, hook: Hook | None = None, target: Hook | None = None) -> None:
    """Write an SAE for another tool.

    Args:
        name: one of `NAMES`.
        folder: where to; created.
        hook: the SAE's site in TransformerLens' terms; None where it has no name there. Sparsify stores none.
        target: that of the site that a transcoder predicts.

    Raises:
        ConfigError: no such format, or it has no SAEs of this kind.
        DataError: weights are not finite.
        DiskError: the disk is full, or the folder may not be written to.
    """
    parts.check_finite("the SAE", DataError)
    if parts.config.joined:
        sites = " and ".join(part.site for part in parts.config.joined)
        raise ConfigError(
            f"{name} cannot say that an SAE is a crosscoder, over {sites}; it is loaded with Sae.load"
        )
    if name == "sparsify":
        if parts.threshold is not None:
            raise ConfigError(
                f"sparsify has SAEs with k alone, got a {parts.config.architecture} SAE, whose latents have "
                "thresholds; export it as saelens or dictionary_learning"
            )
        if parts.config.d_out not in (None, parts.config.d_in):
            raise ConfigError(
                f"sparsify has transcoders between sites of one width, got {parts.config.d_in} and "
                f"{parts.config.d_out}"
            )
        sparsify.write(parts, folder)
    elif parts.config.architecture == "groupmax" and name in NAMES:
        raise ConfigError(f"{name} has no GroupMax; export it as sparsify")
    elif name == "saelens":
        saelens.write(parts, folder, hook, target)
    elif name == "dictionary_learning":
        if parts.config.d_out is not None:
            raise ConfigError("dictionary_learning has no transcoders; export it as sparsify or saelens")
        dictionary_learning.write(parts, folder, hook)
    else:
        raise ConfigError(f"format must be one of {', '.join((*NAMES, circuit_tracer.NAME))}, got {name!r}")
