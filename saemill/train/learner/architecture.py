"""From a variant's settings to its architecture."""

from saemill.train.arch.abs_topk import AbsTopK
from saemill.train.arch.batchtopk import BatchTopK
from saemill.train.arch.gated import Gated
from saemill.train.arch.groupmax import GroupMax
from saemill.train.arch.jumprelu import JumpRelu
from saemill.train.arch.relu import Relu
from saemill.train.arch.topk import MULTI, TopK
from saemill.train.backends.architecture import Architecture, Auxiliary, Pull
from saemill.train.sweep.variant import Variant

TARGET_WEIGHT = 2.0
"""Weight of (L0/L0* − 1)² beside FVU, at which L0 ends 1 to 3% above its target; with dictionary_learning's 1
it is 1% more, with 4 FVU is higher: docs/recipes.md."""


def architecture_of(variant: Variant, d: int) -> Architecture:
    """Make the architecture of a variant.

    Args:
        variant: its settings, those that its architecture has resolved.
        d: width of its site.
    """
    v, name = variant, variant.architecture
    warmup_steps = v.penalty_warmup_steps or 0
    auxiliary = Auxiliary(v.k_aux or 1, v.auxk_alpha, name == "abs-topk") if v.auxk_alpha else None
    if name == "relu":
        return Relu(v.l1_coefficient or 0.0, v.lp_norm, v.decoder_rows == "unit", warmup_steps)
    if name == "gated":
        return Gated(v.l1_coefficient or 0.0, warmup_steps)
    if name == "jumprelu":
        coefficient = TARGET_WEIGHT if v.l0_coefficient is None else v.l0_coefficient
        return JumpRelu(
            bandwidth=v.bandwidth,
            target_l0=v.target_l0,
            coefficient=coefficient,
            penalty=v.sparsity_penalty,
            auxiliary=Pull(v.preact_coefficient) if v.preact_coefficient else auxiliary,
            most_density=v.most_density,
            warmup_steps=warmup_steps,
        )
    k_start, k = (
        (min(d, v.num_latents // (MULTI if v.multi_topk else 1)) if v.k_anneal_steps else 0),
        v.k or 0,
    )
    if name == "abs-topk":
        return AbsTopK(round(k), auxiliary)
    if name == "groupmax":
        return GroupMax(round(k), auxiliary)
    if name == "topk":
        return TopK(round(k), auxiliary, v.nested_k, v.multi_topk, k_start, v.k_anneal_steps)
    of_each_token = name == "matryoshka" and v.matryoshka_rule == "topk"
    return BatchTopK(k, auxiliary, v.prefixes, of_each_token, k_start, v.k_anneal_steps)
