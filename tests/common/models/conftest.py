"""Models of all families, made once."""

from pathlib import Path
from typing import Any

import families
import pytest


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each family's checkpoint and transformers' own model, made once."""
    found: dict[str, tuple[Path, Any]] = {}

    def get(family: str) -> tuple[Path, Any]:
        if family not in found:
            folder = tmp_path_factory.mktemp(family)
            found[family] = (folder, families.make(family, str(folder)))
        return found[family]

    return get
