"""convert-store: the same activations in another form, by one call or after a kill, and what is refused."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_line import call
from crashes import check_crashes, file_hashes
from stores import make_embeddings, make_store

from saemill.common.durable import folder_bytes
from saemill.common.errors import ConfigError, StoreError
from saemill.common.stores.activations import ActivationStore
from saemill.convert_store import run as convert
from saemill.convert_store.config import ConvertConfig
from saemill.convert_store.plan import make_plan, outlook_of
from saemill.show import problems

pytestmark = pytest.mark.usefixtures("one_thread")
FORMS = {
    "bf16": {"dtype": "bf16"},
    "fp16 zstd": {"dtype": "fp16", "compression": "zstd", "shard_tokens": 512},
    "fp32 lz4": {"dtype": "fp32", "compression": "lz4", "shard_tokens": 2048},
    "int8": {"dtype": "int8", "shard_tokens": 320},
    "int8 zstd": {"dtype": "int8", "compression": "zstd"},
}
"""What each is named by."""


def converted(source: Path, out: Path, **form: Any) -> ActivationStore:
    return convert.run(ConvertConfig(source=source, out=out, **form))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Sites a and b in fp32, 90 rows of 32 in shards of 1024."""
    return make_store(tmp_path_factory.mktemp("source"), n_rows=90, ctx_len=32, d=12, shard_tokens=1024)


@pytest.mark.parametrize("name", FORMS)
def test_a_store_in_another_form(name: str, source: ActivationStore, tmp_path: Path) -> None:
    """Oracle: torch's rounding of the source's activations, of int8 a thousandth of their variance; and from
    there the same again, bit by bit, in other shards and compressed otherwise."""
    if name == "fp32 lz4":
        source = converted(source.path, tmp_path / "between", dtype="bf16")
    store = converted(source.path, tmp_path / "store", **FORMS[name])
    assert problems(store.path) == []
    assert store.settings.converted_from == source.settings.dtype
    for site in ("a", "b"):
        x_TD, found_TD = source.read(site, 0, source.n_tokens).float(), store.read(site, 0, store.n_tokens)
        if name.startswith("int8"):
            assert found_TD.dtype is torch.float32
            assert float((found_TD - x_TD).square().mean()) < 1e-3 * float(x_TD.var(0).mean())
        else:
            assert torch.equal(found_TD, x_TD.to(found_TD.dtype))
        statistics = store.array(site).statistics
        keep = np.concatenate([store.keep_addresses(s, store.mask, False) for s in range(store.n_shards)])
        torch.testing.assert_close(statistics.mean_D, found_TD[torch.from_numpy(keep)].double().mean(0))
    assert torch.equal(
        torch.from_numpy(store.tokens.rows(0, 90)), torch.from_numpy(source.tokens.rows(0, 90))
    )
    other = {"compression": "raw" if store.settings.compression else "zstd", "shard_tokens": 768}
    again = converted(store.path, tmp_path / "again", **other)
    assert torch.equal(again.read("a", 0, again.n_tokens), store.read("a", 0, store.n_tokens))
    back = converted(
        again.path,
        tmp_path / "back",
        compression=store.settings.compression or "raw",
        shard_tokens=store.shard_tokens,
    )
    assert file_hashes(back.path) == file_hashes(store.path)


