"""Stores as they were made before saemill kept norms of rows."""

import json
import shutil
from pathlib import Path

from saemill.common import records
from saemill.common.stores.activations import ActivationStore


def forget_norms(store: ActivationStore, copy: Path, keep: bool = False) -> ActivationStore:
    """A copy of a store, whose records have no fields for norms unless they are to be kept."""
    shutil.copytree(store.path, copy)
    for site in () if keep else store.sites:
        for file in (*(copy / site / "commits").glob("*.json"), copy / site / "manifest.json"):
            values = json.loads(file.read_text())
            values.pop("norms", None)
            values.pop("lengths", None)
            values.get("statistics", {}).pop("lengths", None)
            values.pop(records.CHECKSUM)
            file.write_text(json.dumps(records.sealed(values)))
    return ActivationStore(copy)
