"""Training cross-layer transcoders: latents of each layer that predict its target and all later ones."""

from typing import Any

import pytest
import torch
from layered import whole_decoder, whole_encoder
from steps import outputs, planted
from torch import Tensor

from saemill.common.sae.sae import Sae
from saemill.train.backends.plain import Plain
from saemill.train.learner.bank import Bank
from saemill.train.learner.learner import Learner
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
}


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


def bank_of(own: Variant) -> Bank:
    x_TD, y_TE = rows()
    backend = Plain(torch.float32)
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
    if kind == "batchtopk":
        return torch.where((pre >= pre.flatten().topk(round(5.5 * T)).values[-1]) & (pre > 0), pre, 0)
    assert theta is not None
    unit = (L * E) ** 0.5
    theta, width = theta * unit, (0.5 * theta).clamp(min=0.001).detach() * unit
    near = ((pre - theta).abs() < width / 2).double() / width
    on = (pre > theta).double()
    return pre * on - theta.detach() * near.detach() * (theta - theta.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_whole_matrices(kind: str) -> None:
    """Oracle: autograd in float64 of a transcoder between all sites side by side, whose encoder and decoder
    have zeros where a latent does not read or write; one step of SGD, then rows of unit length. What is
    exported computes the same of the sites as they are."""
    bank, (x_TD, y_TE) = bank_of(variant(kind)), rows()
    (learner,) = bank.learners
    assert learner.parameters.w_enc_FD.shape == (F, D)
    assert learner.parameters.w_dec_FD.shape == (F * (L + 1) // 2, E)
    p = {name: value.clone().double().requires_grad_() for name, value in learner.parameters.named.items()}
    x, y = units(READS, x_TD), units(WRITES, y_TE)
    pre = x @ whole_encoder(p["w_enc"], L).T + p["b_enc"]
    codes, whole = codes_of(kind, pre, p.get("threshold")), whole_decoder(p["w_dec"], L)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(F).double(), rtol=1e-6, atol=0)
    predicted = codes @ whole + p["b"]
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


def test_dead_latents_of_any_layer_fit_what_is_left() -> None:
    """Oracle: AuxK's formula in float64 on whole matrices."""
    own = variant("topk", auxk_alpha=0.25)
    bank, (x_TD, y_TE) = bank_of(own), rows()
    (learner,) = bank.learners
    dead_S = torch.tensor([1, 5, 17, 20, 33, 40, 47])
    learner.parameters.w_enc_FD[dead_S] *= 0.01
    learner.idle_tokens_F[dead_S] = 2 * 10**9
    p = {name: value.clone().double().requires_grad_() for name, value in learner.parameters.named.items()}
    x, y = units(READS, x_TD), units(WRITES, y_TE)
    pre = x @ whole_encoder(p["w_enc"], L).T + p["b_enc"]
    whole = whole_decoder(p["w_dec"], L)
    error = codes_of("topk", pre, None) @ whole + p["b"] - y
    values, kept = pre[:, dead_S].topk(4)
    again = torch.zeros(T, 7, dtype=torch.float64).scatter(1, kept, torch.relu(values)) @ whole[dead_S]
    loss = error.square().sum() + 0.25 * (again + error.detach()).square().sum()
    (loss / (T * L * E)).backward()
    with torch.no_grad():
        bank.step(x_TD, 1.0, 0, y_TE)
    assert learner.dead.n_in_team == 7
    for name in ("w_enc", "b_enc", "b"):
        found = learner.parameters.named[name].double()
        torch.testing.assert_close(found, p[name] - 0.5 * p[name].grad, rtol=1e-5, atol=1e-6)
