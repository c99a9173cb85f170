"""`final_assessment.json`: what it holds, and its reader. It is written last and names its other files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from saemill.common import durable, records
from saemill.common.errors import StoreError
from saemill.common.records import Count, File, Hash, Name, Positive, Record
from saemill.common.stores import runs
from saemill.common.stores.features import Passage, Snippet

FILE = runs.ASSESSMENT
FORMAT = "saemill assessment 5"
ALIASES = {"absorption": "max_decoder_cosine", "absorption_random": "max_decoder_cosine_random"}
"""Names that figures had in earlier formats: written beside the present ones, for readers of the
JSON alone."""
REPAIR = "Run `saemill assess` again."


class Figure(Record):
    """A figure with its 95% interval, or null with the reason."""

    value: float | list[float] | None
    lo: float | None = None
    hi: float | None = None
    reason: str | None = None
    """Reason why there is no value, or no interval."""
    distinguishable: bool | None = None
    """Whether 0 lies outside the interval, of a difference."""

    @model_validator(mode="after")
    def _null_has_a_reason(self) -> "Figure":
        if self.value is None and not self.reason:
            raise ValueError("a figure that is null needs a reason")
        return self


class Check(Record):
    """One check: of the verdict, or of a threshold."""

    name: str
    value: float | None
    threshold: str
    passed: bool | None
    """Outcome; None where it is unknown."""
    reason: str | None = None
    metric: str | None = None
    """Figure that it is about; only of the verdict."""
    against: str | None = None
    """Baseline that it compares with: the value is a share of that one's error."""
    lo: float | None = None
    hi: float | None = None


class Cut(Record):
    """An SAE within a variant: of its first latents alone, of another k, or at one site of a crosscoder."""

    name: str
    num_latents: Positive
    k: Positive | None
    metrics: dict[str, Figure]


class Group(Record):
    """Some tokens, by their position in the row or the length of their activation."""

    by: Literal["position", "length"]
    label: str
    """Ends of the interval."""
    n_tokens: Count
    fvu: float | None
    """FVU there, around the cached mean; None where there is no variance."""


class Worst(Record):
    """A token on which an SAE errs most, of its document."""

    times: float
    """Squared error, in means over all tokens."""
    place: Snippet | Passage


class DenseLatent(Record):
    """A latent that fires on more than a tenth of the tokens."""

    latent: Count
    density: float
    kind: Literal["antipodal", "position", "length", "component", "other"]
    """What it follows, the first of these that holds."""
    antipode: Count
    """Latent with the most opposite decoder row."""
    decoder_cosine: float
    encoder_cosine: float
    """Cosines of their rows."""
    with_position: float | None
    with_length: float | None
    """Correlations of its activation with log₂(1 + position) and ‖x − mean‖; None where one is constant."""
    with_component: float | None
    """Cosine of its decoder row and the first principal component; None where that is not known."""


class SparseProbe(Record):
    """A probe for a label on the latents that tell it best."""

    label: str
    k: Positive
    latents: tuple[Count, ...]
    """Those latents, the best first; fewer than k where no more fire."""
    auc: Figure
    above_random: Figure | None = None
    """Its AUC minus that of the random dictionary, over the same groups; None of that itself."""


class AbsorbedConcept(Record):
    """How much of a concept an SAE's main latents for it miss, or why that is not known."""

    concept: str
    missing: str | None = None
    main: tuple[Count, ...] = ()
    n_words: Count = 0
    """Words that it was measured on."""
    fraction: Figure | None = None
    full: Figure | None = None
    recall: Figure | None = None
    """Share of the words on which a main latent fires."""
    error_share: float | None = None
    """Share of the words' projections that no latent holds."""
    fraction_shuffled: Figure | None = None
    """Absorbed fraction of labels that were shuffled among the words."""


class OnActivations(Record):
    """A probe on the activations of a site themselves."""

    auc: Figure
    auc_shuffled: Figure
    """AUC where labels were shuffled among the groups."""
    f1: float | None
    """F1 on words that it never saw; None where absorption was not asked for."""
    not_held: str | None
    """Reason why the model does not hold it as a direction."""


