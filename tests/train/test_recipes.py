"""Runs with optimizers and averages other than the default: resumed, exported, refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from steps import make_bank, planted
from training import config, files, killed_at

from saemill.common.errors import ConfigError
from saemill.common.sae.sae import Sae
from saemill.common.stores.activations import ActivationStore
from saemill.train.config import ADAM_BETAS
from saemill.train.learner.learner import Learner
from saemill.train.run import run
from saemill.train.sweep.variant import Variant
from saemill.train.sweep.variants import resolve

SIGNUM: dict[str, Any] = {"optimizer": "signum", "lr": (1e-2,)}
MUON: dict[str, Any] = {"optimizer": "muon", "lr": (1e-2,)}
RESAMPLED: dict[str, Any] = {
    "architecture": ("relu",), "k": (), "num_latents": (48,), "lr": (3e-2,), "l1_coefficient": (3.0,),
    "penalty_warmup_steps": 0, "dead_after_tokens": 256, "resample_at": (6, 12),
}  # fmt: skip
"""In torch with Adam 31 latents begin again at step 6, and 10 at step 12."""
RECIPES: dict[str, dict[str, Any]] = {
    "signum": SIGNUM,
    "muon, average": MUON | {"weight_average": 0.9},
    "adam, average, cosine": {"weight_average": 0.9, "lr_schedule": "cosine"},
    "jumprelu, average": {"architecture": ("jumprelu",), "k": (), "weight_average": 0.9},
    "frozen": {"decoder": ("trained", "frozen")},
    "frozen, average, bf16 moments": {
        "decoder": ("frozen",),
        "weight_average": 0.9,
        "optimizer_state": "bf16",
        "clip_grad_norm": 0.5,
    },
    "frozen, signum": SIGNUM | {"decoder": ("frozen",)},
    "relu, resampled, average": RESAMPLED | {"weight_average": 0.9},
    "relu, resampled, muon": MUON | RESAMPLED,
    "jumprelu, signum": SIGNUM | {"architecture": ("jumprelu",), "k": (), "target_l0": (4.0,)},
}


@pytest.mark.parametrize("kernels", ["torch", "numba"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_a_run_killed_and_resumed_equals_an_uninterrupted_one(
    recipe: dict[str, Any],
    kernels: str,
    store: ActivationStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: the same run without a stop, bit by bit: weights and metrics."""
    changes: dict[str, Any] = {"k": (4,), "num_latents": (48,), "kernels": kernels} | recipe
    run(config(store, tmp_path / "whole", **changes))
    killed_at(9, config(store, tmp_path / "cut", **changes), monkeypatch)
    run(config(store, tmp_path / "cut", **changes))
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_the_average_is_exported(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the weights after every step of the same run without an average, recorded and averaged in
    float64; the decoder's rows of unit length again."""
    history: list[dict[str, torch.Tensor]] = []
    step = Learner.step

    def recorded(self: Learner, *arguments: Any) -> None:
        step(self, *arguments)
        history.append({name: p.double().clone() for name, p in self.parameters.named.items()})
        scaling.append(self.scaling.scale)

    scaling: list[float] = []
    changes: dict[str, Any] = {"k": (4,), "num_latents": (48,), "kernels": "torch"}
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", recorded)
        run(config(store, tmp_path / "last", **changes))
    (folder,) = run(config(store, tmp_path / "mean", **changes, weight_average=0.9))
    shares = [0.9**age for age in range(len(history) - 1, -1, -1)]
    mean = {
        name: sum(share * step[name] for share, step in zip(shares, history, strict=True)) / sum(shares)
        for name in ("w_enc", "b_enc", "w_dec")
    }
    sae = Sae.load(folder)
    w_dec = mean["w_dec"] / mean["w_dec"].norm(dim=1, keepdim=True)
    torch.testing.assert_close(sae.W_enc.double(), mean["w_enc"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sae.W_dec.double(), w_dec, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sae.b_enc.double() * scaling[0], mean["b_enc"], rtol=1e-4, atol=1e-6)
    last = Sae.load(next(path.parent for path in (tmp_path / "last").glob("*/cfg.json")))
    assert not torch.allclose(last.W_enc, sae.W_enc, rtol=1e-3)


def test_signums_averages_are_exported() -> None:
    """Oracle: x of the optimizer; the decoder's rows of unit length again."""
    variant = Variant(name="v", site="s", k=4, num_latents=40, lr=1e-2, k_aux=6, optimizer="signum")
    batches = planted(5, 64, 12)
    bank = make_bank([variant], batches[0], kernels="torch")
    with torch.no_grad():
        for step, x_TD in enumerate(batches):
            bank.step(x_TD, 1.0, step)
        (learner,) = bank.learners
        averages = learner.optimizer.averages()
        parts = learner.export({})
    assert parts is not None
    assert averages is not None
    torch.testing.assert_close(parts.W_enc, averages["w_enc"])
    w_dec = averages["w_dec"] / averages["w_dec"].norm(dim=1, keepdim=True)
    torch.testing.assert_close(parts.W_dec, w_dec)
    assert not torch.allclose(parts.W_enc, learner.parameters.w_enc_FD)


def variant_of(**entry: Any) -> Variant:
    """One variant of 64 latents at D 16, resolved."""
    (variant,) = resolve({}, {"site": ("a",), "num_latents": (64,)}, ({"k": 4, **entry},), {"a": 16}, 100)
    return variant


def test_adamw_is_adam_with_weight_decay() -> None:
    """Oracle: torch's default of 0.01 by hand, or the decay that is given."""
    assert variant_of(optimizer="adamw") == variant_of(optimizer="adam", weight_decay=0.01)
    assert variant_of(optimizer="adamw", weight_decay=0.2) == variant_of(weight_decay=0.2)
    with pytest.raises(ConfigError, match="adamw with weight_decay 0 is adam; say adam"):
        variant_of(optimizer="adamw", weight_decay=0)


def test_automatic_rates() -> None:
    """Oracle: sparsify's rate of signum, 5e-3 / √(F / 2^14); twice Adam's for Muon; none for SGD."""
    assert variant_of(optimizer="signum").lr == pytest.approx(5e-3 / (64 / 2**14) ** 0.5)
    assert variant_of(optimizer="muon").lr == pytest.approx(2 * variant_of().lr)
    with pytest.raises(ConfigError, match="lr auto is not known for sgd; give --lr"):
        variant_of(optimizer="sgd")


def test_variants_take_of_the_run_what_their_optimizer_has() -> None:
    """Oracle: by hand: an average and clipping of the run are not signum's."""
    common = {"weight_average": 0.9, "clip_grad_norm": 1.0, "adam_betas": (0.9, 0.99)}
    entries = ({"optimizer": "signum"}, {"optimizer": "muon"}, {"optimizer": "adamw"})
    signum, muon, adamw = resolve(
        common, {"site": ("a",), "num_latents": (64,)}, tuple({"name": e["optimizer"], **e} for e in entries),
        {"a": 16}, 100,
    )  # fmt: skip
    assert (signum.weight_average, signum.clip_grad_norm, signum.adam_betas) == (None, None, ADAM_BETAS)
    assert (muon.weight_average, muon.clip_grad_norm, muon.adam_betas) == (0.9, 1.0, ADAM_BETAS)
    assert (adamw.weight_average, adamw.adam_betas, adamw.weight_decay) == (0.9, (0.9, 0.99), 0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (SIGNUM | {"weight_average": 0.9}, "weight_average has no effect with signum"),
        (SIGNUM | {"clip_grad_norm": 1.0}, "clip_grad_norm has no effect with signum, whose steps"),
        ({"clip_grad_norm": 0.0}, r"clip_grad_norm must be in \(0, inf\), got 0"),
        ({"weight_average": 1.0}, r"weight_average must be in \(0, 1\), got 1"),
        (MUON | {"adam_betas": (0.9, 0.999)}, "adam_betas have an effect with adam only"),
        (RESAMPLED | {"decoder": ("frozen",)}, "resample_at gives dead latents new decoder rows"),
    ],
)
def test_recipes_that_mean_nothing_are_refused(
    store: ActivationStore, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Oracle: the message; nothing was written."""
    with pytest.raises(ConfigError, match=message):
        run(config(store, tmp_path / "r", **changes))
    assert not (tmp_path / "r").exists()
