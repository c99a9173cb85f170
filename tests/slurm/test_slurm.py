"""Pipelines as SLURM jobs: the scripts as text, and run by a real SLURM that the tests start."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import call
from slurm import cluster, why_not
from waiting import wait_until

import saemill
from saemill.common import records
from saemill.common.config import resolve
from saemill.common.errors import ConfigError, StoreError
from saemill.demo import MODEL, TEXT
from saemill.pipeline.stages import CONFIGS
from saemill.slurm import states
from saemill.slurm.pipeline import Pipeline
from saemill.slurm.states import submitted

ROOT = Path(saemill.__file__).parents[1]
TINY: dict[str, dict[str, Any]] = {
    "tokenize": {
        "dataset": str(TEXT), "tokenizer": str(MODEL), "ctx_len": 64, "max_tokens": 64 * 400, "out": "tokens",
    },
    "cache": {"model": str(MODEL), "layers": [2], "shard_tokens": 8192, "out": "acts", "device": "cpu"},
    "train": {
        "site": ["layers.2"], "k": [8, 16], "num_latents": [256], "batch_size": 256, "max_tokens": 256 * 1000,
        "buffer_tokens": 8192, "log_every": 1, "out": "run", "device": "cpu",
    },
    "assess": {"model_tokens": 500, "max_tokens": 1000, "n_latents": 1, "device": "cpu"},
    "slurm": {"cpus": 1},
}  # fmt: skip
"""The whole pipeline in seconds; the folders between stages are named once."""


def config(folder: Path, **changes: dict[str, Any] | None) -> Path:
    """A file with TINY's sections and changes to them; None leaves a section out."""
    sections = {name: values | (changes.get(name) or {}) for name, values in TINY.items()}
    sections = {name: values for name, values in sections.items() if changes.get(name, {}) is not None}
    file = folder / "pipeline.yaml"
    file.write_text(yaml.safe_dump(sections))
    return file


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a blank in its name, which the scripts must stand, to work in."""
    folder = tmp_path / "a place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


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


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A real SLURM, which the commands find through the environment; CI may not go without."""
    if reason := why_not():
        if os.environ.get("SAEMILL_CI"):
            pytest.fail(f"CI must run these tests, but: {reason}")
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch, cluster(tmp_path_factory.mktemp("slurm")) as conf:
        patch.setenv("SLURM_CONF", str(conf))
        patch.setenv("PYTHONPATH", str(ROOT))
        yield


def jobs(run: str = "run") -> dict[str, states.Job]:
    """The jobs of a run by id, from SLURM."""
    return {job.id: job for job in submitted(Path(f"{run}.jobs"))}


def ended(run: str = "run") -> dict[str, str]:
    """Wait for all jobs of a run; state by stage, or by task of an array of several."""
    try:
        wait_until(lambda: not any(job.alive for job in jobs(run).values()))
    except AssertionError:
        print(call("status", run), *(log.read_text() for log in Path(f"{run}.jobs").glob("*.log")))
        raise
    return {job.stage + job.id.partition("_")[2]: job.phrase for job in jobs(run).values()}


def step_of(run: Path) -> int:
    """Steps logged."""
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def running(stage: str) -> str:
    """The id of a stage's job, once it runs."""
    wait_until(lambda: any(j.state == "RUNNING" and j.stage == stage for j in jobs().values()))
    return next(job.id for job in jobs().values() if job.stage == stage)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pipeline without SLURM, on one thread as there."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage, settings in Pipeline.read(config(folder)).stages.items():
            __import__(f"saemill.{stage}.run", fromlist=["run"]).run(settings)
    torch.set_num_threads(n_threads)
    return folder


def check_equal(run: Path, uninterrupted: Path) -> None:
    """The SAEs, bit by bit."""
    for name in ("layers.2-k8-f256-s0", "layers.2-k16-f256-s0"):
        file = Path(name, "sae.safetensors")
        assert (run / file).read_bytes() == (uninterrupted / "run" / file).read_bytes()


