"""The tokenizer: loaded by name, identified by hash, its row frame found by trying it."""

from typing import Any

import transformers
import xxhash

from saemill.common.errors import ConfigError
from saemill.common.tokens import TokenizerInfo

UNLIMITED = 1 << 30
"""Tokenizers without a limit of their own report a number beyond this."""


def load_tokenizer(name: str, revision: str | None) -> tuple[Any, TokenizerInfo]:
    """A tokenizer by hub id or local folder, and what later stages need to know of it.

    Raises:
        ConfigError: it cannot be loaded, or it has no token to put between documents.
    """
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load the tokenizer {name!r}: {error}") from error
    separator = tokenizer.eos_token_id
    if separator is None:
        separator = tokenizer.sep_token_id
    if separator is None:
        raise ConfigError(
            f"the tokenizer {name!r} has no EOS or separator token to put between documents; "
            "set its eos_token and save it to a folder"
        )
    prefix, suffix = frame_of(tokenizer)
    return tokenizer, TokenizerInfo(
        name=name,
        hash=hash_tokenizer(tokenizer),
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        prefix_ids=prefix,
        suffix_ids=suffix,
        separator_id=separator,
        special_ids=tuple(sorted(set(tokenizer.all_special_ids))),
        pad_id=tokenizer.pad_token_id,
        mask_id=tokenizer.mask_token_id,
    )


def frame_of(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the tokenizer's own template puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return tuple(framed[:start]), tuple(framed[start + len(bare) :])
    raise ConfigError(f"the tokenizer changes a text when it adds special tokens: {bare} → {framed}")


def hash_tokenizer(tokenizer: Any) -> str:
    """xxh3 of the tokenizer's serialisation (its vocabulary for tokenizers without one)."""
    if tokenizer.is_fast:
        content = tokenizer.backend_tokenizer.to_str()
    else:
        content = repr(sorted(tokenizer.get_vocab().items()))
    return xxhash.xxh3_64_hexdigest(content.encode())


def check_ctx_len(ctx_len: int, tokenizer: Any, info: TokenizerInfo) -> None:
    """Refuse rows longer than the tokenizer, or the model in the same place, can take."""
    limits = {"the tokenizer's model_max_length": tokenizer.model_max_length}
    try:
        config = transformers.AutoConfig.from_pretrained(info.name)
    except (OSError, ValueError):
        config = None  # a tokenizer without a model beside it
    if config is not None:
        limits["the model's max_position_embeddings"] = getattr(config, "max_position_embeddings", UNLIMITED)
    for source, limit in limits.items():
        if limit < UNLIMITED and ctx_len > limit:
            raise ConfigError(f"ctx_len must be at most {limit} ({source}), got {ctx_len}")
    if ctx_len <= len(info.prefix_ids) + len(info.suffix_ids):
        raise ConfigError(f"ctx_len {ctx_len} leaves no room beside the row's special tokens")
