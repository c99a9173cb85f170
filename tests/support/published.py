"""Published SAEs as small files in their layouts, with random weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D, F = 12, 40


def some(*shape: int, seed: int = 0, scale: float = 0.5) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def of_unit_rows(rows: int, width: int) -> Tensor:
    """Rows of unit length, for which `sparsity_include_decoder_norm`, disregarded by SAELens, is nothing."""
    return torch.nn.functional.normalize(some(rows, width, seed=3), dim=1)


def weights(d: int = D, e: int = D) -> dict[str, Tensor]:
    """Of the names that most have; thresholds of both sides of 0."""
    return {
        "W_enc": some(d, F),
        "b_enc": some(F, seed=1),
        "W_dec": some(F, e, seed=2),
        "b_dec": some(e, seed=3),
        "threshold": some(F, seed=4, scale=1.0),
    }


def make_gemma_scope(folder: Path, own: dict[str, Tensor] | None = None) -> None:
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: w.numpy() for name, w in (own or weights()).items()})


def make_gemma_scope_2(
    folder: Path, cfg: dict[str, Any] | None, e: int = D, *, has_skip: bool = False
) -> None:
    folder.mkdir(parents=True)
    own = {name.lower(): w for name, w in weights(e=e).items()}
    own |= {"affine_skip_connection": some(D, e, seed=9)} if has_skip else {}
    save_file(own, folder / "params.safetensors")
    if cfg is not None:
        (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", **cfg}))


HYPERPARAMS = {
    "hook_point_in": "blocks.15.hook_resid_post", "hook_point_out": "blocks.15.hook_resid_post",
    "use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False, "expansion_factor": 4, "d_model": D,
    "d_sae": F, "act_fn": "jumprelu", "jump_relu_threshold": 0.33, "norm_activation": "dataset-wise",
    "dataset_average_activation_norm": {"in": 1.7, "out": 1.7}, "sparsity_include_decoder_norm": True,
    "use_glu_encoder": False, "top_k": 50,
}  # fmt: skip
"""Of a Llama Scope SAE of 2024, but for sizes and fields of training."""


def layers(
    decoder: Tensor, encoder_name: str = "encoder", decoder_name: str = "decoder"
) -> dict[str, Tensor]:
    own = weights()
    return {
        f"{encoder_name}.weight": own["W_enc"].T.contiguous(),
        f"{encoder_name}.bias": own["b_enc"],
        f"{decoder_name}.weight": decoder.T.contiguous(),
        f"{decoder_name}.bias": own["b_dec"],
    }


def make_llama_scope(folder: Path) -> None:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "hyperparams.json").write_text(json.dumps(HYPERPARAMS))
    save_file(layers(of_unit_rows(F, D)), folder / "checkpoints/final.safetensors")


def make_llama_scope_r1(folder: Path) -> None:
    folder.mkdir(parents=True)
    hook = "blocks.3.hook_resid_post"
    cfg = HYPERPARAMS | {"hook_point_in": hook, "hook_point_out": hook, "expansion_factor": F / D}
    for name in ("d_sae", "jump_relu_threshold", "dataset_average_activation_norm"):
        del cfg[name]
    (folder / "config.json").write_text(json.dumps(cfg))
    own = layers(of_unit_rows(F, D)) | {"log_jumprelu_threshold": some(F, seed=5)}
    own[f"dataset_average_activation_norm.{hook}"] = torch.tensor(2.5)
    save_file(own, folder / "sae_weights.safetensors")


def save_pickle(file: Path, own: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(own, file)


GEMMA = "google/gemma-scope-2b-pt"
SIZES = {"d_in": D, "d_sae": F}
LAYER = "layer_20/width_16k/average_l0_71"
QWEN = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_5"
"""With a k that is less than the number of latents here."""
ATTENTION = "gpt2-small_L3_Hcat_z.pt"
CASES: dict[str, dict[str, Any]] = {
    f"{GEMMA}-res/{LAYER}": {"loader": "gemma_2"} | SIZES,
    f"{GEMMA}-mlp/{LAYER}": {"loader": "gemma_2"} | SIZES,
    f"{GEMMA}-att/{LAYER}": {"loader": "gemma_2", "reshape_activations": "hook_z", "n_heads": 3} | SIZES,
    f"{GEMMA}-transcoders/{LAYER}": {"loader": "gemma_2_transcoder", "d_out": D} | SIZES,
    "google/gemma-scope-2-4b-pt/resid_post/layer_17_width_16k_l0_big": {"loader": "gemma_3"},
    "google/gemma-scope-2-270m-pt/attn_out_all/layer_5_width_16k_l0_big": {
        "loader": "gemma_3", "reshape_activations": "hook_z", "n_heads": 3},
    "google/gemma-scope-2-4b-it/transcoder_all/layer_5_width_16k_l0_big_affine": {"loader": "gemma_3"},
    "google/gemma-scope-2-4b-it/transcoder_all/layer_5_width_16k_l0_big": {"loader": "gemma_3"},
    "fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L15R-8x": {
        "loader": "llama_scope", "factor": D**0.5 / 1.7},
    "fnlp/Llama-Scope-R1-Distill/0-Slimpajama/L3R": {
        "loader": "llama_scope_r1_distill", "factor": D**0.5 / 2.5, "d_sae": F},
    f"{QWEN}/layer7.sae.pt": {"loader": "qwen_scope"} | SIZES,
    "Goodfire/Llama-3.1-8B-Instruct-SAE-l19/Llama-3.1-8B-Instruct-SAE-l19.pth": {
        "loader": "goodfire"} | SIZES,
    "qresearch/R1-SAE/DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt": {"loader": "deepseek_r1"} | SIZES,
    "mwhanna/qwen3-14b-transcoders/layer_3.safetensors": {"loader": "mwhanna_transcoder"},
    f"ckkissane/attn-saes/{ATTENTION}": {"loader": "connor_rob_hook_z", "n_heads": 3},
}  # fmt: skip
"""Places in repositories, and how SAELens is asked for what is there. It takes sizes from names, but ours are
small."""


def make_all(root: Path) -> None:
    """Make what is at each place of `CASES`."""
    for kind in ("res", "mlp", "att", "transcoders"):
        make_gemma_scope(root / f"{GEMMA}-{kind}" / LAYER)
    point = "model.layers.17.output"
    cfg = {"model_name": "google/gemma-3-4b-pt", "hf_hook_point_in": point, "hf_hook_point_out": point}
    places = [root / place for place in CASES if "gemma-scope-2-" in place]
    make_gemma_scope_2(places[0], cfg | {"l0": 20, "affine_connection": False, "type": "sae"})
    make_gemma_scope_2(places[1], None)
    norm, mlp = (f"model.layers.5.{end}_feedforward_layernorm.output" for end in ("pre", "post"))
    cfg = {"model_name": "gemma-v3-4b-it", "hf_hook_point_in": norm, "hf_hook_point_out": mlp}
    make_gemma_scope_2(places[2], cfg | {"affine_connection": True}, 7, has_skip=True)
    make_gemma_scope_2(places[3], None, 7)
    make_llama_scope(root / "fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L15R-8x")
    make_llama_scope_r1(root / "fnlp/Llama-Scope-R1-Distill/0-Slimpajama/L3R")
    own = weights()
    del own["threshold"]
    save_pickle(
        root / f"{QWEN}/layer7.sae.pt", own | {name: own[name].T.contiguous() for name in ("W_enc", "W_dec")}
    )
    files = [root / place for place in CASES if place.endswith(("l19.pth", "l19.pt"))]
    save_pickle(files[0], layers(own["W_dec"], "encoder_linear", "decoder_linear"))
    save_pickle(files[1], layers(own["W_dec"]))
    save_pickle(root / "ckkissane/attn-saes" / ATTENTION, own)
    rows = root / "mwhanna/qwen3-14b-transcoders"
    rows.mkdir(parents=True)
    save_file(own | {"W_enc": own["W_enc"].T.contiguous()}, rows / "layer_3.safetensors")
    (rows / "wanb-config.yaml").write_text(
        "d_model: {value: 12}\nd_feature: {value: 40}\nbatch_size: {value: 64}\n"
    )
    cfg = {"act_size": D, "dict_size": F, "act_name": "blocks.3.attn.hook_z"}
    (root / "ckkissane/attn-saes" / ATTENTION.replace(".pt", "_cfg.json")).write_text(json.dumps(cfg))
