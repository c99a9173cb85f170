"""Which SAEs are compared: folders of any format, and the variants of runs."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from saemill.common.errors import ConfigError, StoreError
from saemill.common.log import say
from saemill.common.sae import of_run
from saemill.common.sae.sae import Sae
from saemill.common.stores import runs

Rows = Literal["decoder", "encoder"]


@dataclass(frozen=True, slots=True)
class Dictionary:
    """One SAE, as its config describes it; the weights are read when they are needed."""

    name: str
    """The end of its path, as long as it takes to tell it from the others."""
    path: Path
    d_in: int
    d_out: int
    """Length of its decoder rows, which is not d_in of some transcoders."""
    num_latents: int
    architecture: str
    """What it was trained as, of `SaeConfig.architecture`."""
    provenance: dict[str, Any]

    def load(self, device: torch.device) -> Sae:
        """Load the SAE.

        Raises:
            StoreError: it was damaged meanwhile.
        """
        return Sae.load(self.path, device)

    def rows(self, which: Rows, device: torch.device) -> Tensor:
        """Read its latents' directions, fp32 [F, D], of unit length; a row of zeros stays one."""
        sae = self.load(device)
        weights = sae.decoder_rows if which == "decoder" else sae.W_enc
        return torch.nn.functional.normalize(weights.detach().float(), dim=1)

    def traits(self) -> dict[str, Any]:
        """Read from its config where it came from, and with which settings it was trained."""
        origin = {key: self.provenance.get(key) for key in ("model", "dataset", "site", "target_site")}
        variant = dict(self.provenance.get("variant") or {})
        variant.pop("name", None)
        return origin | variant | {"num_latents": self.num_latents, "architecture": self.architecture}


def differing(a: Dictionary, b: Dictionary) -> list[str]:
    """List the traits in which two SAEs differ, sorted. Of an SAE of another tool few are known."""
    traits_a, traits_b = a.traits(), b.traits()
    return sorted(key for key in traits_a.keys() & traits_b.keys() if traits_a[key] != traits_b[key])


def find(paths: Iterable[Path]) -> list[Dictionary]:
    """Find the SAEs in folders of SAEs and of runs.

    Raises:
        StoreError: a folder is neither, or its run is not finished.
        ConfigError: fewer than two SAEs, or one of them twice.
    """
    folders = [folder for path in paths for folder in (_variants(path) or [path])]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("an SAE is named twice; a run's folder stands for all of its SAEs")
    if len(folders) < 2:
        raise ConfigError(f"two SAEs or more are needed, got {', '.join(map(str, folders)) or 'none'}")
    dictionaries = []
    for name, folder in zip(_names(folders), folders, strict=True):
        config = Sae.load(folder).config
        shape = config.d_in, config.d_out or config.d_in, config.num_latents
        dictionaries.append(Dictionary(name, folder, *shape, config.architecture, config.provenance))
    return dictionaries


def pairs(dictionaries: list[Dictionary], any_width: bool) -> list[tuple[Dictionary, Dictionary]]:
    """List all pairs whose directions are of one length, and report how many are left out.

    Args:
        any_width: list every pair, since it is not directions that are compared.

    Raises:
        ConfigError: no pair is left.
    """
    every = list(combinations(dictionaries, 2))
    comparable = [(a, b) for a, b in every if any_width or (a.d_in, a.d_out) == (b.d_in, b.d_out)]
    if not comparable:
        widths = ", ".join(f"{d.name} has {_widths(d)}" for d in dictionaries)
        raise ConfigError(
            f"directions of different lengths (d_in) have no cosine: {widths}; "
            "compare what they do on the same tokens, by --by activations"
        )
    if len(comparable) < len(every):
        say(f"left out: {len(every) - len(comparable)} of {len(every)} pairs, whose d_in differ")
    return comparable


def _widths(dictionary: Dictionary) -> str:
    """Write the lengths of a dictionary's encoder and decoder rows."""
    d_in, d_out = dictionary.d_in, dictionary.d_out
    return f"{d_in}" if d_in == d_out else f"{d_in} → {d_out}"


def _variants(path: Path) -> list[Path] | None:
    """List the SAEs of a finished run that did not diverge and were not stopped early; None for no run."""
    if not runs.is_run(path):
        return None
    if not runs.is_finished(path):
        raise StoreError(
            f"{path} is no finished run ({runs.FINISHED} is missing); finish it with `saemill train`"
        )
    finished = runs.finished(path)
    left_out = {**finished.diverged, **finished.stopped}
    if left_out:
        say(f"left out of {path}: {', '.join(left_out)}, diverged or stopped early")
    names = [name for name in finished.variants if name not in left_out]
    for name in names:
        of_run.check(path / name, finished.cfgs[name], path / runs.FINISHED)
    return [path / name for name in names]


def _names(folders: list[Path]) -> list[str]:
    """Name folders by the ends of their paths, as long as it takes to tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    for n in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-n:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different paths have different names")
