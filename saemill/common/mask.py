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
    """Leave out the tokenizer's special tokens: separators, BOS, padding, [CLS], [SEP]."""
    first_positions: int = 1
    """Leave out this many positions at the start of each row. Decoders without a BOS token put an
    attention sink there whose norm is far from that of any other position."""
    token_ids: tuple[int, ...] = ()
    """Further token ids to leave out."""

    def __post_init__(self) -> None:
        if self.first_positions < 0:
            raise ConfigError(f"first_positions must be 0 or more, got {self.first_positions}")
        settings.at_least(self, 0, "token_ids")

    def ids(self, special_ids: tuple[int, ...]) -> list[int]:
        """The token ids left out, those of a tokenizer's special tokens included."""
        return sorted({*self.token_ids, *(special_ids if self.special_tokens else ())})

    def keep(self, tokens_RS: NDArray[Any], special_ids: tuple[int, ...]) -> NDArray[np.bool_]:
        """Which positions count.

        Args:
            tokens_RS: token ids.
            special_ids: the tokenizer's special token ids.

        Returns: bool [R, S].
        """
        keep_RS = ~np.isin(tokens_RS, self.ids(special_ids))
        keep_RS[:, : self.first_positions] = False
        return keep_RS
