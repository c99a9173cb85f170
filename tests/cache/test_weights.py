"""Weights that lie over several devices, or in fewer bits: what they compute, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from caching import cache, hidden_states
from crashes import file_hashes

from saemill.cache.config import CacheConfig
from saemill.cache.run import run
from saemill.common.errors import ConfigError
from saemill.common.models import cached
from saemill.common.models.model import LanguageModel
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.tokens import TokenStore
from saemill.common.weights import Weights

pytestmark = pytest.mark.usefixtures("one_thread")
ON_DISK = {"device_map": "auto", "max_memory": ("cpu=2150KB",)}
"""The tiny model has 2.2 MB of weights in fp32."""
CPU = torch.device("cpu")
PLACE = {
    **{"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
}
"""What torchrun tells the first of two processes."""


def test_a_model_on_the_disk_writes_the_same_store(
    made: ActivationStore, tokens: TokenStore, neox: str, tmp_path: Path
) -> None:
    """Oracle: the store of the same model in memory, byte for byte."""
    store = cache(tokens, neox, tmp_path / "acts", layers=(0, 1), **ON_DISK)
    assert file_hashes(store.path) == file_hashes(made.path)


def test_a_model_on_the_disk_is_spliced_and_skipped(made: ActivationStore, neox: str) -> None:
    """Oracle: the logits of the model in memory with the same splice; and its forwards, before blocks were
    skipped."""
    weights = Weights(**ON_DISK)  # type: ignore[arg-type]
    whole, spread = (cached.load_model(neox, made, None, CPU, spread=how) for how in (Weights(), weights))
    assert {str(place) for place in spread.model.hf_device_map.values()} == {"cpu", "disk"}
    ids_RS = torch.from_numpy(made.tokens.rows(0, 2).astype("int64"))

    def logits(model: LanguageModel, skip: bool) -> torch.Tensor:
        x_RSD = model.capture(ids_RS, ["layers.1"], None)["layers.1"]
        with model.splice("layers.1", lambda _: x_RSD * 2):
            if skip:
                with model.skip_blocks_to("layers.1"):
                    return model.logits(ids_RS, None)
            return model.logits(ids_RS, None)

    forwards = [spread.modules[block].forward for block in spread.blocks]
    for skip in (False, True, False):
        assert torch.equal(logits(spread, skip), logits(whole, skip))
    # accelerate's, which bring a block's input to its device
    assert [vars(spread.modules[block])["forward"] for block in spread.blocks] == forwards


@pytest.mark.parametrize(
    ("bits", "layer", "bound"), [("load_in_8bit", "Linear8bitLt", 0.1), ("load_in_4bit", "Linear4bit", 0.5)]
)
def test_weights_in_fewer_bits(
    bits: str, layer: str, bound: float, tokens: TokenStore, neox: str, tmp_path: Path
) -> None:
    """Oracle: transformers' hidden states in fp32, from which rounded weights differ, but not by much; the
    layers are bitsandbytes' own, also when the model is loaded again for the store."""
    config = transformers.AutoConfig.from_pretrained(neox, hidden_size=64, intermediate_size=128)
    wide = str(tmp_path / "wide")  # 4 bits are packed by 64 columns
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(wide)
    store = cache(tokens, wide, tmp_path / "acts", sites=("residual.1",), **{bits: True})
    values, truth = store.read("layers.1", 0, store.n_tokens).float(), hidden_states(tokens, wide, 1)
    error = float((values - truth).norm() / truth.norm())
    assert 0.003 < error < bound  # bf16 alone is off by 0.002
    again = cached.load_model(None, store, None, CPU)
    assert type(again.modules["layers.0.mlp.dense_h_to_4h"]).__name__ == layer


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"max_memory": ("cpu=1GB",)},
            "max_memory has no effect without a device map; add --device-map auto",
        ),
        ({"device_map": "auto", "max_memory": ("cpu=1",)}, "in whole KB, MB, GB or TB, got 'cpu=1'"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "exclude each other; leave one out"),
        ({"device_map": "auto", "max_memory": ("99=1GB",)}, "max_memory names GPU 99, but there are 0 GPUs"),
    ],
)
def test_what_cannot_be_is_refused(
    settings: dict[str, Any], message: str, tokens: TokenStore, neox: str, tmp_path: Path
) -> None:
    """Oracle: the message; and no folder is left."""
    with pytest.raises(ConfigError, match=message):
        run(CacheConfig(tokens=tokens.path, model=neox, out=tmp_path / "a", layers=(0,), **settings))
    assert not (tmp_path / "a").exists()


def test_each_process_would_fill_all_devices(
    tokens: TokenStore, neox: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the refusal, of the first of two processes."""
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="2 processes were started; start one, or leave out --device-map"):
        run(CacheConfig(tokens=tokens.path, model=neox, out=tmp_path / "a", layers=(0,), device_map="auto"))


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the advice."""
    monkeypatch.setattr("saemill.common.weights.find_spec", lambda name: None)
    for weights in ({"n_bits": 4}, {"device_map": "auto"}):
        with pytest.raises(ConfigError, match=r"pip install 'saemill\[large\]'"):
            Weights(**weights)  # type: ignore[arg-type]
