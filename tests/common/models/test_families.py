"""Families of models: each has its own names, limits and course, and saemill says the truth of all."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from torch import Tensor

from saemill import Sae, splice
from saemill.common.errors import ConfigError
from saemill.common.models.architecture import Architecture, limits_of
from saemill.common.models.model import LanguageModel
from saemill.common.models.sites import load_model_config
from saemill.common.models.structure import base_of, text_tower
from saemill.common.sae.parts import SaeConfig

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(4, 60, (2, 24), generator=torch.Generator().manual_seed(0))
LAST = families.N_LAYERS - 1


def assert_same(a: Tensor, b: Tensor) -> None:
    """The same but for the last bit, in which Mamba's own passes differ."""
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def small_sae(width: int) -> Sae:
    generator = torch.Generator().manual_seed(1)
    w, b_enc, b_dec = (torch.randn(shape, generator=generator) for shape in ((64, width), (64,), (width,)))
    return Sae(SaeConfig(d_in=width, num_latents=64, k=4, provenance={}), w.clone(), b_enc, w, b_dec)


@pytest.mark.parametrize("family", [*families.CAUSAL, *families.MASKED])
def test_a_family_is_cached_and_spliced_as_it_is(family: str, made: Any) -> None:
    """Oracle: transformers' `output_hidden_states`, after blocks but the last; its logits; and its kind."""
    folder, whole = made(family)
    architecture = Architecture(load_model_config(str(folder), None))
    sites = [site.name for site in architecture.resolve((0, 1, LAST), ())]
    model = families.load(folder, with_head=True)
    assert model.head == ("masked" if family in families.MASKED else "causal")
    with torch.no_grad():
        told = whole(input_ids=IDS, output_hidden_states=True)
    captured = model.capture(IDS, sites, None)
    first = 0 if family in ("mamba", "rwkv") else 1  # whether what enters block 0 is among them
    for i in (0, 1):
        assert_same(captured[sites[i]], told.hidden_states[i + first])
    assert_same(model.logits(IDS, None), told.logits)
    with model.splice(sites[1], torch.clone):
        assert_same(model.logits(IDS, None), told.logits)
    with model.splice(sites[1], torch.zeros_like):
        assert (model.logits(IDS, None) - told.logits).abs().max() > 1e-3
    assert model.sees_later_tokens(IDS) == (family in families.MASKED)


@pytest.mark.parametrize("family", [*families.CAUSAL, *families.MASKED])
def test_an_sae_is_spliced_into_any_family(family: str, made: Any) -> None:
    """Oracle: the model's own logits with the error kept, and others where zeros are decoded."""
    _, whole = made(family)
    sae = small_sae(32)
    every = torch.ones_like(IDS, dtype=torch.bool)
    with torch.no_grad():
        plain = whole(input_ids=IDS).logits
        with splice(whole, "residual.1", sae, where=every) as spliced:
            assert_same(whole(input_ids=IDS).logits, plain)
        assert spliced.top_acts.shape == (2, 24, 4)
        with splice(whole, "residual.1", sae, where=every, keep_error=False):
            assert (whole(input_ids=IDS).logits - plain).abs().max() > 1e-3


@pytest.mark.parametrize("family", [*families.CAUSAL, *families.MASKED, "albert", "t5", "bart", "xlnet"])
def test_the_longest_row_is_what_the_model_takes(family: str, made: Any) -> None:
    """Oracle: the model itself, run on rows of that length, and of one more where it looks positions up."""
    folder, whole = made(family)
    limit = limits_of(load_model_config(str(folder), None)).row_length
    offset = 2 if family in ("roberta", "xlm-roberta", "camembert", "mpnet", "esm") else 0
    expected = {"bloom": None, "mamba": None, "t5": None, "xlnet": None, "falcon": 2048, "llava": 2048}
    assert limit == expected.get(family, 40 - offset)
    reader = whole.get_encoder() if whole.config.is_encoder_decoder else whole
    _, tower = text_tower(base_of(whole))
    if limit is not None and limit < 100:
        with torch.no_grad():
            reader(input_ids=torch.full((1, limit), 5))
    if re.search(r"position_embeddings?\.|embed_positions|wpe", " ".join(dict(tower.named_parameters()))):
        assert limit is not None
        with pytest.raises((IndexError, RuntimeError)), torch.no_grad():
            reader(input_ids=torch.full((1, limit + 1), 5))


