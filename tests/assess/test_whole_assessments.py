"""Whole assessments of small stores: data of any kind, and damage to their files."""

import html
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from mutations import changed_bytes
from pages import texts_of
from pipeline import Pipeline

from saemill.assess.config import AssessConfig
from saemill.assess.done import is_done
from saemill.assess.run import run as assess
from saemill.common import durable, records
from saemill.common.errors import MissingError, StoreError
from saemill.common.stores import assessments
from saemill.embeddings.config import ImportConfig
from saemill.embeddings.run import run as take
from saemill.train.config import TrainConfig
from saemill.train.run import run as train


def trained(folder: Path, x: np.ndarray[Any, Any], **options: Any) -> Path:
    """A run of two small SAEs on these embeddings."""
    np.save(folder / "x.npy", x)
    take(ImportConfig(source=str(folder / "x.npy"), out=folder / "acts", **options))
    config = TrainConfig(
        acts=folder / "acts", site=("embedding",), out=folder / "run", k=(2, 4), num_latents=(24,),
        batch_size=64, epochs=1, device="cpu",
    )  # fmt: skip
    train(config)
    return folder / "run"


def matrix(n: int = 600, d: int = 8) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal((n, d)).astype(np.float32)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("small"), matrix())


@pytest.mark.parametrize("scale", [1e-25, 1e18])
def test_extreme_scales_are_assessed(tmp_path: Path, scale: float, small: Path) -> None:
    """Oracle: the assessment at scale 1, whose figures do not depend on it; JSON has no NaN."""
    run = trained(tmp_path, matrix() * np.float32(scale))
    found = assess(AssessConfig(run=run, device="cpu"))
    assert assessments.read(run) == found
    one = assess(AssessConfig(run=small, device="cpu", out=tmp_path / "one"))
    for a, b in zip(*(sorted(a["variants"], key=lambda e: e["k"]) for a in (found, one)), strict=True):
        for name in ("cosine", "norm_ratio", "l0"):
            assert a["metrics"][name]["value"] == pytest.approx(b["metrics"][name]["value"], rel=0.2)
        assert 0 < a["metrics"]["fvu"]["value"] < 1


def test_one_passage_has_no_fvu(tmp_path: Path) -> None:
    """Oracle: one held-out passage; words: passages, no tokens or documents."""
    for fraction in np.arange(0.001, 0.05, 0.001):
        store_folder = tmp_path / "acts"
        np.save(tmp_path / "x.npy", matrix())
        out = tmp_path / f"acts-{fraction:.3f}"
        store = take(ImportConfig(source=str(tmp_path / "x.npy"), out=out, held_out_fraction=float(fraction)))
        if store.text.held_out_R.sum() == 1:
            out.rename(store_folder)
            break
    config = TrainConfig(
        acts=store_folder, site=("embedding",), out=tmp_path / "run", k=(2,), num_latents=(24,),
        batch_size=64, epochs=1, device="cpu",
    )  # fmt: skip
    train(config)
    found = assess(AssessConfig(run=tmp_path / "run", device="cpu"))
    figures = found["variants"][0]["metrics"]
    assert figures["fvu"]["value"] is None
    assert figures["fvu"]["reason"] == "one passage has no variance to explain"
    assert figures["mse"]["reason"] == "only 1 distinct passage; an interval needs 30"
    dead = next(check for check in found["variants"][0]["checks"] if check["name"] == "dead_fraction")
    assert dead["value"] > 0.2
    assert dead["passed"] is None
    assert dead["reason"] == "a latent that fires on 0.05% of the passages is seen on 2,000 or more, not 1"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "no FVU: one passage has no variance to explain" in page
    for word in ("token", "document"):
        assert word not in texts_of(page).lower()


