"""Datasets that are tokenized already: other tools' own, padded ones, and rows that are none."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tokenizers
import transformers
from peers import require_peers, run_in_peers
from texts import random_texts

from saemill.common.errors import ConfigError, DataError
from saemill.common.stores.token_writer import copy_rows
from saemill.common.stores.tokens import TokenizerInfo, TokenStore
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.ids import n_padding, survey, unframed
from saemill.tokenize.run import run

PAD = 3


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ids 0..3 are <s>, </s>, <unk>, <pad>; 4..63 are words."""
    folder = tmp_path_factory.mktemp("words")
    names = ["<s>", "</s>", "<unk>", "<pad>", *(f"w{i}" for i in range(60))]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return str(folder)


def rows(n: int, seed: int = 0, least: int = 5, most: int = 24) -> list[list[int]]:
    """Rows of words."""
    random = np.random.default_rng(seed)
    return [random.integers(4, 64, random.integers(least, most + 1)).tolist() for _ in range(n)]


def lines(file: Path, ids: list[Any], **columns: list[Any]) -> Path:
    made = [{"input_ids": row} | {k: v[i] for k, v in columns.items()} for i, row in enumerate(ids)]
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return file


def tokenize(dataset: Path, out: Path, tokenizer: str, **values: Any) -> TokenStore:
    values = {"shuffle_seed": None, "held_out_fraction": 0.0} | values
    return run(TokenizeConfig(dataset=str(dataset), tokenizer=tokenizer, out=out, **values))


