"""The folder of a run: names, the lock, full disks, what is refused before any work."""

import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import SUPPORT
from stores import make_store
from training import config, killed_at, structured

from saemill.common import durable, records
from saemill.common.errors import ConfigError, StoreError
from saemill.common.sae.sae import Sae
from saemill.common.stores import runs
from saemill.common.stores.activations import ActivationStore
from saemill.train.run import run

SMALL: dict[str, Any] = {"k": (2,), "num_latents": (48,), "kernels": "torch", "max_tokens": 256 * 10}


def one_site(path: Path, values_TD: torch.Tensor) -> ActivationStore:
    """A store of 64 rows with site `a` alone."""
    made = make_store(path, n_rows=64, ctx_len=32, d=16, shard_tokens=2048, values_TD=values_TD)
    shutil.rmtree(made.path / "b")
    return ActivationStore(made.path)


@pytest.mark.parametrize(
    "name",
    [
        "../evil", "/tmp/evil", "a/b", "", ".hidden", "..", "a\\b", "identity.json", "Config.YAML", "wandb",
        "tensorboard", "checkpoint-7", "finished.json", "on-x", "a\x1b[31mb", " a", "a" * 300,
    ],
)  # fmt: skip
def test_a_variant_named_as_a_path_or_a_file_of_the_run_is_refused(
    store: ActivationStore,
    tmp_path: Path,
    name: str,
) -> None:
    """Oracle: the message; nothing was written anywhere."""
    listed = ({"site": "a", "k": 2, "num_latents": 48, "name": name},)
    with pytest.raises(ConfigError, match="the name of a variant must be "):
        run(config(store, tmp_path / "r", variants=listed, **SMALL))
    assert list(tmp_path.iterdir()) == []


