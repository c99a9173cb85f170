"""Samples of language models: each token by its definition, the same after a stop, datasets of one size."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from generating import NEVER, config, load, read
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from saemill import TokenStore, cli
from saemill.common.errors import ConfigError, Interrupted
from saemill.common.stores.permutation import combine
from saemill.demo import MODEL
from saemill.generate import run as module
from saemill.generate.dataset import rows_of, trimmed
from saemill.generate.run import run
from saemill.generate.sampling import Frame, Sampler, frame_of, sample, uniforms
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.run import run as tokenize


@pytest.mark.parametrize("kind", ["demo", "other"])
def test_every_token_is_the_one_that_its_random_number_chooses(kind: str, other: str) -> None:
    """Oracle: for every prefix a forward pass of transformers without cache, the nucleus by sorting in
    float64, and the interval of the cumulative probabilities that holds the number."""
    name = str(MODEL) if kind == "demo" else other
    temperature, top_p = 0.8, 0.9
    u_RS = uniforms("x", 3, 5, 6, 20)
    samples = sample(load(name), Frame(0, ()), u_RS, temperature, top_p, NEVER)
    model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    with torch.no_grad():
        logits_RSW = model(torch.tensor([[0, *ids[:-1]] for ids in samples]), use_cache=False).logits
    p_RSW = torch.softmax(logits_RSW.double() / temperature, -1).numpy()
    assert [len(ids) for ids in samples] == [20] * 6
    for ids, p_SW, u_S in zip(samples, p_RSW, u_RS.numpy(), strict=True):
        for token, p_W, u in zip(ids, p_SW, u_S, strict=True):
            order = np.argsort(-p_W)
            n_kept = int(np.searchsorted(np.cumsum(p_W[order]), top_p)) + 1
            assert p_W[token] >= p_W[order[n_kept - 1]] - 1e-6
            kept_W = np.where(p_W >= p_W[order[n_kept - 1]], p_W, 0)
            sums_W = np.cumsum(kept_W) / kept_W.sum()
            assert sums_W[token] - kept_W[token] / kept_W.sum() - 1e-4 <= u < sums_W[token] + 1e-4


def test_tokens_come_as_often_as_they_are_probable() -> None:
    """Oracle: softmax, on evenly spaced numbers; without top-p no token is left out, however rare."""
    n = 4000
    scores = torch.randn(7, generator=torch.Generator().manual_seed(0))
    u_R1 = ((torch.arange(n) + 0.5) / n)[:, None].double()
    sampler = Sampler(u_R1, 1.0, 1.0, NEVER)
    chosen_R = sampler(torch.zeros(n, 1, dtype=torch.int64), scores.expand(n, -1)).argmax(1)
    found = torch.bincount(chosen_R, minlength=7) / n
    torch.testing.assert_close(found, scores.softmax(0), atol=2 / n, rtol=0)


def test_the_largest_number_chooses_a_possible_token() -> None:
    """Oracle: the only tokens that are not impossible."""
    scores = torch.full((2, 9), -torch.inf)
    scores[:, 2], scores[:, 5] = 1.0, 0.3
    u_R1 = torch.tensor([[0.0], [1 - 2.0**-48]], dtype=torch.float64)
    chosen = Sampler(u_R1, 1.0, 1.0, NEVER)(torch.zeros(2, 1, dtype=torch.int64), scores).argmax(1)
    assert chosen.tolist() == [2, 5]


@pytest.mark.parametrize("change", [{"temperature": 1e-4}, {"top_p": 1e-9}])
def test_at_the_limit_samples_are_the_greedy_text(change: dict[str, float], tmp_path: Path) -> None:
    """Oracle: transformers' greedy generate from BOS."""
    run(config(tmp_path / "out", n_samples=3, **change))
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    greedy = model.generate(torch.tensor([[0]]), max_new_tokens=12, do_sample=False)[0, 1:].tolist()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    rows = read(tmp_path / "out" / "model.parquet")
    assert [row["input_ids"] for row in rows] == [greedy] * 3
    assert {row["text"] for row in rows} == {tokenizer.decode(greedy)}


