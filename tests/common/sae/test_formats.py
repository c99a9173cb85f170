"""SAEs to and from other tools; the oracle is the tool itself, run in its own environment."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from command_line import call
from peers import require_peers, run_in_peers
from saes import check_same, make_sae
from safetensors.torch import load_file, save_file

from saemill import Sae, SaeConfig, splice
from saemill.common.errors import ConfigError, StoreError
from saemill.common.sae import formats
from saemill.common.sae.formats import seal
from saemill.common.sae.formats.hooks import Hook
from saemill.demo import MODEL

PROVENANCE = {
    "site": "layers.2", "model": str(MODEL), "revision": None, "dataset": "some text", "ctx_len": 64,
    "prepend_bos": False,
}  # fmt: skip


def real_activations() -> torch.Tensor:
    """The demo model's residual stream after block 2. fp32 [T, 128]."""
    model = transformers.AutoModel.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer("The cat sat on the mat, while seven dogs ran over green hills. " * 4).input_ids
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return output.hidden_states[3][0]


def sae_for(x_TD: torch.Tensor, num_latents: int, k: int) -> Sae:
    """Random directions around the mean of x, every bias nonzero."""
    torch.manual_seed(1)
    w_dec_FD = torch.nn.functional.normalize(torch.randn(num_latents, x_TD.shape[1]), dim=1)
    config = SaeConfig(d_in=x_TD.shape[1], num_latents=num_latents, k=k, provenance=PROVENANCE)
    return Sae(config, w_dec_FD * 0.9, torch.randn(num_latents), w_dec_FD, x_TD.mean(0))


@pytest.mark.parametrize("name", formats.NAMES)
def test_weights_in_one_memory_are_written_apart(tmp_path: Path, name: str) -> None:
    """Oracle: the weights themselves, of an SAE whose encoder is its decoder; and of an `ae.pt` in which two
    tensors share a storage, written in each format."""
    sae = make_sae()
    rows = sae.parts.W_dec
    tied = replace(sae.parts, W_enc=rows, b_enc=rows[:, 0])
    formats.save(tied, name, tmp_path / "tied", Hook(1, "resid_post"))
    formats.save(sae.parts, "dictionary_learning", tmp_path / "theirs", Hook(1, "resid_post"))
    file = tmp_path / "theirs" / "ae.pt"
    state = torch.load(file)
    torch.save(state | {"encoder.bias": state["encoder.weight"].view(-1)[:40]}, file)
    shared = Sae.load(tmp_path / "theirs").parts
    formats.save(shared, name, tmp_path / "shared", Hook(1, "resid_post"))
    for parts, folder in ((tied, "tied"), (shared, "shared")):
        for key, found in Sae.load(tmp_path / folder).parts.weights.items():
            assert torch.equal(found, parts.weights[key]), key


def test_exported_saes_compute_the_same_in_each_tool(tmp_path: Path) -> None:
    """Oracle: each tool's own loader, encoder and decoder, on random and on the demo model's activations;
    what SAELens takes from the config."""
    require_peers()
    torch.manual_seed(0)
    inputs = {"random": 3 * torch.randn(200, 12) + 1, "real": real_activations()}
    saes = {"random": sae_for(inputs["random"], 40, 5), "real": sae_for(inputs["real"], 300, 16)}
    jobs = []
    for kind, sae in saes.items():
        np.save(tmp_path / f"{kind}.npy", inputs[kind].numpy())
        sae.save(tmp_path / kind)
        for name in formats.NAMES:
            folder = tmp_path / f"{kind}-{name}"
            call("export", tmp_path / kind, "--format", name, "-o", folder)
            jobs.append(
                {"do": "encode", "format": name, "folder": folder, "x": tmp_path / f"{kind}.npy",
                 "out": f"{folder}.npz"}
            )  # fmt: skip
    run_in_peers(tmp_path, *jobs)
    for kind, sae in saes.items():
        for name in formats.NAMES:
            check_same(sae, inputs[kind], tmp_path / f"{kind}-{name}.npz")
    with np.load(tmp_path / "real-saelens.npz") as found:
        told = json.loads(str(found["told"]))
    wanted = {
        "hook_name": "blocks.2.hook_resid_post", "model_name": str(MODEL), "dataset_path": "some text",
        "context_size": 64, "prepend_bos": False, "saemill": PROVENANCE,
    }  # fmt: skip
    assert wanted.items() <= told.items()


