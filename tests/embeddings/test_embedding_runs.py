"""SAEs trained and assessed on embeddings: passages in place of tokens."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from importing import table, taken
from typer.testing import CliRunner

from saemill import cli
from saemill.assess.config import AssessConfig
from saemill.assess.run import run as assess
from saemill.assess.table import context_line, contexts_text
from saemill.common.errors import ConfigError, DataError, StoreError
from saemill.common.sae.sae import Sae
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.features import Context, Passage, load
from saemill.show import describe
from saemill.train.config import TrainConfig
from saemill.train.run import run as train


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 embeddings, sums of 2 of 24 directions, with texts that name them; a run trained on them."""
    folder = tmp_path_factory.mktemp("planted")
    generator = np.random.default_rng(0)
    directions = np.linalg.qr(generator.standard_normal((24, 24)))[0]
    which = np.array([generator.choice(24, 2, replace=False) for _ in range(2000)])
    x = (generator.uniform(1, 2, (2000, 2, 1)) * directions[which]).sum(1) + 3
    texts = [f"<about> {a} and {b}, number {i % 1900}" for i, (a, b) in enumerate(which)]
    texts[1900:], x[1900:] = texts[:100], x[:100]
    pq.write_table(
        table(x.astype(np.float32), text=texts, id=[f"p{i}" for i in range(2000)]), folder / "x.parquet"
    )
    taken(folder / "x.parquet", folder / "acts", shard_rows=512)
    train(
        TrainConfig(
            acts=folder / "acts", out=folder / "run", site=("embedding",), k=(2, 4), num_latents=(48,),
            batch_size=128, epochs=60, lr=(3e-3,), device="cpu",
        )
    )  # fmt: skip
    return folder


def sparsest(planted: Path) -> Path:
    (folder,) = (planted / "run").glob("embedding-k2-*")
    return folder


def test_features_show_the_passages_where_they_fire_most(planted: Path, tmp_path: Path) -> None:
    """Oracle: every passage encoded, the strongest of each latent taken, copies of a text once."""
    assess(AssessConfig(run=planted / "run", out=tmp_path, device="cpu", latents=(5,), n_contexts=3))
    features = load(tmp_path)
    source = pq.read_table(planted / "x.parquet")
    x = np.stack(source["embedding"].to_pylist()).astype(np.float32)
    texts, ids = source["text"].to_pylist(), source["id"].to_pylist()
    encoded = Sae.load(planted / "run" / features.variant).encode(x)
    dense = torch.zeros(2000, 48).scatter_(1, encoded.top_indices, encoded.top_acts.detach())
    assert features.latents[0].latent == 5
    assert len(features.latents) >= 12
    for latent in features.latents:
        strongest: dict[str, float] = {}
        for row in dense[:, latent.latent].argsort(descending=True, stable=True).tolist():
            if dense[row, latent.latent] > 0:
                strongest.setdefault(texts[row], float(dense[row, latent.latent]))
        expected = list(strongest.items())[:3]
        places = [context.place for context in latent.contexts if isinstance(context.place, Passage)]
        assert [place.text for place in places] == [name for name, _ in expected]
        activations = [context.activation for context in latent.contexts]
        assert activations == pytest.approx([activation for _, activation in expected], rel=1e-4)
        for place in places:
            assert texts[ids.index(place.id)] == place.text == texts[place.address]
    shown = contexts_text(features, 1, 1)
    first = features.latents[0].contexts[0].place
    assert isinstance(first, Passage)
    assert f"[{first.id}] {first.text}" in shown
    assert "of passages" in shown
    page = (tmp_path / "report.html").read_text()
    assert str(first.text).replace("<", "&lt;").replace(">", "&gt;") in page
    assert "<about>" not in page


def test_passages_without_texts_are_shown_by_id_or_row() -> None:
    """Oracle: the formats of the line; an id of the source, or its row."""
    for id_, shown in (("p7", "[p7] "), (None, "[passage 7] ")):
        place = Passage(address=7, id=id_, text=None)
        line = context_line(Context(activation=1.5, values=(), place=place))
        assert line.endswith(f"       1.50  {shown}")


