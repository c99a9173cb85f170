"""Claims: any number of processes share out work with no coordinator but a folder, NFS included.

    worker-<token>             a process that works here: who it is, as JSON; it touches the file as it lives
    <name>.<generation>        a claim on `name`: a hard link to its worker's file
    worker-<token>.partial-<n> what that worker has not finished writing

A claim appears at once with its content, exactly one process can make it, and one touch keeps all
claims of a worker alive. When a worker is dead, its claim is taken over by making the next
generation; the highest one counts. A worker is dead when its process is gone from this machine, or,
seen from elsewhere, when its file was not touched for long by the clock of the file system itself:
the time on a file that was touched just now.

A worker that was stopped for long may find on waking that it lost its claims; what it publishes
must therefore be checked (`Claim.check`) and must never replace what another published.
"""

import errno
import itertools
import os
import re
import secrets
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType

from pydantic import ValidationError

from saemill.common.errors import Interrupted, StoreError
from saemill.common.log import say
from saemill.common.records import Record

CLAIMS = "claims"
"""The folder of a store in which its workers meet; it is gone when none is left."""
EXPIRY_SECONDS = 120.0
"""A worker not heard of for so long is dead; longer than the 60 s for which NFS clients keep a file's
time. SAEMILL_CLAIM_SECONDS overrides it."""
CLAIM = re.compile(r"(?P<name>store|shard-\d+)\.(?P<generation>\d+)")
WORKER = re.compile(r"\.?(?P<worker>worker-[0-9a-f]{16})(\.|$)")


class Lost(Exception):
    """Another worker has taken over the claim; what was done under it is to be discarded."""


class Owner(Record):
    """What a worker's file says. It decides no number and has no checksum: a damaged one expires."""

    token: str
    """Random; no two workers share it."""
    host: str
    machine: str | None
    """Within it a process number means one process; None if this system does not tell."""
    pid: int
    started: str | None
    """When the process started, since numbers are used again."""
    expiry_seconds: float

    @classmethod
    def here(cls) -> "Owner":
        """This process, under a new token."""
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
        """Whether its process ran on this machine and has ended."""
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
    """Names a boot of a machine and a namespace of processes in it, containers apart."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """A process's start in clock ticks since boot; `ended` if nobody waited for it yet; None if unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "ended" if fields[0] in "ZX" else fields[19]


@dataclass(frozen=True, slots=True)
class Seen:
    """A worker's file or claim as it was a moment ago."""

    owner: Owner | None
    """None if the content was lost in a crash of the machine."""
    time: float
    """When it was touched last, in seconds by the file system's clock."""

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
        """Whether its worker is dead; `now` was taken before this look."""
        if self.owner is None:
            return now - self.time > EXPIRY_SECONDS
        return self.owner.is_gone() or now - self.time > self.owner.expiry_seconds

    @property
    def token(self) -> str | None:
        """Its worker's."""
        return self.owner.token if self.owner else None


class Claim:
    """The sole right to work on a name, until it is released or its worker is taken for dead."""

    def __init__(self, worker: "Worker", name: str, generation: int, before: dict[int, str | None]) -> None:
        self.worker, self.name, self.generation, self.before = worker, name, generation, before
        self.path = worker.claim_path(name, generation)
        self.token = worker.owner.token

    def check(self) -> None:
        """Make sure that it still holds.

        Raises:
            Lost: it does not.
        """
        tokens = self.worker.tokens(self.name)
        if tokens.get(self.generation) != self.token or max(tokens) > self.generation:
            raise Lost(f"{self.name} was taken over by another worker")

    def check_alone(self) -> None:
        """As `check`, just after it was made: a lower one made at the same time, by a worker that saw no
        claim at all, is a reason to step back too.

        Raises:
            Lost: it does not hold.
        """
        self.check()
        tokens = self.worker.tokens(self.name)
        if any(self.before.get(generation, self.token) != token for generation, token in tokens.items()):
            raise Lost(f"{self.name} was claimed by another worker at the same time")

    def release(self) -> None:
        """Let others have it; the dead ones that it took over go first, so that it is the highest to
        the end."""
        for generation, token in (self.before | {self.generation: self.token}).items():
            path = self.worker.claim_path(self.name, generation)
            seen = Seen.at(path)
            if seen and seen.token == token:
                path.unlink(missing_ok=True)
        self.worker.claims.discard(self)


