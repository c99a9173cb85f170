"""One command for the whole pipeline: what it finds again, mends and refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import call
from launching import finish, launch
from object_store import S3

from saemill import ActivationStore
from saemill.common.errors import ConfigError, DataError, StoreError
from saemill.common.stores.site_records import REPAIR
from saemill.common.world import World
from saemill.pipeline import chain
from saemill.pipeline.run import run

SMALL = {
    "tokenize.ctx_len": "32", "tokenize.held_out_fraction": "0.3", "cache.layers": "1", "train.k": "4",
    "train.num_latents": "64", "train.batch_size": "256", "assess.model_tokens": "500",
    "assess.max_tokens": "1000", "assess.n_latents": "0",
}  # fmt: skip


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that do work, as they are called; tokenize and train say themselves what is finished."""
    calls: list[str] = []
    for stage in ("cache", "assess"):
        real = getattr(chain, stage)
        monkeypatch.setattr(
            chain, stage, lambda config, s=stage, real=real: (calls.append(s), real(config))[1]
        )
    return calls


def test_a_second_k_goes_straight_to_training(
    work: Path, tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path, done: list[str],
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Oracle: the stages that were called, and the files' times of change."""
    flags = SMALL | {"tokenize.tokenizer": tokenizer_folder}
    model, text = tiny_models["neox"], str(corpus)
    first = run(model, text, flags)
    assert done == ["cache", "assess"]
    stores = [*Path("saemill-out/tokens").rglob("*"), *Path("saemill-out/acts").rglob("*")]
    times = {path: path.stat().st_mtime_ns for path in stores}
    second = run(model, text, flags | {"train.k": "8"})
    assert done == ["cache", "assess", "assess"]
    assert first != second
    assert {path: path.stat().st_mtime_ns for path in stores} == times
    capfd.readouterr()
    assert run(model, text, flags) == first
    assert done == ["cache", "assess", "assess"]
    assert "is finished already" in capfd.readouterr().out
    # Its own settings, written beside the run, name the same folders.
    assert run(None, None, {}, Path(f"{first}.yaml")).samefile(first)
    assert done == ["cache", "assess", "assess"]
    # What is said in other words is the same.
    monkeypatch.chdir(corpus.parent)
    elsewhere = {
        "run.save_dir": str(work / "saemill-out"),
        "cache.load_in_8bit": "false",
        "train.log_every": "5",
    }
    assert run(model, corpus.name, flags | elsewhere).samefile(work / first)
    monkeypatch.chdir(work)
    assert done == ["cache", "assess", "assess"]
    # Another layer is added to the same store.
    run(model, text, flags | {"cache.layers": "0,1"})
    (acts,) = Path("saemill-out/acts").iterdir()
    assert ActivationStore(acts).sites == ["layers.0", "layers.1"]


def test_changed_text_is_tokenized_anew(
    work: Path, tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path
) -> None:
    """Oracle: two stores of different content, where a path alone would find the old one."""
    file = {"cache": {"model": tiny_models["neox"]}, "tokenize": {"tokenizer": tokenizer_folder}}
    (work / "c.yaml").write_text(yaml.safe_dump(file))
    text = work / "text.jsonl"
    text.write_text(corpus.read_text())
    flags = {name: value for name, value in SMALL.items() if name.split(".")[0] in ("tokenize", "cache")}
    run(None, str(text), flags, work / "c.yaml")
    lines = corpus.read_text().splitlines(keepends=True)
    text.write_text("".join(lines[1:]))
    run(None, str(text), flags, work / "c.yaml")
    assert len(list(Path("saemill-out/tokens").iterdir())) == 2
    assert len(list(Path("saemill-out/acts").iterdir())) == 2


def test_assessed_anew_when_trained_anew(
    work: Path, tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path, done: list[str]
) -> None:
    """Oracle: the calls of assess."""
    flags = SMALL | {"tokenize.tokenizer": tokenizer_folder, "run.run_name": "a"}
    path = run(tiny_models["neox"], str(corpus), flags)
    assert path == Path("saemill-out/runs/a")
    run(tiny_models["neox"], str(corpus), flags | {"assess.max_tokens": "900"})
    run(tiny_models["neox"], str(corpus), flags | {"assess.max_tokens": "900", "train.resume": "false"})
    assert done == ["cache", "assess", "assess", "assess"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"tokenize.held_out_fraction": "0.999999999"},
            r"nothing is left to train on: .*; lower --held-out-fraction to 0\.\d+ or less",
        ),
        (
            {"train.batch_size": "1M"},
            r"less than one step of 1,000,000; say --epochs \d+, or lower --batch-size, to 33 \.\. \d+$",
        ),
    ],
)
def test_refused_before_anything_is_cached(
    flags: dict[str, str], message: str, work: Path, tiny_models: dict[str, str], tokenizer_folder: str,
    corpus: Path, done: list[str],
) -> None:  # fmt: skip
    """Oracle: what the tokens show; no stage was called after them."""
    with pytest.raises((ConfigError, DataError), match=message):
        run(tiny_models["neox"], str(corpus), SMALL | {"tokenize.tokenizer": tokenizer_folder} | flags)
    assert done == []


