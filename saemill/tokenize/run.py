"""`saemill tokenize`: open the source, tokenize, pack, and write a TokenStore."""

import shutil
from contextlib import suppress
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any
from uuid import uuid4

from saemill.common import durable
from saemill.common.addresses import address_of
from saemill.common.errors import ConfigError
from saemill.common.log import counted, progress, say
from saemill.common.models.tokenizer import check_ctx_len, load_tokenizer, token_id, with_tokens
from saemill.common.outlook import Before
from saemill.common.stores.tokens import (
    TokenizerInfo,
    TokenStore,
)
from saemill.tokenize import bucket, memory
from saemill.tokenize.config import TokenizeConfig, template_in
from saemill.tokenize.encoding import Encoder, Encoders, Encoding
from saemill.tokenize.ids import survey
from saemill.tokenize.mixing import Mix, documents_of
from saemill.tokenize.notes import mix_notes, notes_on
from saemill.tokenize.outlook import outlook_of
from saemill.tokenize.place import damaged, empty, finished, publish
from saemill.tokenize.source import Source, check_path, open_source
from saemill.tokenize.writer import Writer

CTX_LEN = 512
"""Tokens per row where neither settings nor data say otherwise."""


def run(config: TokenizeConfig, dataset: Any = None, before: Before | None = None) -> TokenStore:
    """Tokenize a dataset into `config.out`; a finished store with the same settings is returned.

    The store appears whole: it is written beside its place and renamed at the end. Of several processes
    that are to make the same store one does; the others wait for it. A finished store is compared with its
    hashes; one that is damaged is made anew and takes the damaged one's place.

    Args:
        config: the settings.
        dataset: a dataset in memory, in place of the one that the settings name; see `memory.given`.
        before: takes the outlook, when all is checked and nothing is written yet.

    Raises:
        ConfigError: settings that do not fit the data, or an output made with others.
        DataError: no text, or rows that hold neither text nor ids that the tokenizer has.
        DiskError: the disk is full.
    """
    given = None if dataset is None else memory.given(dataset, config)
    if address := address_of(config.out):
        return bucket.make(address, config, given, lambda here: run(here, dataset, before))
    if store := finished(config, given, say):
        say(f"{config.out} is finished already: {store.n_tokens:,} tokens in {store.n_rows:,} rows")
        return store
    for entry in config.inputs:
        check_path(entry.dataset)
    tokenizer, own = load_tokenizer(config.tokenizer, config.tokenizer_revision)
    info = with_tokens(own, tokenizer, config.row_start, config.separator)
    if config.ctx_len is not None:
        check_ctx_len(config.ctx_len, tokenizer, info, config.tokenizer_revision)
    sources = opened(config, given)
    encoder = Encoder(_encoding(config, sources), tokenizer)
    if before is not None:
        ctx_len = _rows(config, info, sources)[0]
        n_rows = None if config.max_tokens is None else config.max_tokens // ctx_len
        before(outlook_of(config, info.vocab_size, ctx_len, n_rows))
    beside = config.out.with_name(config.out.name + ".partial")
    notes: list[str] = []
    with durable.exclusive(beside, wait=True) as alone:
        if not finished(config, given):  # by the process that was here
            # Where folders cannot be locked every process has one of its own, and the first to end wins.
            partial = beside if alone else beside.with_name(f"{beside.name}-{uuid4().hex}")
            shutil.rmtree(damaged(config), ignore_errors=True)  # by a process that was killed
            try:
                with durable.writing(config.out):
                    notes = _write(config, partial, encoder, info, sources)
                publish(config, given, partial)
            except Exception:
                shutil.rmtree(partial, ignore_errors=True)
                raise
        with suppress(OSError):
            beside.rmdir()
    store = TokenStore(config.out)
    say("\n".join([_summary(store), *notes]))
    return store


def opened(config: TokenizeConfig, given: memory.Given | None = None) -> list[Source]:
    """Open the datasets, or the one that is in memory.

    Raises:
        ConfigError: rows of ids and texts are to be mixed, or a setting has no effect on what they hold.
    """
    sources = [
        open_source(
            entry.dataset,
            subset=entry.subset,
            split=str(entry.split),
            text_column=str(entry.text_column),
            streaming=config.streaming,
            revision=entry.revision,
            chat_column=entry.chat_column,
            source_column=config.source_column,
            words_column=entry.words_column,
            word_labels=config.word_labels,
            given=given,
        )
        for entry in config.inputs
    ]
    of_ids = [source.name for source in sources if source.column.holds_ids]
    if of_ids and len(of_ids) < len(sources):
        raise ConfigError(
            f"{of_ids[0]} holds rows of ids, others texts: they do not mix; name datasets of one kind"
        )
    if of_ids and config.special_tokens_in_text is not None:
        raise ConfigError(
            f"special_tokens_in_text has no effect on rows of ids (column {sources[0].column.name!r}); leave "
            "it out"
        )
    return sources


def _encoding(config: TokenizeConfig, sources: list[Source]) -> Encoding:
    """Collect what other processes make their tokenizer from."""
    return Encoding(
        tokenizer=config.tokenizer,
        revision=config.tokenizer_revision,
        rule=config.special_tokens_in_text,
        template=None if config.chat_template is None else template_in(config.chat_template),
        has_chats=any(source.column.holds_chats for source in sources),
        has_words=any(source.column.words is not None for source in sources),
    )


