"""Files that are whole or absent: written beside their place, flushed to disk, then renamed."""

import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

from saemill.common.errors import DiskError, MissingError, StoreError
from saemill.common.log import say

READ_BYTES = 1 << 24
PARTIAL = ".*.partial"
"""Glob of the partly written files that a crash leaves; they count as nothing."""
FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_MESSAGES = (
    *(f"(os error {number})" for number in FULL_ERRNOS),
    "No space left",
    "failed writing file",
    "database or disk is full",
)
"""Signs of a full disk in the messages of libraries that hide the system's error."""
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
MISSING = "file is missing"
DIFFERS = "content differs from its hash"
GO_ON = "then run the same command again: it goes on from what is finished"


@contextmanager
def replacing(path: Path, n_bytes: int | None = None) -> Iterator[Path]:
    """Write a file whole or not at all: yield a path beside `path`, which is flushed and renamed when the
    block ends well.

    A crash at any moment leaves the old file or the new one; an error removes what was written. The file's
    mode is what the umask asks for, whatever the library that writes it prefers.

    Args:
        path: where the file shall appear; its folder is created.
        n_bytes: how large it will be, if that is known; the message on a full disk gives it.

    Raises:
        DiskError: the disk is full, or the folder may not be written to.
    """
    partial = path.with_name(f".{path.name}.partial")
    with writing(path, n_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode & 0o777
        try:
            yield partial
            partial.chmod(mode)
            sync_file(partial)
        except Exception:
            partial.unlink(missing_ok=True)
            raise
        partial.replace(path)
        sync_folder(path.parent)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Write a folder whole or not at all: yield a new one beside `path`, which takes its place when the block
    ends well. The files in it are flushed by who writes them.

    A crash leaves the old folder, the new one, or none; an error removes what was written.

    Args:
        path: where the folder shall appear, in place of one that is there.

    Raises:
        DiskError: the disk is full, or the folder may not be written to.
    """
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        remove(partial)
        partial.mkdir(parents=True)
        try:
            yield partial
        except Exception:
            remove(partial)
            raise
        sync_folder(partial)
        remove(path)
        partial.replace(path)
        sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; what is not there is gone already."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def writing(path: Path, n_bytes: int | None = None) -> Iterator[None]:
    """Turn a full disk or a folder without the right to write, while the block runs, into a sentence.

    Args:
        path: what is being written.
        n_bytes: how large it will be, if that is known.

    Raises:
        DiskError: in place of the system's error.
    """
    try:
        yield
    except OSError as error:
        if message := explained(error, path, n_bytes):
            raise DiskError(message) from error
        raise
    except Exception as error:
        # Libraries that write (safetensors, torch) have errors of their own for a full disk, or hide the
        # system's behind them.
        if not any(_is_full_disk(each) for each in _chain(error)):
            raise
        raise DiskError(_full(path, n_bytes)) from error


def _is_full_disk(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL_ERRNOS
    return any(sign in str(error) for sign in FULL_MESSAGES)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those behind it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def explained(error: OSError, path: Path | None = None, n_bytes: int | None = None) -> str | None:
    """Describe what the system's error means for the user, and what helps; None where it is of another
    kind."""
    where = path or (Path(os.fsdecode(error.filename)) if error.filename else None)
    if error.errno in FULL_ERRNOS:
        return _full(where, n_bytes)
    if error.errno in NO_ACCESS:
        return f"{where or 'a file'} may not be read or written ({error.strerror}): change its mode, {GO_ON}"
    if error.errno == errno.EIO:
        return f"{where or 'a file'}: the disk fails ({error.strerror}); see to the disk, {GO_ON}"
    return None


def _full(path: Path | None, n_bytes: int | None) -> str:
    """Describe a disk, a quota or a limit on files that leaves no room for `path`."""
    what = path or "a file"
    size = f" ({n_bytes:,} bytes)" if n_bytes else ""
    folder = next((f for f in (path.absolute().parents if path else ()) if f.is_dir()), None)
    free = f": {shutil.disk_usage(folder).free:,} bytes are free there" if folder else ""
    return f"no room on the disk for {what}{size}{free}, or a quota or limit is reached. Make room, {GO_ON}"


def place(finished: Path, path: Path) -> None:
    """Give a file that is written and flushed a second name, `path`, never in place of another file.

    Both names must be on one file system that knows hard links; the folder of `path` is created.

    Raises:
        FileExistsError: another file has that name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(finished, path)
    except FileExistsError:
        # NFS may say so after it made the link itself.
        if not path.samefile(finished):
            raise
    sync_folder(path.parent)


def write_bytes(path: Path, buffers: Iterable[bytes | memoryview], pad_to_bytes: int = 0) -> None:
    """Write `buffers` to `path`, whole or not at all.

    Args:
        path: where the file shall appear; its folder is created.
        buffers: buffers written one after the other.
        pad_to_bytes: extend the file with zeros (a hole on most file systems) up to this size.
    """
    buffers = list(buffers)
    n_bytes = max(pad_to_bytes, sum(memoryview(buffer).nbytes for buffer in buffers))
    with replacing(path, n_bytes) as partial, partial.open("wb") as file:
        for buffer in buffers:
            file.write(buffer)
        if file.tell() < pad_to_bytes:
            file.truncate(pad_to_bytes)


@contextmanager
def exclusive(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Keep other processes, while the block runs, out of such a block of the same folder.

    The folder itself is locked (flock), so a killed process leaves nothing behind. File systems
    that cannot lock a folder, NFS among them, give no such guard.

    Args:
        folder: made where it is missing. The process that was waited for may have renamed it.
        wait: until another process has left, instead of refusing.

    Yields: whether there is a guard.

    Raises:
        StoreError: another process is there, and `wait` is false.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield _lock(folder, descriptor, wait)
    finally:
        os.close(descriptor)


def _lock(folder: Path, descriptor: int, wait: bool) -> bool:
    """Lock an open folder. Return False where the file system cannot."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise StoreError(f"another process is writing to {folder}; wait for it, or stop it") from None
        say(f"another process is writing to {folder}; waiting for it")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
            raise
        return False
    return True


def sync_file(file: Path) -> None:
    """Flush a file that another library wrote."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names, so that a rename survives a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all; NaN and infinity are refused."""
    write_bytes(path, [json.dumps(value, indent=1, allow_nan=False).encode() + b"\n"])


def read_json(path: Path, repair: str = "") -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        repair: the sentence on what to do, put at the end of messages.

    Raises:
        MissingError: there is no such file.
        StoreError: its content is no JSON; saemill writes such files whole, so it was damaged later. Or it
            cannot be read.
    """
    with reading(path, repair):
        content = path.read_bytes()
    try:
        return json.loads(content.decode(), parse_constant=_refuse)
    except RecursionError:
        raise StoreError(f"{path} is damaged: it is nested too deeply. {repair}".rstrip()) from None
    except ValueError as error:
        raise StoreError(f"{path} is damaged: {error}. {repair}".rstrip()) from error


def _refuse(constant: str) -> Any:
    """Refuse NaN and infinity, which Python accepts as JSON."""
    raise ValueError(f"{constant} is no number of JSON")


@contextmanager
def reading(path: Path, repair: str = "") -> Iterator[None]:
    """Turn a file that is missing or cannot be read, while the block runs, into a sentence.

    Args:
        path: what is being read.
        repair: the sentence on what to do where it is missing.

    Raises:
        MissingError: there is no such file.
        DiskError: it cannot be read.
    """
    try:
        yield
    except (MissingError, DiskError):
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise MissingError(f"{path}: {MISSING}. {repair}".rstrip()) from None
    except OSError as error:
        raise DiskError(f"{path} cannot be read: {error.strerror or error}") from error


def problem(file: Path, n_bytes: int, xxh3: str | None = None) -> str | None:
    """Describe how a file differs from what was written, in words to put after its name; None if it does not.

    Args:
        file: its path.
        n_bytes: the size that it had.
        xxh3: the hash that it had; without it content is not read.

    Raises:
        DiskError: it cannot be read.
    """
    try:
        with reading(file):
            now = file.stat()
        if not stat.S_ISREG(now.st_mode):
            return "it is no file"
        if now.st_size != n_bytes:
            return f"file has {now.st_size:,} bytes, expected {n_bytes:,}"
        return DIFFERS if xxh3 is not None and hash_file(file) != xxh3 else None
    except MissingError:
        return MISSING


def hash_file(path: Path) -> str:
    """Compute xxh3 (64 bits, hexadecimal) of a file's bytes, read in pieces of 16 MiB.

    Raises:
        MissingError: there is no such file.
        DiskError: it cannot be read.
    """
    digest = xxhash.xxh3_64()
    with reading(path), path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def hash_buffers(buffers: Iterable[bytes | memoryview], pad_to_bytes: int = 0) -> tuple[int, str]:
    """Compute size in bytes and hash of the file that `write_bytes` makes of the same arguments."""
    digest, n_bytes = xxhash.xxh3_64(), 0
    for buffer in buffers:
        digest.update(buffer)
        n_bytes += memoryview(buffer).nbytes
    while n_bytes < pad_to_bytes:
        zeros = bytes(min(READ_BYTES, pad_to_bytes - n_bytes))
        digest.update(zeros)
        n_bytes += len(zeros)
    return n_bytes, digest.hexdigest()


def hash_bytes(content: bytes | memoryview) -> str:
    """Compute what `hash_file` returns for a file with this content."""
    return xxhash.xxh3_64_hexdigest(content)


def hash_json(value: Any) -> str:
    """Compute xxh3 of a value's JSON text with sorted keys: the fingerprint of settings.

    Raises:
        StoreError: the value, which a file held, is nested too deeply.
    """
    try:
        return xxhash.xxh3_64_hexdigest(json.dumps(value, sort_keys=True).encode())
    except RecursionError:
        raise StoreError("a file of JSON is damaged: it is nested too deeply") from None


def hash_folder(folder: Path, names: Iterable[Path]) -> str:
    """Compute one fingerprint of several files: their paths below `folder` and their contents."""
    return hash_json([[str(name.relative_to(folder)), hash_file(name)] for name in sorted(names)])


def folder_bytes(folder: Path) -> int:
    """Sum the bytes of all files below a folder; other processes may be removing some meanwhile."""
    n_bytes = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):
            n_bytes += file.stat().st_size if file.is_file() else 0
    return n_bytes
