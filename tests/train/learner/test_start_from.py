"""A finished SAE brought into the units of another run computes there what it computed."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from steps import make_bank, planted
from torch import Tensor

from saemill.common.sae.parts import Joined, Parts, SaeConfig
from saemill.common.sae.sae import Sae
from saemill.train.backends.architecture import Dead, Inference, Seen
from saemill.train.backends.codes import Above
from saemill.train.backends.parameters import Parameters, Shape
from saemill.train.backends.plain import pre_activations
from saemill.train.learner.architecture import architecture_of
from saemill.train.learner.learner import Learner
from saemill.train.learner.units import fill_whole, form_of
from saemill.train.stream.scaling import Scaling
from saemill.train.sweep import sources
from saemill.train.sweep.variant import Variant

D, E, F, T = 12, 7, 30, 40
GENERATOR = torch.Generator().manual_seed(5)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def parts_of(k: int | None, d_out: int | None = None, *, skip: bool = False, free: bool = False) -> Parts:
    """A random SAE or transcoder in float64, far from the origin; with thresholds where there is no k."""
    W_dec = drawn(F, d_out or D)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    if free:
        W_dec *= 0.5 + torch.rand(F, 1, generator=GENERATOR, dtype=torch.float64)
    config = SaeConfig(
        d_in=D, d_out=d_out, num_latents=F, k=k, provenance={}, architecture="topk" if k else "jumprelu"
    )
    threshold = None if k else torch.rand(F, generator=GENERATOR)
    return Parts(
        config, drawn(F, D), drawn(F), W_dec, 3 + drawn(d_out or D), threshold, drawn(E, D) if skip else None
    )


def crosscoder_of(k: int | None, scales: tuple[float, float]) -> Parts:
    """A random crosscoder of two sites, whose rows are of unit length in the sites' units."""
    parts = parts_of(k)
    joined = tuple(
        Joined(site, *part) for site, part in zip("ab", zip((5, 7), scales, strict=True), strict=True)
    )
    stretch_D = torch.tensor(scales).double().repeat_interleave(torch.tensor((5, 7)))
    config = replace(parts.config, joined=joined)
    return replace(parts, config=config, W_dec=parts.W_dec / stretch_D, W_enc=parts.W_enc * stretch_D)


def scaling(width: int, parts: Parts | None = None) -> Scaling:
    """Units that are not those of the SAE; of a crosscoder with two scales."""
    joined = ((5, 0.8), (7, 0.2)) if parts is not None and parts.config.joined else ()
    return Scaling(5 + drawn(width), 0.37, joined)


CASES: dict[str, tuple[Parts, dict[str, Any]]] = {
    "topk": (parts_of(4), {"k": 4}),
    "topk, nothing subtracted": (parts_of(4), {"k": 4, "apply_b_dec_to_input": False}),
    "jumprelu": (parts_of(None), {"architecture": "jumprelu", "target_l0": 4.0}),
    "jumprelu, free rows": (parts_of(None, free=True), {"architecture": "jumprelu", "target_l0": 4.0}),
    "gated": (parts_of(None), {"architecture": "gated", "l1_coefficient": 0.1}),
    "crosscoder": (crosscoder_of(4, (3.2, 0.8)), {"site": "a+b", "k": 4}),
    "crosscoder, nothing subtracted": (
        crosscoder_of(4, (3.2, 0.8)),
        {"site": "a+b", "k": 4, "apply_b_dec_to_input": False},
    ),
    "crosscoder, scales of another ratio": (
        crosscoder_of(None, (0.3, 0.5)),
        {"site": "a+b", "architecture": "jumprelu", "target_l0": 4.0},
    ),
    "transcoder": (parts_of(4, E), {"k": 4, "target_site": "t"}),
    "skip transcoder": (
        parts_of(None, E, skip=True),
        {"architecture": "gated", "l1_coefficient": 0.1, "target_site": "t", "skip_connection": True},
    ),
}


