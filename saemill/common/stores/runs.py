"""A run's folder: the names in it, and the records that `saemill train` leaves.

    identity.json   the settings that decide the result; it makes a folder a run
    config.yaml     all settings, to be given to `--config` again
    metrics.jsonl   the log
    halving.json    the variants that were stopped early
    units.json      of a follower: what it took from the first shards of its store
    <variant>/      an SAE
    steps/<step>/   a finished run of its own: the SAEs as they were then; steps/latest is the last of them
    finished.json   written last: what the run came to; it answers for the SAEs and the log

`saemill assess` adds its files, for which `final_assessment.json` answers.

Every record names the run that it is of, a hash of what `identity.json` holds, so that those of two runs
cannot be confused. Checkpoints are in `train.checkpoint`.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, JsonValue, TypeAdapter, ValidationError, model_validator

from saemill.common import durable, records
from saemill.common.errors import ConfigError, StoreError
from saemill.common.records import Count, File, Hash, Name, Positive, Record
from saemill.common.stores.mask import MaskConfig

IDENTITY = "identity.json"
CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
HALVING = "halving.json"
UNITS = "units.json"
"""Name of the record of what a follower took from its store's first shards."""
CHECKPOINT = "checkpoint.json"
FINISHED = "finished.json"
WANDB, WANDB_LOGGED = "wandb.json", "wandb-logged.json"
"""Names of the settings for the process that talks to wandb, and of the record of its progress."""
WANDB_FOLDER, TENSORBOARD = "wandb", "tensorboard"
STEPS, LATEST = "steps", "latest"
"""Names of the folder of SAEs that were kept on the way, and of the link to the last ones in it."""
PROFILE = "profile.json.gz"
CARD = "README.md"
"""Name of the model card, of a run that came from the hub."""
ASSESSMENT = "final_assessment.json"
REPORT = "report.html"
BESIDE = "report-latents"
"""Name of the folder of the latents beside the page."""
PARETO = "pareto.svg"
"""Name of the picture of FVU and ΔCE against L0."""
LATENTS = "latents.parquet"
"""Name of the table of each latent's firing."""
FEATURES = "features.json"
"""Name of the record of the latents that are shown."""
EXPLANATIONS, ANSWERS = "explanations.json", "explanations.jsonl"
"""Names of the record of what a language model says of latents, and of its prompts and answers."""
DOCUMENTS, DOCUMENTS_MODEL = "documents.parquet", "documents_model.parquet"
"""Names of the sums per document, of the activations and of the model's losses."""
ANEW = "The same `saemill train` with --no-resume trains the run anew."
CHECKPOINTS = "checkpoint-"
"""Beginning of the names of checkpoints' folders."""
RESERVED = (
    *(IDENTITY, CONFIG, METRICS, HALVING, UNITS, CHECKPOINT, FINISHED),
    *(WANDB, WANDB_LOGGED, WANDB_FOLDER, TENSORBOARD, STEPS, PROFILE, CARD),
    *(ASSESSMENT, REPORT, BESIDE, PARETO, LATENTS, FEATURES, DOCUMENTS, DOCUMENTS_MODEL),
    *(EXPLANATIONS, ANSWERS),
)
"""Names in a run's folder that no variant may have."""
MOST_NAME_BYTES = 200


def _of_a_variant(name: str) -> str:
    """Refuse the name of a variant that is one of the run's own files, or that no terminal should show."""
    own = name.casefold() in {reserved.casefold() for reserved in RESERVED}
    if own or name.casefold().startswith((CHECKPOINTS, "on-")):
        raise ValueError(f"must be none of a run's own files and folders, got {name!r}")
    if not name.isprintable() or name != name.strip() or len(name.encode()) > MOST_NAME_BYTES:
        raise ValueError(f"must be a short name of printable characters, got {name!r:.80}")
    return name


VariantName = Annotated[Name, AfterValidator(_of_a_variant)]
"""Name of a variant, which is that of its folder in the run."""


def check_variant_name(name: str) -> None:
    """Refuse a name that a variant cannot have.

    Raises:
        ConfigError: it is a path, hidden, one of the run's own files, or not to be shown.
    """
    try:
        TypeAdapter(VariantName).validate_python(name)
    except ValidationError as error:
        raise ConfigError(
            f"the name of a variant {records.first_finding(error)}; name it otherwise"
        ) from error


class Identity(Record):
    """`identity.json`."""

    format: Literal["saemill run 2"] = "saemill run 2"
    settings: dict[str, JsonValue]
    """Settings that decide the result."""
    acts_fingerprint: str
    """Fingerprint of the activations that are trained on."""
    config: Hash
    """Hash (xxh3) of `config.yaml`."""

    @property
    def content(self) -> dict[str, Any]:
        """Settings that decide the result, with the activations among them."""
        return self.settings | {"acts_fingerprint": self.acts_fingerprint}

    @property
    def run(self) -> str:
        """Hash by which the run's other records name it."""
        return durable.hash_json(self.content)


