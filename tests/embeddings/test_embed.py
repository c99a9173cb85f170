"""`saemill embed`: texts through a tiny encoder of sentence-transformers."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch
import transformers
from command_line import call
from crashes import check_crashes, file_hashes
from object_store import S3
from texts import bert_tokenizer

from saemill.common.errors import ConfigError
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.passages import PassageStore
from saemill.embeddings.config import EmbedConfig
from saemill.embeddings.embed import outlook, run
from saemill.show import describe

TEXTS = [f"the cat number {i} sat on {'a mat ' * (i % 7)}while dogs ran" for i in range(50)]


@pytest.fixture(scope="module")
def encoder(tiny_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Mean pooling over a random BERT of width 32."""
    folder = tmp_path_factory.mktemp("encoder")
    transformers.AutoModel.from_pretrained(tiny_models["bert"]).save_pretrained(folder)
    bert_tokenizer(folder)
    return str(folder)


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": t, "id": 100 + i}) + "\n" for i, t in enumerate(TEXTS)))
    return file


def embed(corpus: Path, encoder: str, out: Path, **options: Any) -> ActivationStore:
    return run(EmbedConfig(dataset=str(corpus), model=encoder, out=out, device="cpu", **options))


def test_sources_of_the_texts_are_kept(encoder: str, tmp_path: Path) -> None:
    """Oracle: the column that was written."""
    sources = [["b", "a"][i % 2] for i in range(20)]
    lines = [json.dumps({"text": t, "of": s}) + "\n" for t, s in zip(TEXTS[:20], sources, strict=True)]
    (tmp_path / "texts.jsonl").write_text("".join(lines))
    passages = embed(tmp_path / "texts.jsonl", encoder, tmp_path / "acts", source_column="of").text
    assert isinstance(passages, PassageStore)
    numbers = passages.documents["source"].to_numpy()[passages.document_of(np.arange(20))]
    assert [passages.manifest.sources[number] for number in numbers] == sources


def test_texts_are_embedded_to_a_bucket(s3: S3, corpus_file: Path, encoder: str, tmp_path: Path) -> None:
    """Oracle: the store on a disk, file by file; the same call again finds it whole."""
    options: dict[str, Any] = {"shard_rows": 16, "batch_size": 4, "compression": "lz4", "dtype": "int8"}
    expected = file_hashes(embed(corpus_file, encoder, tmp_path / "acts", **options).path)
    for _ in range(2):
        embed(corpus_file, encoder, Path("s3://bucket/embedded"), **options)
        s3.fetch("embedded", tmp_path / "fetched")
        assert file_hashes(tmp_path / "fetched") == expected


@pytest.mark.parametrize(("prompt", "normalize"), [(None, False), ("passage: ", True)])
def test_vectors_are_those_of_the_encoder(
    corpus_file: Path, encoder: str, tmp_path: Path, prompt: str | None, normalize: bool
) -> None:
    """Oracle: sentence-transformers itself, one text at a time; the texts and ids that were written."""
    out = tmp_path / "acts"
    store = embed(
        corpus_file,
        encoder,
        out,
        prompt=prompt,
        normalize=normalize,
        shard_rows=16,
        batch_size=4,
        max_rows=40,
    )
    model = sentence_transformers.SentenceTransformer(encoder, device="cpu")
    expected = torch.stack(
        [
            model.encode(text, prompt=prompt, normalize_embeddings=normalize, convert_to_tensor=True)
            for text in TEXTS[:40]
        ]
    )
    torch.testing.assert_close(store.read("embedding", 0, 40), expected.cpu(), rtol=1e-4, atol=1e-5)
    passages = store.text
    assert isinstance(passages, PassageStore)
    assert [passages.passage(i) for i in range(40)] == [(str(100 + i), TEXTS[i]) for i in range(40)]
    assert store.settings.model == encoder
    assert f" by {encoder}" in describe(out)


def test_a_crash_at_any_shard_leaves_a_store_that_is_finished_later(
    corpus_file: Path, encoder: str, tmp_path: Path
) -> None:
    """Oracle: the store of a run without a crash, file by file."""
    options = {"shard_rows": 20, "batch_size": 4}
    check_crashes(lambda out: embed(corpus_file, encoder, out, **options), tmp_path, start=3, stride=5)


def test_mistakes_are_refused(
    corpus_file: Path, encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the messages."""
    out = tmp_path / "acts"
    with pytest.raises(ConfigError, match=r"has no column 'body'; it has text, id"):
        embed(corpus_file, encoder, out, text_column="body")
    with pytest.raises(ConfigError, match=r"cannot load the model './gone': no such folder"):
        embed(corpus_file, "./gone", out)
    embed(corpus_file, encoder, out)
    with pytest.raises(ConfigError, match="prompt: there None, now 'q: '"):
        embed(corpus_file, encoder, out, prompt="q: ")
    other = transformers.AutoModel.from_pretrained(encoder)
    other.embeddings.word_embeddings.weight.data += 1
    other.save_pretrained(tmp_path / "other")
    bert_tokenizer(tmp_path / "other")
    with pytest.raises(ConfigError, match="model_fingerprint: there"):
        embed(corpus_file, str(tmp_path / "other"), out)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match=r"needs sentence-transformers: pip install 'saemill\[embed\]'"):
        embed(corpus_file, encoder, tmp_path / "new")


def test_a_dry_run_tells_what_is_written(corpus_file: Path, encoder: str, tmp_path: Path) -> None:
    """Oracle: the bytes of the shards and the number of files afterwards; the dry run leaves nothing."""
    config = EmbedConfig(
        dataset=str(corpus_file), model=encoder, out=tmp_path / "acts", shard_rows=16, max_rows=40,
        device="cpu",
    )  # fmt: skip
    flags = ["--shard-rows=16", "--max-rows=40", "--device=cpu", "--dry-run"]
    told = call("embed", corpus_file, "--model", encoder, "-o", config.out, *flags)
    assert not config.out.exists()
    planned = outlook(config)
    assert "\n".join(planned.lines()) in told
    store = run(config)
    assert planned.amount == store.n_tokens == 40
    shards = sum(file.stat().st_size for file in store.path.glob("embedding/c/*/0"))
    assert planned.disk["embedding"] == shards
    assert planned.n_files == len(file_hashes(store.path))
