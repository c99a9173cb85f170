"""Thresholds while they are trained."""

import pytest
from steps import make_bank, planted, train

from saemill.train.sweep.variant import Variant

T, D, F = 64, 12, 40


@pytest.mark.parametrize("penalty", ["step", "tanh"])
def test_thresholds_do_not_go_below_0(penalty: str) -> None:
    """Oracle: what an SAE that is saved may have: thresholds of 0 and above. The rate is such that without a
    bound some go below, and stay there."""
    variant = Variant(
        name="v", site="s", architecture="jumprelu", num_latents=F, lr=0.1, l0_coefficient=1e-5,
        sparsity_penalty=penalty,  # type: ignore[arg-type]
    )  # fmt: skip
    batches = planted(20, T, D)
    bank = make_bank([variant], batches[0])
    train(bank, batches)
    (learner,) = bank.learners
    threshold_F = learner.parameters.further_F["threshold"]
    assert threshold_F.min() == 0
    assert threshold_F.max() > 0
