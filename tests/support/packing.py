"""Documents in files, a run of `tokenize` over them, and naive packing to compare it with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
import xxhash
from texts import random_texts

from saemill.common.stores.permutation import combine
from saemill.common.stores.tokens import TokenStore
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.run import run

TEXTS = [*random_texts(60, seed=3, words=40), 'Zeile „eins“, "zwei"\nthird\tline', "naïve, 𝛼 ≤ β; it's"]
Rows = list[tuple[list[int], list[int]]]


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


def in_folder(write: Callable[[Path, list[str]], Path], suffix: str) -> Callable[[Path, list[str]], Path]:
    """Three files of one kind in a folder, beside a file of no known kind."""

    def written(folder: Path, texts: list[str]) -> Path:
        (folder / "many").mkdir()
        for i, part in enumerate((texts[:10], texts[10:15], texts[15:])):
            write(folder / "many" / f"part{i}{suffix}", part)
        (folder / "many" / "LICENSE").write_text("not data")
        return folder / "many"

    return written


def word_tokenizer(folder: Path, ids: dict[str, int], eos: bool = True) -> str:
    """A tokenizer of whole words with the given ids."""
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>"} if eos else {}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", **special)
    made.save_pretrained(folder)
    return str(folder)
