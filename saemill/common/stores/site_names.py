"""The names of sites: of one, of several that are joined, of the store beside.

layers.2                  a site of a store
layers.2+layers.4         two of them, side by side
layers.4+with.layers.4    a site of a store, and one of the store beside it: of another model
"""

from saemill.common.errors import ConfigError

JOINT = "+"
"""What stands between the names of joined sites."""
BESIDE = "with."
"""What the names of sites of the store beside begin with."""


def parts_of(site: str) -> tuple[str, ...]:
    """List the sites that a name joins; one alone of a plain site.

    Raises:
        ConfigError: a name is missing, or one is there twice.
    """
    parts = tuple(site.split(JOINT))
    if not all(part.removeprefix(BESIDE) for part in parts):
        raise ConfigError(f"site {site!r} lacks a name beside a +; join sites as layers.2+layers.4")
    if len(set(parts)) < len(parts):
        twice = next(part for part in parts if parts.count(part) > 1)
        raise ConfigError(f"site {site} joins {twice} with itself; name other sites beside it")
    return parts


def is_joined(site: str) -> bool:
    """Tell whether a name is that of several sites."""
    return JOINT in site
