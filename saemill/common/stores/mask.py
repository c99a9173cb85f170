"""Which positions count: the mask is applied when activations are read, never when they are written."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from saemill.common.config import LARGEST, nearest
from saemill.common.errors import ConfigError
from saemill.common.setting import check, like, setting

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskConfig:
    """Positions left out of statistics, training and evaluation."""

    special_tokens: bool = setting(
        True, "Leave out the tokenizer's special tokens: separators, BOS, padding, [CLS], [SEP]"
    )
    first_positions: int = setting(1, "Positions left out at the start of each row", least=0)
    """Decoders without a BOS token put an attention sink there whose norm is far from that of any other
    position."""
    token_ids: tuple[int, ...] = setting((), "Further token ids to leave out", least=0, most=LARGEST)
    roles: tuple[str, ...] = setting(
        (),
        "Roles of a chat (user, assistant, …) whose tokens alone count",
        by_default="all tokens",
        metavar="ROLE,…",
        later=True,
    )

    def __post_init__(self) -> None:
        check(self)

    def check(self, n_ids: int, ctx_len: int, roles: tuple[str, ...]) -> None:
        """Refuse a mask that cannot be meant for these tokens.

        Args:
            n_ids: how many ids their tokenizer has.
            ctx_len: tokens per row.
            roles: those that the tokens are told apart by; none of what is no chat.

        Raises:
            ConfigError: an id that no token has, a role that they do not have, or no position of a row left.
        """
        if self.roles and not roles:
            raise ConfigError(
                f"roles (--train-on) {', '.join(self.roles)}: the store does not tell whose its tokens are; "
                "make it of conversations with `saemill tokenize --chat-column`, or leave them out"
            )
        if unknown := [role for role in self.roles if role not in roles]:
            raise ConfigError(
                f"roles (--train-on): the tokens have no role {unknown[0]!r}; {nearest(unknown[0], roles)}"
            )
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
        import numpy as np  # not above: settings are read for the command line's help, which is quick

        keep_RS = ~np.isin(tokens_RS, self.ids(special_ids))
        keep_RS[:, : self.first_positions] = False
        return keep_RS


OF_STORE: dict[str, Any] = {"default": None, "by_default": "the store's"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingMask:
    """What training leaves out: positions, each setting as in the store's mask unless it is given here, and
    tokens whose activations are far longer than those of others."""

    special_tokens: bool | None = like(MaskConfig, "special_tokens", **OF_STORE)
    first_positions: int | None = like(MaskConfig, "first_positions", **OF_STORE)
    token_ids: tuple[int, ...] | None = like(MaskConfig, "token_ids", **OF_STORE)
    roles: tuple[str, ...] | None = like(MaskConfig, "roles", **OF_STORE)
    norm_over_median: float | None = setting(
        10.0,
        "Leave out tokens whose norm is more than so many times the median at a site of the run; or none",
        least=1,
        most=1e6,
    )
    """Some models put rows of a hundred times the usual norm at positions that no rule names. Their squares
    would be most of the error that is minimised."""

    def __post_init__(self) -> None:
        check(self)

    def positions(self, of_store: MaskConfig) -> MaskConfig:
        """Choose the positions left out of training, by the store's mask and what is given here."""
        given = {field.name: getattr(self, field.name) for field in fields(of_store)}
        return replace(of_store, **{name: value for name, value in given.items() if value is not None})
