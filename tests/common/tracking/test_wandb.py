"""wandb: what is in the files that it wrote, and that nothing ever waits for it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pipeline import Pipeline
from stores import make_store
from training import D, config, files, killed_at, structured
from waiting import LIMIT_SECONDS
from wandb_files import Written, written
from wandb_server import server

from saemill.assess.config import AssessConfig
from saemill.assess.run import run as assess
from saemill.common.errors import ConfigError, Interrupted
from saemill.common.stores import features
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.runs import WANDB_LOGGED
from saemill.common.tracking import process
from saemill.common.tracking.assessment import _summary
from saemill.train.config import TrainConfig
from saemill.train.run import run
from saemill.train.trainer import Trainer

KEY = "0123456789abcdef0123456789abcdef01234567"
ONE: dict[str, Any] = {"k": (4,), "num_latents": (48,), "log_to_wandb": True}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    folder = tmp_path_factory.mktemp("wandb")
    return make_store(folder, n_rows=256, ctx_len=32, d=D, shard_tokens=2048, values_TD=structured(256 * 32))


@pytest.fixture(scope="module")
def plain(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run without wandb leaves."""
    out = tmp_path_factory.mktemp("plain") / "r"
    run(config(store, out, **ONE | {"log_to_wandb": False}))
    return files(out)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """wandb as on a machine that has no key and no network."""
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_MODE", "offline")


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def points(part: Written) -> list[dict[str, Any]]:
    """The history without wandb's own values; the step must be the number of tokens."""
    for row in part.history:
        assert row["_step"] == row["tokens"]
    return [{k: v for k, v in row.items() if not k.startswith("_")} for row in part.history]


