"""SAEs with thresholds to and from other tools; the oracle is the tool itself, run in its own environment."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import call
from peers import require_peers, run_in_peers
from saes import check_same, make_sae, make_threshold_sae, ours
from safetensors.torch import load_file, save_file

from saemill import Sae
from saemill.common.errors import ConfigError, StoreError
from saemill.common.sae import formats
from saemill.common.sae.formats import saelens
from saemill.common.sae.formats.folding import gated, non_negative
from saemill.common.sae.parts import BY_THRESHOLD

TOOLS = ("saelens", "dictionary_learning")
WITH_K = {"site": "layers.1", "variant": {"name": "a", "k": 5}}
"""Where BatchTopK's number of active latents is told, which dictionary_learning's classes for it hold."""


def saved(folder: Path, architecture: str, provenance: dict[str, Any] | None = None) -> Sae:
    sae = make_threshold_sae(architecture, provenance=provenance)
    sae.save(folder)
    return sae


def some_activations(folder: Path) -> torch.Tensor:
    x_TD = 2 * torch.randn(200, 12, generator=torch.Generator().manual_seed(0)) + 1
    np.save(folder / "x.npy", x_TD.numpy())
    return x_TD


def encoding(tool: str, folder: Path, x: Path) -> dict[str, Any]:
    return {"do": "encode", "format": tool, "folder": folder, "x": x, "out": f"{folder}.npz"}


def test_exported_saes_compute_the_same_in_each_tool(tmp_path: Path) -> None:
    """Oracle: each tool's own loader, encoder and decoder."""
    require_peers()
    x_TD = some_activations(tmp_path)
    saes = {name: saved(tmp_path / name, name, WITH_K) for name in BY_THRESHOLD}
    saes["batchtopk-of-unknown-k"] = saved(tmp_path / "batchtopk-of-unknown-k", "batchtopk")
    long = replace(make_threshold_sae("relu").parts, W_dec=torch.randn(40, 12))
    saes["relu-of-long-rows"] = Sae.of(long)
    saes["relu-of-long-rows"].save(tmp_path / "relu-of-long-rows")
    jobs = []
    for name in saes:
        for tool in TOOLS:
            folder = tmp_path / f"{name}-{tool}"
            call("export", tmp_path / name, "--format", tool, "-o", folder)
            jobs.append(encoding(tool, folder, tmp_path / "x.npy"))
    run_in_peers(tmp_path, *jobs)
    for name, sae in saes.items():
        for tool in TOOLS:
            check_same(sae, x_TD, tmp_path / f"{name}-{tool}.npz")
    classes = {
        name: json.loads((tmp_path / f"{name}-dictionary_learning/config.json").read_text())["trainer"]
        for name in saes
    }
    assert {name: trainer["dict_class"] for name, trainer in classes.items()} == {
        "batchtopk": "BatchTopKSAE",
        "matryoshka": "MatryoshkaBatchTopKSAE",
        "jumprelu": "JumpReluAutoEncoder",
        "relu": "AutoEncoder",
        "gated": "JumpReluAutoEncoder",
        "batchtopk-of-unknown-k": "JumpReluAutoEncoder",
        "relu-of-long-rows": "JumpReluAutoEncoder",
    }


