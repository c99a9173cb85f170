"""The files of a folder of claims: their names, and how they are looked at and removed."""

import re
import shutil
from pathlib import Path

from saemill.cache.claims.owner import Seen

CLAIMS = "claims"
"""The folder of a store in which its workers claim shards; it is gone when none is left."""
CLAIM = re.compile(r"(?P<name>store|shard-\d+)\.(?P<generation>\d+)")
WORKER = re.compile(r"\.?(?P<worker>worker-[0-9a-f]{16})(\.|$)")


def claim_path(folder: Path, name: str, generation: int) -> Path:
    """Name the file of one generation of a claim."""
    return folder / f"{name}.{generation}"


def claims_on(folder: Path, name: str) -> dict[int, Seen]:
    """List the claims on a name, by generation."""
    claims = {}
    for path in folder.glob(f"{name}.*"):
        if (match := CLAIM.fullmatch(path.name)) and (seen := Seen.at(path)):
            claims[int(match["generation"])] = seen
    return claims


def worker_of(path: Path) -> str | None:
    """Give the name of the worker's file that a file is, or is a partial of."""
    match = WORKER.match(path.name)
    return match and match["worker"]


def holds_only_claims(folder: Path) -> bool:
    """Tell whether a folder holds only workers' files and claims."""
    return all(CLAIM.fullmatch(path.name) or worker_of(path) for path in folder.iterdir())


def remove(path: Path) -> None:
    """Remove a file or folder that others may be removing too."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
