"""Which variants a run has: several architectures in one grid, each with the settings that are its own."""

from typing import Any

import pytest

from saemill.common.errors import ConfigError
from saemill.train.backends.codes import Groups
from saemill.train.config import TrainConfig
from saemill.train.learner.architecture import architecture_of
from saemill.train.sweep.variant import Variant
from saemill.train.sweep.variants import of_config

D, F = 16, 64


def variants(**settings: Any) -> list[Variant]:
    """The variants of a run on one site."""
    config: Any = {"acts": "acts", "out": "out", "site": ("a",), "num_latents": (F,)}
    return of_config(TrainConfig(**config | settings), {"a": D}, 100)


def test_each_architecture_has_its_own_axes() -> None:
    """Oracle: the names, by hand: k for those that have it, targets for those that have them."""
    every = variants(architecture=("topk", "batchtopk", "jumprelu", "relu"), k=(4, 8), target_l0=(4.0, 6.5))
    assert [v.name for v in every] == [
        "a-k4-f64-s0",
        "a-k8-f64-s0",
        "a-batchtopk-k4-f64-s0",
        "a-batchtopk-k8-f64-s0",
        "a-jumprelu-f64-s0-target4",
        "a-jumprelu-f64-s0-target6.5",
        "a-relu-f64-s0",
    ]
    topk, jumprelu, relu = every[0], every[4], every[6]
    assert (topk.k_aux, topk.target_l0, topk.l1_coefficient) == (D // 2, None, None)
    assert (jumprelu.k, jumprelu.k_aux, jumprelu.penalty_warmup_steps) == (None, D // 2, 10)
    assert (relu.l1_coefficient, relu.k) == (0.05, None)


def test_prefixes_are_shares_or_numbers() -> None:
    """Oracle: the numbers, by hand; all latents are the last."""
    assert variants(architecture=("matryoshka",))[0].prefixes == (2, 6, 14, 30, 64)
    assert variants(architecture=("matryoshka",), prefixes=(0.5,))[0].prefixes == (32, 64)
    assert variants(architecture=("matryoshka",), prefixes=(5, 0.25, 64))[0].prefixes == (5, 16, 64)


def test_variants_in_a_list_may_mix_architectures() -> None:
    """Oracle: the settings that each entry has, by hand."""
    listed = (
        {"architecture": "jumprelu", "l0_coefficient": 0.01},
        {"k": 4},
        {"architecture": "batchtopk", "k": 2.5, "seed": 3},
    )
    jumprelu, topk, batchtopk = variants(variants=listed)
    assert (jumprelu.k, jumprelu.target_l0, jumprelu.l0_coefficient) == (None, None, 0.01)
    assert (topk.architecture, topk.k) == ("topk", 4)
    assert (batchtopk.name, batchtopk.k) == ("a-batchtopk-k2.5-f64-s3", 2.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": ("jumprelu",), "k": (64,)}, "k has no effect with jumprelu; use target_l0"),
        ({"architecture": ("relu",), "k": (64,)}, "k has no effect with relu; use l1_coefficient"),
        ({"target_l0": (8.0,)}, "target_l0 has no effect with topk; use k"),
        ({"architecture": ("gated",), "auxk_alpha": 0.1}, "auxk_alpha has no effect with gated"),
        ({"architecture": ("batchtopk",), "multi_topk": True}, "multi_topk has no effect with batchtopk"),
        ({"prefixes": (4,)}, "prefixes has no effect with topk; leave it out"),
        ({"variants": ({"architecture": "relu", "k": 3},)}, "k has no effect with relu"),
        ({"variants": ({"k": 3, "l1_coefficient": 1},)}, "l1_coefficient has no effect with topk"),
        ({"k": (2.5,)}, "k is a whole number of each token's latents, got 2.5"),
        ({"architecture": ("batchtopk",), "k": (65,)}, r"k must be in 1..64"),
        ({"architecture": ("jumprelu",), "target_l0": (65.0,)}, r"target_l0 must be in 1..64"),
        (
            {"architecture": ("jumprelu",), "target_l0": (8.0,), "l0_coefficient": (0.1,)},
            "give target_l0 or l0_coefficient, not both",
        ),
        (
            {"architecture": ("jumprelu",), "sparsity_penalty": "tanh"},
            "sparsity_penalty tanh leads to no target_l0; give l0_coefficient",
        ),
        (
            {
                "architecture": ("jumprelu",),
                "l0_coefficient": (0.1,),
                "sparsity_penalty": "tanh",
                "most_density": 0.1,
            },
            "most_density has no effect with sparsity_penalty tanh",
        ),
        ({"architecture": ("matryoshka",), "prefixes": (8, 4)}, "prefixes must be whole numbers .* got 8,4"),
        ({"architecture": ("matryoshka",), "prefixes": (4, 65)}, "prefixes must be whole numbers"),
        ({"architecture": ("matryoshka",), "prefixes": (4.5,)}, "prefixes must be whole numbers"),
        ({"architecture": ("matryoshka",), "prefixes": (0, 8)}, r"prefixes must be in \(0, inf\), got 0"),
        ({"k_anneal_steps": 100}, "k_anneal_steps must be fewer than the run's 100 steps, got 100"),
        (
            {"architecture": ("relu",), "penalty_warmup_steps": 200},
            "penalty_warmup_steps must be fewer than the run's 100 steps, got 200",
        ),
        ({"multi_topk": True, "k": (32,)}, "multi_topk fits 4 k latents, more than the 64"),
        ({"nested_k": (40,), "k": (32,)}, "nested_k must be ascending and below k"),
        ({"nested_k": (4,), "multi_topk": True, "k": (8,)}, "give nested_k or multi_topk, not both"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], message: str) -> None:
    """Oracle: the message."""
    with pytest.raises(ConfigError, match=message):
        variants(**settings)


def test_an_annealed_k_asks_for_no_more_latents_than_there_are() -> None:
    """Oracle: F, by hand: k starts at D, and multi-TopK finds four times as many codes."""
    (variant,) = variants(k=(2,), multi_topk=True, k_anneal_steps=9, num_latents=(24,))
    architecture = architecture_of(variant, D)
    assert architecture.at(0).groups == Groups((6, 24), (1.0, 1 / 8), by_rank=True, shown=0)


def test_groups_hold_all_latents() -> None:
    """Oracle: the message, which names both numbers; a k that divides them is taken."""
    assert variants(architecture=("groupmax",), k=(16,))[0].name == "a-groupmax-k16-f64-s0"
    with pytest.raises(
        ConfigError, match=r"k must divide the number of latents of groupmax, .* got k 7 and 64"
    ):
        variants(architecture=("groupmax",), k=(7,))
    with pytest.raises(ConfigError, match=r"got 2\.5; batchtopk takes a mean"):
        variants(architecture=("groupmax",), k=(2.5,))


def test_dead_latents_begin_again_within_the_run() -> None:
    """Oracle: the message; relu alone takes the steps."""
    relu, topk = variants(architecture=("relu", "topk"), resample_at=(50, 99))
    assert (relu.resample_at, topk.resample_at) == ((50, 99), ())
    with pytest.raises(ConfigError, match="resample_at 100 is not before the run's end, after 100 steps"):
        variants(architecture=("relu",), resample_at=(50, 100))
    with pytest.raises(ConfigError, match="resample_at has no effect with topk"):
        variants(resample_at=(50,))
