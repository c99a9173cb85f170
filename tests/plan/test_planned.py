"""What a plan says beside what a real run then writes, holds and takes."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_line import call
from pipeline import Pipeline
from safetensors.torch import load_file

from saemill.assess.config import AssessConfig
from saemill.cache.config import CacheConfig
from saemill.cache.run import run as cache
from saemill.common.outlook import Outlook
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.tokens import TokenStore
from saemill.plan.child import Measured, Ran
from saemill.plan.planner import checked
from saemill.plan.probe import LIBRARIES, estimate, with_measured
from saemill.plan.run import plan
from saemill.plan.sample import sample
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.run import run as tokenize
from saemill.train.config import TrainConfig
from saemill.train.run import run as train
from saemill.train.stream.epochs import open_epochs
from saemill.train.sweep.halving import Halving, groups, work_share
from saemill.train.sweep.variant import Variant


def test_bytes_of_tokens(corpus: Path, tokenizer_folder: str, tmp_path: Path) -> None:
    """Oracle: the sizes of the shard files that the real run writes."""
    config = TokenizeConfig(
        dataset=str(corpus), tokenizer=tokenizer_folder, out=tmp_path / "tokens", ctx_len=32, max_tokens=3210
    )
    planned = checked("tokenize", config)
    tokenize(config)
    shards = [file for file in (config.out / "tokens" / "c").rglob("*") if file.is_file()]
    assert planned.disk["tokens"] == sum(file.stat().st_size for file in shards)
    assert planned.amount == TokenStore(config.out).n_tokens


def test_bytes_and_files_of_activations(made: Pipeline, tmp_path: Path) -> None:
    """Oracle: the files that the real run writes beside the copy of the tokens, the last shard padded."""
    out = tmp_path / "acts"
    config = CacheConfig(
        tokens=made.tokens, model=made.model, out=out, layers=(0, 2), shard_tokens=480, device="cpu"
    )
    planned = checked("cache", config)
    cache(config)
    for name in ("layers.0", "layers.2"):
        shards = [file for file in (out / name / "c").rglob("*") if file.is_file()]
        assert planned.disk[name] == sum(file.stat().st_size for file in shards)
    files = [f for f in out.rglob("*") if f.is_file() and "tokens" not in f.parts and "claims" not in str(f)]
    assert planned.n_files == len(files)
    tokens = sum(file.stat().st_size for file in (out / "tokens").rglob("*") if file.is_file())
    assert planned.disk["copy of the tokens"] == pytest.approx(tokens, rel=0.05)


def test_bytes_of_saes_and_checkpoints(made: Pipeline, tmp_path: Path) -> None:
    """Oracle: the tensors in the real run's files, and in the checkpoint that it leaves when stopped."""
    config = TrainConfig(
        acts=made.acts, out=tmp_path / "run", architecture=("topk", "jumprelu"), k=(4,), target_l0=(4.0,),
        num_latents=(128,), batch_size=256, n_checkpoints=1, device="cpu",
    )  # fmt: skip
    planned = checked("train", config)
    train(config)
    files = list(config.out.rglob("sae.safetensors"))
    written = sum(t.numel() * 4 for file in files for t in load_file(file).values())
    assert len(files) == 4
    assert planned.disk["SAEs"] == pytest.approx(written, rel=0.01)
    kept = sum(128 * (32 + 32) * 4 * 3 for _ in range(2))  # float32 weights and two moments of two SAEs
    assert planned.disk["two checkpoints, meanwhile"] == pytest.approx(2 * kept, rel=0.05)


def test_windows_in_memory(made: Pipeline) -> None:
    """Oracle: the bytes of the buffers that a real loader holds; a window holds the whole store here."""
    config = TrainConfig(acts=made.acts, out=Path("unused"), num_latents=(64,), batch_size=256, device="cpu")
    planned = checked("train", config)
    store = ActivationStore(made.acts)
    loader = open_epochs(
        store, ["layers.1"], store.mask, batch_tokens=256, buffer_tokens=config.buffer_tokens, seed=0
    )
    loader.batch(0)
    held = [sum(t.nbytes for t in window.result().values()) for window in loader._windows.values()]
    loader.close()
    assert len(held) == 2
    assert planned.memory["windows of the stream"] == sum(held)


