"""`saemill sites`: the places in a model whose activations can be cached.

From the config alone: names, widths, which names mean the same, what TransformerLens calls them. With the
weights as well: what is there (`common.models.site_roles`).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import NamedTuple

import torch

from saemill.common.log import counted
from saemill.common.models.architecture import Architecture, within_layer
from saemill.common.models.model import LanguageModel, choose_model_dtype
from saemill.common.models.site_roles import N_TOKENS, roles_of
from saemill.common.models.sites import load_model_config
from saemill.common.sae.formats.hooks import hook_of
from saemill.common.stores.site_names import is_input, module_of
from saemill.common.stores.site_roles import Role


class Line(NamedTuple):
    """What is said of a site, but for the number of its layer."""

    name: str
    width: int
    what: str
    hook: str


def describe(
    name: str,
    revision: str | None,
    *,
    globs: tuple[str, ...] = (),
    every: bool = False,
    check: bool = False,
    trust_remote_code: bool = False,
) -> str:
    """Describe the sites of a model.

    Args:
        name: hub id or local folder.
        revision: the hub's revision.
        globs: those to list; all by default.
        every: list each by its name, without a word on it.
        check: load the weights, run a few tokens, and say what is at each.
        trust_remote_code: run code that the model brings.

    Raises:
        ConfigError: the model cannot be found or built, or has no such site.
    """
    config = load_model_config(name, revision, trust_remote_code)
    architecture = Architecture(config, trust_remote_code)
    widths = (
        {site.name: site.width for site in architecture.resolve((), globs)} if globs else architecture.widths
    )
    if every:
        return "\n".join(f"{site}  {width}" for site, width in widths.items())
    roles = _roles(name, revision, widths, trust_remote_code) if check else {}
    lines = {site: _line(site, architecture, config.model_type, roles) for site in widths}
    return "\n".join([*_head(architecture), *_table(_grouped(lines))])


def _roles(
    name: str, revision: str | None, sites: Iterable[str], trust_remote_code: bool
) -> Mapping[str, Role | None]:
    """Find what is at some sites of the real model, in a pass over ids that mean nothing."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = choose_model_dtype("auto", device)
    model = LanguageModel(
        name, revision=revision, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    ids_RS = torch.randint(model.n_ids, (1, N_TOKENS), generator=torch.Generator().manual_seed(0))
    return roles_of(model, sites, ids_RS)


def _line(site: str, architecture: Architecture, model_type: str, roles: Mapping[str, Role | None]) -> Line:
    """Say of a site what it is."""
    kind, layer = within_layer(site)
    hook = hook_of(site, model_type)
    if role := roles.get(site):
        what = role.described
    elif first := architecture.same.get(site):
        what = f"= {first}"
    elif module_of(site) in architecture.block_paths:
        what = f"residual stream {'before' if is_input(site) else 'after'} the block"
    else:
        what = f"{'input' if is_input(site) else 'output'} of {architecture.classes[module_of(site)]}"
    if layer:
        above = re.escape(kind.partition("*")[0])
        what = re.sub(rf"({above}){layer}(?=[.: ,]|$)", r"\1*", what)
    return Line(kind, architecture.widths[site], what, f"blocks.*.{hook.in_block}" if hook else "")


def _grouped(lines: Mapping[str, Line]) -> Iterator[Line]:
    """Put the layers' lines that say the same into one, in the place of the first."""
    layers: dict[Line, list[int]] = {}
    for site, line in lines.items():
        number = within_layer(site)[1]
        layers.setdefault(line, []).extend([int(number)] if number else [])
    for line, numbers in layers.items():
        yield line._replace(name=line.name.replace("*", _ranges(numbers), 1)) if numbers else line


def _ranges(numbers: list[int]) -> str:
    """Write whole numbers as 0…5, or as 0,2…5."""
    runs = [list(run) for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])]
    return ",".join(
        str(a) if a == b else f"{a}…{b}" for (_, a), (_, b) in ((run[0], run[-1]) for run in runs)
    )


def _table(lines: Iterable[Line]) -> list[str]:
    """Lay lines out in columns."""
    rows = list(lines)
    long = max((len(row.name) for row in rows), default=0)
    wide = max((len(row.what) for row in rows), default=0)
    return [f"  {row.name:{long}}  D {row.width:6,}  {row.what:{wide}}  {row.hook}".rstrip() for row in rows]


def _head(architecture: Architecture) -> list[str]:
    """Say what the model is, and how its sites are named."""
    tower = f", of which {architecture.tower} is run on text" if architecture.tower else ""
    blocks = f"{counted(len(architecture.block_paths), 'block')}, " if architecture.block_paths else ""
    n_others = len(architecture.modules) - len({module_of(site) for site in architecture.widths})
    return [
        f"{architecture.name}{tower}: {blocks}{counted(len(architecture.widths), 'site')}; no sites are at "
        f"{counted(n_others, 'module')}, without one vector per token of text",
        "a module's name is what it returns, with :in what it takes; `saemill cache` takes globs of them",
    ]
