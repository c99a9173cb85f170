"""`saemill tokenize` against naive packing, on every kind of input, interrupted and damaged."""

import errno
import fcntl
import gzip
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
import transformers
import xxhash
import yaml
from conftest import WORDS, random_texts
from typer.testing import CliRunner
from waiting import wait_until

import saemill.tokenize.run as stage
from saemill.cli import app
from saemill.common import durable, records
from saemill.common.errors import ConfigError, DataError, SaemillError, StoreError
from saemill.common.stores.permutation import combine, permutation
from saemill.common.stores.shards import ShardedArray
from saemill.common.stores.token_writer import copy_rows, write_token_store
from saemill.common.stores.tokens import TokenStore
from saemill.tokenize import source, writer
from saemill.tokenize.run import TokenizeConfig, run

TEXTS = [*random_texts(60, seed=3, words=40), 'Zeile „eins“, "zwei"\nthird\tline', "naïve, 𝛼 ≤ β; it's"]
Rows = list[tuple[list[int], list[int]]]


@pytest.fixture(scope="module", autouse=True)
def _clean_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What `datasets` caches goes to a temporary folder, and nothing asks the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hf")))
        yield


@pytest.fixture(scope="module")
def gpt(tokenizer_folder: str) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A WordPiece tokenizer with [CLS] and [SEP], made from a vocabulary file."""
    folder = tmp_path_factory.mktemp("bert")
    digits = [str(digit) for digit in range(10)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *WORDS, *digits, *("##" + d for d in digits)]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "tokenizer")
    return str(folder / "tokenizer")


@pytest.fixture(scope="module")
def plain_store(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> TokenStore:
    """TEXTS in their order, rows of 16, a fifth held out, in shards of 10 rows."""
    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SHARD_TOKENS", 160)
        file = jsonl(folder / "texts.jsonl", TEXTS)
        return tokenize(file, folder / "out", tokenizer_folder, ctx_len=16, held_out_fraction=0.2)


def jsonl(path: Path, texts: list[str], **columns: list[Any]) -> Path:
    """Documents as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {"text": text} | {name: column[i] for name, column in columns.items()} for i, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def tokenize(dataset: Path, out: Path, tokenizer: str, **values: Any) -> TokenStore:
    """One run; in the source's order and rows of 32 unless told otherwise."""
    values = {"ctx_len": 32, "shuffle_seed": None} | values
    return run(TokenizeConfig(dataset=str(dataset), tokenizer=tokenizer, out=out, **values))


def is_held_out(text: str, fraction: float) -> bool:
    """The rule that the format promises: a hash of the text, as a share of 2^64."""
    return combine(xxhash.xxh3_64_intdigest(text.encode())) < fraction * 2**64


def naive_rows(tokenizer: Any, texts: list[str], ctx_len: int, frame: tuple[list[int], list[int]]) -> Rows:
    """All texts joined by the separator and chopped: each row's ids and its tokens' text numbers."""
    separator = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    ids: list[int] = []
    owners: list[int] = []
    for number, text in enumerate(texts):
        piece = [*tokenizer(text, add_special_tokens=False)["input_ids"], separator]
        ids += piece
        owners += [number] * len(piece)
    prefix, suffix = frame
    body = ctx_len - len(prefix) - len(suffix)
    rows = []
    for start in range(0, len(ids) - body + 1, body):
        owner = owners[start : start + body]
        row = [*prefix, *ids[start : start + body], *suffix]
        rows.append((row, [owner[0]] * len(prefix) + owner + [owner[-1]] * len(suffix)))
    return rows


def texts_of_tokens(store: TokenStore, texts: list[str]) -> list[list[str]]:
    """The text that each address belongs to, by way of its document's source_index. [n_rows][ctx_len]."""
    addresses = np.arange(store.n_tokens).reshape(store.n_rows, store.ctx_len)
    index = store.documents["source_index"].to_numpy()[store.document_of(addresses)]
    return [[texts[i] for i in row] for row in index]


def check_rows(
    store: TokenStore,
    tokenizer: Any,
    texts: list[str],
    order: list[int],
    fraction: float = 0.0,
    frame: tuple[list[int], list[int]] = ([], []),
) -> None:
    """Each side's rows, and the document of each token, are those of naive packing."""
    ids, owners = store.rows(0, store.n_rows).tolist(), texts_of_tokens(store, texts)
    for side in (False, True):
        mine = [texts[i] for i in order if texts[i].strip() and is_held_out(texts[i], fraction) is side]
        expected = naive_rows(tokenizer, mine, store.ctx_len, frame)
        numbers = np.flatnonzero(store.held_out_R == side)
        assert [ids[row] for row in numbers] == [row for row, _ in expected]
        assert [owners[row] for row in numbers] == [[mine[i] for i in owner] for _, owner in expected]


def check_documents(store: TokenStore, texts: list[str], n_source: int | None = None) -> None:
    """The documents' columns follow from the rows and the texts, counted token by token."""
    table = store.documents.to_pydict()
    addresses: dict[int, list[int]] = {}
    for address, number in enumerate(store.document_of(np.arange(store.n_tokens)).tolist()):
        addresses.setdefault(number, []).append(address)
    n_documents = len(table["source_index"])
    assert table["n_tokens"] == [len(addresses.get(i, [])) for i in range(n_documents)]
    assert table["start"] == [addresses[i][0] if i in addresses else -1 for i in range(n_documents)]
    assert max(addresses) == n_documents - 1, "documents after the last with a token are left out"
    assert store.manifest.n_documents == len(addresses)
    mine = [texts[i] for i in table["source_index"]]
    assert table["text_hash"] == [xxhash.xxh3_64_intdigest(text.encode()) for text in mine]
    assert len(set(table["source_index"])) == n_documents
    for number, places in addresses.items():
        rows = np.array(places) // store.ctx_len
        assert np.all(store.held_out_R[rows] == table["held_out"][number])
    assert store.manifest.n_held_out_rows == store.held_out_R.sum()


