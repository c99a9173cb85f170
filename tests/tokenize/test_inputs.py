"""Documents from every kind of file and folder, and what is said where there are none."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from packing import TEXTS, check_documents, check_rows, in_folder, jsonl, tokenize

from saemill.common.errors import ConfigError, DataError, SaemillError
from saemill.common.stores.permutation import permutation
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.run import run


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