@pytest.mark.parametrize("family", [*families.CAUSAL, *families.MASKED, "t5", "bart"])
def test_every_site_is_what_the_model_computes_there(family: str, made: Any) -> None:
    """Oracle: hooks and pre-hooks on transformers' own model, of every module, written here."""
    folder, whole = made(family)
    base = base_of(whole)
    sites = list(Architecture(load_model_config(str(folder), None)).widths)
    found = families.load(folder).capture(IDS, sites, None)
    own: dict[str, Tensor] = {}

    def note(site: str, x: Any) -> None:
        own[site] = x.clone() if isinstance(x, Tensor) else x

    for name, module in base.named_modules():
        module.register_forward_pre_hook(
            lambda _m, given, named, name=name: note(
                f"{name}:in", given[0] if given else named.get("hidden_states")
            ),
            with_kwargs=True,
        )
        module.register_forward_hook(
            lambda _m, _g, output, name=name: note(name, output[0] if type(output) is tuple else output)
        )
    try:
        with torch.no_grad():
            (base.get_encoder() if base.config.is_encoder_decoder else base)(input_ids=IDS)
    finally:
        for module in base.modules():
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()
    assert any(site.endswith(":in") for site in sites)
    for site in sites:
        assert_same(found[site], own[site])


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gemma2", "bloom", "opt", "bert", "modernbert"])
def test_an_input_is_replaced(family: str, made: Any) -> None:
    """Oracle: a pre-hook on transformers' own model, written here; also where blocks before it are left out,
    and where an SAE is spliced in, whose reconstruction the pre-hook computes."""
    folder, whole = made(family)
    model, sae = families.load(folder, with_head=True), small_sae(32)
    block = model.blocks[1]
    within = [site for site in Architecture(model.config).widths if site.startswith(f"{block}.")]
    inner = next(site for site in within if re.search(r"(dense|o_proj|out_proj|Wo|c_proj):in$", site))
    for site in (f"{block}:in", inner):
        module = base_of(whole).get_submodule(site.removesuffix(":in"))

        def change(x: Tensor) -> Tensor:
            return sae.decode(*sae.encode(x), x)

        def hook(_m: Any, given: Any, named: Any) -> Any:
            if given:
                return (change(given[0]), *given[1:]), named
            return given, named | {"hidden_states": change(named["hidden_states"])}

        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        with torch.no_grad():
            expected = whole(input_ids=IDS).logits
            handle.remove()
            assert (whole(input_ids=IDS).logits - expected).abs().max() > 1e-5
            every = torch.ones_like(IDS, dtype=torch.bool)
            with splice(whole, site, sae, keep_error=False, where=every):
                assert_same(whole(input_ids=IDS).logits, expected)
        with model.splice(site, change):
            assert_same(model.logits(IDS, None), expected)
        skipped = model.blocks_to(site)
        assert skipped == ([model.blocks[0]] if site == f"{block}:in" else [])
        if not model.tuple_sites:
            instead = change(model.capture(IDS, [site], None)[site])
            with model.skip_blocks_to(site), model.splice(site, lambda _, instead=instead: instead):
                assert_same(model.logits(IDS, None), expected)


def test_layers_are_those_of_the_language_tower(made: Any) -> None:
    """Oracle: LLaVA's paths, written out; its vision tower has as many layers, and runs not on text."""
    folder, _ = made("llava")
    architecture = Architecture(load_model_config(str(folder), None))
    assert architecture.blocks == [f"language_model.layers.{i}" for i in range(families.N_LAYERS)]
    with pytest.raises(ConfigError, match=r"vision_tower\.encoder\.layers\.0 never runs on text alone"):
        architecture.resolve((), ("vision_tower.encoder.layers.0",))


@pytest.mark.parametrize(("family", "site"), [("t5", "encoder.block.1"), ("bart", "encoder.layers.1")])
def test_an_encoder_is_run_alone(family: str, site: str, made: Any) -> None:
    """Oracle: transformers' hidden states of the encoder; the decoder's sites, and layers, are refused."""
    folder, whole = made(family)
    architecture = Architecture(load_model_config(str(folder), None))
    (found,) = architecture.resolve((), (site,))
    with torch.no_grad():
        states = whole.get_encoder()(input_ids=IDS, output_hidden_states=True).hidden_states
    model = families.load(folder, with_head=True)
    assert model.head is None
    assert torch.equal(model.capture(IDS, [found.name], None)[found.name], states[2])
    for what in (
        ((0,), ()),
        ((), (site.replace("encoder", "decoder"),)),
        ((), (site.replace("encoder", "*"),)),
    ):
        with pytest.raises(
            ConfigError, match=r"is an encoder-decoder model, of which only the encoder is run"
        ):
            architecture.resolve(*what)


