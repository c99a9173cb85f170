"""Small models and texts that several tests share; nothing is fetched."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from interpreting import interpret

if not torch.cuda.is_available():
    interpret()

import transformers
from hub import Hub, take_for_the_hub
from object_store import S3, serving
from peers import end_peers
from texts import random_texts

from saemill.common.stores import objects
from saemill.demo import MODEL

# A busy machine changes nothing: no example has to end within a time.
hypothesis.settings.register_profile("saemill", deadline=None)
hypothesis.settings.load_profile("saemill")

LONGEST = (
    "placement", "demo", "tutorial", "slurm", "contract", "assess_processes", "workers", "cache_damaged",
    "together", "quality", "kernels_compile", "planned", "run", "buckets", "halving", "train_transcoders",
    "held_out", "members", "others", "wandb", "assess", "probed_runs", "train", "matrix", "push",
)  # fmt: skip
"""Names of files, that of the longest first, as a run of all on two cores took."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that no worker is left alone with one at the end."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sums in the same order on both sides of a comparison; and small products gain nothing from threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def bucket_server() -> Iterator[S3]:
    """A server that speaks S3."""
    with serving() as server:
        yield server


@pytest.fixture
def s3(bucket_server: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """The server with an empty bucket and without faults. The environment leads there; no mirror is left from
    elsewhere, and attempts follow one another at once."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in bucket_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(objects, "FIRST_WAIT_SECONDS", 0.0)
    bucket_server.empty()
    bucket_server.calm()
    yield bucket_server
    bucket_server.calm()


@pytest.fixture(scope="module", autouse=True)
def _no_peers_stay() -> Iterator[None]:
    """Their process takes memory that other files' tests need."""
    yield
    end_peers()


@pytest.fixture(scope="session")
def tokenizer_folder() -> str:
    """A byte-level BPE tokenizer with 8,192 ids and EOS 0."""
    return str(MODEL)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 documents as jsonl."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in random_texts(400)))
    return path


def _config(kind: str) -> transformers.PretrainedConfig:
    vocab, width = 8192, 32
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if kind == "neox":
        return transformers.GPTNeoXConfig(
            vocab_size=vocab,
            hidden_size=width,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=128,
            **special,
        )
    if kind == "llama":
        return transformers.LlamaConfig(
            vocab_size=vocab,
            hidden_size=width,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=128,
            **special,
        )
    if kind == "gpt2":
        return transformers.GPT2Config(
            vocab_size=vocab, n_embd=width, n_layer=3, n_head=4, n_positions=128, **special
        )
    return transformers.BertConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
    )


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Random 3-layer models of width 32 with LM head: neox, llama, gpt2, bert; saved to folders.

    Their parameters are larger than at initialisation, so that activations differ clearly.
    """
    folders = {}
    for kind in ("neox", "llama", "gpt2", "bert"):
        torch.manual_seed(1)
        auto = transformers.AutoModelForMaskedLM if kind == "bert" else transformers.AutoModelForCausalLM
        model = auto.from_config(_config(kind))
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.data.mul_(5)
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        folders[kind] = str(folder)
    return folders


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, asked in place of the real one; whoever asks may write."""
    with Hub() as served:
        take_for_the_hub(served, tmp_path / "hub-home", monkeypatch)
        yield served
