"""Claims in a bucket: objects that are created where there is none, so that machines need share nothing else.

A worker's object is written anew as the worker lives; the bucket says when that was. Claims are not written
again: each names its worker, and lives as long.

An object store removes without conditions, but it replaces only what is still as it was. So whoever takes a
worker for dead replaces its object by a tombstone before removing it, and a sign of life replaces the one
before: of the two that meet, one fails, and knows.
"""

import math
from secrets import token_hex
from threading import Lock

from pydantic import ValidationError

from saemill.cache.claims.board import CLAIM, WORKER, claim_name, worker_name
from saemill.cache.claims.owner import Owner, Seen
from saemill.common.stores.objects import Listed, ObjectStore
from saemill.common.stores.site_records import CLAIMS

TOMBSTONE = b"taken for dead by "
"""Begins what is in the place of a worker until it is removed."""


class Objects:
    """The claims at an address; see `Board`. Time is the bucket's: that of an object written just now.

    Args:
        remote: the objects of the store.
    """

    def __init__(self, remote: ObjectStore) -> None:
        self.remote = remote
        self._written: dict[str, tuple[Owner, Listed]] = {}
        """What was written last of the workers that joined here, by token."""
        self._touching = Lock()

    def join(self, owner: Owner) -> None:
        """Write a worker's object."""
        key = _key(worker_name(owner.token))
        self.remote.create(key, owner.model_dump_json().encode())
        if found := self.remote.look(key):
            self._written[owner.token] = owner, found

    def touch(self, owner: Owner) -> float:
        """Write a worker's object again, if it is still as it was written last, and ask when that was."""
        name = worker_name(owner.token)
        with self._touching:
            if owner.token not in self._written:
                raise FileNotFoundError(name)
            last, before = self._written[owner.token]
            alive = last.model_copy(update={"beat": last.beat + 1})
            found = self.remote.replace(_key(name), alive.model_dump_json().encode(), before)
            if found is None:
                raise FileNotFoundError(name)
            self._written[owner.token] = alive, found
        return found.seconds

    def remove_worker(self, token: str) -> None:
        """Remove a worker's object."""
        self.remote.delete(_key(worker_name(token)))

    def bury(self, token: str, seen: Seen) -> bool:
        """Look at a worker's object again, replace it by a tombstone, and remove that."""
        key = _key(worker_name(token))
        found = self.remote.look(key)
        if found is None:
            return True
        tombstone = TOMBSTONE + token_hex(8).encode()
        if found.seconds > seen.time or self.remote.replace(key, tombstone, found) is None:
            return False
        self.remote.delete(key)
        return True

    def workers(self) -> dict[str, Seen]:
        """Look at the workers' objects."""
        times = self._times()
        looks = {token: self._seen(_key(worker_name(token)), time) for token, time in _workers(times).items()}
        return {token: seen for token, seen in looks.items() if seen}

    def make(self, owner: Owner, name: str, generation: int) -> None:
        """Create the object of a claim."""
        self.remote.create(_key(claim_name(name, generation)), owner.model_dump_json().encode())

    def remove(self, name: str, generation: int) -> None:
        """Remove the object."""
        self.remote.delete(_key(claim_name(name, generation)))

    def claims_on(self, name: str) -> dict[int, Seen]:
        """Look at the objects. The time of each is that of its worker, who is gone where there is none."""
        times, claims = self._times(), {}
        workers = _workers(times)
        for key, time in times.items():
            match = CLAIM.fullmatch(key.removeprefix(_key("")))
            if match and match["name"] == name and (seen := self._seen(key, time)):
                alive = seen.time if seen.owner is None else workers.get(seen.owner.token, -math.inf)
                claims[int(match["generation"])] = Seen(seen.owner, alive)
        return claims

    def names(self) -> set[str]:
        """List what the objects claim."""
        matches = (CLAIM.fullmatch(key.removeprefix(_key(""))) for key in self._times())
        return {match["name"] for match in matches if match}

    def _times(self) -> dict[str, float]:
        """List when each object was written, by key."""
        return {key: listed.seconds for key, listed in self.remote.list(CLAIMS).items()}

    def _seen(self, key: str, time: float) -> Seen | None:
        """Read whose an object is; None if it is gone."""
        content = self.remote.content(key)
        if content is None:
            return None
        try:
            return Seen(Owner.model_validate_json(content), time)
        except ValidationError:
            return Seen(None, time)


def _key(name: str) -> str:
    return f"{CLAIMS}/{name}"


def _workers(times: dict[str, float]) -> dict[str, float]:
    """Choose the workers' objects of all that are listed: their times, by token."""
    matches = ((WORKER.fullmatch(key.removeprefix(_key(""))), time) for key, time in times.items())
    return {match["token"]: time for match, time in matches if match}
