"""Absorption: a concept that an SAE's own latents for it miss, since more special latents hold it.

Chanin et al. (2024, arXiv:2409.14507), as SAEBench measures it, but on words in their own contexts, on word
types that no probe was fitted to, and around b_dec. d̂ is the direction of a probe on the activations, and of
a word whose concept that probe tells rightly

    p = (x − b_dec) · d̂ = Σ_j s_j + error · d̂,    s_j = f_j W_dec,j · d̂

The concept's main latents M are the fewest that tell it (one more must raise F1 by more than 0.03). Where
P_M = Σ_M s_j is less than p, the rest is absorbed as far as the at most three largest other s_j of latents in
its direction account for it:

    fraction = 0 if P_M ≥ p or Σ_A s_j < 0.4 p
               1 if P_M ≤ 0
               a / (a + P_M) else, a = min(Σ_A s_j, p − P_M)

The gate: a probe must tell the concept on words that it never saw (F1 ≥ 0.6), or the model does not hold it
as a direction, and nothing can be absorbed.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saemill.assess.probes.codes import Codes
from saemill.assess.probes.examples import TEST, TRAIN, VALIDATION, Examples
from saemill.assess.probes.probe import Estimate, Probe, Standard, best_threshold, fit, pieces_of, ratio
from saemill.assess.probes.sparse import SPARSE_STRENGTH, best_latents
from saemill.common.sae.sae import Sae

LEAST_F1 = 0.6
MOST_MAIN = 10
"""Most main latents of a concept."""
RISE = 0.03
"""Least rise of F1 by which one more latent is a main latent."""
MOST_ABSORBERS = 3
WORDS_AT_ONCE = 1024
LEAST_COSINE, LEAST_SHARE = 0.1, 0.4
"""Least cosine of an absorbing latent with d̂, and least share of p that they account for."""
LEAST_COSINE_FULL = 0.025
"""Least cosine of a latent that has absorbed a word in full."""


@dataclass(frozen=True, slots=True)
class Concept:
    """A concept as the model holds it."""

    name: str
    y_N: NDArray[np.bool_]
    probe: Probe
    threshold: float
    """Score from which on the probe tells the concept."""
    f1: float
    """F1 on the part that is tried on."""


@dataclass(frozen=True, slots=True)
class Absorbed:
    """How much of one concept an SAE's main latents miss."""

    concept: str
    main: list[int]
    """Main latents, the best first."""
    n_words: int
    """Words whose concept the probe tells rightly, and of which p is positive."""
    fraction: Estimate
    """Mean absorbed fraction."""
    full: Estimate
    """Share of the words on which no main latent fires and one other accounts for 0.4 of p."""
    recall: Estimate
    """Share of the words on which a main latent fires."""
    error_share: float
    """Share of Σ p that no latent holds."""


def hold(
    name: str, y_N: NDArray[np.bool_], probe: Probe, x_ND: NDArray[np.float32], examples: Examples
) -> Concept:
    """Try a probe for a concept: the threshold is chosen on one part, F1 is that of another."""
    score_N = probe.score(x_ND)
    chosen, tried = examples.part_N == VALIDATION, examples.part_N == TEST
    threshold, _ = best_threshold(score_N[chosen], y_N[chosen])
    told_N = score_N[tried] >= threshold
    hits = int((told_N & y_N[tried]).sum())
    f1 = 2 * hits / max(1, int(told_N.sum()) + int(y_N[tried].sum()))
    return Concept(name, y_N, probe, threshold, f1)


def gate(concept: Concept) -> str | None:
    """Say why nothing can be absorbed of a concept, if the model does not hold it."""
    if concept.f1 >= LEAST_F1:
        return None
    return f"the model does not hold it: F1 {concept.f1:.2f} on words that no probe saw, {LEAST_F1} is needed"


def main_latents(codes: Codes, y_N: NDArray[np.bool_], examples: Examples) -> list[int]:
    """Choose the fewest latents that tell a concept: one more must raise F1."""
    train, chosen = examples.part_N == TRAIN, examples.part_N == VALIDATION
    best = best_latents(codes, y_N, train, MOST_MAIN, only_for=True)
    x_NK, main, reached = codes[:, best].toarray(), 0, 0.0
    for n in range(1, len(best) + 1):
        (probe,) = fit(Standard.of(x_NK[:, :n], train), y_N[train], (SPARSE_STRENGTH,))
        _, f1 = best_threshold(probe.score(x_NK[:, :n], chosen), y_N[chosen])
        if n > 1 and f1 <= reached + RISE:
            break
        main, reached = n, f1
    return [int(latent) for latent in best[:main]]


