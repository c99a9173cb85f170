"""Training cross-layer transcoders: latents of each layer that predict its target and all later ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from caching import cache, tokenized
from layered import whole_decoder, whole_encoder
from safetensors.torch import load_file
from steps import outputs, planted
from torch import Tensor
from training import config, files, killed_at
from watching import held_out, lines

from saemill.common.errors import ConfigError
from saemill.common.sae.layers import lengths
from saemill.common.sae.sae import Sae
from saemill.common.stores.activations import ActivationStore
from saemill.train.backends import sparse
from saemill.train.backends.base import Backend
from saemill.train.backends.cpu.backend import Cpu
from saemill.train.backends.plain import Plain, output, pre_activations
from saemill.train.learner.bank import Bank
from saemill.train.learner.learner import Learner
from saemill.train.learner.units import fill_whole, form_of
from saemill.train.run import run
from saemill.train.stream.scaling import Scaling
from saemill.train.sweep.variant import Variant

pytestmark = pytest.mark.usefixtures("one_thread")
L, D, E, F, T = 3, 10, 7, 48, 64
READS = Scaling(torch.linspace(-1, 1, L * D), 0.8, ((D, 0.5), (D, 3.0), (D, 1.0)))
WRITES = Scaling(torch.linspace(2, -1, L * E), 1.3, ((E, 2.0), (E, 0.7), (E, 1.1)))
KINDS: dict[str, dict[str, Any]] = {
    "topk": {"k": 6},
    "batchtopk": {"k": 5.5},
    "jumprelu": {"target_l0": 6.0, "penalty_warmup_steps": 0},
    "relu": {"l1_coefficient": 0.05, "penalty_warmup_steps": 0},
    "gated": {"l1_coefficient": 0.05, "penalty_warmup_steps": 0},
}
BY_L1 = ("relu", "gated")
DEAD = [1, 5, 17, 20, 33, 40, 47]
"""Latents of all three layers."""
SKIP = {"skip_connection": True}


def rows(seed: int = 0) -> tuple[Tensor, Tensor]:
    """What three layers read, and what they make of it and of what the ones before them read."""
    x_TD = planted(seed + 1, T, L * D)[seed]
    parts = x_TD.split(D, 1)
    y = [outputs(torch.cat(parts[: layer + 1], 1), E) for layer in range(L)]
    return x_TD, torch.cat(y, 1)


def variant(kind: str, **changes: Any) -> Variant:
    settings: dict[str, Any] = {
        "name": "v", "site": "a+b+c", "target_site": "x+y+z", "architecture": kind, "num_latents": F,
        "lr": 0.5, "optimizer": "sgd", "auxk_alpha": 0, "k_aux": 4,
    }  # fmt: skip
    return Variant(**settings | KINDS[kind] | changes)


@pytest.fixture(params=[Plain, Cpu], ids=["torch", "numba"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """What computes a step; the loops also where they would leave it to torch, as codes are dense."""
    monkeypatch.setattr(sparse, "DENSE_SHARE", 1)
    made: Backend = request.param(torch.float32)
    return made


def bank_of(own: Variant, backend: Backend) -> Bank:
    x_TD, y_TE = rows()
    sample_TE = WRITES.standardise(y_TE)
    learner = Learner(own, READS, backend, READS.standardise(x_TD), 10**9, (WRITES, sample_TE))
    return Bank("a+b+c", READS, backend, [learner], ("x+y+z", WRITES))


def units(scaling: Scaling, x_TD: Tensor) -> Tensor:
    """Each site around its centre, times its scale; float64."""
    per_D = torch.cat([torch.full((width,), scale).double() for width, scale in scaling.parts])
    return (x_TD.double() - scaling.centre_D.double()) * per_D


def codes_of(kind: str, pre: Tensor, theta: Tensor | None) -> Tensor:
    """The papers' rules, densely: of TopK an equal number of each layer's latents."""
    if kind == "topk":
        kept = pre.view(T, L, F // L).topk(2).indices
        mask = torch.zeros(T, L, F // L, dtype=torch.float64).scatter(2, kept, 1).view(T, F)
        return torch.relu(pre * mask)
    if kind in BY_L1:
        return torch.relu(pre)
    if kind == "batchtopk":
        return torch.where((pre >= pre.flatten().topk(round(5.5 * T)).values[-1]) & (pre > 0), pre, 0)
    assert theta is not None
    unit = (L * E) ** 0.5
    theta, width = theta * unit, (0.5 * theta).clamp(min=0.001).detach() * unit
    near = ((pre - theta).abs() < width / 2).double() / width
    on = (pre > theta).double()
    return pre * on - theta.detach() * near.detach() * (theta - theta.detach())


@pytest.mark.parametrize(("kind", "skip"), [*((kind, {}) for kind in KINDS), ("topk", SKIP)])
def test_a_step_is_that_of_whole_matrices(kind: str, skip: dict[str, Any], backend: Backend) -> None:
    """Oracle: autograd in float64 of a transcoder between all sites side by side, whose encoder and decoder
    have zeros where a latent does not read or write; one step of SGD, then rows of unit length. What is
    exported computes the same of the sites as they are."""
    bank, (x_TD, y_TE) = bank_of(variant(kind, **skip), backend), rows()
    (learner,) = bank.learners
    if kind in BY_L1:  # the bias starts where one pre-activation is 0
        learner.parameters.b_enc_F.add_(1e-3)
    if kind == "jumprelu":  # a threshold starts where one pre-activation is
        learner.parameters.named["threshold"].mul_(1.001)
    assert learner.parameters.w_enc_FD.shape == (F, D)
    assert learner.parameters.w_dec_FD.shape == (F * (L + 1) // 2, E)
    p = {name: value.clone().double().requires_grad_() for name, value in learner.parameters.named.items()}
    x, y = units(READS, x_TD), units(WRITES, y_TE)
    pre = x @ whole_encoder(p["w_enc"], L).T + p["b_enc"]
    codes, whole = codes_of(kind, pre, p.get("threshold")), whole_decoder(p["w_dec"], L)
    if kind == "gated":
        magnitude = torch.relu(p["r_mag"].exp() * (pre - p["b_enc"]) + p["b_mag"])
        codes = torch.where(pre > 0, magnitude, 0)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(F).double(), rtol=1e-6, atol=0)
    predicted = codes @ whole + p["b"]
    if skip:
        assert p["w_skip"].shape == (L * E, D)
        predicted = predicted + x @ torch.block_diag(*p["w_skip"].split(E)).T
    loss = (predicted - y).square().sum() / (T * L * E)
    assert 0 < loss < (y.square().sum() / (T * L * E))
    if kind == "jumprelu":
        l0 = (codes > 0).double().sum() / T
        unit = (L * E) ** 0.5
        width = (0.5 * p["threshold"]).clamp(min=0.001).detach() * unit
        theta = p["threshold"] * unit
        near = ((pre - theta).abs() < width / 2).double().detach() / width
        steps = -(near * (theta - theta.detach())).sum()
        loss = loss + 2.0 * 2 * (l0 / 6 - 1).detach() / 6 * steps / T
    unit = (L * E) ** 0.5
    if kind == "relu":
        loss = loss + 0.05 * unit * codes.sum() / (T * L * E)
    if kind == "gated":
        opened = torch.relu(pre)
        beside = (opened @ whole.detach() + p["b"].detach() - y).square().sum() + 0.05 * unit * opened.sum()
        loss = loss + beside / (T * L * E)
    loss.backward()

    exported = learner.export({"site": "a+b+c", "target_site": "x+y+z"})
    assert exported is not None
    sae = Sae.of(exported)
    if kind != "batchtopk":  # whose cutoff is not known before the first step
        own = units(WRITES, sae(x_TD).reconstruction)
        torch.testing.assert_close(own, predicted.detach(), rtol=1e-4, atol=1e-4)
        added = sum(
            torch.nn.functional.pad(one(part).reconstruction, (layer * E, 0))
            for layer, (one, part) in enumerate(zip(sae.layers, x_TD.split(D, 1), strict=True))
        )
        torch.testing.assert_close(added, sae(x_TD).reconstruction, rtol=1e-5, atol=1e-5)

    with torch.no_grad():
        bank.step(x_TD, 1.0, 0, y_TE)
        grad = whole_decoder(p["w_dec"].grad, L)
        grad = grad - (grad * whole).sum(1, keepdim=True) * whole
        stepped = torch.nn.functional.normalize(whole - 0.5 * grad, dim=1)
        found = learner.parameters.named
        torch.testing.assert_close(whole_decoder(found["w_dec"].double(), L), stepped, rtol=0, atol=1e-6)
        for name in set(p) - {"w_dec"}:
            torch.testing.assert_close(
                found[name].double(), p[name] - 0.5 * p[name].grad, rtol=1e-5, atol=1e-6
            )


def test_dead_latents_of_any_layer_fit_what_is_left(backend: Backend) -> None:
    """Oracle: AuxK's formula in float64 on whole matrices."""
    own = variant("topk", auxk_alpha=0.25)
    bank, (x_TD, y_TE) = bank_of(own, backend), rows()
    (learner,) = bank.learners
    learner.parameters.w_enc_FD[DEAD] *= 0.01
    learner.weights.refresh()
    learner.idle_tokens_F[DEAD] = 2 * 10**9
    p = {name: value.clone().double().requires_grad_() for name, value in learner.parameters.named.items()}
    x, y = units(READS, x_TD), units(WRITES, y_TE)
    pre = x @ whole_encoder(p["w_enc"], L).T + p["b_enc"]
    whole = whole_decoder(p["w_dec"], L)
    error = codes_of("topk", pre, None) @ whole + p["b"] - y
    values, kept = pre[:, DEAD].topk(4)
    again = torch.zeros(T, 7, dtype=torch.float64).scatter(1, kept, torch.relu(values)) @ whole[DEAD]
    loss = error.square().sum() + 0.25 * (again + error.detach()).square().sum()
    (loss / (T * L * E)).backward()
    with torch.no_grad():
        bank.step(x_TD, 1.0, 0, y_TE)
    assert learner.dead.n_in_team == 7
    for name in ("w_enc", "b_enc", "b"):
        found = learner.parameters.named[name].double()
        torch.testing.assert_close(found, p[name] - 0.5 * p[name].grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{"preact_coefficient": 0.1, "k_aux": None}, {"auxk_alpha": 0.25, "clip_grad_norm": 0.01}],
    ids=["dead latents are drawn up", "clipped"],
)
def test_loops_step_as_autograd(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: autograd of the dense definition, in float32; latents of several layers are dead."""
    monkeypatch.setattr(sparse, "DENSE_SHARE", 1)
    found = []
    for backend in (Plain(torch.float32), Cpu(torch.float32)):
        bank, (x_TD, y_TE) = bank_of(variant("jumprelu", **changes), backend), rows()
        (learner,) = bank.learners
        learner.parameters.w_enc_FD[DEAD] *= 0.01
        learner.idle_tokens_F[DEAD] = 2 * 10**9
        learner.weights.refresh()
        start = {name: value.clone() for name, value in learner.parameters.named.items()}
        bank.step(x_TD, 1.0, 0, y_TE)
        found.append({name: value - start[name] for name, value in learner.parameters.named.items()})
    for name, expected in found[0].items():
        assert expected.abs().max() > 0
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=2e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_one_starts_as_another_in_other_units(kind: str) -> None:
    """Oracle: the first, on the activations as they are, whose units are those of other scales and centres;
    decoders are of unit length in the second's."""
    bank, (x_TD, y_TE) = bank_of(variant(kind, **SKIP), Plain(torch.float32)), rows()
    for step in range(2):
        bank.step(x_TD, 0.1, step, y_TE)
    parts = bank.learners[0].export({})
    assert parts is not None
    reads = Scaling(torch.linspace(0, 2, L * D), 1.4, ((D, 0.7), (D, 2.0), (D, 1.5)))
    writes = Scaling(torch.linspace(1, 0, L * E), 0.6, ((E, 1.0), (E, 1.9), (E, 0.4)))
    other = Learner(
        variant(kind, **SKIP), reads, Plain(torch.float32), reads.standardise(x_TD), 10**9,
        (writes, writes.standardise(y_TE)),
    )  # fmt: skip
    fill_whole(other.parameters, parts, reads, writes)
    form = form_of(other.parameters, parts, slice(None), reads, writes)
    other.architecture.restore(other.parameters, form)
    lengths_F = whole_decoder(other.parameters.w_dec_FD.double(), L).norm(dim=1)
    torch.testing.assert_close(lengths_F, torch.ones(F).double(), rtol=1e-6, atol=0)
    p, first = other.parameters, Sae.of(parts)
    if kind == "topk":  # chosen by size in the units of each, so those of the first are given
        codes = first.encode(x_TD)
        length_F = lengths(parts.W_dec, [scale for _, scale in writes.parts])
        acts = codes.top_acts * length_F[codes.top_indices]
        codes_TF = torch.zeros(T, F).scatter(1, codes.top_indices, acts)
    else:
        assert form.threshold_F is not None
        own = p._replace(b_enc_F=form.b_enc_F.float())  # with that of the magnitude where there is a gate
        pre_TF = pre_activations(own, reads.standardise(x_TD), torch.float32)
        codes_TF = pre_TF * (pre_TF > form.threshold_F.float())
    predicted = output(p, codes_TF, reads.standardise(x_TD))
    torch.testing.assert_close(
        predicted.double(), units(writes, first(x_TD).reconstruction), rtol=1e-4, atol=1e-4
    )


ENDS = {"site": "post_attention_layernorm", "target_site": "mlp"}
JOINED = {end: "+".join(f"layers.{layer}.{name}" for layer in range(L)) for end, name in ENDS.items()}
ACROSS: dict[str, Any] = {
    **{end: (f"layers.*.{name}",) for end, name in ENDS.items()},
    "cross_layer": True, "architecture": tuple(KINDS)[:3], "k": (6,), "target_l0": (6.0,),
    "num_latents": (96,),
}  # fmt: skip


@pytest.fixture(scope="module")
def store(
    corpus: Path, tokenizer_folder: str, tiny_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> ActivationStore:
    """What the three MLPs of a tiny model take and return."""
    folder = tmp_path_factory.mktemp("across")
    tokens = tokenized(corpus, tokenizer_folder, folder / "tokens", held_out_fraction=0.2)
    sites = tuple(f"layers.{layer}.{name}" for name in ENDS.values() for layer in range(L))
    return cache(tokens, tiny_models["neox"], folder / "acts", sites=sites)


def test_a_run_predicts_every_layer_from_it_and_those_before(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the saved files as whole matrices in float64, on the held-out rows as the store has them: their
    FVU at each site, and of all in the units of each, the run logged. It learns."""
    changes = ACROSS | {"max_tokens": 256 * 60, "log_every": 30, "eval_every": 30, "eval_tokens": 300}
    folders = run(config(store, tmp_path / "r", **changes))
    assert [folder.name.split("-cross-layer")[0] for folder in folders] == [
        f"layers.0.{ENDS['site']}-to-layers.2.mlp"
    ] * 3
    x, y = (
        torch.cat([held_out(store, site, 300).double() for site in JOINED[end].split("+")], 1) for end in ENDS
    )
    for folder in folders:
        sae = Sae.load(folder).double()
        assert (sae.site, sae.target_site) == tuple(JOINED.values())
        pre = x @ whole_encoder(sae.W_enc, L).T + sae.b_enc
        if sae.threshold is None:
            kept = pre.view(-1, L, 32).topk(2).indices
            codes = torch.relu(pre * torch.zeros(300, L, 32).double().scatter(2, kept, 1).view_as(pre))
        else:
            codes = pre * (pre > sae.threshold)
        error = codes @ whole_decoder(sae.W_dec, L) + sae.b_dec - y
        before, after = (lines(tmp_path / "r")[step][folder.name] for step in (30, 60))
        scales = torch.cat([torch.full((32,), part.scale).double() for part in sae.config.predicted])
        whole = (error * scales).square().sum() / ((y - y.mean(0)) * scales).square().sum()
        assert after["eval_fvu"] == pytest.approx(float(whole), rel=1e-4)
        assert after["eval_fvu"] < before["eval_fvu"] < 1
        for site, e, own in zip(sae.target_site.split("+"), error.split(32, 1), y.split(32, 1), strict=True):
            share = e.square().sum() / (own - own.mean(0)).square().sum()
            assert after[f"eval_fvu_at_{site}"] == pytest.approx(float(share), rel=1e-4)
    start = {"init_from": str(tmp_path / "r"), "site": (), "num_latents": (), "k": (), "architecture": ()}
    again = run(config(store, tmp_path / "again", max_tokens=256, **start | {"lr": (1e-9,)}))
    for folder, other in zip(folders, again, strict=True):
        assert folder.name.partition("-lr")[0] == other.name.partition("-lr")[0]
        before, after = (load_file(each / "sae.safetensors") for each in (folder, other))
        for name in ("W_dec", "encoder.weight"):
            torch.testing.assert_close(before[name], after[name], rtol=1e-4, atol=1e-5)


def test_it_resumes_bit_by_bit(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the same run without a stop, bit by bit: weights and metrics; with moments in 8 bits, averages
    of weights, AuxK at work, and frozen decoders beside."""
    changes = ACROSS | {"optimizer_state": "8bit", "weight_average": 0.9, "decoder": ("trained", "frozen")}
    run(config(store, tmp_path / "whole", **changes))
    killed_at(9, config(store, tmp_path / "cut", **changes), monkeypatch)
    run(config(store, tmp_path / "cut", **changes))
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_beside_transcoders_it_is_as_alone(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: runs of one kind with the same settings, bit by bit; loops step the transcoder of one layer."""
    names = [JOINED, {end: f"layers.1.{name}" for end, name in ENDS.items()}]
    common: dict[str, Any] = {"k": (6,), "num_latents": (96,), "site": ()}
    together = run(config(store, tmp_path / "all", variants=tuple(names), **common))
    for i, (name, folder) in enumerate(zip(names, together, strict=True)):
        (alone,) = run(config(store, tmp_path / str(i), variants=(name,), **common))
        assert (alone / "sae.safetensors").read_bytes() == (folder / "sae.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_site": ()}, "cross_layer joins the sites that site and target_site name; give both"),
        ({"site": ("layers.1.mlp",), "target_site": ("layers.2.mlp",)}, "joins two or more layers, got one"),
        ({"architecture": ("groupmax",)}, "is one of topk, .*, gated, got architecture groupmax"),
        ({"architecture": ("relu",), "resample_at": (5,)}, "resample_at is not there for a cross-layer"),
        ({"architecture": ("relu",), "decoder_rows": "free"}, "decoder_rows .* are of unit length"),
        ({"k": (7,)}, "k counts those of all 3 layers, .*, got 7; take 6 or 9"),
        ({"num_latents": (97,)}, "num_latents counts those of all 3 layers, .*, got 97; take 96 or 99"),
        ({"nested_k": (3,)}, "nested_k is not there for a cross-layer transcoder"),
        ({"optimizer": "muon"}, "optimizer muon steps whole matrices"),
        ({"loss": "mse"}, "loss mse is in the units of one site, and a cross-layer transcoder has several"),
        ({"loss": "mse+kl"}, "losses of the model read .*, and .* joins several; use loss fvu"),
        (
            {end: tuple(f"layers.{layer}.{name}" for layer in (0, 2, 1)) for end, name in ENDS.items()},
            "in the order in which the model runs them",
        ),
        (
            {"target_site": tuple(f"layers.{layer}.mlp" for layer in (1, 2, 0))}
            | {"site": tuple(f"layers.{layer}.post_attention_layernorm" for layer in range(L))},
            "in the order in which the model runs them",
        ),
        ({"kernels": "triton"}, "kernels triton do not step a cross-layer transcoder"),
        ({"latent_ranks": 2}, "latent_ranks 2: a cross-layer transcoder needs all its latents"),
        ({"eval_losses_every": 10, "eval_every": 10, "log_every": 10}, "are measured by `saemill assess`"),
        (
            {"cross_layer": False, "site": ("layers.1.mlp",), "target_site": (JOINED["target_site"],)},
            "joins several, and site layers.1.mlp is one",
        ),
    ],
)
def test_what_it_cannot_be_is_refused(
    store: ActivationStore, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Oracle: the message; nothing was written."""
    settings = ACROSS | {"architecture": ("topk",), "target_l0": ()} | changes
    settings |= {"k": (), "l1_coefficient": (0.1,)} if settings["architecture"] == ("relu",) else {}
    with pytest.raises(ConfigError, match=message):
        run(config(store, tmp_path / "r", **settings))
    assert not (tmp_path / "r").exists()
