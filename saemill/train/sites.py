"""Which sites a run trains on: those that it names, or all that its globs match.

    --site 'layers.*.post_attention_layernorm' --target-site 'layers.*.mlp'

is a transcoder of each layer: two globs that stand in the same place match in pairs, by what their `*` are.
With `--cross-layer` it is one transcoder of them all.
"""

import re
from collections.abc import Collection
from dataclasses import replace

from saemill.common.config import nearest
from saemill.common.errors import ConfigError
from saemill.common.stores.site_names import JOINT, parts_of
from saemill.train.config import TrainConfig

Found = dict[tuple[str, ...], str]
"""Sites that a glob matches, by what its `*` stand for; of a plain name itself."""


def with_sites(config: TrainConfig, known: Collection[str]) -> TrainConfig:
    """Replace globs by the sites that they match, in the order of their numbers; join those of a cross-layer
    transcoder.

    Args:
        config: of the run.
        known: names of the sites that there are.

    Raises:
        ConfigError: a glob matches nothing, or a site without one to predict.
    """
    if any("*" in name for name in (*config.site, *config.target_site)):
        config = _found(config, known)
    if not config.cross_layer:
        return config
    if len(parts_of(JOINT.join(config.site))) < 2:
        raise ConfigError(
            f"cross_layer joins two or more layers, got one, {config.site[0]}; leave it out for a transcoder "
            "of one"
        )
    return replace(config, site=(JOINT.join(config.site),), target_site=(JOINT.join(config.target_site),))


def _found(config: TrainConfig, known: Collection[str]) -> TrainConfig:
    """Replace globs by the sites that they match."""
    sites: list[str] = []
    targets: list[str] = []
    for place, glob in enumerate(config.site):
        found = _matches(glob, known)
        sites += found.values()
        if config.target_site:
            targets += _paired(glob, found, config.target_site[place], known)
    return replace(config, site=tuple(sites), target_site=tuple(targets))


def _matches(glob: str, known: Collection[str]) -> Found:
    """Find the sites that a glob matches."""
    if "*" not in glob:
        return {(): glob}
    if any("*" in part and part != "*" for part in glob.split(".")):
        raise ConfigError(
            f"a * of a site must stand for a whole part between dots, as layers.*.mlp, got {glob!r}"
        )
    pattern = re.compile(re.escape(glob).replace(r"\*", "([^.]*)"))
    found = {match.groups(): name for name in known if (match := pattern.fullmatch(name))}
    if not found:
        raise ConfigError(f"site {glob!r} matches none of the sites; {nearest(glob, known)}")
    return dict(sorted(found.items(), key=lambda item: [_in_order(part) for part in item[0]]))


def _in_order(part: str) -> tuple[int, str]:
    """Return what sorts numbers by their value."""
    return (int(part), "") if part.isdecimal() else (-1, part)


def _paired(glob: str, sites: Found, target_glob: str, known: Collection[str]) -> list[str]:
    """List the sites that are predicted, in the order of those that are read."""
    targets = _matches(target_glob, known)
    if lone := sites.keys() ^ targets.keys():
        names = ", ".join(sorted({sites.get(part) or targets[part] for part in lone}))
        raise ConfigError(
            f"site {glob!r} and target_site {target_glob!r} must match in pairs; alone: {names}"
        )
    return [targets[part] for part in sites]
