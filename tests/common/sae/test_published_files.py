"""Files of published SAEs: what is computed where no peer can be asked, what is refused, and the hub."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import call
from hub import Hub, take_for_the_hub
from published import (
    ATTENTION,
    GEMMA,
    LAYER,
    QWEN,
    D,
    F,
    layers,
    make_gemma_scope,
    make_gemma_scope_2,
    make_llama_scope,
    save_pickle,
    some,
    weights,
)
from saes import ROUNDING, make_sae, make_threshold_sae, ours
from safetensors.torch import load_file, save_file
from torch import Tensor

from saemill import Sae
from saemill.common.errors import ConfigError, StoreError
from saemill.common.sae import formats
from saemill.common.sae.norms import NORMS
from saemill.show import describe

X = 2 * some(50, D, scale=1.0) + 1
HOOKS = ("blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out")


def same(sae: Sae, latents: Tensor, output: Tensor, factor: Tensor | float = 1.0) -> None:
    """Compare codes, of which ours are as many times as large, and reconstructions."""
    codes, reconstruction = ours(sae, X)
    torch.testing.assert_close(codes, latents * factor, **ROUNDING)
    torch.testing.assert_close(reconstruction, output, **ROUNDING)
    assert (latents > 0).sum() > len(X)


def topk(pre: Tensor, k: int) -> Tensor:
    return torch.zeros_like(pre).scatter(1, pre.topk(k).indices, pre.topk(k).values.relu())


OWN = {
    "sae_type": "sae", "d_model": D, "expansion_factor": F / D, "use_decoder_bias": True, "top_k": 5,
    "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True, "hook_point_in": HOOKS[0],
    "hook_point_out": HOOKS[1], "use_glu_encoder": False, "act_fn": "topk",
}  # fmt: skip
"""A config of Llamascopium's, a transcoder."""


def make_llamascopium(folder: Path, **changes: Any) -> None:
    folder.mkdir(parents=True)
    cfg = OWN | changes
    (folder / "config.json").write_text(json.dumps(cfg))
    own = weights()
    tensors = {"W_E": own["W_enc"], "b_E": own["b_enc"], "W_D": own["W_dec"], "b_D": own["b_dec"]}
    if cfg["act_fn"] == "jumprelu":
        tensors["activation_function.log_jumprelu_threshold"] = own["threshold"]
    norms = {
        f"dataset_average_activation_norm.{hook}": torch.tensor(n)
        for hook, n in zip(HOOKS, (2.0, 5.0), strict=True)
    }
    save_file(tensors | norms, folder / "sae_weights.safetensors")


@pytest.mark.parametrize("rule", ["topk", "jumprelu", "relu"])
@pytest.mark.parametrize("norm", ["dataset-wise", "inference", "token-wise"])
@pytest.mark.parametrize("by_length", [True, False])
def test_llamascopium_saes_compute_what_its_code_does(
    tmp_path: Path, rule: str, norm: str, by_length: bool
) -> None:
    """Oracle: Llamascopium's formula (2.0.0b34, `sae.py`): latents are chosen by activation × length of the
    decoder row, of activations times √D over a norm; the output is divided by its own."""
    out = HOOKS[0] if norm == "token-wise" else HOOKS[1]
    make_llamascopium(
        tmp_path / "sae", act_fn=rule, norm_activation=norm, sparsity_include_decoder_norm=by_length,
        hook_point_out=out,
    )  # fmt: skip
    factor = {"dataset-wise": (D**0.5 / 2, D**0.5 / 5), "inference": (1, 1)}.get(norm)
    scale, scale_out = factor or 2 * (D**0.5 / X.norm(dim=1, keepdim=True),)
    own = weights()
    lengths = own["W_dec"].norm(dim=1) if by_length else torch.ones(F)
    pre = (X * scale) @ own["W_enc"] + own["b_enc"]
    gated = pre * lengths
    latents = {
        "topk": topk(gated, 5),
        "jumprelu": gated * (gated > own["threshold"].exp()),
        "relu": gated.relu(),
    }[rule] / lengths
    output = (latents @ own["W_dec"] + own["b_dec"]) / scale_out
    sae = Sae.load(tmp_path / "sae")
    same(sae, latents, output, lengths if rule == "topk" else 1.0)
    assert sae.is_transcoder == (norm != "token-wise")
    assert sae.config.provenance["hook_name"] == HOOKS[0]