def test_what_the_store_lost_and_long_rows_are_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the planted dimension and rows, told by the import, the plan, the assessment and its page; the
    cure of the message, followed, helps."""
    x = matrix()
    x[:, 3] += 1000
    x[::40] *= 100
    x[::40, 3] = 1000
    found = assess(AssessConfig(run=trained(tmp_path, x, dtype="bf16"), device="cpu"))
    place = found["data"]["sites"]["embedding"]
    assert place["unheld"] == [3]
    assert place["n_far"] > 0
    unheld, far = found["data"]["notes"]
    assert unheld.startswith("embedding: bf16 cannot hold 1 dimension of 8 (3)")
    assert "--dtype fp32" in unheld
    assert far.startswith(
        f"embedding: {place['n_far']} of {found['data']['n_tokens']} passages are more than 10"
    )
    assert "of the squared error; its FVU without them is" in far
    said = capsys.readouterr().out.splitlines()
    told = [line for line in said if line.startswith("embedding: bf16 cannot hold 1 dimension of 8 (3)")]
    assert len(told) == 3  # by the import, the plan, below the table
    assert sum("of the passages are more than 10 times as far" in line for line in said) == 2
    page = (tmp_path / "run" / "report.html").read_text()
    assert html.escape(unheld) in page
    (tmp_path / "again").mkdir()
    again = assess(AssessConfig(run=trained(tmp_path / "again", x, dtype="fp32"), device="cpu"))
    assert again["data"]["sites"]["embedding"]["unheld"] == []


def test_a_bidirectional_model_with_a_causal_head_has_no_losses(
    tmp_path: Path, tokenizer_folder: str, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: BERT attends to both sides, though its class is called BertLMHeadModel; a planted dimension
    that the cache's bf16 loses."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=8192, max_position_embeddings=64, **shape)
    model = transformers.BertLMHeadModel(config)
    model.bert.encoder.layer[0].output.LayerNorm.bias.data[3] = 1000
    model.save_pretrained(tmp_path / "model")
    made = Pipeline(tmp_path, str(tmp_path / "model"), tokenizer_folder, corpus, "encoder.layer.0")
    cached = next(line for line in capsys.readouterr().out.splitlines() if "cannot hold" in line)
    assert cached.startswith("encoder.layer.0: bf16 cannot hold 1 dimension of 32 (3)")
    found = assess(AssessConfig(run=made.out, device="cpu", model_tokens=2000, n_latents=0))
    metrics = found["variants"][0]["metrics"]
    assert metrics["kl"]["value"] > 0
    for name in ("delta_ce", "loss_recovered", "ce_clean", "ce_zero"):
        assert metrics[name]["value"] is None
        assert metrics[name]["reason"].endswith("so it has no next-token loss")
    assert found["best_on_other_documents"]["chosen_by"] == "fvu"
    assert found["variants"][0]["checks"][0]["passed"] is None
    assert found["data"]["n_tokens_with_losses"] > 0


def changed(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
        return
    if how == "bit":
        content[len(content) // 2] ^= 4
    elif how == "cut":
        del content[len(content) // 2 :]
    else:
        content[:] = bytes(len(content))
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["bit", "cut", "zeros", "missing"])
@pytest.mark.parametrize(
    "name",
    ["final_assessment.json", "documents.parquet", "latents.parquet", "features.json", "report.html"],
)
def test_a_damaged_assessment_is_found_and_made_again(
    small: Path, tmp_path: Path, name: str, how: str
) -> None:
    """Oracle: the assessment that was whole; `is_done` says whether it is to be made again."""
    config = AssessConfig(run=small, device="cpu", out=tmp_path / "out", n_latents=0)
    if not (small / "kept").exists():
        assess(AssessConfig(run=small, device="cpu", out=small / "kept", n_latents=0))
    (tmp_path / "out").mkdir()
    for file in (small / "kept").iterdir():
        (tmp_path / "out" / file.name).write_bytes(file.read_bytes())
    assert is_done(config)
    changed(tmp_path / "out" / name, how)
    assert not is_done(config)
    if name == assessments.FILE:
        with pytest.raises(
            MissingError if how == "missing" else StoreError, match="Run `saemill assess` again"
        ):
            assessments.read(tmp_path / "out")
    else:
        assert [problem.partition(":")[0] for problem in assessments.problems(tmp_path / "out")] == [
            str(tmp_path / "out" / name)
        ]


def test_two_assessments_of_one_folder_do_not_mix(small: Path, tmp_path: Path) -> None:
    """Oracle: while another holds the folder, it is refused and nothing is written."""
    out = tmp_path / "out"
    with durable.exclusive(out), pytest.raises(StoreError, match="another process is writing to"):
        assess(AssessConfig(run=small, device="cpu", out=out))
    assert list(out.iterdir()) == []


def limited(action: str, small: Path, out: Path) -> "subprocess.CompletedProcess[str]":
    """An assessment in another process that runs into `action` while it writes."""
    script = (
        "import os, resource, signal, sys; from pathlib import Path\n"
        "from saemill.assess import run as stage, write\n"
        f"{action}\n"
        "stage.run(stage.AssessConfig(run=Path(sys.argv[1]), out=Path(sys.argv[2]), device='cpu'))"
    )
    return subprocess.run(
        [sys.executable, "-c", script, str(small), str(out)], capture_output=True, text=True
    )


FULL = (
    "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))"
)
KILLED = "write.write_html = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"


def contents(out: Path) -> dict[str, bytes]:
    """The files below a folder; what is half written counts as nothing."""
    files = {str(file.relative_to(out)): file for file in out.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in files.items() if not name.startswith(".")}


@pytest.mark.parametrize(("action", "told"), [(FULL, "no room on the disk for"), (KILLED, "")])
def test_an_assessment_that_ends_early_leaves_the_old_one(
    small: Path, tmp_path: Path, action: str, told: str
) -> None:
    """Oracle: the files that were there, byte for byte; the next assessment clears the rest away."""
    out = tmp_path / "out"
    assess(AssessConfig(run=small, device="cpu", out=out))
    before = contents(out)
    done = limited(action, small, out)
    assert done.returncode != 0
    assert told in done.stderr
    assert contents(out) == before
    if told:
        assert list(out.glob(durable.PARTIAL)) == []
    assess(AssessConfig(run=small, device="cpu", out=out))
    assert contents(out).keys() == before.keys()
    assert list(out.glob(durable.PARTIAL)) == []
    assert assessments.problems(out) == []


def test_a_mutated_assessment_is_refused_in_words(small: Path, tmp_path: Path) -> None:
    """Oracle: 400 mutations: the assessment that was written comes back, or a StoreError does."""
    found = assess(AssessConfig(run=small, device="cpu", out=tmp_path, n_latents=2))
    raw = (tmp_path / assessments.FILE).read_bytes()
    chance = random.Random(0)
    for _ in range(400):
        (tmp_path / assessments.FILE).write_bytes(changed_bytes(raw, chance))
        try:
            assert assessments.read(tmp_path) == found
        except StoreError:
            continue
    values = json.loads(raw)
    values["variants"][0]["metrics"]["fvu"]["value"] = None
    del values["checksum"]
    (tmp_path / assessments.FILE).write_text(json.dumps(records.sealed(values)))
    with pytest.raises(StoreError, match="a figure that is null needs a reason"):
        assessments.read(tmp_path)
