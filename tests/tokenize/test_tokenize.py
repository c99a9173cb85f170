"""`saemill tokenize` against naive packing: rows, sides, documents, orders and ids."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import yaml
from packing import TEXTS, check_documents, check_rows, in_folder, jsonl, naive_rows, tokenize, word_tokenizer
from texts import random_texts
from typer.testing import CliRunner

from saemill.cli import app
from saemill.common.errors import DataError
from saemill.common.stores.permutation import permutation
from saemill.common.stores.shards import ShardedArray
from saemill.common.stores.tokens import TokenStore
from saemill.tokenize import source


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
