"""SAEs that were trained elsewhere, as a run on cached activations."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from caching import cache, tokenized
from peers import require_peers, run_in_peers
from saes import make_sae, make_transcoder

from saemill import Sae
from saemill.assess.config import AssessConfig, LatentConfig
from saemill.assess.inputs import open_run
from saemill.assess.latent import run as show
from saemill.assess.run import run as assess
from saemill.common.errors import ConfigError, StoreError
from saemill.common.sae import formats
from saemill.common.sae.formats.hooks import Hook
from saemill.common.sae.parts import Joined
from saemill.common.stores import runs
from saemill.common.stores.activations import ActivationStore
from saemill.hub.contents import contents_of
from saemill.imported_run import import_run, names_of
from saemill.verify import run_problems

D = 32
HOOK = Hook(1, "resid_post")


@pytest.fixture(scope="module")
def acts(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path
) -> Path:
    """Blocks 1 and 2 of a tiny model, and one of its MLPs."""
    folder = tmp_path_factory.mktemp("imported")
    tokens = tokenized(corpus, tokenizer_folder, folder / "tokens")
    cache(tokens, tiny_models["neox"], folder / "acts", sites=("layers.1", "layers.2", "layers.1.mlp"))
    return folder / "acts"


def saelens(folder: Path, sae: Sae) -> Path:
    """Write an SAE of block 1 as SAELens does, which tells a hook, and no site."""
    folder.mkdir(parents=True)
    formats.save(sae.parts, "saelens", folder, HOOK, None)
    cfg = json.loads((folder / "cfg.json").read_text())
    del cfg["metadata"]["saemill"]
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return folder


def test_its_figures_are_those_of_the_file(acts: Path, tmp_path: Path) -> None:
    """Oracle: numpy over the held-out tokens, with the SAE as SAELens' folder has it; the page and the
    terminal show its latents; no sentence says that training did not see the text."""
    theirs = saelens(tmp_path / "theirs" / "sae", make_sae(D))
    out = tmp_path / "run"
    import_run([str(theirs), str(saelens(tmp_path / "more" / "sae", make_sae(D, k=9)))], acts, out)
    assert run_problems(out) == []
    made = assess(AssessConfig(run=out, device="cpu", with_model=False, n_latents=3))
    store = ActivationStore(acts)
    kept = [store.keep_addresses(i, store.mask, True) for i in range(store.n_shards)]
    x_TD = store.read("layers.1", 0, store.n_tokens).float()[torch.from_numpy(np.concatenate(kept))]
    error_TD = (x_TD - Sae.load(theirs)(x_TD).reconstruction).double()
    fvu = error_TD.square().sum() / (x_TD.double() - x_TD.double().mean(0)).square().sum()
    found = {entry["name"]: entry for entry in made["variants"]}
    assert set(found) == {"theirs-sae", "more-sae"}
    assert found["theirs-sae"]["metrics"]["fvu"]["value"] == pytest.approx(float(fvu), rel=1e-5)
    assert found["theirs-sae"]["tokens_trained"] is None
    assert "whether training saw them is not known" in made["data"]["chosen"]
    assert "never saw" not in (out / "report.html").read_text()
    latent = show(LatentConfig(run=out / "more-sae", latents=("3",), device="cpu")).latents[0]
    assert latent.effects[0].promoted
    with pytest.raises(ConfigError, match="holds SAEs that were trained elsewhere"):
        contents_of(out, "user/repo", ())


def test_a_transcoder_gets_the_sites_that_are_named(acts: Path, tmp_path: Path) -> None:
    """Oracle: the weights of the file; the sites that were named."""
    theirs = make_transcoder(d=D, e=D)
    theirs.save(tmp_path / "transcoder")
    places = {"site": "layers.1", "target_site": "layers.1.mlp"}
    import_run([str(tmp_path / "transcoder")], acts, tmp_path / "run", **places)
    trained = open_run(AssessConfig(run=tmp_path / "run"), torch.device("cpu"))
    sae = trained.saes["transcoder"]
    assert trained.is_imported
    assert (sae.site, sae.target_site) == ("layers.1", "layers.1.mlp")
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), theirs.parameters(), strict=True))


def test_a_crosscoder_of_two_models_takes_both_stores(
    acts: Path, tiny_models: dict[str, str], tmp_path: Path
) -> None:
    """Oracle: the sites and weights of the file, which names both; the run is open to `assess` on both
    stores; one store, or a second that no SAE reads, is refused with advice that works."""
    other = tmp_path / "other"
    cache(acts.parent / "tokens", tiny_models["llama"], other, sites=("layers.1",))
    joined = tuple(Joined(site, D, 1.0) for site in ("layers.1", "with.layers.1"))
    theirs = make_sae(2 * D)
    config = replace(theirs.config, joined=joined, provenance={"site": "layers.1+with.layers.1"})
    theirs = Sae.of(replace(theirs.parts, config=config))
    theirs.save(tmp_path / "crosscoder")
    path = [str(tmp_path / "crosscoder")]
    with pytest.raises(ConfigError, match=r"joins sites of two stores, .*; name .* with --with-acts"):
        import_run(path, acts, tmp_path / "run")
    import_run(path, acts, tmp_path / "run", with_acts=other)
    trained = open_run(AssessConfig(run=tmp_path / "run"), torch.device("cpu"))
    sae = trained.saes["crosscoder"]
    assert sae.site == "layers.1+with.layers.1"
    assert sae.config.provenance["with"]["model"] == tiny_models["llama"]
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), theirs.parameters(), strict=True))
    assert trained.store.beside is not None
    assert run_problems(tmp_path / "run") == []
    make_sae(D).save(tmp_path / "alone")
    with pytest.raises(ConfigError, match="with_acts has no effect: no SAE joins a site of"):
        import_run([str(tmp_path / "alone")], acts, tmp_path / "both", with_acts=other, site="layers.1")


def test_a_file_that_saelens_wrote(acts: Path, tmp_path: Path) -> None:
    """Oracle: SAELens, which made the SAE and saved it with the hook that it was trained on, and encodes and
    decodes cached activations with it; its FVU and L0 on all held-out tokens by numpy."""
    require_peers()
    store = ActivationStore(acts)
    kept = [store.keep_addresses(i, store.mask, True) for i in range(store.n_shards)]
    x_TD = store.read("layers.1", 0, store.n_tokens).float()[torch.from_numpy(np.concatenate(kept))].numpy()
    np.save(tmp_path / "x.npy", x_TD)
    folder, out = tmp_path / "theirs" / "blocks.1.hook_resid_post", tmp_path / "y.npz"
    run_in_peers(
        tmp_path,
        {
            "do": "make_saelens", "folder": folder, "d_in": D, "d_sae": 64, "k": 5,
            "metadata": {"hook_name": "blocks.1.hook_resid_post", "model_name": "theirs"},
        },
        {"do": "encode", "format": "saelens", "folder": folder, "x": tmp_path / "x.npy", "out": out},
    )  # fmt: skip
    import_run([str(folder)], acts, tmp_path / "run")
    (entry,) = assess(AssessConfig(run=tmp_path / "run", device="cpu", with_model=False, n_latents=0))[
        "variants"
    ]
    theirs = np.load(out)
    error_TD = x_TD.astype(np.float64) - theirs["reconstruction"]
    fvu = np.square(error_TD).sum() / np.square(x_TD - x_TD.mean(0, dtype=np.float64)).sum()
    assert entry["site"] == "layers.1"
    assert entry["metrics"]["fvu"]["value"] == pytest.approx(fvu, rel=1e-4)
    assert entry["metrics"]["l0"]["value"] == pytest.approx((theirs["latents"] > 0).sum(1).mean(), rel=1e-4)


def test_the_mask_is_that_of_the_file(acts: Path, tmp_path: Path) -> None:
    """Oracle: the positions that were put into the file; two of different masks are refused."""
    sae = make_sae(D)
    for n in (0, 4):
        sae.config.provenance["left_out"] = {"first_positions": n, "token_ids": [5, 7]}
        sae.save(tmp_path / f"first{n}")
    import_run([str(tmp_path / "first4")], acts, tmp_path / "run")
    mask = runs.finished(tmp_path / "run").mask
    assert (mask.first_positions, mask.ids((0, 1)), mask.roles) == (4, [5, 7], ())
    with pytest.raises(ConfigError, match="were trained on other positions"):
        import_run([str(tmp_path / f"first{n}") for n in (0, 4)], acts, tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_what_does_not_fit_is_refused(acts: Path, tmp_path: Path) -> None:
    """Oracle: the messages, with nothing written; the advice in them works."""
    out = tmp_path / "run"
    make_sae(D).save(tmp_path / "known")
    narrow, unknown = make_sae(D // 2), make_sae(D)
    narrow.save(tmp_path / "narrow")
    unknown.config.provenance.clear()
    unknown.save(tmp_path / "unknown")
    for name, words in (
        ("narrow", r"narrow: it is 16 wide, and layers\.1 of .* 32; name another site"),
        ("unknown", "do not tell the site that it reads; name one .* with --site: .*layers.1"),
    ):
        with pytest.raises(ConfigError, match=words):
            import_run([str(tmp_path / name)], acts, out)
    import_run([str(tmp_path / "unknown")], acts, tmp_path / "named", site="layers.1")
    with pytest.raises(StoreError, match=r"site 'layers\.7' of .* is not in the store; finished: "):
        import_run([str(tmp_path / "known")], acts, out, site="layers.7")
    with pytest.raises(ConfigError, match="target_site is what a transcoder predicts"):
        import_run([str(tmp_path / "known")], acts, out, target_site="layers.2")
    with pytest.raises(ConfigError, match="each SAE must be named once"):
        import_run([str(tmp_path / "known")] * 2, acts, out)
    assert not out.exists()
    with pytest.raises(ConfigError, match=r"is an SAE, and no run; .* `saemill import .* --acts STORE"):
        assess(AssessConfig(run=tmp_path / "known"))


def test_names_are_as_short_as_tells_them_apart(tmp_path: Path) -> None:
    """Oracle: by hand."""
    assert names_of(["/a/x", "/a/layers.2"]) == ["x", "layers.2"]
    assert names_of(["/a/x", "hf://user/repo/x"]) == ["a-x", "repo-x"]
    (tmp_path / "ae.pt").touch()
    assert names_of([str(tmp_path / "ae.pt")]) == ["ae"]