def test_spliced_by_saelens_the_model_loses_the_same(tmp_path: Path) -> None:
    """Oracle: SAELens, which loads the model that the config names and puts the SAE at its hook_name."""
    require_peers()
    x_TD = real_activations()
    sae = sae_for(x_TD, 300, 16)
    sae.save(tmp_path / "sae")
    call("export", tmp_path / "sae", "--format", "saelens", "-o", tmp_path / "out")
    ids = torch.arange(100, 164)[None]
    np.save(tmp_path / "ids.npy", ids.numpy())
    job = {"do": "splice", "folder": tmp_path / "out", "ids": tmp_path / "ids.npy", "out": tmp_path / "l.npy"}
    run_in_peers(tmp_path, job)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    with torch.no_grad():
        bare = model(input_ids=ids, labels=ids).loss
        with splice(model, "layers.2", sae, keep_error=False):
            spliced = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "l.npy")), torch.stack([bare, spliced]))
    assert spliced > bare + 0.01


SPARSIFY = {"do": "make_sparsify", "d_in": 12, "k": 5}
SAELENS = {"do": "make_saelens", "d_in": 12, "d_sae": 40, "k": 5}
THEIRS: dict[str, dict[str, Any]] = {
    "sparsify": SPARSIFY | {"num_latents": 40},
    "sparsify/layers.3": SPARSIFY | {"expansion_factor": 4, "normalize_decoder": False, "multi_topk": True},
    "saelens": SAELENS
    | {"metadata": {"hook_name": "blocks.3.hook_mlp_out", "model_name": "gpt2", "l0": 5.0}},
    "saelens/rescaled": SAELENS | {"rescale_acts_by_decoder_norm": True},
    "saelens/not-centred": SAELENS | {"apply_b_dec_to_input": False},
    "saelens/both": SAELENS | {"rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False},
    "saelens/training": SAELENS | {"training": True},
    "saelens/inference": SAELENS | {"training": True, "save": "save_inference_model"},
}

OLD: dict[str, Any] = {
    "hook_point": "blocks.1.hook_resid_pre", "d_in": 12, "d_sae": 40, "dtype": "torch.float32",
    "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}, "normalize_activations": False,
    "model_name": "gpt2-small", "context_size": 128, "dataset_path": "text",
}  # fmt: skip
"""A config of SAELens before 6.0."""


def test_their_saes_compute_the_same_here(tmp_path: Path) -> None:
    """Oracle: the tools' own classes, which make the files, all weights random, and encode and decode."""
    require_peers()
    torch.manual_seed(0)
    x_TD = 2 * torch.randn(200, 12) + 1
    np.save(tmp_path / "x.npy", x_TD.numpy())
    made = [job | {"folder": tmp_path / name} for name, job in THEIRS.items()]
    made.append(
        {"do": "make_dictionary_learning", "folder": tmp_path / "dictionary_learning", "d_in": 12,
         "num_latents": 40, "k": 5, "threshold_start_step": 0}
    )  # fmt: skip
    folders = [tmp_path / name for name in THEIRS] + [tmp_path / "dictionary_learning" / "trainer_0"]
    formats_ = [name.split("/")[0] for name in THEIRS] + ["dictionary_learning"]
    encoded = [
        {
            "do": "encode",
            "format": name,
            "folder": folder,
            "x": tmp_path / "x.npy",
            "out": f"{tmp_path}/{i}.npz",
        }
        for i, (name, folder) in enumerate(zip(formats_, folders, strict=True))
    ]
    run_in_peers(tmp_path, *made, *encoded)
    for i, folder in enumerate(folders):
        sae = Sae.load(folder)
        check_same(sae, x_TD, tmp_path / f"{i}.npz")
        call("import", folder, "-o", tmp_path / f"imported-{i}")
        again = Sae.load(tmp_path / f"imported-{i}")
        assert again.config == sae.config
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), sae.parameters(), strict=True))
    assert json.loads((tmp_path / "sparsify/layers.3/cfg.json").read_text())["num_latents"] == 0
    (tmp_path / "sparsify" / "config.json").write_text('{"model": "m", "dataset": "d", "ctx_len": 9}')
    told = Sae.load(tmp_path / "sparsify" / "layers.3").config.provenance
    assert [told[name] for name in ("site", "model", "dataset", "ctx_len")] == ["layers.3", "m", "d", 9]
    trained = Sae.load(folders[-1]).config.provenance
    assert trained["hook_name"] == "blocks.1.hook_resid_post"
    assert torch.load(folders[-1] / "ae.pt")["threshold"] > 0  # it was used, and has no part in its encoder


