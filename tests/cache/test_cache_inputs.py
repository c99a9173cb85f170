"""What modules take, from the cache to an SAE in another tool's format; and what was found at each site."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from caching import BATCH, N_ROWS, SHARD, cache
from crashes import file_hashes
from saes import make_sae
from torch import Tensor

from saemill import Sae
from saemill.assess.config import AssessConfig
from saemill.assess.run import run as assess
from saemill.common import durable, records
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.site_records import record_path
from saemill.common.stores.tokens import TokenStore
from saemill.convert import export
from saemill.show import describe, problems
from saemill.train.config import TrainConfig
from saemill.train.run import run as train

pytestmark = pytest.mark.usefixtures("one_thread")

SITES = ("layers.1:in", "layers.1.self_attn.o_proj:in", "layers.1.mlp:in", "layers.1.mlp")


@pytest.fixture(scope="module")
def inputs(
    tokens: TokenStore, tiny_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> ActivationStore:
    """A store of what some modules of a Llama take, and of what one returns."""
    return cache(tokens, tiny_models["llama"], tmp_path_factory.mktemp("inputs") / "acts", sites=SITES)


def own_inputs(tokens: TokenStore, model: str) -> dict[str, Tensor]:
    """Oracle: transformers' own modules, watched by hooks written here; bf16 as it is stored."""
    network = transformers.AutoModel.from_pretrained(model).eval()
    found: dict[str, list[Tensor]] = {site: [] for site in SITES}
    for site in SITES:
        module = network.get_submodule(site.removesuffix(":in"))
        if site.endswith(":in"):
            module.register_forward_pre_hook(
                lambda _m, given, named, site=site: found[site].append(
                    (given[0] if given else named["hidden_states"]).clone()
                ),
                with_kwargs=True,
            )
        else:
            module.register_forward_hook(lambda _m, _g, output, site=site: found[site].append(output.clone()))
    ids = torch.from_numpy(tokens.rows(0, N_ROWS).astype(np.int64))
    rows = SHARD // tokens.ctx_len
    with torch.no_grad():
        for shard in ids.split(rows):
            for batch in shard.split(BATCH):
                network(batch)
    return {site: torch.cat(x).flatten(0, 1).bfloat16() for site, x in found.items()}


def test_what_modules_take_is_stored(
    inputs: ActivationStore, tokens: TokenStore, tiny_models: dict[str, str]
) -> None:
    """Oracle: pre-hooks on transformers' own model; folders without a colon; nothing is found damaged."""
    assert inputs.sites == sorted(SITES)
    assert {file.name for file in inputs.path.glob("layers*")} == {
        "layers.1~in", "layers.1.self_attn.o_proj~in", "layers.1.mlp~in", "layers.1.mlp",
    }  # fmt: skip
    own = own_inputs(tokens, tiny_models["llama"])
    for site in SITES:
        assert torch.equal(inputs.read(site, 0, inputs.n_tokens), own[site])
    assert problems(inputs.path) == []
    again = cache(tokens, tiny_models["llama"], inputs.path, sites=("layers.1.*proj:in", "layers.1.mlp:in"))
    assert "layers.1.mlp.down_proj:in" in again.sites


def test_what_is_at_a_site_is_written_down_and_kept(
    inputs: ActivationStore, tokens: TokenStore, tiny_models: dict[str, str], tmp_path: Path
) -> None:
    """Oracle: Llama's code, read; a record that was lost is written again as it was, from the manifest."""
    kinds = {site: role.kind for site in SITES if (role := inputs.array(site).role)}
    assert list(kinds.values()) == ["residual", "within", "norm_of_residual", "added"]
    assert "added to the residual stream as it is" in describe(inputs.path)
    copy = Path(shutil.copytree(inputs.path, tmp_path / "acts"))
    before = file_hashes(copy)
    record_path(copy, "layers.1.mlp").unlink()
    (copy / "layers.1.mlp~in" / "manifest.json").write_text("{}")
    cache(tokens, tiny_models["llama"], copy, sites=("layers.1.mlp", "layers.1.mlp:in"))
    assert file_hashes(copy) == before


