"""The files of a repository of a run or a store, as they are or without paths, and its card."""

import glob
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from saemill.assess.report.picture import pareto
from saemill.assess.report.shards import packed, unpacked
from saemill.common import durable, records
from saemill.common.config import nearest
from saemill.common.errors import ConfigError, StoreError
from saemill.common.records import File
from saemill.common.sae import of_run
from saemill.common.sae.formats import seal
from saemill.common.sae.formats.checks import read_config
from saemill.common.sae.formats.sparsify import WEIGHTS, check
from saemill.common.stores import assessments, features, runs
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.passages import PassageStore
from saemill.common.stores.site_names import folder_of
from saemill.common.stores.site_records import SITES, group_of
from saemill.common.stores.tokens import TokenStore
from saemill.hub.card import model_card
from saemill.hub.names import Names, as_json
from saemill.hub.store_card import activations_card, tokens_card
from saemill.show import hint, kind_of
from saemill.train.record.inspect import settings_problems

TEXTS = (runs.CONFIG, runs.REPORT)
"""Files of a run that may name paths of the machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The files of a repository."""

    repo_type: str
    """model or dataset."""
    folder: Path
    as_they_are: tuple[str, ...]
    """Files below the folder that are uploaded first, as globs."""
    written: Mapping[str, bytes]
    """Path in the repository → content: the card, and what makes the rest readable. It goes last."""

    @property
    def sizes(self) -> dict[str, int]:
        """Map the path in the repository of every file to its bytes."""
        files = {file for pattern in self.as_they_are for file in self.folder.glob(pattern)}
        sizes = {str(file.relative_to(self.folder)): file.stat().st_size for file in files}
        return sizes | {name: len(content) for name, content in self.written.items()}


def contents_of(path: Path, place: str, variants: Sequence[str]) -> Contents:
    """Choose what is uploaded of a folder.

    Args:
        path: a run, a token store or an activation store.
        place: where to, as the card names it: `user/repo`, or `user/repo@branch`.
        variants: of a run, those to upload; all if there are none.

    Raises:
        StoreError: the folder is none of them, or unfinished.
        ConfigError: no such variant.
    """
    kind = kind_of(path)
    if kind == "run":
        return _run(path, place, variants)
    if kind == "SAE":
        raise StoreError(f"{path} is one SAE; push its run, {path.parent}, with --variant {path.name}")
    if kind is None:
        raise StoreError(f"{path} is no run, token store or activation store that saemill made{hint(path)}")
    if variants:
        raise ConfigError(f"--variant has no effect on the {kind} {path}; leave it out")
    return _tokens(path, place) if kind == "token store" else _activations(path, place)


def _run(path: Path, place: str, chosen: Sequence[str]) -> Contents:
    """Choose the files of a finished run: its SAEs, how they were made, and their assessment."""
    if not runs.is_finished(path):
        raise StoreError(f"the run {path} is unfinished; finish it with `saemill train`")
    if runs.finished(path).imported:
        raise ConfigError(
            f"{path} holds SAEs that were trained elsewhere, with no settings to publish; push a run that "
            "was trained here"
        )
    if damaged := settings_problems(path):
        raise StoreError(damaged[0])
    finished, identity = runs.finished(path), runs.identity(path)
    for name in chosen:
        if name not in finished.variants:
            raise ConfigError(f"{path} has no variant {name!r}; {nearest(name, finished.variants)}")
    variants = tuple(name for name in finished.variants if not chosen or name in chosen)
    saes = {name: _sae(path / name, finished.cfgs[name], path) for name in variants}
    names = Names(yaml.safe_load((path / runs.CONFIG).read_bytes()), finished.model_dump(), saes)
    written = {name: names.content(path / name) for name in TEXTS if (path / name).is_file()}
    saes = {name: seal.sealed_again(names.of(cfg)) for name, cfg in saes.items()}
    written |= {f"{name}/cfg.json": as_json(cfg) for name, cfg in saes.items()}
    uploaded = finished.model_copy(
        update={
            "variants": variants,
            "cfgs": {name: cfg[seal.OWN][seal.KEY][records.CHECKSUM] for name, cfg in saes.items()},
            "diverged": {name: step for name, step in finished.diverged.items() if name in variants},
            "stopped": {name: stop for name, stop in finished.stopped.items() if name in variants},
            "acts": names.of(finished.acts),
            "with_acts": names.of(finished.with_acts),
            "files": (),
        }
    )
    identity = identity.model_copy(update={"config": durable.hash_bytes(written[runs.CONFIG])})
    written |= {
        runs.IDENTITY: as_json(records.content(identity)),
        runs.FINISHED: as_json(records.content(uploaded)),
    }
    if (path / assessments.FILE).is_file():
        written |= _latents(path, names, durable.hash_bytes(written[runs.FINISHED]))
    if picture := _picture(path, variants):
        written[runs.PARETO] = picture.encode()
    assessed = _assessment(path, names, written)
    card = model_card(place, saes, uploaded.model_dump(mode="json"), identity.content, assessed)
    written |= {runs.CARD: card.encode()}
    if assessed:
        written |= {assessments.FILE: as_json(records.content(assessments.checked(assessed)))}
    weights = tuple(f"{name}/{WEIGHTS}" for name in variants)
    return Contents(repo_type="model", folder=path, as_they_are=weights, written=written)


