"""SAEs as files: saemill's own, which is sparsify's layout, and those of other tools and of published sets.

Each format is a module. `holds` tells whether a folder or a file is of it, `read` returns the tensors of an
SAE, or refuses and names the field that has no place in one; `write`, where it is, makes files that the tool
itself loads.

    sparsify.py, saelens.py, dictionary_learning.py   tools' formats, a folder for each SAE
    circuit_tracer.py   a folder for a set of transcoders, a file for each of them
    circuit_tracer_clt.py   a folder for a cross-layer transcoder
    gemma_scope.py, gemma_scope_2.py, llama_scope.py   published sets, a folder for each SAE
    openai.py, qwen_scope.py, linear_layers.py, attention_z.py   published sets, a pickle for each SAE
    saelens_inputs.py   what SAELens does to activations first
    dictionary_classes.py   the classes of dictionary_learning
    checks.py   what each asks of its files
    tensor_files.py   safetensors, npz and pickles, read with care
    folding.py  other ways of encoding, as tensors of an `Sae`
    seal.py     the hashes of an SAE that saemill saved
    hooks.py    sites in TransformerLens' terms
    hub.py      the SAE that hf://user/repo/folder names
"""

from pathlib import Path
from typing import Protocol

from saemill.common.errors import ConfigError, DataError, SaemillError, StoreError
from saemill.common.hub import SCHEME, is_id
from saemill.common.sae.formats import (
    attention_z,
    circuit_tracer,
    circuit_tracer_clt,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    hub,
    linear_layers,
    llama_scope,
    openai,
    qwen_scope,
    saelens,
    sparsify,
    tensor_files,
)
from saemill.common.sae.formats.hooks import Hook
from saemill.common.sae.parts import Parts, SaeConfig


class Format(Protocol):
    """A module that reads a format."""

    NAME: str

    def holds(self, place: Path, /) -> bool:
        """Tell whether a folder or a file is of it."""

    def read(self, place: Path, /) -> Parts:
        """Read the SAE there."""


NAMES = ("sparsify", "saelens", "dictionary_learning")
"""Formats of which a folder is written."""
FORMATS: tuple[Format, ...] = (
    sparsify,
    saelens,
    dictionary_learning,
    circuit_tracer,
    circuit_tracer_clt,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    openai,
    qwen_scope,
    linear_layers,
    attention_z,
)
"""Formats that are read."""


def load(folder: Path | str, name: str | None = None) -> Parts:
    """Read an SAE of any of the formats.

    Args:
        folder: on this machine, or `hf://user/repo[@revision][/folder]`; the SAE's file where its format has
            one for each.
        name: one of the names of `FORMATS`; None to recognise it by the files that are there.

    Raises:
        StoreError: no SAE of these formats, or one of several; a file is missing, is damaged or does not fit
            the config; weights are NaN or infinite.
        ConfigError: no such format, an SAE that cannot be represented, or a repository that cannot be had.
    """
    is_on_hub = isinstance(folder, str) and folder.startswith(SCHEME)
    folder = hub.fetch(str(folder)) if is_on_hub else Path(folder)
    parts = read(folder, name)
    parts.check_finite(str(folder), StoreError)
    return parts


def read(folder: Path, name: str | None = None) -> Parts:
    """Read an SAE as `load` does, on this machine, whatever the weights' values are.

    Raises:
        StoreError, ConfigError: as `load`.
    """
    chosen = _recognised(folder) if name is None else _named(name)
    try:
        return chosen.read(folder)
    except ConfigError as error:
        if str(folder) in str(error):
            raise
        raise ConfigError(f"{folder}: {error}") from error  # of what contradicts itself, wherever it is from


def is_sae(place: Path) -> bool:
    """Tell whether a folder or a file is an SAE's, by the names of files, or looks like a damaged one."""
    return (place / "cfg.json").is_file() or bool(_formats_of(place))


def _formats_of(place: Path) -> list[Format]:
    """List the formats that a folder or a file may be of."""
    return [each for each in FORMATS if each.holds(place)]


def _recognised(place: Path) -> Format:
    """Recognise a format."""
    present = _formats_of(place)
    if not present:
        raise StoreError(f"{place} holds no SAE: {_instead(place)}")
    if len(present) > 1:
        names = " and ".join(each.NAME for each in present)
        raise StoreError(f"{place} holds the weights of several formats, {names}; name one with --format")
    return present[0]


def _named(name: str) -> Format:
    """Find a format by its name."""
    for each in FORMATS:
        if name == each.NAME:
            return each
    raise ConfigError(f"format must be one of {', '.join(each.NAME for each in FORMATS)}, got {name!r:.80}")


def problems(folder: Path) -> list[str]:
    """List what is wrong with the files of an SAE on this machine, of any of the formats; nothing if it
    loads."""
    try:
        load(folder)
    except SaemillError as error:
        return [str(error)]
    return []


def _instead(place: Path) -> str:
    """Describe what is there in place of an SAE, and what to name instead."""
    if not place.exists():
        on_hub = f"; an SAE on the hub is named {SCHEME}{place}" if is_id(str(place)) else ""
        return f"there is no such folder{on_hub}"
    if tensor_files.is_pickle(place):
        names = ", ".join(sorted(tensor_files.names_in_pickle(place)))
        return f"it is a pickle of {names:.200}, which are the names of no format with a file for each SAE"
    if place.is_file():
        return f"it is a file; name the folder that it is in, {place.parent}"
    if inside := hub.places_in(place):
        listed = ", ".join(map(str, inside[:8]))
        return f"name one of the SAEs in it: {listed}{', …' if len(inside) > 8 else ''}"
    return f"there is no {hub.LOOKED_FOR}"


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
    _check_said(parts.config, name)
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


def _check_said(config: SaeConfig, name: str) -> None:
    """Refuse an SAE that is more than a format can say.

    Raises:
        ConfigError: it is.
    """
    if config.predicted:
        raise ConfigError(
            f"{name} has no SAE like {config.spans}; export it as {circuit_tracer.NAME}, or load it with "
            "Sae.load"
        )
    if config.joined:
        raise ConfigError(f"{name} cannot say that an SAE is {config.spans}; it is loaded with Sae.load")
    if config.norm is not None and name != saelens.NAME:
        raise ConfigError(
            f"{name} cannot say that activations go through a norm first ({config.norm}); export it as "
            "saelens"
        )
    if config.is_signed and name in NAMES and name != saelens.NAME:
        raise ConfigError(
            f"{name} has no SAEs whose activations may be negative, got {config.architecture}; export it as "
            "saelens"
        )
