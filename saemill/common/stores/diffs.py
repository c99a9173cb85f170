"""`diff.json`: what `saemill diff` found. It is written last, and answers for its other files.

diff.json         this record
latents.parquet   the figures of every latent
report.html       the page
run/              the crosscoder's run
"""

from pathlib import Path
from typing import Any, Literal

from saemill.common import records
from saemill.common.records import Count, File, Hash, Positive, Record
from saemill.common.stores.features import Context
from saemill.common.stores.runs import VariantName

FILE = "diff.json"
LATENTS, REPORT = "latents.parquet", "report.html"
RUN = "run"
"""Name of the folder of the crosscoder's run."""
REPAIR = "Run the same `saemill diff` again."


class Side(Record):
    """One of the two that are compared."""

    name: str
    """Name of the site, behind that of its model where there are two."""
    site: str
    model: str | None
    fvu: float
    """FVU of what the crosscoder reconstructs of it, on held-out tokens."""


class Shown(Record):
    """A latent that the page shows."""

    latent: Count
    group: str
    """Kind of the latent, or why it is shown beside others of its kind."""
    figures: dict[str, float | None]
    contexts: tuple[Context, ...]


class Diff(Record):
    """`diff.json`."""

    format: Literal["saemill diff 2"] = "saemill diff 2"
    of: Hash
    """Hash of the run's finished.json."""
    settings: dict[str, Any]
    """Settings of the measurement that decide it."""
    variant: VariantName
    described: str
    """Shape of the crosscoder, in words."""
    sides: tuple[Side, Side]
    unit: str
    n_tokens: Positive
    """Number of held-out tokens that latents were measured on."""
    l0: float
    kinds: dict[str, Count]
    """Number of latents of each kind."""
    relative_norms: dict[str, tuple[Count, ...]]
    """Latents by relative norm, in bins of equal width from 0 to 1, of each kind."""
    cosines: dict[str, tuple[Count, ...]]
    """Latents by the cosine of their parts, in bins of equal width from -1 to 1, of each kind."""
    shown: tuple[Shown, ...]
    notes: tuple[str, ...]
    versions: dict[str, str]
    files: tuple[File, ...]


def read(folder: Path) -> Diff:
    """Read the record.

    Raises:
        MissingError: there is none.
        StoreError: it is damaged.
    """
    return records.read(folder / FILE, Diff, REPAIR)


def problems(folder: Path) -> list[str]:
    """List what is wrong with the record and the files that it answers for, its run left out.

    Raises:
        StoreError: the record itself is damaged.
    """
    return [f"{line}. {REPAIR}" for line in records.problems(folder, read(folder).files)]
