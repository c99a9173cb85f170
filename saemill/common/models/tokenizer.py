"""The tokenizer: loaded by name, identified by hash, its row frame found by trying it."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

import transformers
import xxhash

from saemill.common.errors import ConfigError
from saemill.common.hub import loading
from saemill.common.log import say
from saemill.common.models.architecture import limits_of
from saemill.common.stores.tokens import TokenizerInfo

UNLIMITED = 1 << 30
"""Limit beyond which a tokenizer's own means none: that is how tokenizers without one report it."""


def load_tokenizer(name: str, revision: str | None) -> tuple[Any, TokenizerInfo]:
    """Load a tokenizer by hub id or local folder, with the facts that later stages need of it.

    Raises:
        ConfigError: it cannot be loaded, or it has no token to put between documents.
    """
    tokenizer = _load(name, revision)
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


def token_id(token: int | str | None, tokenizer: Any, setting: str) -> int | None:
    """Find the id that `bos`, `eos` or `sep` names; an id is itself, and None is none.

    Raises:
        ConfigError: the tokenizer has no such token.
    """
    if token is None:
        return None
    if isinstance(token, int):
        if not 0 <= token <= max(tokenizer.get_vocab().values()):
            raise ConfigError(f"{setting} must be an id of the tokenizer, got {token}")
        return token
    found: int | None = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "sep": tokenizer.sep_token_id,
    }.get(token)
    if found is None:
        raise ConfigError(f"{setting} {token}: the tokenizer has no such token; name an id, or leave it out")
    return found


def with_tokens(
    info: TokenizerInfo, tokenizer: Any, row_start: int | str | None, separator: int | str | None
) -> TokenizerInfo:
    """Replace what rows begin with and documents end with, unless that is `own`, the tokenizer's.

    Raises:
        ConfigError: the tokenizer has no such token.
    """
    changed: dict[str, Any] = {}
    if row_start != "own":
        first = token_id(row_start, tokenizer, "row_start")
        changed["prefix_ids"] = () if first is None else (first,)
    if separator != "own":
        changed["separator_id"] = token_id(separator, tokenizer, "separator")
    return info.model_copy(update=changed)


def _load(name: str, revision: str | None) -> Any:
    with loading("tokenizer", name), _without_code():
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=False
        )
    # Where a model has no tokenizer's files, transformers makes an empty one of its kind.
    if len(tokenizer.get_vocab()) <= len(tokenizer.added_tokens_decoder):
        raise ConfigError(f"cannot load the tokenizer {name!r}: there is a model, but no tokenizer")
    return tokenizer


@contextmanager
def _without_code() -> Iterator[None]:
    """Repeat a refusal to run a repository's own code, while the block runs, without Python's words."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            "it needs code of its own, which saemill does not run. Where its repository has a "
            "tokenizer.json, put that and its tokenizer_config.json, without the line `auto_map`, into a "
            "folder and name that"
        ) from error


def frame_of(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Find the ids that the tokenizer's own template puts before and after a text.

    Learnt from words of its own vocabulary, two that give different ids, and checked on the empty text.

    Raises:
        ConfigError: the template does more than to put ids around a text, or it cannot be tried.
    """
    frames = islice(_frames(tokenizer), 2)
    first, second = next(frames, None), next(frames, None)
    if first is None:
        raise ConfigError(
            "what the tokenizer puts around a text cannot be told: no word of its own vocabulary gives an id "
            "that is not special; set its model and pre-tokenizer so that they know the vocabulary"
        )
    empty = [tokenizer("", add_special_tokens=special)["input_ids"] for special in (False, True)]
    if second not in (None, first) or empty[1] != [*first[0], *empty[0], *first[1]]:
        raise ConfigError(
            f"the tokenizer puts {first[0]} and {first[1]} around one text, but not around another; set its "
            "post-processor to a template (`tokenizers.processors.TemplateProcessing`) and save it"
        )
    return first


