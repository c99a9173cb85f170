"""Records: what was written comes back, and nothing else does."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saemill.common import durable, records
from saemill.common.errors import DiskError, MissingError, StoreError

REPAIR = "Make it again."


class Example(records.Record):
    format: Literal["example 2"] = "example 2"
    name: records.Name
    count: records.Count
    share: float
    files: tuple[records.File, ...]
    steps: dict[int, int]


WHOLE = Example(
    name="a",
    count=3,
    share=0.1,
    files=(records.File(path="x/y.bin", bytes=2, xxh3="0123456789abcdef"),),
    steps={-3: 1, 10: 2, 9: 3},
)


def test_a_record_comes_back(tmp_path: Path) -> None:
    """Oracle: the record that was written."""
    records.write(tmp_path / "r.json", WHOLE)
    assert records.read(tmp_path / "r.json", Example, REPAIR) == WHOLE


@settings(max_examples=300)
@given(st.data())
def test_any_changed_byte_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Oracle: the record that was written: it comes back, or an error that names the file does."""
    path = tmp_path_factory.getbasetemp() / "mutated.json"
    records.write(path, WHOLE)
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    change = data.draw(st.sampled_from(["bit", "cut", "zero", "insert"]))
    if change == "bit":
        raw[at] ^= 1 << data.draw(st.integers(0, 7))
    elif change == "cut":
        del raw[at:]
    elif change == "zero":
        raw[at:] = bytes(len(raw) - at)
    else:
        raw[at:at] = data.draw(st.binary(min_size=1, max_size=4))
    path.write_bytes(raw)
    told = None
    try:
        assert records.read(path, Example, REPAIR) == WHOLE  # white space may have changed
    except StoreError as error:
        told = str(error)
    assert told is None or (told.startswith(str(path)) and told.endswith(REPAIR))


def test_what_is_no_record_is_told(tmp_path: Path) -> None:
    """Oracle: the kinds of content that are none."""
    path = tmp_path / "r.json"
    with pytest.raises(MissingError, match=r"r\.json: file is missing\. Make it again"):
        records.read(path, Example, REPAIR)
    contents = {
        b"[" * 100_000: "nested too deeply",
        b"\xff\xfe": "damaged",
        b"[]": "no fields",
        b"{}": "format None",
        b'{"format": "example 1"}': "format 'example 1', but this version of saemill reads 'example 2'",
        b'{"format": "example 2", "count": NaN}': "NaN is no number",
        b'{"format": "example 2"}': "checksum",
    }
    for content, told in contents.items():
        path.write_bytes(content)
        with pytest.raises(StoreError, match=told):
            records.read(path, Example, REPAIR)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("count", "3", "count"),
        ("count", -1, "count"),
        ("count", 2**63, "count"),
        ("share", "x", "share"),
        ("name", "../evil", "name"),
        ("name", "", "name"),
        ("name", ".hidden", "name"),
        ("files", [{"path": "/etc/passwd", "bytes": 1, "xxh3": "0123456789abcdef"}], "path"),
        ("files", [{"path": "a/../../b", "bytes": 1, "xxh3": "0123456789abcdef"}], "path"),
        ("more", 1, "more"),
    ],
)
def test_a_sealed_record_of_wrong_types_is_refused(field: str, value: object, told: str) -> None:
    """Oracle: the record's types; the checksum is right here."""
    fields = WHOLE.model_dump(mode="json") | {field: value}
    with pytest.raises(StoreError, match=told):
        records.parse(records.sealed(fields), Example, "here", REPAIR)


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    """Oracle: the mode of a file that Python makes; a library may make its own narrower."""
    plain = tmp_path / "plain"
    plain.touch()
    with durable.replacing(tmp_path / "file") as partial:
        partial.unlink()
        os.close(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600))
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    """Oracle: the system's limit on a file's size, which fails as a full disk does."""
    script = (
        "import resource, signal, sys; from pathlib import Path; from saemill.common import durable\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "durable.write_bytes(Path(sys.argv[1]), [b'x' * 9999])"
    )
    path = tmp_path / "file"
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert f"DiskError: no room on the disk for {path} (9,999 bytes)" in done.stderr
    assert "run the same command again" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    """Oracle: the error that was raised."""
    with (
        pytest.raises(OSError, match="nothing of the kind") as caught,
        durable.replacing(tmp_path / "file"),
    ):
        raise OSError(errno.EBUSY, "nothing of the kind")
    assert not isinstance(caught.value, DiskError)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_though_torch_hides_it() -> None:
    """Oracle: /dev/full, on which there is never room; torch raises an error of its own in its place."""
    state, full = {"a": torch.zeros(300_000), "b": torch.zeros(700_000)}, Path("/dev/full")
    told = r"no room on the disk for x\.pt \(4,000,000 bytes\)"
    with (
        pytest.raises(DiskError, match=told),
        durable.writing(Path("x.pt"), 4_000_000),
        full.open("wb") as file,
    ):
        torch.save(state, file)
