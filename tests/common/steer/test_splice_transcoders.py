"""Transcoders spliced in: they read one site and take the place of another."""

from typing import Any

import pytest
import torch
from saes import make_transcoder
from splicing import CAUSAL, IDS, RIGHT, D, at, by_hand, n_hooks, seeded_sae
from torch import Tensor

from saemill import Sae, ablate, splice
from saemill.common.errors import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")
READ = {"neox": "layers.1.post_attention_layernorm", "llama": "layers.1.post_attention_layernorm",
        "gpt2": "h.1.ln_2"}  # fmt: skip
PREDICTED = {"neox": "layers.1.mlp", "llama": "layers.1.mlp", "gpt2": "h.1.mlp"}
"""The input of a block's MLP, and its output."""


def transcoder(kind: str, architecture: str = "topk", **provenance: Any) -> Sae:
    sae = make_transcoder(architecture, has_skip=True, d=D, e=D, f=96)
    sae.config.provenance.clear()
    sae.config.provenance.update({"site": READ[kind], "target_site": PREDICTED[kind]} | provenance)
    return sae


def predicted(sae: Sae, x: Tensor, without: int | None = None) -> Tensor:
    """Oracle: W_decᵀ f + b_dec + W_skip x, written densely; perhaps without a latent."""
    z = x @ sae.W_enc.T + sae.b_enc
    f = torch.relu(z * torch.zeros_like(z).scatter(-1, z.topk(5).indices, 1.0))
    if without is not None:
        f[..., without] = 0
    return f @ sae.W_dec + sae.b_dec + x @ sae.W_skip.T


@pytest.mark.parametrize("kind", CAUSAL)
def test_it_takes_the_place_of_an_mlp(kind: str, models: dict[str, Any]) -> None:
    """Oracle: transformers with a hook of torch that puts the formula of the MLP's input in place of its
    output, at all positions but padding; with the error kept, and nothing edited, the bare model bit by bit;
    with a latent ablated, y less what the latent adds to the prediction."""
    model, sae = models[kind], transcoder(kind)

    def run() -> Tensor:
        return model(IDS, attention_mask=RIGHT).logits

    with torch.no_grad():
        x, before, hooks = at(model, READ[kind], run), run(), n_hooks(model)
        keep = RIGHT.bool()[..., None]
        latent = int(sae.encode(x[0]).top_indices.flatten().bincount().argmax())
        instead = {
            "all": lambda y: torch.where(keep, predicted(sae, x), y),
            "one": lambda y: torch.where(keep, y + predicted(sae, x, latent) - predicted(sae, x), y),
        }
        expected = {what: by_hand(model, PREDICTED[kind], change, run) for what, change in instead.items()}
        with splice(model, None, sae, keep_error=False) as spliced:
            torch.testing.assert_close(run(), expected["all"], rtol=1e-4, atol=1e-4)
        assert torch.equal(spliced.top_indices, sae.encode(x).top_indices)
        with splice(model, PREDICTED[kind], sae, ablate(latent), read=READ[kind]):
            torch.testing.assert_close(run(), expected["one"], rtol=1e-4, atol=1e-4)
        with splice(model, None, sae):
            assert torch.equal(run(), before)
        assert n_hooks(model) == hooks
        assert not torch.allclose(expected["all"], before, atol=0.1)


def test_what_does_not_fit_is_refused(models: dict[str, Any]) -> None:
    """Oracle: the messages."""
    model, sae = models["neox"], transcoder("neox")
    cases: list[tuple[Any, dict[str, Any], Sae, str]] = [
        ("layers.0.mlp", {}, sae, "layers.0.mlp runs before layers.1.post_attention_layernorm"),
        (
            None,
            {"read": "layers.1.mlp.dense_h_to_4h"},
            sae,
            "width 32, but those at layers.1.mlp.dense_h_to_4h",
        ),
        ("layers.1.mlp.dense_h_to_4h", {}, sae, "width 32, but those at layers.1.mlp.dense_h_to_4h have 64"),
        ("layers.1", {"read": "layers.0"}, seeded_sae(), "read is the site that a transcoder reads"),
        (None, {}, transcoder("neox", target_site=None), "does not tell its site"),
        (None, {}, transcoder("neox", site=None), "name it: .*read='layers.4'"),
    ]
    for site, more, which, message in cases:
        with pytest.raises(ConfigError, match=message), splice(model, site, which, **more):
            model(IDS)
