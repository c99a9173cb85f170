"""Pipelines as SLURM jobs: the scripts as text, mistakes, and states without a SLURM."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import call
from submitting import TINY, config

from saemill.common import records
from saemill.common.config import resolve
from saemill.common.errors import ConfigError, StoreError
from saemill.pipeline.stages import CONFIGS
from saemill.slurm import states
from saemill.slurm.pipeline import Pipeline
from saemill.slurm.states import submitted


def test_dry_run_prints_the_scripts(here: Path) -> None:
    """Oracle: directives and commands written here by hand; nothing appears on disk."""
    slurm = {
        "partition": "gpu", "account": "lab", "qos": "long", "constraint": "a100|h100", "time": "4:00:00",
        "memory": "64G", "cpus": 8, "gpus": 1, "setup": "module load cuda",
        "options": ["--mail-type=END,FAIL"],
        "tokenize": {"partition": "cpu", "time": "30:00"},
        "cache": {"workers": 4, "most_requeues": 3},
        "train": {"nodes": 2, "ntasks": 16, "gpus": 8, "signal_seconds": 300, "python": "enroot start x"},
        "assess": {"requeue": False, "gpus": 0},
    }  # fmt: skip
    file = config(here, slurm=slurm)
    printed = call("submit", file, "--dry-run")
    assert [path.name for path in here.iterdir()] == ["pipeline.yaml"]
    parts = re.split(r"(?m)^# sbatch ", printed)[1:]
    tokenize, cache, train, assess = parts
    for part in parts:
        for line in ("account=lab", "qos=long", "constraint=a100|h100", "mem=64G", "cpus-per-task=8",
                     "mail-type=END,FAIL", f'chdir="{here}"', "open-mode=append"):  # fmt: skip
            assert f"#SBATCH --{line}\n" in part
        assert "export OMP_NUM_THREADS=8\nmodule load cuda\nset +e" in part
    assert "dependency" not in tokenize
    for stage, before in (("cache", "tokenize"), ("train", "cache"), ("assess", "train")):
        found = parts[list(TINY).index(stage)].splitlines()[0]
        assert (
            found
            == f"--parsable --dependency=afterok:<{before}> --kill-on-invalid-dep=yes run.jobs/{stage}.sh"
        )
    assert "--partition=cpu" in tokenize
    assert "--time=30:00" in tokenize
    assert "gpus" not in tokenize
    assert "signal" not in tokenize + assess
    assert "#SBATCH --array=0-3\n" in cache
    assert "#SBATCH --signal=USR1@120\n" in cache
    assert '"$restarts" -lt 3' in cache
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks=16\n#SBATCH --ntasks-per-node=8\n" in train
    assert "#SBATCH --gpus-per-node=8\n" in train
    assert "#SBATCH --signal=USR1@300\n" in train
    assert '"$restarts" -lt 100' in train
    assert "\n  enroot start x -m saemill train" in train
    assert f"\n  {sys.executable} -m saemill assess" in assess
    assert "#SBATCH --no-requeue\n" in assess
    assert 'scontrol requeue "$job"' not in assess


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": {"save_dir": "s"}}, "section run of .* is for `saemill run`"),
        ({"train": {"resume": False}}, "would start anew at every requeue"),
    ],
)
def test_what_has_no_place_in_jobs_is_refused(changes: dict[str, Any], message: str, here: Path) -> None:
    """Oracle: the messages."""
    sections = yaml.safe_load(config(here).read_text())
    for name, values in changes.items():
        sections[name] = sections.get(name, {}) | values
    (here / "pipeline.yaml").write_text(yaml.safe_dump(sections))
    with pytest.raises(ConfigError, match=message):
        call("submit", here / "pipeline.yaml", "--dry-run")


def test_scripts_are_bash(here: Path) -> None:
    """Oracle: bash's own check of the syntax."""
    subprocess.run(["bash", "-n"], input=call("submit", config(here), "--dry-run"), text=True, check=True)


def test_folders_between_stages_are_filled_in(here: Path) -> None:
    """Oracle: the folder that the neighbour names, from either side."""
    file = config(here, tokenize={"out": None}, cache={"tokens": "named there"}, assess={"run": "./run"})
    pipeline = Pipeline.read(file)
    assert pipeline.stages["tokenize"].out == pipeline.stages["cache"].tokens == Path("named there")
    assert pipeline.stages["train"].acts == Path("acts")
    assert pipeline.run == Path("run")
    assert Pipeline.read(config(here, train=None, assess=None)).run == Path("acts")


