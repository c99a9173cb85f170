"""Banks of learners on small planted rows, for any backend and width."""

import torch
from torch import Tensor

from saemill.train.backends.architecture import Dead, Seen
from saemill.train.backends.choose import make_backend
from saemill.train.backends.codes import Above, BatchLargest
from saemill.train.backends.parameters import Parameters
from saemill.train.backends.team import ALONE, Team
from saemill.train.learner.bank import Bank
from saemill.train.learner.learner import Learner
from saemill.train.stream.scaling import Scaling
from saemill.train.sweep.variant import Variant

GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where kernels run: without a GPU in Triton's interpreter."""


def planted(n_batches: int, n_tokens: int, d: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """Batches of sparse sums of 60 directions, with noise."""
    generator = torch.Generator().manual_seed(77)
    directions = torch.randn(60, d, generator=generator)
    picks = torch.randint(0, 60, (n_batches, n_tokens, 3), generator=generator)
    noise = 0.1 * torch.randn(n_batches, n_tokens, d, generator=generator)
    return list((directions[picks].sum(2) + noise).to(device))


def outputs(x_TD: Tensor, d_out: int) -> Tensor:
    """What a small network makes of rows, part of it linear: for a transcoder to predict. [T, E]."""
    generator, d = torch.Generator().manual_seed(78), x_TD.shape[1]
    first, second, linear = (
        torch.randn(shape, generator=generator).to(x_TD) / shape[0] ** 0.5
        for shape in ((d, 2 * d), (2 * d, d_out), (d, d_out))
    )
    return torch.relu(x_TD @ first) @ second + 0.5 * x_TD @ linear


def make_bank(
    variants: list[Variant],
    sample_TD: Tensor,
    *,
    kernels: str = "numba",
    dtype: torch.dtype = torch.float32,
    dead_after: int = 10**9,
    scaling: Scaling | None = None,
    team: Team = ALONE,
    sample_TE: Tensor | None = None,
) -> Bank:
    """The learners of some variants, all of one site, or transcoders; by default in the rows' own units."""
    scaling = scaling or Scaling(torch.zeros(sample_TD.shape[1], device=sample_TD.device), 1.0)
    backend = make_backend(kernels, dtype, team)
    target = None
    if sample_TE is not None:
        target = (Scaling(torch.zeros(sample_TE.shape[1], device=sample_TE.device), 1.0), sample_TE)
    learners = [Learner(variant, scaling, backend, sample_TD, dead_after, target) for variant in variants]
    return Bank("s", scaling, backend, learners, target and ("t", target[0]))


def silence(bank: Bank, share: float = 0.25) -> Bank:
    """Make the first latents of each learner too weak to fire, so that they die and AuxK runs."""
    for learner in bank.learners:
        w_enc_FD = learner.parameters.w_enc_FD
        w_enc_FD[: int(share * len(w_enc_FD))] *= 0.01
        learner.weights.refresh()
    return bank


def train(bank: Bank, batches: list[Tensor]) -> Bank:
    """Step through the batches, from step 0."""
    with torch.no_grad():
        for step, x_TD in enumerate(batches):
            bank.step(x_TD, 1.0, step)
    return bank


def seen(learner: Learner, p: Parameters, x_TD: Tensor) -> Seen:
    """What the loss must know of the whole batch, from dense pre-activations."""
    is_centred = learner.variant.apply_b_dec_to_input and not learner.variant.target_site
    inputs_TD = x_TD - p.b_D if is_centred else x_TD
    pre_TF = inputs_TD @ p.w_enc_FD.T + p.b_enc_F
    known = Seen(Dead(learner.dead.latents_S.cpu(), learner.dead.n_in_team), len(x_TD))
    rule = learner.architecture.rule(p)
    if isinstance(rule, BatchLargest):
        best = pre_TF.clamp(min=0).flatten().sort(descending=True).values
        # Less than it by more than a product's rounding.
        return known._replace(cutoff=best[round(rule.k * len(x_TD)) - 1].detach() * (1 - 1e-9))
    if isinstance(rule, Above):
        count_F = (pre_TF > rule.threshold_F).sum(0).double().detach()
        return known._replace(count_F=count_F, n_active=count_F.sum())
    return known
