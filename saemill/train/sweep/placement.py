"""Where a run's SAEs are trained: which variants each trains, and with whom.

Teams share out the variants, the costliest first, each to the team with the least to do; no gradient
crosses between teams. Within a team `latent_ranks` processes share out the latents of each SAE, and
`data_ranks` such sets share out the tokens of each batch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from saemill.common.errors import ConfigError
from saemill.common.log import counted
from saemill.common.world import Group
from saemill.train.backends.team import Team
from saemill.train.losses import IN_MODEL
from saemill.train.sweep.sizes import sizes
from saemill.train.sweep.variant import Variant

LATENTS_PER_ACTIVE = 90
"""A step's cost per active latent, in latents of the encoder's product: 0.196 s for 6,144 of these and
0.09 s for the rest at k = 32 (docs/performance.md)."""
TEAM_OVERHEAD = 0.3
"""Time that a step takes in a team of two above its even share of one process's step, and once more with each
doubling (docs/scaling.md)."""
WITHOUT_KERNELS = (
    "signum, muon, clip_grad_norm, frozen decoders, free rows of crosscoders and targets of another width"
)
"""What a GPU's kernels do not compute."""
MEMORY_SHARE = 0.85
"""Largest share of a device's memory for weights and moments; the rest is for batches and pre-activations."""