class Label(Record):
    """A label that was probed for, or why it was not."""

    name: str
    split_by: Literal["word type", "document"]
    share: float
    """Share of the examples that have it."""
    missing: str | None
    activations: dict[str, OnActivations]


class ProbeExamples(Record):
    """The examples of probes, in parts that share no group."""

    split_by: Literal["word type", "document"]
    column: str | None = None
    """Column of the corpus that labels them; None where the labels are of the text itself."""
    n_groups: Count
    n_fitted: Count
    n_chosen_by: Count
    n_tried: Count


class Probes(Record):
    """What was probed for, and what the activations themselves tell."""

    ks: tuple[Positive, ...]
    examples: tuple[ProbeExamples, ...]
    labels: tuple[Label, ...]


class Entry(Record):
    """One variant."""

    name: Name
    site: str
    target_site: str | None = None
    """Site that a transcoder predicts; left out of an SAE."""
    k: Positive | None
    """Most latents active per token; None where latents have thresholds."""
    architecture: str = "topk"
    """What it was trained as. Left out where it is the default, as all that an entry need not have."""
    num_latents: Positive
    tokens_trained: Count | None
    """None where the SAE's files do not tell."""
    seed: Count | None = None
    """Seed of its initial weights; left out where it is not known."""
    control: Literal["random", "pca", "frozen", "together"] | None = None
    """Kind of control that it is; left out of a variant."""
    twins: tuple[str, ...] = ()
    """SAEs of the run that differ from it in the seed alone."""
    found_in_seeds: tuple[Count, ...] = ()
    """Counts of its live latents by the number of these in which each is found, from none to all."""
    diverged_at_step: Count | None
    not_measured: str | None
    metrics: dict[str, Figure]
    evidence: tuple[Check, ...]
    """Checks of the verdict."""
    verdict: str
    checks: tuple[Check, ...]
    """Checks of the four thresholds."""
    checks_passed: str
    """Number of these that passed, of those that are known."""
    versus_best: dict[str, Figure] | None = None
    cuts: tuple[Cut, ...] = ()
    """SAEs within it, where there are any."""
    by_source: dict[str, dict[str, Figure]] = Field(default_factory=dict)
    """Figures on the documents of each source, where there are several."""

    groups: tuple[Group, ...] = ()
    worst: tuple[Worst, ...] = ()
    norm_shares: dict[str, tuple[Count, ...]] = Field(default_factory=dict)
    """Of a crosscoder, by site: counts of its live latents by the site's share in the lengths of the parts of
    their decoder rows, in bins of one width from 0 to 1."""
    dense: tuple[DenseLatent, ...] = ()
    """Dense latents, those that fire most often first."""
    probes: tuple[SparseProbe, ...] = ()
    absorbed: tuple[AbsorbedConcept, ...] = ()

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        optional: dict[str, Any] = {"architecture": "topk", "cuts": (), "by_source": {}, "target_site": None}
        optional |= {"seed": None, "control": None, "twins": (), "groups": (), "worst": ()}
        optional |= {"norm_shares": {}, "found_in_seeds": (), "dense": (), "probes": (), "absorbed": ()}
        left_out = {name for name, default in optional.items() if getattr(self, name) == default}
        values = {name: value for name, value in serialize(self).items() if name not in left_out}
        metrics = values["metrics"]
        values["metrics"] |= {old: metrics[new] for old, new in ALIASES.items() if new in metrics}
        return values


class LeastCDec(Record):
    """The L0 with the smallest c_dec among SAEs that differ in their sparsity alone."""

    variants: tuple[Name, ...]
    """SAEs of the group, by L0."""
    least: Name
    l0: float
    c_dec: float
    at_end: bool
    """Whether it is the sparsest or the densest of them."""


class OtherDocuments(Record):
    """The best variant on documents that played no role in choosing it."""

    chosen_by: Literal["fvu", "delta_ce"]
    n_documents_chosen_on: Count
    n_documents: Count
    overlap: bool
    metrics: dict[str, Figure]


class BestAt(Record):
    """The best of the variants that replace the same sites."""

    site: str
    """Site that it replaces, or those that it does, joined."""
    variant: Name
    on_other_documents: OtherDocuments


