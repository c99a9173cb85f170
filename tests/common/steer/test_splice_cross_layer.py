"""Cross-layer transcoders spliced in: codes of each layer, edited, and what they write to all later ones."""

from typing import Any

import pytest
import torch
from layered import whole_decoder
from saes import make_cross_layer
from splicing import IDS, RIGHT, D, at, n_hooks
from torch import Tensor

from saemill import Sae, ablate, clamp, splice, steer
from saemill.common.errors import ConfigError
from saemill.common.sae.sae import Encoded

pytestmark = pytest.mark.usefixtures("one_thread")
L, F = 3, 48
READS = [f"layers.{layer}.post_attention_layernorm" for layer in range(L)]
WRITES = [f"layers.{layer}.mlp" for layer in range(L)]


def transcoder() -> Sae:
    sae = make_cross_layer("topk", d=D, e=D, f=F)
    sae.W_dec.data *= 0.1
    return sae


def run_with(model: Any, hooks: dict[str, Any]) -> Tensor:
    """Oracle: transformers, with forward hooks of torch."""
    modules = dict(model.base_model.named_modules())
    handles = [modules[site].register_forward_hook(hook) for site, hook in hooks.items()]
    try:
        return model(IDS, attention_mask=RIGHT).logits
    finally:
        for handle in handles:
            handle.remove()


def by_hand(model: Any, sae: Sae, change: Any, *, keep_error: bool) -> Tensor:
    """Oracle: in one pass, codes of each layer densely from what the changed model has there, changed, and
    what whole decoders make of those of this layer and the ones before; at all positions but padding."""
    codes: dict[int, Tensor] = {}
    whole, keep = whole_decoder(sae.W_dec, L), RIGHT.bool()[..., None]

    def read(layer: int, x: Tensor) -> None:
        own = slice(layer * F // L, (layer + 1) * F // L)
        z = x @ sae.W_enc[own].T + sae.b_enc[own]
        full = torch.zeros(*x.shape[:2], F)
        full[..., own] = torch.relu(z * torch.zeros_like(z).scatter(-1, z.topk(2).indices, 1.0))
        codes[layer] = full

    def write(layer: int, y: Tensor) -> Tensor:
        f = sum(codes[at] for at in range(layer + 1))
        changed = sum(change(codes[at], at) for at in range(layer + 1))
        before, after = (each @ whole + sae.b_dec for each in (f, changed))
        own = slice(layer * D, (layer + 1) * D)
        other = y + (after - before)[..., own] if keep_error else after[..., own]
        return torch.where(keep, other, y)

    hooks: dict[str, Any] = {}
    for layer in range(L):
        hooks[READS[layer]] = lambda _m, _i, x, layer=layer: read(layer, x)
        hooks[WRITES[layer]] = lambda _m, _i, y, layer=layer: write(layer, y)
    return run_with(model, hooks)


def ablated(latent: int) -> Any:
    """A change of dense codes: one latent is 0."""
    return lambda f, _: f * (torch.arange(F) != latent)


def steered(latent: int, amount: float) -> Any:
    """A change of dense codes: one latent, where its layer's are encoded, is larger."""
    own = torch.arange(F) == latent
    return lambda f, layer: f + amount * own if latent // (F // L) == layer else f


def test_it_takes_the_place_of_every_mlp(models: dict[str, Any]) -> None:
    """Oracles: hooks of torch and dense formulas; with the error kept, and nothing edited, the bare model bit
    by bit; the codes of the pass without a splice's change."""
    model, sae = models["neox"], transcoder()

    def run() -> Tensor:
        return model(IDS, attention_mask=RIGHT).logits

    with torch.no_grad():
        before, hooks = run(), n_hooks(model)
        x = torch.cat([at(model, site, run) for site in READS], -1)
        latent = int(sae.encode(x)[1][..., :2].flatten().bincount().argmax())  # of the first layer
        for edits, change in (
            ([], lambda f, _: f),
            ([ablate(latent)], ablated(latent)),
            ([steer(F - 1, 3.0)], steered(F - 1, 3.0)),
            ([ablate(latent), steer(latent, 2.0), ablate(F - 1)],
             lambda f, at: steered(latent, 2.0)(ablated(F - 1)(ablated(latent)(f, at), at), at)),
            ([clamp(20, 1.5)], lambda f, at: steered(20, 1.5)(ablated(20)(f, at), at)),
        ):  # fmt: skip
            for keep_error in (False, True):
                expected = by_hand(model, sae, change, keep_error=keep_error)
                with splice(model, None, sae, edits, keep_error=keep_error, where=RIGHT.bool()):
                    torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-4)
                assert edits == [] or not torch.allclose(expected, before, atol=1e-3)
        with splice(model, None, sae) as spliced:
            assert torch.equal(run(), before)
        found = torch.zeros(*IDS.shape, F).scatter_add(-1, spliced.top_indices, spliced.top_acts)
        own = torch.zeros(*IDS.shape, F).scatter_add(-1, *sae.encode(x)[::-1])
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5)
        assert [len(codes.top_acts.shape) for codes in spliced.layers] == [3] * L
        assert spliced.where.shape == IDS.shape
        assert n_hooks(model) == hooks


def test_gradients_reach_codes_of_every_layer(models: dict[str, Any]) -> None:
    """Oracle: finite differences of a logit by steering the latent at one position's code."""
    model, sae = models["neox"], transcoder()
    with splice(model, None, sae, keep_error=False, where=RIGHT.bool()) as spliced:
        logit = model(IDS, attention_mask=RIGHT).logits[0, 10, 5]
        grads = torch.autograd.grad(logit, [codes.top_acts for codes in spliced.layers])
        codes, own = spliced.layers[0], grads[0]
    token, slot = 4, int(codes.top_acts[0, 4].argmax())
    latent, step = int(codes.top_indices[0, token, slot]), 0.02

    def nudged(by: float) -> float:
        def change(given: Encoded) -> tuple[Tensor, Tensor]:
            hit = given.top_indices == latent
            hit[1:], hit[:, :token], hit[:, token + 1 :] = False, False, False
            return given.top_acts + by * hit, given.top_indices

        with torch.no_grad(), splice(model, None, sae, change, keep_error=False, where=RIGHT.bool()):
            return float(model(IDS, attention_mask=RIGHT).logits[0, 10, 5])

    slope = (nudged(step) - nudged(-step)) / (2 * step)
    assert float(own[0, token, slot]) == pytest.approx(slope, rel=0.05, abs=1e-4)
    assert all(bool((grad != 0).any()) for grad in grads)


def test_what_does_not_fit_is_refused(models: dict[str, Any]) -> None:
    """Oracle: the messages."""
    model, sae = models["neox"], transcoder()
    with pytest.raises(ConfigError, match=r"has sites of its own, got 'layers\.1\.mlp'"):
        splice(model, "layers.1.mlp", sae).__enter__()
    with pytest.raises(ConfigError, match=r"latents must be in 0\.\.47"):
        splice(model, None, sae, ablate(48)).__enter__()

    def elsewhere(codes: Encoded) -> tuple[Tensor, Tensor]:
        return codes.top_acts, torch.zeros_like(codes.top_indices)

    for change, message in (
        (elsewhere, r"must return latents of the layer whose codes it is given, 16 to 31 here, got 0 to 0"),
        (lambda _: None, "an edit must return top_acts and top_indices"),
    ):
        with pytest.raises(ConfigError, match=message), splice(model, None, sae, change):
            model(IDS, attention_mask=RIGHT)
    with pytest.raises(ConfigError, match=r"nothing ran through layers\.0"), splice(model, None, sae):
        pass