class Lost(Record):
    """The state of a variant when a look of halving stopped it."""

    value: float | None
    """Value of its metric; None where it diverged."""
    best: float | None
    """Best value of the variants that it competed with."""
    cfg: Hash
    """Checksum of its SAE's cfg.json."""


class Look(Record):
    """One look of halving."""

    step: Positive
    stopped: dict[VariantName, Lost]


class Looks(Record):
    """`halving.json`."""

    format: Literal["saemill halving 2"] = "saemill halving 2"
    run: Hash
    looks: tuple[Look, ...]


class Stopped(Record):
    """A variant that halving stopped."""

    step: Positive
    metric: str
    value: float | None
    best: float | None


class Finished(Record):
    """`finished.json`."""

    format: Literal["saemill finished run 2"] = "saemill finished run 2"
    run: Hash
    variants: tuple[VariantName, ...]
    """Names of the variants in the run's order."""
    cfgs: dict[VariantName, Hash]
    """Checksums of the SAEs' cfg.json, which hold those of their weights."""
    acts: str
    """Path of the activations."""
    with_acts: str | None = None
    """Path of those of a second model; None of a run on one."""
    steps: Count
    tokens: Count
    seconds: float
    peak_rss_bytes: Count
    """Peak memory of the process that used most."""
    diverged: dict[VariantName, Count]
    """Steps at which variants diverged."""
    stopped: dict[VariantName, Stopped]
    mask: MaskConfig
    """Positions that were left out."""
    norm_over_median: float | None = None
    """Number of medians beyond which a norm was too long; None where none was."""
    n_long_tokens: Count = 0
    """Number of the store's training tokens left out for their norm, counted once."""
    imported: dict[VariantName, str] = Field(default_factory=dict)
    """Addresses of SAEs that were trained elsewhere, by their names in this folder; empty of a run."""
    files: tuple[File, ...]
    """Other files that it answers for: the log, and halving's record. None where they were not published."""

    @model_validator(mode="after")
    def _agrees(self) -> "Finished":
        """Refuse entries of variants that are not the run's."""
        known = set(self.variants)
        if not known or len(known) < len(self.variants) or set(self.cfgs) != known:
            raise ValueError("cfgs must be of the variants, each once")
        if not self.diverged.keys() | self.stopped.keys() <= known:
            raise ValueError("diverged and stopped must be variants of the run")
        return self


def is_run(folder: Path) -> bool:
    """Tell whether a folder is a run, finished or not, also one whose identity was lost."""
    return any((folder / name).exists() for name in (IDENTITY, CHECKPOINT, FINISHED))


def is_finished(folder: Path) -> bool:
    """Tell whether a folder holds a finished run, by the file that is written last."""
    return (folder / FINISHED).exists()


def points(folder: Path) -> list[Path]:
    """List the folders of SAEs that were kept on the way, in the order of their steps."""
    found = [place for place in (folder / STEPS).glob("*") if place.name.isdecimal()]
    return sorted(found, key=lambda place: int(place.name))


def identity(folder: Path) -> Identity:
    """Read `identity.json`.

    Raises:
        MissingError: the folder is no run.
        StoreError: it is damaged.
    """
    return records.read(
        folder / IDENTITY, Identity, "The `saemill train` that made the run writes it again, if it can."
    )


def finished(folder: Path) -> Finished:
    """Read `finished.json`.

    Raises:
        MissingError: the run is not finished.
        StoreError: it is damaged, or of another run.
    """
    path = folder / FINISHED
    repair = f"The SAEs can be loaded one by one. {ANEW}"
    if not path.exists():
        repair = "Finish the run with `saemill train`."
    record = records.read(path, Finished, repair)
    check_run(path, record.run, folder, repair)
    return record


def looks(folder: Path) -> tuple[Look, ...]:
    """Read the looks of `halving.json`; none where there is no such file.

    Raises:
        StoreError: it is damaged, or of another run.
    """
    path = folder / HALVING
    if not path.exists():
        return ()
    record = records.read(path, Looks, ANEW)
    check_run(path, record.run, folder, ANEW)
    return record.looks


def check_run(path: Path, run: str, folder: Path, repair: str) -> None:
    """Refuse a record that was written for another run than the one in whose folder it is.

    Raises:
        StoreError: it was.
    """
    if (folder / IDENTITY).exists() and identity(folder).run != run:
        raise StoreError(f"{path} belongs to another run than {folder / IDENTITY}. {repair}")
