"""A worker: this process among those that work in one place, and the claims that it makes."""

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from saemill.cache.claims.board import worker_name
from saemill.cache.claims.files import remove, token_of
from saemill.cache.claims.owner import Owner, Seen
from saemill.cache.placing import Place
from saemill.common.errors import ConfigError, DiskError, Interrupted, SaemillError, StoreError
from saemill.common.log import say


class Lost(Exception):
    """Another worker has taken over the claim: discard what was done under it."""


class Claim:
    """The sole right to work on a name, until it is released or its worker is taken for dead."""

    def __init__(self, worker: "Worker", name: str, generation: int, before: dict[int, str | None]) -> None:
        self.worker, self.name, self.generation, self.before = worker, name, generation, before
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
        seen = self.worker.tokens(self.name)
        for generation, token in (self.before | {self.generation: self.token}).items():
            if generation in seen and seen[generation] == token:
                self.worker.board.remove(self.name, generation)
        self.worker.claims.discard(self)


class Worker:
    """A process among those that work on one store: this one; used as a context.

    Args:
        place: where the store lies.
        stop: when set, waiting ends with `Interrupted`.
    """

    def __init__(self, place: Place, stop: threading.Event) -> None:
        self.place, self.stop = place, stop
        self.board, self.folder = place.claims, place.unfinished
        self.claims: set[Claim] = set()
        self._numbers = itertools.count()
        self._left = threading.Event()
        self._registering = threading.Lock()
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
        for path in self.folder.glob("*worker-*.*"):
            if token_of(path) == self.owner.token:
                remove(path)
        with suppress(DiskError, ConfigError):  # a bucket that fails or refuses: what is left there expires
            for claim in list(self.claims):
                claim.release()
            try:
                self._sweep()
            finally:
                self.board.remove_worker(self.owner.token)

    def _register(self) -> None:
        """Join the others: at the start, and again where they took this worker for dead and removed it."""
        self.owner = Owner.here()
        self.board.join(self.owner)

    def _beat(self) -> None:
        """Show that this worker lives; where that fails, a bucket's refusal included, at the next beat."""
        while not self._left.wait(self.owner.expiry_seconds / 24):
            with suppress(OSError, SaemillError):
                self._now()

    def _now(self) -> float:
        """Read the time by the board's clock, in seconds, which shows that this worker lives. One that others
        took for dead goes on as a new one."""
        owner = self.owner
        try:
            return self.board.touch(owner)
        except FileNotFoundError:
            with self._registering:  # the heart and the work find it out at once
                if self.owner is owner:
                    self._register()
                    say(
                        f"this process was silent for longer than {owner.expiry_seconds:g} seconds and was "
                        f"taken for dead by another one that works in {self.place.name}; it goes on, but "
                        "what it had begun counts only where no other has taken that over"
                    )
            return self._now()

    def partial(self) -> Path:
        """Name a new path for something unfinished; it is cleared away when the worker leaves or dies."""
        return self.folder / f"{worker_name(self.owner.token)}.partial-{next(self._numbers)}"

    def tokens(self, name: str) -> dict[int, str | None]:
        """Read whose the claims on a name are, by generation."""
        return {generation: seen.token for generation, seen in self.board.claims_on(name).items()}

    def claim(self, name: str) -> Claim | None:
        """Claim a name; None if a living worker has it, or several reached for it at once."""
        now = self._now()
        claims = self.board.claims_on(name)
        if claims and not self._is_dead(claims[max(claims)], now):
            return None
        before = {generation: seen.token for generation, seen in claims.items()}
        claim = Claim(self, name, max(claims, default=-1) + 1, before)
        self.claims.add(claim)
        try:
            # NFS may report that the file exists after it made it itself: the check decides.
            with suppress(FileExistsError):
                self.board.make(self.owner, name, claim.generation)
            claim.check_alone()
        except (Lost, FileNotFoundError):
            claim.before = {}
            claim.release()
            return None
        return claim

    def _is_dead(self, seen: Seen, now: float) -> bool:
        """Tell whether the worker of a claim is dead, and see to it that it knows."""
        return seen.is_dead(now) and (seen.token is None or self.board.bury(seen.token, seen))

    @contextmanager
    def hold(self, name: str) -> Iterator[Claim]:
        """Claim a name, waiting for others, and release it when the block ends. What the others have changed
        is known then.

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
            self.place.refresh()
            yield claim
        except Interrupted:
            raise
        except Exception as error:
            try:
                claim.check()
            except Lost:
                raise StoreError(
                    f"this process was silent for longer than {self.owner.expiry_seconds:g} seconds, and "
                    f"another one took over its work in {self.place.name}. Run the same command again: it "
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
        owners = (claims[max(claims)].owner for name in names if (claims := self.board.claims_on(name)))
        return ", ".join(sorted({str(owner) for owner in owners if owner}))

    def is_alone(self) -> bool:
        """Tell whether no other living worker is registered here."""
        now = self._now()
        others = {token: seen for token, seen in self.board.workers().items() if token != self.owner.token}
        return all(seen.is_dead(now) for seen in others.values())

    def _sweep(self) -> None:
        """Remove what dead workers left."""
        now = self._now()
        left = sorted(self.folder.glob("*"))  # first: whose files these are has joined by now
        workers = self.board.workers()
        dead = [
            token for token, seen in workers.items() if seen.is_dead(now) and self.board.bury(token, seen)
        ]
        for name in sorted(self.board.names()):
            claims = self.board.claims_on(name).values()
            if any(seen.is_dead(now) for seen in claims) and (claim := self.claim(name)):
                claim.release()
        for path in left:
            if (token := token_of(path)) and (token in dead or token not in workers):
                remove(path)
