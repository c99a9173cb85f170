"""Where a splice acts: positions, padding, heads and bases; and what cannot be spliced."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import transformers
from splicing import IDS, LEFT, LEFT_OUT, D, F, K, at, n_hooks, seeded_sae
from torch import Tensor

from saemill import ablate, splice, steer
from saemill.common.errors import ConfigError
from saemill.common.steer.forward_pass import count_before

pytestmark = pytest.mark.usefixtures("one_thread")


def test_where_says_which_count_before(models: dict[str, Any]) -> None:
    """Oracle: the activation at each position, changed by exactly 5·W_dec[3] or bit by bit the same."""
    model, sae = models["neox"], seeded_sae(left_out=LEFT_OUT)
    chosen = torch.rand(3, 17, generator=torch.Generator().manual_seed(1)) < 0.4
    after_4 = (LEFT.cumsum(1) > 5) & (LEFT > 0)
    cases: list[tuple[Any, Tensor]] = [
        (chosen, chosen & (LEFT > 0)),
        (lambda ids, _: ids == IDS[1, -1], (IDS[1, -1] == IDS) & (LEFT > 0)),
        (lambda _, position: position > 4, after_4),
    ]
    with torch.no_grad():
        x_BSD = at(model, "layers.1", lambda: model(IDS, attention_mask=LEFT))
        for where, expected in cases:
            with splice(model, "layers.1", sae, steer(3, 5.0), where=where) as spliced:
                found = at(model, "layers.1", lambda: model(IDS, attention_mask=LEFT))
            assert torch.equal(spliced.where, expected)
            assert torch.equal(found[~expected], x_BSD[~expected])
            difference = (found - x_BSD)[expected]
            torch.testing.assert_close(
                difference, (5 * sae.W_dec[3]).expand_as(difference), rtol=0, atol=1e-4
            )


class Cache:
    """A cache that holds 5 tokens."""

    def get_seq_length(self) -> int:
        return 5


def test_positions_are_counted_without_padding() -> None:
    """Oracle: by hand; a cache that does not tell its length is refused."""
    x = torch.zeros(2, 3, D)
    five_to_seven = [[5, 6, 7]] * 2
    attention = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    cases: list[tuple[dict[str, Any], list[list[int]]]] = [
        ({}, [[0, 1, 2]] * 2),
        ({"past_key_values": Cache()}, five_to_seven),
        ({"attention_mask": attention, "past_key_values": Cache()}, [[0, 1, 2], [2, 3, -1]]),
        ({"attention_mask": torch.ones(2, 1, 3, 8), "past_key_values": Cache()}, five_to_seven),
        ({"attention_mask": torch.ones(2, 1, 3, 8), "position_ids": torch.arange(5, 8)[None]}, five_to_seven),
    ]
    for arguments, expected in cases:
        assert count_before(arguments, x).tolist() == expected
    with pytest.raises(ConfigError, match="use_cache=False"):
        count_before({"cache_params": object()}, x)


def test_the_site_is_told_by_the_sae(models: dict[str, Any]) -> None:
    """Oracle: the site named outright; another tool's SAE names TransformerLens' hook."""
    model = models["gpt2"]
    with torch.no_grad():
        with splice(model, "h.1", seeded_sae(), keep_error=False):
            expected = model(IDS).logits
        for provenance in ({"site": "h.1"}, {"hook_name": "blocks.1.hook_resid_post"}):
            with splice(model, None, seeded_sae(**provenance), keep_error=False):
                assert torch.equal(model(IDS).logits, expected)


BAD: dict[str, tuple[Callable[[Any, Any], AbstractContextManager[Any]], str]] = {
    "no site": (lambda m, s: splice(m, None, s), "does not tell its site"),
    "another model's site": (lambda m, s: splice(m, "h.1", s), "GPTNeoXModel has no module 'h.1'; "),
    "a misspelt site": (lambda m, s: splice(m, "layer.1", s), r"did you mean .*layers\.1"),
    "another width": (lambda m, s: splice(m, "layers.1", seeded_sae(d=16)), "width 16, but .* have 32"),
    "a module beside the stream": (lambda m, s: splice(m, "rotary_emb", s), "one vector per token"),
    "a module that never runs": (lambda m, s: splice(m, "layers", s), "nothing ran through layers"),
    "another device": (lambda m, s: splice(m, "layers.1", seeded_sae().to("meta")), r"sae.to\('cpu'\)"),
    "a latent too many": (lambda m, s: splice(m, "layers.1", s, ablate(3, F)), r"in 0\.\.95 .*, got 96"),
    "a negative latent": (lambda m, s: splice(m, "layers.1", s, [steer(-1, 2.0)]), "got -1"),
    "no latent": (lambda m, s: splice(m, "layers.1", s, ablate()), "no effect without latents"),
    "an edit that returns nothing": (
        lambda m, s: splice(m, "layers.1", s, lambda codes: None), r"\(3, 17, 'k'\), got None",
    ),
    "an edit of other positions": (
        lambda m, s: splice(m, "layers.1", s, lambda c: (c.top_acts[:, 1:], c.top_indices[:, 1:])), "16, 6",
    ),
    "a mask of another shape": (
        lambda m, s: splice(m, "layers.1", s, where=torch.ones(3, 16, dtype=torch.bool)), r"bool \(3, 17\)",
    ),
    "no transformer": (lambda m, s: splice(s, "layers.1", s), "HuggingFace transformer, got Sae"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_spliced_is_refused(case: str, models: dict[str, Any]) -> None:
    """Oracle: the messages; no hook is left."""
    make, message = BAD[case]
    before = n_hooks(models["neox"])
    with torch.no_grad(), pytest.raises(ConfigError, match=message), make(models["neox"], seeded_sae()):
        models["neox"](IDS)
    assert n_hooks(models["neox"]) == before


def test_without_token_ids_positions_need_a_mask(models: dict[str, Any]) -> None:
    """Oracle: the logits with token ids; their embeddings say nothing of special tokens."""
    model, sae = models["neox"], seeded_sae(left_out=LEFT_OUT)
    embeddings = model.base_model.embed_in(IDS)
    with torch.no_grad():
        with splice(model, "layers.1", sae, ablate(3)) as spliced:
            expected = model(IDS).logits
        with pytest.raises(ConfigError, match="without input_ids"), splice(model, "layers.1", sae):
            model(inputs_embeds=embeddings)
        with splice(model, "layers.1", sae, ablate(3), where=spliced.where):
            assert torch.equal(model(inputs_embeds=embeddings).logits, expected)


def test_a_block_that_fails_or_runs_nothing(models: dict[str, Any]) -> None:
    """Oracle: the block's own error; before a forward pass there is nothing to read, after one the latest."""
    model, sae = models["neox"], seeded_sae()
    before = n_hooks(model)
    with pytest.raises(ZeroDivisionError), splice(model, "layers.1", sae):
        raise ZeroDivisionError
    with pytest.raises(ConfigError, match="nothing ran"), splice(model, "layers.1", sae):
        models["llama"](IDS)
    assert n_hooks(model) == before
    with torch.no_grad(), splice(model, "layers.1", sae) as spliced:
        with pytest.raises(ConfigError, match="nothing ran"):
            _ = spliced.top_acts
        model(IDS)
        model(IDS[:2, :9])
        assert spliced.top_acts.shape == (2, 9, K)


