"""Pipelines as SLURM jobs, run by a real SLURM that the tests start."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command_line import call
from slurm import cluster, why_not
from submitting import config
from waiting import wait_until

import saemill
from saemill.common.errors import ConfigError, StoreError
from saemill.slurm import states
from saemill.slurm.pipeline import Pipeline
from saemill.slurm.states import submitted

ROOT = Path(saemill.__file__).parents[1]


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
