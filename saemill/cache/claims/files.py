"""Claims on a disk: files of a folder, which is there while there are workers."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from saemill.cache.claims.board import CLAIM, WORKER, claim_name, worker_name
from saemill.cache.claims.owner import Owner, Seen


class Files:
    """The claims in a folder; see `Board`. Time is the file system's: that of a file touched just now.

    Args:
        folder: made when a worker joins, removed with the last file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def join(self, owner: Owner) -> None:
        """Make a worker's file."""
        file = self.file(owner.token)
        partial = file.with_name(f"{file.name}.partial-joining")
        while not file.exists():
            # Others may be making the folder, sweeping it, or be the last to leave it.
            with suppress(FileExistsError):
                self.folder.mkdir(parents=True)
            with suppress(FileNotFoundError):
                partial.write_text(owner.model_dump_json())
                partial.replace(file)

    def touch(self, owner: Owner) -> float:
        """Touch a worker's file, which is that of its claims too."""
        file = self.file(owner.token)
        os.utime(file)
        return file.stat().st_mtime

    def remove_worker(self, token: str) -> None:
        """Remove a worker's file, and the folder with the last one."""
        self.file(token).unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def bury(self, token: str, seen: Seen) -> bool:
        """Look at a worker's file again, and remove it. Of a touch in between the next one fails."""
        again = Seen.at(self.file(token))
        if again is not None and again.time > seen.time:
            return False
        self.file(token).unlink(missing_ok=True)
        return True

    def workers(self) -> dict[str, Seen]:
        """Look at the workers' files."""
        files = {file.name.removeprefix("worker-"): file for file in self.folder.glob("worker-*")}
        looks = {token: Seen.at(file) for token, file in files.items() if "." not in token}
        return {token: seen for token, seen in looks.items() if seen}

    def make(self, owner: Owner, name: str, generation: int) -> None:
        """Link a worker's file under the name of a claim."""
        os.link(self.file(owner.token), self.folder / claim_name(name, generation))

    def remove(self, name: str, generation: int) -> None:
        """Remove the link."""
        (self.folder / claim_name(name, generation)).unlink(missing_ok=True)

    def claims_on(self, name: str) -> dict[int, Seen]:
        """Look at the links."""
        claims = {}
        for path in self.folder.glob(f"{name}.*"):
            if (match := CLAIM.fullmatch(path.name)) and (seen := Seen.at(path)):
                claims[int(match["generation"])] = seen
        return claims

    def names(self) -> set[str]:
        """List what the links claim."""
        return {match["name"] for path in self.folder.iterdir() if (match := CLAIM.fullmatch(path.name))}

    def file(self, token: str) -> Path:
        """Name a worker's file."""
        return self.folder / worker_name(token)


def token_of(path: Path) -> str | None:
    """Give the token of the worker whose file, or partial file, a file is."""
    match = WORKER.match(path.name)
    return match and match["token"]


def holds_only_claims(folder: Path) -> bool:
    """Tell whether a folder holds only workers' files and claims."""
    return all(CLAIM.fullmatch(path.name) or token_of(path) for path in folder.iterdir())


def remove(path: Path) -> None:
    """Remove a file or folder that others may be removing too."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