@pytest.mark.parametrize(
    ("ctx_len", "seed", "fraction"),
    [(32, None, 0.0), (32, 42, 0.3), (1, None, 0.3), (7, 5, 0.9), (250, None, 0.3)],
)
def test_packing(
    tmp_path: Path, gpt: Any, tokenizer_folder: str, ctx_len: int, seed: int | None, fraction: float
) -> None:
    """Oracle: naive packing of each side, in the order of the keyed permutation; blank texts skipped."""
    texts = ["", *TEXTS[:30], "  \n ", *TEXTS[30:], TEXTS[0]]
    order = list(range(len(texts))) if seed is None else permutation(len(texts), seed).tolist()
    store = tokenize(
        jsonl(tmp_path / "texts.jsonl", texts), tmp_path / "out", tokenizer_folder,
        ctx_len=ctx_len, shuffle_seed=seed, held_out_fraction=fraction,
    )  # fmt: skip
    check_rows(store, gpt, texts, order, fraction)
    check_documents(store, texts)
    assert store.manifest.n_empty_documents == 2
    assert store.n_tokens == store.n_rows * ctx_len
    assert 0 < store.held_out_R.sum() < store.n_rows or fraction == 0


def test_documents_are_whole_where_they_fit(plain_store: TokenStore, gpt: Any) -> None:
    """Oracle: tokenizing the text at source_index gives the document's tokens, up to the last rows."""
    ids = plain_store.rows(0, plain_store.n_rows).reshape(-1)
    owners = plain_store.document_of(np.arange(plain_store.n_tokens))
    table = plain_store.documents.to_pydict()
    n_whole = 0
    for number, source_index in enumerate(table["source_index"]):
        expected = [*gpt(TEXTS[source_index], add_special_tokens=False)["input_ids"], 0]
        found = ids[owners == number].tolist()
        assert found == expected[: len(found)]
        n_whole += found == expected
    assert n_whole >= len(table["source_index"]) - 2, "only the last document of each side may be cut"


def test_shards(plain_store: TokenStore, tmp_path: Path, tokenizer_folder: str) -> None:
    """Oracle: the same texts in one shard; the last of the small shards is partial."""
    whole = tokenize(
        jsonl(tmp_path / "texts.jsonl", TEXTS),
        tmp_path / "out",
        tokenizer_folder,
        ctx_len=16,
        held_out_fraction=0.2,
    )
    small, large = (ShardedArray(store.path / "tokens") for store in (plain_store, whole))
    assert (large.n_shards, small.shard_rows) == (1, 10)
    assert small.n_shards > 3
    assert small.n_rows % 10 > 0
    assert np.array_equal(plain_store.rows(0, plain_store.n_rows), whole.rows(0, whole.n_rows))
    assert whole.documents.equals(plain_store.documents)


def with_columns(texts: list[str]) -> pa.Table:
    return pa.table({"number": list(range(len(texts))), "text": texts})


def saved(folder: Path, texts: list[str]) -> Path:
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def saved_dict(folder: Path, texts: list[str]) -> Path:
    parts = {"train": ["other"], "test": texts}
    made = datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"text": part}) for name, part in parts.items()}
    )
    made.save_to_disk(str(folder / "saved"))
    return folder / "saved"


def parquet(folder: Path, texts: list[str]) -> Path:
    pq.write_table(with_columns(texts), folder / "a.parquet", row_group_size=7)
    return folder / "a.parquet"


