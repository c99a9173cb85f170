"""The model: what is captured is what transformers computes, and splicing changes what it should."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

from saemill.common.device import choose_device
from saemill.common.errors import ConfigError
from saemill.common.models.architecture import Architecture, Limits, check_row_length, limits_of
from saemill.common.models.model import (
    LanguageModel,
    attention_of,
    choose_model_dtype,
    fingerprint_model,
)
from saemill.common.stores.tokens import TokenizerInfo

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("neox", "llama", "gpt2", "bert")
BLOCKS = {"neox": "layers", "llama": "layers", "gpt2": "h", "bert": "encoder.layer"}
FINAL_NORM = {"neox": "final_layer_norm", "llama": "norm", "gpt2": "ln_f", "bert": None}
PARTS = {
    "neox": ("layers.0.attention", "layers.1.mlp", "layers.2.mlp.dense_h_to_4h"),
    "llama": ("layers.0.self_attn", "layers.1.mlp", "layers.2.self_attn.k_proj"),
    "gpt2": ("h.0.attn", "h.1.mlp", "h.2.mlp.c_fc"),
    "bert": ("embeddings", "encoder.layer.0.attention", "encoder.layer.1.output.dense"),
}
IDS = torch.randint(1, 8192, (3, 17), generator=torch.Generator().manual_seed(0))
ATTENTION = (torch.arange(17) < torch.tensor([[17], [11], [5]])).long()
INFO = TokenizerInfo(
    name="some-tokenizer", hash="", vocab_size=8192, prefix_ids=(), suffix_ids=(), separator_id=0,
    special_ids=(0,), pad_id=0, mask_id=None,
)  # fmt: skip


def load(folder: str, with_head: bool = False) -> LanguageModel:
    return LanguageModel(
        folder, revision=None, dtype=torch.float32, device=torch.device("cpu"), with_head=with_head
    )


def mask_for(kind: str) -> Tensor | None:
    return ATTENTION if kind == "bert" else None


def hooked(model: Any, names: tuple[str, ...], run: Callable[[], object]) -> dict[str, Tensor]:
    """Outputs of modules while `run` runs, copied at once."""
    found: dict[str, Tensor] = {}
    handles = []
    for name in names:

        def hook(_module: object, _inputs: object, output: Any, name: str = name) -> None:
            found[name] = (output[0] if isinstance(output, tuple) else output).clone()

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return found


@pytest.fixture(scope="module")
def bare(tiny_models: dict[str, str]) -> dict[str, LanguageModel]:
    return {kind: load(tiny_models[kind]) for kind in KINDS}


@pytest.fixture(scope="module")
def headed(tiny_models: dict[str, str]) -> dict[str, LanguageModel]:
    return {kind: load(tiny_models[kind], with_head=True) for kind in KINDS}


@pytest.fixture(scope="module")
def plain(tiny_models: dict[str, str]) -> dict[str, Any]:
    """The same checkpoints by transformers alone."""
    return {kind: transformers.AutoModel.from_pretrained(tiny_models[kind]).eval() for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_the_models_hidden_states(
    kind: str, bare: dict[str, LanguageModel], plain: dict[str, Any]
) -> None:
    """Oracle: transformers' `output_hidden_states`, whose last entry has passed the final norm."""
    model = plain[kind]
    with torch.no_grad():
        states = model(IDS, attention_mask=mask_for(kind), output_hidden_states=True).hidden_states
    names = [f"{BLOCKS[kind]}.{i}" for i in range(3)]
    together = bare[kind].capture(IDS, names, mask_for(kind))
    assert len(states) == 4
    assert sorted(together) == names
    for i, name in enumerate(names):
        alone = bare[kind].capture(IDS, [name], mask_for(kind))[name]
        assert torch.equal(alone, together[name])
        assert alone.shape == (3, 17, 32)
        if i == 2 and FINAL_NORM[kind]:
            with torch.no_grad():
                alone = model.get_submodule(FINAL_NORM[kind])(alone)
        assert torch.equal(alone, states[i + 1])
        assert not torch.equal(alone, states[i])


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_blocks_are_what_their_modules_give(
    kind: str, bare: dict[str, LanguageModel], plain: dict[str, Any]
) -> None:
    """Oracle: forward hooks on an independently loaded model that runs to its end."""
    model = plain[kind]
    expected = hooked(model, PARTS[kind], lambda: model(IDS, attention_mask=mask_for(kind)))
    found = bare[kind].capture(IDS, list(PARTS[kind]), mask_for(kind))
    assert sorted(found) == sorted(PARTS[kind])
    for name in PARTS[kind]:
        assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_pass_stops_after_the_last_site(kind: str, bare: dict[str, LanguageModel]) -> None:
    """Oracle: a count of the calls of each block; and no hook is left behind."""
    model, block = bare[kind], BLOCKS[kind]
    called: list[int] = []
    handles = [
        model.base.get_submodule(f"{block}.{i}").register_forward_pre_hook(lambda *_, i=i: called.append(i))
        for i in range(3)
    ]
    model.capture(IDS, [f"{block}.0"], mask_for(kind))
    assert called == [0]
    model.capture(IDS, [f"{block}.1", f"{block}.0"], mask_for(kind))
    assert called == [0, 0, 1]
    model.capture(IDS, [f"{block}.2"], mask_for(kind))
    assert called[-3:] == [0, 1, 2]
    for handle in handles:
        handle.remove()
    assert not any(module._forward_hooks for module in model.base.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_splicing_the_activation_itself_changes_nothing(
    kind: str, headed: dict[str, LanguageModel], tiny_models: dict[str, str]
) -> None:
    """Oracle: the logits of transformers' own model with head."""
    auto = transformers.AutoModelForMaskedLM if kind == "bert" else transformers.AutoModelForCausalLM
    with torch.no_grad():
        expected = auto.from_pretrained(tiny_models[kind]).eval()(IDS, attention_mask=mask_for(kind)).logits
    model = headed[kind]
    assert model.head == ("masked" if kind == "bert" else "causal")
    assert torch.equal(model.logits(IDS, mask_for(kind)), expected)
    for site in (f"{BLOCKS[kind]}.1", *PARTS[kind]):
        with model.splice(site, lambda x: x.clone()):
            assert torch.equal(model.logits(IDS, mask_for(kind)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_splicing_zeros_changes_the_logits_while_it_lasts(
    kind: str, headed: dict[str, LanguageModel]
) -> None:
    """Oracle: after zeros in the last block every position of a model has the same logits."""
    model, last = headed[kind], f"{BLOCKS[kind]}.2"
    before = model.logits(IDS, mask_for(kind))
    for site in (last, *PARTS[kind]):
        with model.splice(site, torch.zeros_like):
            changed = model.logits(IDS, mask_for(kind))
        assert (changed - before).abs().max() > 1e-3
        if site == last:
            torch.testing.assert_close(changed, changed[:1, :1].expand_as(changed))
    assert torch.equal(model.logits(IDS, mask_for(kind)), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_spliced_value_is_what_later_blocks_see(
    kind: str, headed: dict[str, LanguageModel], plain: dict[str, Any]
) -> None:
    """Oracle: the next block of an independent model, called on the changed activation, by its hook."""
    block, model = BLOCKS[kind], plain[kind]

    def change(x: Tensor) -> Tensor:
        return x.flip(-1) * 1.5

    def hook(_module: object, _inputs: object, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = model.get_submodule(f"{block}.0").register_forward_hook(hook)
    expected = hooked(model, (f"{block}.1",), lambda: model(IDS, attention_mask=mask_for(kind)))
    handle.remove()
    with headed[kind].splice(f"{block}.0", change):
        found = headed[kind].capture(IDS, [f"{block}.1"], mask_for(kind))
    assert torch.equal(found[f"{block}.1"], expected[f"{block}.1"])
    with pytest.raises(ZeroDivisionError), headed[kind].splice(f"{block}.0", lambda x: x * (1 // 0)):
        headed[kind].logits(IDS, mask_for(kind))
    assert not any(module._forward_hooks for module in headed[kind].base.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_up_to_a_replaced_residual_stream_need_not_run(
    kind: str, headed: dict[str, LanguageModel]
) -> None:
    """Oracle: the logits with all blocks run; the calls of parts of each block; and the logits after."""
    model, block = headed[kind], BLOCKS[kind]
    whole = model.logits(IDS, mask_for(kind))
    parts = {i: next(model.modules[f"{block}.{i}"].children()) for i in range(3)}
    called: list[int] = []
    handles = [part.register_forward_pre_hook(lambda *_, i=i: called.append(i)) for i, part in parts.items()]
    with model.splice(f"{block}.1", lambda x: torch.linspace(-1, 1, x.numel()).view_as(x)):
        expected = model.logits(IDS, mask_for(kind))
        assert called == [0, 1, 2]
        with model.skip_blocks_to(f"{block}.1"):
            assert torch.equal(model.logits(IDS, mask_for(kind)), expected)
        assert called[3:] == [2]
        with model.skip_blocks_to(PARTS[kind][0]):
            assert torch.equal(model.logits(IDS, mask_for(kind)), expected)
        assert called[4:] == [0, 1, 2]
    for handle in handles:
        handle.remove()
    assert not torch.equal(whole, expected)
    assert torch.equal(model.logits(IDS, mask_for(kind)), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_site_names_hold_with_a_head_too(
    kind: str, bare: dict[str, LanguageModel], headed: dict[str, LanguageModel]
) -> None:
    """Oracle: the architecture found without weights; and the values without a head."""
    names = list(Architecture(headed[kind].config).widths)
    assert {name.removesuffix(":in") for name in names} <= set(headed[kind].modules)
    for name, x_RSD in headed[kind].capture(IDS, names, mask_for(kind)).items():
        assert torch.equal(x_RSD, bare[kind].capture(IDS, [name], mask_for(kind))[name])


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_without_head_has_none(kind: str, plain: dict[str, Any], tmp_path: Path) -> None:
    """Oracle: the base model saved alone; its activations are those of the whole checkpoint's base."""
    plain[kind].save_pretrained(tmp_path)
    model = load(str(tmp_path), with_head=True)
    assert model.head is None
    assert model.config.architectures == [type(plain[kind]).__name__]
    name = f"{BLOCKS[kind]}.1"
    with torch.no_grad():
        states = plain[kind](IDS, attention_mask=mask_for(kind), output_hidden_states=True).hidden_states
    assert torch.equal(model.capture(IDS, [name], mask_for(kind))[name], states[2])


def test_a_pretraining_checkpoint_has_a_masked_head(tiny_models: dict[str, str], tmp_path: Path) -> None:
    """Oracle: `BertForPreTraining`, as google-bert's checkpoints are, holds the MLM head's weights."""
    config = transformers.AutoConfig.from_pretrained(tiny_models["bert"])
    whole = transformers.BertForPreTraining(config).eval()
    whole.save_pretrained(tmp_path)
    model = load(str(tmp_path), with_head=True)
    assert model.head == "masked"
    with torch.no_grad():
        assert torch.equal(model.logits(IDS, ATTENTION), whole(IDS, ATTENTION).prediction_logits)


def test_in_place_additions_do_not_reach_what_was_captured(tmp_path: Path) -> None:
    """Oracle: the MLP's output captured alone; Falcon adds the attention's output to it in place."""
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=8192, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, parallel_attn=True
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load(str(tmp_path))
    alone = model.capture(IDS, ["h.0.mlp"], None)["h.0.mlp"]
    assert torch.equal(model.capture(IDS, ["h.0.mlp", "h.1"], None)["h.0.mlp"], alone)


def test_a_checkpoint_that_lacks_weights_is_refused(tiny_models: dict[str, str], tmp_path: Path) -> None:
    """Oracle: the tensor that was taken out; transformers alone would fill it with noise."""
    shutil.copytree(tiny_models["neox"], tmp_path, dirs_exist_ok=True)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del weights["gpt_neox.layers.1.mlp.dense_4h_to_h.weight"]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks weights: .*layers\.1\.mlp\.dense_4h_to_h\.weight"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"not JSON"),
        ("config.json", b"[]"),
        ("config.json", b'"gpt_neox"'),
        ("config.json", b'{"model_type": "gpt_neox", "hidden_size": "wide"}'),
        ("config.json", b'{"model_type": "gpt_neox", "num_hidden_layers": -3, "num_attention_heads": 0}'),
        ("config.json", b'{"model_type": "gpt_neox", "hidden_size": 1e300}'),
        ("config.json", b'{"model_type": "nothing_known"}'),
        ("config.json", b'{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}'),
        ("config.json", b"\xff\xfe\x00"),
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 64),
        ("model.safetensors", b"cut"),
    ],
)
def test_damaged_folders_are_refused_in_words(
    file: str, content: bytes, tiny_models: dict[str, str], tmp_path: Path
) -> None:
    """Oracle: whole files of the folder exchanged; only a ConfigError comes, without Python's words."""
    shutil.copytree(tiny_models["neox"], tmp_path, dirs_exist_ok=True)
    if file == "model.safetensors" and content == b"cut":
        content = (tmp_path / file).read_bytes()[:-1000]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ConfigError, match="cannot load the model") as error:
        Architecture(load(str(tmp_path)).config)
    assert "trust_remote_code" not in str(error.value)


def test_a_folder_without_weights_is_refused(tiny_models: dict[str, str], tmp_path: Path) -> None:
    """Oracle: a config alone is no model."""
    shutil.copy(Path(tiny_models["neox"]) / "config.json", tmp_path)
    with pytest.raises(ConfigError, match="cannot load the model"):
        load(str(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_the_model_cannot_take_are_refused(kind: str, bare: dict[str, LanguageModel]) -> None:
    """Oracle: a context of 128 and 8,192 ids, both inclusive."""
    limits = limits_of(bare[kind].config)
    assert limits == Limits(n_ids=8192, row_length=128)
    check_row_length(limits, "m", 128)
    with pytest.raises(ConfigError, match=r"rows have 129 tokens, but 'm' takes at most 128"):
        check_row_length(limits, "m", 129)


def test_only_an_encoders_padding_is_hidden() -> None:
    """Oracle: by hand; a decoder's padding id is its separator and says nothing."""
    ids = torch.tensor([[5, 0, 7, 0]])
    assert attention_of(ids, INFO) is None
    assert attention_of(ids, INFO.model_copy(update={"mask_id": 3, "pad_id": None})) is None
    mask = attention_of(ids, INFO.model_copy(update={"mask_id": 3}))
    assert mask is not None
    assert mask.tolist() == [[1, 0, 1, 0]]


def test_the_fingerprint_follows_the_weights_and_not_the_place(
    tiny_models: dict[str, str], tmp_path: Path
) -> None:
    """Oracle: a copy is the same model; one changed number or setting makes another."""
    first = fingerprint_model(tiny_models["neox"], None)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_models["neox"], copy)
    assert fingerprint_model(str(copy), None) == first
    weights = safetensors.torch.load_file(copy / "model.safetensors")
    weights["gpt_neox.layers.1.mlp.dense_4h_to_h.bias"][3] += 1
    safetensors.torch.save_file(weights, copy / "model.safetensors", {"format": "pt"})
    second = fingerprint_model(str(copy), None)
    (copy / "config.json").write_text((copy / "config.json").read_text().replace("0.25", "0.5"))
    assert len({first, second, fingerprint_model(str(copy), None)}) == 3


def test_devices_and_types_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: bf16 on a GPU and fp32 on a CPU unless named; a GPU that is not there is refused."""
    for there, device in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert choose_device("auto") == torch.device(device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="got 'gpu'"):
        choose_device("gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"'cuda:1' asked for, but torch .* sees 1 GPU$"):
        choose_device("cuda:1")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_model_dtype("auto", cpu) is torch.float32
    assert choose_model_dtype("auto", gpu) is torch.bfloat16
    assert choose_model_dtype("fp16", cpu) is torch.float16
    assert choose_model_dtype("fp32", gpu) is torch.float32
