"""Every backend against the architecture's definition: gradients and updates of one step.

The oracle is float64 autograd of `loss`, the decoder's gradient without its part along the unit rows,
torch.optim.AdamW or SGD, and renormalised rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from steps import GPU, make_bank, outputs, planted, seen
from torch import Tensor

from saemill.train.arch.topk import TopK
from saemill.train.architectures import BY_K
from saemill.train.backends import sparse
from saemill.train.backends.architecture import Auxiliary, Dead, Losses, Seen
from saemill.train.backends.cpu import backend as cpu
from saemill.train.backends.parameters import Parameters
from saemill.train.learner.learner import Learner
from saemill.train.optim.muon import MOMENTUM as MUON_MOMENTUM
from saemill.train.optim.optimizer import ADAM_EPS
from saemill.train.sweep.variant import Variant

pytestmark = [pytest.mark.no_cover, pytest.mark.usefixtures("one_thread")]

BACKENDS = ["torch", "numba", "numba 8-bit", *(["triton"] if find_spec("triton") else [])]
LR = 0.01


@dataclass(frozen=True)
class Case:
    """One step."""

    t: int = 13
    d: int = 12
    f: int = 40
    k: float = 4
    n_dead: int = 0
    dtype: torch.dtype = torch.float32
    optimizer: str = "adam"
    loss: str = "fvu"
    weight_decay: float = 0.0
    clip: float | None = None
    """Norm that gradients are clipped to."""
    k_aux: int = 6
    spoil: str = ""
    """What is odd about the weights or the batch."""
    architecture: str = "topk"
    settings: tuple[tuple[str, object], ...] = ()
    """Of the architecture, beside k."""
    d_out: int | None = None
    """Width of what a transcoder predicts; None of an SAE."""
    has_skip: bool = False
    is_centred: bool = True
    """Whether an SAE's encoder subtracts b."""


