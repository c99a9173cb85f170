"""The settings of `saemill tokenize`."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from saemill.common.config import LARGEST
from saemill.common.errors import ConfigError
from saemill.common.setting import about, check, identity, setting

Token = int | Literal["own", "bos", "eos", "sep"] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedDataset:
    """One of several datasets that are mixed."""

    dataset: str = field(metadata=about("Hub id, or file or folder"))
    share: float = field(metadata=about("Share of the tokens, relative to the others'"))
    name: str | None = setting(None, "Name that figures are told by", by_default="the dataset's")
    subset: str | None = setting(None, "The hub dataset's configuration", by_default="as for all of them")
    split: str | None = setting(None, "Split of the dataset", by_default="as for all of them")
    text_column: str | None = setting(None, "Column that holds the text", by_default="as for all of them")
    chat_column: str | None = setting(
        None, "Column that holds conversations", by_default="as for all of them"
    )
    words_column: str | None = setting(
        None, "Column that holds each text's words", by_default="as for all of them"
    )
    revision: str | None = setting(None, "The hub dataset's revision", by_default="as for all of them")

    def __post_init__(self) -> None:
        if not self.share > 0:
            raise ConfigError(f"the share of {self.dataset} must be above 0, got {self.share}")

    @property
    def title(self) -> str:
        """Name that figures are told by."""
        return self.name or (Path(self.dataset).name if Path(self.dataset).exists() else self.dataset)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeConfig:
    """Settings of the stage."""

    dataset: str | None = setting(
        None, "Hub id, or file or folder: parquet, jsonl(.gz), csv, arrow, txt, `save_to_disk`"
    )
    tokenizer: str = field(metadata=about("Hub id or folder of the tokenizer"))
    out: Path = field(metadata=about("Folder to write", decides=False))
    subset: str | None = setting(None, "The hub dataset's configuration")
    split: str = setting("train", "Split of the dataset")
    text_column: str = setting("text", "Column that holds the text")
    chat_column: str | None = setting(
        None, "Column that holds conversations, written out by the chat template", later=True
    )
    chat_template: Path | None = setting(
        None, "File with the chat template", by_default="the tokenizer's", decides=False
    )
    """Its content decides, not its place."""
    words_column: str | None = setting(
        None, "Column that holds each text's words, a list, where columns label these", later=True
    )
    word_labels: tuple[str, ...] = setting(
        (), "Columns that hold a label of each word: part of speech, …", metavar="COLUMN,…", later=True
    )
    mix: tuple[MixedDataset, ...] = setting(
        (), "Several datasets in place of one, each with its share of the tokens", later=True
    )
    source_column: str | None = setting(
        None, "Column that names each document's source, for figures per source", later=True
    )
    special_tokens_in_text: Literal["text", "special", "refuse"] | None = setting(
        None,
        "Special tokens written out in a text: read as text, as the token, or refused",
        by_default="text, or special where the tokenizer cannot",
        later=True,
    )
    row_start: Token = setting(
        "own",
        "Token at the start of each row, or an id, or none",
        by_default="the tokenizer's own",
        later=True,
    )
    document_start: Token = setting(
        None, "Token at the start of each document, or an id", by_default="none", later=True
    )
    separator: Token = setting(
        "own",
        "Token after each document, or an id, or none",
        by_default="the tokenizer's EOS, or SEP",
        later=True,
    )
    ctx_len: int | None = setting(
        None,
        "Tokens per row",
        by_default="512, or the length of the rows of ids, where all have one",
        least=1,
    )
    max_tokens: int | None = setting(None, "Stop after so many tokens, rounded down to whole rows")
    streaming: bool = setting(False, "Read no more than max-tokens needs")
    shuffle_seed: int | None = setting(
        42, "Seed of the documents' order; none keeps the source's", least=0, most=LARGEST
    )
    held_out_fraction: float = setting(0.05, "Share of documents never trained on", within="[0, 1)")
    """Chosen by a hash of their text; where it gives no row, a few more."""
    repack: bool = setting(False, "Pack rows of ids anew, even where all have ctx-len")
    num_proc: int = setting(1, "Processes that tokenize", decides=False, least=1)
    revision: str | None = setting(None, "The hub dataset's revision", metavar="REV")
    tokenizer_revision: str | None = setting(None, "The hub tokenizer's revision", metavar="REV")

    def __post_init__(self) -> None:
        check(self)
        least = self.ctx_len or 1
        if self.max_tokens is not None and self.max_tokens < least:
            raise ConfigError(f"max_tokens must be at least one row of {least}, got {self.max_tokens}")
        self._check_inputs()

    def _check_inputs(self) -> None:
        """Refuse no dataset, one beside a mix, and settings without effect on what is read."""
        if (self.dataset is None) == (not self.mix):
            got = "neither" if self.dataset is None else "both"
            raise ConfigError(f"tokenize.dataset must be given, or tokenize.mix in its place; got {got}")
        names = [entry.title for entry in self.mix]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"mix: two datasets are called {twice!r}; give each a `name` of its own")
        if len(self.mix) == 1:
            raise ConfigError("mix: a share has no effect on one dataset; leave it out, or name more")
        if self.source_column is not None and self.mix:
            raise ConfigError(
                "source_column has no effect on a mix, whose datasets are the sources; leave it out"
            )
        chats = [entry.chat_column for entry in self.inputs]
        if self.chat_template is not None and not any(chats):
            raise ConfigError(
                "chat_template has no effect without conversations; name them with --chat-column"
            )
        self._check_words()
        for entry in self.inputs:
            if entry.chat_column is not None and entry.text_column not in (None, "text"):
                raise ConfigError(
                    f"text_column {entry.text_column!r} and chat_column {entry.chat_column!r} of "
                    f"{entry.dataset}: a document is one of them; leave the other out"
                )

    def _check_words(self) -> None:
        """Refuse words without labels, labels without words, and words of conversations."""
        having = [entry for entry in self.inputs if entry.words_column is not None]
        if bool(having) != bool(self.word_labels):
            given, other, what = "words_column", "word_labels", "a label of each word: --word-labels upos"
            if self.word_labels:
                given, other, what = other, given, "each text's words: --words-column tokens"
            raise ConfigError(
                f"{given} has no effect without {other}, the columns that hold {what}; name them"
            )
        if twice := {name for name in self.word_labels if self.word_labels.count(name) > 1}:
            raise ConfigError(f"word_labels names {min(twice)!r} twice; leave one out")
        for entry in having:
            if entry.chat_column is not None:
                raise ConfigError(
                    f"chat_column {entry.chat_column!r} and words_column {entry.words_column!r} of "
                    f"{entry.dataset}: words of conversations are not read; leave one out"
                )

    @property
    def inputs(self) -> tuple[MixedDataset, ...]:
        """The datasets, each with all that it is read by."""
        shared = {
            item.name: getattr(self, item.name) for item in fields(MixedDataset) if item.name in OF_EACH
        }
        if self.dataset is not None:
            return (MixedDataset(dataset=self.dataset, share=1.0, **shared),)
        return tuple(
            replace(entry, **{name: value for name, value in shared.items() if getattr(entry, name) is None})
            for entry in self.mix
        )

    @property
    def title(self) -> str:
        """Name of what is read."""
        return self.dataset if self.dataset is not None else " + ".join(entry.title for entry in self.mix)

    def identity(self) -> dict[str, Any]:
        """Collect the settings that decide the store's content."""
        decisive = identity(self)
        if self.chat_template is not None:
            decisive["chat_template"] = template_in(self.chat_template)
        return decisive


OF_EACH = ("subset", "split", "text_column", "chat_column", "words_column", "revision")
"""Settings that each of several datasets may have of its own."""


def template_in(file: Path) -> str:
    """Read a chat template.

    Raises:
        ConfigError: there is no such file, or it holds no text.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template: {file} cannot be read: {error}; name a text file") from error
    if not text.strip():
        raise ConfigError(f"chat_template: {file} is empty; name a file with a Jinja template")
    return text