def test_what_saelens_folds_itself_and_its_older_configs(tmp_path: Path) -> None:
    """Oracle: SAELens' own folding of the activations' factor, and its own reading of a config of before
    6.0, which its loader turns into today's."""
    require_peers()
    x_TD = 2 * torch.randn(100, 12, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "x.npy", x_TD.numpy())
    sae = make_sae()
    formats.save(sae.parts, "saelens", tmp_path / "old")
    (tmp_path / "old" / "cfg.json").write_text(json.dumps(OLD))
    shape = {"d_in": 12, "d_sae": 40, "k": 5}
    encode = {"do": "encode", "format": "saelens", "x": tmp_path / "x.npy"}
    run_in_peers(
        tmp_path,
        {"do": "make_scaled_saelens", "folder": tmp_path / "scaled", "folded": tmp_path / "folded",
         "factor": 0.3} | shape,
        encode | {"folder": tmp_path / "folded", "out": tmp_path / "folded.npz"},
        encode | {"folder": tmp_path / "old", "out": tmp_path / "old.npz"},
    )  # fmt: skip
    check_same(Sae.load(tmp_path / "scaled"), x_TD, tmp_path / "folded.npz")
    check_same(Sae.load(tmp_path / "old"), x_TD, tmp_path / "old.npz")
    told = Sae.load(tmp_path / "old").config.provenance
    assert told["hook_name"] == "blocks.1.hook_resid_pre"
    assert (told["model"], told["ctx_len"], told["dataset"]) == ("gpt2-small", 128, "text")
    call("import", tmp_path / "old", "--model", MODEL, "-o", tmp_path / "imported")
    assert Sae.load(tmp_path / "imported").config.provenance["site"] == "layers.0"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", formats.NAMES)