CASES = {
    "as usual": Case(),
    "one token": Case(t=1),
    "one latent per token": Case(k=1, f=64),
    "every latent": Case(k=13, f=13, d=5, t=7),
    "odd shape": Case(t=33, d=17, f=101, k=9),
    "wide": Case(t=40, d=300, f=70, k=8),
    "few dead": Case(n_dead=3),
    "many dead": Case(n_dead=25, k_aux=5),
    "mse, decay": Case(loss="mse", weight_decay=0.2, n_dead=4),
    "sgd": Case(optimizer="sgd", n_dead=4),
    "signum": Case(optimizer="signum", n_dead=4, weight_decay=0.2),
    "muon": Case(optimizer="muon", n_dead=4, weight_decay=0.2),
    "muon, fewer latents than columns": Case(optimizer="muon", t=40, d=60, f=30),
    "clipped": Case(clip=0.05, n_dead=4),
    "clipped, sgd": Case(clip=0.05, optimizer="sgd", n_dead=4, t=40, d=300, f=70),
    "clipped, muon": Case(clip=0.05, optimizer="muon"),
    "of a smaller norm than is clipped": Case(clip=50.0, optimizer="sgd"),
    "a latent for all tokens": Case(spoil="hot"),
    "a latent for none": Case(spoil="cold"),
    "latents alike": Case(spoil="ties", k=6),
    "tokens alike": Case(spoil="one token over again"),
    "bfloat16": Case(t=32, d=32, f=64, dtype=torch.bfloat16),
    "bfloat16, dead": Case(t=32, d=32, f=64, dtype=torch.bfloat16, n_dead=20),
    "multi-topk": Case(settings=(("multi_topk", True),), n_dead=4),
    "nested k": Case(k=9, settings=(("nested_k", (2, 5)),), n_dead=4),
    "batchtopk": Case(architecture="batchtopk", n_dead=4),
    "batchtopk, a fraction": Case(architecture="batchtopk", k=2.6),
    "batchtopk, odd shape": Case(architecture="batchtopk", t=33, d=17, f=101, k=9),
    "batchtopk, fewer above 0": Case(architecture="batchtopk", k=30),
    "batchtopk, latents alike": Case(architecture="batchtopk", k=6, spoil="ties"),
    "batchtopk, a latent for all tokens": Case(architecture="batchtopk", spoil="hot"),
    "abs-topk": Case(architecture="abs-topk", n_dead=4),
    "abs-topk, odd shape": Case(architecture="abs-topk", k=9, t=33, d=17, f=101),
    "abs-topk, every latent": Case(architecture="abs-topk", k=13, f=13, d=5, t=7),
    "abs-topk, many dead, clipped": Case(architecture="abs-topk", n_dead=25, k_aux=5, clip=0.05),
    "bfloat16, abs-topk": Case(architecture="abs-topk", t=32, d=32, f=64, k=8, dtype=torch.bfloat16),
    "groupmax": Case(architecture="groupmax", k=5, n_dead=4),
    "groupmax, odd shape": Case(architecture="groupmax", k=7, t=33, d=17, f=91),
    "bfloat16, groupmax": Case(architecture="groupmax", t=32, d=32, f=64, k=8, dtype=torch.bfloat16),
    "matryoshka": Case(architecture="matryoshka", settings=(("prefixes", (5, 17, 40)),), n_dead=4),
    "matryoshka, topk": Case(
        architecture="matryoshka", settings=(("prefixes", (1, 40)), ("matryoshka_rule", "topk"))
    ),
    "jumprelu": Case(architecture="jumprelu", settings=(("target_l0", 3.0), ("bandwidth", 0.2))),
    "jumprelu, a share of the thresholds, dead": Case(
        architecture="jumprelu", n_dead=4, settings=(("target_l0", 3.0),)
    ),
    "jumprelu, dense and dead": Case(
        architecture="jumprelu",
        n_dead=4,
        settings=(
            ("l0_coefficient", 0.03),
            ("bandwidth", 0.3),
            ("most_density", 0.1),
            ("preact_coefficient", 0.01),
        ),
    ),
    "jumprelu, tanh": Case(
        architecture="jumprelu",
        settings=(("l0_coefficient", 0.03), ("bandwidth", 0.3), ("sparsity_penalty", "tanh")),
    ),
    "relu": Case(architecture="relu", settings=(("l1_coefficient", 0.05),)),
    "relu, free rows": Case(
        architecture="relu", settings=(("l1_coefficient", 0.05), ("lp_norm", 0.7), ("decoder_rows", "free"))
    ),
    "jumprelu, clipped": Case(
        architecture="jumprelu", clip=0.01, settings=(("target_l0", 3.0), ("bandwidth", 0.2)), optimizer="sgd"
    ),
    "gated": Case(architecture="gated", settings=(("l1_coefficient", 0.05),)),
    "frozen": Case(n_dead=4, weight_decay=0.2, settings=(("decoder", "frozen"),)),
    "frozen, muon": Case(n_dead=4, optimizer="muon", settings=(("decoder", "frozen"),)),
    "frozen, clipped, sgd": Case(clip=0.05, n_dead=4, optimizer="sgd", settings=(("decoder", "frozen"),)),
    "frozen, signum": Case(optimizer="signum", settings=(("decoder", "frozen"),)),
    "frozen, gated": Case(architecture="gated", settings=(("l1_coefficient", 0.05), ("decoder", "frozen"))),
    "frozen, free rows": Case(
        architecture="relu",
        settings=(("l1_coefficient", 0.05), ("decoder_rows", "free"), ("decoder", "frozen")),
    ),
    "matryoshka, topk, fewer above 0": Case(
        architecture="matryoshka",
        k=30,
        settings=(("prefixes", (5, 17, 40)), ("matryoshka_rule", "topk")),
    ),
    "bfloat16, batchtopk": Case(architecture="batchtopk", t=32, d=32, f=64, k=8, dtype=torch.bfloat16),
    "bfloat16, matryoshka": Case(
        architecture="matryoshka",
        t=32,
        d=32,
        f=64,
        dtype=torch.bfloat16,
        settings=(("prefixes", (8, 24, 64)), ("matryoshka_rule", "topk")),
    ),
    "bfloat16, relu, free rows": Case(
        architecture="relu",
        t=32,
        d=32,
        f=64,
        dtype=torch.bfloat16,
        settings=(("l1_coefficient", 0.05), ("decoder_rows", "free")),
    ),
    "bfloat16, gated": Case(
        architecture="gated", t=32, d=32, f=64, dtype=torch.bfloat16, settings=(("l1_coefficient", 0.05),)
    ),
}
CASES |= {
    f"transcoder, {name}": replace(CASES[name], d_out=CASES[name].d)
    for name in ("as usual", "clipped", "matryoshka", "gated", "jumprelu, dense and dead")
}
CASES["transcoder, bfloat16, dead"] = replace(CASES["bfloat16, dead"], d_out=32, t=24)
CASES["skip transcoder, bfloat16"] = replace(CASES["bfloat16"], d_out=32, t=24, has_skip=True)
CASES |= {
    f"skip transcoder, {name}": replace(CASES[name], d_out=CASES[name].d, has_skip=True)
    for name in (
        "few dead",
        "sgd",
        "clipped, sgd",
        "muon",
        "nested k",
        "gated",
        "relu, free rows",
    )
}
CASES |= {
    f"not centred, {name}": replace(CASES[name], is_centred=False)
    for name in ("few dead", "jumprelu, dense and dead", "clipped, sgd")
}
CASES |= {
    f"to another width, {name}": replace(CASES[name], d_out=19, has_skip=has_skip)
    for name in ("many dead", "mse, decay", "batchtopk", "matryoshka", "jumprelu", "jumprelu, tanh", "gated")
    for has_skip in (name in ("batchtopk", "gated"),)
}