SHAPE = {"d_in": 12, "d_sae": 40}
SAELENS: dict[str, dict[str, Any]] = {
    "jumprelu": {"architecture": "jumprelu"},
    "jumprelu/not-centred": {"architecture": "jumprelu", "apply_b_dec_to_input": False},
    "jumprelu/training": {"architecture": "jumprelu", "training": True},
    "relu": {"architecture": "standard"},
    "relu/not-centred": {"architecture": "standard", "apply_b_dec_to_input": False},
    "jumprelu/scaled-to-length": {
        "architecture": "jumprelu",
        "normalize_activations": "constant_norm_rescale",
    },
    "relu/layer-normed": {"architecture": "standard", "normalize_activations": "layer_norm"},
    "relu/layer-normed-not-centred": {
        "architecture": "standard",
        "normalize_activations": "layer_norm",
        "apply_b_dec_to_input": False,
    },
    "gated": {"architecture": "gated"},
    "gated/not-centred": {"architecture": "gated", "apply_b_dec_to_input": False},
}
"""SAEs that SAELens saves and loads itself, by what they are here."""
K = {"k": 5.5, "training": True}
SAELENS_IN_TRAINING: dict[str, dict[str, Any]] = {
    "batchtopk": {"architecture": "batchtopk"} | K,
    "batchtopk/not-rescaled": {"architecture": "batchtopk", "rescale_acts_by_decoder_norm": False} | K,
    "matryoshka": {"architecture": "matryoshka_batchtopk", "matryoshka_widths": [10, 25, 40]} | K,
}
"""SAEs that SAELens turns into jumprelu ones when training ends."""
TWO_STEPS = {"threshold_start_step": 0, "lr": 1e-3}
DICTIONARIES: dict[str, dict[str, Any]] = {
    "batchtopk": {"trainer": "batch_top_k.BatchTopKTrainer", "k": 5} | TWO_STEPS,
    "matryoshka": {"trainer": "matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer", "k": 5,
                   "group_fractions": [0.25, 0.25, 0.5]} | TWO_STEPS,
    "jumprelu": {"trainer": "jumprelu.JumpReluTrainer", "sparsity_warmup_steps": 0},
    "relu": {"trainer": "standard.StandardTrainer", "sparsity_warmup_steps": 0},
    "relu/of-long-rows": {"trainer": "standard.StandardTrainerAprilUpdate", "sparsity_warmup_steps": 0},
    "gated": {"trainer": "gdm.GatedSAETrainer", "sparsity_warmup_steps": 0},
}  # fmt: skip


def test_their_saes_compute_the_same_here(tmp_path: Path) -> None:
    """Oracle: the tools' own classes, which make the files: SAELens' with random weights, as it saves a
    finished SAE and a checkpoint; dictionary_learning's as its trainers leave them after two steps."""
    require_peers()
    x_TD = some_activations(tmp_path)
    x = tmp_path / "x.npy"
    jobs: list[dict[str, Any]] = []
    pairs: dict[str, tuple[Path, Path]] = {}
    """What is read here, and the folder whose latents the tool computed, by what it is."""
    for name, job in SAELENS.items():
        folder = tmp_path / "saelens" / name
        jobs += [{"do": "make_saelens", "folder": folder, **SHAPE, **job}, encoding("saelens", folder, x)]
        pairs[f"{name} of saelens"] = folder, folder
    for name, job in SAELENS_IN_TRAINING.items():
        checkpoint, final = tmp_path / "checkpoint" / name, tmp_path / "final" / name
        make = {"do": "make_saelens", **SHAPE, **job}
        jobs += [make | {"folder": checkpoint}, make | {"folder": final, "save": "save_inference_model"}]
        jobs.append(encoding("saelens", final, x))
        pairs[f"{name} of a finished saelens"] = final, final
        pairs[f"{name} of saelens in training"] = checkpoint, final
    for name, job in DICTIONARIES.items():
        parent = tmp_path / "dictionary_learning" / name
        make = {"do": "make_dictionary_learning", "folder": parent, "d_in": 12, "num_latents": 40}
        jobs += [make | job, encoding("dictionary_learning", parent / "trainer_0", x)]
        pairs[f"{name} of dictionary_learning"] = parent / "trainer_0", parent / "trainer_0"
    run_in_peers(tmp_path, *jobs)
    for name, (folder, theirs) in pairs.items():
        sae = Sae.load(folder)
        check_same(sae, x_TD, Path(f"{theirs}.npz"))
        assert sae.config.architecture == name.split()[0].split("/")[0], name
        out = tmp_path / name.replace("/", "-")
        call("import", folder, "-o", out)
        again = Sae.load(out)
        assert again.config == sae.config
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), sae.parameters(), strict=True))
    assert Sae.load(tmp_path / "final/matryoshka").config.prefixes == (10, 25, 40)
    assert Sae.load(tmp_path / "checkpoint/matryoshka").config.prefixes == (10, 25, 40)
    matryoshka = Sae.load(tmp_path / "dictionary_learning/matryoshka/trainer_0").config
    assert (matryoshka.prefixes, matryoshka.provenance["k"]) == ((10, 20, 40), 5)


