"""Who a worker is, and whether it is dead."""

import errno
import os
import secrets
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pydantic import ValidationError

from saemill.common.records import Count, Record

EXPIRY_SECONDS = 120.0
"""Seconds without a sign of life after which a worker counts as dead; longer than the 60 s for which NFS
clients keep a file's time. SAEMILL_CLAIM_SECONDS overrides it."""


class Owner(Record):
    """The content of a worker's file. It decides no number and has no checksum: a damaged one expires."""

    token: str
    """Random text; no two workers share it."""
    host: str
    machine: str | None
    """Name of a machine within which a process number means one process; None if this system does not
    tell."""
    pid: int
    started: str | None
    """Start of the process, since process numbers are used again."""
    expiry_seconds: float
    beat: Count = 0
    """Number of the sign of life: an object is another with each. 0 on a disk, where the file is touched."""

    @classmethod
    def here(cls) -> "Owner":
        """Describe this process, under a new token."""
        seconds = float(os.environ.get("SAEMILL_CLAIM_SECONDS", EXPIRY_SECONDS))
        pid = os.getpid()
        return cls(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            machine=_machine(),
            pid=pid,
            started=_started(pid),
            expiry_seconds=seconds,
        )

    def is_gone(self) -> bool:
        """Tell whether its process ran on this machine and has ended."""
        if self.machine is None or self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return _started(self.pid) not in (self.started, None)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@cache
def _machine() -> str | None:
    """Name a boot of this machine and its namespace of processes, containers apart."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """Read a process's start, in clock ticks since boot; `ended` if nobody has waited for it yet; None if
    unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "ended" if fields[0] in "ZX" else fields[19]


@dataclass(frozen=True, slots=True)
class Seen:
    """A worker's file or claim as it was a moment ago."""

    owner: Owner | None
    """Worker that the file names; None if the content was lost in a crash of the machine."""
    time: float
    """Time of the last touch, in seconds by the file system's clock."""

    @classmethod
    def at(cls, path: Path) -> "Seen | None":
        """Look at a file, past what NFS remembers of it; None if it is gone."""
        try:
            with path.open("rb") as file:
                time = os.fstat(file.fileno()).st_mtime
                return cls(Owner.model_validate_json(file.read()), time)
        except ValidationError:
            return cls(None, time)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):
                return None
            raise

    def is_dead(self, now: float) -> bool:
        """Tell whether its worker is dead. `now` was read before this look."""
        if self.owner is None:
            return now - self.time > EXPIRY_SECONDS
        return self.owner.is_gone() or now - self.time > self.owner.expiry_seconds

    @property
    def token(self) -> str | None:
        """Token of its worker."""
        return self.owner.token if self.owner else None