TOLERANCE = {
    torch.float32: 1e-4,  # sums of float32 products in another order than float64's
    torch.bfloat16: 6e-2,  # inputs, weights and errors in 8 bits of precision; a k-th latent may be another
}
"""Of a gradient, in its largest entry's units (bfloat16: in its length)."""


def learner_of(case: Case, kernels: str) -> Learner:
    """A learner with weights that are not those of a start."""
    device = GPU if kernels == "triton" else torch.device("cpu")
    variant = Variant(
        name="v", site="s", architecture=case.architecture,  # type: ignore[arg-type]
        k=case.k if case.architecture in BY_K else None,
        num_latents=case.f, lr=LR, k_aux=case.k_aux, loss=case.loss,  # type: ignore[arg-type]
        apply_b_dec_to_input=case.is_centred,
        target_site=None if case.d_out is None else "t", skip_connection=case.has_skip,
        optimizer=case.optimizer, weight_decay=case.weight_decay, clip_grad_norm=case.clip,  # type: ignore[arg-type]
        **dict(case.settings),  # type: ignore[arg-type]
    )  # fmt: skip
    sample_TD = planted(1, 50, case.d, device)[0]
    sample_TE = None if case.d_out is None else outputs(sample_TD, case.d_out)
    bank = make_bank([variant], sample_TD, kernels=kernels.split()[0], dtype=case.dtype, sample_TE=sample_TE)
    (learner,) = bank.learners
    generator = torch.Generator().manual_seed(3)
    p = learner.parameters
    p.w_enc_FD.copy_(torch.randn(case.f, case.d, generator=generator) / case.d**0.5)
    p.b_enc_F.copy_(0.1 * torch.randn(case.f, generator=generator))
    p.b_D.copy_(0.3 * torch.randn(len(p.b_D), generator=generator))
    if p.w_skip_ED is not None:
        p.w_skip_ED.copy_(torch.randn(p.w_skip_ED.shape, generator=generator) / case.d)
    if case.spoil == "hot":
        p.b_enc_F[3] = 9
    elif case.spoil == "cold":
        p.b_enc_F[case.f // 2 :] = -9
    elif case.spoil == "ties":
        p.w_enc_FD[1::2], p.b_enc_F[1::2] = p.w_enc_FD[::2], p.b_enc_F[::2]
        p.w_dec_FD[1::2] = p.w_dec_FD[::2]
    for name, own_F in p.further_F.items():
        if name == "threshold":
            own_F.copy_((0.5 + torch.rand(case.f, generator=generator)) / case.d**0.5)
        else:
            own_F.copy_(0.3 * torch.randn(case.f, generator=generator))
    learner.weights.refresh()
    dead_S = torch.randperm(case.f, generator=generator)[: case.n_dead].sort().values.to(device)
    learner.dead = Dead(dead_S, case.n_dead)
    return learner


def oracle(
    learner: Learner, x_TD: Tensor, y_TE: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Tensor], float, Losses]:
    """Gradients and parameters after the step by name, the loss, and its parts, from the definition."""
    variant = learner.variant
    unit = learner.architecture.unit_rows and not variant.is_frozen
    leaves = {
        name: p.detach().double().cpu().requires_grad_() for name, p in learner.parameters.named.items()
    }
    p, x_TD = Parameters.of(leaves, learner.parameters), x_TD.double().cpu()
    target_TE = x_TD if y_TE is None else y_TE.double().cpu()
    if "w_skip" in leaves:
        target_TE = target_TE - x_TD @ leaves["w_skip"].T
    losses = learner.architecture.loss(p, x_TD, target_TE, seen(learner, p, x_TD), torch.float64)
    loss = (losses.error + losses.added) / target_TE.numel()
    loss.backward()  # type: ignore[no-untyped-call]
    w_dec = p.w_dec_FD
    if unit:
        assert w_dec.grad is not None
        w_dec.grad -= (w_dec.grad * w_dec).sum(1, keepdim=True) * w_dec.detach()
    if variant.is_frozen:
        del leaves["w_dec"]
    if variant.clip_grad_norm is not None:
        norm = torch.nn.utils.clip_grad_norm_(leaves.values(), variant.clip_grad_norm)
        assert (norm > variant.clip_grad_norm) == (variant.clip_grad_norm < 1), "one case does, one does not"
    gradients = {name: leaf.grad.detach().clone() for name, leaf in leaves.items() if leaf.grad is not None}
    step_by_torch(variant, leaves)
    if unit:
        w_dec.data /= w_dec.data.norm(dim=1, keepdim=True)
    return gradients, {name: leaf.detach() for name, leaf in leaves.items()}, loss.item(), losses