def test_a_text_of_one_row_is_told_epochs_alone(
    work: Path, tiny_models: dict[str, str], tokenizer_folder: str, done: list[str]
) -> None:
    """Oracle: by hand, the one row's 31 tokens beside its first, in which no batch of more than a row fits;
    the advice works."""
    (work / "short.txt").write_text("the " * 50)
    flags = SMALL | {"tokenize.tokenizer": tokenizer_folder, "tokenize.held_out_fraction": "0"}
    del flags["train.batch_size"]
    with pytest.raises(ConfigError, match=r"^31 training tokens .* of 4,096; say --epochs 133$"):
        run(tiny_models["neox"], "short.txt", flags)
    assert done == []
    path = run(tiny_models["neox"], "short.txt", flags | {"train.epochs": "133"})
    assert json.loads((path / "finished.json").read_text())["steps"] == 1


def test_without_held_out_rows_all_but_the_assessment_is_done(
    work: Path, tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path, done: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Oracle: an SAE is there, no assessment, and one sentence says so before anything is cached; again, the
    same run is found."""
    flags = SMALL | {"tokenize.tokenizer": tokenizer_folder, "tokenize.held_out_fraction": "0"}
    for expected in (["cache"], ["cache"]):
        path = run(tiny_models["neox"], str(corpus), flags | {"run.run_name": "a"})
        assert done == expected
        told = capfd.readouterr().out
        assert told.index("the SAEs will not be assessed") < told.index("2. cache")
        assert (path / "finished.json").exists()
        assert not (path / "final_assessment.json").exists()


def test_a_short_text_is_trained_in_smaller_batches(
    work: Path, tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Oracle: the steps of the run, of a text shorter than the default batch; the same command finds it
    again, and so does the config that is written beside it."""
    short = work / "short.jsonl"
    short.write_text("".join(corpus.read_text().splitlines(keepends=True)[:20]))
    flags = SMALL | {"tokenize.tokenizer": tokenizer_folder, "run.run_name": "a"}
    del flags["train.batch_size"]
    path = run(tiny_models["neox"], str(short), flags)
    assert "trained in batches of" in capfd.readouterr().out
    assert json.loads((path / "finished.json").read_text())["steps"] >= 8
    assert run(tiny_models["neox"], str(short), flags) == path
    assert run(None, None, {}, path.with_name("a.yaml")).samefile(path)
    assert "is finished already" in capfd.readouterr().out


def test_what_other_tools_take_is_taken(
    work: Path, tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path
) -> None:
    """Oracle: sparsify's own rules: a stride of 1 beside layers says nothing, num_latents overrides the
    factor, and a frequency of wandb's without wandb has no effect."""
    flags = SMALL | {"tokenize.tokenizer": tokenizer_folder, "run.run_name": "a"}
    theirs = {"cache.layer_stride": "1", "train.expansion_factor": "32", "train.log_every": "100"}
    path = run(tiny_models["neox"], str(corpus), flags | theirs)
    assert run(tiny_models["neox"], str(corpus), flags) == path
    assert (path / "layers.1-k4-f64-s0").is_dir()


def test_a_finished_run_without_wandb_is_not_logged_by_saying_so(
    work: Path,
    tiny_models: dict[str, str],
    tokenizer_folder: str,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: the run's folder, which wandb knows nothing of."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = SMALL | {"tokenize.tokenizer": tokenizer_folder, "run.run_name": "a"}
    run(tiny_models["neox"], str(corpus), flags)
    with pytest.raises(ConfigError, match="is finished and was trained without wandb"):
        run(tiny_models["neox"], str(corpus), flags | {"train.log_to_wandb": "true"})


def test_a_device_is_for_the_stages_that_there_are(
    work: Path, tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path
) -> None:
    """Oracle: a config that ends before training; and folders that are all named, where save_dir is idle."""
    sections = {
        "tokenize": {"dataset": str(corpus), "tokenizer": tokenizer_folder, "ctx_len": 32, "out": "t"},
        "cache": {"model": tiny_models["neox"], "layers": [1], "out": "a"},
    }
    (work / "c.yaml").write_text(yaml.safe_dump(sections))
    assert run(None, None, {"device": "cpu"}, work / "c.yaml") == Path("a")
    with pytest.raises(ConfigError, match="save_dir has no effect"):
        run(None, None, {"run.save_dir": "s"}, work / "c.yaml")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"train.batch_size": "8"}, "for 8 rows, as sparsify counts, say 256"),
        ({"train.loss": "ce"}, "loss ce trains through the model"),
        ({"train.loss": "kl"}, "loss kl trains through the model"),
        ({"train.k": "65"}, r"k must be in 1..64"),
        ({"train.site": "layers.0"}, "train.site 'layers.0' is not cached"),
        ({"cache.layers": "7"}, "layers must be in"),
        (
            {"tokenize.ctx_len": "256", "train.batch_size": "512"},
            "rows have 256 tokens, but .* takes at most 128",
        ),
        ({"max_memory": "cpu=1GB"}, "max_memory has no effect without a device map"),
        (
            {"train.batch_size": "32"},
            "32 of them fill no more than one row of 32; for 32 rows, as .*, say 1024",
        ),
        ({"train.batch_size": "1"}, "one row of 32; for 2 rows, as sparsify counts, say 64"),
        (
            {"train.batch_size": "256", "tokenize.ctx_len": "none"},
            "one row of 512.*unless tokenize.ctx_len says otherwise",
        ),
        (
            {"tokenize.max_tokens": "1k", "train.batch_size": "2k"},
            "at most 1,000 training tokens are less than",
        ),
        ({"cache.sites": "blocks.6.hook_resid_post"}, "is --layers 6"),
        ({"cache.layer_stride": "2"}, "layer_stride chooses all layers itself; leave out layers"),
        ({"run.run_name": "a/b"}, "without slashes"),
        ({"run.run_name": ".."}, "not beginning with a dot"),
        ({"run.run_name": ""}, "must be the name of a folder"),
        ({"run.run_name": "a", "train.out": "b"}, "run_name has no effect"),
        ({"assess.run": "elsewhere", "train.out": "b"}, "name one folder"),
    ],
)
def test_refused_before_any_work(
    flags: dict[str, str], message: str, work: Path, tiny_models: dict[str, str], tokenizer_folder: str,
    corpus: Path,
) -> None:  # fmt: skip
    """Oracle: an empty folder after the error."""
    with pytest.raises(ConfigError, match=message):
        run(tiny_models["neox"], str(corpus), SMALL | {"tokenize.tokenizer": tokenizer_folder} | flags)
    assert not list(work.iterdir())


