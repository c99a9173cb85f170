"""Splicing: what an SAE in the model's place changes, and what it leaves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from replaced import with_thresholds
from splicing import (
    BLOCKS,
    CAUSAL,
    IDS,
    KINDS,
    LEFT,
    LEFT_OUT,
    NORMS,
    PARTS,
    RIGHT,
    F,
    K,
    at,
    by_hand,
    dense,
    n_hooks,
    seeded_sae,
    signed_sae,
)
from torch import Tensor

from saemill import Sae, ablate, clamp, scale, splice, steer
from saemill.common.sae.sae import Encoded

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", KINDS)
def test_watching_leaves_the_model_as_it_is(kind: str, models: dict[str, Any]) -> None:
    """Oracle: the bare model's logits, bit by bit; what fired is what the SAE makes of the activations
    that transformers' own `output_hidden_states` gives."""
    model, sae = models[kind], seeded_sae()
    with torch.no_grad():
        expected = model(IDS, attention_mask=RIGHT, output_hidden_states=True)
        before = n_hooks(model)
        for site in (f"{BLOCKS[kind]}.1", "residual.1", PARTS[kind]):
            with splice(model, site, sae) as spliced:
                assert torch.equal(model(IDS, attention_mask=RIGHT).logits, expected.logits)
            assert spliced.top_acts.shape == spliced.top_indices.shape == (3, 17, K)
            if site != PARTS[kind]:
                codes = sae.encode(expected.hidden_states[2])
                assert torch.equal(spliced.top_acts, codes.top_acts)
                assert torch.equal(spliced.top_indices, codes.top_indices)
            assert torch.equal(spliced.where, RIGHT.bool())
            assert n_hooks(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_without_error_the_reconstruction_goes_on(kind: str, models: dict[str, Any]) -> None:
    """Oracle: a hook of torch that puts sae(x) at the positions that training saw, taken by hand."""
    model, sae = models[kind], seeded_sae(left_out=LEFT_OUT)
    keep = (RIGHT > 0) & (torch.arange(17) > 0) & (IDS[0, 4] != IDS)
    assert 0 < keep.sum() < RIGHT.sum() - 3

    def run() -> Tensor:
        return model(IDS, attention_mask=RIGHT).logits

    with torch.no_grad():
        for site in (f"{BLOCKS[kind]}.0", PARTS[kind]):
            expected = by_hand(
                model, site, lambda x: torch.where(keep[..., None], sae(x).reconstruction, x), run
            )
            with splice(model, site, sae, keep_error=False) as spliced:
                assert torch.equal(run(), expected)
            assert torch.equal(spliced.where, keep)
            assert not torch.equal(run(), expected)


@pytest.mark.parametrize("kind", CAUSAL)
def test_the_rest_of_the_model_runs_on_the_reconstruction(kind: str, models: dict[str, Any]) -> None:
    """Oracle: after the last block, the final norm and the head called by hand on sae(x)."""
    model, sae, last = models[kind], seeded_sae(), f"{BLOCKS[kind]}.2"
    norm, head = model.base_model.get_submodule(NORMS[kind]), model.get_output_embeddings()
    with torch.no_grad():
        x_BSD = at(model, last, lambda: model(IDS))
        with splice(model, last, sae, keep_error=False):
            logits = model(IDS).logits
        torch.testing.assert_close(logits, head(norm(sae(x_BSD).reconstruction)))


EDITS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "ablate": (ablate(3, 8), lambda f: f.index_fill(-1, torch.tensor([3, 8]), 0)),
    "scale": (scale(3, -2.5), lambda f: torch.cat([f[..., :3], -2.5 * f[..., 3:4], f[..., 4:]], -1)),
    "clamp": (clamp(3, 7.0), lambda f: f.index_fill(-1, torch.tensor([3]), 7.0)),
    "steer": (steer(3, -4.0), lambda f: f - 4.0 * torch.nn.functional.one_hot(torch.tensor(3), F)),
    "latent 0": ([scale(0, 2.0), steer(0, 1.5)], lambda f: torch.cat([2 * f[..., :1] + 1.5, f[..., 1:]], -1)),
    "several": (
        [ablate(8), clamp(3, 7.0), steer(3, 1.0)],
        lambda f: f.index_fill(-1, torch.tensor([8]), 0).index_fill(-1, torch.tensor([3]), 8.0),
    ),
    "a function": (lambda codes: (codes.top_acts**2, codes.top_indices), lambda f: f**2),
}