def test_a_checkpoint_with_its_factor_is_folded(tmp_path: Path) -> None:
    """Oracle: SAELens' own folding of the activations' factor into an SAE of BatchTopK, which it then saves
    as a jumprelu one."""
    require_peers()
    x_TD = some_activations(tmp_path)
    job = {"do": "make_scaled_saelens", "factor": 0.3, "architecture": "batchtopk", "k": 5, **SHAPE}
    places = [
        (tmp_path / f"scaled-{rescaled}", tmp_path / f"folded-{rescaled}", rescaled)
        for rescaled in (True, False)
    ]
    made = [
        job | {"folder": scaled, "folded": folded, "rescale_acts_by_decoder_norm": rescaled}
        for scaled, folded, rescaled in places
    ]
    run_in_peers(
        tmp_path, *made, *(encoding("saelens", folded, tmp_path / "x.npy") for _, folded, _ in places)
    )
    for scaled, folded, _ in places:
        check_same(Sae.load(scaled), x_TD, Path(f"{folded}.npz"))


@pytest.mark.parametrize("is_rescaled", [True, False])
def test_a_checkpoint_with_its_whitening_is_folded(tmp_path: Path, is_rescaled: bool) -> None:
    """Oracle: SAELens' own folding of the whitening."""
    require_peers()
    x_TD = some_activations(tmp_path)
    job = {"do": "make_whitened_saelens", "architecture": "batchtopk", "k": 5, **SHAPE}
    made = job | {"folder": "white", "folded": "folded", "rescale_acts_by_decoder_norm": is_rescaled}
    run_in_peers(tmp_path, made, encoding("saelens", tmp_path / "folded", tmp_path / "x.npy"))
    check_same(Sae.load(tmp_path / "white"), x_TD, tmp_path / "folded.npz")


BACKED_UP = ("AutoEncoder", "GatedAutoEncoder", "JumpReluAutoEncoder")
"""Classes whose SAEs are also read from a backup in mid-training."""


def test_backups_and_the_older_class_of_dictionary_learning_are_read(tmp_path: Path) -> None:
    """Oracle: dictionary_learning's own loader; for a backup the same SAE after its own `scale_biases`."""
    require_peers()
    x_TD = some_activations(tmp_path)
    job = {"do": "make_dictionary", "d_in": 12, "num_latents": 40}
    jobs: list[dict[str, Any]] = []
    for kind in ("AutoEncoderNew", *BACKED_UP):
        jobs.append(job | {"kind": kind, "folder": tmp_path / kind})
        jobs.append(encoding("dictionary_learning", tmp_path / kind, tmp_path / "x.npy"))
    backups = [
        job | {"kind": kind, "folder": tmp_path / f"{kind}-1", "norm_factor": 2.5} for kind in BACKED_UP
    ]
    run_in_peers(tmp_path, *jobs, *backups)
    check_same(Sae.load(tmp_path / "AutoEncoderNew"), x_TD, tmp_path / "AutoEncoderNew.npz")
    for kind in BACKED_UP:
        check_same(Sae.load(tmp_path / f"{kind}-1"), x_TD, tmp_path / f"{kind}.npz")
    checkpoint = tmp_path / "AutoEncoder/checkpoints/ae_200.pt"
    checkpoint.parent.mkdir()
    (tmp_path / "AutoEncoder/ae.pt").rename(checkpoint)
    check_same(Sae.load(checkpoint), x_TD, tmp_path / "AutoEncoder.npz")


OLD = {
    "hook_point": "blocks.1.hook_resid_pre", "d_in": 12, "d_sae": 40, "dtype": "torch.float32",
    "activation_fn_str": "relu", "normalize_activations": False, "model_name": "gpt2-small",
    "context_size": 128, "dataset_path": "text",
}  # fmt: skip
"""A config of SAELens before 6.0, which had no architecture at first."""


def in_logarithms(file: Path) -> None:
    """Thresholds as checkpoints once had them, and factors of 1 on latents, as files had for a while."""
    weights = load_file(file)
    weights |= {"log_threshold": weights.pop("threshold").log(), "scaling_factor": torch.ones(40)}
    save_file(weights, file)


