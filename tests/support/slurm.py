"""A real SLURM on this machine, for as long as tests need it: munged, slurmctld and slurmd.

By hand, as root: `python tests/support/slurm.py bash` is a shell with such a SLURM around it.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from waiting import wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
CONF = """
ClusterName=test
FirstJobId={first}
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until the credentials of its last start have expired; 5 s is the least SLURM takes.
AuthInfo=cred_expire=5,socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={ctld_port}
SlurmdPort={d_port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=1000 State=UNKNOWN
PartitionName=p Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP PriorityTier=2
"""


def why_not() -> str | None:
    """Why no SLURM can be started here."""
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "SLURM's daemons are started as root"


@contextmanager
def cluster(folder: Path) -> Iterator[Path]:
    """SLURM with one node of 8 CPUs (whatever the machine has) in `folder`; yields its slurm.conf."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    host = socket.gethostname().split(".")[0]
    conf = folder / "slurm.conf"
    # Processes of a job meet at a port that follows from its id: not at that of another cluster here.
    ports = {"ctld_port": _free_port(), "d_port": _free_port()}
    conf.write_text(CONF.format(host=host, folder=folder, first=os.getpid() % 300 + 1, **ports))
    with _munge(folder / "munge"):
        environment = os.environ | {"SLURM_CONF": str(conf)}
        try:
            for daemon in ("slurmctld", "slurmd"):
                subprocess.run([daemon, "-f", str(conf)], check=True, env=environment)
            wait_until(lambda: "idle\n" in _output(["sinfo", "-h", "-o", "%T"], environment))
            yield conf
        finally:
            subprocess.run(["scancel", "-u", "root"], env=environment)
            for daemon in ("slurmd", "slurmctld"):
                _stop(folder / f"{daemon}.pid")


@contextmanager
def _munge(folder: Path) -> Iterator[None]:
    """A munged of our own, with a key of its own: the machine's, if there is one, is left alone."""
    folder.mkdir(mode=0o755)
    key = folder / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    options = {"key-file": key, "socket": folder / "socket", "pid-file": folder / "pid"}
    options |= {"log-file": folder / "log", "seed-file": folder / "seed"}
    # --force: a folder of a test is below one that all may write to.
    command = ["munged", "--force", *(f"--{name}={value}" for name, value in options.items())]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield
    finally:
        _stop(folder / "pid")


def _output(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, env=environment).stdout


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _stop(pid_file: Path) -> None:
    """End a daemon and wait for it."""
    if not pid_file.exists():
        return
    pid = int(pid_file.read_text())
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


if __name__ == "__main__":
    if reason := why_not():
        sys.exit(f"no SLURM can be started here: {reason}")
    with tempfile.TemporaryDirectory() as scratch, cluster(Path(scratch)) as conf:
        code = subprocess.run(sys.argv[1:], env=os.environ | {"SLURM_CONF": str(conf)}).returncode
    sys.exit(code)