@pytest.mark.parametrize("codes", ["topk", "thresholds", "signed"])
@pytest.mark.parametrize("keep_error", [True, False])
@pytest.mark.parametrize("name", EDITS)
def test_edits_are_those_of_the_dense_codes(
    name: str, keep_error: bool, codes: str, models: dict[str, Any]
) -> None:
    """Oracle: x + (f' − f) W_dec, or f' W_dec + b_dec, with dense codes f edited by indexing. An SAE with
    thresholds has unused slots, which are of latent 0; one of signed codes has activations below 0."""
    model = models["neox"]
    sae = signed_sae() if codes == "signed" else seeded_sae()
    sae = with_thresholds(sae, 0.2) if codes == "thresholds" else sae
    edit, change = EDITS[name]
    with torch.no_grad():
        x_BSD = at(model, "layers.1", lambda: model(IDS))
        f_BSF = dense(sae, x_BSD)
        assert all((f_BSF[..., latent] != 0).any() for latent in (3, 8))
        assert (f_BSF < 0).any() == (codes == "signed")
        assert (f_BSF[..., 3] == 0).any()
        changed = change(f_BSF) @ sae.W_dec
        expected = x_BSD + changed - f_BSF @ sae.W_dec if keep_error else changed + sae.b_dec
        with splice(model, "layers.1", sae, edit, keep_error=keep_error) as spliced:
            found = at(model, "layers.1", lambda: model(IDS))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        fired = torch.zeros_like(f_BSF).scatter_add(-1, spliced.top_indices, spliced.top_acts)
        torch.testing.assert_close(fired, f_BSF)
        assert codes != "thresholds" or (spliced.top_acts == 0).any()


def test_ablation_takes_the_latents_part_away(models: dict[str, Any]) -> None:
    """Oracle: x − a·W_dec[latent], a the latent's activation; the model is untouched where it is silent."""
    model, sae = models["llama"], seeded_sae()
    with torch.no_grad():
        x_BSD, logits = at(model, "layers.1", lambda: model(IDS)), model(IDS).logits
        a_BS = dense(sae, x_BSD)[..., 3]
        expected = x_BSD - a_BS[..., None] * sae.W_dec[3]
        with splice(model, "layers.1", sae, ablate(3)):
            torch.testing.assert_close(at(model, "layers.1", lambda: model(IDS)), expected)
            changed = model(IDS).logits
    before = (a_BS > 0).cumsum(1) == 0
    assert before.any()
    assert torch.equal(changed[before], logits[before])
    assert ((changed - logits).abs().amax(-1) > 0)[a_BS > 0].all()


def test_an_edit_in_place_leaves_the_record(models: dict[str, Any]) -> None:
    """Oracle: the codes of the bare model, and those of `ablate`."""
    model, sae = models["neox"], seeded_sae()

    def in_place(codes: Encoded) -> Encoded:
        codes.top_acts[codes.top_indices == 3] = 0
        codes.top_indices[codes.top_indices == 3] = 0
        return codes

    with torch.no_grad():
        with splice(model, "layers.1", sae) as watched:
            model(IDS)
        with splice(model, "layers.1", sae, ablate(3)):
            expected = model(IDS).logits
        with splice(model, "layers.1", sae, in_place) as spliced:
            torch.testing.assert_close(model(IDS).logits, expected)
    assert torch.equal(spliced.top_acts, watched.top_acts)
    assert torch.equal(spliced.top_indices, watched.top_indices)


@pytest.mark.parametrize("kind", CAUSAL)
def test_generating_with_a_cache_and_without_is_the_same(kind: str, models: dict[str, Any]) -> None:
    """Oracle: `use_cache=False`, where each step runs all positions; and each prompt alone, not padded."""
    model, sae = models[kind], seeded_sae(left_out=LEFT_OUT)
    site = f"{BLOCKS[kind]}.1"
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "output_logits": True}
    settings |= {"return_dict_in_generate": True, "pad_token_id": 0}
    n_positions = []

    def count(codes: Encoded) -> Encoded:
        n_positions.append(codes.top_acts.shape[1])
        return codes

    def generate(ids: Tensor, attention: Tensor, use_cache: bool) -> Any:
        with splice(model, site, sae, [clamp(3, 30.0), ablate(8), count], keep_error=False) as spliced:
            out = model.generate(ids, attention_mask=attention, use_cache=use_cache, **settings)
        n_new = 1 if use_cache else 17 + 11
        assert spliced.top_acts.shape[1] == n_new or len(ids) == 1
        return out

    cached, whole = (generate(IDS, LEFT, use_cache) for use_cache in (True, False))
    assert n_positions == [17, *[1] * 11, *range(17, 29)]
    assert torch.equal(cached.sequences, whole.sequences)
    for with_cache, without in zip(cached.logits, whole.logits, strict=True):
        torch.testing.assert_close(with_cache, without, rtol=1e-3, atol=1e-3)
    plain = model.generate(IDS, attention_mask=LEFT, **settings)
    assert not torch.equal(plain.sequences, cached.sequences)
    alone = generate(IDS[1:2, 6:], LEFT[1:2, 6:], True)
    assert torch.equal(alone.sequences[0], cached.sequences[1, 6:])