def test_the_model_with_its_head_or_its_base(models: dict[str, Any]) -> None:
    """Oracle: the activations on their own; OPT with a head calls only its base model's decoder."""
    config = transformers.OPTConfig(
        vocab_size=8192, hidden_size=D, word_embed_proj_dim=D, num_hidden_layers=2, num_attention_heads=2,
        ffn_dim=64, max_position_embeddings=64,
    )  # fmt: skip
    opt, sae = transformers.AutoModelForCausalLM.from_config(config).eval(), seeded_sae(left_out=LEFT_OUT)
    keep = (torch.arange(17) > 0) & (IDS[0, 4] != IDS)
    with torch.no_grad():
        for model, site in ((opt, "decoder.layers.0"), (models["neox"], "layers.0")):
            x_BSD = at(model, site, lambda model=model: model(IDS))
            codes = sae.encode(x_BSD)
            for called in (model, model.base_model):
                with splice(model, site, sae) as spliced:
                    called(IDS)
                assert torch.equal(spliced.top_acts, codes.top_acts)
                assert torch.equal(spliced.where, keep)
        with pytest.raises(ConfigError, match="as a whole"), splice(model, "layers.0", sae):
            model.base_model.layers[0](x_BSD, position_embeddings=model.base_model.rotary_emb(x_BSD, IDS))


def test_a_module_that_runs_twice_is_refused() -> None:
    """Oracle: ALBERT, whose layers are one module."""
    config = transformers.AlbertConfig(
        vocab_size=50, embedding_size=8, hidden_size=D, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.AlbertModel(config).eval()
    site = "encoder.albert_layer_groups.0.albert_layers.0"
    with pytest.raises(ConfigError, match="more than once"), splice(model, site, seeded_sae()):
        model(IDS % 50)


def test_a_list_of_edits_may_be_of_any_length(models: dict[str, Any]) -> None:
    """Oracle: no edit at all."""
    model, sae = models["neox"], seeded_sae()
    edits: Sequence[Any] = []
    with torch.no_grad():
        expected = model(IDS).logits
        with splice(model, "layers.1", sae, edits):
            assert torch.equal(model(IDS).logits, expected)
