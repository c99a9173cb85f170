"""Probes and absorption, for the SAEs of a run and the dictionaries that nobody trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy import float32
from numpy.typing import NDArray

from saemill.assess.config import PROBE_EXAMPLES, PROBE_K, AssessConfig
from saemill.assess.dealing import for_each
from saemill.assess.evalset import EvalSet
from saemill.assess.probes import absorption, codes, sparse
from saemill.assess.probes.absorption import Absorbed, Concept
from saemill.assess.probes.examples import TRAIN, Examples, document_examples, word_examples
from saemill.assess.probes.labels import (
    Label,
    column_labels,
    document_labels,
    letter_labels,
    surface_labels,
)
from saemill.assess.probes.probe import Standard
from saemill.assess.probes.sparse import DenseResult, SparseResult
from saemill.assess.probes.words import Vocabulary
from saemill.common.errors import ConfigError
from saemill.common.log import progress
from saemill.common.sae.sae import Sae
from saemill.common.stores.passages import PassageStore
from saemill.common.world import Group

NO_LABELS = (
    "probes: {path} brings no label to probe for: its passages have no sources. Import or embed them with "
    "--source-column, or leave out --probes"
)
NO_WORDS = "absorption is of words, and {path} holds embeddings of passages; leave it out"


@dataclass(frozen=True, slots=True)
class Pool:
    """Some examples, and what is to be told of them."""

    examples: Examples
    labels: list[Label]
    """Labels that are probed for."""
    concepts: list[Label] = field(default_factory=list)
    """Labels whose absorption is measured."""

    def usable(self, labels: list[Label]) -> list[Label]:
        """List those of some labels that enough groups have."""
        return [label for label in labels if label.missing is None]

    @property
    def all_labels(self) -> dict[str, Label]:
        """Map the names of all labels, probed for or not, to them."""
        return {label.name: label for label in (*self.labels, *self.concepts)}


@dataclass(frozen=True, slots=True)
class Found:
    """What was found in one pool."""

    pool: Pool
    dense: dict[str, dict[str, DenseResult]]
    """Site → label → result."""
    held: dict[str, dict[str, Concept]]
    """Site → concept → how the model holds it, of the concepts."""
    sparse: dict[str, list[SparseResult]]
    """Dictionary → results."""
    absorbed: dict[str, dict[str, tuple[Absorbed | str, Absorbed | str | None]]]
    """Dictionary → concept → how much of it is absorbed, and of the shuffled labels; or why that is not
    known."""


def prepare(config: AssessConfig, evalset: EvalSet) -> list[Pool]:
    """Choose examples and labels; nothing where neither probes nor absorption is asked for.

    Raises:
        ConfigError: there is nothing to probe for.
    """
    if not (config.probes or config.absorption):
        return []
    is_text = not isinstance(evalset.text, PassageStore)
    if config.absorption and not is_text:
        raise ConfigError(NO_WORDS.format(path=evalset.store.path))
    pools, limits = [], (config.max_tokens, config.probe_examples or PROBE_EXAMPLES)
    if is_text:
        vocabulary = Vocabulary(evalset.tokens)
        words = word_examples(evalset, vocabulary, *limits)
        labels = surface_labels(words)
        concepts = [*letter_labels(words), *labels] if config.absorption else []
        pools.append(Pool(words, labels if config.probes else [], concepts))
    if config.probes and is_text:
        for column in evalset.tokens.labels:
            words = word_examples(evalset, vocabulary, *limits, column)
            pools.append(Pool(words, column_labels(words, evalset.tokens)))
    if config.probes:
        documents = document_examples(evalset, *limits)
        if labels := document_labels(documents, evalset):
            pools.append(Pool(documents, labels))
        elif not is_text:
            raise ConfigError(NO_LABELS.format(path=evalset.store.path))
    if not any(pool.usable(list(pool.all_labels.values())) for pool in pools):
        reasons = {f"{name}: {label.missing}" for pool in pools for name, label in pool.all_labels.items()}
        raise ConfigError(
            "probes: no label can be probed for: take more tokens (--max-tokens, --probe-examples), hold out "
            "more documents when the tokens are made, or assess on others with --tokens. "
            f"{'; '.join(sorted(reasons)[:3])}"
        )
    return pools


def probe(pools: list[Pool], config: AssessConfig, saes: Mapping[str, Sae], evalset: EvalSet) -> list[Found]:
    """Probe the latents of some dictionaries, each on one process.

    Args:
        pools: from `prepare`.
        config: numbers of latents.
        saes: name → SAE, those that nobody trained among them.
        evalset: where activations come from.
    """
    ks, sites = config.probe_k or PROBE_K, codes.sites_of(saes)
    found = []
    for pool in pools:
        if not (pool.concepts or pool.usable(pool.labels)):
            found.append(Found(pool, {}, {}, {name: [] for name in saes}, {name: {} for name in saes}))
            continue
        x = codes.read(pool.examples, evalset, config.max_tokens, sites)
        found.append(probe_pool(pool, x, saes, ks, evalset.everyone))
    return found


def probe_pool(
    pool: Pool,
    x: Mapping[str, NDArray[float32]],
    saes: Mapping[str, Sae],
    ks: tuple[int, ...],
    everyone: Group,
) -> Found:
    """Probe the examples of one pool.

    Args:
        pool: the examples and labels.
        x: site → their activations, [N, D].
        saes: name → SAE.
        ks: numbers of latents, ascending.
        everyone: the processes that share the work.
    """
    examples = pool.examples
    train = examples.part_N == TRAIN
    features = {site: Standard.of(x_ND, train) for site, x_ND in x.items()}
    usable = {label.name: label for label in pool.usable(list(pool.all_labels.values()))}
    tasks = {f"{site}\n{name}": (site, label) for site in x for name, label in usable.items()}
    own = len(list(tasks)[everyone.slice_of(len(tasks))])
    with progress("probe activations", own, "labels") as advance:

        def densely(task: str) -> DenseResult:
            site, label = tasks[task]
            result = sparse.probe_densely(features[site], x[site], label, examples)
            advance(1)
            return result

        results = for_each(list(tasks), densely, everyone)
    dense = {site: {name: results[f"{site}\n{name}"] for name in usable} for site in x}
    held = {site: _held(pool, dense[site], x[site]) for site in x}
    own = len(list(saes)[everyone.slice_of(len(saes))])
    with progress("probe latents", own, "dictionaries") as advance:

        def of(name: str) -> tuple[list[SparseResult], dict[str, Any]]:
            sae = saes[name]
            site = str(sae.site)
            its_codes = codes.encode(sae, x[site])
            labels = pool.usable(pool.labels)
            found = [sparse.probe_sparsely(its_codes, label, examples, ks) for label in labels]
            absorbed = _absorbed(pool, held[site], dense[site], sae, its_codes, x[site])
            advance(1)
            return found, absorbed

        by_name = for_each(list(saes), of, everyone)
    return Found(
        pool,
        dense,
        held,
        {name: found for name, (found, _) in by_name.items()},
        {name: absorbed for name, (_, absorbed) in by_name.items()},
    )


def _held(pool: Pool, dense: Mapping[str, DenseResult], x_ND: NDArray[float32]) -> dict[str, Concept]:
    """Try the probes for the concepts."""
    return {
        label.name: absorption.hold(label.name, label.y_N, dense[label.name].probe, x_ND, pool.examples)
        for label in pool.usable(pool.concepts)
    }


def _absorbed(
    pool: Pool,
    held: Mapping[str, Concept],
    dense: Mapping[str, DenseResult],
    sae: Sae,
    its_codes: codes.Codes,
    x_ND: NDArray[float32],
) -> dict[str, tuple[Absorbed | str, Absorbed | str | None]]:
    """Measure the absorption of each concept that the model holds, and of its shuffled labels."""
    found: dict[str, tuple[Absorbed | str, Absorbed | str | None]] = {}
    for label in pool.concepts:
        if label.missing is not None:
            found[label.name] = (label.missing, None)
        elif sae.is_transcoder:
            found[label.name] = ("a transcoder's latents write to another site than the probe reads", None)
        elif reason := absorption.gate(held[label.name]):
            found[label.name] = (reason, None)
        else:
            result = dense[label.name]
            chance = absorption.hold(label.name, result.chance_y_N, result.chance_probe, x_ND, pool.examples)
            concepts = (held[label.name], chance)
            own, shuffled = (absorption.absorb(c, sae, its_codes, x_ND, pool.examples) for c in concepts)
            found[label.name] = (own, shuffled)
    return found
