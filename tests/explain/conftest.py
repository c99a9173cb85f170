"""A run whose latents fire on one word each, as planted."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from pipeline import Pipeline

from saemill import Sae
from saemill.assess.config import AssessConfig
from saemill.assess.run import run as assess
from saemill.common import records
from saemill.common.sae.formats import seal
from saemill.common.stores import runs
from saemill.common.stores.activations import ActivationStore

N_LATENTS, N_WORDS = 128, 160
SAE = "embed_in-k16-f128-s0-lr0.003"


def words_of(tokenizer_folder: str) -> dict[str, int]:
    """Words that are one token each, with a space before them: the word, and its id."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    texts = {tokenizer.decode([id_]): id_ for id_ in range(1, tokenizer.vocab_size)}
    words = {
        text[1:]: id_
        for text, id_ in texts.items()
        if text[:1] == " " and text[1:].isalpha() and len(text) > 5
    }
    return dict(sorted(words.items())[:N_WORDS])


@pytest.fixture(scope="session")
def words(tokenizer_folder: str) -> dict[str, int]:
    found = words_of(tokenizer_folder)
    assert len(found) == N_WORDS
    return found


@pytest.fixture(scope="session")
def planted(
    tiny_models: dict[str, str],
    tokenizer_folder: str,
    words: dict[str, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """An assessed run at the token embeddings, whose SAE is put in: latent i fires on word i alone, of the
    words in alphabetical order."""
    folder = tmp_path_factory.mktemp("planted")
    generator = random.Random(0)
    texts = ["".join(f" {word}" for word in generator.choices(list(words), k=30)) for _ in range(300)]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    made = Pipeline(folder, tiny_models["neox"], tokenizer_folder, corpus, "embed_in")
    _put_in(made, list(words.values())[:N_LATENTS])
    assess(
        AssessConfig(run=made.out, device="cpu", with_model=False, variant=SAE, n_latents=20, latents=(3, 5))
    )
    return made.out


def _put_in(made: Pipeline, ids: list[int]) -> None:
    """Replace the weights of an SAE: its encoder rows are the embeddings of these tokens."""
    store, finished = ActivationStore(made.acts), runs.finished(made.out)
    ids_T = torch.from_numpy(store.tokens.rows(0, store.text.n_rows).astype("int64")).flatten()
    x_TD = store.read("embed_in", 0, store.n_tokens).float()
    e_FD = torch.stack([x_TD[(ids_T == id_).nonzero()[0, 0]] for id_ in ids])
    parts = Sae.load(made.out / SAE).parts
    sae = Sae.of(
        replace(
            parts,
            config=replace(parts.config, k=None, architecture="jumprelu"),
            W_enc=e_FD / e_FD.square().sum(1, keepdim=True),
            b_enc=torch.zeros(len(ids)),
            W_dec=e_FD,
            b_dec=torch.zeros(e_FD.shape[1]),
            threshold=torch.full((len(ids),), 0.95),
        )
    )
    fires_TF = sae.pre_acts(x_TD) > 0.95
    assert torch.equal(fires_TF, ids_T[:, None] == torch.tensor(ids)), "each fires on its word alone"
    sae.save(made.out / SAE)
    cfgs = finished.cfgs | {SAE: seal.checksum(made.out / SAE)}
    records.write(made.out / runs.FINISHED, finished.model_copy(update={"cfgs": cfgs}))
