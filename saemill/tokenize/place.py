"""The place of the store: whether it is made already, and putting a new one there, whole."""

import shutil
from collections.abc import Callable
from pathlib import Path

from saemill.common import config as settings
from saemill.common import durable, records
from saemill.common.errors import ConfigError, DiskError, StoreError
from saemill.common.stores.tokens import FORMAT, REPAIR, TokenManifest, TokenStore, read_manifest
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.files import fingerprint_local
from saemill.tokenize.memory import Given

CONTENT = {
    "zarr.json",
    "tokens",
    "held_out",
    "segments.parquet",
    "documents.parquet",
    "tokenizer",
    "manifest.json",
}
"""Names in every token store's folder."""
OF_SOME = {"roles.parquet", "labels"}
"""Names in those of chats and of labelled words as well."""


def empty(folder: Path) -> None:
    """Remove what a killed process, or an earlier pass, left behind."""
    for left in folder.iterdir() if folder.exists() else ():
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def publish(config: TokenizeConfig, given: Given | None, partial: Path) -> None:
    """Move the written store to its place, also over a damaged store, unless another process did so
    meanwhile."""
    try:
        partial.replace(config.out)
    except OSError:
        if finished(config, given):
            shutil.rmtree(partial)
            return
        if not config.out.is_dir():
            raise
        config.out.replace(damaged(config))
        partial.replace(config.out)
        shutil.rmtree(damaged(config))
    durable.sync_folder(config.out.absolute().parent)


def damaged(config: TokenizeConfig) -> Path:
    """Name the path of a damaged store while the new one takes its place."""
    return config.out.with_name(config.out.name + ".partial-damaged")


def finished(
    config: TokenizeConfig, given: Given | None = None, tell: Callable[[str], None] | None = None
) -> TokenStore | None:
    """Open the store at the output, if there is one made of the same source with the same settings.

    Args:
        config: the settings.
        given: the dataset, if it is in memory.
        tell: called with the sentence on a store that is damaged and will be made anew.

    Raises:
        ConfigError: there is one of other settings, or of a source that has changed since.
        StoreError: there is something else, or a store of another version.
    """
    settings.check_folder(config.out)
    if not config.out.exists() or not any(config.out.iterdir()):
        return None
    _check_version(config.out)
    store, bad = None, [f"manifest.json: {durable.MISSING}"]
    try:
        # First: where it can be read, no other corpus takes the place of this one, however damaged.
        check_made_alike(config, given, read_manifest(config.out, REPAIR))
        store = TokenStore(config.out)
        bad = store.problems(hashes=True)
    except DiskError:  # what cannot be read now may be whole
        raise
    except StoreError as error:
        if (config.out / "manifest.json").is_file():
            bad = str(error).removesuffix(REPAIR).splitlines()
    if bad:
        _check_replaceable(config.out)
    if bad and tell:
        tell("\n".join([f"{config.out} is damaged, and made anew:", *(f"  {line.strip()}" for line in bad)]))
    return None if bad else store


def _check_version(out: Path) -> None:
    """Refuse a store of another version."""
    manifest = records.if_whole(lambda: durable.read_json(out / "manifest.json"))
    made_as = manifest.get("format") if isinstance(manifest, dict) else None
    if isinstance(made_as, str) and made_as.startswith("saemill tokens ") and made_as != FORMAT:
        raise StoreError(
            f"{out} was made by another version of saemill ({made_as!r:.80}, not {FORMAT!r}); choose another "
            "output folder, or remove that one"
        )


def _check_replaceable(out: Path) -> None:
    """Refuse to put a store in place of a folder that holds anything but a damaged store."""
    names = {path.name for path in out.iterdir()}
    others = names - CONTENT - OF_SOME
    if others or len(CONTENT - names) > 1:
        other = ", ".join(sorted(others)[:3])
        raise StoreError(
            f"{out} is not a finished token store, and holds {other or 'parts of one'}; choose another "
            "output folder, or empty that one"
        )


def check_made_alike(config: TokenizeConfig, given: Given | None, manifest: TokenManifest) -> None:
    """Refuse a store of other settings, or of a local source that has changed since. A hub's source is fixed
    by its revision."""
    existing = manifest.settings.model_dump(mode="json")
    identity = dict.fromkeys(existing, None) | config.identity()
    if config.ctx_len == manifest.ctx_len:  # as it may have been found in the rows
        identity.pop("ctx_len")
    settings.check_same(existing, identity, config.out)
    if given is not None and given.fingerprint is None:
        raise ConfigError(
            f"{config.out} is there, and a stream in memory cannot be compared with what it was made of; "
            "open it as TokenStore, or choose another output folder"
        )
    if given is not None and given.fingerprint != manifest.source.fingerprint:
        raise ConfigError(
            f"{config.out} was made of another dataset than this one; choose another output folder, or "
            "remove that one"
        )
    for entry, known in zip(config.inputs, manifest.mixed or (manifest.source,), strict=True):
        source = Path(entry.dataset)
        if source.exists() and fingerprint_local(source) != known.fingerprint:
            raise ConfigError(
                f"{source} has changed since {config.out} was made of it; choose another output folder, or "
                "remove that one"
            )
