"""Tokenizers, a store, and a cache of `datasets` that goes with the tests."""

from collections.abc import Iterator
from typing import Any

import datasets
import pytest
import transformers
from packing import TEXTS, jsonl, tokenize
from texts import WORDS

from saemill.common.stores.tokens import TokenStore
from saemill.tokenize import row_files


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
        patch.setattr(row_files, "SHARD_TOKENS", 160)
        file = jsonl(folder / "texts.jsonl", TEXTS)
        return tokenize(file, folder / "out", tokenizer_folder, ctx_len=16, held_out_fraction=0.2)
