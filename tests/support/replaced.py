"""Runs whose SAEs were put in the place of those that were trained."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from saemill import Sae
from saemill.common import records
from saemill.common.sae import of_run
from saemill.common.sae.formats import seal
from saemill.common.stores import runs


def with_thresholds(sae: Sae, threshold: float, **changes: Any) -> Sae:
    """The weights and the origin of a TopK SAE, with a threshold for all latents."""
    config = replace(sae.config, k=None, **({"architecture": "jumprelu"} | changes))
    threshold_F = torch.full((config.num_latents,), threshold)
    return Sae.of(replace(sae.parts, config=config, threshold=threshold_F))


def run_of_other_saes(run: Path, out: Path, changes: Mapping[str, dict[str, Any]]) -> dict[str, Sae]:
    """A copy of a finished run, in which variants have thresholds or fields of `SaeConfig` that were not
    trained.

    Args:
        changes: by the variant's name: `threshold` for all latents, if it is to have one, and fields.

    Returns: all SAEs of the copy.
    """
    shutil.copytree(run, out)
    finished = runs.finished(run)
    saes = {}
    for name in finished.variants:
        sae, fields = of_run.load(run, name, finished), dict(changes.get(name, {}))
        if "threshold" in fields:
            sae = with_thresholds(sae, fields.pop("threshold"), **fields)
        else:
            sae = Sae.of(replace(sae.parts, config=replace(sae.config, **fields)))
        sae.save(out / name)
        saes[name] = sae
    cfgs = {name: seal.checksum(out / name) for name in finished.variants}
    records.write(out / runs.FINISHED, finished.model_copy(update={"cfgs": cfgs}))
    for file in (runs.ASSESSMENT, runs.REPORT):
        (out / file).unlink(missing_ok=True)
    return saes
