"""The copy of its tokens that an activation store carries: whether it is there, and making it."""

from pathlib import Path

from saemill.cache.claims.worker import Claim
from saemill.common import records
from saemill.common.errors import StoreError
from saemill.common.stores.token_writer import copy_rows
from saemill.common.stores.tokens import TokenManifest, TokenStore


def _manifest(path: Path) -> TokenManifest | None:
    """Read a token store's manifest; None unless it is there and whole."""
    return records.if_whole(lambda: records.read(path / "manifest.json", TokenManifest, ""))


def is_copy(path: Path, tokens: TokenStore) -> bool:
    """Tell whether a folder holds a copy of these tokens, which names what it was copied from. A token store
    of the user's own does not name it."""
    manifest = _manifest(path)
    return manifest is not None and manifest.parent_fingerprint == tokens.fingerprint


def is_whole(path: Path, tokens: TokenStore, n_rows: int, hashes: bool) -> bool:
    """Tell whether a folder holds a copy of the first rows of these tokens, all files undamaged.

    Args:
        path: the copy's folder.
        tokens: what it is to be a copy of.
        n_rows: how many rows.
        hashes: whether files are compared with their hashes too, not only their sizes.
    """
    copy = records.if_whole(lambda: TokenStore(path))
    if copy is None:
        return False
    is_same = (copy.manifest.parent_fingerprint, copy.n_rows) == (tokens.fingerprint, n_rows)
    return is_same and not copy.problems(hashes)


def make(path: Path, tokens: TokenStore, n_rows: int, claim: Claim) -> None:
    """Copy the first rows of the tokens, in place of what is there: a damaged copy, or another store's.

    Args:
        path: the copy's folder.
        tokens: what is copied.
        n_rows: how many rows.
        claim: on the store.

    Raises:
        Lost: another worker took the store over.
        StoreError: the tokens are damaged, or a token store that is no copy is in the copy's place.
    """
    existing = _manifest(path)
    if existing and existing.parent_fingerprint is None:
        raise StoreError(
            f"{path} is a token store of its own, where a copy of the tokens belongs; move it to another "
            "folder and run the same command again"
        )
    partial = claim.worker.partial()
    copy_rows(tokens, n_rows, partial)
    claim.check()
    claim.worker.place.replace_text(partial, path)
