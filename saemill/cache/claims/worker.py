"""A worker: this process among those that work in one place, and the claims that it makes."""

import itertools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from saemill.cache.claims.files import CLAIM, claim_path, claims_on, remove, worker_of
from saemill.cache.claims.owner import Owner, Seen
from saemill.cache.placing import OnDisk, Place
from saemill.common.errors import Interrupted, StoreError
from saemill.common.log import say


class Lost(Exception):
    """Another worker has taken over the claim: discard what was done under it."""


class Claim:
    """The sole right to work on a name, until it is released or its worker is taken for dead."""

    def __init__(self, worker: "Worker", name: str, generation: int, before: dict[int, str | None]) -> None:
        self.worker, self.name, self.generation, self.before = worker, name, generation, before
        self.path = claim_path(worker.folder, name, generation)
        self.token = worker.owner.token

    def check(self) -> None:
        """Make sure that the claim still holds.

        Raises:
            Lost: it does not.
        """
        tokens = self.worker.tokens(self.name)
        if tokens.get(self.generation) != self.token or max(tokens) > self.generation:
            raise Lost(f"{self.name} was taken over by another worker")

    def check_alone(self) -> None:
        """Check as `check` does, just after the claim was made. A lower claim made at the same time, by a
        worker that saw no claim at all, is a reason to step back too.

        Raises:
            Lost: it does not hold.
        """
        self.check()
        tokens = self.worker.tokens(self.name)
        if any(self.before.get(generation, self.token) != token for generation, token in tokens.items()):
            raise Lost(f"{self.name} was claimed by another worker at the same time")

    def release(self) -> None:
        """Release the claim. The dead claims that it took over go first, so that it is the highest to the
        end."""
        for generation, token in (self.before | {self.generation: self.token}).items():
            path = claim_path(self.worker.folder, self.name, generation)
            seen = Seen.at(path)
            if seen and seen.token == token:
                path.unlink(missing_ok=True)
        self.worker.claims.discard(self)


class Worker:
    """A process among those that work in one place: this one; used as a context.

    Args:
        folder: the one that they share; made here, and removed by the last to leave.
        stop: when set, waiting ends with `Interrupted`.
        place: where what they finish belongs; by default the folder that theirs is in.
    """

    def __init__(self, folder: Path, stop: threading.Event, place: Place | None = None) -> None:
        self.folder, self.stop = folder, stop
        self.place = OnDisk(folder.parent) if place is None else place
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
            if worker_of(path) == self.file.name:
                remove(path)
        with suppress(OSError):
            self.folder.rmdir()

    def _register(self) -> None:
        """Make this worker's file: at the start, and again where others took it for dead and removed it."""
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
        """Read the time by the file system's clock, in seconds."""
        try:
            os.utime(self.file)
            return self.file.stat().st_mtime
        except FileNotFoundError:
            self._register()
            return self._now()

    def partial(self) -> Path:
        """Name a new path for something unfinished; it is cleared away when the worker leaves or dies."""
        return self.folder / f"{self.file.name}.partial-{next(self._numbers)}"

    def tokens(self, name: str) -> dict[int, str | None]:
        """Read whose the claims on a name are, by generation."""
        return {generation: seen.token for generation, seen in claims_on(self.folder, name).items()}

    def claim(self, name: str) -> Claim | None:
        """Claim a name; None if a living worker has it, or several reached for it at once."""
        now = self._now()
        claims = claims_on(self.folder, name)
        if claims and not claims[max(claims)].is_dead(now):
            return None
        before = {generation: seen.token for generation, seen in claims.items()}
        claim = Claim(self, name, max(claims, default=-1) + 1, before)
        self.claims.add(claim)
        try:
            # NFS may report that the file exists after it made it itself: the check decides.
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
        while (claim := self.claim(name)) is None:
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
        """Wait, after `n_waits` other waits in a row: from 50 ms doubling to 5 s. A long wait is
        announced."""
        if n_waits == 4:
            say(why)
        self.stop.wait(min(0.05 * 2**n_waits, 5.0))
        self.check_stop()

    def check_stop(self) -> None:
        """Raise `Interrupted` if a signal came."""
        if self.stop.is_set():
            raise Interrupted("stopped by a signal; the same command continues")

    def holders(self, names: list[str]) -> str:
        """Name the holders of the claims on these names, in words; empty if there are none."""
        owners = (claims[max(claims)].owner for name in names if (claims := claims_on(self.folder, name)))
        return ", ".join(sorted({str(owner) for owner in owners if owner}))

    def is_alone(self) -> bool:
        """Tell whether no other living worker is registered here."""
        now = self._now()
        others = [file for file in self.folder.glob("worker-*") if worker_of(file) == file.name]
        looks = [Seen.at(file) for file in others if file != self.file]
        return all(seen is None or seen.is_dead(now) for seen in looks)

    def _sweep(self) -> None:
        """Remove the files of dead workers."""
        now = self._now()
        for path in sorted(self.folder.iterdir()):
            if match := CLAIM.fullmatch(path.name):
                if (seen := Seen.at(path)) and seen.is_dead(now) and (claim := self.claim(match["name"])):
                    claim.release()
            elif name := worker_of(path):
                seen = Seen.at(self.folder / name)
                if seen is None or seen.is_dead(now):
                    remove(path)
