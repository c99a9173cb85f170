"""`saemill tokenize`: open the source, tokenize, pack, and write a TokenStore."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

from saemill.common import config as settings
from saemill.common import durable, records
from saemill.common.errors import ConfigError, DiskError, StoreError
from saemill.common.log import counted, progress, say
from saemill.common.models.tokenizer import check_ctx_len, load_tokenizer
from saemill.common.stores.tokens import (
    FORMAT,
    REPAIR,
    TokenizerInfo,
    TokenManifest,
    TokenStore,
    read_manifest,
)
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.encoding import encode
from saemill.tokenize.files import fingerprint_local
from saemill.tokenize.ids import survey
from saemill.tokenize.source import Source, check_path, open_source
from saemill.tokenize.writer import Writer

CTX_LEN = 512
"""Tokens per row where neither settings nor data say otherwise."""
CONTENT = {
    "zarr.json",
    "tokens",
    "held_out",
    "segments.parquet",
    "documents.parquet",
    "tokenizer",
    "manifest.json",
}
"""Names in a token store's folder."""


def run(config: TokenizeConfig) -> TokenStore:
    """Tokenize a dataset into `config.out`; a finished store with the same settings is returned.

    The store appears whole: it is written beside its place and renamed at the end. Of several processes
    that are to make the same store one does; the others wait for it. A finished store is compared with its
    hashes; one that is damaged is made anew and takes the damaged one's place.

    Raises:
        ConfigError: settings that do not fit the data, or an output made with others.
        DataError: no text, or rows that hold neither text nor ids that the tokenizer has.
        DiskError: the disk is full.
    """
    if store := _finished(config, say):
        say(f"{config.out} is finished already: {store.n_tokens:,} tokens in {store.n_rows:,} rows")
        return store
    check_path(config.dataset)
    tokenizer, info = load_tokenizer(config.tokenizer, config.tokenizer_revision)
    if config.ctx_len is not None:
        check_ctx_len(config.ctx_len, tokenizer, info, config.tokenizer_revision)
    source = open_source(
        config.dataset,
        subset=config.subset,
        split=config.split,
        text_column=config.text_column,
        streaming=config.streaming,
        revision=config.revision,
    )
    beside = config.out.with_name(config.out.name + ".partial")
    notes: list[str] = []
    with durable.exclusive(beside, wait=True) as alone:
        if not _finished(config):  # by the process that was here
            # Where folders cannot be locked every process has one of its own, and the first to end wins.
            partial = beside if alone else beside.with_name(f"{beside.name}-{uuid4().hex}")
            shutil.rmtree(_damaged(config), ignore_errors=True)  # by a process that was killed
            try:
                with durable.writing(config.out):
                    notes = _write(config, partial, tokenizer, info, source)
                _publish(config, partial)
            except Exception:
                shutil.rmtree(partial, ignore_errors=True)
                raise
        with suppress(OSError):
            beside.rmdir()
    store = TokenStore(config.out)
    say("\n".join([_summary(store), *notes]))
    return store


def _write(
    config: TokenizeConfig, partial: Path, tokenizer: Any, info: TokenizerInfo, source: Source
) -> list[str]:
    """Tokenize and pack the source into a folder that no other process writes to.

    Returns: sentences on what was done to the rows, and to the documents that are held out.
    """
    ctx_len, document, notes = _rows(config, info, source)
    check_ctx_len(ctx_len, tokenizer, info, config.tokenizer_revision)
    if config.max_tokens is not None and config.max_tokens < ctx_len:
        raise ConfigError(f"max_tokens must be at least one row of {ctx_len}, got {config.max_tokens}")

    def written(chosen: frozenset[int]) -> Writer:
        _empty(partial)
        writer = Writer(
            path=partial,
            source=source,
            info=info,
            ctx_len=ctx_len,
            max_tokens=config.max_tokens,
            held_out_fraction=config.held_out_fraction,
            document=document,
            chosen=chosen,
        )
        _fill(config, writer, tokenizer)
        return writer

    writer = written(frozenset())
    if chosen := writer.to_hold_out():
        writer = written(chosen)
        notes.append(
            f"The share of {config.held_out_fraction:g} gave no held-out row: of the smallest hashes, "
            f"{counted(len(chosen), 'document')} more held out."
        )
    writer.check()
    notes += _notes(writer)
    tokenizer.save_pretrained(partial / "tokenizer")
    writer.finish(_made_of(config, source))
    return notes


def _made_of(config: TokenizeConfig, source: Source) -> dict[str, Any]:
    """Collect what the store's manifest says of its source."""
    return {
        "source": {"name": config.dataset, "fingerprint": source.fingerprint, "column": source.column.name},
        "settings": config.identity(),
        "versions": {name: version(name) for name in ("saemill", "tokenizers", "datasets")},
    }


def _fill(config: TokenizeConfig, writer: Writer, tokenizer: Any) -> None:
    """Pass once over the writer's source, as far as `max_tokens` needs."""
    batches = writer.source.batches(config.shuffle_seed)
    n_processes = 1 if writer.source.column.holds_ids else config.num_proc
    with progress("tokenize", config.max_tokens, "tokens") as advance:
        for batch in encode(batches, tokenizer, config.tokenizer, config.tokenizer_revision, n_processes):
            before = writer.n_rows
            done = writer.add(batch)
            advance((writer.n_rows - before) * writer.ctx_len)
            if done:
                return


