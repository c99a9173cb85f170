"""The store's folder: what is in it, whether it is this store's, and how its records are written."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from saemill.cache import token_copy
from saemill.cache.claims.files import holds_only_claims
from saemill.cache.claims.worker import Worker
from saemill.common import config as settings
from saemill.common import durable, records
from saemill.common.errors import ConfigError, StoreError
from saemill.common.log import say
from saemill.common.stores.mirror import OBJECTS
from saemill.common.stores.site_names import folder_of
from saemill.common.stores.site_records import (
    CLAIMS,
    CONSUMED,
    EMBEDDINGS,
    FOLLOWERS,
    REPAIR,
    SITES,
    Commit,
    StoreSettings,
    group_of,
    known_settings,
    read_settings,
    record_path,
    sites_in,
)
from saemill.common.stores.tokens import TokenStore


def existing_settings(out: Path, tokens: TokenStore) -> StoreSettings | None:
    """Read the settings of the store in a folder, from whichever copy of them is whole; None where a new
    store may be made.

    Args:
        out: the folder.
        tokens: those that are to be cached into it.

    Raises:
        ConfigError: the path cannot be a folder, or the store holds embeddings.
        StoreError: it holds other files.
    """
    settings.check_folder(out)
    others = _others(out, tokens)
    # Looked for last: another worker may be making the store right now.
    existing = known_settings(out)
    if existing is None and others:
        raise StoreError(f"{out} holds other files ({others[0].name}); choose a new folder")
    if existing and existing.kind == EMBEDDINGS:
        raise ConfigError(f"{out} holds embeddings; choose another folder for a model's activations")
    return existing


def _others(out: Path, tokens: TokenStore) -> list[Path]:
    """List what lies in the folder and belongs to no store of these tokens that was begun."""
    paths = list(out.glob("*"))  # first: other workers may be adding files, each of them whole
    begun = token_copy.is_copy(out / "tokens", tokens)
    known = {"tokens", "zarr.json", SITES, CONSUMED, FOLLOWERS, OBJECTS}
    own = {*known, *map(folder_of, sites_in(out))} if begun else {OBJECTS}
    return [
        path for path in paths if not (path.name in own or (path.name == CLAIMS and holds_only_claims(path)))
    ]


def check_same_store(out: Path, existing: StoreSettings | None, identity: Mapping[str, Any]) -> None:
    """Refuse to go on in a folder that was made with other settings.

    Args:
        out: the store's folder.
        existing: its settings; None where there is no store, or where no copy of them is left: then the
            records of shards decide whether these are the same.
        identity: the settings now, of those that decide the content.

    Raises:
        ConfigError: some are others.
    """
    if existing is not None:
        if existing.converted_from and not identity.get("converted_from"):
            raise ConfigError(
                f"{out} was converted from a store of {existing.converted_from}: run `saemill convert-store` "
                "again to mend it; add sites to the store that it was made of, and convert that"
            )
        settings.check_same(existing.model_dump(mode="json"), identity, out)
        return
    now = StoreSettings.made(identity, model=None, revision=None, versions={}).identity
    for file in out.glob("*/commits/*.json"):
        commit = records.if_whole(partial(records.read, file, Commit, REPAIR))
        if commit is not None and commit.store != now:
            raise ConfigError(
                f"{out} was made with other settings than these, and no copy of them is left: give those "
                "that it was made with, or another output folder, or remove that one"
            )


def has_shards(path: Path) -> bool:
    """Tell whether any shard of any site in a store's folder is committed."""
    return any(path.glob("*/commits/[0-9]*.json"))


def write_group(out: Path, known: StoreSettings, worker: Worker) -> None:
    """Write a store's `zarr.json` where it is missing or damaged. The caller holds the claim on the store."""
    if records.if_whole(lambda: read_settings(out)) != known:
        if sites_in(out):
            say(f"{worker.place.named(out / 'zarr.json')} was missing or damaged and is written again")
        put(out / "zarr.json", group_of(known), worker)


def put(path: Path, content: Mapping[str, Any], worker: Worker) -> None:
    """Write a file of the store itself: under another path first, then put in its place. The caller holds the
    claim on the store."""
    written = worker.partial()
    durable.write_json(written, content)
    worker.place.replace(written, path)


def clear_if_empty(out: Path, worker: Worker) -> None:
    """Remove a store that holds no shard and that no other worker works on, so that other settings may be
    tried in its place. Files of others are left alone."""
    with worker.hold("store"):
        if worker.is_alone() and not has_shards(out):
            # The tokens go last: by them the rest is known as a store that was begun.
            sites = [folder_of(name) for name in sites_in(out) if record_path(out, name).exists()]
            for name in (*sites, SITES, CONSUMED, FOLLOWERS, "zarr.json", "tokens"):
                worker.place.remove(out / name)
