"""Special tokens that a text writes out, as `<|endoftext|>`: read as plain text, as the token, or refused."""

import re
from typing import Any, Literal

from saemill.common.errors import ConfigError, DataError

Rule = Literal["text", "special", "refuse"]


class WrittenSpecials:
    """What is done with special tokens that texts write out.

    Args:
        tokenizer: of transformers.
        rule: None takes `text`, or `special` where the tokenizer makes a token of its name in any case.

    Raises:
        ConfigError: the rule is `text`, and the tokenizer cannot.
    """

    def __init__(self, tokenizer: Any, rule: Rule | None) -> None:
        added = tokenizer.added_tokens_decoder.values()
        names = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        longest_first = sorted(names, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        whole = sorted(name for name in names - {tokenizer.unk_token} if _stays_whole(tokenizer, name))
        if whole and rule == "text":
            raise ConfigError(
                f"special_tokens_in_text text: the tokenizer makes a token of {whole[0]!r} in plain text "
                "too; choose special or refuse"
            )
        self.rule: Rule = rule or ("special" if whole else "text")

    def check(self, text: str, where: str) -> bool:
        """Tell whether a text writes a special token out.

        Raises:
            DataError: it does, which is to be refused.
        """
        found = self.pattern.search(text)
        if found is not None and self.rule == "refuse":
            raise DataError(
                f"{where} writes out the special token {found[0]!r}; mend or remove that row, or choose "
                "--special-tokens-in-text text or special"
            )
        return found is not None


def _stays_whole(tokenizer: Any, name: str) -> bool:
    """Tell whether the tokenizer makes the special token of its name even where it is to read plain text."""
    ids = tokenizer(name, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return tokenizer.convert_tokens_to_ids(name) in ids
