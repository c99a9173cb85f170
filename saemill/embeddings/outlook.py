"""What making a store of embeddings writes: worked out when all is checked, before anything is written."""

from collections.abc import Sequence
from pathlib import Path

from saemill.cache.folder import check_same_store
from saemill.cache.outlook import (
    FILES_PER_SHARD,
    FILES_PER_SITE,
    FILES_PER_STORE,
    RECORD_BYTES,
    RECORDS,
    STATISTICS_BYTES,
)
from saemill.cache.placing import Place
from saemill.common.addresses import address_of
from saemill.common.errors import DataError
from saemill.common.log import counted
from saemill.common.outlook import Outlook, free_bytes
from saemill.common.stores.site_records import known_settings, site_path
from saemill.embeddings.store import Plan, check_room, identity_of, layout_of

PASSAGE_BYTES = 10
"""Bytes of a passage beside its id and text: hash, side, number of its source."""
TEXT_FILES = 2


class Tally:
    """A count of passages, which takes them as a `PassageWriter` does and writes nothing."""

    def __init__(self) -> None:
        self.n_rows = self.n_bytes = 0
        """Passages, and bytes of their ids, texts and the names of their sources."""
        self._sources: set[str] = set()

    def add(
        self,
        ids: Sequence[str] | None,
        texts: Sequence[str] | None,
        hashed: Sequence[bytes],
        sources: Sequence[str] | None = None,
    ) -> None:
        """Count some passages; see `PassageWriter.add`."""
        self.n_rows += len(hashed)
        self.n_bytes += PASSAGE_BYTES * len(hashed)
        new = {*(sources or ())} - self._sources
        self._sources |= new
        self.n_bytes += sum(len(text.encode()) for column in (ids, texts, new) for text in column or ())


def outlook_of(stage: str, plan: Plan, place: Place, tally: Tally, width: int) -> Outlook:
    """Work out what is going to be written. Shards and passages that are there already are left out.

    Args:
        stage: name of the command.
        plan: of the store.
        place: where it is to lie.
        tally: of its passages.
        width: D.

    Raises:
        ConfigError: it has no room, or the store there was made with other settings.
        DataError: there are no passages.
    """
    if tally.n_rows == 0:
        raise DataError(f"{plan.source['name']} holds no passages")
    existing = known_settings(plan.out)
    layout = layout_of(plan, existing, tally.n_rows, width)
    if existing is None:
        check_room(place, layout)
    else:
        check_same_store(plan.out, existing, identity_of(plan, layout, existing.passages_fingerprint))
    n_lacking = layout.n_shards - sum(1 for _ in site_path(plan.out, plan.site).glob("c/*/0"))
    text_bytes = 0 if (plan.out / "passages" / "manifest.json").exists() else tally.n_bytes
    packed = f" compressed by {layout.compression} (sizes before that)" if layout.compression else ""
    what = f"{counted(tally.n_rows, 'passage')} of {plan.source['name']}, stored as {plan.conversion.stored}"
    if n_lacking == text_bytes == 0:
        there = "all files are there; the command checks them, and writes again what is damaged"
        return Outlook(stage=stage, what=(f"{what}: {there}",))
    disk = {
        plan.site: n_lacking * layout.shard_bytes,
        RECORDS: round(n_lacking * (layout.shard_rows * RECORD_BYTES + width * STATISTICS_BYTES)),
        "passages, before compression": text_bytes,
    }
    is_tight = not address_of(place.name) and sum(disk.values()) > free_bytes(place.folder)
    warning = ("  it fits only if the passages compress well: they are written first",) if is_tight else ()
    return Outlook(
        stage=stage,
        what=(
            f"{what}{packed}:",
            f"  {plan.site:32} D {width:6,}  {n_lacking * layout.shard_bytes / 2**20:12,.1f} MiB in "
            f"{counted(n_lacking, 'shard')} of {layout.shard_rows:,}",
            *warning,
        ),
        folder=Path(place.name),
        amounts={"max_rows": tally.n_rows},
        unit="passage",
        disk=disk,
        n_files=n_lacking * FILES_PER_SHARD + FILES_PER_SITE + FILES_PER_STORE + TEXT_FILES,
    )