def _rows(config: TokenizeConfig, info: TokenizerInfo, source: Source) -> tuple[int, str, list[str]]:
    """Choose the rows' length and what a document is, and say why.

    Raises:
        ConfigError: texts, and the setting to pack rows of ids.
    """
    if not source.column.holds_ids:
        if config.repack:
            raise ConfigError(f"repack has no effect on texts (column {source.column.name!r}); leave it out")
        return config.ctx_len or CTX_LEN, "text", []
    packed = "A document, for the held-out split and the intervals, is one row of the dataset."
    if config.repack:
        return config.ctx_len or CTX_LEN, "row of ids", [packed]
    lengths = survey(source.rows_of_ids(), info)
    ctx_len = config.ctx_len or lengths.common or CTX_LEN
    if lengths.common == ctx_len:
        note = (
            "The dataset's rows are kept as they are, and a document, for the held-out split and the "
            "intervals, is one row; --repack packs them anew."
        )
        return ctx_len, "kept row", [note]
    why = lengths.why or f"they have {lengths.common} ids, not {ctx_len}"
    return ctx_len, "row of ids", [f"The rows of ids are packed anew: {why}. {packed}"]


def _notes(writer: Writer) -> list[str]:
    """List what the user should know of the rows."""
    notes = []
    if writer.n_padding:
        notes.append(
            f"{writer.n_padding:,} ids {writer.info.pad_id} at the ends of rows are padding and left out."
        )
    if writer.document == "kept row" and not writer.all_framed[0]:
        own = ", ".join(map(str, writer.info.prefix_ids))
        notes.append(f"Not all rows begin with {own}, as the tokenizer's own would.")
    if writer.held_out_fraction == 0 or any(writer.held_out):
        return notes
    sides = zip(writer.n_tokens, writer.document_held_out, strict=True)
    if n_held := sum(n for n, out in sides if out):
        longest = n_held + writer.ctx_len - writer.row_capacity
        notes.append(
            f"No row is held out: the documents held out have {n_held:,} tokens. Lower --ctx-len to "
            f"{longest} or less, give more text, or assess on another store (`saemill assess --tokens`)."
        )
    else:
        notes.append(
            "No row is held out: no document can be spared from training. Give more text, or assess on "
            "another store (`saemill assess --tokens`)."
        )
    return notes


def _empty(folder: Path) -> None:
    """Remove what a killed process, or an earlier pass, left behind."""
    for left in folder.iterdir() if folder.exists() else ():
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def _publish(config: TokenizeConfig, partial: Path) -> None:
    """Move the written store to its place, also over a damaged store, unless another process did so
    meanwhile."""
    try:
        partial.replace(config.out)
    except OSError:
        if _finished(config):
            shutil.rmtree(partial)
            return
        if not config.out.is_dir():
            raise
        config.out.replace(_damaged(config))
        partial.replace(config.out)
        shutil.rmtree(_damaged(config))
    durable.sync_folder(config.out.absolute().parent)


def _damaged(config: TokenizeConfig) -> Path:
    """Name the path of a damaged store while the new one takes its place."""
    return config.out.with_name(config.out.name + ".partial-damaged")


def _finished(config: TokenizeConfig, tell: Callable[[str], None] | None = None) -> TokenStore | None:
    """Open the store at the output, if there is one made of the same source with the same settings.

    Args:
        config: the settings.
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
        _check_made_alike(config, read_manifest(config.out, REPAIR))
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
    if names - CONTENT or len(CONTENT - names) > 1:
        other = ", ".join(sorted(names - CONTENT)[:3])
        raise StoreError(
            f"{out} is not a finished token store, and holds {other or 'parts of one'}; choose another "
            "output folder, or empty that one"
        )


def _check_made_alike(config: TokenizeConfig, manifest: TokenManifest) -> None:
    """Refuse a store of other settings, or of a local source that has changed since. A hub's source is fixed
    by its revision."""
    identity = config.identity()
    if config.ctx_len == manifest.ctx_len:  # as it may have been found in the rows
        identity.pop("ctx_len")
    settings.check_same(manifest.settings.model_dump(mode="json"), identity, config.out)
    source = Path(config.dataset)
    if source.exists() and fingerprint_local(source) != manifest.source.fingerprint:
        raise ConfigError(
            f"{source} has changed since {config.out} was made of it; choose another output folder, or "
            "remove that one"
        )


def _summary(store: TokenStore) -> str:
    manifest = store.manifest
    empty = f" ({manifest.n_empty_documents:,} more are empty)" if manifest.n_empty_documents else ""
    return (
        f"{store.path}: {store.n_tokens:,} tokens in {counted(store.n_rows, 'row')} of {store.ctx_len} from "
        f"{counted(manifest.n_documents, 'document')}{empty}; "
        f"{counted(manifest.n_held_out_rows, 'row')} held out"
    )