def test_a_line_through_two_runs() -> None:
    """Oracle: by hand: 2 s to start, 1 s to warm up, 0.5 s anyway, 1 ms per token."""

    def ran(n_tokens: int, warm: float = 0.0) -> Ran:
        seconds = 0.5 + n_tokens / 1000 + warm
        return Ran(n_tokens, seconds, 2 * seconds)

    outlook = Outlook(stage="train", memory={LIBRARIES: 10, "windows": 5})
    measured = Measured(Ran(0, 2.0, 4.0), ran(100, warm=1.0), ran(100), ran(900), Path(), 30, outlook, 0.0)
    found = estimate(measured, 10_000)
    assert found.seconds == pytest.approx(2 + 1 + 0.5 + 10)
    assert found.cpu_seconds == pytest.approx(2 * (2 + 1 + 0.5 + 10))
    assert found.tokens_per_hour == pytest.approx(3_600_000)
    whole = with_measured(Outlook(stage="train", memory={LIBRARIES: 11, "windows": 50}), measured)
    assert whole.memory_bytes == (30 - 5) + 50


def test_work_that_halving_leaves(tmp_path: Path) -> None:
    """Oracle: the steps that are taken where Halving stops the worse half, counted."""
    names = ["a", "b", "c", "d", "e"]
    variants = [
        Variant(name=name, site="s", k=8, num_latents=64, lr=1e-3, seed=i) for i, name in enumerate(names)
    ]
    halving = Halving(tmp_path, "0" * 16, variants, 80, 3, "fvu")
    taken, before = 0, 0
    for end in halving.ends:
        taken += (end - before) * len(halving.alive)
        before = end
        if end < 80:
            losers = halving.choose({v.name: float(v.seed) for v in halving.alive})
            halving.stop(end, losers, dict.fromkeys(losers, "0" * 16))
    assert len(groups(variants)) == 1
    assert work_share(variants, 3) == pytest.approx(taken / (80 * 5))


def test_a_sample_of_rows(made: Pipeline, tmp_path: Path) -> None:
    """Oracle: each row's ids and each token's document in the original, at equal distances."""
    tokens = TokenStore(made.tokens)
    some = sample(tokens, 7, tmp_path / "sample")
    rows_R = np.arange(7) * tokens.n_rows // 7
    assert some.held_out_R.tolist() == [False, True] * 3 + [False]
    some.check_content()
    for here, row in enumerate(rows_R.tolist()):
        assert np.array_equal(some.rows(here, here + 1), tokens.rows(row, row + 1))
        places = np.arange(tokens.ctx_len)
        found = some.document_of(here * tokens.ctx_len + places)
        assert np.array_equal(found, tokens.document_of(row * tokens.ctx_len + places))


def test_a_measured_plan(
    tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Oracle: how many rows the real tokens have, which only a sample told; a time of each stage; and nothing
    is left, here or where temporary files are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    flags = f"--tokenizer {tokenizer_folder} --ctx-len 32 --layers 1 --k 4 --num-latents 64 --batch-size 256"
    told = call("plan", tiny_models["neox"], corpus, *flags.split())
    assert told.count("  time: about ") == 4
    assert "Times are estimates, from " in told
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]
    config = TokenizeConfig(dataset=str(corpus), tokenizer=tokenizer_folder, out=tmp_path / "t", ctx_len=32)
    n_rows = tokenize(config).n_rows
    planned = int(told.split(" into ")[1].split(" rows")[0].replace(",", ""))
    assert planned == pytest.approx(n_rows, rel=0.1)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_models_of_a_crosscoder_of_two(made: Pipeline, tiny_models: dict[str, str], tmp_path: Path) -> None:
    """Oracle: the weights that the real assessment holds of both models when it begins, and what training
    holds; planned from both stores, and from one that is there and one that is not."""
    other, out = tmp_path / "other", tmp_path / "run"
    caching = CacheConfig(
        tokens=made.tokens, model=made.model, out=tmp_path / "unused", layers=(1,), shard_tokens=512,
        device="cpu",
    )  # fmt: skip
    cache(replace(caching, model=tiny_models["llama"], out=other))
    training = TrainConfig(
        acts=made.acts, with_acts=other, out=out, site=("layers.1+with.layers.1",), k=(4,), num_latents=(64,),
        batch_size=256, device="cpu",
    )  # fmt: skip
    assessing = AssessConfig(run=out, device="cpu", max_tokens=512, model_tokens=512, context_tokens=512)
    planned = plan({"train": training, "assess": assessing}, measures=False)
    unmade = replace(training, acts=caching.out)
    ahead = plan({"cache": caching, "train": unmade, "assess": assessing}, measures=False)[1:]
    train(training)
    real = checked("assess", assessing)
    for (trained, _), (assessed, _) in (planned, ahead):
        assert assessed.memory["model"] == real.memory["model"]
        assert trained.memory["weights"] == 64 * (2 * 64 + 1) * 4 + 64 * 4
