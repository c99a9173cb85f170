"""Sampling that is refused, and outputs that are finished, damaged, locked or on a full disk."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from generating import NEVER, config, read

from saemill.common import durable
from saemill.common.errors import ConfigError, DataError, Interrupted, StoreError
from saemill.demo import MODEL
from saemill.generate import run as module
from saemill.generate.run import run
from saemill.generate.sampling import Sampler, sample


def test_finished_output_is_recognised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the file times; what another setting or a changed file is told."""
    out = tmp_path / "out"
    run(config(out))
    before = (out / "model.parquet").stat().st_mtime_ns
    run(config(out, batch_size=3))
    assert "finished already" in capsys.readouterr().out
    assert (out / "model.parquet").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"top_p: there 0\.9, now 0\.5"):
        run(config(out, top_p=0.5))
    manifest = yaml.safe_load((out / "manifest.yaml").read_text())
    assert manifest["settings"]["seed"] == 42
    assert manifest["datasets"][0]["n_tokens_generated"] == manifest["tokens_per_dataset"]
    with (out / "model.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(StoreError, match=r"model\.parquet is missing or damaged"):
        run(config(out))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="something else"):
        run(config(tmp_path / "used"))


def test_lost_batches_are_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the names of the files taken away and cut short."""
    calls = iter(range(9))

    def stopped_in_the_third(*arguments: Any) -> list[list[int]]:
        if next(calls) == 2:
            raise Interrupted
        return sample(*arguments)

    monkeypatch.setattr(module, "sample", stopped_in_the_third)
    with pytest.raises(Interrupted):
        run(config(tmp_path / "out"))
    first, second = sorted((tmp_path / "out.partial" / "parts" / "model").iterdir())
    second.write_bytes(second.read_bytes()[:-20])
    with pytest.raises(StoreError, match=rf"{second.name} is damaged"):
        run(config(tmp_path / "out"))
    first.unlink()
    with pytest.raises(StoreError, match="samples 0 and following are missing"):
        run(config(tmp_path / "out"))


def test_settings_that_do_not_fit_are_refused_before_any_work(
    tiny_models: dict[str, str], other: str, tmp_path: Path
) -> None:
    """Oracle: the limits in the models' configs."""
    out = tmp_path / "out"
    for changes, message in (
        ({"n_samples": None}, "one of n_samples and tokens_per_dataset"),
        ({"tokens_per_dataset": 5}, "one of n_samples and tokens_per_dataset"),
        ({"temperature": 0.0}, "temperature must be more than 0"),
        ({"top_p": 1.5}, "top_p must be in"),
        ({"max_tokens": 0}, "max_tokens must be 1 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(out, **changes)
    with pytest.raises(ConfigError, match="different last names"):
        config(out, "a/x", "b/x")
    with pytest.raises(ConfigError, match="no causal language model"):
        run(config(out, str(MODEL), tiny_models["bert"]))
    with pytest.raises(ConfigError, match="at most 128, the context of"):
        run(config(out, str(MODEL), other, max_tokens=129))
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_sees_what_follows_is_refused(tiny_models: dict[str, str], tmp_path: Path) -> None:
    """Oracle: BERT with the head of a decoder, whose config does not say that it is one; and with it."""
    torch.manual_seed(0)
    folder = tmp_path / "bert"
    bert = transformers.BertLMHeadModel.from_pretrained(tiny_models["bert"])
    transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    bert.save_pretrained(folder)
    with pytest.raises(ConfigError, match="bert' reads a text in both directions"):
        run(config(tmp_path / "out", str(folder)))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"is_decoder": True}))
    assert run(config(tmp_path / "causal", str(folder), n_samples=2)).tokens_per_dataset > 0