def test_figures_are_those_of_the_held_out_passages(planted: Path, tmp_path: Path) -> None:
    """Oracle: FVU by numpy over the held-out rows; no losses, with the reason; planted directions found."""
    assessment = assess(AssessConfig(run=planted / "run", out=tmp_path, device="cpu", n_latents=0))
    store = ActivationStore(planted / "acts")
    held_out = torch.from_numpy(store.text.held_out_R)
    x = store.read("embedding", 0, 2000)[held_out]
    assert 120 < len(x) < 280
    for entry in assessment["variants"]:
        with torch.no_grad():
            error = Sae.load(planted / "run" / entry["name"])(x).reconstruction - x
        fvu = float(error.double().square().sum() / (x.double() - x.double().mean(0)).square().sum())
        assert entry["metrics"]["fvu"]["value"] == pytest.approx(fvu, rel=1e-4)
        assert fvu < 0.15
        for name in ("loss_recovered", "delta_ce"):
            figure = entry["metrics"][name]
            assert (figure["value"], figure["reason"]) == (None, "embeddings have no language model")
        assert entry["verdict"].startswith("passed, dead latents")  # which so few passages do not tell
        assert entry["checks_passed"].endswith("/2, 2 unknown")
    for control in assessment["controls"]:
        assert control["verdict"].startswith("failed: FVU")
    data = assessment["data"]
    assert data["unit"] == "passage"
    assert (
        data["n_tokens"]
        == len(x)
        > data["n_documents"]
        == len(
            {t for t, h in zip(store.text.texts(0, 2000), held_out, strict=True) if h}  # type: ignore[union-attr]
        )
    )
    assert (
        "those held out when the store was made (10%, chosen by a hash of their texts)"
        in (tmp_path / "report.html").read_text()
    )
    statistics = store.site("embedding").statistics
    training = store.read("embedding", 0, 2000)[~held_out].double()
    torch.testing.assert_close(statistics.mean_D, training.mean(0))
    assert statistics.n_tokens == len(training)


def test_what_needs_a_model_or_tokens_is_refused(planted: Path, tmp_path: Path) -> None:
    """Oracle: the messages."""
    with pytest.raises(ConfigError, match="model has no effect on embeddings"):
        assess(AssessConfig(run=planted / "run", model="gpt2"))
    with pytest.raises(ConfigError, match="tokens has no effect on embeddings"):
        assess(AssessConfig(run=planted / "run", tokens=tmp_path))
    with pytest.raises(StoreError, match="holds embeddings of passages, without tokens"):
        _ = ActivationStore(planted / "acts").tokens
    arguments = ["train", str(planted / "acts"), "--site", "embedding", "-o", str(tmp_path / "r")]
    with pytest.raises(
        ConfigError, match="passages have no positions, tokens or roles that a mask could leave out"
    ):
        CliRunner().invoke(cli.app, [*arguments, "--set", "mask.first_positions=1"], catch_exceptions=False)
    taken(planted / "x.parquet", tmp_path / "all", held_out_fraction=0)
    train(
        TrainConfig(
            acts=tmp_path / "all", out=tmp_path / "run", site=("embedding",), k=(2,), num_latents=(8,),
            batch_size=1000, device="cpu",
        )
    )  # fmt: skip
    with pytest.raises(
        ConfigError, match="no held-out passages; make the store with --held-out-fraction above 0"
    ):
        assess(AssessConfig(run=tmp_path / "run"))


def test_show_tells_the_store_and_the_sae_its_provenance(planted: Path) -> None:
    """Oracle: the settings it was made with."""
    lines = describe(planted / "acts").splitlines()
    n_held_out = int(ActivationStore(planted / "acts").text.held_out_R.sum())
    assert lines[1] == f"  embeddings of {planted / 'x.parquet'}, stored as fp32"
    assert lines[2] == f"  2,000 passages, {n_held_out} of them held out; 4 shards of 512"
    assert lines[4].endswith(f"over {2000 - n_held_out:,} training passages")
    with pytest.raises(StoreError, match=r"these are the passages of .*acts; name that"):
        describe(planted / "acts" / "passages")
    provenance = Sae.load(sparsest(planted)).config.provenance
    assert (provenance["dataset"], provenance["normalized"]) == (str(planted / "x.parquet"), False)
    assert provenance["model"] is None


def test_an_sae_encodes_arrays(planted: Path) -> None:
    """Oracle: the same rows as a tensor."""
    sae = Sae.load(sparsest(planted))
    x = ActivationStore(planted / "acts").read("embedding", 0, 10)
    features = sae.encode(x)
    for form in (x.numpy(), x.numpy().astype(np.float64), x.tolist(), list(x.numpy())):
        assert torch.equal(sae.encode(form).top_indices, features.top_indices)
        assert torch.equal(sae.encode(form).top_acts, features.top_acts)
    assert torch.equal(sae.encode(x.tolist()[3]).top_acts, sae.encode(x[3]).top_acts)
    with pytest.raises(DataError, match=r"must have 24 values each, the last axis; got the shape \(10, 23\)"):
        sae.encode(x[:, :23])
    with pytest.raises(DataError, match="must be a tensor or an array of numbers"):
        sae.encode(["some text"])
