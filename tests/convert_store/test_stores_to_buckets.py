"""Stores that `convert-store` and `import-activations` write to a bucket: what a disk would hold."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from crashes import file_hashes
from object_store import S3
from stores import make_store

from saemill.common.errors import ConfigError, DiskError, StoreError
from saemill.common.stores.activations import ActivationStore
from saemill.convert_store import run as convert
from saemill.convert_store.config import ConvertConfig
from saemill.embeddings import run as embeddings
from saemill.embeddings.config import ImportConfig
from saemill.show import problems

pytestmark = pytest.mark.usefixtures("one_thread")


def in_bucket(s3: S3, prefix: str, folder: Path) -> dict[str, str]:
    """Hashes of the objects below a prefix, by name."""
    s3.fetch(prefix, folder)
    return file_hashes(folder)


def broken_off(s3: S3, n_puts: int, make: Callable[[], object]) -> None:
    """Make a store at a bucket that takes only so many files, which is refused with the address."""
    n_left = n_puts

    def count(method: str, path: str, body: bytes) -> bytes | None:
        nonlocal n_left
        n_left -= method == "PUT" and "/claims/" not in path
        return None if method == "PUT" and n_left < 0 else body

    s3.lose = count
    with pytest.raises(DiskError, match=r"s3://bucket/.* cannot be written after 6 attempts"):
        make()
    s3.calm()


def test_a_store_is_converted_from_a_bucket_to_a_bucket(s3: S3, tmp_path: Path) -> None:
    """Oracle: the same conversion on a disk, file by file; broken off, by the same call; then nothing is
    written. And the refusals of the source itself and of a folder in it."""
    source = make_store(tmp_path / "source", n_rows=48, ctx_len=16, d=8, shard_tokens=256)
    form = {"dtype": "int8", "compression": "zstd", "shard_tokens": 512}
    expected = file_hashes(convert.run(ConvertConfig(source=source.path, out=tmp_path / "disk", **form)).path)
    address, out = Path(s3.put(source.path, "source")), Path("s3://bucket/converted")
    config = ConvertConfig(source=address, out=out, **form)
    broken_off(s3, len(expected) - 4, lambda: convert.run(config))
    with pytest.raises(StoreError, match="s3://bucket/converted"):
        ActivationStore(out).site("b")
    convert.run(config)
    assert in_bucket(s3, "converted", tmp_path / "fetched") == expected
    assert problems(out) == []
    writes: list[str] = []
    s3.watch = lambda method, path, headers: (
        writes.append(path) if method in ("PUT", "DELETE") and "/claims/" not in path else None
    )
    convert.run(config)
    assert writes == []
    for wrong in (address, address / "within"):
        with pytest.raises(
            ConfigError, match=r"must lie outside s3://bucket/source, .* got s3://bucket/source"
        ):
            convert.run(ConvertConfig(source=address, out=wrong, **form))
    with pytest.raises(ConfigError, match=r"^s3://bucket/source is stored as fp32 in shards of 256 already"):
        convert.run(ConvertConfig(source=address, out=tmp_path / "same"))


@pytest.mark.parametrize("compression", ["raw", "zstd"])
def test_vectors_are_imported_to_a_bucket(s3: S3, compression: str, tmp_path: Path) -> None:
    """Oracle: the same import to a disk, file by file; broken off, by the same call, that has the store's
    compression; the vectors; the refusal of another compression."""
    x = np.random.default_rng(0).normal(size=(700, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)

    def made(out: Path, compression: str | None) -> ActivationStore:
        source = str(tmp_path / "x.npy")
        return embeddings.run(ImportConfig(source=source, out=out, shard_rows=300, compression=compression))

    expected = file_hashes(made(tmp_path / "disk", compression).path)
    address = Path(f"s3://bucket/{compression}")
    broken_off(s3, len(expected) - 3, lambda: made(address, compression))
    store = made(address, None)
    assert in_bucket(s3, compression, tmp_path / "fetched") == expected
    assert problems(address) == []
    assert store.settings.compression == (None if compression == "raw" else compression)
    assert store.shard_tokens == (300 if compression == "raw" else 256)
    assert np.array_equal(store.read("embedding", 0, 700).numpy(), x)
    other = {"raw": "lz4", "zstd": "raw"}[compression]
    with pytest.raises(ConfigError, match=rf"(?s)s3://bucket/{compression} was made .* compression: there"):
        made(address, other)
