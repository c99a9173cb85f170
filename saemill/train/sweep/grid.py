"""What each variant of a run is told to be, in combinations of lists or one by one, and its start."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from saemill.common.errors import ConfigError
from saemill.common.setting import marks_of
from saemill.train.config import TrainConfig
from saemill.train.sweep.sources import Source, Sources, chosen, one_of

Entry = dict[str, Any]
"""Settings of one variant that were said."""


def entries_of(
    axes: Mapping[str, tuple[Any, ...]],
    explicit: tuple[Mapping[str, Any], ...],
    sources: Sources,
    of_run: tuple[Source, ...],
) -> list[tuple[dict[str, Any], Source | None]]:
    """List what variants are told to be, and what each starts from; arguments as of `resolve`."""
    axes = {name: values for name, values in axes.items() if values}
    if explicit:
        for name, values in axes.items():
            if len(values) > 1 and name != "site":
                raise ConfigError(f"variants are listed one by one; give one {name} for them, got {values}")
        single = {name: values[0] for name, values in axes.items() if len(values) == 1}
        started = [_start(dict(entry), sources, of_run, single) for entry in explicit]
        return [(_fill_in(entry, single, axes), source) for entry, source in started]
    if not of_run:
        return [(entry, None) for entry in _grid(axes)]
    return [
        (entry, source)
        for source in chosen(of_run, axes.get("site", ()))
        for entry in _grid(_axes_from(source, axes, is_alone=len(of_run) == 1))
    ]


def _grid(axes: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Yield every combination of values: of each architecture with those that have an effect on it."""
    for architecture in axes.get("architecture", ("topk",)):
        own = {name: values for name, values in axes.items() if applies(name, architecture)}
        own["architecture"] = (architecture,)
        for values in itertools.product(*own.values()):
            yield dict(zip(own, values, strict=True))


def applies(name: str, architecture: str) -> bool:
    """Tell whether a setting has an effect on an architecture."""
    only = marks_of(TrainConfig, name).only if name in TrainConfig.__dataclass_fields__ else ()
    return not only or architecture in only


def _fill_in(entry: dict[str, Any], single: dict[str, Any], axes: Mapping[str, Any]) -> dict[str, Any]:
    width_given = {"expansion_factor", "num_latents", "init_from"} & set(entry)
    architecture = entry.setdefault("architecture", single.get("architecture", "topk"))
    for name in axes:
        if name in entry or (width_given and name in ("expansion_factor", "num_latents")):
            continue
        if not applies(name, architecture):
            continue
        if name not in single:
            raise ConfigError(f"variant {entry} gives no {name}, and the run has several")
        entry[name] = single[name]
    return entry


def _axes_from(source: Source, axes: Mapping[str, tuple[Any, ...]], is_alone: bool) -> dict[str, Any]:
    """Fill in the axes that a source tells: its architecture, and its site unless one SAE is to start at
    others."""
    own = {"architecture": (source.config.architecture,), **axes}
    if "site" not in axes or not is_alone:
        own["site"] = source.sites[:1]
    return {"site": own.pop("site"), **own}


def _start(
    entry: dict[str, Any], sources: Sources, of_run: tuple[Source, ...], single: Mapping[str, Any]
) -> tuple[dict[str, Any], Source | None]:
    """Find what a listed variant starts from, and fill in what tells it apart.

    Returns: the entry, and the SAE; None where it starts from random directions.
    """
    own = entry.get("init_from")
    candidates = sources[str(own)] if own else of_run
    if not candidates:
        return entry, None
    source = one_of(candidates, {"site": single.get("site"), **entry})
    entry.setdefault("architecture", single.get("architecture", source.config.architecture))
    if "site" not in entry and "site" not in single and source.sites:
        entry["site"] = source.sites[0]
    return entry, source