def _write(
    config: TokenizeConfig, partial: Path, encoder: Encoder, info: TokenizerInfo, sources: list[Source]
) -> list[str]:
    """Tokenize and pack the sources into a folder that no other process writes to.

    Returns: sentences on what was done to the rows, and to the documents that are held out.
    """
    tokenizer = encoder.tokenizer
    ctx_len, document, notes = _rows(config, info, sources)
    check_ctx_len(ctx_len, tokenizer, info, config.tokenizer_revision)
    if config.max_tokens is not None and config.max_tokens < ctx_len:
        raise ConfigError(f"max_tokens must be at least one row of {ctx_len}, got {config.max_tokens}")

    def written(chosen: frozenset[int]) -> tuple[Writer, Mix]:
        empty(partial)
        writer = Writer(
            path=partial,
            sources=sources,
            names=[entry.title for entry in config.mix],
            info=info,
            ctx_len=ctx_len,
            max_tokens=config.max_tokens,
            held_out_fraction=config.held_out_fraction,
            document=document,
            document_start=token_id(config.document_start, tokenizer, "document_start"),
            label_columns=config.word_labels,
            chosen=chosen,
        )
        return writer, _fill(config, writer, encoder)

    writer, mix = written(frozenset())
    if chosen := writer.to_hold_out():
        writer, mix = written(chosen)
        notes.append(
            f"The share of {config.held_out_fraction:g} gave no held-out row: of the smallest hashes, "
            f"{counted(len(chosen), 'document')} more held out."
        )
    writer.check()
    notes += [*notes_on(writer, encoder.specials), *mix_notes(config, mix)]
    if encoder.chat is not None:
        tokenizer.chat_template = encoder.chat.template
    tokenizer.save_pretrained(partial / "tokenizer")
    writer.finish(_made_of(config, sources))
    return notes


def _made_of(config: TokenizeConfig, sources: list[Source]) -> dict[str, Any]:
    """Collect what the store's manifest says of its sources."""
    made = [{"name": s.name, "fingerprint": s.fingerprint, "column": s.column.name} for s in sources]
    together = {"name": config.title, "fingerprint": durable.hash_json([s.fingerprint for s in sources])}
    return {
        "source": made[0] if len(made) == 1 else together,
        "mixed": tuple(made) if config.mix else (),
        "settings": config.identity(),
        "versions": {name: version(name) for name in ("saemill", "tokenizers", "datasets")},
    }


def _fill(config: TokenizeConfig, writer: Writer, encoder: Encoder) -> Mix:
    """Pass once over the writer's sources, as far as `max_tokens` needs. Return how they were mixed."""
    n_processes = 1 if writer.sources[0].column.holds_ids else config.num_proc
    encoding = _encoding(config, writer.sources)
    with (
        progress("tokenize", config.max_tokens, "tokens") as advance,
        Encoders(encoding, encoder, n_processes) as encoders,
    ):
        streams = [
            documents_of(number, encoders.encode(source.batches(config.shuffle_seed)))
            for number, source in enumerate(writer.sources)
        ]
        mix = Mix(streams, [entry.share for entry in config.inputs])
        for document in mix:
            before = writer.n_rows
            mix.n_tokens[document.source] += writer.add(document)
            advance((writer.n_rows - before) * writer.ctx_len)
            if writer.is_full:
                break
    return mix


def _rows(config: TokenizeConfig, info: TokenizerInfo, sources: list[Source]) -> tuple[int, str, list[str]]:
    """Choose the rows' length and what a document is, and say why.

    Raises:
        ConfigError: a setting for rows of ids and not for texts, or the other way round.
    """
    column = sources[0].column
    if not column.holds_ids:
        if config.repack:
            raise ConfigError(f"repack has no effect on texts (column {column.name!r}); leave it out")
        return config.ctx_len or CTX_LEN, "text", []
    packed = "A document, for the held-out split and the intervals, is one row of the dataset."
    if config.repack:
        return config.ctx_len or CTX_LEN, "row of ids", [packed]
    lengths = survey(chain.from_iterable(source.rows_of_ids() for source in sources), info)
    ctx_len = config.ctx_len or lengths.common or CTX_LEN
    if lengths.common == ctx_len:
        _check_kept(config)
        note = (
            "The dataset's rows are kept as they are, and a document, for the held-out split and the "
            "intervals, is one row; --repack packs them anew."
        )
        return ctx_len, "kept row", [note]
    why = lengths.why or f"they have {lengths.common} ids, not {ctx_len}"
    return ctx_len, "row of ids", [f"The rows of ids are packed anew: {why}. {packed}"]


def _check_kept(config: TokenizeConfig) -> None:
    """Refuse settings of what is packed, for rows that are kept as they are."""
    for name, default in (("row_start", "own"), ("document_start", None), ("separator", "own")):
        if getattr(config, name) != default:
            raise ConfigError(
                f"{name} has no effect on rows that are kept as they are; leave it out, or say --repack"
            )


def _summary(store: TokenStore) -> str:
    manifest = store.manifest
    empty = f" ({manifest.n_empty_documents:,} more are empty)" if manifest.n_empty_documents else ""
    return (
        f"{store.path}: {store.n_tokens:,} tokens in {counted(store.n_rows, 'row')} of {store.ctx_len} from "
        f"{counted(manifest.n_documents, 'document')}{empty}; "
        f"{counted(manifest.n_held_out_rows, 'row')} held out"
    )