def test_what_a_killed_run_left_goes_with_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the names beside the output, after a run that was killed when its output was in place."""
    run(config(tmp_path / "out"))
    (tmp_path / "out.partial" / "parts").mkdir(parents=True)
    run(config(tmp_path / "out"))
    assert "finished already" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """Oracle: a lock that is held here; nothing is written before it is asked for."""
    with (
        durable.exclusive(tmp_path / "out.partial"),
        pytest.raises(StoreError, match=r"another process is writing to .*out\.partial"),
    ):
        run(config(tmp_path / "out"))
    assert list((tmp_path / "out.partial").iterdir()) == []
    run(config(tmp_path / "out"))


@pytest.mark.parametrize("file", ["identity.json", "parts/model/*.parquet", "no identity"])
def test_damage_is_told_with_a_way_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """Oracle: one flipped bit, or no file, is an error; what it advises makes the samples of a whole run."""
    with monkeypatch.context() as patch:
        calls = iter(range(9))

        def stopped_in_the_second(*arguments: Any) -> list[list[int]]:
            if next(calls) == 1:
                raise Interrupted
            return sample(*arguments)

        patch.setattr(module, "sample", stopped_in_the_second)
        with pytest.raises(Interrupted):
            run(config(tmp_path / "out"))
    partial = tmp_path / "out.partial"
    if file == "no identity":
        (partial / "identity.json").unlink()
    else:
        (found,) = partial.glob(file)
        content = bytearray(found.read_bytes())
        content[len(content) // 2] ^= 1
        found.write_bytes(content)
    with pytest.raises(StoreError, match=r"(?i)remove .* to sample again") as caught:
        run(config(tmp_path / "out"))
    named = next(word for word in re.findall(r"\S+", str(caught.value)) if word.startswith(str(partial)))
    folder = partial / "parts" / "model" if "model" in named else partial
    assert f"emove {folder} to" in str(caught.value) or "remove it to" in str(caught.value)
    shutil.rmtree(folder)
    run(config(tmp_path / "out"))
    run(config(tmp_path / "whole"))
    assert read(tmp_path / "out" / "model.parquet") == read(tmp_path / "whole" / "model.parquet")


def test_every_damage_of_the_manifest_is_told(tmp_path: Path) -> None:
    """Oracle: the manifest as it was: a flipped bit, a cut and zeros anywhere leave its content, or are
    errors that say what to do."""
    out = tmp_path / "out"
    identity = run(config(out)).settings
    file = out / "manifest.yaml"
    raw, whole = file.read_bytes(), yaml.safe_load(file.read_bytes())
    for place in range(0, len(raw), 11):
        end = len(raw) - place
        flipped = raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]
        for changed in (raw[:place], flipped, raw[:place] + bytes(end)):
            file.write_bytes(changed)
            try:
                module._finished(out, identity)
            except StoreError as error:
                assert f"Remove {out} to sample again." in str(error)  # noqa: PT017
            else:
                assert yaml.safe_load(changed) == whole


def test_a_full_disk_is_a_sentence_and_costs_nothing(tmp_path: Path) -> None:
    """Oracle: a limit on a file's size, which fails as a full disk does; without it the same command makes
    the samples of a run that never met it."""
    script = (
        "import resource, signal, sys; from pathlib import Path; from saemill.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from saemill.generate import run as module; whole = module._finish\n"
        "def finish(*a): resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900)); return whole(*a)\n"
        "module._finish = finish; main()"
    )
    arguments = ["generate", "--model", str(MODEL), "--n-samples", "10", "--max-tokens", "12"]
    arguments += ["--batch-size", "4", "--device", "cpu", "-o", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no room on the disk for" in done.stderr
    assert "Traceback" not in done.stderr
    run(config(tmp_path / "out"))
    run(config(tmp_path / "whole"))
    assert read(tmp_path / "out" / "model.parquet") == read(tmp_path / "whole" / "model.parquet")


def test_a_model_without_words_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: samples that are all empty; logits that are not numbers."""
    monkeypatch.setattr(module, "sample", lambda *_: [[], [], [], []])
    with pytest.raises(DataError, match="100 samples of model are all empty"):
        run(config(tmp_path / "out", n_samples=None, tokens_per_dataset=50))
    with pytest.raises(DataError, match="all samples of a model are empty"):
        run(config(tmp_path / "few", n_samples=4))
    monkeypatch.setattr(module, "sample", lambda *_: [[], [5, 6], [], []])
    assert run(config(tmp_path / "some", n_samples=4)).datasets[0].n_samples == 2
    with pytest.raises(DataError, match="not finite"):
        Sampler(torch.zeros(1, 1).double(), 1.0, 1.0, NEVER)(
            torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 4), torch.nan)
        )