def _picture(path: Path, variants: Sequence[str]) -> str | None:
    """Draw the SAEs that are uploaded beside the untrained dictionaries; None where there is nothing to
    draw."""
    if not (path / assessments.FILE).is_file():
        return None
    assessment = assessments.read(path)
    shown = [entry for entry in assessment["variants"] if entry["name"] in variants]
    return pareto(assessment | {"variants": shown}) if shown else None


def _latents(path: Path, names: Names, of: str) -> dict[str, bytes]:
    """Read the latents that an assessment shows, and those beside its page.

    Args:
        path: the run.
        names: of the paths in them.
        of: hash of the `finished.json` that is uploaded.

    Raises:
        StoreError: a file of the assessment is damaged, or it is of other SAEs.
    """
    if bad := assessments.problems(path):
        raise StoreError("\n".join([*bad, assessments.REPAIR]))
    shown = names.record(features.load(path)).model_copy(update={"of": of})
    shards = sorted((path / runs.BESIDE).glob("*.js"))
    return {
        runs.FEATURES: json.dumps(records.content(shown), allow_nan=False).encode(),
        runs.LATENTS: (path / runs.LATENTS).read_bytes(),
    } | {
        f"{runs.BESIDE}/{file.name}": packed(file.stem, names.of(unpacked(file.read_bytes())))
        for file in shards
    }


def _assessment(path: Path, names: Names, written: Mapping[str, bytes]) -> dict[str, Any] | None:
    """Read the run's assessment, if there is one, listing those of its files that are uploaded."""
    if not (path / assessments.FILE).is_file():
        return None
    assessment: dict[str, Any] = names.of(assessments.read(path))
    listed = [*(entry["path"] for entry in assessment["files"]), runs.PARETO]
    contents = {name: written[name] for name in listed if name in written}
    return assessment | {
        "of": durable.hash_bytes(written[runs.FINISHED]),
        "files": [
            {"path": name, "bytes": len(content), "xxh3": durable.hash_bytes(content)}
            for name, content in contents.items()
        ],
    }


def _sae(folder: Path, cfg: str, run: Path) -> dict[str, Any]:
    """Read the config of an SAE whose files are as they were written."""
    for file in ("cfg.json", WEIGHTS):
        if not (folder / file).is_file():
            raise StoreError(f"{folder / file} is missing; leave the variant out with --variant")
    of_run.check(folder, cfg, run / runs.FINISHED)
    check(folder)
    return read_config(folder / "cfg.json")


def _tokens(path: Path, place: str) -> Contents:
    store = TokenStore(path)
    names = Names(records.content(store.manifest))
    written = _token_files(store, names) | {runs.CARD: tokens_card(place, store, names).encode()}
    return Contents(repo_type="dataset", folder=path, as_they_are=_token_globs(store), written=written)


def _activations(path: Path, place: str) -> Contents:
    store = ActivationStore(path)
    store.check_finished()
    text, kind = store.text, store.text.path.name
    names = Names(records.content(store.settings), records.content(text.manifest))
    settings = names.record(store.settings)
    if settings != store.settings:
        settings = settings.model_copy(update={"fingerprint": store.fingerprint})
    files = _token_files(text, names) if isinstance(text, TokenStore) else _passage_files(text, names)
    written = {f"{kind}/{name}": content for name, content in files.items()}
    written["zarr.json"] = as_json(group_of(settings))
    for site in store.sites:
        known = store.record(site).model_copy(update={"settings": settings})
        written[f"{SITES}/{folder_of(site)}.json"] = as_json(records.content(known))
    per_site = ("zarr.json", "manifest.json", "c/*/0", "commits/*.json")
    globs = [f"{folder_of(site)}/{file}" for site in store.sites for file in per_site]
    of_text = _token_globs(text) if isinstance(text, TokenStore) else ("passages.parquet",)
    globs += [f"{kind}/{file}" for file in of_text]
    card = activations_card(place, store, names).encode()
    return Contents(
        repo_type="dataset", folder=path, as_they_are=tuple(globs), written=written | {runs.CARD: card}
    )


def _passage_files(store: PassageStore, names: Names) -> dict[str, bytes]:
    return {"manifest.json": as_json(records.content(names.record(store.manifest)))}


def _token_globs(store: TokenStore) -> tuple[str, ...]:
    """List all files of a token store but its manifest."""
    listed = [glob.escape(file.path) for file in store.manifest.files if "/c/" not in file.path]
    arrays = ("tokens", "held_out", *(glob.escape(labels.array) for labels in store.manifest.labels))
    return (*listed, *(f"{array}/c/*/0" for array in arrays))


def _token_files(store: TokenStore, names: Names) -> dict[str, bytes]:
    """Write the manifest, and the tokenizer files that name a path, whose hash then changes."""
    written, files = {}, []
    for entry in store.manifest.files:
        file = store.path / entry.path
        if entry.path.startswith("tokenizer/") and file.suffix == ".json":
            content = names.content(file)
            if content != file.read_bytes():
                written[entry.path] = content
                entry = File(path=entry.path, bytes=len(content), xxh3=durable.hash_bytes(content))
        files.append(entry)
    manifest = names.record(store.manifest).model_copy(update={"files": tuple(files)})
    return written | {"manifest.json": as_json(records.content(manifest))}
