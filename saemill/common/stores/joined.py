"""Sites joined: the activations of the same tokens at several sites, side by side, as one site of their own.

A store beside another holds the same tokens in the same places, so one address and one order serve both.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from saemill.common.errors import ConfigError
from saemill.common.log import counted
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.statistics import Statistics

if TYPE_CHECKING:
    from saemill.common.stores.activations import ActivationStore
    from saemill.common.stores.site_array import SiteArray
    from saemill.common.stores.site_roles import Role


class JoinedSite:
    """Several sites, read as one: rows are those of the parts, one behind the other.

    Args:
        name: of the whole.
        parts: sites by name, of stores with the same tokens.

    Raises:
        ConfigError: they are stored in several types.
    """

    def __init__(self, name: str, parts: "Mapping[str, SiteArray]") -> None:
        self.name, self.parts = name, parts
        self.width = sum(part.width for part in parts.values())
        self.role: Role | None = None
        """Each part has one of its own."""
        first, *others = parts.values()
        self.dtype, self.stored = first.dtype, first.stored
        self.columns = sum(part.columns for part in parts.values())
        if any(other.stored != self.stored for other in others):
            types = ", ".join(
                f"{name} as {str(p.stored).removeprefix('torch.')}" for name, p in parts.items()
            )
            raise ConfigError(
                f"joined sites must be stored in one type, got {types}; cache one anew with the other's "
                "--dtype"
            )

    def block(self, shard: int, block: int) -> NDArray[Any]:
        """Read one block of stored rows of all parts, each compared with its hash."""
        return np.concatenate([part.block(shard, block) for part in self.parts.values()], axis=1)

    def decode(self, stored_TC: torch.Tensor) -> torch.Tensor:
        """Make activations of stored rows, of each part by itself. [T, D]; floats share memory."""
        if self.columns == self.width:
            return next(iter(self.parts.values())).decode(stored_TC)
        ends = np.cumsum([part.columns for part in self.parts.values()])
        starts = [0, *ends[:-1]]
        pieces = zip(self.parts.values(), starts, ends, strict=True)
        return torch.cat([part.decode(stored_TC[:, start:end]) for part, start, end in pieces], 1)

    def rounded(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Round activations as the store does, of each part by itself. [T, D], on the CPU."""
        each = torch.split(x_TD, [part.width for part in self.parts.values()], 1)
        return torch.cat([p.rounded(x) for p, x in zip(self.parts.values(), each, strict=True)], 1)

    def gather(self, shard: int, offsets: NDArray[np.int64]) -> torch.Tensor:
        """Read rows of one shard by their addresses' offsets in it. [len(offsets), D]."""
        return torch.cat([part.gather(shard, offsets) for part in self.parts.values()], 1)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Read activations of addresses start..stop in address order, [stop - start, D]."""
        return torch.cat([part.read(start, stop) for part in self.parts.values()], 1)

    @cached_property
    def statistics(self) -> Statistics:
        """Moments of the parts side by side; how far positions are from the mean is not known."""
        every = [part.statistics for part in self.parts.values()]
        return Statistics(
            n_tokens=min(each.n_tokens for each in every),
            mean_D=torch.cat([each.mean_D for each in every]),
            variance_D=torch.cat([each.variance_D for each in every]),
            mean_squared_norm=sum(each.mean_squared_norm for each in every),
            distances={},
        )


def check_beside(store: "ActivationStore", other: "ActivationStore") -> None:
    """Refuse a store that does not hold the same tokens, or passages, in the same places as another.

    Raises:
        ConfigError: naming what differs.
    """
    if store.own_fingerprint == other.own_fingerprint:
        raise ConfigError(
            f"{store.path} and {other.path} are the same store; join its own sites, as layers.2+layers.4"
        )
    both = f"{other.path} does not belong beside {store.path}"
    if type(store.text) is not type(other.text):
        raise ConfigError(f"{both}: one holds tokens, the other passages")
    sizes = [f"{counted(s.text.n_rows, s.text.row)} of {s.ctx_len}" for s in (store, other)]
    again = "cache both models on the same tokens, with the same --max-tokens"
    if sizes[0] != sizes[1]:
        raise ConfigError(f"{both}: it holds {sizes[1]}, not {sizes[0]}; {again}")
    if store.text.content != other.text.content:
        raise ConfigError(
            f"{both}: hashes of their {store.text.unit}s, or of what is held out, differ; {again}"
        )
    if store.shard_tokens != other.shard_tokens:
        raise ConfigError(
            f"{both}: its shards hold {other.shard_tokens:,} {store.text.unit}s, not {store.shard_tokens:,}, "
            f"so its rows lie in another order; make it anew with --shard-tokens {store.shard_tokens}"
        )


def model_of(store: "ActivationStore") -> dict[str, Any]:
    """Tell which model the sites of a store beside, called `with.`, are of."""
    settings = store.settings
    return {
        "model": settings.model,
        "revision": settings.revision,
        "model_fingerprint": settings.model_fingerprint,
        "acts_fingerprint": store.fingerprint,
    }


def combined(a: MaskConfig, b: MaskConfig) -> MaskConfig:
    """Combine two masks: what either leaves out is left out."""
    return replace(
        a,
        special_tokens=a.special_tokens or b.special_tokens,
        first_positions=max(a.first_positions, b.first_positions),
        token_ids=tuple(sorted({*a.token_ids, *b.token_ids})) if b.token_ids else a.token_ids,
        roles=_of_both(a.roles, b.roles),
    )


def _of_both(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[str, ...]:
    """Choose the roles that count by both masks; none named is all."""
    both = tuple(role for role in a if role in b) if a and b else a or b
    if not both and a:
        raise ConfigError(
            f"the masks of the two stores count the roles {', '.join(a)} and {', '.join(b)}, which no token "
            "has both of; cache one anew with the other's"
        )
    return both