def test_flags_without_their_stage_are_refused(work: Path, tiny_models: dict[str, str]) -> None:
    """Oracle: a file that ends before training; flags and --set of other stages say so."""
    (work / "c.yaml").write_text("tokenize: {dataset: d}\ncache: {model: m, layers: [0]}\n")
    for arguments in (({"train.k": "4"}, ()), ({}, ("train.k=4",))):
        with pytest.raises(ConfigError, match=r"train.k has no effect: the config has no section train"):
            run(None, None, arguments[0], work / "c.yaml", arguments[1])
    with pytest.raises(ConfigError, match=r"--set takes stage.key=value"):
        run(None, None, {}, work / "c.yaml", ("k=4",))
    (work / "c.yaml").write_text("train: {k: 4}\n")
    with pytest.raises(ConfigError, match=r"train\.acts must be given"):
        run(None, None, {}, work / "c.yaml")


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def damage_the_stores(original: Path, folder: Path) -> None:
    """The stores of a save_dir in another, with a bit of each flipped, and word of it left."""
    for kind in ("tokens", "acts"):
        shutil.copytree(original / kind, folder / kind)
    (tokens,), (acts,) = (tuple((folder / kind).iterdir()) for kind in ("tokens", "acts"))
    flip(tokens / "manifest.json")
    flip(next(acts.glob("layers.*/c/0/0")))
    acts.with_name(f"{acts.name}.damaged").touch()


