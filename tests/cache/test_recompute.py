"""`saemill verify --repair`: a store is byte by byte as before the damage, or stays as it is."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import transformers
from caching import BATCH, SHARD, cache, marks
from crashes import Crash, bury, crash_at, file_hashes
from object_store import S3
from stores import make_embeddings
from typer.testing import CliRunner

from saemill import cli
from saemill.cache import recompute
from saemill.cache import run as cache_run
from saemill.cache.config import CacheConfig
from saemill.cache.fill import computed
from saemill.cache.recompute import repair
from saemill.common import durable, records
from saemill.common.errors import ConfigError, SaemillError, StoreError
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.followers import Consumed
from saemill.common.stores.site_records import CONSUMED
from saemill.common.stores.tokens import TokenStore
from saemill.convert_store.config import ConvertConfig
from saemill.convert_store.run import run as convert
from saemill.show import problems

pytestmark = pytest.mark.usefixtures("one_thread")
FORMS: dict[str, dict[str, str]] = {
    "bf16": {}, "fp32-zstd": {"dtype": "fp32", "compression": "zstd"},
    "int8-lz4": {"dtype": "int8", "compression": "lz4"},
}  # fmt: skip
OPTIONS: dict[str, Any] = {"layers": (0, 1), "max_tokens": 4 * SHARD}


@pytest.fixture(scope="module")
def stores(tokens: TokenStore, neox: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A store of two sites and four shards in each form."""
    folder = tmp_path_factory.mktemp("forms")
    return {name: cache(tokens, neox, folder / name, **OPTIONS, **form).path for name, form in FORMS.items()}


def flip(content: bytes) -> bytes:
    return content[:100] + bytes([content[100] ^ 1]) + content[101:]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "layers.0/c/0/0": flip,
    "layers.0/c/1/0": lambda content: content[: len(content) // 2],
    "layers.0/c/3/0": lambda content: None,
    "layers.1/c/1/0": lambda content: bytes(len(content)),
    "layers.1/c/2/0": lambda content: b"",
    "layers.0/commits/2.json": flip,
    "layers.1/commits/0.json": lambda content: None,
    "layers.1/zarr.json": lambda content: b"{}",
    "sites/layers.0.json": flip,
    "zarr.json": lambda content: None,
}


def spoil(folder: Path) -> None:
    for name, damage in DAMAGES.items():
        content = damage((folder / name).read_bytes())
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_damaged_comes_out_as_it_was(form: str, stores: dict[str, Path], tmp_path: Path) -> None:
    """Oracle: the whole store, file by file; what was whole is not touched."""
    copy = Path(shutil.copytree(stores[form], tmp_path / "acts"))
    spoil(copy)
    before = {name: mark for name, mark in marks(copy).items() if name not in DAMAGES}
    repair(copy, None, "cpu", None)
    assert file_hashes(copy) == file_hashes(stores[form])
    assert marks(copy).items() >= before.items()


@pytest.mark.parametrize("form", FORMS)
def test_a_bucket_is_repaired_too(form: str, stores: dict[str, Path], s3: S3, tmp_path: Path) -> None:
    """Oracle: the whole store, object by object."""
    copy = Path(shutil.copytree(stores[form], tmp_path / "acts"))
    spoil(copy)
    address = Path(s3.put(copy, "acts"))
    repair(address, None, "cpu", None)
    s3.fetch("acts", tmp_path / "fetched")
    assert file_hashes(tmp_path / "fetched") == file_hashes(stores[form])
    assert problems(address) == []


def older(folder: Path) -> None:
    """Make a store one of before saemill kept the rows per forward pass."""
    for file in (*folder.glob("*/commits/*.json"), *folder.glob("*/manifest.json")):
        if "tokens" not in file.parts:
            values = durable.read_json(file)
            for each in (values, *values.get("shards", ())):
                each.pop("batch_rows", None)
            values.pop("checksum")
            file.write_text(json.dumps(records.sealed(values)))


def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, list[str]]]:
    """The passes that a repair makes: shard, rows at once, sites."""
    made: list[tuple[int, int, list[str]]] = []

    def spied(store: Any, model: Any, forms: Any, shard: int, n_rows: int, *others: Any) -> Any:
        made.append((shard, n_rows, [*forms]))
        return computed(store, model, forms, shard, n_rows, *others)

    monkeypatch.setattr(recompute, "computed", spied)
    return made