def test_older_configs_of_saelens_are_read_alike(tmp_path: Path) -> None:
    """Oracle: SAELens' own reading of a config of before 6.0; of the same thresholds for their logarithms,
    which its class in training alone still reads."""
    require_peers()
    x_TD = some_activations(tmp_path)
    places = {
        "first": ("relu", {}),
        "standard": ("relu", {"architecture": "standard", "apply_b_dec_to_input": False}),
        "jumprelu": ("jumprelu", {"architecture": "jumprelu"}),
    }
    for name, (architecture, more) in places.items():
        formats.save(make_threshold_sae(architecture).parts, "saelens", tmp_path / name)
        (tmp_path / name / "cfg.json").write_text(json.dumps(OLD | more))
    run_in_peers(tmp_path, *(encoding("saelens", tmp_path / name, tmp_path / "x.npy") for name in places))
    for name, (architecture, _) in places.items():
        sae = Sae.load(tmp_path / name)
        check_same(sae, x_TD, tmp_path / f"{name}.npz")
        assert sae.config.architecture == architecture
        assert sae.config.provenance["hook_name"] == "blocks.1.hook_resid_pre"
    in_logarithms(tmp_path / "jumprelu" / saelens.WEIGHTS)
    check_same(Sae.load(tmp_path / "jumprelu"), x_TD, tmp_path / "jumprelu.npz")


