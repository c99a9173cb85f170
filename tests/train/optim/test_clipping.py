"""Clipping by the norm over all parameters."""

import pytest
import torch
from steps import make_bank, planted, train

from saemill.train.backends.cpu import update
from saemill.train.learner.learner import Learner
from saemill.train.optim.clipping import shrinkage
from saemill.train.sweep.variant import Variant


@pytest.mark.parametrize("most_norm", [1e-3, 1.0, 30.0])
def test_the_factor_is_torchs(most_norm: float) -> None:
    """Oracle: torch.nn.utils.clip_grad_norm_ on gradients of several shapes, all zeros among them."""
    for scale in (0.0, 1.0):
        leaves = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((7, 5), (5,), (3, 4))]
        grads = [
            scale * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1)) for leaf in leaves
        ]
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad.clone()
        torch.nn.utils.clip_grad_norm_(leaves, most_norm)
        factor = shrinkage(sum(float(grad.square().sum()) for grad in grads), most_norm)
        for leaf, grad in zip(leaves, grads, strict=True):
            torch.testing.assert_close(leaf.grad, grad * factor)


def trained(kernels: str, clip: float | None) -> Learner:
    """Four steps of one SAE."""
    variant = Variant(
        name="v", site="s", k=4, num_latents=101, lr=0.5, k_aux=6, optimizer="sgd", clip_grad_norm=clip
    )
    batches = planted(4, 60, 16)
    (learner,) = train(make_bank([variant], batches[0], kernels=kernels), batches).learners
    return learner


def test_blocks_of_rows_share_one_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the definition's autograd, which has all gradients at once; the loops take 11 blocks. Clipping
    changes the steps."""
    monkeypatch.setattr(update, "BLOCK_BYTES", 10 * 16 * 4)
    mine, theirs, free = trained("numba", 0.02), trained("torch", 0.02), trained("numba", None)
    for name, weights in theirs.parameters.named.items():
        torch.testing.assert_close(mine.parameters.named[name], weights, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(free.parameters.w_enc_FD, mine.parameters.w_enc_FD, rtol=1e-2)
