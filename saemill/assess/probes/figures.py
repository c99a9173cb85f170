"""What probes found, as figures with intervals: of each label and concept, and their means."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from saemill.assess.probes.absorption import Absorbed, gate
from saemill.assess.probes.examples import TEST, TRAIN, VALIDATION
from saemill.assess.probes.probe import Estimate, mean
from saemill.assess.probes.run import Found
from saemill.assess.sums import Figure, absent

LETTERS = "begins with"
"""How the names of the concepts begin that are letters."""
LEAST_LETTERS = 20
"""Fewest letters that a model must hold for a mean over letters, as in SAEBench."""
DIFFERENCE = (-1.0, 1.0)


def described(found: Sequence[Found], ks: tuple[int, ...]) -> dict[str, Any]:
    """Describe what was probed for, on what, and what the activations themselves tell."""
    return {
        "ks": ks,
        "examples": [_examples(each) for each in found if any(each.dense.values())],
        "labels": [label for each in found for label in _labels(each)],
    }


def _examples(found: Found) -> dict[str, Any]:
    examples = found.pool.examples
    counts = np.bincount(examples.part_N, minlength=3).tolist()
    return {
        "split_by": examples.split_by,
        "column": examples.column,
        "n_groups": examples.n_groups,
        "n_fitted": counts[TRAIN],
        "n_chosen_by": counts[VALIDATION],
        "n_tried": counts[TEST],
    }


def _labels(found: Found) -> list[dict[str, Any]]:
    noun, described = found.pool.examples.split_by, []
    for name, label in found.pool.all_labels.items():
        on_activations = {}
        for site, results in found.dense.items():
            if label.missing is not None:
                break
            held = found.held[site].get(name)
            on_activations[site] = {
                "auc": results[name].area.figure(noun),
                "auc_shuffled": results[name].chance_area.figure(noun),
                "f1": None if held is None else held.f1,
                "not_held": None if held is None else gate(held),
            }
        described.append(
            {
                "name": name,
                "split_by": noun,
                "share": float(label.y_N.mean()) if len(label.y_N) else 0.0,
                "missing": label.missing,
                "activations": on_activations,
            }
        )
    return described


def of_dictionary(
    found: Sequence[Found], name: str, random: str | None
) -> tuple[dict[str, Figure], list[dict[str, Any]], list[dict[str, Any]]]:
    """Put together what was found of one dictionary.

    Args:
        found: of each pool.
        name: the dictionary.
        random: the random one beside it; None where it is that itself.

    Returns: means over labels and concepts by name, its probes, its concepts.
    """
    probes: list[dict[str, Any]] = []
    metrics: dict[str, Figure] = {}
    labels = [label.name for each in found for label in each.pool.usable(each.pool.labels)]
    if labels:
        probes = [probe for each in found for probe in _probes(each, name, random)]
        metrics |= _mean_probes(found, name, random)
    concepts = [concept for each in found for concept in _concepts(each, name)]
    if any(each.pool.concepts for each in found):
        metrics |= _mean_absorption(found, name)
    return metrics, probes, concepts


def _probes(found: Found, name: str, random: str | None) -> list[dict[str, Any]]:
    noun, probes = found.pool.examples.split_by, []
    beside = {} if random is None else {result.label: result for result in found.sparse[random]}
    for result in found.sparse[name]:
        for k, area in result.areas.items():
            probe = {"label": result.label, "k": k, "latents": result.latents[:k], "auc": area.figure(noun)}
            if random is not None:
                above = area - beside[result.label].areas[k]
                probe["above_random"] = above.figure(noun, DIFFERENCE)
            probes.append(probe)
    return probes


def _mean_probes(found: Sequence[Found], name: str, random: str | None) -> dict[str, Figure]:
    """Compute means over all labels, of all pools, by each k."""
    metrics = {}
    own = [each.sparse[name] for each in found]
    for k in next(results[0] for results in own if results).areas:
        areas = [[result.areas[k] for result in results] for results in own]
        metrics[f"probe_auc_k{k}"] = _joined(found, areas).figure("group")
        if random is not None:
            beside = [[result.areas[k] for result in each.sparse[random]] for each in found]
            above = _joined(found, areas) - _joined(found, beside)
            metrics[f"probe_auc_k{k}_above_random"] = above.figure("group", DIFFERENCE)
    shuffled = [[result.shuffled for result in results] for results in own]
    return metrics | {"probe_auc_shuffled": _joined(found, shuffled).figure("group")}


def _joined(found: Sequence[Found], estimates: Sequence[Sequence[Estimate]]) -> Estimate:
    """Compute the mean of the estimates of all pools. What a word type adds to the errors of several goes
    together."""
    n, value = sum(map(len, estimates)), 0.0
    keys, influences = [], []
    for each, some in zip(found, estimates, strict=True):
        if some:
            its_mean, share = mean(some), len(some) / n
            value += share * its_mean.value
            keys.append(each.pool.examples.key_G)
            influences.append(share * its_mean.influence_G)
    _, group = np.unique(np.concatenate(keys), return_inverse=True)
    return Estimate(value, np.bincount(group, np.concatenate(influences)).astype(np.float64))


def _concepts(found: Found, name: str) -> list[dict[str, Any]]:
    """List the concepts with what of each is absorbed; letters that the model does not hold are left to the
    list of labels."""
    concepts: list[dict[str, Any]] = []
    for concept, (own, shuffled) in found.absorbed[name].items():
        if isinstance(own, str):
            if not concept.startswith(LETTERS):
                concepts.append({"concept": concept, "missing": own})
            continue
        figures = {
            "fraction": own.fraction.figure("word type"),
            "full": own.full.figure("word type"),
            "recall": own.recall.figure("word type"),
            "fraction_shuffled": _fraction(shuffled),
        }
        concepts.append(
            {"concept": concept, "main": own.main, "n_words": own.n_words, "error_share": own.error_share}
            | figures
        )
    return concepts


def _fraction(absorbed: Absorbed | str | None) -> Figure:
    if isinstance(absorbed, Absorbed):
        return absorbed.fraction.figure("word type")
    return absent(absorbed or "not measured")


def _mean_absorption(found: Sequence[Found], name: str) -> dict[str, Figure]:
    """Compute means over the letters, if the model holds enough of them, and over the other concepts."""
    by_name = {concept: pair for each in found for concept, pair in each.absorbed[name].items()}
    letters = {name: pair for name, pair in by_name.items() if name.startswith(LETTERS)}
    others = {name: pair for name, pair in by_name.items() if name not in letters}
    measured = [own for own, _ in letters.values() if isinstance(own, Absorbed)]
    few = (
        f"the model holds {len(measured)} of {len(letters)} first letters as directions; a mean needs "
        f"{LEAST_LETTERS}"
    )
    of_letters = [own.fraction for own in measured] if len(measured) >= LEAST_LETTERS else []
    own = [own for own, _ in others.values() if isinstance(own, Absorbed)]
    shuffled = [chance for _, chance in others.values() if isinstance(chance, Absorbed)]
    none = "the model holds none of these concepts as a direction"
    reasons = {reason for reason, _ in others.values() if isinstance(reason, str)}
    if len(reasons) == 1:
        none = reasons.pop()
    return {
        "absorption_first_letter": _mean(of_letters, few),
        "absorption_words": _mean([each.fraction for each in own], none),
        "absorption_words_full": _mean([each.full for each in own], none),
        "absorption_words_recall": _mean([each.recall for each in own], none),
        "absorption_words_error": (
            {"value": float(np.mean([each.error_share for each in own]))} if own else absent(none)
        ),
        "absorption_words_shuffled": _mean([each.fraction for each in shuffled], none),
    }


def _mean(estimates: Sequence[Estimate], reason: str) -> Figure:
    return mean(estimates).figure("word type") if estimates else absent(reason)