def arrow(folder: Path, texts: list[str]) -> Path:
    table = with_columns(texts)
    with pa.OSFile(str(folder / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    return folder / "a.arrow"


def csv(folder: Path, texts: list[str], delimiter: str = ",") -> Path:
    path = folder / ("a.csv" if delimiter == "," else "a.tsv")
    options = pa.csv.WriteOptions(delimiter=delimiter, quoting_style="all_valid")
    pa.csv.write_csv(with_columns(texts), path, options)
    return path


def gzipped(path: Path, texts: list[str]) -> Path:
    plain = jsonl(path.with_suffix(""), texts)
    path.write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    return path


def txt(path: Path, texts: list[str]) -> Path:
    path.write_text("\n\n".join(texts))
    return path


def in_folder(write: Callable[[Path, list[str]], Path], suffix: str) -> Callable[[Path, list[str]], Path]:
    """Three files of one kind in a folder, beside a file of no known kind."""

    def written(folder: Path, texts: list[str]) -> Path:
        (folder / "many").mkdir()
        for i, part in enumerate((texts[:10], texts[10:15], texts[15:])):
            write(folder / "many" / f"part{i}{suffix}", part)
        (folder / "many" / "LICENSE").write_text("not data")
        return folder / "many"

    return written


def json_list(folder: Path, texts: list[str]) -> Path:
    (folder / "a.json").write_text(json.dumps([{"text": text} for text in texts]))
    return folder / "a.json"


INPUTS: dict[str, Callable[[Path, list[str]], Path]] = {
    "parquet": parquet,
    "jsonl": lambda folder, texts: jsonl(folder / "a.jsonl", texts),
    "json": json_list,
    "jsonl.gz": lambda folder, texts: gzipped(folder / "a.jsonl.gz", texts),
    "csv": csv,
    "tsv": lambda folder, texts: csv(folder, texts, "\t"),
    "arrow": arrow,
    "txt": lambda folder, texts: txt(folder / "a.txt", texts),
    "folder of jsonl": in_folder(jsonl, ".jsonl"),
    "folder of jsonl.gz": in_folder(gzipped, ".jsonl.gz"),
    "folder of txt": in_folder(txt, ".txt"),
    "save_to_disk": saved,
    "save_to_disk dict": saved_dict,
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", INPUTS)
def test_every_input(tmp_path: Path, gpt: Any, tokenizer_folder: str, kind: str, streaming: bool) -> None:
    """Oracle: naive packing of the same texts, whatever file they come from, shuffled alike."""
    path = INPUTS[kind](tmp_path, TEXTS)
    split = "test" if kind == "save_to_disk dict" else "train"
    store = tokenize(
        path, tmp_path / "out", tokenizer_folder,
        split=split, streaming=streaming, held_out_fraction=0.3, shuffle_seed=9,
    )  # fmt: skip
    check_rows(store, gpt, TEXTS, permutation(len(TEXTS), 9).tolist(), 0.3)
    check_documents(store, TEXTS)


def test_other_text_column(tmp_path: Path, gpt: Any, tokenizer_folder: str) -> None:
    """Oracle: naive packing of the column that was asked for; nulls are empty documents, and counted."""
    notes = ["some words", None] * (len(TEXTS) // 2)
    table = pa.table({"text": ["no"] * len(TEXTS), "body": TEXTS, "note": notes})
    pq.write_table(table, tmp_path / "a.parquet")
    store = tokenize(
        tmp_path / "a.parquet", tmp_path / "out", tokenizer_folder, text_column="body", held_out_fraction=0
    )
    check_rows(store, gpt, TEXTS, list(range(len(TEXTS))))
    noted = tokenize(
        tmp_path / "a.parquet", tmp_path / "notes", tokenizer_folder, text_column="note", held_out_fraction=0
    )
    check_rows(noted, gpt, ["some words", ""] * (len(TEXTS) // 2), list(range(len(TEXTS))))
    assert noted.manifest.n_empty_documents == len(TEXTS) // 2


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_tokenized_input(
    tmp_path: Path, tokenizer_folder: str, bert_folder: str, kind: str, masked: bool, streaming: bool
) -> None:
    """Oracle: the store made from the texts themselves; frames, separators and padding are taken off,
    and a document that was nothing else is skipped."""
    folder = {"gpt": tokenizer_folder, "bert": bert_folder}[kind]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [*random_texts(20, seed=1), "", *random_texts(9, seed=2)]
    columns: dict[str, list[Any]] = {"input_ids": tokenizer(texts)["input_ids"]}
    if kind == "gpt":
        columns = {"input_ids": [[*ids, 0, 0] for ids in columns["input_ids"]]}
    if masked:
        widest = max(map(len, columns["input_ids"])) + 3
        padding = [widest - len(ids) for ids in columns["input_ids"]]
        columns["attention_mask"] = [[1] * (widest - n) + [0] * n for n in padding]
        columns["input_ids"] = [
            [*ids, *[0] * n] for ids, n in zip(columns["input_ids"], padding, strict=True)
        ]
    pq.write_table(pa.table(columns), tmp_path / "ids.parquet")
    values = {"held_out_fraction": 0, "ctx_len": 16}
    expected = tokenize(jsonl(tmp_path / "a.jsonl", texts), tmp_path / "a", folder, **values)
    found = tokenize(tmp_path / "ids.parquet", tmp_path / "b", folder, streaming=streaming, **values)
    assert np.array_equal(found.rows(0, found.n_rows), expected.rows(0, expected.n_rows))
    names = ["source_index", "start", "n_tokens"]
    assert found.documents.select(names).equals(expected.documents.select(names))
    assert found.manifest.n_empty_documents == 1


def test_tokenized_input_sides(tmp_path: Path, tokenizer_folder: str) -> None:
    """Oracle: a tokenized document is on the same side however it was padded and ended."""
    generator = np.random.default_rng(0)
    documents = [generator.integers(1, 8192, 20).tolist() for _ in range(60)]
    sides = []
    for name, ending in (("bare", []), ("ended", [0])):
        pq.write_table(
            pa.table({"input_ids": [ids + ending for ids in documents]}), tmp_path / f"{name}.parquet"
        )
        store = tokenize(
            tmp_path / f"{name}.parquet", tmp_path / name, tokenizer_folder, held_out_fraction=0.5
        )
        table = store.documents.to_pydict()
        sides.append(dict(zip(table["source_index"], table["held_out"], strict=True)))
    common = sides[0].keys() & sides[1].keys()
    assert len(common) > 50
    assert {sides[0][i] for i in common} == {False, True}
    assert [sides[0][i] for i in common] == [sides[1][i] for i in common]


@pytest.mark.parametrize("ctx_len", [3, 4, 25])
def test_bert_frame(tmp_path: Path, bert_folder: str, ctx_len: int) -> None:
    """Oracle: naive packing into [CLS] … [SEP] with [SEP] between documents."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert_folder)
    texts = random_texts(25, seed=4)
    store = tokenize(
        jsonl(tmp_path / "a.jsonl", texts),
        tmp_path / "out",
        bert_folder,
        ctx_len=ctx_len,
        held_out_fraction=0.3,
    )
    check_rows(store, tokenizer, texts, list(range(25)), 0.3, ([2], [3]))
    check_documents(store, texts)
    rows = store.rows(0, store.n_rows)
    assert np.all(rows[:, 0] == 2)
    assert np.all(rows[:, -1] == 3)
    info = store.tokenizer
    assert (info.prefix_ids, info.suffix_ids, info.separator_id, info.mask_id) == ((2,), (3,), 3, 4)
    assert info.special_ids == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("max_tokens", [32, 33, 95, 96, 1000, 1024])
def test_max_tokens(tmp_path: Path, tokenizer_folder: str, max_tokens: int) -> None:
    """Oracle: exactly ⌊max_tokens / ctx_len⌋ rows, the first of the run without a limit; where they would
    all be held out, a refusal."""
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    values = {"shuffle_seed": 1, "held_out_fraction": 0.3}
    if max_tokens < 64:
        with pytest.raises(
            DataError, match=r"reached with 1 row, .* raise --max-tokens, or lower --held-out"
        ):
            tokenize(file, tmp_path / "part", tokenizer_folder, max_tokens=max_tokens, **values)
        values["held_out_fraction"] = 0.0
    whole = tokenize(file, tmp_path / "whole", tokenizer_folder, **values)
    part = tokenize(file, tmp_path / "part", tokenizer_folder, max_tokens=max_tokens, **values)
    assert part.n_rows == max_tokens // 32 < whole.n_rows
    assert np.array_equal(part.rows(0, part.n_rows), whole.rows(0, part.n_rows))
    assert np.array_equal(part.held_out_R, whole.held_out_R[: part.n_rows])
    addresses = np.arange(part.n_tokens)
    assert np.array_equal(part.document_of(addresses), whole.document_of(addresses))
    check_documents(part, TEXTS)


def test_stream_stops_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpt: Any, tokenizer_folder: str
) -> None:
    """Oracle: the second file is no JSON; a stream that has enough after the first never reads it."""
    monkeypatch.setattr(source, "BATCH_DOCUMENTS", 5)
    folder = tmp_path / "many"
    jsonl(folder / "a.jsonl", TEXTS)
    (folder / "b.jsonl").write_text("{broken\n")
    part = tokenize(
        folder, tmp_path / "part", tokenizer_folder, streaming=True, max_tokens=320, held_out_fraction=0
    )
    assert part.rows(0, 10).tolist() == [row for row, _ in naive_rows(gpt, TEXTS, 32, ([], []))[:10]]
    assert part.n_rows == 10
    for values in ({"max_tokens": 320}, {"streaming": True}):
        with pytest.raises(DataError, match=rf"cannot read {folder}/b\.jsonl: line 1 is no JSON"):
            tokenize(folder, tmp_path / "all", tokenizer_folder, **values)


def test_long_stream_is_shuffled_in_a_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpt: Any, tokenizer_folder: str
) -> None:
    """Oracle: with a buffer of 16 over three files, each text comes once, none earlier than the buffer
    allows, source_index names its text, and a seed always gives the same order."""
    monkeypatch.setattr(source, "SHUFFLE_BUFFER_DOCUMENTS", 16)
    folder = in_folder(jsonl, ".jsonl")(tmp_path, TEXTS)
    orders = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        opened = source.open_source(
            str(folder), subset=None, split="train", text_column="text", streaming=True, revision=None
        )
        batches = list(opened.batches(seed))
        order = [number for batch in batches for number in batch.source_index]
        assert [text for batch in batches for text in batch.texts or []] == [
            TEXTS[number] for number in order
        ]
        assert sorted(order) == list(range(len(TEXTS)))
        assert all(number < place + 16 for place, number in enumerate(order[:-16]))
        store = tokenize(folder, tmp_path / name, tokenizer_folder, streaming=True, shuffle_seed=seed)
        check_rows(store, gpt, TEXTS, order, 0.05)
        orders.append(order)
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0] != sorted(orders[0])
    assert max(orders[0][:20]) > 16, "the buffer is filled up as documents leave it"
    assert 4 < sum(number < 16 for number in orders[0][:16]) < 16, "any place in it may be left"


def test_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_folder: str) -> None:
    """Oracle: the store of one process, file by file; many small batches so that order could be lost."""
    monkeypatch.setattr(source, "BATCH_DOCUMENTS", 5)
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    one, two = (
        tokenize(file, tmp_path / str(n), tokenizer_folder, num_proc=n, shuffle_seed=3, max_tokens=1024)
        for n in (1, 2)
    )
    assert one.n_rows == 32
    assert one.fingerprint == two.fingerprint
    assert one.manifest.files == two.manifest.files


def test_shuffle_seed(tmp_path: Path, tokenizer_folder: str) -> None:
    """Oracle: source_index is the keyed permutation; other seeds give other rows, the same seed the same."""
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    stores = [
        tokenize(file, tmp_path / str(i), tokenizer_folder, shuffle_seed=s) for i, s in enumerate((1, 1, 2))
    ]
    for store, seed in zip(stores, (1, 1, 2), strict=True):
        index = store.documents["source_index"].to_pylist()
        assert index == permutation(len(TEXTS), seed)[: len(index)].tolist()
    assert stores[0].fingerprint == stores[1].fingerprint != stores[2].fingerprint


def test_held_out_by_text_alone(tmp_path: Path, tokenizer_folder: str) -> None:
    """Oracle: a text is on one side in two corpora with other order, neighbours, rows and seeds; so are
    its copies; and the share is the one asked for, within five standard deviations."""
    texts = random_texts(400, seed=7, words=12)
    others = [*random_texts(100, seed=8, words=12), *reversed(texts), *texts[:50]]
    sides: list[dict[str, bool]] = []
    for i, (corpus, seed, ctx_len) in enumerate(((texts, 1, 32), (others, 2, 16))):
        file = jsonl(tmp_path / f"{i}.jsonl", corpus)
        store = tokenize(
            file,
            tmp_path / str(i),
            tokenizer_folder,
            ctx_len=ctx_len,
            shuffle_seed=seed,
            held_out_fraction=0.25,
        )
        sides.append({})
        for number, held_out in zip(
            *store.documents.select(["source_index", "held_out"]).to_pydict().values(), strict=True
        ):
            assert sides[i].setdefault(corpus[number], held_out) == held_out, "copies are on the same side"
    common = sides[0].keys() & sides[1].keys()
    assert len(common) > 390
    assert all(sides[0][text] == sides[1][text] for text in common)
    share = sum(sides[0].values()) / len(sides[0])
    assert abs(share - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 400)


def test_larger_fraction_holds_out_more(tmp_path: Path, tokenizer_folder: str) -> None:
    """Oracle: what is held out at 0.2 is held out at 0.5 too, so that two stores stay comparable."""
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    held = []
    for fraction in (0.2, 0.5):
        table = tokenize(
            file, tmp_path / str(fraction), tokenizer_folder, ctx_len=4, held_out_fraction=fraction
        )
        chosen = table.documents.filter(table.documents["held_out"])
        held.append(set(chosen["source_index"].to_pylist()))
    assert held[0] < held[1]


def word_tokenizer(folder: Path, ids: dict[str, int], eos: bool = True) -> str:
    """A tokenizer of whole words with the given ids."""
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>"} if eos else {}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", **special)
    made.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("n_ids", "dtype"), [(256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32")]
)
def test_smallest_type(tmp_path: Path, n_ids: int, dtype: str) -> None:
    """Oracle: the smallest unsigned type whose maximum is the largest id, which survives."""
    words = {"<eos>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, n_ids)}
    folder = word_tokenizer(tmp_path / "tokenizer", words)
    text = f"w2 w{n_ids - 1} w3 w{n_ids - 2}"
    store = tokenize(
        jsonl(tmp_path / "a.jsonl", [text]), tmp_path / "out", folder, ctx_len=5, held_out_fraction=0
    )
    assert store.rows(0, 1).tolist() == [[2, n_ids - 1, 3, n_ids - 2, 0]]
    assert store.rows(0, 1).dtype == dtype
    assert ShardedArray(store.path / "tokens").dtype == dtype
    assert store.tokenizer.vocab_size == n_ids


def test_ids_with_gaps(tmp_path: Path) -> None:
    """Oracle: the ids by hand; the largest id counts for type and limit, not the number of words."""
    folder = word_tokenizer(tmp_path / "tokenizer", {"<eos>": 0, "<unk>": 1, "a": 2, "b": 300})
    store = tokenize(
        jsonl(tmp_path / "a.jsonl", ["a b b"]), tmp_path / "out", folder, ctx_len=4, held_out_fraction=0
    )
    assert store.rows(0, 1).tolist() == [[2, 300, 300, 0]]
    assert (store.rows(0, 1).dtype, store.tokenizer.vocab_size) == (np.uint16, 301)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_column": "body"}, r"has no column 'body'; it has text, number\. .*--text-column"),
        ({"text_column": "body", "streaming": True}, "has no column 'body'; it has text, number"),
        ({"ctx_len": 257}, r"ctx_len must be at most 256 \(the tokenizer's model_max_length\), got 257"),
        ({"tokenizer": "/absent/tokenizer"}, "cannot load the tokenizer '/absent/tokenizer'"),
        ({"split": "test"}, "has neither subsets nor splits"),
        ({"subset": "en"}, "has neither subsets nor splits"),
        ({"revision": "main"}, "--revision has no effect on the local path"),
    ],
)
def test_wrong_settings(tmp_path: Path, tokenizer_folder: str, values: dict[str, Any], message: str) -> None:
    """Oracle: the message by hand; nothing is left at the output."""
    file = jsonl(tmp_path / "a.jsonl", TEXTS, number=list(range(len(TEXTS))))
    values = {"tokenizer": tokenizer_folder} | values
    with pytest.raises(ConfigError, match=message):
        tokenize(file, tmp_path / "out", **values)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "values", [{"ctx_len": 0}, {"num_proc": 0}, {"held_out_fraction": 1.0}, {"held_out_fraction": -0.1},
               {"held_out_fraction": float("nan")}, {"max_tokens": 31}]
)  # fmt: skip
def test_nonsense_settings(values: dict[str, Any]) -> None:
    """Oracle: the config itself refuses the setting by name."""
    (name,) = values
    with pytest.raises(ConfigError, match=f"^{name} must be "):
        TokenizeConfig(dataset="d", tokenizer="t", out=Path("o"), **{"ctx_len": 32} | values)


def test_ctx_len_limits(tmp_path: Path, tokenizer_folder: str, bert_folder: str) -> None:
    """Oracle: 256 is allowed and 257 is not; a model beside the tokenizer limits too; a row needs room."""
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    assert tokenize(file, tmp_path / "out", tokenizer_folder, ctx_len=256, held_out_fraction=0).ctx_len == 256
    folder = tmp_path / "model"
    shutil.copytree(bert_folder, folder)
    transformers.BertConfig(max_position_embeddings=40).save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"at most 40 \(the longest row of the model beside it\), got 41"):
        tokenize(file, tmp_path / "b", str(folder), ctx_len=41)
    with pytest.raises(ConfigError, match="ctx_len 2 leaves no room"):
        tokenize(file, tmp_path / "b", str(folder), ctx_len=2)
    assert tokenize(file, tmp_path / "b", str(folder), ctx_len=40, held_out_fraction=0).ctx_len == 40


def test_tokenizer_without_separator(tmp_path: Path) -> None:
    """Oracle: no EOS and no [SEP] is an error that says how to repair it."""
    folder = word_tokenizer(tmp_path / "tokenizer", {"<unk>": 0, "a": 1}, eos=False)
    with pytest.raises(ConfigError, match=r"has no EOS or separator token .* set its eos_token"):
        tokenize(jsonl(tmp_path / "a.jsonl", ["a a a"]), tmp_path / "out", folder, ctx_len=2)


def no_text(folder: Path) -> Path:
    return jsonl(folder / "a.jsonl", ["", " ", "\n\t"])


def little_text(folder: Path) -> Path:
    return jsonl(folder / "a.jsonl", ["one", "two"])


def empty_file(folder: Path) -> Path:
    return txt(folder / "a.jsonl", [])


def no_rows(folder: Path) -> Path:
    return csv(folder, [])


def incomplete_saved(folder: Path) -> Path:
    path = saved(folder, TEXTS)
    next(path.glob("*.arrow")).unlink()
    return path


def empty_text_file(folder: Path) -> Path:
    return txt(folder / "a.txt", [])


def foreign_ids(folder: Path) -> Path:
    pq.write_table(pa.table({"input_ids": [[1, 2], [3, 8192]]}), folder / "a.parquet")
    return folder / "a.parquet"


def broken_json(folder: Path) -> Path:
    return txt(folder / "a.jsonl", ['{"text": "a"}\n{"text": \n'])


def mixed_folder(folder: Path) -> Path:
    jsonl(folder / "many" / "a.jsonl", TEXTS)
    return txt(folder / "many" / "b.txt", TEXTS).parent


def two_delimiters(folder: Path) -> Path:
    (folder / "many").mkdir()
    csv(folder / "many", TEXTS)
    return csv(folder / "many", TEXTS, "\t").parent


def no_data(folder: Path) -> Path:
    (folder / "many").mkdir()
    return txt(folder / "many" / "a.pdf", ["x"]).parent


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (no_text, DataError, r"has no text: 3 documents \(3 of them empty\)$"),
        (
            little_text,
            DataError,
            r"for one row of 32 tokens: 2 documents, \d tokens; lower --ctx-len to \d or less",
        ),
        (empty_file, DataError, r"a\.jsonl: it is empty"),
        (no_rows, SaemillError, "has no rows|has no text|corresponds to no data"),
        (empty_text_file, DataError, r"a\.txt(: it is empty| has no rows)"),
        (incomplete_saved, ConfigError, r"cannot open .*saved: .*arrow"),
        (
            foreign_ids,
            DataError,
            r"row 1 of .*a\.parquet \(column input_ids\) has ids 3\.\.8192, but .* has 8192",
        ),
        (broken_json, DataError, r"cannot read .*a\.jsonl"),
        (mixed_folder, ConfigError, r"files of one kind .* found several kinds \(json, text\)"),
        (two_delimiters, ConfigError, r"found several kinds \(csv, tsv\)"),
        (no_data, ConfigError, "found none of them"),
    ],
)
def test_wrong_data(
    tmp_path: Path,
    tokenizer_folder: str,
    make: Callable[[Path], Path],
    kind: type[SaemillError],
    message: str,
    streaming: bool,
) -> None:
    """Oracle: the message by hand; nothing is left at the output."""
    with pytest.raises(kind, match=message):
        tokenize(make(tmp_path), tmp_path / "out", tokenizer_folder, streaming=streaming)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["absent.jsonl", "absent.jsonl.gz", "data/absent.txt.gz", "./absent", "/absent/x"]
)
def test_unknown_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_folder: str, name: str
) -> None:
    """Oracle: a path that is not there is never looked for on the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    config = TokenizeConfig(dataset=name, tokenizer=tokenizer_folder, out=tmp_path / "out", ctx_len=32)
    with pytest.raises(ConfigError, match=f"no file or folder {name}"):
        run(config)


def test_files_are_looked_for_before_anything_else(tmp_path: Path, tokenizer_folder: str) -> None:
    """Oracle: with a dataset, an output and a row length that are wrong, the paths are told first."""
    config: dict[str, Any] = {"tokenizer": tokenizer_folder, "ctx_len": 257, "dataset": "./absent.jsonl"}
    with pytest.raises(ConfigError, match=r"no file or folder ./absent\.jsonl"):
        run(TokenizeConfig(out=tmp_path / "out", **config))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"out must be a folder, but .*/file is a file"):
        run(TokenizeConfig(out=tmp_path / "file" / "deep" / "out", **config))


def test_unknown_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_folder: str) -> None:
    """Oracle: whatever the hub's client says comes as an error that names the dataset, on both ways."""

    def absent(*_: Any, **__: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'who/what' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    config = TokenizeConfig(dataset="who/what", tokenizer=tokenizer_folder, out=tmp_path / "out", ctx_len=32)
    with pytest.raises(ConfigError, match="cannot open who/what: Dataset 'who/what' doesn't exist"):
        run(config)


def test_splits_of_folders(tmp_path: Path, gpt: Any, tokenizer_folder: str) -> None:
    """Oracle: the split's own texts; an unknown one is refused with those there; a flag that would
    choose nothing is refused."""
    folder = tmp_path / "splits"
    jsonl(folder / "train.jsonl", ["other"])
    jsonl(folder / "test.jsonl", TEXTS)
    store = tokenize(folder, tmp_path / "out", tokenizer_folder, split="test", held_out_fraction=0)
    check_rows(store, gpt, TEXTS, list(range(len(TEXTS))))
    with pytest.raises(ConfigError, match=r"Unknown split .val.*'train', 'test'"):
        tokenize(folder, tmp_path / "val", tokenizer_folder, split="val")
    one, two = saved(tmp_path / "one", TEXTS), saved_dict(tmp_path / "two", TEXTS)
    with pytest.raises(ConfigError, match="has no split 'tset'; did you mean test"):
        tokenize(two, tmp_path / "val", tokenizer_folder, split="tset")
    with pytest.raises(ConfigError, match="has no splits; leave out --split test"):
        tokenize(one, tmp_path / "val", tokenizer_folder, split="test")
    with pytest.raises(ConfigError, match="has no subsets; leave out --subset en"):
        tokenize(one, tmp_path / "val", tokenizer_folder, subset="en")


def test_other_settings_are_refused(tmp_path: Path, tokenizer_folder: str) -> None:
    """Oracle: the two keys that differ are named with both values, the store stays as it was."""
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    store = tokenize(file, tmp_path / "out", tokenizer_folder, shuffle_seed=4)
    with pytest.raises(ConfigError) as caught:
        tokenize(file, tmp_path / "out", tokenizer_folder, shuffle_seed=5, ctx_len=16)
    lines = str(caught.value).splitlines()
    assert lines[1:3] == ["  ctx_len: there 32, now 16", "  shuffle_seed: there 4, now 5"]
    assert len(lines) == 4
    assert TokenStore(tmp_path / "out").problems(hashes=True) == []
    assert TokenStore(tmp_path / "out").fingerprint == store.fingerprint


def test_finished_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer_folder: str
) -> None:
    """Oracle: no tokenizer is loaded, no file's time changes, and it says so; num_proc may differ."""
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    store = tokenize(file, tmp_path / "out", tokenizer_folder)
    times = {path: path.stat().st_mtime_ns for path in store.path.rglob("*")}
    monkeypatch.setattr(stage, "load_tokenizer", lambda *_: pytest.fail("started anew"))
    capsys.readouterr()
    again = tokenize(file, tmp_path / "out", tokenizer_folder, num_proc=3)
    assert again.fingerprint == store.fingerprint
    assert "is finished already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in store.path.rglob("*")} == times


def test_changed_source_is_refused(tmp_path: Path, tokenizer_folder: str) -> None:
    """Oracle: one letter of the text changed after the store was made; the same settings are refused."""
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    store = tokenize(file, tmp_path / "out", tokenizer_folder)
    jsonl(file, [TEXTS[0].upper(), *TEXTS[1:]])
    with pytest.raises(ConfigError, match=r"a\.jsonl has changed since .*out was made of it"):
        tokenize(file, tmp_path / "out", tokenizer_folder)
    assert TokenStore(tmp_path / "out").fingerprint == store.fingerprint
    jsonl(file, TEXTS)
    assert tokenize(file, tmp_path / "out", tokenizer_folder).fingerprint == store.fingerprint


def test_foreign_output_is_kept(tmp_path: Path, tokenizer_folder: str) -> None:
    """Oracle: a folder with other things, or a file, at the output is refused and not touched."""
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match="is not a finished token store"):
        tokenize(file, tmp_path / "out", tokenizer_folder)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
    with pytest.raises(ConfigError, match="out must be a folder"):
        tokenize(file, file, tokenizer_folder)
    with pytest.raises(StoreError, match="is not a finished token store"):
        TokenStore(file)
    (tmp_path / "empty").mkdir()
    assert tokenize(file, tmp_path / "empty", tokenizer_folder).n_rows > 0


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def stop_second_flush(patch: pytest.MonkeyPatch) -> None:
    flush, calls = writer.Writer._flush, []

    def second(self: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        flush(self)

    patch.setattr(writer.Writer, "_flush", second)


def stop_rename(patch: pytest.MonkeyPatch) -> None:
    replace = Path.replace

    def interrupted(path: Path, target: Path) -> Path:
        if target.name == "out":
            raise KeyboardInterrupt
        return replace(path, target)

    patch.setattr(Path, "replace", interrupted)


MOMENTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "second shard": stop_second_flush,
    "before the tables": lambda patch: patch.setattr(writer, "write_token_store", stop),
    "before the manifest": lambda patch: patch.setattr(durable, "write_json", stop),
    "before the rename": stop_rename,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_folder: str, moment: str
) -> None:
    """Oracle: nothing at the output; the same command then makes the store of an undisturbed run."""
    monkeypatch.setattr(writer, "SHARD_TOKENS", 320)
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.MonkeyPatch.context() as patch:
        MOMENTS[moment](patch)
        with pytest.raises(KeyboardInterrupt):
            tokenize(file, tmp_path / "out", tokenizer_folder)
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "out.partial" / "tokens").rglob("0")), "it had begun to write"
    if moment != "before the rename":
        with pytest.raises(StoreError, match="not a finished token store"):
            TokenStore(tmp_path / "out.partial")
    again = tokenize(file, tmp_path / "out", tokenizer_folder)
    whole = tokenize(file, tmp_path / "whole", tokenizer_folder)
    assert again.fingerprint == whole.fingerprint
    assert again.problems(hashes=True) == []
    assert not (tmp_path / "out.partial").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
import saemill.tokenize.run as stage
from saemill.tokenize import writer as module
module.SHARD_TOKENS = 320
flush = module.Writer._flush
def flush_and_die(writer):
    flush(writer)
    if writer.n_written_shards == 2:
        os.kill(os.getpid(), signal.SIGKILL)
module.Writer._flush = flush_and_die
file, tokenizer, out = sys.argv[1:]
settings = {"dataset": file, "tokenizer": tokenizer, "out": Path(out), "ctx_len": 32, "shuffle_seed": None}
stage.run(stage.TokenizeConfig(**settings))
"""


def test_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_folder: str) -> None:
    """Oracle: after SIGKILL nothing is at the output; the same command makes the undisturbed store."""
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    arguments = [sys.executable, "-c", KILLED, str(file), tokenizer_folder, str(tmp_path / "out")]
    killed = subprocess.run(
        arguments, env=os.environ | {"HF_HOME": str(tmp_path / "hf")}, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert len(list((tmp_path / "out.partial" / "tokens").rglob("0"))) >= 2
    assert not (tmp_path / "out").exists()
    with pytest.raises(StoreError, match="not a finished token store"):
        TokenStore(tmp_path / "out.partial")
    monkeypatch.setattr(writer, "SHARD_TOKENS", 320)
    again = tokenize(file, tmp_path / "out", tokenizer_folder)
    assert again.fingerprint == tokenize(file, tmp_path / "whole", tokenizer_folder).fingerprint


FIRST_OF_TWO = """
import sys, time
from pathlib import Path
import saemill.tokenize.run as stage
from saemill.tokenize import writer as module
module.SHARD_TOKENS = 320
flush = module.Writer._flush
def flush_and_wait(writer):
    flush(writer)
    while writer.n_written_shards == 2 and not Path(go).exists():
        time.sleep(0.05)
module.Writer._flush = flush_and_wait
file, tokenizer, out, go = sys.argv[1:]
settings = {"dataset": file, "tokenizer": tokenizer, "out": Path(out), "ctx_len": 32, "shuffle_seed": None}
stage.run(stage.TokenizeConfig(**settings))
"""


@pytest.mark.parametrize("first", ["ends", "is killed"])
def test_a_second_process_waits_for_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_folder: str, first: str
) -> None:
    """Oracle: the undisturbed store, made by the first process if it lives, else by the second."""
    monkeypatch.setattr(writer, "SHARD_TOKENS", 320)
    file, out, go = jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out", tmp_path / "go"
    whole = tokenize(file, tmp_path / "whole", tokenizer_folder)
    said: list[str] = []
    monkeypatch.setattr(durable, "say", said.append)
    arguments = [sys.executable, "-c", FIRST_OF_TWO, str(file), tokenizer_folder, str(out), str(go)]
    with subprocess.Popen(arguments, env=os.environ | {"HF_HOME": str(tmp_path / "hf")}) as process:
        written = tmp_path / "out.partial" / "tokens" / "c" / "1" / "0"
        wait_until(written.exists)
        with ThreadPoolExecutor(1) as pool:
            if first == "ends":
                monkeypatch.setattr(stage, "_write", lambda *_: pytest.fail("wrote as well"))
            second = pool.submit(tokenize, file, out, tokenizer_folder)
            try:
                wait_until(lambda: said or second.done())
                assert written.exists()
                assert not second.done()
                go.touch() if first == "ends" else process.kill()
                store = second.result()
            finally:
                process.kill()
    assert said == [f"another process is writing to {out}.partial; waiting for it"]
    assert store.fingerprint == whole.fingerprint
    assert store.problems(hashes=True) == []
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]


def test_two_processes_where_folders_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_folder: str
) -> None:
    """Oracle: the store of the process that ended first, untouched by the one that wrote meanwhile."""

    flock = fcntl.flock

    def files_alone(descriptor: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, "as NFS says of a folder")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", files_alone)
    file, out = jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out"
    publish, made = stage._publish, []

    def another_first(config: TokenizeConfig, partial: Path) -> None:
        monkeypatch.setattr(stage, "_publish", publish)
        tokenize(file, out, tokenizer_folder)
        made.append((out / "manifest.json").stat().st_ino)
        assert partial.exists()
        publish(config, partial)

    monkeypatch.setattr(stage, "_publish", another_first)
    store = tokenize(file, out, tokenizer_folder)
    assert made == [(out / "manifest.json").stat().st_ino]
    assert store.problems(hashes=True) == []
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]


def test_a_shard_that_nobody_wrote_is_noticed(plain_store: TokenStore, tmp_path: Path) -> None:
    """Oracle: the missing file is named, before the manifest is written and, where the manifest does not
    list it either, when the store is opened."""
    for shard in ("tokens/c/1/0", "held_out/c/0/0"):
        folder = tmp_path / "copy"
        shutil.copytree(plain_store.path, folder)
        files = tuple(file for file in plain_store.manifest.files if file.path != shard)
        records.write(folder / "manifest.json", plain_store.manifest.model_copy(update={"files": files}))
        (folder / shard).unlink()
        with pytest.raises(StoreError, match=shard):
            TokenStore(folder)
        shutil.rmtree(folder)
    shutil.copytree(plain_store.path / "tokens", tmp_path / "new" / "tokens")
    (tmp_path / "new" / "tokens" / "c" / "2" / "0").unlink()
    with pytest.raises(StoreError, match="c/2/0: file is missing"):
        write_token_store(
            tmp_path / "new",
            tokens=ShardedArray(tmp_path / "new" / "tokens"),
            held_out_R=plain_store.held_out_R,
            segments=pq.read_table(plain_store.path / "segments.parquet"),
            documents=plain_store.documents,
            tokenizer=plain_store.tokenizer,
            extra={},
        )
    assert not (tmp_path / "new" / "manifest.json").exists()


def test_manifest_lists_every_file(plain_store: TokenStore) -> None:
    """Oracle: the files that lie there, their sizes and hashes, and the settings that made them."""
    files = {str(f.relative_to(plain_store.path)): f for f in plain_store.path.rglob("*") if f.is_file()}
    del files["manifest.json"]
    found = {entry.path: (entry.bytes, entry.xxh3) for entry in plain_store.manifest.files}
    contents = {name: file.read_bytes() for name, file in files.items()}
    assert found == {name: (len(c), xxhash.xxh3_64_hexdigest(c)) for name, c in contents.items()}
    assert plain_store.manifest.settings.model_dump()["ctx_len"] == 16
    assert plain_store.problems(hashes=True) == []
    tokenizer = transformers.AutoTokenizer.from_pretrained(plain_store.path / "tokenizer")
    assert tokenizer.decode(plain_store.rows(0, 1)[0]).startswith(TEXTS[0][:20])


def test_damage_is_refused(plain_store: TokenStore, tmp_path: Path) -> None:
    """Oracle: with any one file missing or shorter by a byte the store does not open, and names it."""
    for entry in plain_store.manifest.files:
        folder = tmp_path / "copy"
        shutil.copytree(plain_store.path, folder)
        file = folder / entry.path
        os.truncate(file, entry.bytes - 1)
        with pytest.raises(StoreError, match=f"bytes, expected {entry.bytes:,}") as caught:
            TokenStore(folder)
        assert str(file) in str(caught.value)
        file.unlink()
        with pytest.raises(StoreError, match="file is missing") as caught:
            TokenStore(folder)
        assert str(file) in str(caught.value)
        shutil.rmtree(folder)


def test_bit_flips_are_found(plain_store: TokenStore, tmp_path: Path) -> None:
    """Oracle: one flipped bit in any one file is found by the hashes, in that file and no other."""
    shutil.copytree(plain_store.path, tmp_path / "copy")
    store = TokenStore(tmp_path / "copy")
    for entry in store.manifest.files:
        file = store.path / entry.path
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
        assert store.problems(hashes=False) == []
        assert store.problems(hashes=True) == [f"{file}: content differs from its hash"]
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    assert store.problems(hashes=True) == []


def test_damaged_manifest(plain_store: TokenStore, tmp_path: Path) -> None:
    """Oracle: no manifest, half a manifest and another format are refused with the reason."""
    shutil.copytree(plain_store.path, tmp_path / "copy")
    manifest = tmp_path / "copy" / "manifest.json"
    content = manifest.read_text()
    for changed, message in (
        (content[:200], r"manifest\.json is damaged"),
        (content.replace("saemill tokens 2", "saemill tokens 0"), "format 'saemill tokens 0', but"),
        (None, r"manifest\.json is missing\. Make one with `saemill tokenize`"),
    ):
        manifest.unlink() if changed is None else manifest.write_text(changed)
        with pytest.raises(StoreError, match=message):
            TokenStore(tmp_path / "copy")


@pytest.mark.parametrize("n_rows", [1, 9, 10, 11, 20, None])
def test_copy_rows(plain_store: TokenStore, tmp_path: Path, n_rows: int | None) -> None:
    """Oracle: the original's first rows, sides and documents; counts taken token by token."""
    n_rows = n_rows or plain_store.n_rows
    copy = copy_rows(plain_store, n_rows, tmp_path / "copy")
    addresses = np.arange(n_rows * 16)
    assert (copy.n_rows, copy.ctx_len, copy.n_tokens) == (n_rows, 16, len(addresses))
    assert np.array_equal(copy.rows(0, n_rows), plain_store.rows(0, n_rows))
    assert copy.rows(0, 1).dtype == plain_store.rows(0, 1).dtype
    assert np.array_equal(copy.held_out_R, plain_store.held_out_R[:n_rows])
    assert np.array_equal(copy.document_of(addresses), plain_store.document_of(addresses))
    check_documents(copy, TEXTS)
    n_documents = copy.documents.num_rows
    for name in ("source_index", "held_out", "text_hash"):
        assert copy.documents[name].to_pylist() == plain_store.documents[name][:n_documents].to_pylist()
    assert copy.tokenizer == plain_store.tokenizer
    assert copy.manifest.parent_fingerprint == plain_store.fingerprint
    assert TokenStore(copy.path).problems(hashes=True) == []
    assert not (tmp_path / "copy.partial").exists()


def test_copy_of_all_rows_is_the_store(plain_store: TokenStore, tmp_path: Path) -> None:
    """Oracle: every file of a full copy equals the original's, up to the manifest."""
    copy = copy_rows(plain_store, plain_store.n_rows, tmp_path / "copy")
    assert copy.manifest.files == plain_store.manifest.files
    assert copy.fingerprint == plain_store.fingerprint


def test_command_line(tmp_path: Path, tokenizer_folder: str) -> None:
    """Oracle: the store that the same settings make from Python, from a file, --set and flags."""
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"tokenize": {"ctx_len": 16, "shuffle-seed": 3}}))
    command = ["tokenize", str(file), "--tokenizer", tokenizer_folder, "-o", str(tmp_path / "out")]
    command += ["--config", str(tmp_path / "c.yaml"), "--set", "held_out_fraction=0.3"]
    result = CliRunner().invoke(app, [*command, "--max_tokens", "0.5k", "--shuffle-seed", "none"])
    assert result.exit_code == 0, result.output
    made = tokenize(
        file, tmp_path / "other", tokenizer_folder, ctx_len=16, held_out_fraction=0.3, max_tokens=500
    )
    store = TokenStore(tmp_path / "out")
    assert store.manifest.settings == made.manifest.settings
    assert store.fingerprint == made.fingerprint
    assert torch.equal(torch.from_numpy(store.held_out_R), torch.from_numpy(made.held_out_R))
    assert f"{store.n_tokens:,} tokens in {store.n_rows:,} rows" in result.output
