"""A token store at an address: it is made here first and then uploaded, its manifest last.

Only the manifest makes it a store, so a kill at any moment leaves none, and the same call goes on: what was
uploaded is compared and not sent again.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from platformdirs import user_cache_path

from saemill.common import durable, records
from saemill.common.addresses import naming
from saemill.common.errors import StoreError
from saemill.common.log import say
from saemill.common.stores import mirror
from saemill.common.stores.objects import ObjectStore
from saemill.common.stores.tokens import REPAIR, TokenStore, read_manifest
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.memory import Given
from saemill.tokenize.place import CONTENT, OF_CHATS, check_made_alike


def make(
    address: str, config: TokenizeConfig, given: Given | None, make_here: Callable[[TokenizeConfig], object]
) -> TokenStore:
    """Make a token store at an address, unless there is one of the same source with the same settings.

    Args:
        address: where.
        config: the settings.
        given: the dataset, if it is in memory.
        make_here: makes the store in the folder that the settings name.

    Raises:
        ConfigError: there is one of other settings, or of a source that has changed since.
        StoreError: other things are there.
    """
    remote = ObjectStore(address)
    listed = remote.list()
    if others := [key for key in listed if key.split("/")[0] not in CONTENT | OF_CHATS]:
        raise StoreError(f"{address} holds other files ({others[0]}); choose a new folder")
    if mirror.TOKENS in listed and (store := _finished(address, config, given)):
        say(f"{address} is finished already: {store.n_tokens:,} tokens in {store.n_rows:,} rows")
        return store
    here = user_cache_path("saemill") / "tokens" / durable.hash_bytes(address.encode())
    make_here(replace(config, out=here))
    remote.delete(mirror.TOKENS)
    for file in sorted((f for f in here.rglob("*") if f.is_file()), key=lambda f: f == here / mirror.TOKENS):
        _upload(remote, file.relative_to(here).as_posix(), file)
    shutil.rmtree(here)
    say(f"{address}: uploaded")
    return TokenStore(address)


def _finished(address: str, config: TokenizeConfig, given: Given | None) -> TokenStore | None:
    """Open the store at an address, if it is whole."""
    folder, _ = mirror.opened(address, anew=True)
    if manifest := records.if_whole(lambda: read_manifest(folder, REPAIR)):
        with naming(config.out, address):
            check_made_alike(config, given, manifest)
    store = records.if_whole(lambda: TokenStore(address))
    if store is None or store.problems(hashes=True):
        say(f"{address} is damaged, and made anew")
        return None
    return store


def _upload(remote: ObjectStore, key: str, file: Path) -> None:
    """Upload a file, unless it is there."""
    content = file.read_bytes()
    try:
        remote.create(key, content)
    except FileExistsError:  # of a store that was never finished, or is damaged
        remote.write(key, content)
