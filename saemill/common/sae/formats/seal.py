"""The seal of an SAE that saemill saved: hashes of its two files, in the `saemill` part of `cfg.json`.

sparsify, which reads the same files, ignores that part, and leaves it out when it saves. So whoever
changes an SAE with it takes off the seal, and the weights' note of it (`MADE_BY`) as well.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open

from saemill.common import durable, records
from saemill.common.errors import StoreError
from saemill.common.records import Count, Hash, Record

KEY = "seal"
OWN = "saemill"
MADE_BY = {"made_by": OWN}
"""Metadata of the file of weights, which say that a seal must be there."""
REPAIR = (
    "Get it again from where it came from; `saemill train` with --no-resume trains a run anew. To take it as "
    f"it is, remove {OWN!r} from cfg.json and save the tensors anew, without metadata."
)


class Seal(Record):
    """The part of `cfg.json` on the SAE's files; its checksum is that of the whole config."""

    format: Literal["saemill SAE 2"] = "saemill SAE 2"
    bytes: Count
    """Size of the file of weights."""
    xxh3: Hash


def seal(cfg: Mapping[str, Any], n_bytes: int, xxh3: str) -> dict[str, Any]:
    """Put a seal on a config, for it and the weights.

    Args:
        cfg: its fields, saemill's own under `saemill`.
        n_bytes: of the file of weights.
        xxh3: of the same.
    """
    own = {key: value for key, value in cfg[OWN].items() if key != KEY}
    fields = Seal(bytes=n_bytes, xxh3=xxh3).model_dump(mode="json")
    # As it will be read: names become text, tuples lists.
    plain: dict[str, Any] = json.loads(json.dumps({**cfg, OWN: own | {KEY: fields}}, allow_nan=False))
    plain[OWN][KEY][records.CHECKSUM] = durable.hash_json(plain)
    return plain


def sealed_again(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Put a new seal on a config that was changed on purpose; the weights are the same."""
    fields = cfg[OWN][KEY]
    return seal(cfg, fields["bytes"], fields["xxh3"])


def checked(cfg: Mapping[str, Any], folder: Path, weights: Path) -> dict[str, Any] | None:
    """Check the seal and return what saemill wrote under `saemill`, without the seal; None where nothing was
    sealed.

    Args:
        cfg: the content of `cfg.json`.
        folder: of the SAE.
        weights: the file.

    Raises:
        StoreError: the config or the weights are not as they were written.
    """
    own = cfg.get(OWN)
    if not isinstance(own, dict) or KEY not in own:
        if _is_made_by_saemill(weights):
            raise StoreError(
                f"{folder / 'cfg.json'} is damaged: it has lost the hashes that saemill wrote. {REPAIR}"
            )
        return None
    sealed = _checked_config(cfg, folder)
    if problem := durable.problem(weights, sealed.bytes, sealed.xxh3):
        raise StoreError(f"{weights} is damaged: {problem}. {REPAIR}")
    return {key: value for key, value in own.items() if key != KEY}


def _checked_config(cfg: Mapping[str, Any], folder: Path) -> Seal:
    """Return the seal, if the config is as it was written."""
    where = str(folder / "cfg.json")
    written = cfg[OWN][KEY]
    if not isinstance(written, dict) or records.CHECKSUM not in written:
        raise StoreError(f"{where} is damaged: its seal is none. {REPAIR}")
    fields = {key: value for key, value in written.items() if key != records.CHECKSUM}
    if durable.hash_json({**cfg, OWN: cfg[OWN] | {KEY: fields}}) != written[records.CHECKSUM]:
        raise StoreError(f"{where} is damaged: its content differs from its checksum. {REPAIR}")
    return records.parse(records.sealed(fields), Seal, where, REPAIR)


def checksum(folder: Path) -> str:
    """Return the checksum of an SAE's config, by which the record of its run knows it.

    Raises:
        MissingError: there is no config.
        StoreError: it has none, or is not as it was written.
    """
    cfg = durable.read_json(folder / "cfg.json", REPAIR)
    if not isinstance(cfg, dict) or not isinstance(cfg.get(OWN), dict) or KEY not in cfg[OWN]:
        raise StoreError(f"{folder / 'cfg.json'} is damaged: it lacks its checksum. {REPAIR}")
    _checked_config(cfg, folder)
    return str(cfg[OWN][KEY][records.CHECKSUM])


def _is_made_by_saemill(weights: Path) -> bool:
    """Tell whether saemill wrote a file of weights, by its metadata."""
    try:
        with safe_open(weights, "pt") as file:
            return (file.metadata() or {}).items() >= MADE_BY.items()
    except Exception:  # of any kind: the reader of the tensors will report it
        return False
