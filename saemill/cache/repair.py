"""Repair: which shards of a site are bad, and what of them is mended without the model."""

import numpy as np

from saemill.cache.folder import put
from saemill.cache.writer import SiteWriter
from saemill.common import records
from saemill.common.log import counted, say
from saemill.common.stores.shards import as_tensor
from saemill.common.stores.site_records import Commit, Shard, SiteManifest


def damaged(writer: SiteWriter) -> list[int]:
    """List the shards still to be written, and those whose file or record is bad.

    An unfinished site is checked by file sizes, a finished one by the hashes of its files.
    """
    hashes = writer.manifest_path.exists()
    return [shard for shard in range(writer.store.n_shards) if not _is_good(writer, shard, hashes)]


def mend(writer: SiteWriter, shards: list[int]) -> None:
    """Repair the record of shards that were damaged, and the manifest. The caller holds the claim on the
    store.

    A shard whose file the manifest answers for gets its record anew; others are taken out of the store.
    The manifest goes last, so that a crash in between leaves a site whose hashes are checked again.
    """
    hashes, named = writer.manifest_path.exists(), writer.worker.place.named
    manifest = writer.manifest()
    if manifest is None or manifest.statistics.lengths is None:
        _add_norms(writer)
    is_whole = manifest is not None
    if hashes and not is_whole:
        say(f"{named(writer.manifest_path)} was damaged and is written again")
    for shard in shards:
        file = writer.commit_path(shard)
        existed = file.exists()
        if _is_good(writer, shard, hashes):
            continue
        if manifest and _holds(writer, shard, manifest.shards[shard]):
            record = _record_again(writer, shard, manifest.shards[shard])
            say(f"{named(file)} was missing or damaged and is written again")
            put(file, records.content(record), writer.worker)
            continue
        is_whole = False
        if existed:  # else another worker may be about to put a good one there
            writer.worker.place.remove(file)
    if manifest and is_whole and not _agrees(writer, manifest):
        if manifest.statistics.lengths is not None:
            name = named(writer.manifest_path)
            say(f"{name} tells of other shards than their records and is written again")
        is_whole = False
    if not is_whole:
        writer.worker.place.remove(writer.manifest_path)


def _add_norms(writer: SiteWriter) -> None:
    """Write the records of shards anew that were made before saemill kept norms, from the shards' files."""
    commits = [commit for shard in range(writer.store.n_shards) if (commit := writer.commit(shard))]
    old = [commit for commit in commits if commit.norms is None and _holds(writer, commit.shard, commit)]
    if old:
        say(f"{writer.site.name}: the norms of {counted(len(old), 'shard')} are computed once and recorded")
    for commit in old:
        writer.worker.check_stop()
        record = _record_again(writer, commit.shard, commit)
        put(writer.commit_path(commit.shard), records.content(record), writer.worker)


def _agrees(writer: SiteWriter, manifest: SiteManifest) -> bool:
    """Tell whether a manifest repeats the shards' records. Each may be whole by itself and still be of
    another time: one was brought back from a backup, or is of before saemill kept norms."""
    if manifest.statistics.lengths is None:
        return False
    commits = (writer.commit(shard) for shard in range(writer.store.n_shards))
    return all(
        commit is not None and commit.entry() == entry
        for commit, entry in zip(commits, manifest.shards, strict=True)
    )


def _is_good(writer: SiteWriter, shard: int, hashes: bool) -> bool:
    """Tell whether a shard has its record and, unless it was removed, its file, compared by hash or by size
    alone."""
    writer.worker.check_stop()
    commit = writer.commit(shard)
    if commit is None:
        return False
    if shard in writer.removed:
        return True
    return _holds(writer, shard, commit, hashes)


def _holds(writer: SiteWriter, shard: int, known: Commit | Shard, hashes: bool = True) -> bool:
    """Tell whether a shard's file is there and of the size and, with `hashes`, the hash that is known."""
    return writer.array.problem(shard, known.bytes, known.xxh3 if hashes else None) is None


def _record_again(writer: SiteWriter, shard: int, known: Commit | Shard) -> Commit:
    """Compute the record of a shard whose file is whole, from the file."""
    array = writer.array
    rows_TC = np.concatenate([array.block(shard, block) for block in range(array.n_blocks(shard))])
    stored_TC = as_tensor(rows_TC, writer.form.stored)
    return writer.record(shard, stored_TC, known.bytes, known.xxh3, known.batch_rows)