class Place(Record):
    """Distances and zeros of a site's evaluation rows."""

    n_zero: Count
    """Number of zero vectors."""
    n_far: Count
    """Number of rows more than ten times as far from the cached mean as the median training row."""
    largest_ratio: float | None
    """Ratio of the largest distance to that median; None where the median is 0."""
    unheld: tuple[Count, ...]
    """Dimensions that the stored type cannot hold."""


class Data(Record):
    """The data that was measured on."""

    chosen: str
    tokens_fingerprint: Hash
    unit: Literal["token", "passage"]
    document: str
    n_tokens: Positive
    n_documents: Positive
    n_documents_left_out_as_seen: Count
    n_tokens_with_losses: Count
    mask: dict[str, Any]
    dead_percentage_threshold: float
    identity_splice_nats: dict[str, float] | None
    sites: dict[str, Place]
    notes: tuple[str, ...]
    """Sentences on what the figures do not show."""
    model_check: str | None


class Assessment(Record):
    """The whole of it."""

    format: Literal["saemill assessment 5"] = "saemill assessment 5"
    settings: dict[str, Any]
    of: Hash
    data: Data
    thresholds: dict[str, float]
    best_variant: Name
    best_on_other_documents: OtherDocuments
    best_at_other_sites: tuple[BestAt, ...] = ()
    """Where variants replace other sites than the best one does, the best of each of these groups."""
    variants: tuple[Entry, ...]
    controls: tuple[Entry, ...]
    least_c_dec: tuple[LeastCDec, ...] = ()
    """One finding per group of three L0 or more."""
    probes: Probes | None = None
    """Set where probes or absorption were asked for."""
    n_processes: Positive
    versions: dict[str, str]
    seconds: float
    files: tuple[File, ...]
    """Other files of the folder that belong to the assessment: the report, sums per document, latents."""

    def __getitem__(self, name: str) -> Entry:
        """Return the entry of a variant or a control by its name.

        Raises:
            KeyError: there is none of this name.
        """
        entries = {entry.name: entry for entry in (*self.variants, *self.controls)}
        if name not in entries:
            raise KeyError(f"{name!r}; there are {', '.join(entries)}")
        return entries[name]


def checked(values: Mapping[str, Any]) -> Assessment:
    """Make the record of these values."""
    return Assessment.model_validate_json(json.dumps(values, allow_nan=False))


def load(folder: Path) -> Assessment:
    """Load the assessment in a folder.

    Raises:
        MissingError: there is none.
        StoreError: it is damaged, or of another version.
    """
    return records.read(folder / FILE, Assessment, REPAIR)


def read(folder: Path) -> dict[str, Any]:
    """Read an assessment as `load` does, as plain values."""
    return load(folder).model_dump(mode="json")


def densities(folder: Path) -> dict[str, NDArray[np.float64]]:
    """Read the share of tokens on which each latent of each variant fired, [F], by the variant's name.

    Raises:
        MissingError: there is none.
        StoreError: its table is not the one that was written.
    """
    listed = {file.path: file for file in load(folder).files}
    if runs.LATENTS not in listed or (problem := listed[runs.LATENTS].problem(folder)):
        raise StoreError(f"{folder / runs.LATENTS}: {problem or 'it is not listed'}. {REPAIR}")
    table = pq.read_table(folder / runs.LATENTS, columns=["variant", "density"])
    names, density = np.array(table["variant"]), table["density"].to_numpy()
    return {str(name): density[names == name] for name in dict.fromkeys(names.tolist())}


def problems(folder: Path) -> list[str]:
    """List each file of the assessment in a folder that is missing or of other content; in a run's own
    folder, also whether it is of other SAEs than the run's.

    Raises:
        MissingError, StoreError: as `load`.
    """
    assessment = load(folder)
    bad = records.problems(folder, assessment.files)
    of_run = assessment.settings.get("tokens") is None and (folder / runs.FINISHED).exists()
    if of_run and durable.hash_file(folder / runs.FINISHED) != assessment.of:
        bad.append(f"{folder / FILE} is of other SAEs than {folder / runs.FINISHED} tells of")
    return bad
