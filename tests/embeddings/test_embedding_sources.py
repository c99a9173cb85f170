"""Embeddings with sources: kept with the passages, told apart in figures and by probes."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from importing import table, taken, vectors

from saemill.assess.config import AssessConfig
from saemill.assess.run import run as assess
from saemill.common import durable, records
from saemill.common.errors import ConfigError, DataError, StoreError
from saemill.common.stores.passages import PassageManifest, PassageStore
from saemill.train.config import TrainConfig
from saemill.train.run import run as train

NAMES = np.array(["letters", "novels", "code"])


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,500 embeddings with a source each, of which two have a direction of their own; and a run."""
    folder = tmp_path_factory.mktemp("sources")
    source = np.random.default_rng(0).integers(0, 3, 1500)
    x = vectors(1500, 16) * 0.3
    x[source == 1, 0] += 4
    x[source == 2, 1] += 4
    pq.write_table(table(x, origin=NAMES[source], id=np.arange(1500)), folder / "x.parquet")
    taken(folder / "x.parquet", folder / "acts", source_column="origin", held_out_fraction=0.4)
    taken(folder / "x.parquet", folder / "plain", held_out_fraction=0.4)
    for acts in ("acts", "plain"):
        train(
            TrainConfig(
                acts=folder / acts, out=folder / f"run-{acts}", site=("embedding",), k=(2,),
                num_latents=(32,),
                batch_size=128, epochs=20, lr=(3e-3,), device="cpu",
            )
        )  # fmt: skip
    return folder


def test_sources_are_those_of_the_column(planted: Path) -> None:
    """Oracle: the column that was written; without it the passages' file has none."""
    passages = PassageStore(planted / "acts" / "passages")
    wanted = pq.read_table(planted / "x.parquet")["origin"].to_pylist()
    of_texts = passages.documents["source"].to_numpy()[passages.document_of(np.arange(1500))]
    assert [passages.manifest.sources[number] for number in of_texts] == wanted
    plain = PassageStore(planted / "plain" / "passages")
    assert plain.manifest.sources == ()
    assert plain.documents.column_names == ["text_hash", "start", "held_out"]
    assert pq.read_schema(planted / "plain" / "passages" / "passages.parquet").names == [
        "id", "text", "text_hash", "held_out"
    ]  # fmt: skip


def test_probes_tell_the_planted_sources(planted: Path) -> None:
    """Oracle: two sources have a direction of their own, which a latent takes; shuffled, nothing is told."""
    assessment = assess(AssessConfig(run=planted / "run-acts", device="cpu", n_latents=0, probes=True))
    (variant,) = assessment["variants"]
    assert set(variant["by_source"]) == set(NAMES)
    areas = {(probe["label"], probe["k"]): probe["auc"]["value"] for probe in variant["probes"]}
    assert {label for label, _ in areas} == {f"source {name}" for name in NAMES}
    assert min(areas["source novels", 1], areas["source code", 1]) > 0.9
    assert areas["source letters", 5] > 0.8  # those that have neither direction
    assert abs(variant["metrics"]["probe_auc_shuffled"]["value"] - 0.5) < 0.1
    assert variant["metrics"]["probe_auc_k1_above_random"]["lo"] > 0


def test_without_labels_probes_are_refused_before_work(planted: Path, tmp_path: Path) -> None:
    """Oracle: the messages; nothing is written."""
    for settings, message in (
        ({"probes": True}, "brings no label to probe for: its passages have no sources"),
        ({"absorption": True}, "absorption is of words, and .* holds embeddings of passages"),
    ):
        with pytest.raises(ConfigError, match=message):
            assess(AssessConfig(run=planted / "run-plain", out=tmp_path / "out", device="cpu", **settings))
    assert not (tmp_path / "out").exists()


def test_sources_that_cannot_be_used_are_refused(planted: Path, tmp_path: Path) -> None:
    """Oracle: the messages, which name the column, the row or the file."""
    with pytest.raises(ConfigError, match="has no column 'author'; it has embedding, origin, id"):
        taken(planted / "x.parquet", tmp_path / "a", source_column="author")
    np.save(tmp_path / "x.npy", vectors(8, 4))
    with pytest.raises(ConfigError, match="--source-column has no effect on npy files"):
        taken(tmp_path / "x.npy", tmp_path / "b", source_column="origin")
    pq.write_table(table(vectors(3, 4), origin=["a", None, "b"]), tmp_path / "gap.parquet")
    with pytest.raises(DataError, match="row 1 has no 'origin'"):
        taken(tmp_path / "gap.parquet", tmp_path / "c", source_column="origin")


def test_a_source_that_the_manifest_does_not_name_is_damage(planted: Path, tmp_path: Path) -> None:
    """Oracle: a manifest with one name too few, whose own hashes are right."""
    durable.write_bytes(
        tmp_path / "passages.parquet", [(planted / "acts" / "passages" / "passages.parquet").read_bytes()]
    )
    manifest = records.read(planted / "acts" / "passages" / "manifest.json", PassageManifest, "")
    records.write(tmp_path / "manifest.json", manifest.model_copy(update={"sources": ("letters", "novels")}))
    with pytest.raises(StoreError, match="names source 2, of 2"):
        _ = PassageStore(tmp_path).documents