@dataclass(frozen=True, slots=True)
class Placement:
    """One way to spread a run over n_teams · data_ranks · latent_ranks processes."""

    variants: tuple[Variant, ...]
    """All variants of the run, in its order."""
    teams: tuple[tuple[Variant, ...], ...]
    """The variants of each team, in the run's order."""
    loads: tuple[float, ...]
    """Each team's share of the cost; 1 in all."""
    data_ranks: int
    latent_ranks: int

    @property
    def team_size(self) -> int:
        """Return the number of processes per team."""
        return self.data_ranks * self.latent_ranks

    def state_bytes(self, widths: Mapping[str, int]) -> int:
        """Estimate the bytes of weights and moments on a GPU of the fullest process."""
        team_bytes = [
            sum(sum(sizes(v, [widths[site] for site in v.sites], "triton", torch.bfloat16)) for v in team)
            for team in self.teams
        ]
        return -(-max(team_bytes) // self.latent_ranks)

    def team_of(self, everyone: Group) -> Team:
        """Split off this process's team. Ranks next to each other share a batch, where most is exchanged."""
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
        """Describe the placement for the plan."""
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
    """Estimate what a step of the variant takes, in arbitrary units."""
    return width * (variant.num_latents + LATENTS_PER_ACTIVE * variant.l0)


def deal(variants: list[Variant], widths: Mapping[str, int], n_teams: int) -> list[list[Variant]]:
    """Share out variants: longest first, to the least laden (Graham 1969)."""
    costs = {variant.name: cost(variant, widths[variant.site]) for variant in variants}
    teams: list[list[str]] = [[] for _ in range(n_teams)]
    loads = [0.0] * n_teams
    for variant in sorted(variants, key=lambda v: -costs[v.name]):
        least = loads.index(min(loads))
        teams[least].append(variant.name)
        loads[least] += costs[variant.name]
    return [[variant for variant in variants if variant.name in team] for team in teams]


def allowed_latent_ranks(
    asked: int | None, variants: list[Variant], kernels: str, widths: Mapping[str, int]
) -> int | None:
    """Find how many processes may share an SAE's latents: as many as are asked for, or one where some variant
    needs them whole.

    Args:
        asked: by the user; None leaves it open.
        variants: all of the run.
        kernels: torch, numba or triton.
        widths: D of each site.

    Raises:
        ConfigError: more are asked for than may be.
    """
    whole = ""
    if kernels == "torch":
        whole = (
            "kernels torch do not split an SAE's latents; leave it out, or train with kernels numba on CPUs, "
            "triton on GPUs"
        )
    elif any(variant.loss in IN_MODEL for variant in variants):
        whole = "a loss of the model needs all latents of an SAE in one process; leave it out"
    elif any(v.multi_topk or v.nested_k or v.architecture == "groupmax" for v in variants):
        whole = "multi_topk, nested_k and groupmax need all latents of an SAE in one process; leave it out"
    elif any(v.n_layers > 1 for v in variants):
        whole = "a cross-layer transcoder needs all its latents in one process; leave it out"
    elif kernels == "triton" and any(is_stepped_by_torch(v, widths) for v in variants):
        whole = f"on a GPU {WITHOUT_KERNELS} need all latents of an SAE in one process; leave it out"
    if whole and (asked or 1) > 1:
        raise ConfigError(f"latent_ranks {asked}: {whole}")
    return 1 if whole else asked


def is_stepped_by_torch(variant: Variant, widths: Mapping[str, int]) -> bool:
    """Tell whether a GPU has no kernels for how a variant's weights are stepped.

    Args:
        variant: its settings.
        widths: D of its sites.
    """
    if len({widths[site] for site in variant.sites}) > 1:
        return True
    by_torch = variant.optimizer in ("signum", "muon") or variant.is_frozen
    by_torch |= variant.decoder_rows == "free" and len(variant.parts) > 1
    return by_torch or variant.clip_grad_norm is not None


def choose(
    variants: list[Variant],
    widths: Mapping[str, int],
    n_processes: int,
    data_ranks: int | None = None,
    latent_ranks: int | None = None,
    *,
    idle_allowed: bool = False,
    memory_bytes: int | None = None,
) -> Placement:
    """Choose the placement with the least time per step by estimate, among those the user's numbers allow.

    Args:
        variants: all of the run.
        widths: D of each site.
        n_processes: of the world.
        data_ranks: processes that share a batch's tokens; None leaves it open: 1.
        latent_ranks: processes that share an SAE's latents; None leaves it open.
        idle_allowed: whether there may be teams without a variant, as when some were stopped.
        memory_bytes: memory of each process's device; None where it is not known to be a limit.

    Raises:
        ConfigError: no placement fits the numbers, the variants, or the memory.
    """
    data = data_ranks or 1
    possible = [latent_ranks] if latent_ranks else range(1, n_processes // data + 1)
    fitting = [shards for shards in possible if n_processes % (data * shards) == 0]
    if not fitting:
        raise ConfigError(
            f"data_ranks {data} × latent_ranks {latent_ranks or 1} does not divide the number of processes, "
            f"{n_processes}; give others, or start another number"
        )
    wide = [
        shards
        for shards in fitting
        if all(v.num_latents // shards >= _most_codes(v, widths) for v in variants)
    ]
    if not wide:
        raise ConfigError(
            f"in {fitting[0]} parts some SAE has fewer than k latents in each; lower --latent-ranks"
        )
    placements = [_placement(variants, widths, n_processes, data, shards) for shards in wide]
    working = [placement for placement in placements if all(placement.teams)] or (
        placements if idle_allowed else []
    )
    if not working:
        n_teams = n_processes // (data * wide[-1])
        raise ConfigError(
            f"{n_teams} teams for {counted(len(variants), 'variant')}: some would idle; "
            "start fewer processes, or raise --latent-ranks or --data-ranks"
        )
    if memory_bytes is not None:
        working = _that_fit(working, widths, memory_bytes)
    return min(working, key=_seconds)


def _most_codes(variant: Variant, widths: Mapping[str, int]) -> float:
    """Return the most active latents that a token may have: where k is annealed, it starts at D."""
    return max(widths[variant.site], variant.l0) if variant.k_anneal_steps else variant.l0


def _that_fit(placements: list[Placement], widths: Mapping[str, int], memory_bytes: int) -> list[Placement]:
    """Keep the placements whose weights and moments leave some of the device free for the step."""
    needed = {placement: placement.state_bytes(widths) for placement in placements}
    fitting = [placement for placement in placements if needed[placement] < MEMORY_SHARE * memory_bytes]
    if not fitting:
        raise ConfigError(
            f"the variants need {min(needed.values()) / 2**30:.1f} GiB per process, its device has "
            f"{memory_bytes / 2**30:.1f} GiB; start more processes, or use --optimizer-state bf16"
        )
    return fitting


def _placement(
    variants: list[Variant], widths: Mapping[str, int], n_processes: int, data: int, shards: int
) -> Placement:
    teams = deal(variants, widths, n_processes // (data * shards))
    costs = [sum(cost(variant, widths[variant.site]) for variant in team) for team in teams]
    total = sum(costs)
    return Placement(
        tuple(variants),
        tuple(map(tuple, teams)),
        tuple(team_cost / total for team_cost in costs),
        data,
        shards,
    )


def _seconds(placement: Placement) -> float:
    """Estimate the time of a step, in units of the whole work on one process."""
    overhead = TEAM_OVERHEAD * math.log2(placement.team_size)
    return max(placement.loads) / placement.team_size * (1 + overhead)
