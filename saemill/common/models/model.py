"""A transformer to look into: capture activations at sites, or run on with changed ones."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import huggingface_hub.utils
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from saemill.common import durable
from saemill.common.errors import ConfigError
from saemill.common.hub import loading
from saemill.common.models.architecture import check_row_length, limits_of
from saemill.common.models.sites import load_model_config, replacing, watch
from saemill.common.models.structure import (
    base_class,
    base_of,
    block_names,
    is_encoder_decoder,
    n_ids_of,
    reader_of,
)
from saemill.common.stores.site_names import is_input, module_of
from saemill.common.stores.tokens import TokenizerInfo, TokenStore
from saemill.common.weights import AS_GIVEN, Weights

Head = Literal["causal", "masked"]
OF_NO_WEIGHT = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
"""Entries of a config that say where it is from, not what it computes; the type is each tensor's."""


class _Enough(Exception):
    """The end of a forward pass after the last site needed."""


def choose_model_dtype(name: str, device: torch.device) -> torch.dtype:
    """Choose the type the model computes in; `auto` is bf16 on a GPU and fp32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def fingerprint_model(name: str, revision: str | None, trust_remote_code: bool = False) -> str:
    """Identify a model's weights, and its own code where that is run: by a hash of the files of a local
    folder, else by the hub's commit."""
    folder = Path(name)
    if folder.is_dir():
        kinds = (".safetensors", ".bin", *((".py",) if trust_remote_code else ()))
        files = [f for f in folder.iterdir() if f.suffix in kinds]
        return durable.hash_folder(folder, [folder / "config.json", *files])
    config = load_model_config(name, revision, trust_remote_code)
    return durable.hash_json([name, getattr(config, "_commit_hash", None) or revision])


def fingerprint_given(model: Any) -> str:
    """Identify a model in memory: by a hash of its config and of every tensor's name, type, shape and
    content.

    Raises:
        ConfigError: some of its tensors are on the disk.
    """
    config = {k: v for k, v in model.config.to_diff_dict().items() if k not in OF_NO_WEIGHT}
    tensors = []
    for key, values in model.state_dict().items():
        if values.is_meta:
            raise ConfigError(
                "some weights of the model in memory are on the disk, so it cannot be told from others; name "
                "the model instead, with device_map='auto'"
            )
        content = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        tensors.append([key, str(values.dtype), list(values.shape), durable.hash_bytes(content)])
    return durable.hash_json([json.dumps(config, default=str, sort_keys=True), *sorted(tensors)])


def name_of(model: Any) -> str:
    """Return the name that a model in memory was loaded by, or else its class's."""
    return str(getattr(model, "name_or_path", "") or type(model).__name__)


