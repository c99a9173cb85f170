"""What is damaged in a store or a run, file by file: every hash is compared, every record with the others."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from saemill.common import durable, records
from saemill.common.errors import StoreError
from saemill.common.stores import assessments, diffs, explanations, mirror, runs
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.followers import Consumed
from saemill.common.stores.passages import REPAIR as REPAIR_PASSAGES
from saemill.common.stores.passages import PassageStore
from saemill.common.stores.shards import ShardedArray
from saemill.common.stores.site_records import (
    EMBEDDINGS,
    REPAIR,
    Commit,
    SiteManifest,
    known_settings,
    read_settings,
    site_path,
    sites_in,
)
from saemill.common.stores.tokens import REPAIR as REPAIR_TOKENS
from saemill.common.stores.tokens import TokenStore, read_manifest
from saemill.train.record import inspect

T = TypeVar("T")


class Findings(list[str]):
    """Lines on what is wrong, each on one bad file."""

    def attempt(self, action: Callable[[], T]) -> T | None:
        """Return what an action returns. If it ends with an error, add the error as a line, without the
        advice."""
        try:
            return action()
        except StoreError as error:
            message = str(error)
            for repair in (REPAIR, REPAIR_TOKENS, REPAIR_PASSAGES):
                message = message.removesuffix(repair).rstrip()
            self.append(message)
            return None


def tokens_problems(path: Path) -> list[str]:
    """List what is wrong with a token store, a line for each bad file."""
    findings = Findings()
    path, _ = mirror.opened(path, anew=True)
    if manifest := findings.attempt(lambda: read_manifest(path, REPAIR_TOKENS)):
        findings += records.problems(path, manifest.files, hashes=True)
    if not findings:
        findings.attempt(lambda: TokenStore(path).check_content())
    return findings


def passages_problems(path: Path) -> list[str]:
    """List what is wrong with the passages of an embedding store, a line for each bad file."""
    findings = Findings()
    store = findings.attempt(lambda: PassageStore(path))
    if store:
        findings += store.problems(hashes=True)
    if store and not findings:
        findings.attempt(lambda: store.held_out_R)
    return findings


def activations_problems(path: Path) -> list[str]:
    """List what is wrong with an activation store, a line for each bad file or unfinished site."""
    findings = Findings()
    path, _ = mirror.opened(path, anew=True)
    settings = findings.attempt(lambda: read_settings(path)) or known_settings(path)
    holds_embeddings = settings.kind == EMBEDDINGS if settings else (path / "passages").is_dir()
    findings += passages_problems(path / "passages") if holds_embeddings else tokens_problems(path / "tokens")
    if findings:
        return findings
    store = findings.attempt(lambda: ActivationStore(path))
    if store:
        for name in sites_in(path):
            findings += _site_problems(store, name)
    return findings


def _site_problems(store: ActivationStore, name: str) -> list[str]:
    """List what is wrong with a site of a store whose settings and text are whole."""
    findings, folder = Findings(), site_path(store.path, name)
    record = findings.attempt(lambda: store.record(name))
    if not folder.is_dir():
        return [*findings, f"{folder}: folder is missing"]
    findings.attempt(lambda: _open_array(store, name, record.width if record else None))
    manifest = None
    if not (folder / "manifest.json").exists():
        n_commits = store.unfinished[name]
        is_all = n_commits == store.n_shards
        if (consumed := store.consumed) and name in consumed.sites:
            return [*findings, consumed.refusal(name, store.path), *_left(store, name, consumed)]
        state = f"{folder / 'manifest.json'}: {durable.MISSING}" if is_all else f"{name}: unfinished"
        findings.append(f"{state}, {n_commits:,} of {store.n_shards:,} shards are there")
    elif record:
        manifest = findings.attempt(lambda: store.manifest(record))
    committed = store.committed(name)
    for shard in range(store.n_shards):
        findings += _shard_problems(store, name, shard, manifest, shard in committed)
    return findings


def _left(store: ActivationStore, name: str, consumed: Consumed) -> list[str]:
    """List what is wrong with the shards of a consumed site that are left."""
    shards = sorted(store.committed(name) - {*consumed.shards})
    return [line for shard in shards for line in _shard_problems(store, name, shard, None, True)]


def _open_array(store: ActivationStore, name: str, width: int | None) -> ShardedArray:
    """Open a site's array; where its record is lost, D is what the array's own columns say."""
    if width is None:
        compression = store.settings.compression
        columns = ShardedArray(site_path(store.path, name), REPAIR, compression=compression).width
        width = columns + 1 - store.settings.form(1).columns
    return store.open_array(name, width)


def _shard_problems(
    store: ActivationStore, name: str, shard: int, manifest: SiteManifest | None, is_committed: bool
) -> list[str]:
    """List what is wrong with a shard and its record. Those that an unfinished site lacks are no damage."""
    findings, folder = Findings(), site_path(store.path, name)
    file = folder / "commits" / f"{shard}.json"
    commit: Commit | None = None
    if manifest or is_committed:
        commit = findings.attempt(lambda: store.commit(name, shard))
    entry = manifest.shards[shard] if manifest else commit
    if commit and entry and commit.xxh3 != entry.xxh3:
        findings.append(f"{file} and {folder / 'manifest.json'} tell of other shards")
    if entry:
        problem_of = durable.problem if store.mirror is None else store.mirror.problem
        if problem := problem_of(folder / "c" / str(shard) / "0", entry.bytes, entry.xxh3):
            findings.append(f"{name} shard {shard}: {problem}")
    return findings


def run_problems(path: Path) -> list[str]:
    """List what is wrong with a run, the SAEs that it kept on the way, and all assessments: a line for each
    bad file, with the repair."""
    lines = inspect.problems(path)
    explained = explanations.problems(path) if (path / runs.EXPLANATIONS).exists() else None
    try:
        assessed = assessments.problems(path) if (path / assessments.FILE).exists() else []
        lines += [f"{line}. {_repair(path, line, assessed, explained)}" for line in assessed]
    except StoreError as error:
        lines.append(str(error))
    lines += explained or []
    for point in runs.points(path):
        if runs.is_finished(point):
            lines += run_problems(point)
        else:
            lines.append(f"{point / runs.FINISHED}: {durable.MISSING}. Remove {point}, or train anew.")
    return lines


def _repair(path: Path, line: str, assessed: list[str], explained: list[str] | None) -> str:
    """Choose the repair of a bad file of an assessment. `explain` writes the page anew, from explanations
    that are there; it may have been stopped between the page and the record that has its hash.

    Args:
        path: the run.
        line: what is wrong with the file.
        assessed: what is wrong with all of them.
        explained: what is wrong with the explanations; None where there are none.
    """
    page_alone = len(assessed) == 1 and line.startswith(f"{path / runs.REPORT}:")
    if not page_alone or explained != []:
        return assessments.REPAIR
    is_of_page = explanations.load(path).features == durable.hash_file(path / runs.FEATURES)
    return explanations.REPAIR if is_of_page else assessments.REPAIR


def diff_problems(path: Path) -> list[str]:
    """List what is wrong with the files of a diff, its run left out: a line for each, with the repair."""
    try:
        return diffs.problems(path)
    except StoreError as error:
        return [str(error)]
