"""Loops for CPUs that several rooms share, compiled by numba when they are first needed.

numbers.py   how loops are compiled; bfloat16 as numba sees it
kth.py       the k-th largest of some numbers
largest.py   the k largest entries of each row
moments.py   means and squared deviations of rows, and their norms

Every row is computed alone, so results do not depend on the number of threads. The modules need numba; import
them where they are used, and only there.
"""

import hashlib
import os
import tempfile
from pathlib import Path

import numba
from platformdirs import user_cache_path


def _cache() -> str:
    """Make the folder of compiled loops: one for each version of all files of loops, here and in other rooms.

    numba itself looks for changes in the file of each function alone, not in those of what it calls.
    """
    package = Path(__file__).parents[2]
    files = sorted(package.rglob("loops/*.py"))
    version = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    folder = user_cache_path("saemill") / f"loops-{version}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:  # nothing can be kept
        return tempfile.mkdtemp(prefix="saemill-loops-")
    return str(folder)


if not os.environ.get("NUMBA_CACHE_DIR"):
    numba.config.CACHE_DIR = _cache()