def fingerprint_weights(name: str) -> str | None:
    """Identify the weights in a local folder's safetensors whatever files they lie in: by a hash of every
    tensor's name, type, shape and content. None where there are none."""
    tensors = []
    for file in sorted(Path(name).glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for key in sorted(weights.keys()):
                values = weights.get_tensor(key)
                content = values.reshape(-1).view(torch.uint8).numpy().data
                tensors.append([key, str(values.dtype), list(values.shape), durable.hash_bytes(content)])
    return durable.hash_json(sorted(tensors)) if tensors else None


class LanguageModel:
    """A HuggingFace transformer on a device, in evaluation mode.

    Args:
        name: hub id or local folder.
        revision: the hub's revision.
        dtype: type of weights and activations.
        device: where it runs.
        with_head: load the LM head too, where the checkpoint has one (`head` says which).
        weights: how they are held in memory.
        trust_remote_code: run code that the model brings.
        attn_implementation: how attention is computed, in transformers' words; None for its choice.
        given: the model itself, in evaluation mode, where it is in memory: it is taken as it is, and the
            arguments above say how.

    Raises:
        ConfigError: the model cannot be loaded.
    """

    def __init__(
        self,
        name: str,
        *,
        revision: str | None,
        dtype: torch.dtype,
        device: torch.device,
        with_head: bool = False,
        weights: Weights = AS_GIVEN,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        given: Any = None,
    ) -> None:
        self.name, self.revision, self.device = name, revision, device
        self.trust_remote_code = trust_remote_code
        self.head: Head | None = None
        if given is None:
            self.config = load_model_config(name, revision, trust_remote_code)
            self._load_whole(dtype, with_head, weights, attn_implementation)
        else:
            self.model, self.config = given, given.config
            self.head = _head_of_given(given) if with_head else None
        self.base = base_of(self.model)
        self.modules = dict(self.base.named_modules())
        self.blocks = block_names(self.base)
        self.n_ids: int = n_ids_of(self.base)
        self.tuple_sites: set[str] = set()

    def _load_whole(
        self, dtype: torch.dtype, with_head: bool, weights: Weights, attn_implementation: str | None
    ) -> None:
        """Load the model onto its device, with its head where it has one."""
        self.head = head_of(self.config) if with_head else None
        name, device = self.name, self.device
        how = {"dtype": dtype, "trust_remote_code": self.trust_remote_code, "revision": self.revision}
        how |= {"attn_implementation": attn_implementation} if attn_implementation else {}
        how |= _holding(weights, dtype, device)
        self.model, missing = self._load(how)
        if missing and self.head:
            self.head = None  # a checkpoint without the head that its class has
            self.model, missing = self._load(how)
        if is_encoder_decoder(self.config):  # its decoder is not run
            missing = [key for key in missing if key.startswith("encoder.")]
        if missing:
            raise ConfigError(f"the checkpoint {name!r} lacks weights: {', '.join(sorted(missing)[:5])}")
        if not weights.stay:
            self.model = self.model.to(device)
        self.model = self.model.eval().requires_grad_(False)

    def _load(self, how: dict[str, Any]) -> tuple[Any, list[str]]:
        """Load the model. Return it, and the names of its weights that the checkpoint lacks."""
        loaders: dict[Head | None, Any] = {
            None: base_class(self.config, self.trust_remote_code),
            "causal": _multimodal_class(self.config) or transformers.AutoModelForCausalLM,
            "masked": transformers.AutoModelForMaskedLM,
        }
        with loading("model", self.name), _no_bar_of_weights():
            model, info = loaders[self.head].from_pretrained(self.name, output_loading_info=True, **how)
        return model, [key for key in info["missing_keys"] if "pooler" not in key]

    def check_tokens(self, tokens: TokenStore) -> None:
        """Refuse tokens that the model cannot take; see `check_fit`."""
        check_fit(self.config, self.name, tokens, self.trust_remote_code)

    def capture(self, ids_RS: Tensor, sites: list[str], attention_RS: Tensor | None) -> dict[str, Tensor]:
        """Capture activations at `sites`, in a forward pass that stops after the last of them.

        They are copies, as some models add to a module's output in place (Falcon: to its MLP's).

        Args:
            ids_RS: token ids, int64.
            sites: their names.
            attention_RS: 1 where a token may be attended to; None for all.

        Returns: per site [R, S, D] in the model's dtype, on its device.
        """
        captured: dict[str, Tensor] = {}

        def keep(name: str, x_RSD: Tensor) -> None:
            captured[name] = x_RSD.to(self.device, copy=True)
            if len(captured) == len(sites):
                raise _Enough

        handles = [watch(self.modules, name, partial(keep, name)) for name in sites]
        try:
            self.run(ids_RS, attention_RS)
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return captured

    def run(self, ids_RS: Tensor, attention_RS: Tensor | None = None) -> None:
        """Run the base model for what is seen on the way: of an encoder-decoder model the encoder."""
        with torch.inference_mode():
            self._forward(reader_of(self.base), ids_RS, attention_RS)

    def logits(self, ids_RS: Tensor, attention_RS: Tensor | None, *, differentiable: bool = False) -> Tensor:
        """Compute logits of the LM head, [R, S, vocabulary]; inside `splice` those of the changed model, from
        which gradients flow to the changed activations if asked for."""
        with torch.enable_grad() if differentiable else torch.inference_mode():
            output: Tensor = self._forward(self.model, ids_RS, attention_RS).logits
        return output

    def sees_later_tokens(self, ids_RS: Tensor) -> bool:
        """Tell whether the logits at a position depend on tokens after it, as in a bidirectional model.

        The tokens in the later half of the first row are exchanged for others, and the logits of its first
        half compared. How much they change where the tokens of another row are exchanged is rounding:
        experts, and weights in 8 bits, work on all tokens of a batch together. The LM head is needed.

        Args:
            ids_RS: token ids, int64, one row or more.
        """
        ids_1S = ids_RS[:1]
        n_first = ids_1S.shape[1] // 2
        others_1S = (ids_1S + 1) % self.n_ids
        changed_1S = torch.cat([ids_1S[:, :n_first], others_1S[:, n_first:]], 1)

        def first_half(row_1S: Tensor, beside_1S: Tensor) -> Tensor:
            return self.logits(torch.cat([row_1S, beside_1S]), None)[0, :n_first].double()

        plain = first_half(ids_1S, ids_1S)
        rounding = (first_half(ids_1S, others_1S) - plain).norm()
        effect = (first_half(changed_1S, ids_1S) - plain).norm()
        return bool(effect > 10 * rounding and effect > 1e-5 * plain.std() * plain.numel() ** 0.5)

    @contextmanager
    def splice(self, site: str, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Replace the activation x_RSD at `site` by `edit(x_RSD)` while the block runs."""

        def note(_module: Any, _inputs: Any, output: Any) -> None:
            if isinstance(output, tuple):
                self.tuple_sites.add(site)

        before = self.blocks_to(site)
        handles = [self.modules[name].register_forward_hook(note) for name in before[-1:]]
        try:
            with replacing(self.modules, site, lambda x_RSD: edit(x_RSD.to(self.device)).to(x_RSD.device)):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def blocks_to(self, site: str) -> list[str]:
        """List the transformer blocks that lie before a site, its own included where the site is what that
        returns; none where the site is not the residual stream between blocks."""
        if (block := module_of(site)) not in self.blocks:
            return []
        return self.blocks[: self.blocks.index(block) + (not is_input(site))]

    @contextmanager
    def skip_blocks_to(self, site: str) -> Iterator[None]:
        """Skip the transformer blocks up to `site` (`blocks_to`) while the block runs: they hand their input
        on uncomputed.

        For use with a `splice` that replaces the whole residual stream between blocks: in almost all
        models nothing before it then matters. Where the site is no block nothing is skipped. Not for
        models whose blocks return tuples; `tuple_sites` names the sites where a splice met one.
        """
        skipped = [self.modules[name] for name in self.blocks_to(site)]

        def hand_on(hidden_states: Tensor, *_arguments: Any, **_options: Any) -> Tensor:
            return hidden_states

        # A model on several devices has forwards of its own there, which fetch the weights.
        own = {module: {k: v for k, v in vars(module).items() if k == "forward"} for module in skipped}
        for module in skipped:
            module.forward = hand_on
        try:
            yield
        finally:
            for module in skipped:
                del module.forward
                vars(module).update(own[module])

    def _forward(self, model: Any, ids_RS: Tensor, attention_RS: Tensor | None) -> Any:
        arguments: dict[str, Any] = {"input_ids": ids_RS.to(self.device)}
        if attention_RS is not None:
            arguments["attention_mask"] = attention_RS.to(self.device)
        if hasattr(self.config, "use_cache"):
            arguments["use_cache"] = False
        return model(**arguments)


def attention_of(ids_RS: Tensor, tokenizer: TokenizerInfo) -> Tensor | None:
    """Compute the attention mask of an encoder's rows (0 on padding); None where all are full.

    So are a decoder's, whose padding id is often its separator. Attention is faster without a mask.
    """
    if tokenizer.mask_id is None or tokenizer.pad_id is None:
        return None
    is_token_RS = ids_RS != tokenizer.pad_id
    return None if bool(is_token_RS.all()) else is_token_RS.long()


def check_fit(config: Any, name: str, tokens: TokenStore, trust_remote_code: bool = False) -> None:
    """Refuse tokens that a model cannot take: too large ids, or rows longer than its context.

    Ids that the tokenizer has beyond the model's, and no row holds, do no harm.

    Args:
        config: the model's transformers config.
        name: hub id or local folder.
        tokens: the tokens.
        trust_remote_code: run code that the model brings.

    Raises:
        ConfigError: naming both numbers, and the token.
    """
    limits = limits_of(config, trust_remote_code)
    check_row_length(limits, name, tokens.ctx_len)
    largest = tokens.n_used_ids - 1
    if largest >= limits.n_ids:
        raise ConfigError(
            f"the tokens hold the id {largest}{_as_text(tokens, largest)}, but {name!r} has the ids "
            f"0..{limits.n_ids - 1}; they were made with {tokens.tokenizer.name!r}: tokenize with "
            "the model's own tokenizer"
        )


def _as_text(tokens: TokenStore, token_id: int) -> str:
    """Return the token that an id stands for, in brackets; nothing where the store's tokenizer cannot
    tell."""
    try:
        with loading("tokenizer", str(tokens.path / "tokenizer")):
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                tokens.path / "tokenizer", trust_remote_code=False
            )
            return f" ({tokenizer.convert_ids_to_tokens(token_id)!r})"
    except ConfigError:
        return ""


def _holding(weights: Weights, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Say in transformers' words how weights are held in memory, of a model that computes in `dtype`."""
    how: dict[str, Any] = {}
    if weights.n_bits == 8:
        how["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
    if weights.n_bits == 4:
        how["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    if weights.device_map:
        how |= {"max_memory": weights.limits} if weights.limits else {}
        return how | {"device_map": weights.device_map}
    return how | ({"device_map": {"": device}} if weights.n_bits else {})


@contextmanager
def _no_bar_of_weights() -> Iterator[None]:
    """Hide transformers' bar for weights read from the disk; the hub's for downloads stays."""
    if not transformers.utils.logging.is_progress_bar_enabled():
        yield
        return
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()
    try:
        yield
    finally:
        transformers.utils.logging.enable_progress_bar()


def head_of(config: Any) -> Head | None:
    """Find which LM head the checkpoint's architecture has; an encoder-decoder model's is not supported."""
    names = config.architectures or []
    if any("MaskedLM" in name or name.endswith("ForPreTraining") for name in names):
        return "masked"
    if any("CausalLM" in name or name.endswith("LMHeadModel") for name in names) or _multimodal_class(config):
        return "causal"
    return None


def _head_of_given(model: Any) -> Head | None:
    """Find which LM head a model in memory has."""
    if model.get_output_embeddings() is None or is_encoder_decoder(model.config):
        return None
    return "masked" if "MaskedLM" in type(model).__name__ else "causal"


def _multimodal_class(config: Any) -> Any:
    """Find the class of a multimodal checkpoint that writes text; None if it is something else."""
    names = [name for name in config.architectures or [] if name.endswith("ForConditionalGeneration")]
    return getattr(transformers, names[0], None) if names and not is_encoder_decoder(config) else None