class Worker:
    """This process among those that work in one place; used as a context.

    Args:
        folder: where they meet; made here, and removed by the last to leave.
        stop: when set, waiting ends with `Interrupted`.
    """

    def __init__(self, folder: Path, stop: threading.Event) -> None:
        self.folder, self.stop = folder, stop
        self.claims: set[Claim] = set()
        self._numbers = itertools.count()
        self._left = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True, name="heartbeat")

    def __enter__(self) -> "Worker":
        self._register()
        self._heart.start()
        self._sweep()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._heart.join()
        for claim in list(self.claims):
            claim.release()
        self._sweep()
        for path in self.folder.iterdir():
            if _worker_of(path) == self.file.name:
                _remove(path)
        with suppress(OSError):
            self.folder.rmdir()

    def _register(self) -> None:
        """Make this worker's file: at first, and again where others took it for dead and removed it."""
        self.owner = Owner.here()
        self.file = self.folder / f"worker-{self.owner.token}"
        while not self.file.exists():
            # Others may be making the folder, sweeping it, or be the last to leave it.
            with suppress(FileExistsError):
                self.folder.mkdir(parents=True)
            with suppress(FileNotFoundError):
                partial = self.partial()
                partial.write_text(self.owner.model_dump_json())
                partial.replace(self.file)

    def _beat(self) -> None:
        while not self._left.wait(self.owner.expiry_seconds / 24):
            with suppress(OSError):
                os.utime(self.file)

    def _now(self) -> float:
        """The time by the file system's clock, in seconds."""
        try:
            os.utime(self.file)
            return self.file.stat().st_mtime
        except FileNotFoundError:
            self._register()
            return self._now()

    def partial(self) -> Path:
        """A new place for something unfinished; it is cleared away when the worker leaves or dies."""
        return self.folder / f"{self.file.name}.partial-{next(self._numbers)}"

    def claim_path(self, name: str, generation: int) -> Path:
        """The file that is a claim."""
        return self.folder / f"{name}.{generation}"

    def _look(self, name: str) -> dict[int, Seen]:
        """The claims on a name, by generation."""
        found = {}
        for path in self.folder.glob(f"{name}.*"):
            if (match := CLAIM.fullmatch(path.name)) and (seen := Seen.at(path)):
                found[int(match["generation"])] = seen
        return found

    def tokens(self, name: str) -> dict[int, str | None]:
        """Whose the claims on a name are, by generation."""
        return {generation: seen.token for generation, seen in self._look(name).items()}

    def take(self, name: str) -> Claim | None:
        """Claim a name; None if a living worker has it, or several reached for it at once."""
        now = self._now()
        found = self._look(name)
        if found and not found[max(found)].is_dead(now):
            return None
        before = {generation: seen.token for generation, seen in found.items()}
        claim = Claim(self, name, max(found, default=-1) + 1, before)
        self.claims.add(claim)
        try:
            # NFS may report that the file exists after it made it itself: the check tells.
            with suppress(FileExistsError):
                os.link(self.file, claim.path)
            claim.check_alone()
        except (Lost, FileNotFoundError):
            claim.before = {}
            claim.release()
            return None
        return claim

    @contextmanager
    def hold(self, name: str) -> Iterator[Claim]:
        """Claim a name, waiting for others, and release it when the block ends.

        Raises:
            Interrupted: the wait was stopped by a signal.
            StoreError: the block failed because others took this worker for dead meanwhile, and cleared away
                what it had begun.
        """
        n_waits = 0
        while (claim := self.take(name)) is None:
            self.wait(n_waits, f"waiting for {self.holders([name]) or 'others'}")
            n_waits += 1
        try:
            yield claim
        except Interrupted:
            raise
        except Exception as error:
            try:
                claim.check()
            except Lost:
                raise StoreError(
                    f"this process was silent for longer than {self.owner.expiry_seconds:g} seconds, and "
                    f"another one took over its work in {self.folder.parent}. Run the same command again: it "
                    "goes on from what is there"
                ) from error
            raise
        finally:
            claim.release()

    def wait(self, n_waits: int, why: str) -> None:
        """The wait after `n_waits` others in a row: from 50 ms doubling to 5 s; a long one is told."""
        if n_waits == 4:
            say(why)
        self.stop.wait(min(0.05 * 2**n_waits, 5.0))
        self.check_stop()

    def check_stop(self) -> None:
        """Raises `Interrupted` if a signal came."""
        if self.stop.is_set():
            raise Interrupted("stopped by a signal; the same command continues")

    def holders(self, names: list[str]) -> str:
        """Who holds the claims on these names, in words; empty if nobody does."""
        found = (seen[max(seen)].owner for name in names if (seen := self._look(name)))
        return ", ".join(sorted({str(owner) for owner in found if owner}))

    def is_alone(self) -> bool:
        """Whether no other living worker is registered here."""
        now = self._now()
        others = [file for file in self.folder.glob("worker-*") if _worker_of(file) == file.name]
        looks = [Seen.at(file) for file in others if file != self.file]
        return all(seen is None or seen.is_dead(now) for seen in looks)

    def _sweep(self) -> None:
        """Remove what dead workers left."""
        now = self._now()
        for path in sorted(self.folder.iterdir()):
            if match := CLAIM.fullmatch(path.name):
                if (seen := Seen.at(path)) and seen.is_dead(now) and (claim := self.take(match["name"])):
                    claim.release()
            elif name := _worker_of(path):
                seen = Seen.at(self.folder / name)
                if seen is None or seen.is_dead(now):
                    _remove(path)


def _worker_of(path: Path) -> str | None:
    """The worker's file that a file is, or is a partial of."""
    match = WORKER.match(path.name)
    return match and match["worker"]


def _remove(path: Path) -> None:
    """Remove a file or folder that others may be removing too."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def holds_only_claims(folder: Path) -> bool:
    """Whether nothing else than this module's files is in a folder."""
    return all(CLAIM.fullmatch(path.name) or _worker_of(path) for path in folder.iterdir())
