"""The names of sites: of one, of several that are joined, of the store beside.

layers.2                  a site of a store: what a module returns
layers.2.mlp:in           what a module takes
layers.2+layers.4         two of them, side by side
layers.4+with.layers.4    a site of a store, and one of the store beside it: of another model

On the disk a ~ stands for the colon, which not every file system and no URL takes: `layers.2.mlp~in`.
"""

from saemill.common.errors import ConfigError

INPUT = ":in"
"""What the names of inputs end in."""
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


def abridged(site: str) -> str:
    """Write a name for reading: of more than three sites that it joins the first and the last."""
    parts = site.split(JOINT)
    return site if len(parts) <= 3 else f"{parts[0]}{JOINT}…{JOINT}{parts[-1]}"


def is_joined(site: str) -> bool:
    """Tell whether a name is that of several sites."""
    return JOINT in site


def is_beside(site: str) -> bool:
    """Tell whether a name is that of a site of the store beside."""
    return site.startswith(BESIDE)


def is_input(site: str) -> bool:
    """Tell whether a site is what a module takes, not what it returns."""
    return site.endswith(INPUT)


def module_of(site: str) -> str:
    """Return the path of the module that a site is at."""
    return site.removesuffix(INPUT)


def folder_of(site: str) -> str:
    """Name the folder of a site, or of what is made from sites: a variant."""
    return site.replace(":", "~")


def site_of_folder(folder: str) -> str:
    """Return the site whose folder has a name; the inverse of `folder_of`."""
    return folder.replace("~", ":")