@pytest.mark.parametrize("family", ["whisper", "clip", "vit", "longformer", "xlnet"])
def test_models_that_do_not_run_on_tokens_alone_are_refused_by_name(family: str) -> None:
    """Oracle: models of sound and images; and some that look at the tokens' values on their way."""
    config = families.OTHERS[family]()
    with pytest.raises(ConfigError, match=rf"(?i)^{family}Model cannot be run .*choose a language model"):
        Architecture(config)


def test_a_config_of_a_billion_layers_is_refused() -> None:
    """Oracle: it would be built layer by layer, for hours."""
    with pytest.raises(ConfigError, match="says 1,000,000,000 layers"):
        limits_of(transformers.LlamaConfig(**families.SIZE | {"num_hidden_layers": 10**9}))


def test_what_is_no_site_is_told_with_what_is(made: Any) -> None:
    """Oracle: OPT's MLP flattens rows; ALBERT's layers are one module; what is named instead is a site."""
    opt = Architecture(load_model_config(str(made("opt")[0]), None))
    albert = Architecture(load_model_config(str(made("albert")[0]), None))
    shared = "encoder.albert_layer_groups.0.albert_layers.0"
    for architecture, layers, pattern, why in (
        (opt, (), "decoder.layers.1.fc2", r"fc2 gives \[6, 32\] for 2 rows of 3"),
        (albert, (), shared, "runs 3 times in a pass"),
        (albert, (0,), shared, "has no list of one block per layer"),
    ):
        with pytest.raises(ConfigError, match=why) as error:
            architecture.resolve(layers, (pattern,))
        advised = re.split(r"such as |it has ", str(error.value))[1].split(", …")[0].split(", ")
        assert [site.name for site in architecture.resolve((), tuple(advised))]
    near = "decoder.layers.1, decoder.layers.1.self_attn.k_proj"
    with pytest.raises(ConfigError, match=near.split(", ")[0]):
        opt.resolve((), ("decoder.layers.1.fc2",))


def test_a_bidirectional_model_whose_class_says_lm_head(tmp_path: Path) -> None:
    """Oracle: BERT's LM head sees later tokens unless the config says that it is a decoder; also in bf16."""
    for is_decoder in (False, True):
        torch.manual_seed(0)
        config = transformers.BertConfig(**families.COMMON, is_decoder=is_decoder)
        transformers.BertLMHeadModel(config).save_pretrained(tmp_path / str(is_decoder))
        for dtype in (torch.float32, torch.bfloat16):
            model = LanguageModel(
                str(tmp_path / str(is_decoder)), revision=None, dtype=dtype, device=torch.device("cpu"),
                with_head=True,
            )  # fmt: skip
            assert model.head == "causal"
            assert model.sees_later_tokens(IDS) is not is_decoder


@contextmanager
def seen(model: Any, site: str) -> Iterator[list[Tensor]]:
    """What leaves a module while the block runs."""
    found: list[Tensor] = []

    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).clone())

    handle = base_of(model).get_submodule(site).register_forward_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("family", "site"), [("rwkv", "blocks.1"), ("llama", "layers.1"), ("opt", "decoder.layers.1")]
)
def test_padding_is_not_spliced_whatever_the_head_hands_on(family: str, site: str, made: Any) -> None:
    """Oracle: the site's activations without the splice, at padding; RWKV's head keeps the mask to itself."""
    _, model = made(family)
    mask = torch.ones_like(IDS)
    mask[0, :9] = 0
    with torch.no_grad():
        with seen(model, site) as plain:
            model(input_ids=IDS, attention_mask=mask)
        with splice(model, site, small_sae(32), keep_error=False) as spliced, seen(model, site) as changed:
            model(input_ids=IDS, attention_mask=mask)
    assert torch.equal(spliced.where, mask.bool())
    same = (plain[0] == changed[0]).all(-1)
    assert torch.equal(same, ~mask.bool())
