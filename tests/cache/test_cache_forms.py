"""The cache in every form: what is stored is what is read, and bytes are a function of model and settings."""

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from caching import SHARD, cache, with_zarr
from crashes import check_crashes, file_hashes
from torch import Tensor

from saemill.cache.claims.worker import Worker
from saemill.cache.placing import OnDisk
from saemill.cache.writer import SiteWriter
from saemill.common import records
from saemill.common.errors import ConfigError, DataError, StoreError
from saemill.common.records import decode_array
from saemill.common.stores.activations import SHUFFLE_KEY, ActivationStore
from saemill.common.stores.forms.int8 import calibrate
from saemill.common.stores.norms import norms_from
from saemill.common.stores.permutation import permutation
from saemill.common.stores.site_records import Site, SiteRecord
from saemill.common.stores.tokens import TokenStore
from saemill.convert_store import run as convert
from saemill.convert_store.config import ConvertConfig
from saemill.show import problems

pytestmark = pytest.mark.usefixtures("one_thread")


def converted(source: Path, out: Path, **form: Any) -> ActivationStore:
    return convert.run(ConvertConfig(source=source, out=out, **form))


INT8 = {"dtype": "int8", "layers": (0, 1)}


@pytest.fixture(scope="module")
def int8(tokens: TokenStore, neox: str, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Two sites as int8, raw."""
    return cache(tokens, neox, tmp_path_factory.mktemp("int8") / "acts", **INT8)


def test_int8_is_calibrated_by_the_training_positions(
    int8: ActivationStore, truth: dict[str, Tensor]
) -> None:
    """Oracle: numpy's mean and standard deviation of the hidden states at positions that are neither masked
    nor held out, none of which is far here; and half a step of each row's largest z."""
    keep = np.concatenate([int8.keep_addresses(s, int8.mask, False) for s in range(int8.n_shards)])
    for site in ("layers.0", "layers.1"):
        record = int8.record(site)
        assert record.calibration is not None
        assert record.calibration == int8.array(site).manifest.calibration
        x_TD = truth[site].double().numpy()
        mean_D, scale_D = (
            decode_array(text, "f4").astype(float)
            for text in (record.calibration.mean, record.calibration.scale)
        )
        np.testing.assert_allclose(mean_D, x_TD[keep].mean(0), atol=1e-5)
        np.testing.assert_allclose(scale_D, x_TD[keep].std(0), rtol=1e-5)
        half_T1 = np.abs((x_TD - mean_D) / scale_D).max(1, keepdims=True) / 254
        off_TD = np.abs(int8.read(site, 0, int8.n_tokens).double().numpy() - x_TD)
        assert (off_TD <= half_T1 * scale_D * 1.001 + 1e-6).all()
        again_TD = int8.array(site).rounded(truth[site])
        assert torch.equal(again_TD, int8.read(site, 0, int8.n_tokens)), "as assess computes them again"


def test_statistics_and_norms_are_of_what_is_read(int8: ActivationStore) -> None:
    """Oracle: numpy on the decoded rows; bytes of a bf16 store by half, and 4 per row."""
    site = int8.array("layers.1")
    x_TD = site.read(0, int8.n_tokens).double().numpy()
    keep = np.concatenate([int8.keep_addresses(s, int8.mask, False) for s in range(int8.n_shards)])
    np.testing.assert_allclose(site.statistics.mean_D, x_TD[keep].mean(0), atol=1e-12)
    np.testing.assert_allclose(site.statistics.variance_D, x_TD[keep].var(0), rtol=1e-9)
    order = permutation(SHARD, SHUFFLE_KEY, 3)
    norms = np.linalg.norm(x_TD[3 * SHARD : 4 * SHARD], axis=1)[order]
    np.testing.assert_allclose(norms_from(site.norms(3)), norms, rtol=2.0**-8)
    assert site.n_bytes == int8.n_shards * SHARD * (32 + 4)


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_zarr_finds_codes_and_steps(compression: str | None, int8: ActivationStore, tmp_path: Path) -> None:
    """Oracle: code · step · scale + mean of what zarr-python reads, at the place of each address."""
    store = converted(int8.path, tmp_path / "packed", compression=compression) if compression else int8
    stored = with_zarr(store.path / "layers.0")
    calibration = store.array("layers.0").manifest.calibration
    assert calibration is not None
    mean_D, scale_D = (decode_array(text, "f4") for text in (calibration.mean, calibration.scale))
    step_T1 = np.ascontiguousarray(stored[:, 32:]).view("<f4")
    x_TD = stored[:, :32].astype(np.float32) * step_T1 * scale_D + mean_D
    places = np.argsort(permutation(SHARD, SHUFFLE_KEY, 2))
    wanted = store.read("layers.0", 2 * SHARD, 3 * SHARD).numpy()
    assert np.array_equal(x_TD[2 * SHARD : 3 * SHARD][places], wanted)


def test_a_crash_at_any_step_changes_no_byte(tokens: TokenStore, neox: str, tmp_path: Path) -> None:
    """Oracle: the store of one run, file by file; calibrating included."""
    small = {"layers": (1,), "dtype": "int8", "compression": "zstd", "shard_tokens": 2048}
    check_crashes(lambda out: cache(tokens, neox, out, **small), tmp_path, start=8, stride=6)


def test_a_lost_calibration_is_made_again_and_no_shard_is(
    int8: ActivationStore, tokens: TokenStore, neox: str, tmp_path: Path
) -> None:
    """Oracle: the whole store; the inodes of its shards. Both copies of the calibration are gone."""
    copy = Path(shutil.copytree(int8.path, tmp_path / "copy"))
    for name in ("sites/layers.1.json", "layers.1/manifest.json"):
        (copy / name).write_text("{}")
    before = {file: file.stat().st_ino for file in copy.glob("*/c/*/0")}
    cache(tokens, neox, copy, **INT8)
    assert file_hashes(copy) == file_hashes(int8.path)
    assert {file: file.stat().st_ino for file in copy.glob("*/c/*/0")} == before


def test_another_calibration_is_told_and_its_shards_are_written_again(
    int8: ActivationStore, tokens: TokenStore, neox: str, tmp_path: Path
) -> None:
    """Oracle: the message, by hand, then one calibration in all records: that of the site's record, as if a
    machine with other last bits had made it."""
    copy = Path(shutil.copytree(int8.path, tmp_path / "copy"))
    other = calibrate(torch.randn(100, 32, generator=torch.Generator().manual_seed(0)))
    file = copy / "sites" / "layers.1.json"
    records.write(file, records.read(file, SiteRecord, "").model_copy(update={"calibration": other}))
    with pytest.raises(StoreError, match="has another calibration than its site"):
        ActivationStore(copy).read("layers.1", 0, 1)
    assert any("layers.1/manifest.json has another calibration" in line for line in problems(copy))
    cache(tokens, neox, copy, **INT8)
    store = ActivationStore(copy)
    assert problems(copy) == []
    assert store.array("layers.1").manifest.calibration == other
    assert {store.commit("layers.1", shard).calibration for shard in range(store.n_shards)} == {other.hash}
    truth, found = int8.read("layers.1", 0, 4800), store.read("layers.1", 0, 4800)
    assert float((truth - found).square().mean() / truth.var(0).mean()) < 0.01


def test_the_first_calibration_holds_for_all_workers(int8: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the record on the disk: of two workers that both calibrated, the later takes what is there."""
    copy = Path(shutil.copytree(int8.path, tmp_path / "copy"))
    shutil.rmtree(copy / "layers.1")
    (copy / "sites" / "layers.1.json").unlink()
    one, other = (
        calibrate(torch.randn(9, 32, generator=torch.Generator().manual_seed(seed))) for seed in (0, 1)
    )
    with Worker(OnDisk(copy), threading.Event()) as worker, worker.hold("store"):
        writers = [SiteWriter(ActivationStore(copy), Site("layers.1", 32), worker) for _ in range(2)]
        assert [writer.is_calibrated for writer in writers] == [False, False]
        writers[0].note(None, one)
        writers[1].note(None, other)
    assert writers[0].known == writers[1].known == ActivationStore(copy).record("layers.1")
    assert writers[1].known.calibration == one


def test_what_is_not_finite_is_refused(tokens: TokenStore, neox: str, tmp_path: Path) -> None:
    """Oracle: the sentence; a model with a NaN among its weights."""
    model = transformers.AutoModel.from_pretrained(neox)
    with torch.no_grad():
        model.layers[1].mlp.dense_4h_to_h.bias[3] = torch.nan
    model.save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(neox).save_pretrained(tmp_path / "model")
    with pytest.raises(DataError, match=r"512 tokens are NaN or infinite at layers\.1, shard 0"):
        cache(tokens, str(tmp_path / "model"), tmp_path / "acts", dtype="int8")


def test_the_form_is_the_stores_where_it_is_left_open(
    int8: ActivationStore, tokens: TokenStore, neox: str, tmp_path: Path
) -> None:
    """Oracle: the store's settings; others are refused by name."""
    packed = converted(int8.path, tmp_path / "packed", compression="zstd", shard_tokens=1024)
    store = cache(tokens, neox, packed.path, layers=(2,), shard_tokens=None)
    assert (store.settings.dtype, store.settings.compression, store.shard_tokens) == ("int8", "zstd", 1024)
    assert store.sites == ["layers.0", "layers.1", "layers.2"]
    for changes, told in ({"dtype": "bf16"}, "dtype"), ({"compression": "raw"}, "compression"):
        with pytest.raises(ConfigError, match=f"{told}: there"):
            cache(tokens, neox, packed.path, layers=(2,), shard_tokens=None, **changes)


def test_caching_and_converting_make_the_same_bytes(tokens: Any, neox: str, tmp_path: Path) -> None:
    """Oracle: the store that `cache` compresses itself, file by file. Batches lie alike in both."""
    direct = cache(tokens, neox, tmp_path / "direct", dtype="int8", compression="zstd", batch_size=16)
    made = cache(tokens, neox, tmp_path / "raw", dtype="int8", batch_size=16)
    store = converted(made.path, tmp_path / "converted", compression="zstd")
    assert file_hashes(store.path) == file_hashes(direct.path)


def test_a_converted_store_is_not_added_to(tokens: Any, neox: str, tmp_path: Path) -> None:
    """Oracle: the sentence, and that another compression alone is no hindrance."""
    made = cache(tokens, neox, tmp_path / "made")
    packed = converted(made.path, tmp_path / "packed", compression="lz4")
    added = cache(tokens, neox, packed.path, layers=(0,))
    assert torch.equal(
        added.read("layers.0", 0, 100), cache(tokens, neox, made.path, layers=(0,)).read("layers.0", 0, 100)
    )
    rounded = converted(made.path, tmp_path / "rounded", dtype="int8")
    with pytest.raises(ConfigError, match="was converted from a store of bf16: run `saemill convert-store`"):
        cache(tokens, neox, rounded.path, layers=(0,))
