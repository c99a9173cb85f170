"""Labels of words: found in the text, given to tokens, kept in the store."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from chats import CHATML, chat_file, conversations, template_file
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import tokenize, word_tokenizer
from texts import WORDS, bert_tokenizer

from saemill.common import durable
from saemill.common.errors import ConfigError, DataError, StoreError
from saemill.common.models.tokenizer import load_tokenizer
from saemill.common.stores.token_writer import copy_rows
from saemill.common.stores.tokens import TokenStore
from saemill.show import describe
from saemill.tokenize import row_files
from saemill.tokenize.columns import Column, LabelColumn
from saemill.tokenize.config import MixedDataset, TokenizeConfig
from saemill.tokenize.encoding import Encoder, Encoding
from saemill.tokenize.run import run
from saemill.tokenize.source import Batch
from saemill.tokenize.words import words_of

COLUMNS = Column("text", False, False, words="tokens", labels=(LabelColumn("upos", None),))
TAGS = {word: ("NOUN", "VERB", "DET")[len(word) % 3] for word in WORDS}
LABELLED = {"words_column": "tokens", "word_labels": ("upos",)}
words = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="—"), min_size=1, max_size=8)
spaces = st.sampled_from(["", " ", "\n", "\u00a0 \t", "—", " ——\n"])


def encoder_of(folder: str) -> Encoder:
    encoding = Encoding(folder, None, None, None, has_chats=False, has_words=True)
    return Encoder(encoding, load_tokenizer(folder, None)[0])


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> list[Encoder]:
    """Of bytes, which cuts characters in pieces, and of small letters."""
    return [encoder_of(tokenizer_folder), encoder_of(bert_tokenizer(tmp_path_factory.mktemp("bert")))]


@settings(max_examples=60)
@given(st.lists(st.tuples(spaces, words, st.sampled_from(["A", "B", "_", None])), max_size=8), spaces)
def test_a_token_has_the_label_of_its_first_character(
    encoders: list[Encoder], parts: list[tuple[str, str, str | None]], end: str
) -> None:
    """Oracle: the label of each character of the text, as it was put together, and of each token the first of
    its characters that is no white space."""
    text, owners = "", list[str | None]()
    for space, word, label in parts:
        text += space + word
        owners += [*[None] * len(space), *[None if label == "_" else label] * len(word)]
    text += end
    owners += [None] * len(end)
    row = {"text": text, "tokens": [word for _, word, _ in parts], "upos": [label for _, _, label in parts]}
    read = words_of(row, COLUMNS, "row 0")
    for encoder in encoders:
        batch = encoder(Batch("rows", [0], texts=[text], words=[read]))
        assert batch.token_words is not None
        found = [None if word < 0 else read.labels[0][word] for word in batch.token_words[0]]
        encoded = encoder.tokenizer(text, add_special_tokens=False)
        wanted = []
        for number in range(len(encoded["input_ids"])):
            span = encoded.token_to_chars(number)
            places = range(*span) if span else ()
            wanted.append(next((owners[place] for place in places if not text[place].isspace()), None))
        assert found == wanted


def rows_of_words(n: int = 60) -> dict[str, list[Any]]:
    """Texts of a few words, with their words and tags."""
    generator = np.random.default_rng(0)
    tokens = [generator.choice(WORDS, generator.integers(3, 30)).tolist() for _ in range(n)]
    return {
        "text": [" ".join(row) for row in tokens],
        "tokens": tokens,
        "upos": [[TAGS[word] for word in row] for row in tokens],
    }


def parquet(path: Path, columns: dict[str, Any], features: Any = None) -> Path:
    path.parent.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))
    return path


def names_of(store: TokenStore, column: str = "upos") -> list[list[str | None]]:
    """The name of each token's label."""
    (labels,) = (each for each in store.manifest.labels if each.column == column)
    names = (None, *labels.names)
    return [[names[number] for number in row] for row in store.labels[column].read(0, store.n_rows)]