def test_a_pipeline_told_to_save_in_the_middle_finishes(slurm: None, here: Path, uninterrupted: Path) -> None:
    """Oracle: the SAEs of the same stages run one by one without SLURM, training in one process; here in
    two. SIGUSR1 is what SLURM sends before the time is up."""
    printed = call("submit", config(here, slurm={"ntasks": 2, "cache": {"workers": 2}}))
    assert re.findall(r"(?m)^(\w+) +job \d+(?:, tasks 0-1)?$", printed) == [
        "tokenize",
        "cache",
        "train",
        "assess",
    ]
    assert "tokenize" in call("status", "run")
    job = running("train")
    wait_until(lambda: step_of(here / "run") >= 50)
    subprocess.run(["scancel", "--signal=USR1", job], check=True)
    assert set(ended().values()) == {"COMPLETED"}
    log = jobs()[job].log.read_text()
    assert ", 2 processes: " in log
    assert log.count("stopped by a signal after step") == 1
    assert "saved; requeued, restart 1 of at most 100" in log
    assert "continuing after step" in log
    check_equal(here / "run", uninterrupted)
    status = call("status", "run")
    for phrase in (
        "400 rows",
        "layers.2: 4 of 4 shards",
        "finished, 1,000 steps",
        "assessed, best layers.2-",
    ):
        assert phrase in status


def test_a_requeued_job_goes_on(slurm: None, here: Path, uninterrupted: Path) -> None:
    """Oracle: the uninterrupted SAEs; the dependent job waits for the restarted one. Requeueing is what
    preemption does; the pipeline begins with a store that is there."""
    acts = {"acts": str(uninterrupted / "acts")}
    call("submit", config(here, tokenize=None, cache=None, train=acts))
    job = running("train")
    wait_until(lambda: step_of(here / "run") >= 50)
    subprocess.run(["scontrol", "requeue", job], check=True)
    assert ended() == {"train": "COMPLETED", "assess": "COMPLETED"}
    log = jobs()[job].log.read_text()
    assert "continuing after step" in log
    assert "saved; requeued" not in log
    check_equal(here / "run", uninterrupted)


def test_a_failing_stage_cancels_what_depends_on_it(slurm: None, here: Path, uninterrupted: Path) -> None:
    """Oracle: the error that the stage itself tells, found in the status; its dependents never started."""
    file = config(here, tokenize=None, cache={"tokens": str(uninterrupted / "tokens"), "model": "./absent"})
    call("submit", file)
    states = ended()
    assert states == {"cache0": "FAILED (exit code 2)", "train": "CANCELLED", "assess": "CANCELLED"}
    status = call("status", "run")
    assert "FAILED (exit code 2)" in status
    assert status.count("CANCELLED") == 2
    assert "./absent" in status[status.index("cache-") :]
    assert not list(here.glob("run.jobs/train*.log"))


FAKE = """
echo "$4 starts, restart ${SLURM_RESTART_COUNT:-0}" >> starts
trap 'exit 75' TERM
case "$SLURM_ARRAY_TASK_ID$3" in
  1cache) exit $(( ${SLURM_RESTART_COUNT:-0} == 0 ? 75 : 0 ));;
  *train) exit 75;;
  *sleeps) for i in {1..600}; do sleep 0.1; done;;
esac
"""
"""Stands for `python`: one task of cache saves once, train saves for ever."""


