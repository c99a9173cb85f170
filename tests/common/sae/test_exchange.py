"""Export and import: kills, wrong paths, weights that no tool should get, hashes of what is saved."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call
from hub import Hub
from saes import make_sae
from safetensors.torch import load_file, save_file

from saemill import Sae
from saemill.common.errors import ConfigError, StoreError
from saemill.common.sae import formats
from saemill.common.sae.formats import sparsify


def same(found: Sae, wanted: Sae) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found.parameters(), wanted.parameters(), strict=True))


@pytest.mark.parametrize(("task", "more"), [("export", ("--format", "saelens")), ("import", ())])
def test_a_killed_export_or_import_does_not_block_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, more: tuple[str, ...]
) -> None:
    """Oracle: the same call without a kill; one file of two was written. Nothing is left of it."""
    make_sae().save(tmp_path / "sae")
    out = tmp_path / "out"
    call(task, tmp_path / "sae", *more, "-o", tmp_path / "whole")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("saemill.common.durable.write_json", killed)
        with pytest.raises(AssertionError):  # by the exit code, 130
            call(task, tmp_path / "sae", *more, "-o", out)
    assert not out.exists()
    out.mkdir()
    (out / ".cfg.json.partial").touch()
    call(task, tmp_path / "sae", *more, "-o", out)
    wanted = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    assert {file.name: file.read_bytes() for file in out.iterdir()} == wanted
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "sae", "whole"]
    with pytest.raises(ConfigError, match="must be a new or an empty folder"):
        call(task, tmp_path / "sae", *more, "-o", out)


def test_the_path_that_an_error_names_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the SAE, imported from what the message says instead of a file, and of a folder of folders."""
    monkeypatch.chdir(tmp_path)
    make_sae().save("nest/run/a")
    for given, words in (
        ("nest/run/a/sae.safetensors", "it is a file; name the folder that it is in, "),
        ("nest/run", "name one of the SAEs in it: "),
        ("nest", "name one of the SAEs in it: "),
    ):
        with pytest.raises(StoreError, match=words) as caught:
            call("import", given, "-o", "out")
        advised = str(caught.value).split(words)[1]
        assert advised == "nest/run/a"
        out = "-".join(Path(given).parts)
        call("import", *shlex.split(advised), "-o", f"to-{out}")
        assert same(Sae.load(f"to-{out}"), make_sae())


def test_an_id_of_the_hub_is_told_as_it_must_be_written(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the SAE of the hub, imported by the address in the message."""
    monkeypatch.chdir(tmp_path)
    make_sae().save(tmp_path / "sae")
    hub.put_folder("user/repo", tmp_path / "sae")
    with pytest.raises(StoreError, match="there is no such folder; an SAE on the hub is named ") as caught:
        call("import", "user/repo", "-o", "out")
    call("import", str(caught.value).split()[-1], "-o", "out")
    assert same(Sae.load("out"), make_sae())


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (2, 3)])
def test_no_tokens_are_encoded_and_decoded(shape: tuple[int, ...]) -> None:
    """Oracle: the shapes of the definition."""
    sae = make_sae()
    reconstruction, acts, indices = sae(torch.zeros(*shape, 12))
    assert reconstruction.shape == (*shape, 12)
    assert acts.shape == indices.shape == (*shape, 5)
    assert torch.equal(
        sae.decode(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.int64)), sae.b_dec.expand(2, 12)
    )


def test_nothing_asks_for_a_gradient_unless_the_user_does() -> None:
    """Oracle: autograd; the encoder's input may ask, and so may the weights."""
    sae, x = make_sae(), torch.randn(4, 12)
    assert not any(value.requires_grad for value in (*sae.encode(x), sae(x).reconstruction))
    asked = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(sae(asked).reconstruction.sum(), asked)
    assert found.abs().sum() > 0
    assert sae.requires_grad_()(x).reconstruction.requires_grad


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_8_bits_are_read_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    """Oracle: torch's own conversion. Mixed types are read in the widest."""
    make_sae().save(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    del cfg["saemill"]
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    weights = {name: w.to(dtype) for name, w in load_file(tmp_path / sparsify.WEIGHTS).items()}
    save_file(weights, tmp_path / sparsify.WEIGHTS)
    sae = Sae.load(tmp_path)
    assert sae.W_enc.dtype == torch.float32
    assert torch.equal(sae.W_enc, weights["encoder.weight"].float())
    assert sae(torch.ones(2, 12)).reconstruction.isfinite().all()
    save_file(weights | {"b_dec": torch.ones(12, dtype=torch.bfloat16)}, tmp_path / sparsify.WEIGHTS)
    assert Sae.load(tmp_path).b_dec.dtype == torch.float32


@pytest.mark.parametrize("name", formats.NAMES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_not_loaded(tmp_path: Path, name: str, value: float) -> None:
    """Oracle: the tensor's name, in each format; `import` and `export` say the same."""
    sae = make_sae()
    formats.save(sae.parts, name, tmp_path / "a")
    file = (
        tmp_path
        / "a"
        / {"saelens": "sae_weights.safetensors", "dictionary_learning": "ae.pt"}.get(name, "sae.safetensors")
    )
    weights = torch.load(file) if file.suffix == ".pt" else load_file(file)
    weights["b_dec"][2] = value
    if name == "sparsify":
        sae.b_dec[2] = value
        sparsify.write(sae.parts, tmp_path / "a")
    elif file.suffix == ".pt":
        torch.save(weights, file)
    else:
        save_file(weights, file)
    for arguments in (("import",), ("export", "--format", "saelens")):
        with pytest.raises(StoreError, match=r"is of no use: 1 value of b_dec is NaN or infinite"):
            call(*arguments, tmp_path / "a", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_saved_sae_tells_any_damage(tmp_path: Path) -> None:
    """Oracle: bits of both files flipped in turn: none is taken for the SAE that was saved."""
    make_sae().save(tmp_path)
    for file in ("cfg.json", "sae.safetensors"):
        raw = (tmp_path / file).read_bytes()
        for at in range(0, len(raw), max(1, len(raw) // 60)):
            data = bytearray(raw)
            data[at] ^= 4
            (tmp_path / file).write_bytes(data)
            assert formats.problems(tmp_path) != [], (file, at)
        (tmp_path / file).write_bytes(raw)
    assert formats.problems(tmp_path) == []
