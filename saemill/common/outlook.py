"""What a stage is going to do and what it needs: told when all is checked, before anything is written."""

import os
import resource
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from saemill.common.addresses import address_of
from saemill.common.log import say

STATUS = Path("/proc/self/status")
CGROUP = Path("/sys/fs/cgroup/memory.max")
"""Most memory of this container, in bytes, where there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """One stage on one process; of what is not known, or is none, nothing is told."""

    stage: str
    what: tuple[str, ...] = ()
    """Sentences on what is going to be done."""
    folder: Path | None = None
    """Where is written, a folder or an address; None where that follows from a stage that has not run."""
    is_done: bool = False
    """Whether it is there already."""
    amounts: Mapping[str, int] = field(default_factory=dict)
    """Tokens, or passages, that the stage goes over, by the setting that limits them; the first counts."""
    least: int = 1
    """Fewest that it can go over: a row, a step."""
    unit: str = "token"
    disk: Mapping[str, int] = field(default_factory=dict)
    """Bytes that are written, by what they are."""
    n_files: int = 0
    memory: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the host's memory at once, by what takes them."""
    gpu: Mapping[str, int] = field(default_factory=dict)
    """Bytes of a GPU's memory, by what takes them."""

    @property
    def amount(self) -> int:
        """Tokens, or passages, that the stage goes over; 0 where nobody knows yet."""
        return next(iter(self.amounts.values()), 0)

    @property
    def disk_bytes(self) -> int:
        """Bytes that are written in all."""
        return sum(self.disk.values())

    @property
    def memory_bytes(self) -> int:
        """Bytes of the host's memory at once."""
        return sum(self.memory.values())

    def lines(self) -> list[str]:
        """Write it down, a line for each sentence and each kind of need."""
        lines = list(self.what)
        if self.disk:
            free = (
                ""
                if self.folder is None or address_of(self.folder)
                else f"; {shown(free_bytes(self.folder))} free"
            )
            files = f" in {self.n_files:,} files" if self.n_files else ""
            lines.append(f"disk: {shown(self.disk_bytes)}{files} ({_listed(self.disk)}){free}")
        if self.memory:
            lines.append(f"memory: {shown(self.memory_bytes)} at once ({_listed(self.memory)})")
        if self.gpu:
            lines.append(f"GPU memory: {shown(sum(self.gpu.values()))} at once ({_listed(self.gpu)})")
        return lines


Before = Callable[[Outlook], None]
"""What a stage calls when all is checked, before it writes anything; what it raises ends the stage."""


def tell(outlook: Outlook) -> None:
    """Tell the user what is going to be done; nothing where it is there already."""
    if not outlook.is_done:
        say("\n".join(outlook.lines()))


def shown(n_bytes: float) -> str:
    """Write a number of bytes as people do: `12.3 MiB`, `4.5 GiB`."""
    return f"{n_bytes / 2**20:,.1f} MiB" if n_bytes < 2**30 else f"{n_bytes / 2**30:,.1f} GiB"


def _listed(parts: Mapping[str, int]) -> str:
    """List parts, the largest first; those of no size are left out."""
    largest_first = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{what} {shown(n_bytes)}" for what, n_bytes in largest_first if n_bytes)


def free_bytes(folder: Path) -> int:
    """Find the free bytes of the disk that a folder is on, or would be."""
    return shutil.disk_usage(nearest_folder(folder)).free


def nearest_folder(folder: Path) -> Path:
    """Return the nearest folder that is there: itself, or one above it."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def process_bytes() -> int:
    """Measure the most memory that this process has held so far; at its start that is its libraries.

    The kernel's figure of the process itself; that of `getrusage` begins with what the process held that
    started it.
    """
    lines = STATUS.read_text().splitlines() if STATUS.is_file() else []
    peak = [line.split() for line in lines if line.startswith("VmHWM:")]
    return int(peak[0][1]) * 1024 if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine_bytes() -> int:
    """Find the memory of this machine, or of the container that this process is in."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP.read_text().strip() if CGROUP.is_file() else "max"
    return min(whole, int(limit)) if limit.isdecimal() else whole
