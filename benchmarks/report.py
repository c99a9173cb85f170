"""What a report begins with, and its tables."""

import os
import platform
from collections.abc import Iterable, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
"""Instruction sets that decide how fast products are."""
PACKAGES = ("saemill", "torch", "transformers", "zarr")


def machine(versions: Mapping[str, str] | None = None, gpus: Iterable[str] = ()) -> str:
    """Describe the machine, the versions and the date, in one line.

    Args:
        versions: by package; by default those that are installed here.
        gpus: names of the GPUs that were used.
    """
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    facts = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    flags = [flag for flag in FLAGS if flag in facts.get("flags", "").split()]
    cpu = facts.get("model name", platform.processor())
    versions = versions or {name: version(name) for name in PACKAGES}
    items = [*sorted(gpus), f"{os.cpu_count()} cores of {cpu} ({', '.join(flags)})"]
    items += [f"{name} {number}" for name, number in versions.items()]
    return f"{'; '.join(items)}; {date.today().isoformat()}"


def table(head: list[str], rows: list[list[str]], n_text: int = 2) -> list[str]:
    """Render a Markdown table, by lines; the first `n_text` columns are text, the others numbers."""
    rule = "|" + "---|" * n_text + "--:|" * (len(head) - n_text)
    return ["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows), ""]