def expected(record: dict[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k != "variants"} | record["variants"][name]


def test_one_run_per_variant_in_a_group(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: metrics.jsonl and the variants' own cfg.json, beside wandb's run files; `wandb sync`."""
    out = tmp_path / "r"
    folders = run(
        config(
            store, out, log_to_wandb=True, wandb_project="p", wandb_entity="me", run_name="sweep",
            wandb_log_frequency=10, wandb_artifacts=True,
        )
    )  # fmt: skip
    found = written(out)
    assert sorted(found) == sorted(f"r/{folder.name}" for folder in folders)
    due = [line for line in lines(out) if line["step"] in (10, 20, 24)]
    for folder in folders:
        (part,) = found[f"r/{folder.name}"]
        told = (part.run.project, part.run.entity, part.run.run_group, part.run.job_type)
        assert told == ("p", "me", "sweep", "train")
        assert points(part) == [expected(line, folder.name) for line in due]
        assert part.metrics == ["*"]
        provenance = json.loads((folder / "cfg.json").read_text())["saemill"]
        assert part.config.items() >= provenance["variant"].items()
        assert part.config["batch_size"] == 256
        assert part.config["n_tokens"] == provenance["tokens_trained"] == part.summary["tokens"]
        assert part.config["model"] == provenance["model"]
        assert part.config["d_in"] == D
        assert part.config["store"]["fingerprint"] == provenance["acts_fingerprint"]
        assert part.config["store"]["dtype"] == store.settings.dtype
        assert part.config["store"]["n_tokens"] == store.n_tokens
        assert part.config["versions"].items() >= provenance["versions"].items()
        assert (part.summary["state"], part.exit_code) == ("trained", 0)
        (artifact,) = part.artifacts
        assert (artifact.name, artifact.type) == (f"sweep-r-{folder.name}", "sae")
        assert {file.path for file in artifact.manifest.contents} == {"cfg.json", "sae.safetensors"}
        assert not part.run.git.commit
    command = [sys.executable, "-m", "wandb", "sync", "--dry-run", str(out / "wandb")]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Would sync 4 run(s)" in listed.stderr + listed.stdout


def test_no_key_is_in_any_file(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the key's own text."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    run(config(store, tmp_path / "r", **ONE))
    assert KEY not in "".join(capfd.readouterr())
    for file in (tmp_path / "r").rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file


def test_without_a_key_nothing_is_begun(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the folder, which is not made."""
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ConfigError, match="wandb login"):
        run(config(store, tmp_path / "r", **ONE))
    assert not (tmp_path / "r").exists()


def test_a_resumed_run_goes_on_in_its_runs(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the points of an uninterrupted run, each once, though steps 15 to 17 ran twice."""
    run(config(store, tmp_path / "whole", **ONE))
    out = tmp_path / "cut"
    killed_at(17, config(store, out, **ONE), monkeypatch)
    run(config(store, out, **ONE))
    ((name, parts),) = written(out).items()
    assert len({part.run.run_id for part in parts}) == 1
    assert [part.exit_code for part in parts] == [1, 0]
    steps = [[row["step"] for row in part.history] for part in parts]
    assert steps == [[5, 10, 15], [20, 24]]
    ((_, (whole,)),) = written(tmp_path / "whole").items()
    values = [
        [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")} for row in rows]
        for rows in (points(whole), points(parts[0]) + points(parts[1]))
    ]
    assert values[0] == values[1]
    assert parts[0].summary["state"] == "failed"
    run(config(store, out, resume=False, **ONE))
    anew = written(out)[name][-1]
    assert anew.run.run_id != parts[0].run.run_id
    assert [row["step"] for row in anew.history] == [5, 10, 15, 20, 24]


def test_online_no_step_goes_backwards(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: metrics.jsonl beside what a server was sent, in the order of its lines."""
    out = tmp_path / "r"
    with server() as (address, runs):
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", address)
        killed_at(17, config(store, out, **ONE), monkeypatch)
        ((_, stored),) = runs.items()
        assert [row["step"] for row in stored.history.values()] == [5, 10, 15]
        run(config(store, out, **ONE))
        ((run_id, stored),) = runs.items()
    ((name, entry),) = json.loads((out / "wandb.json").read_text())["runs"].items()
    assert run_id == entry["id"]
    rows = [stored.history[i] for i in range(len(stored.history))]
    assert [row["_step"] for row in rows] == [line["tokens"] for line in lines(out)]
    assert [row["fvu"] for row in rows] == [line["variants"][name]["fvu"] for line in lines(out)]
    assert stored.exit_codes == [1, 0]
    assert stored.summary["state"] == "trained"


def test_a_run_that_a_signal_stopped_is_preempted(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: wandb's own record of preemption."""
    one_step = Trainer._one_step

    def stopping(self: Trainer) -> None:
        one_step(self)
        if self.step == 12:
            self.stop.set()

    monkeypatch.setattr(Trainer, "_one_step", stopping)
    with pytest.raises(Interrupted):
        run(config(store, tmp_path / "r", **ONE))
    ((_, (part,)),) = written(tmp_path / "r").items()
    assert part.preempting
    assert (part.summary["state"], part.exit_code) == ("interrupted", 75)


def test_stopped_and_diverged_variants_end_with_their_state(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: finished.json."""
    wild = {"k": 8, "num_latents": 48, "optimizer": "sgd", "lr": 1e30}
    likes = [{"k": 4, "num_latents": 48, "lr": lr} for lr in (3e-3, 1e-5)]
    out = tmp_path / "r"
    listed: dict[str, Any] = {"variants": (wild, *likes), "k": (4,), "num_latents": (), "lr": ("auto",)}
    run(config(store, out, log_to_wandb=True, wandb_log_frequency=10, halving=1, **listed))
    finished = json.loads((out / "finished.json").read_text())
    ((stopped, look),) = finished["stopped"].items()
    ((diverged, step),) = finished["diverged"].items()
    (trained,) = set(finished["variants"]) - {stopped, diverged}
    (part,) = written(out)[stopped]
    assert (part.summary["state"], part.exit_code) == ("stopped", 0)
    assert (part.summary["stopped_at_step"], part.summary["stopped_value"]) == (look["step"], look["value"])
    assert [row["step"] for row in part.history] == [10, 12]
    (part,) = written(out)[diverged]
    assert (part.summary["state"], part.summary["diverged_at_step"]) == ("diverged", step)
    assert part.exit_code == 1
    (part,) = written(out)[trained]
    assert (part.summary["state"], part.exit_code) == ("trained", 0)


FAKES = {
    "init raises": "def init(**_): raise OSError('no network')",
    "init hangs": "import signal\ndef init(**_):\n    while True: signal.pause()",
    "import fails": "raise ImportError('no network')",
    "the disk is full": """
class Run:
    offline, summary = True, {}
    def define_metric(self, *_, **__): pass
    def log(self, *_, **__): raise OSError(28, 'no network and no space left on device')
def init(**_): return Run()
""",
    "it dies": "import os\nos.kill(os.getpid(), 9)",
    "the end hangs": """
import signal
class Run:
    offline, summary = True, {}
    def define_metric(self, *_, **__): pass
    def log(self, *_, **__): pass
    def finish(self, **_):
        while True: signal.pause()
def init(**_): return Run()
""",
}


@pytest.mark.parametrize("what", FAKES)
def test_a_failing_wandb_does_not_disturb_training(
    store: ActivationStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    plain: dict[str, bytes],
    what: str,
) -> None:
    """Oracle: the run without wandb, bit by bit; it ends where wandb's does not; what is left of that."""
    settings = "class Settings:\n    def __init__(self, **_): pass\n"
    (tmp_path / "fake" / "wandb").mkdir(parents=True)
    (tmp_path / "fake" / "wandb" / "__init__.py").write_text(settings + FAKES[what])
    monkeypatch.syspath_prepend(tmp_path / "fake")
    monkeypatch.setattr(process, "check", lambda: None)
    if "hangs" in what:
        monkeypatch.setattr(process, "END_SECONDS", 2.0)
        monkeypatch.setattr(process, "QUIET_SECONDS", 1.0)
    else:  # it ends by itself, however late
        monkeypatch.setattr(process, "END_SECONDS", LIMIT_SECONDS)
    started: list[process.Wandb] = []
    begin = process.Wandb.__init__

    def noted(self: process.Wandb, *arguments: Any, **more: Any) -> None:
        begin(self, *arguments, **more)
        started.append(self)

    monkeypatch.setattr(process.Wandb, "__init__", noted)
    run(config(store, tmp_path / "a", **ONE))
    output = capfd.readouterr().out
    told = "no network"
    if "hangs" in what:
        told = "wandb did not finish within 2 seconds"
    if what == "it dies":
        told = "wandb's process was killed by signal 9"
    assert output.count(told) == 1, output
    assert started[0].process.returncode not in (None, 0)
    assert files(tmp_path / "a") == plain


def test_an_unreachable_server_does_not_disturb_training(
    store: ActivationStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    plain: dict[str, bytes],
) -> None:
    """Oracle: the run without wandb, bit by bit."""
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(process, "END_SECONDS", 2.0)
    monkeypatch.setattr(process, "QUIET_SECONDS", 1.0)
    run(config(store, tmp_path / "a", **ONE))
    output = capfd.readouterr().out
    assert output.count("wandb did not finish within 2 seconds and was ended") == 1
    assert files(tmp_path / "a") == plain


@pytest.fixture(scope="module")
def acts(tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path, tmp_path_factory: Any) -> Path:
    """The store of a tiny model's activations."""
    folder = tmp_path_factory.mktemp("assessed")
    return Pipeline(folder, tiny_models["neox"], tokenizer_folder, corpus, "layers.1").acts


def test_an_assessment_goes_to_the_runs_of_its_variants(acts: Path, tmp_path: Path) -> None:
    """Oracle: final_assessment.json; the number of latents."""
    out = tmp_path / "run"
    run(
        TrainConfig(
            acts=acts, out=out, site=("layers.1",), k=(2, 16), num_latents=(128,), batch_size=256,
            lr=(3e-3,), max_tokens=4096, device="cpu", log_to_wandb=True,
        )
    )  # fmt: skip
    (out / WANDB_LOGGED).unlink()  # as if wandb had not been there
    for folder in out.glob("wandb/offline-run-*"):
        folder.rename(folder.with_name(folder.name.replace("offline-run", "lost")))
    assessment = assess(
        AssessConfig(run=out, device="cpu", n_latents=4, latents=(3,), most_beside=0, model_tokens=1000)
    )
    found = written(out)
    ids = json.loads((out / "wandb.json").read_text())
    for place, entry in enumerate(assessment["variants"]):
        trained, assessed = found[entry["name"]]
        assert {part.run.run_id for part in (trained, assessed)} == {ids["runs"][entry["name"]]["id"]}
        assert points(trained) == [expected(line, entry["name"]) for line in lines(out)]
        assert trained.summary["state"] == "trained"
        for name in ("fvu", "delta_ce", "loss_recovered", "l0", "dead_fraction", "max_decoder_cosine"):
            assert assessed.summary[f"assess/{name}"] == entry["metrics"][name]["value"]
        assert assessed.summary["assess/fvu_lo"] == entry["metrics"]["fvu"]["lo"]
        assert assessed.summary["assess/verdict"] == entry["verdict"]
        assert assessed.summary["assess/place"] == place + 1
        last = expected(lines(out)[-1], entry["name"])  # sync keeps what the last process wrote
        assert assessed.summary.items() >= {**last, "state": "trained"}.items()
        (row,) = assessed.history
        assert row["_step"] == row["tokens"] + 1 == entry["tokens_trained"] + 1
        assert sum(row["assess/log10_density/values"]) == 128
    (table,) = found["assessment"]
    assert (table.run.job_type, table.run.run_group) == ("assess", "run")
    assert table.summary["best_variant"] == assessment["best_variant"]
    (file,) = out.glob("wandb/offline-*/files/media/table/assess/variants*.json")
    rows = [dict(zip(json.loads(file.read_text())["columns"], row, strict=True)) for row in
            json.loads(file.read_text())["data"]]  # fmt: skip
    entries = assessment["variants"] + assessment["controls"]
    assert [row["variant"] for row in rows] == [entry["name"] for entry in entries]
    assert [row["delta_ce"] for row in rows] == [e["metrics"]["delta_ce"]["value"] for e in entries]
    (page,) = out.glob("wandb/offline-*/files/media/html/assess/report*.html")
    whole = (out / "report.html").read_text()
    before, section, latents = whole.partition('<section id="latents"')
    assert section
    shown = page.read_text()
    assert shown.startswith(before.replace('<a href="#latents">Latents</a>', ""))
    assert shown.endswith(latents.partition("</section>")[2])
    assert 'class="latent"' not in shown
    assert len(shown) < len(before) + 20_000
    (chart,) = out.glob("wandb/offline-*/files/media/html/assess/pareto*.html")
    assert chart.read_bytes() == (out / "pareto.svg").read_bytes()
    (file,) = out.glob("wandb/offline-*/files/media/table/assess/contexts*.json")
    check_contexts(json.loads(file.read_text()), features.load(out))
    n_files = len(list(out.glob("wandb/offline-run-*")))
    assess(AssessConfig(run=out, device="cpu", with_model=False, n_latents=0, log_to_wandb=False))
    assert len(list(out.glob("wandb/offline-run-*"))) == n_files


def check_contexts(table: dict[str, Any], shown: features.Features) -> None:
    """Oracle: features.json: the first latents of the draw, whatever was asked for beside them."""
    drawn = [latent for latent in shown.latents if not latent.asked][:20]
    assert [row[1] for row in table["data"]] == [d.latent for d in drawn for _ in d.contexts[:3]]
    for row, context in zip(table["data"], (c for d in drawn for c in d.contexts[:3]), strict=True):
        place = context.place
        assert isinstance(place, features.Snippet)
        assert row[3] == context.activation
        assert f"«{place.tokens[place.at]}»".replace("\n", " ") in row[4]


def test_the_figures_of_saes_within_one_go_along() -> None:
    """Oracle: the entry of such an SAE."""
    figures = {"fvu": {"value": 0.5, "lo": 0.4, "hi": 0.6}, "l0": {"value": 3.0, "lo": None}}
    entry = {
        "verdict": "passed 1/1", "not_measured": None, "metrics": {"fvu": figures["l0"]},
        "cuts": [{"name": "first 32", "num_latents": 32, "k": None, "metrics": figures}],
    }  # fmt: skip
    assert _summary(entry, 2) == {
        "verdict": "passed 1/1", "place": 2, "fvu": 3.0, "fvu, first 32": 0.5, "fvu, first 32_lo": 0.4,
        "fvu, first 32_hi": 0.6, "l0, first 32": 3.0,
    }  # fmt: skip


def test_an_assessment_of_a_run_without_wandb(acts: Path) -> None:
    """Oracle: the message names the file that such a run lacks."""
    with pytest.raises(ConfigError, match=r"was not logged to wandb \(wandb.json is missing\)"):
        assess(AssessConfig(run=acts.parent / "run", device="cpu", log_to_wandb=True))