@pytest.mark.parametrize(("parts", "settings"), CASES.values(), ids=CASES.keys())
def test_the_first_reconstruction_is_the_source_s(parts: Parts, settings: dict[str, Any]) -> None:
    """Oracle: the source's own encode and decode of activations as they are, float64."""
    variant = Variant(name="v", num_latents=F, lr=1e-3, auxk_alpha=0.0, **{"site": "s"} | settings)
    own, target = scaling(D, parts), None if variant.target_site is None else scaling(E)
    architecture = architecture_of(variant, D)
    d_out = D if target is None else E
    is_centred = target is None and variant.apply_b_dec_to_input
    shape = Shape(F, D, d_out, architecture.further, variant.skip_connection, is_centred)
    named = {name: torch.zeros(size, dtype=torch.float64) for name, size in shape.of_each.items()}
    p = Parameters.of(named, shape)
    fill_whole(p, parts, own, target)
    architecture.restore(p, form_of(p, parts, slice(0, F), own, target))

    x_TD = 5 + drawn(T, D)
    gain_D = 1.0 if own.gain_D is None else own.gain_D
    units_TD = (x_TD - own.centre_D) * own.scale * gain_D
    seen = Seen(Dead(torch.zeros(0, dtype=torch.int64), 0), T)
    if isinstance(rule := architecture.rule(p), Above):
        count_F = (pre_activations(p, units_TD, torch.float64) > rule.threshold_F).sum(0).double()
        seen = seen._replace(count_F=count_F, n_active=count_F.sum())
    zeros_TE = torch.zeros(T, d_out, dtype=torch.float64)
    codes_TF = architecture.loss(p, units_TD, zeros_TE, seen, torch.float64).codes_TF
    found_TE = codes_TF @ p.w_dec_FD + p.b_D
    if p.w_skip_ED is not None:
        found_TE = found_TE + units_TD @ p.w_skip_ED.T
    of = own if target is None else target
    found_TE = found_TE / (of.scale * gain_D) + of.centre_D
    torch.testing.assert_close(found_TE, Sae.of(parts)(x_TD).reconstruction, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(p.w_dec_FD.norm(dim=1), torch.ones(F, dtype=torch.float64))


def learner_from(parts: Parts, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Learner:
    """A learner that starts from an SAE, in float32."""
    monkeypatch.setattr("saemill.train.learner.learner.read", lambda *_: parts)
    variant = Variant(name="v", site="s", num_latents=F, lr=1e-3, init_from="there", **settings)
    units = scaling(D)
    units = Scaling(units.centre_D.float(), units.scale)
    return make_bank([variant], planted(1, 30, D)[0], scaling=units).learners[0]


def test_what_is_exported_at_once_is_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the source's own weights; a threshold for all latents of BatchTopK included."""
    parts = parts_of(None)
    config = replace(parts.config, architecture="batchtopk")
    parts = replace(parts, config=config, threshold=torch.full((F,), 0.7))
    exported = learner_from(parts, monkeypatch, architecture="batchtopk", k=4, k_aux=2).export({})
    assert exported is not None
    for name, weights in parts.weights.items():
        torch.testing.assert_close(exported.weights[name], weights.float(), rtol=1e-5, atol=1e-5)


def test_a_source_that_changed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: an SAE with one weight that is another."""
    parts = parts_of(4)
    monkeypatch.setattr("saemill.train.sweep.sources.formats.load", lambda _: parts)
    content = sources.content_of(parts)
    assert sources.read("there", content) is parts
    parts.W_enc[0, 0] += 1
    with pytest.raises(Exception, match="there has changed since the run was planned"):
        sources.read("there", content)


def test_form_says_what_inference_does() -> None:
    """Oracle: `inference` of what `restore` filled in."""
    parts = parts_of(None)
    variant = Variant(name="v", site="s", num_latents=F, lr=1e-3, architecture="gated", l1_coefficient=0.1)
    architecture = architecture_of(variant, D)
    shape = Shape(F, D, D, architecture.further)
    named = {name: torch.zeros(size, dtype=torch.float64) for name, size in shape.of_each.items()}
    p = Parameters.of(named, shape)
    form = form_of(p, parts, slice(0, F), scaling(D), None)
    architecture.restore(p, form)
    back: Inference = architecture.inference(p, 0.0)
    for mine, wanted in zip(back[1:5], form[1:5], strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)