BAD: dict[str, tuple[Any, str]] = {
    "strings": (["w5", "w6"], r"row 2 of .* must hold whole numbers, the ids of tokens, got 'w5'"),
    "null": (None, "row 2 of .* must be a list of token ids, got null"),
    "null inside": ([5, None], "row 2 of .* whole numbers, .* got null"),
    "scalar": (5, "row 2 of .* must be a list of token ids, got 5"),
    "text": ("w1 w2", "row 2 of .* must be a list of token ids, got 'w1 w2'"),
    "nested": ([[5, 6], [7]], r"row 2 of .* whole numbers, .* got \[5, 6\]"),
    "fraction": ([5, 5.7], r"row 2 of .* whole numbers, .* got 5\.7"),
    "bool": ([5, True], "row 2 of .* whole numbers, .* got True"),
    "negative": ([5, -100], "row 2 of .* has the id -100; ids are 0 or more"),
    "too large": ([5, 64], r"row 2 of .* has ids 5\.\.64, but the tokenizer has 64"),
    "huge": ([5, 2**62], "row 2 of .* has ids"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", BAD)
def test_a_row_that_is_none_is_named(tmp_path: Path, words: str, kind: str, streaming: bool) -> None:
    """Oracle: the row that was written; nothing is left at the output."""
    value, told = BAD[kind]
    file = lines(tmp_path / "a.jsonl", [[5, 6], [7, 8], value, [9]])
    with pytest.raises(DataError, match=told):
        tokenize(file, tmp_path / "out", words, ctx_len=2, streaming=streaming)
    assert not list(tmp_path.glob("out*"))


def test_all_rows_of_a_wrong_type_are_told(tmp_path: Path, words: str) -> None:
    """Oracle: columns of one wrong type each, which Arrow knows as such."""
    for name, value in (("strings", ["5"]), ("scalar", 5), ("null", None), ("bools", [True])):
        file = lines(tmp_path / f"{name}.jsonl", [value] * 5)
        with pytest.raises(
            (ConfigError, DataError), match=r"row 0 of .*column input_ids|has no column 'text'"
        ):
            tokenize(file, tmp_path / "out", words, ctx_len=2)


def test_whole_numbers_written_as_floats_are_taken(tmp_path: Path, words: str) -> None:
    """Oracle: the same rows as integers."""
    ids = rows(20)
    whole = tokenize(lines(tmp_path / "a.jsonl", ids), tmp_path / "a", words, ctx_len=8)
    floats = lines(tmp_path / "b.jsonl", [[float(i) for i in row] for row in ids])
    assert tokenize(floats, tmp_path / "b", words, ctx_len=8).fingerprint == whole.fingerprint


@pytest.mark.parametrize(
    ("mask", "told"),
    [([1], "has 2 ids, but its attention_mask is 1 values"), (None, "attention_mask is null"),
     ([1, 2], "must hold 0 and 1, got 2"), ([1, -1], "must hold 0 and 1, got -1")],
)  # fmt: skip
def test_masks_that_are_none(tmp_path: Path, words: str, mask: Any, told: str) -> None:
    """Oracle: the row and what is wrong with its mask."""
    file = lines(tmp_path / "a.jsonl", [[5, 6]] * 3, attention_mask=[[1, 1], mask, [1, 1]])
    with pytest.raises(DataError, match=f"row 1 of .*{told}"):
        tokenize(file, tmp_path / "out", words, ctx_len=2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_that_no_one_names_is_refused(tmp_path: Path, words: str, side: str) -> None:
    """Oracle: a word as padding, which the message names; with a mask the rows are those before."""
    ids = rows(30, most=16)
    pads = [[9] * (24 - len(row)) for row in ids]
    padded = [pad + row if side == "left" else row + pad for row, pad in zip(ids, pads, strict=True)]
    end = "begin" if side == "left" else "end"
    with pytest.raises(DataError, match=f"30 of 30 rows {end} with the id 9 4 times or more"):
        tokenize(lines(tmp_path / "a.jsonl", padded), tmp_path / "out", words, ctx_len=8)
    zeros = [[0] * len(pad) for pad in pads]
    ones = [[1] * len(row) for row in ids]
    masks = [z + o if side == "left" else o + z for z, o in zip(zeros, ones, strict=True)]
    masked = lines(tmp_path / "b.jsonl", padded, attention_mask=masks)
    found = tokenize(masked, tmp_path / "b", words, ctx_len=8)
    wanted = tokenize(lines(tmp_path / "c.jsonl", ids), tmp_path / "c", words, ctx_len=8)
    assert found.content == wanted.content


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_a_tokenizer_without_one_is_its_separator(tmp_path: Path, words: str, side: str) -> None:
    """Oracle: the rows before they were padded."""
    bare = transformers.AutoTokenizer.from_pretrained(words)
    bare.pad_token = None
    bare.save_pretrained(tmp_path / "bare")
    ids = rows(30, most=16)
    pads = [[1] * (24 - len(row)) for row in ids]
    padded = [pad + row if side == "left" else row + pad for row, pad in zip(ids, pads, strict=True)]
    found = tokenize(lines(tmp_path / "a.jsonl", padded), tmp_path / "a", str(tmp_path / "bare"), ctx_len=8)
    wanted = tokenize(lines(tmp_path / "b.jsonl", ids), tmp_path / "b", str(tmp_path / "bare"), ctx_len=8)
    assert found.content == wanted.content


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_without_a_mask_is_left_out(
    tmp_path: Path, words: str, side: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the rows before they were padded; a row of padding alone is an empty document."""
    ids = [*rows(40), []]
    padded = [
        [PAD] * (24 - len(row)) + row if side == "left" else row + [PAD] * (24 - len(row)) for row in ids
    ]
    found = tokenize(lines(tmp_path / "b.jsonl", padded), tmp_path / "b", words, ctx_len=24)
    n = sum(24 - len(row) for row in ids)
    assert f"{n:,} ids {PAD} at the ends of rows are padding and left out" in capsys.readouterr().out
    assert found.manifest.n_empty_documents == 1
    packed = [token for row in ids if row for token in [*row, 1]]
    assert found.rows(0, found.n_rows).reshape(-1).tolist() == packed[: found.n_tokens]


def info(pad: int | None, separator: int, prefix: tuple[int, ...] = (), suffix: tuple[int, ...] = ()) -> Any:
    return TokenizerInfo(
        name="x", hash="0" * 16, vocab_size=64, prefix_ids=prefix, suffix_ids=suffix, separator_id=separator,
        special_ids=(0, 1, 2, 3), pad_id=pad, mask_id=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ids", "tokenizer", "expected"),
    [
        ([3, 3, 5, 6], info(3, 1), [5, 6]),
        ([5, 3, 6, 3], info(3, 1), [5, 3, 6]),
        ([5, 6, 1, 1, 1], info(1, 1), [5, 6]),
        ([5, 1, 6, 1], info(1, 1), [5, 1, 6]),
        ([1, 1, 5, 6], info(1, 1), [5, 6]),
        ([1, 1, 1], info(1, 1), []),
        ([3, 3], info(3, 1), []),
        ([0, 5, 6, 1, 3, 3], info(3, 1, (0,), (1,)), [5, 6]),
        ([3, 0, 5, 6, 2, 4], info(3, 1, (0,), (2, 4)), [5, 6]),
        ([0, 0, 0, 5, 6], info(0, 1, (0,)), [5, 6]),
        ([5, 6], info(None, 1), [5, 6]),
    ],
)
def test_what_is_left_of_a_row(ids: list[int], tokenizer: TokenizerInfo, expected: list[int]) -> None:
    """Oracle: by hand; padding stands at the ends alone, a separator inside is content."""
    left, right = n_padding(ids, tokenizer)
    assert unframed(ids[left : len(ids) - right], tokenizer) == expected


def test_few_rows_that_end_in_two_separators_are_not_padded() -> None:
    """Oracle: chunks of text with an empty document at their end, where padding is the separator; and rows
    of which most end so."""
    chunks = [("row", [5, 6, 7, 1]), ("row", [5, 1, 1, 1]), ("row", [5, 6, 7, 8])]
    assert survey(chunks, info(1, 1)).common == 4
    assert survey(chunks[1:2] * 3 + chunks, info(1, 1)).why == "4 of 6 rows are padded"
    assert survey(chunks, info(3, 1)).common == 4
    assert survey([("row 0", [5, 6]), ("row 1", [5])], info(3, 1)).why == "row 1 has 1 ids, an earlier one 2"


@pytest.mark.parametrize("form", ["torch", "numpy", None])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", ["input_ids", "tokens"])
def test_full_rows_are_kept(
    tmp_path: Path, words: str, form: str | None, streaming: bool, column: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Oracle: the rows themselves, in their format; what the output and the store say a document is."""
    ids = rows(40, least=16, most=16)
    made = datasets.Dataset.from_dict({column: ids, "other": [1] * 40})
    made.set_format(form, columns=[column])
    made.save_to_disk(str(tmp_path / "saved"))
    store = tokenize(tmp_path / "saved", tmp_path / "out", words, streaming=streaming, held_out_fraction=0.2)
    assert store.ctx_len == 16
    assert store.rows(0, 40).tolist() == ids
    assert store.document_of(np.arange(640)).reshape(40, 16).tolist() == [[i] * 16 for i in range(40)]
    assert 0 < store.held_out_R.sum() < 20
    said = capsys.readouterr().out
    assert (
        "rows are kept as they are, and a document, for the held-out split and the intervals, is one row"
        in said
    )
    assert "of 40 rows of ids, each taken for a document, chosen by a hash of their ids" in store.how_held_out
    assert store.n_used_ids == max(map(max, ids)) + 1
    copy = copy_rows(store, 3, tmp_path / "copy")
    assert (copy.n_used_ids, copy.how_held_out[:40]) == (store.n_used_ids, store.how_held_out[:40])


def test_repack(tmp_path: Path, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the rows joined by the separator; on texts the flag is refused."""
    ids = rows(20, least=16, most=16)
    store = tokenize(lines(tmp_path / "a.jsonl", ids), tmp_path / "a", words, ctx_len=16, repack=True)
    packed = [token for row in ids for token in [*row, 1]]
    assert store.rows(0, store.n_rows).reshape(-1).tolist() == packed[: store.n_tokens]
    assert "is one row of the dataset" in capsys.readouterr().out
    other = tokenize(lines(tmp_path / "a.jsonl", ids), tmp_path / "b", words, ctx_len=10)
    assert other.rows(0, other.n_rows).reshape(-1).tolist() == packed[: other.n_tokens]
    assert "packed anew: they have 16 ids, not 10" in capsys.readouterr().out
    (tmp_path / "a.txt").write_text("w1 w2 w3")
    with pytest.raises(ConfigError, match="repack has no effect on texts"):
        tokenize(tmp_path / "a.txt", tmp_path / "c", words, ctx_len=2, repack=True)


def test_a_stream_that_changes_its_length(
    tmp_path: Path, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the row that is shorter, after those that decided; what the message says works."""
    monkeypatch.setattr("saemill.tokenize.source.BATCH_DOCUMENTS", 5)
    file = lines(tmp_path / "a.jsonl", [*rows(8, least=6, most=6), [5, 6]])
    with pytest.raises(DataError, match=r"row 8 of .* has 2 ids, .* say --repack to pack all rows anew"):
        tokenize(file, tmp_path / "out", words, streaming=True)
    assert tokenize(file, tmp_path / "out", words, streaming=True, repack=True, ctx_len=6).n_rows > 0
    packed = tokenize(file, tmp_path / "b", words, ctx_len=6)
    assert packed.manifest.document == "row of ids"


def test_the_frame_of_kept_rows_is_theirs(tmp_path: Path, words: str) -> None:
    """Oracle: rows that all begin with <s>, though the tokenizer has no template; rows that do not."""
    bodies = rows(9, least=7, most=7)
    framed = tokenize(lines(tmp_path / "a.jsonl", [[0, *row] for row in bodies]), tmp_path / "a", words)
    assert framed.tokenizer.prefix_ids == (0,)
    assert tokenize(lines(tmp_path / "b.jsonl", bodies), tmp_path / "b", words).tokenizer.prefix_ids == ()


def test_rows_that_the_peers_saved(tmp_path: Path, tokenizer_folder: str) -> None:
    """Oracle: the rows as SAELens' PretokenizeRunner and sparsify's chunk_and_tokenize saved them, read by
    `datasets` alone."""
    require_peers()
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in random_texts(60))
    )
    common = {"texts": tmp_path / "texts.jsonl", "tokenizer": tokenizer_folder, "ctx_len": 32}
    run_in_peers(
        tmp_path,
        {"do": "pretokenize", "out": tmp_path / "saelens", **common},
        {"do": "chunk_and_tokenize", "out": tmp_path / "sparsify", **common},
    )
    for name in ("saelens", "sparsify"):
        saved = datasets.load_from_disk(str(tmp_path / name))
        assert saved.format["type"] == "torch"
        store = tokenize(tmp_path / name, tmp_path / f"{name}-tokens", tokenizer_folder)
        assert store.ctx_len == 32
        assert store.rows(0, store.n_rows).tolist() == saved.with_format(None)["input_ids"][:]
        assert store.n_rows > 20
