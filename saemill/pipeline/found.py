"""What results are found again by, and whether they are there."""

from pathlib import Path
from typing import Any

from saemill.common.errors import StoreError
from saemill.common.models.tokenizer import load_tokenizer
from saemill.common.stores import runs
from saemill.common.stores.activations import ActivationStore
from saemill.common.tracking import record
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.files import fingerprint_local


def content_of_tokens(config: TokenizeConfig) -> dict[str, Any]:
    """List what decides the tokens: settings, the text of a local dataset, the tokenizer."""
    content = config.identity()
    local = [Path(entry.dataset) for entry in config.inputs if Path(entry.dataset).exists()]
    if config.dataset is not None and local:
        content["dataset_hash"] = fingerprint_local(local[0])
    elif local:
        content["dataset_hashes"] = [fingerprint_local(path) for path in local]
    content["tokenizer_hash"] = load_tokenizer(config.tokenizer, config.tokenizer_revision)[1].hash
    return content


def has_sites(path: Path, content: dict[str, Any], names: list[str]) -> bool:
    """Tell whether a store of this content holds finished sites, by their sizes. Their blocks are checked as
    they are read.

    Args:
        path: the store's folder.
        content: settings that it must have.
        names: the sites.
    """
    try:
        store = ActivationStore(path)
        for name in names:
            store.site(name)
    except StoreError:
        return False
    store_settings = store.settings.model_dump(mode="json")
    return all(store_settings.get(name) == value for name, value in content.items())


def owes_wandb(run: Path) -> bool:
    """Tell whether wandb lacks something of a run that is logged to it."""
    if not (run / runs.WANDB).exists():
        return False
    return not set(record.settings(run).runs) <= set(record.logged(run).ended)