def test_a_store_of_before_roles_is_read(made: ActivationStore, tmp_path: Path) -> None:
    """Oracle: records without the field, as they were; they have the same identity and fingerprint."""
    copy = Path(shutil.copytree(made.path, tmp_path / "acts"))
    for file in (record_path(copy, "layers.0"), copy / "layers.0" / "manifest.json"):
        content = {key: value for key, value in json.loads(file.read_text()).items() if key != "checksum"}
        content.pop("role")
        for name in ("attn_implementation", "trust_remote_code"):
            content.get("settings", {}).pop(name, None)
        durable.write_json(file, records.sealed(content))
    group = json.loads((copy / "zarr.json").read_text())
    settings = {k: v for k, v in group["attributes"]["saemill"].items() if k != "checksum"}
    settings = {k: v for k, v in settings.items() if k not in ("attn_implementation", "trust_remote_code")}
    group["attributes"]["saemill"] = records.sealed(settings)
    durable.write_json(copy / "zarr.json", group)
    old = ActivationStore(copy)
    assert old.array("layers.0").role is None
    assert old.array("layers.1").role is not None
    assert (old.fingerprint, old.settings.identity) == (made.fingerprint, made.settings.identity)
    assert torch.equal(old.read("layers.0", 0, 64), made.read("layers.0", 0, 64))
    assert problems(copy) == []


def test_transcoders_from_what_an_mlp_takes_are_trained_and_assessed(
    inputs: ActivationStore, tmp_path: Path
) -> None:
    """Oracle: the site's names, written by hand; an SAE that reads an MLP's input is of use as finite ΔCE."""
    out = tmp_path / "run"
    train(
        TrainConfig(
            acts=inputs.path, out=out, site=("layers.1.mlp:in",), target_site=("layers.1.mlp",), k=(4,),
            num_latents=(64,), batch_size=256, max_tokens=2048, device="cpu",
        )
    )  # fmt: skip
    (name,) = [folder.name for folder in out.glob("layers*")]
    assert name.startswith("layers.1.mlp~in-to-layers.1.mlp-k4")
    result = assess(AssessConfig(run=out, device="cpu", model_tokens=1024, max_tokens=1024, n_latents=0))
    (entry,) = result["variants"]
    assert (entry["site"], entry["target_site"]) == ("layers.1.mlp:in", "layers.1.mlp")
    assert np.isfinite(entry["metrics"]["delta_ce"]["value"])
    assert Sae.load(out / name).config.provenance["roles"]["layers.1.mlp"]["kind"] == "added"
    assert problems(out) == []


def exported(site: str, model: str, role: dict[str, Any] | None, folder: Path) -> dict[str, Any]:
    """The config that SAELens reads, of an SAE of a site."""
    sae = make_sae()
    sae.config.provenance.update(site=site, model=model, **({"roles": {site: role}} if role else {}))
    sae.save(folder / "sae")
    export(folder / "sae", "saelens", folder / "saelens")
    content: dict[str, Any] = json.loads((folder / "saelens" / "cfg.json").read_text())
    return content


@pytest.mark.parametrize(
    ("site", "role", "hook"),
    [
        ("layers.1.self_attn.o_proj:in", None, "blocks.1.attn.hook_z"),
        ("layers.1:in", None, "blocks.1.hook_resid_pre"),
        ("layers.1.mlp", None, "blocks.1.hook_mlp_out"),
        ("layers.1.mlp", {"kind": "added"}, "blocks.1.hook_mlp_out"),
        ("layers.1.mlp", {"kind": "added", "factor": 0.22}, None),
        ("layers.1.mlp", {"kind": "added_after_norm", "module": "layers.1.norm"}, None),
    ],
)
def test_hooks_are_named_where_they_are_the_same_tensor(
    site: str, role: dict[str, Any] | None, hook: str | None, tiny_models: dict[str, str], tmp_path: Path
) -> None:
    """Oracle: TransformerLens' names, written by hand: an output there is what is added, as it is."""
    content = exported(site, tiny_models["llama"], role, tmp_path)
    assert content["metadata"].get("hook_name") == hook
    assert content["reshape_activations"] == ("hook_z" if "hook_z" in str(hook) else "none")
    assert Sae.load(tmp_path / "saelens").site == site
