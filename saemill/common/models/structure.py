"""Where a transformer has its blocks and embeddings, by structure: each family has names of its own.

A multimodal model's text runs through its language tower, an encoder-decoder model's through its encoder
alone; other models are run as a whole.
"""

from collections.abc import Iterator
from typing import Any

import transformers
from torch import nn

TABLES = ("pos", "wpe")
"""Substrings of the names of modules that embed positions."""


def base_class(config: Any, trust_remote_code: bool) -> Any:
    """Choose the class of transformers that makes a model without its LM head, or with it where a model's own
    code has no other."""
    own = (getattr(config, "auto_map", None) or {}) if trust_remote_code else {}
    has_head_alone = "AutoModel" not in own and "AutoModelForCausalLM" in own
    return transformers.AutoModelForCausalLM if has_head_alone else transformers.AutoModel


def base_of(model: Any) -> Any:
    """Return the model without its LM head: paths of its modules name sites.

    Where the class of a model with a head names no base (Llama 4's text model), it is its one child that is
    a model itself.
    """
    base = model.base_model
    if base is model and model.get_output_embeddings() is not None:
        models = [child for child in model.children() if isinstance(child, transformers.PreTrainedModel)]
        if len(models) == 1:
            return models[0]
    return base


def is_encoder_decoder(config: Any) -> bool:
    """Tell whether a model of this config has an encoder that reads and a decoder that writes."""
    return bool(getattr(config, "is_encoder_decoder", False))


def reader_of(base: Any) -> Any:
    """Return the module of a base model that is run on tokens: an encoder, or the whole."""
    return base.get_encoder() if is_encoder_decoder(base.config) else base


def text_tower(base: Any) -> tuple[str, Any]:
    """Return the module that reads text, and its path: a multimodal model's language tower, an encoder, the
    whole."""
    reader = reader_of(base)
    text = base.config.get_text_config()
    if reader is base and text is not base.config:
        for path, module in base.named_modules():
            if getattr(getattr(module, "config", None), "model_type", None) == text.model_type:
                return path, module
    return next(path for path, module in base.named_modules() if module is reader), reader


def block_names(base: Any) -> list[str]:
    """List the paths of the transformer blocks: the outermost ModuleList of the text tower with one member
    per hidden layer.

    Models without such a list have none: those whose layers share one module, and those that keep all
    layers' attention in one list and all layers' MLPs in another.
    """
    n_layers = getattr(base.config.get_text_config(), "num_hidden_layers", None)
    if n_layers is None or is_encoder_decoder(base.config):
        return []
    above, tower = text_tower(base)
    for path, module in tower.named_modules():
        lists = {name: child for name, child in module.named_children() if _is_list(child, n_layers)}
        if lists:
            sizes = {name: sum(p.numel() for p in child.parameters()) for name, child in lists.items()}
            largest = max(sizes, key=lambda name: sizes[name])
            if sizes[largest] < 0.9 * sum(sizes.values()):
                return []
            return [".".join(filter(None, (above, path, largest, str(i)))) for i in range(n_layers)]
    return []


def _is_list(module: nn.Module, length: int) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) == length


def n_ids_of(base: Any) -> int:
    """Count the token ids that the model can look up."""
    try:
        return int(base.get_input_embeddings().num_embeddings)
    except (NotImplementedError, AttributeError):
        return int(base.config.get_text_config().vocab_size)


def longest_row_of(base: Any) -> int | None:
    """Find the most tokens that the model accepts in a row; None if any number.

    Where positions are looked up, as many as the table has left: RoBERTa's and its kin's positions begin
    after the padding id, OPT's and BART's after an offset of 2.
    """
    config = base.config.get_text_config()
    configured = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    limits = [limit for limit in configured if isinstance(limit, int) and limit > 0]  # XLNet's is -1
    return min([*limits, *_position_limits(text_tower(base)[1])], default=None)


def _position_limits(tower: nn.Module) -> Iterator[int]:
    for path, table in tower.named_modules():
        name = path.rpartition(".")[2].lower()
        if isinstance(table, nn.Embedding) and any(word in name for word in TABLES) and "rel" not in name:
            first = 0 if table.padding_idx is None else table.padding_idx + 1
            yield table.num_embeddings - first - getattr(table, "offset", 0)
