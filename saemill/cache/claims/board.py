"""Where workers and claims are written down: what a folder and a bucket have in common."""

import re
from typing import Protocol

from saemill.cache.claims.owner import Owner, Seen

CLAIM = re.compile(r"(?P<name>store|shard-\d+)\.(?P<generation>\d+)")
WORKER = re.compile(r"\.?worker-(?P<token>[0-9a-f]{16})(\.|$)")


def worker_name(token: str) -> str:
    """Name a worker."""
    return f"worker-{token}"


def claim_name(name: str, generation: int) -> str:
    """Name one generation of a claim."""
    return f"{name}.{generation}"


class Board(Protocol):
    """Workers, by their tokens, and their claims, by name and generation, as any number of processes see
    them."""

    def join(self, owner: Owner) -> None:
        """Write down a worker."""

    def touch(self, owner: Owner) -> float:
        """Give a sign of life. Returns: its time, in seconds by the board's own clock.

        Raises:
            FileNotFoundError: others took the worker for dead and removed it.
        """

    def remove_worker(self, token: str) -> None:
        """Remove a worker, if it is there."""

    def bury(self, token: str, seen: Seen) -> bool:
        """Remove a worker that was taken for dead, unless it gave a sign of life since it was seen so.

        Returns: whether it is removed, by whomever.
        """

    def workers(self) -> dict[str, Seen]:
        """Look at all workers, by token."""

    def make(self, owner: Owner, name: str, generation: int) -> None:
        """Make a claim, which only one process can.

        Raises:
            FileExistsError: there is one.
            FileNotFoundError: others took the worker for dead and removed it.
        """

    def remove(self, name: str, generation: int) -> None:
        """Remove a claim, if it is there."""

    def claims_on(self, name: str) -> dict[int, Seen]:
        """Look at the claims on a name, by generation."""

    def names(self) -> set[str]:
        """List the names on which there are claims."""