def test_sparsify_does_not_load_an_sae_with_thresholds(tmp_path: Path) -> None:
    """Oracle: sparsify's own loader, which names the activation; and the message of an export."""
    require_peers()
    some_activations(tmp_path)
    saved(tmp_path / "sae", "jumprelu")
    with pytest.raises(AssertionError, match=r"Expected one of \('groupmax', 'topk'\).*got jumprelu"):
        run_in_peers(tmp_path, encoding("sparsify", tmp_path / "sae", tmp_path / "x.npy"))
    with pytest.raises(ConfigError, match="sparsify has SAEs with k alone, got a jumprelu SAE"):
        call("export", tmp_path / "sae", "--format", "sparsify", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", BY_THRESHOLD)
@pytest.mark.parametrize("tool", TOOLS)
def test_export_and_import_give_the_same_sae(tmp_path: Path, tool: str, name: str) -> None:
    """Oracle: the SAE that was exported, with its provenance: bit by bit, but for the bias of the class that
    does not subtract b_dec."""
    sae = saved(tmp_path / "sae", name, WITH_K)
    call("export", tmp_path / "sae", "--format", tool, "-o", tmp_path / "there")
    call("import", tmp_path / "there", "-o", tmp_path / "back")
    back = Sae.load(tmp_path / "back")
    assert back.config == sae.config
    for of, tensor in sae.parts.weights.items():
        if tool == "dictionary_learning" and name in ("jumprelu", "gated") and of == "b_enc":
            torch.testing.assert_close(back.parts.weights[of], tensor)
        else:
            assert torch.equal(back.parts.weights[of], tensor), of


@pytest.mark.parametrize("tool", formats.NAMES)
def test_what_a_tool_has_no_word_for_goes_along(tmp_path: Path, tool: str) -> None:
    """Oracle: the SAE that was exported: prefixes and several k of a TopK SAE."""
    parts = make_sae().parts
    config = replace(parts.config, architecture="matryoshka", prefixes=(20, 40), ks=(2, 5))
    Sae.of(replace(parts, config=config)).save(tmp_path / "sae")
    call("export", tmp_path / "sae", "--format", tool, "-o", tmp_path / "there")
    assert Sae.load(tmp_path / "there").config == config


def test_a_gate_is_a_threshold() -> None:
    """Oracle: the definition of a Gated SAE, in float64: f = 1[π > 0] · ReLU(m)."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    W_enc, b_gate, b_mag, r_mag, x_TD = drawn(40, 12), drawn(40), drawn(40), drawn(40), drawn(500, 12)
    u_TF = x_TD @ W_enc.T
    wanted = (u_TF + b_gate > 0) * (u_TF * r_mag.exp() + b_mag).relu()
    W, b, threshold = gated(W_enc, b_gate, b_mag, r_mag)
    z_TF = x_TD @ W.T + b
    found = z_TF * (z_TF > threshold.clamp(min=0))
    torch.testing.assert_close(found, wanted)
    assert 0 < (wanted > 0).double().mean() < 1
    assert (threshold < 0).any()
    assert torch.equal(non_negative(threshold), threshold.clamp(min=0).float())


def changed(folder: Path, **changes: Any) -> None:
    """Change fields of a config, or tensors; None takes a tensor away."""
    config = next(file for file in (folder / "config.json", folder / "cfg.json") if file.exists())
    weights = next(file for file in (folder / "ae.pt", folder / "sae_weights.safetensors") if file.exists())
    whole = json.loads(config.read_text())
    tensors = torch.load(weights) if weights.suffix == ".pt" else load_file(weights)
    for name, value in changes.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif value is None:
            del tensors[name]
        else:
            whole.get("trainer", whole)[name] = value
    config.write_text(json.dumps(whole))
    torch.save(tensors, weights) if weights.suffix == ".pt" else save_file(tensors, weights)


@pytest.mark.parametrize(
    ("tool", "architecture", "changes", "message"),
    [
        ("saelens", "jumprelu", {"threshold": torch.zeros(39)}, r"threshold must be \(40,\).* got \(39,\)"),
        ("saelens", "jumprelu", {"threshold": None}, r"threshold must be \(40,\).* got nothing"),
        ("saelens", "jumprelu", {"architecture": "standard"}, "threshold must be absent from an SAE"),
        ("saelens", "jumprelu", {"architecture": "gated"}, r"b_gate must be \(40,\) .* got nothing"),
        ("saelens", "jumprelu", {"architecture": "batchtopk", "threshold": None}, "topk_threshold must be"),
        ("saelens", "jumprelu", {"threshold": torch.full((40,), torch.nan)}, "40 values of threshold are"),
        ("saelens", "relu", {"log_threshold": torch.zeros(40)}, "log_threshold must be absent"),
        ("dictionary_learning", "batchtopk", {"threshold": torch.tensor(-1.0)}, "got -1, which means unset"),
        ("dictionary_learning", "batchtopk", {"k": 7}, "k must be 7 by the config beside it, got 5"),
        ("dictionary_learning", "batchtopk", {"threshold": torch.zeros(40)}, r"threshold must be \(\)"),
        ("dictionary_learning", "jumprelu", {"threshold": torch.tensor(1.0)}, r"threshold must be \(40,\)"),
        ("dictionary_learning", "matryoshka", {"group_sizes": torch.tensor([20, 19])}, "and 40 in sum"),
        ("dictionary_learning", "matryoshka", {"group_sizes": torch.tensor([0, 40])}, "must be positive"),
        ("dictionary_learning", "matryoshka", {"group_sizes": torch.ones(40)}, "must be whole numbers"),
        ("dictionary_learning", "relu", {"dict_class": "GatedAutoEncoder"}, "mag_bias must be"),
        ("dictionary_learning", "relu", {"dict_class": "JumpReluAutoEncoder"}, r"W_enc must be \(12, 40\)"),
    ],
)  # fmt: skip
def test_what_has_no_place_is_refused(
    tmp_path: Path, tool: str, architecture: str, changes: dict[str, Any], message: str
) -> None:
    """Oracle: the message names the field or the tensor."""
    formats.save(make_threshold_sae(architecture, provenance=WITH_K).parts, tool, tmp_path)
    Sae.load(tmp_path)
    changed(tmp_path, **changes)
    with pytest.raises((ConfigError, StoreError), match=message):
        Sae.load(tmp_path)


@pytest.mark.parametrize("tool", TOOLS)
def test_a_negative_threshold_of_theirs_is_zero(tmp_path: Path, tool: str) -> None:
    """Oracle: the tool, which has a ReLU beside the threshold."""
    require_peers()
    x_TD = some_activations(tmp_path)
    formats.save(make_threshold_sae(provenance=WITH_K).parts, tool, tmp_path / "sae")
    changed(tmp_path / "sae", threshold=torch.linspace(-2, 2, 40))
    run_in_peers(tmp_path, encoding(tool, tmp_path / "sae", tmp_path / "x.npy"))
    sae = Sae.load(tmp_path / "sae")
    assert sae.threshold is not None
    assert int((sae.threshold == 0).sum()) == 20
    check_same(sae, x_TD, tmp_path / "sae.npz")
    assert (ours(sae, x_TD)[0][:, :20] > 0).any()