def test_restarts_of_array_tasks_and_their_bound(slurm: None, here: Path) -> None:
    """Oracle: exit codes of a command that stands for Python: of three tasks the second alone is started
    again, train waits for all and is started again once, as most_requeues says."""
    (here / "fake.sh").write_text(FAKE.replace("$4 starts", "$3$SLURM_ARRAY_TASK_ID"))
    call("submit", config(here, slurm={"python": "bash fake.sh", "cache": {"workers": 3},
                                       "train": {"most_requeues": 1}}))  # fmt: skip
    done = {"tokenize": "COMPLETED", "cache0": "COMPLETED", "cache1": "COMPLETED", "cache2": "COMPLETED"}
    assert ended() == done | {"train": "FAILED (exit code 75)", "assess": "CANCELLED"}
    starts = (here / "starts").read_text().splitlines()
    assert sorted(starts[1:4]) == ["cache0, restart 0", "cache1, restart 0", "cache2, restart 0"]
    assert starts[4:] == ["cache1, restart 1", "train, restart 0", "train, restart 1"]
    status = call("status", "run")
    assert re.search(r"cache +\d+_\[0-2\]: 3 COMPLETED", status)
    assert "restarted 1 times already (slurm.most_requeues)" in status


def test_a_second_submission_and_a_cancelled_job(slurm: None, here: Path) -> None:
    """Oracle: the jobs' ids, told by the refusal; a job that saves when it is cancelled stays cancelled."""
    (here / "fake.sh").write_text(FAKE.replace("*sleeps", "*"))
    file = config(here, train=None, assess=None, slurm={"python": "bash fake.sh"})
    call("submit", file)
    wait_until((here / "starts").exists)
    ids = list(jobs("acts"))
    with pytest.raises(StoreError, match=f"{ids[0]} .tokenize, RUNNING.*scancel {ids[0]} {ids[1][:-2]}$"):
        call("submit", file)
    subprocess.run(["scancel", *ids], check=True)
    ended("acts")
    # A script that saved when it was told to end is still in hand.
    wait_until(lambda: not subprocess.check_output(["squeue", "-h", "-t", "COMPLETING"]))
    assert {job.state for job in jobs("acts").values()} == {"CANCELLED"}
    call("submit", file)
    assert not set(ids) & set(jobs("acts"))
    subprocess.run(["scancel", "-u", "root"], check=True)


def test_a_job_that_sbatch_refuses(slurm: None, here: Path) -> None:
    """Oracle: sbatch's own words; the jobs handed over before are cancelled."""
    file = config(here, slurm={"train": {"partition": "absent"}, "python": "sleep 60;"})
    with pytest.raises(ConfigError, match=r"sbatch refuses run.jobs/train.sh: .*invalid partition"):
        call("submit", file)
    # A script that had begun may have told what its command ended with.
    assert {state.partition(" ")[0] for state in ended().values()} == {"CANCELLED"}


def test_the_world_under_srun(slurm: None, tmp_path: Path) -> None:
    """Oracle: ranks and a sum by hand; in a batch script without srun there is one process."""
    program = tmp_path / "world.py"
    program.write_text(
        "import torch\n"
        "from saemill.common.world import World\n"
        "world = World.here()\n"
        "with world.connected(torch.device('cpu')) as everyone:\n"
        "    total = everyone.all_reduce(torch.tensor(world.rank + 1))\n"
        "    print(world.rank, world.size, world.local_rank, world.local_size, int(total))\n"
    )
    command = f"{sys.executable} {program}"
    wrapped = f"{command}; srun -n 2 {command} | sort"
    log = tmp_path / "log"
    subprocess.run(["sbatch", "-n", "2", "-o", log, "--wrap", f"{wrapped}; echo end"], check=True)
    wait_until(lambda: log.exists() and log.read_text().endswith("end\n"))
    assert log.read_text().splitlines()[:-1] == ["0 1 0 1 1", "0 2 0 2 3", "1 2 1 2 3"]


def test_status_without_slurm(uninterrupted: Path) -> None:
    """Oracle: the pipeline's own figures."""
    status = call("status", uninterrupted / "run")
    assert "no jobs were submitted" in status
    for phrase in ("400 rows", "layers.2: 4 of 4 shards", "finished, 1,000 steps", "assessed, best"):
        assert phrase in status


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