def test_a_variant_has_the_name_that_it_is_given(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the folder, and the record."""
    listed = ({"site": "a", "k": 2, "num_latents": 48, "name": "best one"},)
    (folder,) = run(config(store, tmp_path / "r", variants=listed, **SMALL))
    assert folder == tmp_path / "r" / "best one"
    assert runs.finished(tmp_path / "r").variants == ("best one",)
    assert Sae.load(folder).config.k == 2


@pytest.mark.parametrize("field", ["variants", "cfgs", "stopped"])
def test_a_record_with_a_path_for_a_name_is_refused(
    store: ActivationStore,
    tmp_path: Path,
    field: str,
) -> None:
    """Oracle: the message; the record's checksum is right."""
    run(config(store, tmp_path / "r", **SMALL | {"max_tokens": 512}))
    path = tmp_path / "r" / "finished.json"
    fields = durable.read_json(path)
    del fields["checksum"]
    look = {"step": 1, "metric": "fvu", "value": None, "best": None}
    changed: dict[str, Any] = {"variants": ["../x"], "cfgs": {"../x": "0" * 16}, "stopped": {"../x": look}}
    durable.write_json(path, records.sealed(fields | {field: changed[field]}))
    with pytest.raises(StoreError, match="must be a path below its folder"):
        runs.finished(tmp_path / "r")


def test_training_anew_beside_a_running_training_is_refused_first(
    store: ActivationStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: every byte of the folder, whose lock the running training holds."""
    settings = config(store, tmp_path / "r", **SMALL)
    killed_at(9, settings, monkeypatch)

    def content() -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in (tmp_path / "r").rglob("*") if file.is_file()}

    before = content()
    with durable.exclusive(tmp_path / "r"):
        for resume in (True, False):
            with pytest.raises(StoreError, match="another process is writing to"):
                run(config(store, tmp_path / "r", resume=resume, **SMALL))
            assert content() == before
    run(settings)


FULL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from training import config, files
from saemill.common import records
from saemill.common.stores.activations import ActivationStore
from saemill.common.errors import DiskError
from saemill.common.sae.formats import sparsify
from saemill.train import run as module
from saemill.train.record import checkpoint
from saemill.train.record.metrics import JsonlSink

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store, out = ActivationStore(sys.argv[2]), Path(sys.argv[3])
settings = {"k": (2,), "num_latents": (48,), "kernels": "torch", "max_tokens": 2560, "lr": (1e-3, 3e-3)}
module.run(config(store, out / "whole", **settings))

def limited(call, at, limit):
    calls = []
    def limit_at(*arguments, **named):
        calls.append(1)
        if len(calls) == at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return call(*arguments, **named)
    return limit_at

for owner, name, at, limit, told in [
    (records, "write", 1, 100, "identity.json"),
    (checkpoint, "_save_learner", 1, 4096, "0-48.pt"),
    (checkpoint, "_save_learner", 4, 4096, "0-48.pt"),
    (JsonlSink, "log", 2, 700, "metrics.jsonl"),
    (sparsify, "write", 2, 4096, "sae.safetensors"),
    (records, "write", 4, 100, "finished.json"),
]:
    kept = getattr(owner, name)
    setattr(owner, name, limited(kept, at, limit))
    folder = out / f"{told}-{at}"
    try:
        module.run(config(store, folder, **settings))
    except DiskError as error:
        assert "no room on the disk for" in str(error) and told in str(error), error
        assert "run the same command again" in str(error)
    else:
        raise AssertionError(f"{told} was written to a full disk")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    setattr(owner, name, kept)
    assert not list(folder.rglob(".*.partial"))
    module.run(config(store, folder, **settings))
    assert files(folder) == files(out / "whole")
"""


def test_a_full_disk_is_told_and_the_same_command_goes_on(
    store: ActivationStore,
    tmp_path: Path,
) -> None:
    """Oracle: the run on a disk with room, bit by bit; the system's limit on a file's size stands for a full
    disk, at the identity, two checkpoints, the log, an SAE and the last record."""
    arguments = [SUPPORT, store.path, tmp_path]
    done = subprocess.run(
        [sys.executable, "-c", FULL, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_modes_follow_the_umask(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the mode of a file that Python makes."""
    run(config(store, tmp_path / "r", **SMALL | {"max_tokens": 512}))
    (tmp_path / "plain").touch()
    wanted = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    modes = {
        file: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "r").rglob("*") if file.is_file()
    }
    assert set(modes.values()) == {wanted}, modes


def test_the_only_site_need_not_be_named(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the run whose site was named, bit by bit, which is then finished already; of two sites the
    message names both."""
    alone = one_site(tmp_path / "one", structured(64 * 32))
    small = SMALL | {"max_tokens": 512}
    (folder,) = run(config(alone, tmp_path / "r", site=(), **small))
    assert run(config(alone, tmp_path / "r", **small)) == [folder]
    with pytest.raises(ConfigError, match=r"name a site of .* with --site; it has a, b"):
        run(config(store, tmp_path / "s", site=(), **small))


def test_a_warm_up_longer_than_the_run_is_refused(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the message, before the folder is made; one step less is trained."""
    with pytest.raises(ConfigError, match=r"warmup_steps must be fewer than the run's 10 steps, got 10"):
        run(config(store, tmp_path / "r", warmup_steps=10, **SMALL))
    assert not (tmp_path / "r").exists()
    run(config(store, tmp_path / "r", warmup_steps=9, **SMALL))


@pytest.mark.parametrize("scale", [1e30, 1e18, 1e-25, 1e-35])
@pytest.mark.parametrize("b_dec_init", ["mean", "geometric_median"])
def test_data_of_any_scale_train_alike(tmp_path: Path, scale: float, b_dec_init: str) -> None:
    """Oracle: the run on the same data at scale 1: the FVU to 1%; and the saved SAE's own, on the data."""
    values = structured(64 * 32)
    found = {}
    for factor in (1.0, scale):
        folder = tmp_path / str(factor)
        made = one_site(folder, values * factor)
        (out,) = run(config(made, folder / "r", b_dec_init=b_dec_init, **SMALL))
        sae = Sae.load(out)
        x = values * factor
        error = (sae(x).reconstruction.double() - x.double()).square().sum()
        found[factor] = float(error / (x.double() - x.double().mean(0)).square().sum())
    assert found[scale] == pytest.approx(found[1.0], rel=0.01)


def test_mse_beyond_float32_is_refused(tmp_path: Path) -> None:
    """Oracle: the message: its gradient would be 0 or infinite in the activations' own units."""
    made = one_site(tmp_path, structured(64 * 32) * 1e-25)
    listed = ({"site": "a", "k": 2, "num_latents": 48, "loss": "mse"},)
    with pytest.raises(ConfigError, match=r"mse is in the units .* use loss fvu"):
        run(config(made, tmp_path / "r", variants=listed, **SMALL))
    assert not (tmp_path / "r").exists()


def test_activations_that_float32_cannot_hold_are_refused(tmp_path: Path) -> None:
    """Oracle: the message."""
    tiny = torch.randn(64 * 32, 16) * 1e-41
    made = one_site(tmp_path, tiny)
    with pytest.raises(StoreError, match="multiply them"):
        run(config(made, tmp_path / "r", **SMALL))