def test_gradients_are_those_of_dense_codes(models: dict[str, Any]) -> None:
    """Oracle: autograd through the dense formula, the latents a variable of their own; the embeddings'
    gradient is that of the whole function, x included; the SAE's weights have one where it is asked for."""
    model, sae = models["neox"], seeded_sae().requires_grad_()
    embeddings = model.base_model.embed_in.weight

    def metric() -> Tensor:
        return model(IDS).logits[:, -1, 5].sum()

    variable = []

    def change(x: Tensor) -> Tensor:
        f = dense(sae, x)
        variable.append(f + 0)
        return x + (variable[0] * torch.where(torch.arange(F) == 3, 2.0, 1.0) - f) @ sae.W_dec

    value = by_hand(model, "layers.0", change, metric)
    expected = torch.autograd.grad(value, [variable[0], embeddings, sae.W_dec])
    with splice(model, "layers.0", sae, scale(3, 2.0)) as spliced:
        found = torch.autograd.grad(metric(), [spliced.top_acts, embeddings, sae.W_dec])
    assert (expected[0] != 0).any()
    torch.testing.assert_close(found[0], expected[0].gather(-1, spliced.top_indices), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with splice(model, "layers.0", sae) as watched:
        whole = torch.autograd.grad(metric(), embeddings)
    torch.testing.assert_close(whole, torch.autograd.grad(metric(), embeddings), rtol=1e-4, atol=1e-5)
    assert watched.top_acts.requires_grad


def test_the_latents_have_a_gradient_where_no_weight_asks_for_one(models: dict[str, Any]) -> None:
    """Oracle: the gradient where the model's weights ask for theirs."""
    model, sae = models["neox"], seeded_sae()
    with splice(model, "layers.0", sae) as spliced:
        expected = torch.autograd.grad(model(IDS).logits[:, -1, 5].sum(), spliced.top_acts)
    model.requires_grad_(False)
    try:
        with splice(model, "layers.0", sae) as spliced:
            found = torch.autograd.grad(model(IDS).logits[:, -1, 5].sum(), spliced.top_acts)
    finally:
        model.requires_grad_(True)
    torch.testing.assert_close(found, expected)


def test_splices_at_several_sites_and_at_one(models: dict[str, Any]) -> None:
    """Oracle: hooks of torch at both sites, in the same order."""
    model, first, second = models["gpt2"], seeded_sae(0), seeded_sae(1)

    def run() -> Tensor:
        return model(IDS).logits

    def replace(sae: Sae) -> Callable[[Tensor], Tensor]:
        return lambda x: sae(x).reconstruction

    with torch.no_grad():
        for sites in (("h.0", "h.2"), ("h.1", "h.1")):
            expected = by_hand(
                model,
                sites[0],
                replace(first),
                lambda sites=sites: by_hand(model, sites[1], replace(second), run),
            )
            with (
                splice(model, sites[0], first, keep_error=False),
                splice(model, sites[1], second, keep_error=False),
            ):
                assert torch.equal(run(), expected)
            assert not torch.equal(run(), expected)


@pytest.mark.parametrize("sae_dtype", [torch.float32, torch.bfloat16])
def test_a_bf16_model(sae_dtype: torch.dtype, tiny_models: dict[str, str]) -> None:
    """Oracle: the bare model, bit by bit; the dense formula in float32, rounded to bf16 at the end."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.bfloat16)
    sae = seeded_sae().to(sae_dtype)
    with torch.no_grad():
        expected = model(IDS).logits
        with splice(model, "layers.1", sae) as spliced:
            assert torch.equal(model(IDS).logits, expected)
        assert spliced.top_acts.dtype == sae_dtype
        x_BSD = at(model, "layers.1", lambda: model(IDS))
        with splice(model, "layers.1", sae, clamp(3, 9.0)):
            found = at(model, "layers.1", lambda: model(IDS))
    assert found.dtype == torch.bfloat16
    fired = torch.where(spliced.top_indices == 3, spliced.top_acts, 0).float().sum(-1)
    steered = x_BSD.float() + (9.0 - fired)[..., None] * sae.W_dec[3].float()
    if sae_dtype == torch.float32:
        assert (found != steered.bfloat16()).float().mean() < 1e-3
    else:
        torch.testing.assert_close(found.float(), steered, rtol=0.02, atol=0.1)