def test_numbers_are_those_of_philox_and_differ_by_model_seed_and_sample() -> None:
    """Oracle: numpy's Philox, keyed here; pinned values, as a seed must give the same samples for ever."""
    rows = uniforms("a", 1, 4, 3, 50)
    assert torch.equal(uniforms("a", 1, 5, 1, 30)[0], rows[1, :30])
    others = [uniforms("b", 1, 4, 3, 50), uniforms("a", 2, 4, 3, 50)]
    assert len({tuple(row.tolist()) for part in (rows, *others) for row in part}) == 9
    assert rows.min() >= 0
    assert rows.max() < 1
    key = combine(1, 16629034431890738719)  # xxh3 of "a"
    raw = np.random.Philox(key=[key, 4]).random_raw(2) >> 16
    assert rows[0, :2].tolist() == [int(value) / 2**48 for value in raw]


def test_samples_do_not_depend_on_their_batch(tmp_path: Path) -> None:
    """Oracle: every sample alone."""
    run(config(tmp_path / "one", batch_size=1))
    run(config(tmp_path / "seven", batch_size=7))
    run(config(tmp_path / "seed", seed=43))
    rows = read(tmp_path / "one" / "model.parquet")
    assert [row["sample"] for row in rows] == list(range(10))
    assert rows == read(tmp_path / "seven" / "model.parquet")
    assert rows != read(tmp_path / "seed" / "model.parquet")