@pytest.fixture(scope="module")
def word_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer whose tokens are the words."""
    ids = {word: number for number, word in enumerate(["<eos>", "<unk>", *WORDS])}
    return word_tokenizer(tmp_path_factory.mktemp("words"), ids)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, word_folder: str) -> TokenStore:
    folder = tmp_path_factory.mktemp("labelled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_files, "SHARD_TOKENS", 160)
        file = parquet(folder / "a.parquet", rows_of_words())
        return tokenize(file, folder / "out", word_folder, ctx_len=16, held_out_fraction=0.3, **LABELLED)


def test_the_store_keeps_them_through_packing(labelled: TokenStore, tmp_path: Path) -> None:
    """Oracle: each token is a word, whose tag is known; separators have none. zarr-python reads the same, and
    so does the copy that an activation store carries."""
    by_id = dict(enumerate([None, None, *(TAGS[word] for word in WORDS)]))
    wanted = [[by_id[number] for number in row] for row in labelled.rows(0, labelled.n_rows).tolist()]
    assert names_of(labelled) == wanted
    assert labelled.ids.n_shards > 2
    theirs = zarr.open_group(labelled.path, mode="r")["labels/upos"]
    np.testing.assert_array_equal(theirs[:], labelled.labels["upos"].read(0, labelled.n_rows))
    copy = copy_rows(labelled, 13, tmp_path / "copy")
    assert names_of(copy) == wanted[:13]
    assert copy.problems(hashes=True) == []
    assert "words are labelled by upos: " in describe(labelled.path)


def test_numbers_of_classes_and_words_without_text_are_the_same(
    labelled: TokenStore, tmp_path: Path, word_folder: str
) -> None:
    """Oracle: the store of texts and names. CoNLL's data sets have neither."""
    columns, names = rows_of_words(), ["VERB", "_", "DET", "NOUN"]
    columns["pos_tags"] = [[names.index(tag) for tag in row] for row in columns.pop("upos")]
    del columns["text"]
    features = {
        "tokens": datasets.List(datasets.Value("string")),
        "pos_tags": datasets.List(datasets.ClassLabel(names=names)),
    }
    file = parquet(tmp_path / "a.parquet", columns, datasets.Features(features))
    settings = {"words_column": "tokens", "word_labels": ("pos_tags",), "ctx_len": 16}
    store = tokenize(file, tmp_path / "out", word_folder, held_out_fraction=0.3, **settings)
    np.testing.assert_array_equal(store.rows(0, store.n_rows), labelled.rows(0, labelled.n_rows))
    assert names_of(store, "pos_tags") == names_of(labelled)
    assert store.manifest.source.column == "tokens"


