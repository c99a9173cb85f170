"""Every file of a run damaged in turn: found, named, and repaired where that can be."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training import files, halved, killed_at

from saemill import Sae
from saemill.common.errors import DataError, SaemillError, StoreError
from saemill.common.sae import formats, of_run
from saemill.common.sae.formats import sparsify
from saemill.common.stores import runs
from saemill.common.stores.activations import ActivationStore
from saemill.train.record.inspect import problems
from saemill.train.run import run


def flipped(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def cut(file: Path) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 2])


def zeroed(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "bit": flipped,
    "cut": cut,
    "zeros": zeroed,
    "missing": Path.unlink,
}


def all_files(out: Path) -> list[Path]:
    return sorted(file.relative_to(out) for file in out.rglob("*") if file.is_file())


def there(original: Path, folder: Path) -> Path:
    return shutil.copytree(original, folder / "r", dirs_exist_ok=True)


def test_whole_runs_have_no_problems(whole: Path, going: Path) -> None:
    """Oracle: the runs as they were left; they hold all of a run's files."""
    assert problems(whole) == problems(going) == []
    names = {file.name for file in (*all_files(whole), *all_files(going))}
    assert {"identity.json", "config.yaml", "halving.json", "metrics.jsonl"} < names
    assert {"finished.json", "checkpoint.json", "0-48.pt", "cfg.json", "sae.safetensors"} < names


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("state", ["whole", "going"])
def test_each_damaged_file_is_found_and_named(
    request: pytest.FixtureRequest, tmp_path: Path, state: str, kind: str
) -> None:
    """Oracle: the file that was damaged; its name is in the first problem, with what to do."""
    original: Path = request.getfixturevalue(state)
    for name in all_files(original):
        out = there(original, tmp_path)
        DAMAGE[kind](out / name)
        found = problems(out)
        if (name.name, kind) == ("halving.json", "missing") and state == "going":
            continue  # a run that did not come to a look yet has none
        if (name.name, kind) == ("finished.json", "missing"):
            continue  # such a run goes on
        assert found, name
        assert str(out / name) in found[0] or str((out / name).parent) in found[0], (name, found)
        assert "`saemill train`" in found[0], found


def test_exchanged_files_are_found(whole: Path, going: Path, tmp_path: Path) -> None:
    """Oracle: the two folders whose SAEs, and the two variants whose checkpoints, changed places."""
    out = there(whole, tmp_path / "a")
    one, two = sorted(file.parent for file in out.glob("*/cfg.json"))
    one.rename(out / "x")
    two.rename(one)
    (out / "x").rename(two)
    told = problems(out)
    assert [line.split(" holds another SAE than ")[0] for line in told] == [str(one), str(two)]
    with pytest.raises(StoreError, match="holds another SAE than"):
        of_run.load(out, one.name, runs.finished(out))
    for file in ("cfg.json", "sae.safetensors"):
        out = there(whole, tmp_path / file)
        one, two = sorted(out.glob(f"*/{file}"))
        swap(one, two)
        told = problems(out)
        assert len(told) == 2
        assert all(str(at.parent) in line for at, line in zip((one, two), told, strict=True))


def swap(one: Path, two: Path) -> None:
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)