def test_export_and_import_give_the_same_sae(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Oracle: the SAE that was exported, bit by bit, with its provenance."""
    sae = sae_for(torch.randn(8, 12), 40, 5).to(dtype)
    sae.save(tmp_path / "sae")
    call("export", tmp_path / "sae", "--format", name, "-o", tmp_path / "there")
    call("import", tmp_path / "there", "-o", tmp_path / "back")
    for file in ("cfg.json", "sae.safetensors"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "sae" / file).read_bytes()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sparsify", {"activation": "maxout"}, "must be one of topk, groupmax, abs-topk, jumprelu, got"),
        ("sparsify", {"transcode": 1}, "transcode must be true or false, got 1"),
        ("sparsify", {"transcode": True, "d_out": 13}, r"W_dec must be \(40, 13\)"),
        ("sparsify", {"transcode": True, "skip_connection": True}, r"W_skip must be \(12, 12\)"),
        ("sparsify", {"skip_connection": True}, "skip_connection must be False"),
        ("sparsify", {"k": 0}, "k must be a whole number of 1 or more, got 0"),
        ("sparsify", {"num_latents": 39}, r"encoder.weight must be \(39, 12\)"),
        ("saelens", {"architecture": "transcoder"}, "d_out must be a whole number of 1 or more"),
        ("saelens", {"architecture": "temporal"}, "architecture must be one of topk, .*got 'temporal'"),
        ("saelens", {"architecture": "matching_pursuit"}, "must be one of topk, .*got 'matching_pursuit'"),
        ("saelens", {"normalize_activations": "l2"}, "normalize_activations must be one of none, .*got 'l2'"),
        ("saelens", {"normalize_activations": "covariance_whitening"}, "whitening.safetensors is not there"),
        ("saelens", {"normalize_activations": "expected_average_only_in"}, "scaling_factor is not there"),
        ("saelens", {"reshape_activations": "hook_q"}, "reshape_activations must be one of none, hook_z"),
        ("dictionary_learning", {"dict_class": "IdentityDict"}, "dict_class must be one of .*got 'Ident"),
        ("dictionary_learning", {"k": 6}, "ae.pt: k must be 6 by the config beside it, got 5"),
    ],
)  # fmt: skip
def test_what_has_no_place_is_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    """Oracle: the message names the field."""
    formats.save(make_sae().parts, name, tmp_path)
    file = tmp_path / ("config.json" if name == "dictionary_learning" else "cfg.json")
    cfg = json.loads(file.read_text())
    (cfg["trainer"] if name == "dictionary_learning" else cfg).update(changes)
    file.write_text(json.dumps(seal.sealed_again(cfg) if name == "sparsify" else cfg))
    with pytest.raises((ConfigError, StoreError), match=message):
        Sae.load(tmp_path)


@pytest.mark.parametrize(
    ("old", "message"),
    [
        ({"activation_fn_str": "tanh-relu"}, "activation_fn must be 'relu', got 'tanh-relu'"),
        ({"normalize_activations": True}, "normalize_activations is 'expected_average_only_in'"),
        ({"activation_fn_kwargs": {}}, "k must be a whole number of 1 or more, got None"),
    ],
)
def test_older_configs_of_saelens_are_refused_alike(
    tmp_path: Path, old: dict[str, Any], message: str
) -> None:
    """Oracle: what SAELens' own reading of such a config (handle_pre_6_0_config) makes of the field."""
    formats.save(make_sae().parts, "saelens", tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(OLD | old))
    with pytest.raises((ConfigError, StoreError), match=message):
        Sae.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "config.json is damaged"), ("[1]", "must hold a JSON object"), ("{}", "trainer must be a group")],
)
def test_configs_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    """Oracle: the messages, and that of a missing file."""
    formats.save(make_sae().parts, "dictionary_learning", tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(StoreError, match=message):
        Sae.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(StoreError, match=r"config.json is missing"):
        Sae.load(tmp_path)


def test_weights_that_the_config_does_not_tell_of_are_refused(tmp_path: Path) -> None:
    """Oracle: the message names the tensor."""
    formats.save(make_sae().parts, "saelens", tmp_path)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    save_file(weights | {"threshold": torch.zeros(40)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ConfigError, match="threshold must be absent"):
        Sae.load(tmp_path)
    del weights["b_enc"]
    save_file(weights, tmp_path / "sae_weights.safetensors")
    with pytest.raises(StoreError, match=r"b_enc must be \(40,\) .* got nothing"):
        Sae.load(tmp_path)
    (tmp_path / "sae_weights.safetensors").write_bytes(b"cut off")
    with pytest.raises(StoreError, match="is damaged"):
        Sae.load(tmp_path)


def test_a_broken_backup_and_foreign_pickles_are_refused(tmp_path: Path) -> None:
    """Oracle: a dict as dictionary_learning writes in mid-training, of a factor that is none, and a pickle
    that calls a function."""
    formats.save(make_sae().parts, "dictionary_learning", tmp_path)
    torch.save({"step": 3, "ae": torch.load(tmp_path / "ae.pt"), "norm_factor": -2.0}, tmp_path / "ae.pt")
    with pytest.raises(StoreError, match=r"mid-training must hold .* above 0, got dict and -2"):
        Sae.load(tmp_path)
    torch.save({"k": Path("x")}, tmp_path / "ae.pt")
    with pytest.raises(StoreError, match="holds no dict of tensors"):
        Sae.load(tmp_path)


def test_outputs_and_hooks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """Oracle: the messages."""
    sae = sae_for(torch.randn(8, 12), 40, 5)
    sae.save(tmp_path / "run" / "a")
    arguments = ("--format", "saelens", "-o", tmp_path / "out")
    with pytest.raises(StoreError, match=r"name one of the SAEs in it: .*run/a$"):
        call("export", tmp_path / "run", *arguments)
    with pytest.raises(StoreError, match="no such folder"):
        call("export", tmp_path / "absent", *arguments)
    with pytest.raises(ConfigError, match="format must be one of sparsify"):
        call("export", tmp_path / "run" / "a", "--format", "onnx", "-o", tmp_path / "out")
    with pytest.raises(ConfigError, match="must be a new or an empty folder"):
        call("export", tmp_path / "run" / "a", "--format", "saelens", "-o", tmp_path / "run")
    with pytest.raises(ConfigError, match="name it with --model"):
        call("export", tmp_path / "run" / "a", *arguments, "--model", "./absent")
    assert not (tmp_path / "out").exists()
    formats.save(sae.parts, "saelens", tmp_path / "z", Hook(1, "resid_post"))
    cfg = json.loads((tmp_path / "z" / "cfg.json").read_text())
    del cfg["metadata"]["saemill"]
    cfg["metadata"]["hook_name"] = "blocks.1.attn.hook_q"
    (tmp_path / "z" / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(ConfigError, match=r"no site of gpt_neox is TransformerLens' blocks.1.attn.hook_q"):
        call("import", tmp_path / "z", "--model", MODEL, "-o", tmp_path / "out")
    sae.save(tmp_path / "z")
    with pytest.raises(StoreError, match="several formats"):
        Sae.load(tmp_path / "z")


def test_a_site_without_a_hook_name_is_told(tmp_path: Path) -> None:
    """Oracle: what is printed, and no hook_name in the file."""
    sae = sae_for(torch.randn(8, 12), 40, 5)
    sae.config.provenance.update(site="layers.1.mlp.dense_h_to_4h")
    try:
        sae.save(tmp_path / "sae")
    finally:
        sae.config.provenance.update(site="layers.2")
    printed = call("export", tmp_path / "sae", "--format", "saelens", "-o", tmp_path / "out")
    assert "TransformerLens has none for layers.1.mlp.dense_h_to_4h of gpt_neox" in printed
    assert "hook_name" not in json.loads((tmp_path / "out" / "cfg.json").read_text())["metadata"]
