"""Damage that Zarr readers take for zeros or values: an error, in every form and wherever a store lies."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from growing import Growing
from object_store import S3
from stores import make_store

from saemill.common.errors import StoreError
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.followed import FollowedStore
from saemill.show import problems

N_ROWS, CTX_LEN, D, SHARD_TOKENS = 96, 16, 64, 512
FORMS = (("bf16", None), ("fp32", "zstd"), ("int8", "lz4"), ("int8", None))
DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "a row cut": lambda content: content[:-64],
    "longer": lambda content: content + bytes(64),
    "bit": lambda content: content[:3000] + bytes([content[3000] ^ 4]) + content[3001:],
    "zeroed": lambda content: content[:2048] + bytes(8192) + content[2048 + 8192 :],
    "all zeros": lambda content: bytes(len(content)),
}
"""What was done to a Zarr array's chunks to see what readers make of it."""


def read(store: ActivationStore) -> torch.Tensor:
    """All rows of shard 1 of site `a`."""
    return store.array("a").gather(1, torch.arange(SHARD_TOKENS).numpy())


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(filter(None, form)))
@pytest.mark.parametrize("place", ["disk", "followed", "bucket"])
def test_damage_is_an_error_and_never_zeros(
    place: str, form: tuple[str, str | None], s3: S3, tmp_path: Path
) -> None:
    """Oracle: the whole store's rows, before and after; the shard that is named, by reading and by verify."""
    whole = make_store(tmp_path / "whole", N_ROWS, CTX_LEN, D, SHARD_TOKENS, form=form)
    file, folder = "a/c/1/0", whole.path
    if place == "followed":
        growing = Growing(whole, tmp_path / "growing")
        while growing.grow():
            pass
        folder = growing.path
    content = (folder / file).read_bytes()
    address = s3.put(folder, "acts") if place == "bucket" else str(folder)

    def put(damaged: bytes | None) -> None:
        if place == "bucket":
            s3.delete(f"acts/{file}") if damaged is None else s3.put_file(f"acts/{file}", damaged)
        elif damaged is None:
            (folder / file).unlink()
        else:
            (folder / file).write_bytes(damaged)

    def opened() -> ActivationStore:
        return FollowedStore(address, SHARD_TOKENS) if place == "followed" else ActivationStore(address)

    expected = read(whole)
    for name, damage in DAMAGES.items():
        assert torch.equal(read(opened()), expected)
        put(damage(content))
        with pytest.raises(StoreError, match=rf"{address}/a/c/1/0"):
            read(opened())
        assert any("a shard 1: " in line for line in problems(Path(address))), name
        put(content)
    assert torch.equal(read(opened()), expected)