def absorb(
    concept: Concept, sae: Sae, codes: Codes, x_ND: NDArray[np.float32], examples: Examples
) -> Absorbed | str:
    """Measure how much of a concept other latents than its own hold, or say why that has no meaning.

    Args:
        concept: which the model holds.
        sae: reconstructs what the probe reads.
        codes: its latents on the examples.
        x_ND: the examples' activations.
        examples: their groups and parts.
    """
    main = main_latents(codes, concept.y_N, examples)
    if not main:
        return "no latent speaks for it"
    length = float(np.linalg.norm(concept.probe.weight_D))
    direction_D = concept.probe.weight_D / length
    w_dec_FD = sae.W_dec.detach().cpu().float().numpy()
    dot_F = Probe(direction_D, 0.0).score(w_dec_FD)
    norms = [np.linalg.norm(piece_FD.astype(np.float64), axis=1) for piece_FD in pieces_of(w_dec_FD)]
    norm_F = np.concatenate(norms)
    cosine_F = dot_F / np.maximum(norm_F, 1e-300)
    told_N = (examples.part_N == TEST) & concept.y_N & (concept.probe.score(x_ND) >= concept.threshold)
    origin = float(sae.b_dec.detach().cpu().double().numpy() @ direction_D)
    p_N = Probe(direction_D, -origin).score(x_ND, told_N)
    words, p_N = np.flatnonzero(told_N)[p_N > 0], p_N[p_N > 0]
    if not len(words):
        return "the probe tells none of the words that are tried on rightly"
    of_words = codes[words]
    fires_N = (of_words[:, main].toarray() > 0).any(1)
    p_main_N = of_words[:, main] @ dot_F[main]
    others = np.setdiff1d(np.flatnonzero(cosine_F >= LEAST_COSINE_FULL), main)
    largest_N, absorbers_N = _largest(of_words[:, others], dot_F[others], cosine_F[others])
    full_N = ~fires_N & (largest_N >= LEAST_SHARE * p_N)
    values = (absorbed_fraction(p_N, p_main_N, absorbers_N), full_N, fires_N)
    group_N, n_groups = examples.group_N[words], examples.n_groups
    n_G = np.bincount(group_N, minlength=n_groups).astype(np.float64)
    fraction, full, recall = (
        ratio(np.bincount(group_N, value_N, n_groups).astype(np.float64), n_G) for value_N in values
    )
    error_share = 1 - float((of_words @ dot_F).sum() / p_N.sum())
    return Absorbed(concept.name, main, len(words), fraction, full, recall, error_share)


def _largest(
    codes: Codes, dot_O: NDArray[np.float64], cosine_O: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Find what latents beside the main ones hold of each word: the largest of any, and the sum of the
    largest of those that may absorb.

    Args:
        codes: of the words, and of latents at a cosine of `LEAST_COSINE_FULL` or more.
        dot_O: their decoder rows times the direction.
        cosine_O: their cosines with it.
    """
    largest, absorbers, by_word = [np.zeros(0)], [np.zeros(0)], codes.tocsr()
    for start in range(0, codes.shape[0], WORDS_AT_ONCE):
        s_NO = by_word[start : start + WORDS_AT_ONCE].toarray() * dot_O
        largest.append(s_NO.max(1, initial=0.0))
        s_NO[:, cosine_O < LEAST_COSINE] = 0.0
        absorbers.append(np.sort(s_NO, axis=1)[:, -MOST_ABSORBERS:].sum(1))
    return np.concatenate(largest), np.concatenate(absorbers)


def absorbed_fraction(
    p_N: NDArray[np.float64], p_main_N: NDArray[np.float64], absorbers_N: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Compute the absorbed fraction of each word.

    Args:
        p_N: projection of each on the concept's direction, positive.
        p_main_N: what main latents hold of it.
        absorbers_N: what the largest others do.
    """
    taken_N = np.minimum(absorbers_N, p_N - p_main_N)
    below_N = np.where(p_main_N > 0, taken_N + p_main_N, 1.0)
    fraction_N = np.where(p_main_N > 0, taken_N / below_N, 1.0)
    return np.where((p_main_N >= p_N) | (absorbers_N < LEAST_SHARE * p_N), 0.0, fraction_N)
