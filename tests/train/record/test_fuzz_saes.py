"""Files of SAEs and runs changed at random: they are read as they were meant, or refused in words."""

import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import changed_bytes, changed_json
from saes import make_sae, make_threshold_sae, make_transcoder
from safetensors.torch import load_file, save_file
from stores import files_of

from saemill import Sae
from saemill.common import durable, records
from saemill.common.errors import SaemillError
from saemill.common.sae import formats
from saemill.common.sae.formats.hooks import Hook
from saemill.common.stores import runs
from saemill.compare.dictionaries import find
from saemill.train.record.inspect import problems

N = int(os.environ.get("SAEMILL_FUZZ", "120"))
"""Changes per kind of folder."""


def exported(sae: Sae) -> tuple[str, ...]:
    """The formats that have SAEs of its kind."""
    if not sae.is_transcoder:
        return formats.NAMES if sae.threshold is None else formats.NAMES[1:]
    if sae.threshold is not None:
        return ("saelens",)
    return ("sparsify",) if sae.config.d_out == sae.config.d_in else ()


def use(folder: Path) -> None:
    """Load an SAE and do with it what the tools do."""
    sae = Sae.load(folder)
    sae(torch.ones(2, sae.config.d_in))
    out = folder.with_name("out")
    for cut in (sae, *sae.cuts.values()):
        cut.save(out)
        for name in exported(cut):
            formats.save(cut.parts, name, out, Hook(1, "resid_post"))
    shutil.rmtree(out)


def sealed_anew(path: Path, values: Any) -> Any:
    """A change with the hashes that fit it, so that types and ranges are what is left to check."""
    if path.name == "cfg.json" and isinstance(values, dict):
        own = values.get("saemill")
        told = own.get("seal") if isinstance(own, dict) else None
        if isinstance(told, dict) and {"bytes", "xxh3"} <= told.keys():
            fields = {key: value for key, value in told.items() if key != "checksum"}
            whole = {**values, "saemill": {**own, "seal": fields}}
            return {**whole, "saemill": {**own, "seal": fields | {"checksum": durable.hash_json(whole)}}}
        return values
    if isinstance(values, dict) and "checksum" in values:
        return records.sealed({key: value for key, value in values.items() if key != "checksum"})
    return values


def changes(folder: Path, seed: int) -> Iterator[Path]:
    """Change one file of a folder, N times, each time a copy's."""
    chance = random.Random(seed)
    names = files_of(folder)
    for _ in range(N):
        file = folder / chance.choice(names)
        kept = file.read_bytes()
        if file.suffix == ".json" and chance.random() < 0.6:
            values = changed_json(kept, chance)
            values = sealed_anew(file, values) if chance.random() < 0.7 else values
            file.write_text(json.dumps(values))
        else:
            file.write_bytes(changed_bytes(kept, chance))
        yield file
        file.write_bytes(kept)


def tried(folder: Path, calls: list[Callable[[Path], Any]], seed: int) -> dict[str, int]:
    """How the calls end over all changes."""
    counts = {"read": 0, "refused": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's on what it finds in a pickle
        for _ in changes(folder, seed):
            for call in calls:
                try:
                    call(folder)
                    counts["read"] += 1
                except SaemillError:
                    counts["refused"] += 1
    return counts


WITH_K = {"site": "layers.1", "variant": {"name": "a", "k": 5}}
SAES = {
    "topk": make_sae(),
    "transcoder": make_transcoder(has_skip=True),
    "transcoder of thresholds": make_transcoder("jumprelu", has_skip=True, e=7),
    **{name: make_threshold_sae(name, provenance=WITH_K) for name in ("jumprelu", "matryoshka")},
}


@pytest.mark.parametrize(
    ("architecture", "name"),
    [(one, name) for one, sae in SAES.items() for name in sorted({"sparsify", *exported(sae)})],
)
def test_saes_changed_at_random(tmp_path: Path, architecture: str, name: str) -> None:
    """Oracle: saemill's own errors are all that comes out; many changes are refused, some harmless."""
    parts = SAES[architecture].parts
    if name == "sparsify":
        formats.save_own(parts, tmp_path / "layers.3")
    else:
        formats.save(parts, name, tmp_path / "layers.3", Hook(1, "resid_post"))
    if name == "sparsify":
        (tmp_path / "config.json").write_text('{"model": "m", "dataset": "d", "ctx_len": 9}')
    counts = tried(tmp_path / "layers.3", [use], 1)
    assert counts["refused"] > N // 3, counts
    print(name, counts)


def test_saes_of_other_tools_changed_at_random(tmp_path: Path) -> None:
    """Oracle: the same; without a seal, as sparsify itself writes them."""
    folder = tmp_path / "layers.3"
    make_sae().save(folder)
    cfg = json.loads((folder / "cfg.json").read_text())
    del cfg["saemill"]
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file(load_file(folder / "sae.safetensors"), folder / "sae.safetensors")
    counts = tried(folder, [use], 2)
    assert counts["refused"] > N // 4, counts
    print(counts)


def test_the_seal_cannot_be_lost_by_one_bit(tmp_path: Path) -> None:
    """Oracle: every bit of the config that names the seal, flipped."""
    make_sae().save(tmp_path / "a")
    file = tmp_path / "a" / "cfg.json"
    raw = file.read_bytes()
    for word in (b'"saemill"', b'"seal"'):
        start = raw.index(word)
        for bit in range(8 * len(word)):
            data = bytearray(raw)
            data[start + bit // 8] ^= 1 << bit % 8
            file.write_bytes(data)
            with pytest.raises(SaemillError, match=r"cfg.json is damaged"):
                Sae.load(tmp_path / "a")


@pytest.mark.parametrize("state", ["whole", "going"])
def test_runs_changed_at_random(request: pytest.FixtureRequest, tmp_path: Path, state: str) -> None:
    """Oracle: the same, of the readers of runs' records and of what tells of a run as a whole."""
    out = shutil.copytree(request.getfixturevalue(state), tmp_path / "r")
    readers: list[Callable[[Path], Any]] = [problems, runs.identity, runs.looks, lambda run: find([run])]
    readers += [runs.finished] if state == "whole" else []
    counts = tried(out, readers, 3)
    assert counts["refused"] > N // 4, counts
    print(state, counts)
