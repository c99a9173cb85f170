"""SAEs kept on the way: which, as they were, whole at any moment."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training import config, files, halved, killed_at

from saemill.common import records
from saemill.common.errors import StoreError
from saemill.common.sae.sae import Sae
from saemill.common.stores import runs
from saemill.common.stores.activations import ActivationStore
from saemill.hub.contents import contents_of
from saemill.show import describe, problems
from saemill.train.points import points_of
from saemill.train.run import run

ONE: dict[str, Any] = {"k": (2,), "num_latents": (48,)}


def test_steps_are_evenly_spaced_without_the_end(tmp_path: Path) -> None:
    """Oracle: the multiples of n/(N+1), by hand."""
    assert points_of(tmp_path, 0, 10).steps == set()
    assert points_of(tmp_path, 1, 25).steps == {12}
    assert points_of(tmp_path, 3, 100).steps == {25, 50, 75}
    assert points_of(tmp_path, 9, 10).steps == set(range(1, 10))


def test_each_is_the_sae_of_its_step_in_a_run_of_its_own(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the variant that halving stops at the same step, bit by bit; its record and the run's."""
    run(halved(store, tmp_path / "r", n_checkpoints=1))
    (look,) = runs.looks(tmp_path / "r")
    (name,) = look.stopped
    point = tmp_path / "r" / "steps" / "12"
    for file in ("sae.safetensors", "cfg.json"):
        assert (point / name / file).read_bytes() == (tmp_path / "r" / name / file).read_bytes()
    finished, of_run = runs.finished(point), runs.finished(tmp_path / "r")
    assert (finished.steps, finished.tokens) == (12, 12 * 256)
    assert (finished.variants, finished.run, finished.mask) == (of_run.variants, of_run.run, of_run.mask)
    assert (finished.stopped, finished.files) == ({}, ())
    assert (tmp_path / "r/steps/latest").readlink() == Path("12")
    assert "kept on the way, in steps/: after 12 steps" in describe(tmp_path / "r")
    assert describe(point).startswith(f"run {point}: 2 SAEs, 3,072 tokens in 12 steps")
    assert contents_of(point, "user/repo", ()).sizes.keys() >= {f"{name}/sae.safetensors", "finished.json"}
    assert not any("steps" in file for file in contents_of(tmp_path / "r", "user/repo", ()).sizes)


def test_whole_at_any_moment(store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: before every write to the disk what has a name in `steps` is whole, and `latest` is the SAE of
    an uninterrupted run; killed in the middle of the second point, the run that goes on makes the same."""
    changes: dict[str, Any] = ONE | {"n_checkpoints": 2}
    (folder,) = run(config(store, tmp_path / "whole", **changes))
    steps, seen = tmp_path / "cut" / "steps", list[str]()

    def look() -> None:
        for place in steps.glob("[!.]*"):
            assert problems(place) == []
            there = Sae.load(place / folder.name).parts.weights
            other = Sae.load(tmp_path / "whole/steps" / place.resolve().name / folder.name).parts.weights
            assert all(there[key].equal(other[key]) for key in other)
            seen.append(place.name)

    write = records.write

    def dying(path: Path, record: Any) -> None:
        look()
        if ".16.partial" in str(path):
            raise KeyboardInterrupt
        write(path, record)

    with monkeypatch.context() as patch:
        patch.setattr("saemill.common.records.write", dying)
        with pytest.raises(KeyboardInterrupt):
            run(config(store, tmp_path / "cut", **changes))
    assert set(seen) == {"8", "latest"}
    assert (steps / ".16.partial").is_dir()
    look()
    killed_at(15, config(store, tmp_path / "cut", **changes), monkeypatch)
    assert not (steps / ".16.partial").exists()
    run(config(store, tmp_path / "cut", **changes))
    assert (steps / "latest").resolve().name == "16"
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert problems(tmp_path / "cut") == []


def test_a_run_that_comes_to_a_point_again_leaves_it(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the file's inode. `--no-resume` writes it anew; with fewer points the others are gone."""
    changes: dict[str, Any] = ONE | {"n_checkpoints": 2}
    killed_at(10, config(store, tmp_path / "r", **changes), monkeypatch)
    file = next((tmp_path / "r/steps/8").glob("*/sae.safetensors"))
    before = file.stat().st_ino
    run(config(store, tmp_path / "r", **changes))
    assert file.stat().st_ino == before
    assert runs.points(tmp_path / "r") == [tmp_path / "r/steps/8", tmp_path / "r/steps/16"]
    run(config(store, tmp_path / "r", **ONE, n_checkpoints=1, resume=False))
    assert runs.points(tmp_path / "r") == [tmp_path / "r/steps/12"]


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda point: _flip(next(point.glob("*/sae.safetensors"))), "sae.safetensors is damaged"),
        (lambda point: next(point.glob("*/cfg.json")).unlink(), "cfg.json: file is missing"),
        (lambda point: (point / "finished.json").unlink(), "finished.json: file is missing"),
        (lambda point: _flip(point / "config.yaml"), "config.yaml is damaged"),
        (lambda point: (point / "identity.json").write_text("{}"), "identity.json"),
    ],
    ids=["weights", "config", "record", "settings", "identity"],
)
def test_verify_names_what_is_damaged(
    store: ActivationStore, tmp_path: Path, damage: Callable[[Path], None], named: str
) -> None:
    """Oracle: the file that was damaged, in a line of its own, of the run and of the point."""
    run(config(store, tmp_path / "r", **ONE, max_tokens=256 * 4, n_checkpoints=2))
    assert problems(tmp_path / "r") == []
    point = tmp_path / "r" / "steps" / "2"
    damage(point)
    (line,) = problems(tmp_path / "r")
    assert str(point) in line
    assert named in line
    shutil.rmtree(point)
    assert problems(tmp_path / "r") == []


def test_a_point_of_another_sae_is_refused(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the message, where the SAE of another step is put in its place."""
    (folder,) = run(config(store, tmp_path / "r", **ONE, max_tokens=256 * 4, n_checkpoints=2))
    first, second = runs.points(tmp_path / "r")
    shutil.rmtree(second / folder.name)
    shutil.copytree(first / folder.name, second / folder.name)
    assert "holds another SAE than" in problems(tmp_path / "r")[0]


def test_what_diverged_is_kept_as_it_is(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the point's record tells of it, and the other SAE loads."""
    listed = ({"k": 2, "num_latents": 48, "optimizer": "sgd", "lr": 1e30}, {"k": 2, "num_latents": 48})
    changes: dict[str, Any] = {"variants": listed, "k": (2,), "num_latents": (), "n_checkpoints": 1}
    wild, healthy = run(config(store, tmp_path / "r", **changes))
    point = tmp_path / "r" / "steps" / "12"
    assert list(json.loads((point / "finished.json").read_text())["diverged"]) == [wild.name]
    assert Sae.load(point / healthy.name).config.k == 2


def test_a_variant_is_not_called_as_their_folder(store: ActivationStore, tmp_path: Path) -> None:
    with pytest.raises((StoreError, ValueError), match="the name of a variant must be"):
        run(config(store, tmp_path / "r", variants=({"k": 2, "num_latents": 48, "name": "steps"},), **ONE))
