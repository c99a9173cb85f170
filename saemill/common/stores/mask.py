"""Which positions count: the mask is applied when activations are read, never when they are written."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saemill.common import config as settings
from saemill.common.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskConfig:
    """Positions left out of statistics, training and evaluation."""

    special_tokens: bool = True
    """Whether the tokenizer's special tokens are left out: separators, BOS, padding, [CLS], [SEP]."""
    first_positions: int = 1
    """Number of positions left out at the start of each row. Decoders without a BOS token put an attention
    sink there whose norm is far from that of any other position."""
    token_ids: tuple[int, ...] = ()
    """Further token ids to leave out."""

    def __post_init__(self) -> None:
        if self.first_positions < 0:
            raise ConfigError(f"first_positions must be 0 or more, got {self.first_positions}")
        settings.at_least(self, 0, "token_ids")

    def check(self, n_ids: int, ctx_len: int) -> None:
        """Refuse a mask that cannot be meant for these tokens.

        Args:
            n_ids: how many ids their tokenizer has.
            ctx_len: tokens per row.

        Raises:
            ConfigError: an id that no token has, or no position of a row left.
        """
        if bad := [token_id for token_id in self.token_ids if token_id >= n_ids]:
            raise ConfigError(
                f"mask.token_ids must be in 0..{n_ids - 1}, the ids of the tokenizer, got "
                f"{', '.join(map(str, bad))}"
            )
        if self.first_positions >= ctx_len:
            raise ConfigError(
                f"mask.first_positions must be less than the {ctx_len} tokens of a row, got "
                f"{self.first_positions}: nothing would be left to train on"
            )

    def ids(self, special_ids: tuple[int, ...]) -> list[int]:
        """List the token ids left out, those of a tokenizer's special tokens included."""
        return sorted({*self.token_ids, *(special_ids if self.special_tokens else ())})

    def keep(self, tokens_RS: NDArray[Any], special_ids: tuple[int, ...]) -> NDArray[np.bool_]:
        """Choose the positions that count.

        Args:
            tokens_RS: token ids.
            special_ids: the tokenizer's special token ids.

        Returns: bool [R, S].
        """
        keep_RS = ~np.isin(tokens_RS, self.ids(special_ids))
        keep_RS[:, : self.first_positions] = False
        return keep_RS
