"""What the stages leave, as objects: a run with its SAEs. The stores are objects themselves."""

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from saemill.common import records
from saemill.common.errors import StoreError
from saemill.common.sae import of_run
from saemill.common.sae.sae import Sae
from saemill.common.stores import assessments, runs
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.assessments import Assessment


class Run(Mapping[str, Sae]):
    """A finished run of `saemill train`: its SAEs by name, in the run's order. Each is loaded, on the CPU,
    when it is asked for.

    Args:
        path: the run's folder.

    Raises:
        MissingError: it is no finished run.
        StoreError: it is damaged.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.record = runs.finished(self.path)
        """What the run came to: steps, tokens, seconds, which SAEs diverged or were stopped early."""

    def __getitem__(self, name: str) -> Sae:
        if name not in self.record.cfgs:
            raise KeyError(f"{name!r}: {self.path} has {', '.join(self)}")
        return of_run.load(self.path, name, self.record)

    def __iter__(self) -> Iterator[str]:
        return iter(self.record.variants)

    def __len__(self) -> int:
        return len(self.record.variants)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}) of {', '.join(self)}"

    @cached_property
    def acts(self) -> ActivationStore:
        """Activations that it was trained on, where they were then.

        Raises:
            StoreError: they are no longer there, or others are.
        """
        store = ActivationStore(self.record.acts, self.record.with_acts)
        if store.fingerprint != runs.identity(self.path).acts_fingerprint:
            raise StoreError(f"{self.path} was not trained on what is in {store.path} now")
        return store

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Records of `metrics.jsonl`: step, tokens, seconds, and `variants` with the figures of each SAE.

        Raises:
            StoreError: the file is not as training left it.
        """
        if bad := records.problems(self.path, self.record.files):
            raise StoreError("\n".join(bad))
        return [json.loads(line) for line in (self.path / runs.METRICS).read_bytes().splitlines()]

    @property
    def assessment(self) -> Assessment:
        """Assessment on the run's own held-out tokens.

        Raises:
            MissingError: there is none yet.
            StoreError: it is damaged.
        """
        return assessments.load(self.path)