@pytest.mark.parametrize("where", ["layers.1/c/0/0", "tokens/tokens/c/0/0"])
def test_damaged_activations_are_mended(
    where: str, work: Path, tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path, done: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Oracle: the bytes before the damage; what training finds damaged is cached once, and the same command
    goes on."""
    flags = SMALL | {"tokenize.tokenizer": tokenizer_folder}
    run(tiny_models["neox"], str(corpus), flags)
    (acts,) = Path("saemill-out/acts").iterdir()
    whole = (acts / where).read_bytes()
    flip(acts / where)
    done.clear()
    run(tiny_models["neox"], str(corpus), flags | {"train.k": "8"})
    assert done == ["cache", "assess"]
    assert "What is damaged is cached again" in capfd.readouterr().out
    assert (acts / where).read_bytes() == whole
    assert [path.name for path in acts.parent.iterdir()] == [acts.name]


def test_damaged_activations_in_a_bucket_are_mended(
    s3: S3, work: Path, tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path, done: list[str]
) -> None:
    """Oracle: the object before the damage, which training finds; two runs, in folders found by content."""
    flags = SMALL | {"tokenize.tokenizer": tokenizer_folder, "cache.out": "s3://bucket/acts"}
    run(tiny_models["neox"], str(corpus), flags)
    s3.fetch("acts", work / "there")
    whole = (work / "there/layers.1/c/0/0").read_bytes()
    s3.put_file("acts/layers.1/c/0/0", bytes([whole[0] ^ 1]) + whole[1:])
    done.clear()
    run(tiny_models["neox"], str(corpus), flags | {"train.k": "8"})
    assert done == ["cache", "assess"]
    s3.fetch("acts", work / "there")
    assert (work / "there/layers.1/c/0/0").read_bytes() == whole
    assert len(list(Path("saemill-out/runs").glob("*/finished.json"))) == 2


def test_the_assessment_keeps_as_much_of_a_bucket_as_training(
    s3: S3, work: Path, tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path
) -> None:
    """Oracle: the files of the local cache: none where training may keep none; some where the assessment says
    so itself."""
    flags = SMALL | {"tokenize.tokenizer": tokenizer_folder, "cache.out": "s3://bucket/acts"}
    flags["train.local_cache"] = "0"
    kept = work / "cache/saemill/blocks"
    run(tiny_models["neox"], str(corpus), flags)
    assert not [*kept.glob("*/*/*")]
    run(tiny_models["neox"], str(corpus), flags | {"assess.max_tokens": "900", "assess.local_cache": "1GB"})
    assert [*kept.glob("*/*/*")]


def test_one_of_several_leaves_word_of_damage(
    work: Path, tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path, done: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Oracle: the stages that were called: none after the damage was found, as the others are lost with it;
    by the next command the cache, though all sites are there."""
    flags = SMALL | {"tokenize.tokenizer": tokenizer_folder}

    with monkeypatch.context() as patch:

        def train(config: Any) -> None:
            patch.setattr(World, "here", lambda: World(0, 2))
            raise StoreError(f"a block differs from its hash. {REPAIR}")

        patch.setattr(chain, "train", train)
        with pytest.raises(StoreError, match="differs from its hash"):
            run(tiny_models["neox"], str(corpus), flags)
    assert done == ["cache"]
    for stages in (["cache", "cache", "assess"], ["cache", "cache", "assess"]):
        run(tiny_models["neox"], str(corpus), flags)
        assert done == stages


def test_a_damaged_identity_is_left_to_training(
    work: Path, tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path
) -> None:
    """Oracle: the file before the damage; other settings are refused as before."""
    flags = SMALL | {"tokenize.tokenizer": tokenizer_folder, "run.run_name": "a"}
    path = run(tiny_models["neox"], str(corpus), flags)
    whole = (path / "identity.json").read_bytes()
    flip(path / "identity.json")
    run(tiny_models["neox"], str(corpus), flags)
    assert (path / "identity.json").read_bytes() == whole
    with pytest.raises(ConfigError, match="made with other settings"):
        run(tiny_models["neox"], str(corpus), flags | {"train.k": "8"})


@pytest.mark.usefixtures("one_thread")
def test_several_processes(
    work: Path, tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path
) -> None:
    """Oracle: the SAEs that one process makes of the same, bit by bit. The two processes find stores that are
    damaged, one in a file that all of them open, and make them whole."""
    arguments = [
        "run", tiny_models["neox"], str(corpus), "--device", "cpu",
        "--tokenizer", tokenizer_folder, "--ctx-len", "32", "--held-out-fraction", "0.3", "--layers", "1",
        "--k", "4", "8", "--num-latents", "64",
        "--batch-size", "256", "--run-name", "a", "--set", "assess.model_tokens=500",
        "--set", "assess.max_tokens=1000", "--set", "assess.n_latents=0",
    ]  # fmt: skip
    call(*arguments, "--save-dir", "one")
    damage_the_stores(Path("one"), Path("two"))
    finish(launch(2, "-m", "saemill", *arguments, "--save-dir", "two"))
    names = json.loads(Path("one/runs/a/finished.json").read_text())["variants"]
    assert len(names) == 2
    for name in names:
        alone, together = (Path(f, "runs/a", name, "sae.safetensors").read_bytes() for f in ("one", "two"))
        assert alone == together
    assert Path("two/runs/a/final_assessment.json").exists()
    assert [path.suffix for path in Path("two/acts").iterdir()] == [""]
