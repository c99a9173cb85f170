"""The batch script of a stage: plain bash that can be read, kept, and submitted again by hand."""

import shlex
import sys
from pathlib import Path

from saemill.slurm.settings import MOST_REQUEUES, SAVES, SIGNAL_SECONDS, JobConfig

TEMPLATE = """#!/bin/bash
{directives}

# Written by `saemill submit`; by hand: sbatch {stage}.sh
folder={folder}
job=$SLURM_JOB_ID
if [ -n "${{SLURM_ARRAY_TASK_ID-}}" ]; then job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID; fi
trap 'echo $? > "$folder/{stage}-$job.exit"' EXIT
# SLURM ends the job (scancel, preemption, scontrol requeue) and has told the step too: wait for it to save.
trap 'ended=yes' TERM
trap : USR1
ended=
set -e
{setup}
set +e

srun {step} \\
  {python} -m saemill {stage} --config "$folder/config.yaml"
code=$?
{requeue}exit $code
"""
REQUEUE = """
# 75: it has saved, and the same command goes on from there. Not where SLURM itself ends or restarts the job:
# to requeue a cancelled job would bring it back to life.
restarts=${{SLURM_RESTART_COUNT:-0}}
if [ $code = 75 ] && [ -z "$ended" ]; then
  if [ "$restarts" -lt {most} ]; then
    echo "saved; requeued, restart $((restarts + 1)) of at most {most}"
    scontrol requeue "$job"
  else
    echo "saved, but restarted $restarts times already (slurm.most_requeues); submit again to go on"
  fi
fi
"""


def script(stage: str, job: JobConfig, folder: Path, name: str, work: Path) -> str:
    """Write the text of a stage's script.

    Args:
        stage: its name.
        job: what it asks for.
        folder: absolute path of the folder for scripts, logs and exit codes; config.yaml is there.
        name: the run's name, shown in SLURM's lists.
        work: absolute path of the folder that relative paths in the config start from.
    """
    saves = stage in SAVES and job.requeue is not False
    setup = [f"export OMP_NUM_THREADS={job.cpus}"] if job.cpus else []
    return TEMPLATE.format(
        directives="\n".join(f"#SBATCH {line}" for line in _directives(stage, job, folder, name, work)),
        folder=shlex.quote(str(folder)),
        stage=stage,
        setup="\n".join([*setup, (job.setup or "").rstrip()]).strip("\n"),
        step=" ".join(_step(job)),
        python=job.python or shlex.quote(sys.executable),
        requeue=REQUEUE.format(most=job.most_requeues or MOST_REQUEUES) if saves else "",
    )


def _directives(stage: str, job: JobConfig, folder: Path, name: str, work: Path) -> list[str]:
    """List what follows #SBATCH. The user's own options come first, so that none overrides ours."""
    nodes, ntasks = job.nodes or 1, job.ntasks or 1
    log = f"{folder}/{stage}-".replace("%", "%%") + ("%A_%a.log" if stage == "cache" else "%j.log")
    lines = list(job.options or ())
    requested = {
        option: getattr(job, option) for option in ("partition", "account", "qos", "constraint", "time")
    }
    lines += [f"--{option}={_in_directive(value)}" for option, value in requested.items() if value]
    lines += [f"--job-name={_in_directive(f'{name}-{stage}')}", f"--chdir={_in_directive(str(work))}"]
    lines += [f"--output={_in_directive(log)}", "--open-mode=append"]
    lines += [f"--nodes={nodes}", f"--ntasks={ntasks}"]
    lines += [f"--ntasks-per-node={ntasks // nodes}"] if nodes > 1 else []
    lines += [f"--cpus-per-task={job.cpus}"] if job.cpus else []
    lines += [f"--mem={job.memory}"] if job.memory else []
    lines += [f"--gpus-per-node={job.gpus}"] if job.gpus else []
    lines += [f"--array=0-{(job.workers or 1) - 1}"] if stage == "cache" else []
    lines += ["--no-requeue" if job.requeue is False else "--requeue"]
    # Without B: the signal goes to the processes of the step, not to this script.
    lines += [f"--signal=USR1@{job.signal_seconds or SIGNAL_SECONDS}"] if stage in SAVES else []
    return lines


def _step(job: JobConfig) -> list[str]:
    """List the options of srun. It does not inherit cpus-per-task; and one process that has saved and left
    must not end the others while they save."""
    cpus = [f"--cpus-per-task={job.cpus}"] if job.cpus else []
    return [f"--ntasks={job.ntasks or 1}", *cpus, "--kill-on-bad-exit=0"]


def _in_directive(value: str) -> str:
    """Quote a value as sbatch reads it: it knows quotes, but not the shell's escapes."""
    return f'"{value}"' if any(character in value for character in " '#") else value