def test_exchanged_checkpoints_are_refused(
    store: ActivationStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: the names of the files; both are of one shape and whole, so that only the hash tells."""
    killed_at(9, halved(store, tmp_path / "r", halving=0), monkeypatch)
    one, two = sorted((tmp_path / "r").glob("checkpoint-7/*/*.pt"))
    swap(one, two)
    told = problems(tmp_path / "r")
    assert all(str(file) in line for file, line in zip((one, two), told, strict=True))
    with pytest.raises(StoreError, match=r"0-48.pt is damaged: its content differs from its hash"):
        run(halved(store, tmp_path / "r", halving=0))


REPAIRED_BY_RESUMING = {"identity.json", "config.yaml"}


def test_what_can_be_repaired_is(
    store: ActivationStore,
    whole: Path,
    going: Path,
    tmp_path: Path,
) -> None:
    """Oracle: the run that was not damaged, bit by bit: after the same command where the settings tell what
    the file held, after --no-resume of all others; the first says so before."""
    wanted = files(whole)
    for original in (whole, going):
        for name in all_files(original):
            out = there(original, tmp_path / original.parent.name / name.name)
            flipped(out / name)
            told = None
            try:
                run(halved(store, out))
            except SaemillError as error:
                told = str(error)
                run(halved(store, out, resume=False))
            if name.name in REPAIRED_BY_RESUMING:
                assert told is None
            else:
                assert told is not None, name
                assert "--no-resume" in told or "move the file away" in told
            assert problems(out) == []
            assert files(out) == wanted


@pytest.mark.parametrize("resume", [True, False])
def test_a_damaged_identity_before_the_first_checkpoint_is_written_again(
    resume: bool,
    store: ActivationStore,
    tmp_path: Path,
) -> None:
    """Oracle: what the file said before the damage; other settings are refused, and nothing is changed."""
    out = tmp_path / "r"
    with pytest.MonkeyPatch.context() as patch:
        killed_at(3, halved(store, out), patch)
    assert not (out / "checkpoint.json").exists()
    whole = runs.identity(out).content
    flipped(out / "identity.json")
    damaged = (out / "identity.json").read_bytes()
    with pytest.raises(StoreError, match=r"nothing else in .* tells that it is of these settings"):
        run(halved(store, out, seeds=(5,), resume=resume))
    assert (out / "identity.json").read_bytes() == damaged
    run(halved(store, out, resume=resume))
    assert runs.identity(out).content == whole
    assert problems(out) == []


def test_a_damaged_log_moved_away_loses_no_training(
    store: ActivationStore,
    whole: Path,
    going: Path,
    tmp_path: Path,
) -> None:
    """Oracle: the weights of the run that was not damaged; the file is as it was until it is moved away."""
    out = there(going, tmp_path)
    flipped(out / "metrics.jsonl")
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(StoreError, match="move the file away, and the same command goes on"):
        run(halved(store, out))
    assert (out / "metrics.jsonl").read_bytes() == before
    (out / "metrics.jsonl").rename(tmp_path / "away")
    run(halved(store, out))
    weights = {name: content for name, content in files(whole).items() if name != "metrics"}
    assert weights.items() <= files(out).items()
    assert problems(out) == []


def test_a_checkpoint_behind_the_end_is_removed(
    store: ActivationStore,
    whole: Path,
    going: Path,
    tmp_path: Path,
) -> None:
    """Oracle: the finished run's own list of files, after a kill between its last two acts."""
    out = there(whole, tmp_path)
    for file in going.glob("checkpoint*"):
        (shutil.copytree if file.is_dir() else shutil.copy)(file, out / file.name)
    run(halved(store, out))
    assert all_files(out) == all_files(whole)


def test_a_killed_first_write_does_not_block_the_folder(
    store: ActivationStore,
    tmp_path: Path,
) -> None:
    """Oracle: a run in a folder that holds what such a kill leaves; any other file still blocks it."""
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / ".identity.json.partial").touch()
    run(halved(store, tmp_path / "r", halving=0, max_tokens=512))
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "notes.txt").touch()
    with pytest.raises(StoreError, match="holds other files"):
        run(halved(store, tmp_path / "s"))


def test_a_record_of_another_run_is_refused(
    store: ActivationStore,
    whole: Path,
    going: Path,
    tmp_path: Path,
) -> None:
    """Oracle: the message, of a checkpoint and of a finished run that were made with other settings."""
    for original, name in ((going, "checkpoint.json"), (whole, "finished.json"), (whole, "halving.json")):
        other = tmp_path / name
        with pytest.MonkeyPatch.context() as patch:
            killed_at(9, halved(store, other, seeds=(5,)), patch)
        shutil.copy(original / name, other / name)
        with pytest.raises(StoreError, match=f"{name} belongs to another run than"):
            run(halved(store, other, seeds=(5,)))


def test_weights_that_are_not_finite_are_told(whole: Path, tmp_path: Path) -> None:
    """Oracle: the tensor's name, from each way in and out."""
    sae = Sae.load(next(whole.glob("*/cfg.json")).parent)
    with torch.no_grad():
        sae.W_enc[3, 3] = torch.nan
    for call in (
        lambda: sae.encode(torch.ones(2, 16)),
        lambda: sae(torch.ones(2, 16)),
        lambda: sae.save(tmp_path / "a"),
        lambda: formats.save(sae.parts, "saelens", tmp_path / "b"),
    ):
        with pytest.raises(DataError, match="1 value of W_enc is NaN or infinite"):
            call()
    sparsify.write(sae.parts, tmp_path / "c")
    with pytest.raises(StoreError, match="1 value of W_enc is NaN or infinite"):
        Sae.load(tmp_path / "c")
