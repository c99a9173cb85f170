"""Whose message each token of a chat belongs to: spans of addresses, each with a role.

Layout of `roles.parquet`, beside a token store's other tables:

    start   address where a span begins; the first is 0, and each ends where the next begins
    role    0 outside messages (what a chat template puts around them, separators), else the role's number in
            the manifest's list, counted from 1
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

FILE = "roles.parquet"
SCHEMA = pa.schema([("start", pa.int64()), ("role", pa.uint8())])
MOST_ROLES = 255
"""Number of roles that a byte tells apart, beside none."""


class RoleSpans:
    """Spans of one role each, in the order of their addresses.

    Raises:
        ValueError: they do not cover the addresses from 0 on, or name a role that there is not.
    """

    def __init__(self, table: pa.Table, n_tokens: int, n_roles: int) -> None:
        self.n_addresses = n_tokens
        self.starts, self.roles = table["start"].to_numpy(), table["role"].to_numpy()
        begins = len(self.starts) > 0 and self.starts[0] == 0
        if not begins or self.starts[-1] >= n_tokens or not (np.diff(self.starts) > 0).all():
            raise ValueError("no list of places that begins at 0")
        if self.roles.max() > n_roles:
            raise ValueError(f"it names role {self.roles.max()}, of {n_roles}")

    def at(self, addresses: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Look up the role at each address. Same shape, uint8."""
        found: NDArray[np.uint8] = self.roles[np.searchsorted(self.starts, addresses, side="right") - 1]
        return found

    def n_tokens(self, n_roles: int) -> list[int]:
        """Count the tokens of each role, those of none first."""
        lengths = np.diff(np.append(self.starts, self.n_addresses))
        counts = np.bincount(self.roles, lengths, n_roles + 1).astype(np.int64)
        return [int(n) for n in counts]

    def until(self, end: int) -> pa.Table:
        """Return the spans that begin before an address."""
        n = int(np.searchsorted(self.starts, end))
        return pa.table({"start": self.starts[:n], "role": self.roles[:n]}, schema=SCHEMA)


class RoleWriter:
    """A writer that takes roles row by row and keeps where they change."""

    def __init__(self) -> None:
        self.starts: list[NDArray[np.int64]] = []
        self.roles: list[NDArray[np.uint8]] = []
        self._n_tokens, self._last = 0, -1

    def add(self, roles_S: Sequence[int]) -> None:
        """Add the roles of one row's tokens."""
        row = np.array(roles_S, np.uint8)
        changes = np.flatnonzero(np.diff(row.astype(np.int16), prepend=np.int16(self._last)))
        self.starts.append(changes + self._n_tokens)
        self.roles.append(row[changes])
        self._n_tokens, self._last = self._n_tokens + len(row), int(row[-1])

    def table(self) -> pa.Table:
        """Return the spans of all rows so far."""
        starts, roles = np.concatenate(self.starts), np.concatenate(self.roles)
        return pa.table({"start": starts, "role": roles}, schema=SCHEMA)