def test_compression_changes_no_fingerprint(source: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the source's, by which SAEs know it; another type or order has another."""
    assert converted(source.path, tmp_path / "a", compression="lz4").fingerprint == source.fingerprint
    others = [
        converted(source.path, tmp_path / "b", dtype="bf16").fingerprint,
        converted(source.path, tmp_path / "c", shard_tokens=512).fingerprint,
    ]
    assert len({source.fingerprint, *others}) == 3


def test_a_killed_conversion_goes_on_to_the_same_bytes(source: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the store of one call, after a crash before any of its steps on the disk and one more call."""
    check_crashes(
        lambda out: converted(source.path, out, dtype="int8", compression="lz4"), tmp_path, start=2, stride=7
    )


def test_a_finished_store_is_checked_and_mended(source: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the whole store, after a shard, a record and a copy of the text were damaged."""
    form = {"dtype": "int8", "compression": "zstd"}
    whole = file_hashes(converted(source.path, tmp_path / "out", **form).path)
    assert "nothing to do, every shard was checked" in call(
        "convert-store", source.path, tmp_path / "out", "--dtype", "int8", "--compression", "zstd"
    )
    for name in ("a/c/1/0", "b/commits/0.json", "tokens/segments.parquet", "sites/a.json", "zarr.json"):
        file = tmp_path / "out" / name
        file.write_bytes(file.read_bytes()[:-2] + b"xx")
    converted(source.path, tmp_path / "out", **form)
    assert file_hashes(tmp_path / "out") == whole


def test_embeddings(tmp_path: Path) -> None:
    """Oracle: the vectors, and the list of the passages as it was."""
    path, _ = make_embeddings(tmp_path)
    store = converted(path, tmp_path / "out", dtype="int8", compression="lz4")
    x_TD, found_TD = ActivationStore(path).read("embedding", 0, 40), store.read("embedding", 0, 40)
    assert float((found_TD - x_TD).abs().max()) < 0.03
    assert store.text.content == ActivationStore(path).text.content
    assert problems(store.path) == []


def test_what_cannot_be_done_is_refused(source: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the sentence; nothing is written, and what is there stays."""
    with pytest.raises(ConfigError, match=r"is stored as fp32 in shards of 1,024 already"):
        converted(source.path, tmp_path / "x", dtype="fp32")
    with pytest.raises(ConfigError, match="must lie outside"):
        converted(source.path, source.path / "x", dtype="bf16")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(StoreError, match=r"holds other files \(file\)"):
        converted(source.path, tmp_path / "full", dtype="bf16")
    made = converted(source.path, tmp_path / "made", dtype="bf16")
    with pytest.raises(ConfigError, match="dtype: there 'bf16', now 'fp16'"):
        converted(source.path, made.path, dtype="fp16")
    shutil.copytree(source.path, tmp_path / "none")
    for site in ("a", "b"):
        (tmp_path / "none" / site / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"no site of .* is finished"):
        converted(tmp_path / "none", tmp_path / "x", dtype="bf16")
    assert not (tmp_path / "x").exists()


def test_too_little_disk_is_told_first(
    source: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: 3,072 rows of two sites, 12 values of 2 bytes, beside the source's records and tokens; in int8
    fewer, and then it goes on. What is whole takes no room, compressed too."""
    folders = [source.path / "tokens", *(source.path / site / "commits" for site in ("a", "b"))]
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    free = 2 * 3072 * 12 * 2 + sum(file.stat().st_size for file in files) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(ConfigError, match=r"MiB are needed .* are free"):
        converted(source.path, tmp_path / "x", dtype="bf16")
    assert not (tmp_path / "x").exists()
    options = {"dtype": "int8", "compression": "zstd"}
    converted(source.path, tmp_path / "x", **options)
    free = 0
    converted(source.path, tmp_path / "x", **options)


def test_damage_of_the_source_is_no_part_of_the_store(source: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the source's damaged file in the message; after it is whole again, the same call goes on."""
    copy = Path(shutil.copytree(source.path, tmp_path / "copy"))
    file = copy / "b" / "c" / "1" / "0"
    content = file.read_bytes()
    file.write_bytes(content[:100] + b"\xff" + content[101:])
    with pytest.raises(StoreError, match="b/c/1/0: block 0 differs from its hash"):
        converted(copy, tmp_path / "out", dtype="bf16")
    file.write_bytes(content)
    converted(copy, tmp_path / "out", dtype="bf16")
    assert file_hashes(tmp_path / "out") == file_hashes(
        converted(source.path, tmp_path / "x", dtype="bf16").path
    )


def test_values_beyond_fp16_are_refused(tmp_path: Path) -> None:
    """Oracle: one value of 1e6, and its shard."""
    values_TD = torch.ones(64, 3)
    values_TD[40, 1] = 1e6
    source = make_store(tmp_path, n_rows=4, ctx_len=16, d=3, shard_tokens=32, values_TD=values_TD)
    with pytest.raises(Exception, match=r"1 values of 1 tokens .* a, shard 1; fp16 ends at 65,504"):
        converted(source.path, tmp_path / "out", dtype="fp16")


@pytest.mark.parametrize("name", ["fp16 zstd", "int8"])
def test_a_dry_run_tells_what_is_written(name: str, source: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the bytes on the disk afterwards, to a tenth, and to the byte for shards that are not
    compressed; the dry run leaves nothing, and of a store that is there nothing is left to write."""
    config = ConvertConfig(source=source.path, out=tmp_path / "store", **FORMS[name])
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in FORMS[name].items()]
    told = call("convert-store", source.path, config.out, *flags, "--dry-run")
    assert not config.out.exists()
    outlook = outlook_of(make_plan(config), config.out)
    assert "\n".join(outlook.lines()) in told
    store = convert.run(config)
    shards = {site: sum(f.stat().st_size for f in (store.path / site).glob("c/*/0")) for site in "ab"}
    assert {site: outlook.disk[site] for site in "ab"} == pytest.approx(
        shards, rel=0.1 if "zstd" in name else 0
    )
    assert outlook.disk_bytes == pytest.approx(folder_bytes(store.path), rel=0.1)
    assert outlook_of(make_plan(config), config.out).disk_bytes == 0
