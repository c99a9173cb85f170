"""How a run is spread over its processes: which variants each trains, and with whom.

Teams share out the variants, the costliest first, each to the team with the least to do; no gradient
crosses between teams. Within a team `latent_ranks` processes hold the latents of each SAE in parts, and
`data_ranks` such sets share out the tokens of each batch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from saemill.common.errors import ConfigError
from saemill.common.log import counted
from saemill.common.world import Group
from saemill.train.team import Team
from saemill.train.variants import Variant

LATENTS_PER_ACTIVE = 90
"""A step's cost per active latent, in latents of the encoder's product: 0.196 s for 6,144 of these and
0.09 s for the rest at k = 32 (docs/performance.md)."""
TEAM_OVERHEAD = 0.3
"""What a step takes in a team of two above its even share of one process's step, and once more with each
doubling (docs/scaling.md)."""


@dataclass(frozen=True, slots=True)
class Spread:
    """One way to spread a run over n_teams · data_ranks · latent_ranks processes."""

    variants: tuple[Variant, ...]
    """All of the run, in its order."""
    teams: tuple[tuple[Variant, ...], ...]
    """The variants of each team, in the run's order."""
    loads: tuple[float, ...]
    """Each team's share of the cost; 1 in all."""
    data_ranks: int
    latent_ranks: int

    @property
    def team_size(self) -> int:
        """Processes per team."""
        return self.data_ranks * self.latent_ranks

    def team_of(self, everyone: Group) -> Team:
        """This process's place; ranks next to each other share a batch, where most is exchanged."""
        size = self.team_size
        firsts = range(0, len(self.teams) * size, size)
        same_tokens = [
            [first + data * self.latent_ranks + shard for shard in range(self.latent_ranks)]
            for first in firsts
            for data in range(self.data_ranks)
        ]
        same_latents = [
            [first + data * self.latent_ranks + shard for data in range(self.data_ranks)]
            for first in firsts
            for shard in range(self.latent_ranks)
        ]
        return Team(tokens=everyone.split(same_latents), latents=everyone.split(same_tokens))

    def describe(self) -> str:
        """For the plan."""
        n_processes = len(self.teams) * self.team_size
        if n_processes == 1:
            return "1 process"
        shares = ", ".join(f"{load:.0%}" for load in self.loads)
        text = f"{n_processes} processes"
        if len(self.teams) > 1:
            text += f": variants dealt to {len(self.teams)} teams ({shares} of the cost)"
        if self.latent_ranks > 1:
            text += f", the latents of each SAE in {self.latent_ranks} parts"
        if self.data_ranks > 1:
            text += f", the tokens of each batch in {self.data_ranks} parts"
        return text


def cost(variant: Variant, width: int) -> float:
    """What a step of the variant takes, in arbitrary units."""
    return width * (variant.num_latents + LATENTS_PER_ACTIVE * variant.k)


def deal(variants: list[Variant], widths: Mapping[str, int], n_teams: int) -> list[list[Variant]]:
    """Share out variants: longest first, to the least laden (Graham 1969)."""
    costs = {variant.name: cost(variant, widths[variant.site]) for variant in variants}
    hands: list[list[str]] = [[] for _ in range(n_teams)]
    loads = [0.0] * n_teams
    for variant in sorted(variants, key=lambda v: -costs[v.name]):
        least = loads.index(min(loads))
        hands[least].append(variant.name)
        loads[least] += costs[variant.name]
    return [[variant for variant in variants if variant.name in hand] for hand in hands]


def choose(
    variants: list[Variant],
    widths: Mapping[str, int],
    n_processes: int,
    data_ranks: int | None = None,
    latent_ranks: int | None = None,
    idle_allowed: bool = False,
) -> Spread:
    """The spread with the least time per step by estimate, among those the user's numbers allow.

    Args:
        variants: all of the run.
        widths: D of each site.
        n_processes: of the world.
        data_ranks: processes that share a batch's tokens; None leaves it open: 1.
        latent_ranks: processes that share an SAE's latents; None leaves it open.
        idle_allowed: whether there may be teams without a variant, as when some were stopped.

    Raises:
        ConfigError: the numbers do not fit the processes or the variants.
    """
    data = data_ranks or 1
    possible = [latent_ranks] if latent_ranks else range(1, n_processes // data + 1)
    fitting = [shards for shards in possible if n_processes % (data * shards) == 0]
    if not fitting:
        raise ConfigError(
            f"data_ranks {data} × latent_ranks {latent_ranks or 1} does not divide the number of processes, "
            f"{n_processes}; give others, or start another number"
        )
    spreads = [_spread(variants, widths, n_processes, data, shards) for shards in fitting]
    working = [spread for spread in spreads if all(spread.teams)] or (spreads if idle_allowed else [])
    if not working:
        n_teams = n_processes // (data * fitting[-1])
        raise ConfigError(
            f"{n_teams} teams for {counted(len(variants), 'variant')}: some would idle; "
            "start fewer processes, or raise --latent-ranks or --data-ranks"
        )
    best = min(working, key=_seconds)
    _check_shards(variants, best)
    return best


def _spread(
    variants: list[Variant], widths: Mapping[str, int], n_processes: int, data: int, shards: int
) -> Spread:
    hands = deal(variants, widths, n_processes // (data * shards))
    costs = [sum(cost(variant, widths[variant.site]) for variant in hand) for hand in hands]
    total = sum(costs)
    return Spread(
        tuple(variants), tuple(map(tuple, hands)), tuple(part / total for part in costs), data, shards
    )


def _seconds(spread: Spread) -> float:
    """Estimated time of a step, in units of the whole work on one process."""
    overhead = TEAM_OVERHEAD * math.log2(spread.team_size)
    return max(spread.loads) / spread.team_size * (1 + overhead)


def _check_shards(variants: list[Variant], spread: Spread) -> None:
    for variant in variants:
        if variant.num_latents // spread.latent_ranks < variant.k:
            raise ConfigError(
                f"{variant.name}: {variant.num_latents} latents in {spread.latent_ranks} parts leave "
                f"fewer than k = {variant.k} in each; lower --latent-ranks"
            )