def test_each_shard_is_computed_by_as_many_rows_as_it_was(
    tokens: TokenStore, neox: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the batches of each pass, which its record or the manifest tells: of a store that was resumed
    and added to with others; converted, they are kept where shards are the same. The whole store, file by
    file."""
    acts = tmp_path / "acts"
    cache(tokens, neox, acts, layers=(0,), max_tokens=4 * SHARD, batch_size=3)
    for name in ("layers.0/manifest.json", "layers.0/commits/2.json", "layers.0/c/2/0"):
        (acts / name).unlink()
    cache(tokens, neox, acts, layers=(0, 1), batch_size=7)
    before = file_hashes(acts)
    for name in ("layers.0/c/1/0", "layers.0/c/2/0", "layers.1/c/1/0", "layers.1/c/2/0"):
        (acts / name).unlink()
    (acts / "layers.0/commits/1.json").unlink()
    made = passes(monkeypatch)
    refused(acts, "batch_size has no effect: the records of the bad shards in .* leave it out", batch_size=3)
    repair(acts, None, "cpu", None)
    assert made == [(1, 3, ["layers.0"]), (1, 7, ["layers.1"]), (2, 7, ["layers.0", "layers.1"])]
    assert file_hashes(acts) == before
    for name, changes in {"same": {"compression": "zstd"}, "others": {"shard_tokens": 2 * SHARD}}.items():
        convert(ConvertConfig(source=acts, out=tmp_path / name, **changes))
    batches = {
        name: [
            shard.batch_rows for shard in ActivationStore(tmp_path / name).site("layers.0").manifest.shards
        ]
        for name in ("acts", "same", "others")
    }
    assert batches == {"acts": [3, 3, 7, 3], "same": [3, 3, 7, 3], "others": [None, None]}


def test_a_store_of_before_rows_per_pass_were_kept(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the whole store, file by file, read and repaired by the rows per pass that are given, or by
    those of a CPU."""
    whole, copy = Path(shutil.copytree(stores["bf16"], tmp_path / "acts")), tmp_path / "copy"
    older(whole)
    assert problems(whole) == []
    shutil.copytree(whole, copy)
    spoil(copy)
    made = passes(monkeypatch)
    repair(copy, None, "cpu", BATCH)
    assert {n_rows for _, n_rows, _ in made} == {BATCH}
    names = {name for name in file_hashes(whole) if name.endswith("/0") or name.endswith("manifest.json")}
    assert all(file_hashes(copy)[name] == file_hashes(whole)[name] for name in names)
    made.clear()
    (copy / "layers.0/c/3/0").unlink()
    with suppress(ConfigError):  # which it may be, on other machines
        repair(copy, None, "cpu", None)
    assert made == [(3, 64, ["layers.0"])]


@pytest.mark.parametrize("value", [0, -1, 2.0, "16", True, 513])
def test_rows_per_pass_that_cannot_be_are_damage(value: Any, stores: dict[str, Path], tmp_path: Path) -> None:
    """Oracle: the refusal, though the checksum fits."""
    copy = Path(shutil.copytree(stores["bf16"], tmp_path / "acts"))
    for name in ("layers.0/commits/1.json", "layers.1/manifest.json"):
        values = durable.read_json(copy / name)
        del values["checksum"]
        (values["shards"][1] if "shards" in values else values)["batch_rows"] = value
        (copy / name).write_text(json.dumps(records.sealed(values)))
    store = ActivationStore(copy)
    with pytest.raises(StoreError, match=r"commits/1.json is damaged: .*rows"):
        store.commit("layers.0", 1)
    with pytest.raises(StoreError, match=r"manifest.json is damaged: shards.1.*rows"):
        store.site("layers.1")


def test_a_lost_manifest_is_merged_again_without_the_model(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the whole store; the model cannot be loaded."""
    copy = Path(shutil.copytree(stores["int8-lz4"], tmp_path / "acts"))
    (copy / "layers.0/manifest.json").unlink()
    (copy / "layers.1/manifest.json").write_text("{}")
    monkeypatch.setattr("saemill.cache.recompute.LanguageModel", None)
    repair(copy, None, "cpu", None)
    assert file_hashes(copy) == file_hashes(stores["int8-lz4"])


def test_a_crash_on_the_way_leaves_a_store_that_is_repaired_later(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    """Oracle: the whole store, after a crash before some steps on the disk and one more call."""
    for moment in range(0, 200, 9):
        copy = Path(shutil.copytree(stores["bf16"], tmp_path / str(moment)))
        spoil(copy)
        with pytest.MonkeyPatch.context() as patch:
            crash_at(moment, patch)
            try:
                repair(copy, None, "cpu", None)
            except Crash:
                bury(copy)
            else:
                assert moment > 20
                return
        repair(copy, None, "cpu", None)
        assert file_hashes(copy) == file_hashes(stores["bf16"]), f"after a crash at step {moment}"
    raise AssertionError("the repair never ended")


def refused(path: Path, match: str, kind: type[SaemillError] = ConfigError, **options: Any) -> None:
    """A repair is refused, and every file stays as it is."""
    before = file_hashes(path)
    with pytest.raises(kind, match=match):
        repair(path, **{"model": None, "device": "cpu", "batch_size": None} | options)
    assert file_hashes(path) == before


def test_a_shard_that_comes_out_otherwise_replaces_none(
    stores: dict[str, Path], neox: str, tmp_path: Path
) -> None:
    """Oracle: every file as it was. The model is another one, of the same shape."""
    copy = Path(shutil.copytree(stores["bf16"], tmp_path / "acts"))
    (copy / "layers.1/c/2/0").write_bytes(b"x")
    config = transformers.AutoConfig.from_pretrained(neox)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    refused(
        copy,
        r"shard 2 of layers.1 in .* does not come out as it was, so nothing took its place: give the model",
        model=str(tmp_path / "other"),
    )
    cache_again = r"nothing whole tells what shard 2 of layers.1 in .* was: `saemill cache` again"
    (copy / "layers.1/commits/2.json").unlink()
    (copy / "layers.1/manifest.json").write_text("{}")
    refused(copy, cache_again, StoreError)


def test_stores_that_no_model_computes_are_refused(
    stores: dict[str, Path], tokens: TokenStore, neox: str, tmp_path: Path
) -> None:
    """Oracle: the reasons; every file stays as it is."""
    (tmp_path / "imported").mkdir()
    imported, _ = make_embeddings(tmp_path / "imported")
    refused(
        imported, "holds embeddings or imported activations, which no model here computes: run the command"
    )
    convert(ConvertConfig(source=stores["bf16"], out=tmp_path / "int8", dtype="int8"))
    refused(
        tmp_path / "int8", "was converted from a store of bf16, whose rounding is in its rows: run `saemill"
    )
    copy = Path(shutil.copytree(stores["bf16"], tmp_path / "acts"))
    (copy / "tokens/segments.parquet").unlink()
    refused(
        copy,
        r"copy of the tokens in .* is damaged: .*segments.parquet: file is missing. Run the command",
        StoreError,
    )
    shutil.copy(stores["bf16"] / "tokens/segments.parquet", copy / "tokens/segments.parquet")
    for site in ("layers.0", "layers.1"):
        (copy / site / "manifest.json").unlink()
        (copy / site / "c/0/0").unlink()
    store = ActivationStore(copy)
    consumed = Consumed(store=store.settings.identity, sites=("layers.0", "layers.1"), first=0, stop=1)
    records.write(copy / CONSUMED, consumed)
    refused(copy, "is consumed: its shard 0 was removed .* computes them again")
    given = transformers.AutoModel.from_pretrained(neox).eval()
    config = CacheConfig(tokens=tokens.path, model=neox, out=tmp_path / "given", **OPTIONS)
    cache_run.run(config, given)
    (tmp_path / "given/layers.0/c/0/0").unlink()
    told = problems(tmp_path / "given")[-1]
    assert "--repair --model FOLDER`" in told
    assert "`cache_activations` with the model" in told
    refused(tmp_path / "given", r"was cached from a model in memory \(.*\); name that model with --model")


def test_the_command(stores: dict[str, Path], tokens: TokenStore, tmp_path: Path) -> None:
    """Oracle: the exit codes, and the whole store."""
    copy = Path(shutil.copytree(stores["bf16"], tmp_path / "acts"))
    (copy / "layers.1/c/2/0").unlink()

    def verify(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli.app, ["verify", *words])
        return result.exit_code, result.output

    code, output = verify(str(copy))
    assert (code, f"`saemill verify {copy} --repair` computes the bad shards again" in output) == (1, True)
    code, output = verify(str(copy), "--repair", "--device", "cpu")
    assert (code, "1 shard computed again, each as it was" in output) == (0, True)
    assert "every file has its size and hash" in output
    assert file_hashes(copy) == file_hashes(stores["bf16"])
    for words, message in (
        ([str(copy), "--model", "m"], "model has no effect without --repair"),
        ([str(tokens.path), "--repair"], "is a token store, and activations alone are computed again"),
    ):
        result = CliRunner().invoke(cli.app, ["verify", *words])
        assert isinstance(result.exception, ConfigError)
        assert message in str(result.exception)
