"""Chats of two sources through all stages: trained and assessed on what the assistant says, by source."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chats import CHATML, chat_file, conversations, template_file
from pipeline import Pipeline

from saemill import ActivationStore, Sae
from saemill.assess.config import AssessConfig
from saemill.assess.run import run as assess
from saemill.cache.config import CacheConfig
from saemill.cache.run import run as cache
from saemill.common.errors import ConfigError
from saemill.common.stores.mask import TrainingMask
from saemill.pipeline.rows import check_rows
from saemill.tokenize.config import MixedDataset, TokenizeConfig
from saemill.tokenize.run import run as tokenize
from saemill.train.config import TrainConfig
from saemill.train.run import run as train
from saemill.train.stream.rows import TrainingRows

ROLES = ("assistant",)
SITE = "layers.1"


@pytest.fixture(scope="module")
def config(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, str], tokenizer_folder: str
) -> TrainConfig:
    """A run on what the assistant says, of two files of chats, half of each held out."""
    folder = tmp_path_factory.mktemp("chats")
    mix = tuple(
        MixedDataset(
            dataset=str(chat_file(folder / f"{name}.jsonl", conversations(170, seed))), share=share, name=name
        )
        for seed, (name, share) in enumerate({"ours": 2.0, "theirs": 1.0}.items())
    )
    tokenize(
        TokenizeConfig(
            mix=mix, chat_column="messages", chat_template=template_file(folder, CHATML), ctx_len=32,
            tokenizer=tokenizer_folder, out=folder / "tokens", held_out_fraction=0.5,
        )
    )  # fmt: skip
    cache(
        CacheConfig(
            tokens=folder / "tokens",
            model=tiny_models["neox"],
            out=folder / "acts",
            sites=(SITE,),
            device="cpu",
        )
    )
    settings = TrainConfig(
        acts=folder / "acts", out=folder / "run", site=(SITE,), k=(4,), num_latents=(64,), batch_size=128,
        lr=(3e-3,), epochs=2, device="cpu", mask=TrainingMask(roles=ROLES),
    )  # fmt: skip
    train(settings)
    return settings


def theirs(store: ActivationStore, held_out: bool) -> Any:
    """Address of each token of the assistant's on one side, by the roles and the special tokens alone."""
    tokens = store.tokens
    ids, number = tokens.rows(0, tokens.n_rows), tokens.manifest.roles.index("assistant") + 1
    kept = (tokens.roles_of(0, tokens.n_rows) == number) & ~np.isin(ids, tokens.tokenizer.special_ids)
    kept[:, 0] = False
    kept &= (tokens.held_out_R == held_out)[:, None]
    return np.flatnonzero(kept.reshape(-1))


def test_training_reads_the_roles_alone(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the roles in the token store; the mean of the activations at those addresses."""
    store = ActivationStore(config.acts)
    rows = TrainingRows(store, {SITE: store.array(SITE)}, config.mask.positions(store.mask), None)
    wanted = theirs(store, held_out=False)
    kept = np.concatenate(
        [rows.kept.of_shard(s)[np.argsort(store.permutation(s))] for s in range(store.n_shards)]
    )
    assert np.flatnonzero(kept).tolist() == wanted.tolist()
    x_TD = store.read(SITE, 0, store.n_tokens).double()[wanted]
    assert torch.allclose(rows.statistics(SITE).mean_D.double(), x_TD.mean(0), atol=1e-4)
    every = TrainingRows(store, {SITE: store.array(SITE)}, store.mask, None)
    assert every.describe() == []
    (said,) = rows.describe()
    assert f"trained on {len(wanted):,} tokens of assistant alone" in said
    assert f"of {every.n_tokens:,}" in said


def test_roles_belong_to_the_runs_identity(config: TrainConfig) -> None:
    """Oracle: another role in the same place is refused; the SAE says what it was trained on."""
    with pytest.raises(ConfigError, match=r"mask: there .*'roles': \['assistant'\]"):
        train(replace(config, mask=TrainingMask(roles=("user",))))
    sae = Sae.load(next(config.out.glob("*/cfg.json")).parent)
    assert sae.config.provenance["trained_on"] == ["assistant"]


def test_text_without_roles_is_refused_before_it_is_cached(
    config: TrainConfig, plain: Pipeline, tmp_path: Path
) -> None:
    """Oracle: the message, of training and of a pipeline's check of the tokens."""
    with pytest.raises(ConfigError, match="does not tell whose its tokens are"):
        train(replace(config, acts=plain.acts, out=tmp_path / "run"))
    with pytest.raises(ConfigError, match="does not tell whose its tokens are"):
        check_rows(
            ActivationStore(plain.acts).tokens, {"train": replace(config, max_tokens=256, epochs=None)}, True
        )


def test_figures_per_source(config: TrainConfig, tiny_models: dict[str, str], capsys: Any) -> None:
    """Oracle: FVU and L0 by dense tensors, over the assistant's held-out tokens of one source at a time; ΔCE
    of all documents is between those of the sources."""
    found = assess(
        AssessConfig(run=config.out, model=tiny_models["neox"], device="cpu", model_tokens=2000, n_latents=0)
    )
    store = ActivationStore(config.acts)
    wanted = theirs(store, held_out=True)
    assert found["data"]["n_tokens"] == len(wanted)
    assert "of these the tokens of assistant alone" in found["data"]["chosen"]
    (entry,) = found["variants"]
    assert list(entry["by_source"]) == ["ours", "theirs"]
    sae = Sae.load(config.out / entry["name"])
    documents = store.tokens.documents["source"].to_numpy()[store.tokens.document_of(wanted)]
    x_TD = store.read(SITE, 0, store.n_tokens).float()[wanted]
    top_acts, top_indices = sae.encode(x_TD)
    error_T = (x_TD - sae.decode(top_acts, top_indices)).double().square().sum(1)
    variance_T = (x_TD.double() - x_TD.double().mean(0)).square().sum(1)
    for number, figures in enumerate(entry["by_source"].values()):
        mine = documents == number
        assert figures["fvu"]["value"] == pytest.approx(
            float(error_T[mine].sum() / variance_T[mine].sum()), rel=1e-3
        )
        assert figures["l0"]["value"] == pytest.approx(
            float((top_acts[mine] > 0).sum(1).double().mean()), rel=1e-3
        )
        assert figures["fvu"]["lo"] < figures["fvu"]["value"] < figures["fvu"]["hi"]
    low, high = sorted(figures["delta_ce"]["value"] for figures in entry["by_source"].values())
    assert low <= entry["metrics"]["delta_ce"]["value"] <= high
    assert "Figures per source" in capsys.readouterr().out
    assert "Figures per source" in (config.out / "report.html").read_text()


@pytest.fixture(scope="module")
def plain(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path
) -> Pipeline:
    """A run on plain text."""
    return Pipeline(tmp_path_factory.mktemp("plain"), tiny_models["neox"], tokenizer_folder, corpus, SITE)
