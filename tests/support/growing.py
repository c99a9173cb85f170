"""A store that comes into being shard by shard, in whatever order, from one that is finished."""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from saemill.common.stores.activations import ActivationStore
from saemill.train.following import Following


class Growing:
    """A copy of a finished store that has none of its shards yet."""

    def __init__(self, whole: ActivationStore, path: Path, order: Iterable[int] | None = None) -> None:
        self.whole, self.path, self.sites = whole.path, path, whole.sites
        shutil.copytree(whole.path, path)
        for site in self.sites:
            (path / site / "manifest.json").unlink()
            for shards in ("c", "commits"):
                shutil.rmtree(path / site / shards)
                (path / site / shards).mkdir()
        self._left: Iterator[int] = iter(range(whole.n_shards) if order is None else order)

    def grow(self) -> bool:
        """Commit the next shard, the sites one after the other; tell whether there was one."""
        shard = next(self._left, None)
        for site in self.sites if shard is not None else ():
            place = self.path / site / "c" / str(shard)
            place.mkdir()
            shutil.copy(self.whole / site / "c" / str(shard) / "0", place / "0")
            name = f"{site}/commits/{shard}.json"
            shutil.copy(self.whole / name, self.path / name)
        return shard is not None

    def finish(self) -> None:
        """Give the sites their manifests."""
        while self.grow():
            pass
        for site in self.sites:
            shutil.copy(self.whole / site / "manifest.json", self.path / site / "manifest.json")

    def grows_when_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let every wait of a follower be the moment at which the next shard comes."""

        def wait(following: Following) -> None:
            assert self.grow(), "waits for a shard that never comes"

        monkeypatch.setattr(Following, "wait", wait)