@pytest.mark.parametrize(
    ("acts", "given", "expected"),
    [
        ("s3://bucket/acts", {}, "3GB"),
        ("s3://bucket/acts", {"local_cache": "1GB"}, "1GB"),
        ("acts", {}, None),
    ],
)
def test_the_assessment_keeps_as_much_of_a_bucket_as_training(
    acts: str, given: dict[str, Any], expected: str | None, here: Path
) -> None:
    """Oracle: the setting of the job's own config: training's, the assessment's own, or none for a store on
    a disk."""
    file = config(here, cache={"out": acts}, train={"acts": acts, "local_cache": "3GB"}, assess=given)
    pipeline = Pipeline.read(file)
    assert pipeline.plain()["assess"].get("local_cache") == expected
    assert pipeline.plain()["train"]["local_cache"] == "3GB"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": {"tokens": "other"}}, "tokenize.out is tokens, but cache.tokens is other"),
        ({"train": {"out": None}}, "train.out must be given: the folder that train writes and assess reads"),
        ({"cache": None}, "has tokenize, train, assess but not cache between them"),
        ({"slurm": None}, "has no section 'slurm'"),
        ({"slurm": {"partitoin": "x"}}, "unknown setting slurm.partitoin; did you mean partition"),
        ({"slurm": {"train": {"ntask": 2}}}, "unknown setting slurm.train.ntask; did you mean ntasks"),
        ({"slurm": {"time": 14400}}, "time must be as '4:00:00' or '2-00:00:00', in quotes; got '14400'"),
        ({"slurm": {"time": "0:00"}}, "time must be longer than nothing"),
        ({"slurm": {"memory": "64"}}, "memory must be a number with K, M, G or T"),
        ({"slurm": {"cpus": 0}}, "cpus must be 1 or more, got 0"),
        ({"slurm": {"gpus": -1}}, "gpus must be 0 or more, got -1"),
        ({"slurm": {"tokenize": {"gpus": 1}}}, "slurm.tokenize.gpus has no effect; it is for cache, train"),
        ({"slurm": {"train": {"workers": 2}}}, "slurm.train.workers has no effect; it is for cache"),
        ({"slurm": {"train": {"ntasks": 3, "nodes": 2}}}, "3 ntasks do not go evenly on 2 nodes"),
        ({"slurm": {"gpus": 8}}, "slurm.cache: each process uses one GPU, but gpus is 8 per node for 1"),
        ({"slurm": {"time": "2:00"}}, "slurm.cache: of a time of 2:00, 120 seconds for saving leave less"),
        ({"slurm": {"requeue": False, "most_requeues": 2}}, "most_requeues has no effect without requeue"),
        ({"slurm": {"options": ["exclusive"]}}, "options must be sbatch's"),
        ({"slurm": {"options": ["--array=0-7"]}}, "the option --array follows from workers"),
        ({"assess": None, "slurm": {"assess": {"cpus": 2}}}, "slurm.assess has no effect"),
        ({"tokenize": {"ctx_len": 0}}, "ctx_len must be 1 or more"),
        ({"tokenize": None}, "cache.tokens must be given"),
        ({"tokenize": None, "cache": {"tokens": "t"}}, "cache.tokens is t, where nothing was made by"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_is_submitted(
    here: Path, changes: dict[str, Any], message: str
) -> None:
    """Oracle: the message written here by hand; no folder was made."""
    with pytest.raises(ConfigError, match=re.escape(message)):
        call("submit", config(here, **changes))
    assert [path.name for path in here.iterdir()] == ["pipeline.yaml"]


def test_without_slurm(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the message written here by hand."""
    monkeypatch.setenv("PATH", str(here))
    with pytest.raises(ConfigError, match="sbatch is not found here"):
        call("submit", config(here))
    with pytest.raises(StoreError, match="run is no run of `saemill train`"):
        call("status", "run")


def test_states_that_slurm_has_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: what each script left: an exit code, a log alone, or nothing; SLURM's word comes first."""
    names = [("tokenize", "1", None), ("cache", "2", 4), ("train", "3", None)]
    entries = (states.Entry(stage=stage, job=job, workers=n) for stage, job, n in names)
    records.write(tmp_path / states.JOBS, states.Jobs(jobs=tuple(entries)))
    for name, code in (("tokenize-1", 0), ("cache-2_0", 0), ("cache-2_1", 2)):
        (tmp_path / f"{name}.exit").write_text(f"{code}\n")
        (tmp_path / f"{name}.log").touch()
    (tmp_path / "cache-2_2.log").touch()
    monkeypatch.setattr(states, "_queued", lambda: {"2_3": ("RUNNING", "")})
    monkeypatch.setattr(states, "_accounted", lambda ids: {})
    found = {job.id: job.phrase for job in submitted(tmp_path)}
    assert found == {
        "1": "COMPLETED", "2_0": "COMPLETED", "2_1": "FAILED (exit code 2)", "2_2": "GONE", "2_3": "RUNNING",
        "3": "CANCELLED",
    }  # fmt: skip


def test_a_slurm_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the words of a squeue that fails; jobs that nobody knows of are not taken for ended."""
    records.write(tmp_path / states.JOBS, states.Jobs(jobs=(states.Entry(stage="train", job="3"),)))
    (tmp_path / "squeue").write_text("#!/bin/sh\necho Unable to contact >&2; exit 1\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(StoreError, match="squeue does not tell of the jobs: Unable to contact"):
        submitted(tmp_path)


def test_the_submitted_config_reads_back(here: Path) -> None:
    """Oracle: the same settings, whether its jobs read it or it is submitted again, from any folder."""
    pipeline = Pipeline.read(config(here, slurm={"options": ["--exclusive"], "train": {"ntasks": 2}}))
    written = here / "written.yaml"
    written.write_text(yaml.safe_dump(pipeline.plain()))
    again = Pipeline.read(written)
    assert again.slurm == pipeline.slurm
    assert again.plain() == pipeline.plain()
    assert again.stages["train"].acts == here / "acts"
    for stage, settings in again.stages.items():
        assert resolve(CONFIGS[stage], stage, {}, written) == settings
    part = config(here, train=None, assess=None, slurm={"setup": "true"})
    written.write_text(yaml.safe_dump(Pipeline.read(part).plain()))
    assert list(Pipeline.read(written).stages) == ["tokenize", "cache"]
