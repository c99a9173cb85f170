"""What a follower takes from the first shards of its store, written down in its run.

A run that is gone on with reads it there: the shards themselves may be gone by then.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from saemill.common import records
from saemill.common.records import Hash, Positive, Record
from saemill.common.stores.runs import ANEW, UNITS
from saemill.common.stores.statistics import Statistics
from saemill.common.stores.statistics_records import SiteStatistics


class Units(Record):
    """Statistics of the rows that are trained on, and the norms beyond which rows are too long, by site."""

    n_shards: Positive
    """Number of the first shards, whose rows these are of."""
    statistics: dict[str, SiteStatistics]
    limits: dict[str, Annotated[float, Field(gt=0)]]
    """Empty where no row is too long."""

    @classmethod
    def of(cls, statistics: Mapping[str, Statistics], limits: Mapping[str, float], n_shards: int) -> "Units":
        """Make the record."""
        made = {site: SiteStatistics.of_statistics(each) for site, each in statistics.items()}
        return cls(n_shards=n_shards, statistics=made, limits=dict(limits))

    def of_site(self, site: str) -> Statistics:
        """Return the statistics of a site."""
        return self.statistics[site].statistics()


class RunUnits(Record):
    """`units.json`."""

    format: Literal["saemill units 1"] = "saemill units 1"
    run: Hash
    units: Units


def read(folder: Path, run: str) -> Units | None:
    """Read the units of a run that is gone on with; None where there are none of this run.

    Raises:
        StoreError: they are damaged.
    """
    if not (folder / UNITS).exists():
        return None
    record = records.read(folder / UNITS, RunUnits, ANEW)
    return record.units if record.run == run else None


def write(folder: Path, run: str, units: Units) -> None:
    """Write the units of a run."""
    records.write(folder / UNITS, RunUnits(run=run, units=units))