def test_a_mix_of_all_kinds(tmp_path: Path, tokenizer_folder: str) -> None:
    """Oracle: the words of each label, and the source of all tokens that have a label or a role."""
    columns = rows_of_words(20)
    columns["upos"] = [["_" if tag == "DET" else tag for tag in row] for row in columns["upos"]]
    mix = (
        MixedDataset(dataset=str(parquet(tmp_path / "a.parquet", columns)), share=1, words_column="tokens"),
        MixedDataset(
            dataset=str(chat_file(tmp_path / "b.jsonl", conversations(20))), share=1, chat_column="messages"
        ),
        MixedDataset(dataset=str(parquet(tmp_path / "c.parquet", {"text": ["hills " * 400]})), share=1),
    )
    template = template_file(tmp_path, CHATML)
    store = run(
        TokenizeConfig(
            mix=mix, word_labels=("upos",), chat_template=template, tokenizer=tokenizer_folder,
            out=tmp_path / "out", ctx_len=32, held_out_fraction=0.0,
        )
    )  # fmt: skip
    names, roles = np.array(names_of(store), object), store.roles_of(0, store.n_rows)
    ids, source_RS = store.rows(0, store.n_rows), store.documents["source"].to_numpy()
    source_RS = source_RS[store.document_of(np.arange(store.n_tokens))].reshape(ids.shape)
    tokenizer = load_tokenizer(tokenizer_folder, None)[0]
    for tag in ("NOUN", "VERB"):
        found = tokenizer.decode(ids[names == tag]).split()
        assert {TAGS[word] for word in found if word in TAGS} == {tag}
        assert len(found) > 20
    assert set(np.unique(source_RS[names != None])) == {0}  # noqa: E711
    assert set(np.unique(source_RS[roles > 0])) == {1}
    assert 2 in source_RS


ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another text": (
        {"text": ["the dogs ran"], "tokens": [["the", "ran"]]},
        {},
        r"row 0 .*goes on with 'dogs ran' where word 1 of its column tokens is 'ran'.*--text-column tokens",
    ),
    "a word within another": (
        {"text": ["cat a"], "tokens": [["a"]]},
        {},
        "goes on with 'cat a' where word 0",
    ),
    "words that end before their text": (
        {"text": ["the dogs ran on"], "tokens": [["the", "dogs", "ran"]]},
        {},
        "goes on with 'on' behind the last word of its column tokens",
    ),
    "too few labels": ({"tokens": [["a", "b"]], "upos": [["X"]]}, {}, "row 0 .* has 2 words, .*1 labels"),
    "a null word": ({"tokens": [["a", None]], "upos": [["X", "Y"]]}, {}, "row 0 .*list of words"),
    "no such class": (
        {"tokens": [["a"]], "upos": [[3]]},
        {"upos": datasets.List(datasets.ClassLabel(names=["X"]))},
        "upos has 3|no label in its column upos, but 3",
    ),
    "no label at all": ({"tokens": [["a"]], "upos": [["_"]]}, {}, "'upos' labels no word of 1 document"),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_that_do_not_fit_are_named(tmp_path: Path, word_folder: str, case: str) -> None:
    """Oracle: the message, with the row."""
    columns, features, message = ROWS[case]
    columns = {"upos": [["X"] * len(row) for row in columns["tokens"]]} | columns
    lists = datasets.List(datasets.Value("string"))
    features = {"tokens": lists, "upos": lists} | features
    if "text" in columns:
        features["text"] = datasets.Value("string")
    schema = datasets.Features(features).arrow_schema
    pq.write_table(pa.table(columns, schema=schema), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        tokenize(tmp_path / "a.parquet", tmp_path / "out", word_folder, ctx_len=1, **LABELLED)
    if case == "another text":
        whole = {"text_column": "tokens", "ctx_len": 1, "held_out_fraction": 0.0}
        store = tokenize(tmp_path / "a.parquet", tmp_path / "out", word_folder, **LABELLED, **whole)
        assert store.n_tokens == 3


def test_columns_that_do_not_fit_are_refused(tmp_path: Path, word_folder: str) -> None:
    """Oracle: the messages."""
    columns = rows_of_words(2)
    file = parquet(tmp_path / "a.parquet", columns | {"a/b": columns["upos"]})
    for values, message in (
        ({"words_column": "tokens"}, "words_column has no effect without word_labels"),
        ({"word_labels": ("upos",)}, "word_labels has no effect without words_column"),
        (LABELLED | {"words_column": "token"}, "no column 'token'; did you mean tokens"),
        (LABELLED | {"words_column": "text"}, "'text' .* holds texts, not lists of words; .*--words-column"),
        (LABELLED | {"word_labels": ("text",)}, "holds texts, not lists of labels; .*--word-labels"),
        (LABELLED | {"word_labels": ("upos", "upos")}, "names 'upos' twice"),
        (LABELLED | {"word_labels": ("a/b",)}, "'a/b' .* cannot be the name of an array; rename"),
        (LABELLED | {"text_column": "upos"}, "no column of texts 'upos'; .*--text-column tokens"),
        (LABELLED | {"chat_column": "text"}, "words of conversations are not read"),
    ):
        with pytest.raises(ConfigError, match=message):
            tokenize(file, tmp_path / "out", word_folder, **values)
    slow = load_tokenizer(word_folder, None)[0]
    slow.__class__ = type("Slow", (type(slow),), {"is_fast": False})
    with pytest.raises(ConfigError, match=r"which labels of words need; name one with a tokenizer\.json"):
        Encoder(Encoding(word_folder, None, None, None, has_chats=False, has_words=True), slow)


def test_damage_is_found(labelled: TokenStore, tmp_path: Path) -> None:
    """Oracle: the damage done: a changed number, one beyond the names, a file not listed, a wrong name."""
    store = copy_rows(labelled, 8, tmp_path / "copy")
    shard, listed = store.path / "labels/upos/c/0/0", store.path / "manifest.json"
    whole, manifest = shard.read_bytes(), json.loads(listed.read_text())
    shard.write_bytes(b"\1\0" + whole[2:] if whole[:2] != b"\1\0" else b"\2\0" + whole[2:])
    with pytest.raises(StoreError, match="labels/upos/c/0/0"):
        TokenStore(store.path).labels["upos"].read(0, 1)
    shard.write_bytes(b"\7\0" + whole[2:])

    def written(**changes: Any) -> None:
        content = {name: value for name, value in (manifest | changes).items() if name != "checksum"}
        durable.write_json(listed, content | {"checksum": durable.hash_json(content)})

    files = [
        file | ({"xxh3": durable.hash_file(shard)} if file["path"] == "labels/upos/c/0/0" else {})
        for file in manifest["files"]
    ]
    written(files=files)
    with pytest.raises(StoreError, match="it holds 7, expected below 4"):
        TokenStore(store.path).check_content()
    shard.write_bytes(whole)
    written(files=[file for file in manifest["files"] if file["path"] != "labels/upos/zarr.json"])
    with pytest.raises(StoreError, match=r"labels/upos/zarr\.json is not listed"):
        TokenStore(store.path)
    written(labels=[{"column": "../upos", "names": ["X"]}])
    with pytest.raises(StoreError, match=r"labels\.0\.column: must be a path below"):
        TokenStore(store.path)
