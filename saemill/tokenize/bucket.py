"""A token store at an address: it is made here first and then uploaded, its manifest last.

Only the manifest makes it a store, so a kill at any moment leaves none, and the same call goes on: what was
uploaded is compared and not sent again. Of several processes of a machine one makes it; the others wait.
"""

import shutil
from collections.abc import Callable
from contextlib import suppress
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
from saemill.tokenize.place import CONTENT, OF_SOME, check_made_alike


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
    here = user_cache_path("saemill") / "tokens" / durable.hash_bytes(address.encode())
    turn = here.with_name(f"{here.name}.upload")
    with durable.exclusive(turn, wait=True):
        if store := _finished(address, config, given):  # maybe by the process that was here
            say(f"{address} is finished already: {store.n_tokens:,} tokens in {store.n_rows:,} rows")
        else:
            make_here(replace(config, out=here))
            # Another machine may have been quicker, with these settings or others.
            store = _finished(address, config, given) or _uploaded(address, here)
            shutil.rmtree(here)
        with suppress(OSError):
            turn.rmdir()
    return store


def _uploaded(address: str, here: Path) -> TokenStore:
    """Upload a store, in place of a damaged one too."""
    remote = ObjectStore(address)
    if mirror.TOKENS in remote.list():
        say(f"{address} is damaged, and made anew")
        remote.delete(mirror.TOKENS)
    for file in sorted((f for f in here.rglob("*") if f.is_file()), key=lambda f: f == here / mirror.TOKENS):
        _upload(remote, file.relative_to(here).as_posix(), file)
    say(f"{address}: uploaded")
    return TokenStore(address)


def _finished(address: str, config: TokenizeConfig, given: Given | None) -> TokenStore | None:
    """Open the store at an address, if there is one and it is whole."""
    listed = ObjectStore(address).list()
    if others := [key for key in listed if key.split("/")[0] not in CONTENT | OF_SOME]:
        raise StoreError(f"{address} holds other files ({others[0]}); choose a new folder")
    if mirror.TOKENS not in listed:
        return None
    folder, _ = mirror.opened(address, anew=True)
    if manifest := records.if_whole(lambda: read_manifest(folder, REPAIR)):
        with naming(config.out, address):
            check_made_alike(config, given, manifest)
    store = records.if_whole(lambda: TokenStore(address))
    return None if store is None or store.problems(hashes=True) else store


def _upload(remote: ObjectStore, key: str, file: Path) -> None:
    """Upload a file, unless it is there."""
    content = file.read_bytes()
    try:
        remote.create(key, content)
    except FileExistsError:  # of a store that was never finished, or is damaged
        remote.write(key, content)
