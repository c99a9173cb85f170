"""One process of several that train a bank as a team; the first writes what came out.

Started by test_placement.py: `python ranks.py OUT SPREAD…`, once per process. Each SPREAD is
`DATA_RANKSxLATENT_RANKS:KERNELS,…`, each of whose KERNELS (torch, numba, triton in its interpreter) makes
the steps in turn.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from interpreting import interpret

if any("triton" in word for word in sys.argv):
    interpret()

import torch
from steps import make_bank, outputs

from saemill.common.world import Group, World
from saemill.train.backends.team import Team
from saemill.train.sweep.placement import choose
from saemill.train.sweep.variant import Variant

D, E, F, T, STEPS = 16, 13, 101, 63, 6
BASE = Variant(name="v", site="a", k=4, num_latents=F, lr=1e-2, k_aux=8, auxk_alpha=0.5)
OTHER = replace(BASE, k=None, k_aux=None)
KINDS = {
    "adam": BASE,
    "small": replace(BASE, num_latents=51, k=2, k_aux=2),
    "few dead": replace(BASE, k=8, k_aux=90),
    "sgd": replace(BASE, optimizer="sgd"),
    "geometric median": replace(BASE, b_dec_init="geometric_median", seed=5),
    "no auxk": replace(BASE, auxk_alpha=0.0, weight_decay=0.1),
    "clipped": replace(BASE, optimizer="sgd", lr=5.0, clip_grad_norm=0.02, weight_average=0.5),
    "muon": replace(BASE, optimizer="muon"),
    "abs-topk": replace(BASE, architecture="abs-topk"),
    "batchtopk": replace(BASE, architecture="batchtopk"),
    "matryoshka": replace(BASE, architecture="matryoshka", prefixes=(7, 40, F)),
    "jumprelu": replace(
        OTHER, architecture="jumprelu", target_l0=5.0, bandwidth=0.1, preact_coefficient=0.01
    ),
    "relu": replace(OTHER, architecture="relu", l1_coefficient=0.02, decoder_rows="free"),
    "relu, resampled": replace(OTHER, architecture="relu", l1_coefficient=0.1, resample_at=(4, 5)),
    "gated": replace(OTHER, architecture="gated", l1_coefficient=0.02),
    "transcoder": replace(BASE, target_site="t"),
    "skip transcoder": replace(
        OTHER, architecture="gated", l1_coefficient=0.02, target_site="t", skip_connection=True
    ),
    "diverging": replace(BASE, lr=1e30),
    "spoilt": replace(BASE, seed=6),
}
OF_TRITON = {"1x2": ("small", "matryoshka", "jumprelu"), "2x1": ("small",)}
"""Kinds by spread: its interpreter is slow. BatchTopK is in Matryoshka; how tokens are shared out is nothing
that the kernels see."""


def train(kind: str, team: Team, kernels: str) -> dict[str, Any]:
    variant = KINDS[kind]
    generator = torch.Generator().manual_seed(3)
    directions = torch.randn(30, D, generator=generator)

    def batch(i: int) -> torch.Tensor:
        picks = torch.randint(0, 30, (T, 3), generator=torch.Generator().manual_seed(i))
        return directions[picks].sum(1)

    def target(x_TD: torch.Tensor) -> torch.Tensor | None:
        return None if variant.target_site is None else outputs(x_TD, E)

    sample = batch(99)
    bank = make_bank(
        [variant], sample, kernels=kernels, dead_after=2 * T, team=team, sample_TE=target(sample)
    )
    (learner,) = bank.learners
    if kind == "spoilt" and learner.rows.start == 0:
        learner.parameters.w_enc_FD[0, 0] = torch.nan  # on one process alone
        learner.weights.refresh()
    with torch.no_grad():
        for step in range(5 if kind == "small" else STEPS):
            x_TD = batch(step)
            bank.step(x_TD, 1.0, step, target(x_TD))
    diverged = bank.freeze_diverged()
    dead = learner.dead_fraction()
    parts = learner.export({})
    return {
        "weights": None if parts is None else parts.weights,
        "totals": learner.totals.pop(),
        "dead": dead,
        "n_dead": learner.dead.n_in_team,
        "b": learner.parameters.b_D.clone(),
        "diverged": [int(learner.diverged_step) for learner in diverged],
    }


def main(out: Path, *spreads: str) -> None:
    world, found = World.here(), {}
    with world.connected(torch.device("cpu")) as everyone:
        for spread in spreads:
            ranks, _, every = spread.partition(":")
            data_ranks, latent_ranks = map(int, ranks.split("x"))
            placement = choose([BASE], {"a": D}, everyone.size, data_ranks, latent_ranks)
            team = placement.team_of(everyone)
            for kernels in every.split(","):
                kinds = OF_TRITON[ranks] if kernels == "triton" else KINDS
                made = {name: train(name, team, kernels) for name in kinds}
                check_alike(everyone, made)
                found[ranks, kernels] = made
        if everyone.rank == 0:
            torch.save(found, out)


def check_alike(everyone: Group, found: dict[str, dict[str, Any]]) -> None:
    """Every process has the same offset, counts and totals, bit by bit."""
    for name, result in found.items():
        for key in ("totals", "dead", "n_dead", "diverged"):
            values = everyone.all_gather_objects(result[key])
            assert all(str(value) == str(values[0]) for value in values), (name, key, values)
        for b_D in everyone.all_gather_objects(result["b"]):
            assert torch.equal(b_D, result["b"]) or b_D.isnan().any(), name


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