def test_a_stopped_run_goes_on_to_the_same_bytes(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: an uninterrupted run; what is sampled again after the stop is counted."""
    models = (str(MODEL), other)
    run(config(tmp_path / "whole", *models))
    calls: list[int] = []

    def stopped_in_the_fifth(*arguments: Any) -> list[list[int]]:
        calls.append(len(calls))
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(*arguments)

    monkeypatch.setattr(module, "sample", stopped_in_the_fifth)
    with pytest.raises(Interrupted, match="4 samples of other; the same command continues") as stopped:
        run(config(tmp_path / "out", *models))
    assert stopped.value.exit_code == 75
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="seed: there 42, now 7"):
        run(config(tmp_path / "out", *models, seed=7))
    run(config(tmp_path / "out", *models))
    assert len(calls) == 5 + 2  # of 3 + 3 batches the fifth twice
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert files == ["manifest.yaml", "model.parquet", "other.parquet"]
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_sample_ends_before_its_first_end() -> None:
    """Oracle: the same sample without ends, cut here."""
    model, u_RS = load(str(MODEL)), uniforms("x", 0, 0, 8, 30)
    whole = sample(model, Frame(0, ()), u_RS, 1.0, 1.0, NEVER)
    ends = (whole[0][10], whole[3][4])
    cut = sample(model, Frame(0, ends), u_RS, 1.0, 1.0, NEVER)
    firsts = [min((ids.index(end) for end in ends if end in ids), default=len(ids)) for ids in whole]
    assert cut == [ids[:first] for ids, first in zip(whole, firsts, strict=True)]
    assert min(map(len, cut)) < 30


def test_all_datasets_have_the_same_number_of_tokens(other: str, tmp_path: Path) -> None:
    """Oracle: the samples of each model alone, cut here to the smaller total."""
    out = tmp_path / "both"
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    manifest = run(config(out, str(MODEL), other, n_samples=20, max_tokens=30))
    alone = {}
    for name, model in (("model", str(MODEL)), ("other", other)):
        run(config(tmp_path / name, model, n_samples=20, max_tokens=30))
        alone[name] = read(tmp_path / name / f"{name}.parquet")
    totals = {name: sum(row["n_tokens"] for row in rows) for name, rows in alone.items()}
    assert manifest.tokens_per_dataset == min(totals.values()) < max(totals.values())
    for name, rows in alone.items():
        found = read(out / f"{name}.parquet")
        ids = [token for row in rows for token in row["input_ids"]]
        assert [t for row in found for t in row["input_ids"]] == ids[: manifest.tokens_per_dataset]
        assert found[:-1] == rows[: len(found) - 1]
        assert found[-1]["text"] == tokenizer.decode(found[-1]["input_ids"])
        assert all(row["n_tokens"] == len(row["input_ids"]) for row in found)


@given(
    lengths=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=5),
    data=st.data(),
)
def test_trimming_keeps_the_first_tokens(lengths: list[list[int]], data: st.DataObject) -> None:
    """Oracle: the concatenated ids, cut by a slice; every sample but the last is whole."""
    flat = [n for table in lengths for n in table]
    if sum(flat) == 0:
        return
    n_tokens = data.draw(st.integers(1, sum(flat)))
    numbers = iter(range(sum(flat)))
    samples = [[next(numbers) for _ in range(n)] for n in flat]
    tables, first = [], 0
    for part in lengths:
        tables.append(rows_of(samples[first : first + len(part)], first, str))
        first += len(part)
    rows = pa.concat_tables(trimmed(iter(tables), n_tokens, str)).to_pylist()
    assert [token for row in rows for token in row["input_ids"]] == list(range(n_tokens))
    assert [row["sample"] for row in rows] == list(range(len(rows)))
    assert [row["input_ids"] for row in rows[:-1]] == samples[: len(rows) - 1]
    assert rows[-1]["n_tokens"] > 0
    assert [row["text"] for row in rows] == [str(row["input_ids"]) for row in rows]


def test_samples_until_there_are_enough_tokens(tmp_path: Path) -> None:
    """Oracle: the longer dataset of a given number of samples."""
    manifest = run(config(tmp_path / "n", n_samples=None, tokens_per_dataset=100))
    assert manifest.tokens_per_dataset == 100
    run(config(tmp_path / "more", n_samples=20))
    ids, more = (
        [token for row in read(tmp_path / name / "model.parquet") for token in row["input_ids"]]
        for name in ("n", "more")
    )
    assert ids == more[:100]


def test_saemill_tokenizes_the_texts_and_the_ids(tmp_path: Path) -> None:
    """Oracle: the samples' ids joined by the separator."""
    out = tmp_path / "out"
    arguments = ["--model", str(MODEL), "--n-samples", "20", "--max-tokens", "16", "-o", str(out)]
    result = CliRunner().invoke(cli.app, ["generate", *arguments], catch_exceptions=False)
    assert "320 tokens each in model.parquet (20 samples)" in result.output
    rows = read(out / "model.parquet")
    stream = [token for row in rows for token in (*row["input_ids"], 0)]
    common = {"tokenizer": str(MODEL), "ctx_len": 20, "shuffle_seed": None, "held_out_fraction": 0.0}
    for dataset, column in ((out / "model.parquet", "input_ids"), (out, "input_ids"), (out, "text")):
        folder = tmp_path / f"{dataset.name}-{column}"
        tokenize(TokenizeConfig(dataset=str(dataset), text_column=column, out=folder, **common))
        store = TokenStore(folder)
        if column == "input_ids":
            assert store.rows(0, store.n_rows).reshape(-1).tolist() == stream[: store.n_tokens]
        assert store.manifest.n_documents >= 19


def test_where_samples_begin_and_end() -> None:
    """Oracle: the ids given to a tokenizer and a config here."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = transformers.LlamaConfig(bos_token_id=1, eos_token_id=[7, 9])
    assert frame_of(tokenizer, model, "m", True) == Frame(0, (0, 7, 9))
    assert frame_of(tokenizer, model, "m", False) == Frame(0, ())
    tokenizer.bos_token, model.eos_token_id = None, None
    assert frame_of(tokenizer, model, "m", True) == Frame(0, (0,))
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="neither a BOS nor an EOS"):
        frame_of(tokenizer, model, "m", True)
    tokenizer.bos_token = "the"
    with pytest.raises(ConfigError, match="--no-stop-at-eos"):
        frame_of(tokenizer, model, "m", True)