def make_openai(file: Path, activation: str, **more: Any) -> dict[str, Tensor]:
    own = weights()
    tensors = {
        "pre_bias": own["b_dec"], "latent_bias": own["b_enc"], "encoder.weight": own["W_enc"].T.contiguous(),
        "decoder.weight": own["W_dec"].T.contiguous(), "stats_last_nonzero": torch.ones(F, dtype=torch.int64),
        "latents_activation_frequency": torch.ones(F), "latents_mean_square": torch.ones(F),
    }  # fmt: skip
    state = {"k": 5, "postact_fn": "ReLU"} if activation == "TopK" else {}
    save_pickle(file, tensors | {"activation": activation, "activation_state_dict": state} | more)
    return own


@pytest.mark.parametrize("activation", ["TopK", "ReLU"])
def test_openai_autoencoders_compute_what_its_code_does(tmp_path: Path, activation: str) -> None:
    """Oracle: the formula of OpenAI's `model.py`; with TopK a layer norm before, and back after it."""
    file = tmp_path / "gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt"
    own = make_openai(file, activation)
    mean, std = X.mean(1, keepdim=True), X.std(1, keepdim=True)
    normed = (X - mean) / (std + 1e-5) if activation == "TopK" else X
    pre = (normed - own["b_dec"]) @ own["W_enc"] + own["b_enc"]
    latents = topk(pre, 5) if activation == "TopK" else pre.relu()
    output = latents @ own["W_dec"] + own["b_dec"]
    sae = Sae.load(file)
    same(sae, latents, output * std + mean if activation == "TopK" else output)
    known = sae.config.provenance
    assert (known["model"], known["hook_name"]) == ("gpt2", "blocks.8.hook_resid_post")
    sae.save(tmp_path / "saved")
    assert Sae.load(tmp_path / "saved").config == sae.config
    same(Sae.load(tmp_path / "saved"), *ours(sae, X))
    assert ("inputs normed (layer_norm)" in describe(file)) == (activation == "TopK")


def of_norm(norm: str, architecture: str = "") -> Sae:
    parts = (make_threshold_sae(architecture) if architecture else make_sae()).parts
    return Sae.of(replace(parts, config=replace(parts.config, norm=norm)))


@pytest.mark.parametrize("norm", NORMS)
def test_an_sae_with_a_norm_goes_to_saelens_alone(tmp_path: Path, norm: str) -> None:
    """Oracle: the SAE that was exported, bit by bit; and the messages. (SAELens' own SAEs of each norm are in
    test_other_formats.py.)"""
    sae = of_norm(norm, "jumprelu")
    sae.save(tmp_path / "sae")
    call("export", tmp_path / "sae", "--format", "saelens", "-o", tmp_path / "there")
    call("import", tmp_path / "there", "-o", tmp_path / "back")
    assert (tmp_path / "back/cfg.json").read_bytes() == (tmp_path / "sae/cfg.json").read_bytes()
    for tool in ("sparsify", "dictionary_learning"):
        with pytest.raises(ConfigError, match=f"{tool} cannot say that activations go through a norm"):
            call("export", tmp_path / "sae", "--format", tool, "-o", tmp_path / "out")
    with pytest.raises(ConfigError, match="an SAE with a norm decodes with its input"):
        sae.decode(*sae.encode(X))
    of_norm(norm).save(tmp_path / "topk")  # its name is what sparsify refuses, as it does that of thresholds
    assert json.loads((tmp_path / "topk/cfg.json").read_text())["activation"] == f"{norm} topk"
    with pytest.raises(ConfigError, match="norm must be one of"):
        of_norm("batch_norm")


