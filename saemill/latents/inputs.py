"""What is exported: SAEs of a finished run, the store that they were trained on, some of their latents."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from saemill.common.addresses import is_there
from saemill.common.errors import ConfigError, StoreError
from saemill.common.log import say
from saemill.common.ranges import parsed
from saemill.common.sae import of_run
from saemill.common.sae.sae import Sae
from saemill.common.stores import runs
from saemill.common.stores.activations import ActivationStore, keep_locally
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.passages import PassageStore
from saemill.latents.config import ExportLatentsConfig


@dataclass(frozen=True, slots=True)
class Opened:
    """SAEs of a run, with what they were trained on."""

    run: Path
    """Folder of the run, also where one of its SAEs was named."""
    saes: dict[str, Sae]
    """SAEs by the names of their variants."""
    is_one: bool
    """Whether one SAE was named, and not the run."""
    store: ActivationStore
    mask: MaskConfig
    """Positions that training left out."""

    def folder_of(self, name: str, out: Path) -> Path:
        """Choose the folder that an SAE's files go to."""
        return out if self.is_one else out / name


def open_run(config: ExportLatentsConfig, device: torch.device) -> Opened:
    """Open a run or one SAE of it, with its store.

    Raises:
        StoreError: the run is not finished, or its activations are not to be found.
        ConfigError: no format of these has a word for what the SAEs are, or for the store.
    """
    run = config.run.absolute()
    names: tuple[str, ...] = ()
    if not runs.is_run(run) and runs.is_run(run.parent):
        run, names = run.parent, (run.name,)
    if not runs.is_finished(run):
        raise StoreError(
            f"{run} is no finished run ({runs.FINISHED} is missing): name one, or the folder of an SAE in it;"
            " `saemill train` finishes a run"
        )
    finished = runs.finished(run)
    names = _measured(run, finished, names)
    saes = {name: of_run.load(run, name, finished, device) for name in names}
    _check_words(config.format, saes)
    path = config.acts or Path(finished.acts)
    if not is_there(path):
        raise StoreError(f"the run's activations are no longer at {path}; say where with --acts")
    store = ActivationStore(path)
    keep_locally([store], config.local_cache)
    for name, sae in saes.items():
        if sae.config.provenance["acts_fingerprint"] != store.fingerprint:
            raise StoreError(f"{name} was not trained on {path}; name the right store with --acts")
    if isinstance(store.text, PassageStore):
        raise ConfigError(
            f"{config.format} shows tokens or a language model's losses, and {path} holds embeddings of "
            "passages, which have neither; `saemill assess` shows the passages of their latents"
        )
    return Opened(run, saes, run != config.run.absolute(), store, finished.mask)


def _measured(run: Path, finished: runs.Finished, named: tuple[str, ...]) -> tuple[str, ...]:
    """List the SAEs to export: the one that is named, or all that were trained to the end.

    Raises:
        StoreError: there is none.
    """
    left_out = finished.diverged.keys() | finished.stopped.keys()
    if named and named[0] not in finished.variants:
        raise StoreError(f"{run / named[0]} is no SAE of the run; it has {', '.join(finished.variants)}")
    if bad := [name for name in named if name in left_out]:
        raise StoreError(f"{run / bad[0]} diverged or was stopped early; name another SAE of the run")
    names = named or tuple(name for name in finished.variants if name not in left_out)
    if not names:
        raise StoreError(f"every SAE of {run} diverged or was stopped early; train again")
    if left_out and not named:
        say(f"left out: {', '.join(sorted(left_out))}, diverged or stopped early")
    return names


def _check_words(format: str, saes: dict[str, Sae]) -> None:
    """Refuse SAEs that the format has no word for.

    Raises:
        ConfigError: naming the SAE.
    """
    for name, sae in saes.items():
        if spans := sae.config.spans:
            raise ConfigError(
                f"{format} has SAEs of one site, got {name}, {spans}; `saemill assess` "
                "shows its latents. Name the other SAEs of the run one by one"
            )
        if format != "saebench" and sae.config.is_signed:
            raise ConfigError(
                f"{format} ranks activations from 0 up, got {name}, whose latents fire below 0 as well "
                f"({sae.config.architecture}); `saemill assess` shows both ends. Name the other SAEs of the "
                "run one by one"
            )
        if format == "saebench" and sae.is_transcoder:
            raise ConfigError(
                f"saebench's core evaluation is of SAEs that reconstruct what they read, got {name}, a "
                f"transcoder from {sae.site} to {sae.target_site}. Name the SAEs of the run one by one"
            )


def chosen_latents(items: Sequence[str], saes: dict[str, Sae]) -> dict[str, NDArray[np.int64]]:
    """List the latents to export of each SAE, ascending.

    Args:
        items: numbers and ranges; none for all latents.
        saes: SAEs by name.

    Raises:
        ConfigError: an SAE has fewer.
    """
    ranges = [parsed(item) for item in items]
    last = max((numbers.stop - 1 for numbers in ranges), default=0)
    for name, sae in saes.items():
        if last >= sae.config.num_latents:
            raise ConfigError(f"latents must be in 0..{sae.config.num_latents - 1} of {name}, got {last}")
    asked = np.array(sorted({latent for numbers in ranges for latent in numbers}), np.int64)
    return {name: asked if ranges else np.arange(sae.config.num_latents) for name, sae in saes.items()}