def _frames(tokenizer: Any) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Find what is put around each word of the vocabulary whose ids are recognised between them."""
    special, seen = set(tokenizer.all_special_ids), set()
    for token in sorted(set(tokenizer.get_vocab().values()) - special):
        word = tokenizer.decode([token])
        bare = tokenizer(word, add_special_tokens=False)["input_ids"]
        if not bare or special & set(bare) or tuple(bare) in seen:
            continue
        seen.add(tuple(bare))
        framed = tokenizer(word, add_special_tokens=True)["input_ids"]
        n = len(bare)
        places = [place for place in range(len(framed) - n + 1) if framed[place : place + n] == bare]
        if not places:
            raise ConfigError(
                f"the tokenizer changes a text when it adds special tokens: {bare} → {framed}; set its "
                "post-processor to a template (`tokenizers.processors.TemplateProcessing`) and save it"
            )
        if len(places) == 1:
            yield tuple(framed[: places[0]]), tuple(framed[places[0] + n :])


def hash_tokenizer(tokenizer: Any) -> str:
    """Compute xxh3 of the tokenizer's serialisation (its vocabulary for tokenizers without one)."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()  # these two belong to a call, not to the tokenizer
        tokenizer.backend_tokenizer.no_padding()
        content = tokenizer.backend_tokenizer.to_str()
    else:
        content = repr(sorted(tokenizer.get_vocab().items()))
    return xxhash.xxh3_64_hexdigest(content.encode())


def check_tokenizer(info: TokenizerInfo, model: str, revision: str | None, allow_other: bool) -> None:
    """Refuse tokens of another tokenizer than the one that comes with a model.

    Where none can be loaded with the model, the user is warned, and the tokens are accepted.

    Args:
        info: what made the tokens.
        model: hub id or local folder.
        revision: the hub model's revision.
        allow_other: accept another tokenizer's tokens.

    Raises:
        ConfigError: the tokenizer is another one, or it is not and `allow_other` has no effect.
    """
    try:
        same: bool | None = hash_tokenizer(_load(model, revision)) == info.hash
    except ConfigError:
        same = None
    if same is not False and allow_other:
        why = f"the tokens were made with that of {model}" if same else f"none comes with {model}"
        raise ConfigError(f"allow_other_tokenizer has no effect: {why}; leave it out")
    if same is None:
        say(f"no tokenizer comes with {model}: whether the tokens were made for it was not checked")
    if same is False and not allow_other:
        raise ConfigError(
            f"the tokens were made with the tokenizer {info.name!r}, but {model!r} comes with another one, "
            f"to which their ids mean other text; tokenize with --tokenizer {model}, or say "
            "--allow-other-tokenizer if you know that the ids agree"
        )


def check_ctx_len(ctx_len: int, tokenizer: Any, info: TokenizerInfo, revision: str | None) -> None:
    """Refuse rows longer than the tokenizer, or the model in the same place, accepts.

    Raises:
        ConfigError: naming the limit and whose it is.
    """
    limits = {"the tokenizer's model_max_length": tokenizer.model_max_length}
    try:
        config = transformers.AutoConfig.from_pretrained(
            info.name, revision=revision, trust_remote_code=False
        )
    except (OSError, ValueError):
        config = None  # a tokenizer without a model beside it
    if config is not None:
        with suppress(ConfigError):  # a model that cannot be built says nothing about the tokens
            limits["the longest row of the model beside it"] = limits_of(config).row_length or UNLIMITED
    for source, limit in limits.items():
        if limit < UNLIMITED and ctx_len > limit:
            raise ConfigError(f"ctx_len must be at most {limit} ({source}), got {ctx_len}")
    if ctx_len <= len(info.prefix_ids) + len(info.suffix_ids):
        least = len(info.prefix_ids) + len(info.suffix_ids) + 1
        raise ConfigError(
            f"ctx_len {ctx_len} leaves no room beside the row's special tokens; it must be {least} or more"
        )