def test_a_vector_of_zeros_has_no_direction() -> None:
    """Oracle: nothing is divided by 0, in either norm."""
    for norm in NORMS:
        assert of_norm(norm)(torch.zeros(3, D)).reconstruction.isfinite().all()


def test_heads_side_by_side_are_one_vector(tmp_path: Path) -> None:
    """Oracle: the same files without `reshape_activations`, which is how SAELens is called; and one
    head of several, which is no site."""
    formats.save(make_threshold_sae("relu").parts, "saelens", tmp_path)
    plain = Sae.load(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    metadata = {"hook_name": "blocks.1.attn.hook_z", "sae_lens_version": "6.0.0"}
    (tmp_path / "cfg.json").write_text(
        json.dumps(cfg | {"reshape_activations": "hook_z", "metadata": metadata})
    )
    sae = Sae.load(tmp_path)
    assert torch.equal(sae.W_enc, plain.W_enc)
    assert sae.config.provenance["hook_name"] == "blocks.1.attn.hook_z"
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"metadata": metadata | {"hook_head_index": 3}}))
    assert Sae.load(tmp_path).config.provenance["hook_name"] == "blocks.1.attn.hook_z[3]"


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the tensors, or the settings, of a file."""
    if file.suffix == ".npz":
        content = dict(np.load(file))
        np.savez(file, **(change(content) or content))
    elif file.suffix == ".json":
        content = json.loads(file.read_text())
        file.write_text(json.dumps(change(content) or content))
    else:
        load, save = (load_file, save_file) if file.suffix == ".safetensors" else (torch.load, torch.save)
        content = load(file)
        save(change(content) or content, file)


def made(root: Path) -> dict[str, tuple[Path, Path]]:
    """One SAE of each format: what is loaded, and its file of weights."""
    gemma, second = root / f"{GEMMA}-res" / LAYER, root / "gemma-scope-2-1b-pt/resid_post/layer_3_width_16k"
    make_gemma_scope(gemma)
    make_gemma_scope_2(second, None)
    llama, scopium = root / "Llama3_1-8B-Base-L15R-8x", root / "scopium"
    make_llama_scope(llama)
    make_llamascopium(scopium)
    own = weights()
    del own["threshold"]
    openai, linear = root / "8.pt", root / "a-SAE-l3.pt"
    qwen, heads = root / QWEN / "layer7.sae.pt", root / ATTENTION
    make_openai(openai, "TopK")
    save_pickle(linear, layers(own["W_dec"]))
    save_pickle(qwen, own | {name: own[name].T.contiguous() for name in ("W_enc", "W_dec")})
    save_pickle(heads, own)
    cfg = {"act_size": D, "dict_size": F, "act_name": "blocks.3.attn.hook_z"}
    heads.with_name(heads.name.replace(".pt", "_cfg.json")).write_text(json.dumps(cfg))
    return {
        "gemma-scope": (gemma, gemma / "params.npz"),
        "gemma-scope-2": (second, second / "params.safetensors"),
        "llama-scope": (llama, llama / "checkpoints/final.safetensors"),
        "llamascopium": (scopium, scopium / "sae_weights.safetensors"),
        "openai": (openai, openai), "linear-layers": (linear, linear), "qwen-scope": (qwen, qwen),
        "attention-z": (heads, heads),
    }  # fmt: skip


KINDS = ("gemma-scope", "gemma-scope-2", "llama-scope", "llamascopium", "openai", "linear-layers",
         "qwen-scope", "attention-z")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_told(tmp_path: Path, kind: str) -> None:
    """Oracle: the messages: of a file that is cut off, of a tensor with a NaN, of another shape, missing, of
    whole numbers, and of one too many."""
    place, file = made(tmp_path)[kind]
    whole = file.read_bytes()
    Sae.load(place)
    name = next(name for name, w in _tensors(file).items() if len(w.shape) == 2)

    def changed(tensor: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda content: content | {name: tensor(content[name])}

    cases: dict[str, Callable[[dict[str, Any]], Any]] = {
        "NaN or infinite": changed(lambda w: w * float("nan")),
        "must be .*got": changed(
            lambda w: w[:, :-1].copy() if isinstance(w, np.ndarray) else w[:, :-1].clone()
        ),
        "must (be|hold) .*got|the names of no format": lambda content: {
            key: w for key, w in content.items() if key != name
        },
        "floating-point numbers, got": changed(lambda w: (w > 0) * 1),
    }
    for message, change in cases.items():
        edit(file, change)
        with pytest.raises((StoreError, ConfigError), match=message):
            Sae.load(place)
        file.write_bytes(whole)
    for length in (0, 30, len(whole) // 2, len(whole) - 30):
        file.write_bytes(whole[:length])
        with pytest.raises(StoreError, match=r"damaged|holds no dict of tensors|holds no SAE"):
            Sae.load(place)
    file.write_bytes(whole)
    if kind not in ("linear-layers",):  # which is told by its tensors' names alone
        edit(file, lambda content: content | {"W_more": content[name] * 1})
        with pytest.raises(ConfigError, match="W_more must be absent"):
            Sae.load(place)


def _tensors(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    edit(file, lambda content: found.update({n: w for n, w in content.items() if hasattr(w, "shape")}))
    return found


REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("llamascopium", "config.json", {"sae_type": "lorsa"}, "sae_type must be 'sae', got 'lorsa'"),
    ("llamascopium", "config.json", {"sae_type": "molt"}, "sae_type must be 'sae', got 'molt'"),
    ("llamascopium", "config.json", {"use_glu_encoder": True}, r"sigmoid \(GLU\)"),
    ("llamascopium", "config.json", {"act_fn": "batchtopk"}, "act_fn must be one of .*got 'batchtopk'"),
    ("llamascopium", "config.json", {"norm_activation": "batch-wise"}, "got 'batch-wise'"),
    ("llamascopium", "config.json", {"norm_activation": "token-wise"}, "'token-wise' of a transcoder"),
    ("llamascopium", "config.json", {"expansion_factor": "4"}, "expansion_factor must be a number above 0"),
    ("llamascopium", "config.json", {"hook_point_in": "other"}, "of other must be a number above 0"),
    ("llama-scope", "hyperparams.json", {"jump_relu_threshold": -1}, "jump_relu_threshold must be a number"),
    ("llama-scope", "hyperparams.json", {"apply_decoder_bias_to_pre_encoder": True}, "must be False, got"),
    ("gemma-scope", "params.npz", {"scaling_factor": np.full(F, 2.0)}, "scaling_factor must be 1"),
    ("gemma-scope-2", "params.safetensors", {"w_dec": torch.ones(F, 3, D)}, "a cross-layer transcoder or a"),
    ("gemma-scope-2", "config.json", {"architecture": "topk"}, "must be 'jump_relu', got 'topk'"),
    ("openai", "", {"activation": "Identity"}, "activation must be one of TopK, ReLU, got 'Identity'"),
    ("openai", "", {"activation_state_dict": {"k": 5, "postact_fn": "Identity"}}, "postact_fn must be one"),
    ("openai", "", {"activation_state_dict": {"postact_fn": "ReLU"}}, "k must be a whole number"),
    ("attention-z", "_cfg.json", {"dict_size": 41}, r"W_enc must be \(12, 41\)"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "changes", "message"), REFUSED)
def test_what_has_no_place_in_an_sae_is_refused(
    tmp_path: Path, kind: str, name: str, changes: dict[str, Any], message: str
) -> None:
    """Oracle: the message names the field or the tensor."""
    place, _ = made(tmp_path)[kind]
    file = place / name if place.is_dir() else place.with_name(place.name.replace(".pt", name or ".pt"))
    if name == "config.json" and not file.exists():
        file.write_text("{}")
    edit(file, lambda content: content | changes)
    with pytest.raises((ConfigError, StoreError), match=message):
        Sae.load(place)


def test_what_no_file_tells_is_asked_for(tmp_path: Path) -> None:
    """Oracle: the messages, whose advice works; what a path does not tell is not known."""
    place, _ = made(tmp_path)["qwen-scope"]
    moved = place.rename(tmp_path / place.name)
    with pytest.raises(ConfigError, match="k is in the name of its repository alone; put the file into"):
        Sae.load(moved)
    make_gemma_scope(tmp_path / f"{GEMMA}-res/embedding/width_4k/average_l0_6")
    with pytest.raises(ConfigError, match="an SAE of embeddings"):
        Sae.load(tmp_path / f"{GEMMA}-res/embedding/width_4k/average_l0_6")
    make_gemma_scope(tmp_path / "elsewhere")
    assert "hook_name" not in Sae.load(tmp_path / "elsewhere").config.provenance
    with pytest.raises(StoreError, match=r"holds no SAE: name one of the SAEs in it: .*8\.pt|params|L15R"):
        Sae.load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        StoreError, match=r"there is no sae\.safetensors, sae_weights\..*params\.npz.*\.pth of a"
    ):
        Sae.load(tmp_path / "empty")


def test_a_format_is_chosen_by_name(tmp_path: Path) -> None:
    """Oracle: the SAE of each of two formats in one folder."""
    make_gemma_scope(tmp_path / "both")
    make_sae().save(tmp_path / "both")
    with pytest.raises(StoreError, match="several formats, sparsify and gemma-scope; name one with --format"):
        call("import", tmp_path / "both", "-o", tmp_path / "out")
    call("import", tmp_path / "both", "--format", "gemma-scope", "-o", tmp_path / "out")
    assert Sae.load(tmp_path / "out").config.architecture == "jumprelu"
    assert torch.equal(Sae.load(tmp_path / "both", format="sparsify").W_enc, make_sae().W_enc)
    with pytest.raises(StoreError, match=r"holds no SAE: config\.json is missing"):
        call("import", tmp_path / "both", "--format", "llama-scope", "-o", tmp_path / "other")
    with pytest.raises(ConfigError, match=r"format must be one of sparsify, saelens, .*got 'gemma'"):
        call("import", tmp_path / "both", "--format", "gemma", "-o", tmp_path / "other")


def test_published_saes_are_had_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the same files on this machine; and what the hub was asked for, no file more."""
    places = made(tmp_path / "files")
    with Hub() as hub:
        take_for_the_hub(hub, tmp_path / "home", monkeypatch)
        gemma, second = places["gemma-scope"][1], places["gemma-scope-2"][1]
        hub.put(f"{GEMMA}-res", {f"{LAYER}/params.npz": gemma.read_bytes(), "layer_3/params.npz": b"other"})
        at = "resid_post/layer_3_width_16k"
        files = {f"{at}/params.safetensors": second.read_bytes(), f"{at}/examples.safetensors": b"large"}
        hub.put("google/gemma-scope-2-1b-pt", files)
        hub.put_folder("fnlp/L", places["llama-scope"][0].parent)
        wanted = {
            f"hf://{GEMMA}-res/{LAYER}": "gemma-scope",
            "hf://google/gemma-scope-2-1b-pt": "gemma-scope-2",
            "hf://fnlp/L/Llama3_1-8B-Base-L15R-8x": "llama-scope",
            "hf://fnlp/L/8.pt": "openai",
            f"hf://fnlp/L/{ATTENTION}": "attention-z",
        }
        for address, kind in wanted.items():
            there, here = Sae.load(address), Sae.load(places[kind][0])
            assert torch.equal(there.W_enc, here.W_enc), address
            for key in ("model", "hook_name"):
                assert there.config.provenance.get(key) == here.config.provenance.get(key), address
        names = {Path(name).name for name in hub.downloaded()}
        assert names == {"params.npz", "params.safetensors", "hyperparams.json", "final.safetensors", "8.pt",
                         ATTENTION, ATTENTION.replace(".pt", "_cfg.json")}  # fmt: skip