def step_by_torch(variant: Variant, leaves: dict[str, Tensor]) -> None:
    """Take the first step of an optimizer of torch's; of signum it is one along signs."""
    leaves["w_enc"].data *= 1 - LR * variant.weight_decay
    if variant.optimizer == "signum":
        for leaf in leaves.values():
            assert leaf.grad is not None
            leaf.data -= LR * leaf.grad.sign()
        return
    if variant.optimizer == "sgd":
        torch.optim.SGD(leaves.values(), LR, momentum=0.9).step()
        return
    by_adam = [leaf for leaf in leaves.values() if variant.optimizer == "adam" or leaf.dim() == 1]
    torch.optim.Adam(by_adam, LR, variant.adam_betas, ADAM_EPS).step()
    if variant.optimizer == "muon":
        matrices: Any = [leaf for leaf in leaves.values() if leaf.dim() == 2]
        torch.optim.Muon(matrices, LR, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()


def stepped(learner: Learner, x_TD: Tensor, y_TE: Tensor | None = None) -> tuple[dict[str, Tensor], float]:
    """Gradients as the optimizer saw them, from its first moment, and the loss of the step."""
    with torch.no_grad():
        learner.step(learner.backend.prepare(x_TD, y_TE), 1.0, 0)
    of_vector = 1.0 if learner.variant.optimizer == "sgd" else 1 - learner.variant.adam_betas[0]
    of_matrix = 1 - MUON_MOMENTUM if learner.variant.optimizer == "muon" else of_vector
    moments = learner.optimizer.tensors()
    loss = learner.totals.window()["loss"]
    assert loss is not None
    return {
        name: moments[name][0].double().cpu() / (of_matrix if p.dim() == 2 else of_vector)
        for name, p in learner.parameters.named.items()
        if not (name == "w_dec" and learner.variant.is_frozen)
    }, loss


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("kernels", BACKENDS)
def test_a_step_is_that_of_the_definition(kernels: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: float64 autograd of `loss`, torch.optim."""
    monkeypatch.setattr(cpu, "chooses_by_8_bits", lambda *shape: kernels == "numba 8-bit")
    monkeypatch.setattr(sparse, "DENSE_SHARE", 2.0)  # no step is dense, though few latents make a share large
    learner = learner_of(case, kernels)
    (x_TD,) = planted(1, case.t, case.d, learner.parameters.b_D.device)
    if case.spoil == "one token over again":
        x_TD[:] = x_TD[0]
    y_TE = None if case.d_out is None else outputs(x_TD, case.d_out)
    gradients, after, loss, losses = oracle(learner, x_TD, y_TE)
    decoder_FD = learner.parameters.w_dec_FD.clone()
    found, found_loss = stepped(learner, x_TD, y_TE)
    tolerance = TOLERANCE[case.dtype]
    assert found_loss == pytest.approx(loss, rel=tolerance)
    assert found.keys() == gradients.keys()
    for name, exact in gradients.items():
        mine = found[name]
        if case.optimizer == "signum":  # it keeps no gradient
            continue
        if case.dtype == torch.bfloat16:
            assert float((mine - exact).norm() / exact.norm()) < tolerance
        else:
            bound = tolerance * float(exact.abs().max()) + 1e-9
            torch.testing.assert_close(mine, exact, rtol=tolerance, atol=bound)
    if case.dtype == torch.float32:
        check_updates(learner, gradients, after)
        check_sums(learner, losses, case)
    if learner.variant.is_frozen:
        assert torch.equal(learner.parameters.w_dec_FD, decoder_FD)
    if learner.architecture.unit_rows:
        lengths = learner.parameters.w_dec_FD.norm(dim=1)
        torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=1e-5, atol=0)


def check_sums(learner: Learner, losses: Losses, case: Case) -> None:
    """Compare what is counted: active codes, latents that fired, and the error of each group."""
    active_TF, means, n_values = (
        losses.codes_TF != 0,
        learner.totals.window(),
        case.t * (case.d_out or case.d),
    )
    assert means["l0"] == pytest.approx(float(active_TF.sum()) / case.t)
    assert torch.equal(learner.idle_tokens_F.cpu() == 0, active_TF.any(0))
    squares = losses.error if losses.sse is None else losses.sse
    assert means["fvu"] == pytest.approx(squares.item() / n_values, rel=1e-4)
    if losses.sse_G is not None:
        each = [means[name] for name in learner.totals.group_names]
        assert each == pytest.approx((losses.sse_G / n_values).tolist(), rel=1e-4)


def check_updates(learner: Learner, gradients: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Compare new parameters, but where Adam's first step is the sign of a gradient that is nearly 0."""
    for name, gradient in gradients.items():
        mine, exact = learner.parameters.named[name], after[name]
        sure = gradient.abs() > 1e-3 * gradient.abs().max()
        # Muon's iteration is in bfloat16; its steps are of about 0.004 here.
        atol = 3e-4 if learner.variant.optimizer == "muon" else 2e-5
        torch.testing.assert_close(mine.double().cpu()[sure], exact[sure], rtol=1e-3, atol=atol)


@pytest.mark.parametrize("n_dead", [0, 7])
def test_the_definition_is_topk_with_auxk(n_dead: int) -> None:
    """Oracle: Gao et al. 2024 written down once more: torch.topk, a mask, dense products, e detached."""
    generator = torch.Generator().manual_seed(1)
    t, d, f, k, k_aux = 11, 6, 30, 3, 4
    x = torch.randn(t, d, generator=generator, dtype=torch.float64)
    w_enc, w_dec = (torch.randn(f, d, generator=generator, dtype=torch.float64) for _ in range(2))
    b_enc, b = torch.randn(f, generator=generator).double(), torch.randn(d, generator=generator).double()
    dead_S = torch.arange(0, 2 * n_dead, 2)

    def codes(w_enc: Tensor, b_enc: Tensor, b: Tensor, k: int) -> Tensor:
        pre = (x - b) @ w_enc.T + b_enc
        return torch.relu(pre * torch.zeros_like(pre).scatter(1, pre.topk(k).indices, 1.0))

    def mine(*p: Tensor) -> Tensor:
        architecture = TopK(k, Auxiliary(k_aux, 1 / 8))
        losses = architecture.loss(Parameters(*p), x, x, Seen(Dead(dead_S, n_dead), t), torch.float64)
        return losses.error + losses.added

    def theirs(w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, b: Tensor) -> Tensor:
        e = codes(w_enc, b_enc, b, k) @ w_dec + b - x
        if not n_dead:
            return e.square().sum()
        aux = codes(w_enc[dead_S], b_enc[dead_S], b, min(k_aux, n_dead)) @ w_dec[dead_S] + e.detach()
        return e.square().sum() + 1 / 8 * min(1, n_dead / k_aux) * aux.square().sum()

    def differentiated(loss: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [p.clone().requires_grad_() for p in (w_enc, b_enc, w_dec, b)]
        return [loss(*leaves), *torch.autograd.grad(loss(*leaves), leaves)]

    for a, b_ in zip(differentiated(mine), differentiated(theirs), strict=True):
        torch.testing.assert_close(a, b_)


@pytest.mark.parametrize("name", ["few dead", "matryoshka", "jumprelu, dense and dead", "gated"])
@pytest.mark.parametrize("kernels", BACKENDS)
def test_a_step_that_is_not_healthy_changes_nothing(
    kernels: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the parameters from before, bit by bit; NaN in the batch."""
    monkeypatch.setattr(sparse, "DENSE_SHARE", 2.0)
    learner = learner_of(CASES[name], kernels)
    (x_TD,) = planted(1, 23, 12, learner.parameters.b_D.device)
    x_TD[2, 3] = torch.nan
    before = [parameter.clone() for parameter in learner.parameters.named.values()]
    stepped(learner, x_TD)
    assert int(learner.diverged_step) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, learner.parameters.named.values(), strict=True))


@pytest.mark.parametrize("name", ["jumprelu", "batchtopk", "gated"])
def test_a_dense_step_is_that_of_plain(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: `Plain` with the same weights, bit by bit; copies of the weights follow."""
    monkeypatch.setattr(sparse, "DENSE_SHARE", 0.0)
    learners = [learner_of(CASES[name], kernels) for kernels in ("torch", "numba")]
    for learner in learners:
        stepped(learner, planted(1, 23, 12)[0])
    plain, dense = learners
    for name, parameter in plain.parameters.named.items():
        assert torch.equal(parameter, dense.parameters.named[name])
    assert torch.equal(dense.weights.product_FD, dense.parameters.w_enc_FD)
    assert plain.totals.window() == dense.totals.window()
