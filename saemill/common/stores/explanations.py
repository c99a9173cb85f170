"""`explanations.json`: what a language model says of the latents that an assessment shows, and how well each
explanation tells where its latent fires; and its reader. It answers for the prompts and answers beside it.

The file of answers only grows, so the record answers for its beginning, which holds those that it rests on.
"""

from pathlib import Path
from typing import Any, Literal

from saemill.common import durable, records
from saemill.common.errors import StoreError
from saemill.common.records import Count, Hash, Name, Record
from saemill.common.stores.assessments import Figure
from saemill.common.stores.features import Features
from saemill.common.stores.runs import ANSWERS, EXPLANATIONS

REPAIR = "Run `saemill explain` again; answers that are there are not asked for again."


class Tested(Record):
    """A context that an explanation was tested on, of a document that it was not written from."""

    address: Count
    fires: bool
    """Whether the latent fires in it, by the SAE itself."""
    neighbour: Count | None
    """Latent with a similar decoder row that fires in it, of contexts chosen for that; None of others."""
    said: bool | None
    """What the judge said by the explanation; None where its answer could not be read."""
    said_shuffled: bool | None
    """The same by another latent's explanation; None too where there was none."""


class Explained(Record):
    """One latent."""

    latent: Count
    text: str | None
    """Explanation; None where there is none, and the score has the reason."""
    shown: tuple[Count, ...]
    """Addresses of the contexts that it was written from."""
    tested: tuple[Tested, ...]
    score: Figure
    """Balanced accuracy: the mean of the shares of firing contexts, and of silent ones drawn at random, that
    were told right."""
    shuffled: Figure
    """The same by another latent's explanation."""
    near_score: Figure
    """The same as `score`, the silent contexts being those in which a neighbour fires."""
    near_shuffled: Figure
    """That by another latent's explanation."""


class Explanations(Record):
    """All that was explained of one SAE."""

    format: Literal["saemill explanations 2"] = "saemill explanations 2"
    of: Hash
    """Hash of what was assessed, as `features.json` has it."""
    variant: Name
    features: Hash
    """Hash of the `features.json` whose contexts were shown."""
    url: str
    model: str
    """Model that explained and judged, as the endpoint calls it."""
    settings: dict[str, Any]
    """Settings that decide the result."""
    latents: tuple[Explained, ...]
    score: Figure
    """Mean over latents."""
    shuffled: Figure
    difference: Figure
    """Mean over latents of how much more its own explanation tells than another's."""
    near_score: Figure
    """The same three of contexts in which a neighbour fires."""
    near_shuffled: Figure
    near_difference: Figure
    answers_bytes: Count
    """Length of `explanations.jsonl` when this was written."""
    answers_xxh3: Hash
    """Hash of so many of its first bytes."""
    version: str
    """Version of saemill."""


def load(folder: Path) -> Explanations:
    """Load the explanations in a folder.

    Raises:
        MissingError: there are none.
        StoreError: they are damaged, or of another version.
    """
    return records.read(folder / EXPLANATIONS, Explanations, REPAIR)


def beside(folder: Path, shown: Features) -> Explanations | None:
    """Load the explanations in a folder where they are of the SAE whose latents are shown; else None.

    Raises:
        StoreError: they are damaged.
    """
    if not (folder / EXPLANATIONS).exists():
        return None
    found = load(folder)
    return found if (found.of, found.variant) == (shown.of, shown.variant) else None


def problems(folder: Path) -> list[str]:
    """List what is wrong with the explanations in a folder, and with the answers that they rest on: a line
    each, with the repair."""
    try:
        found = load(folder)
    except StoreError as error:
        return [str(error)]
    file = folder / ANSWERS
    content = file.read_bytes()[: found.answers_bytes] if file.exists() else b""
    if (len(content), durable.hash_bytes(content)) == (found.answers_bytes, found.answers_xxh3):
        return []
    return [f"{file}: {durable.DIFFERS if file.exists() else durable.MISSING}. {REPAIR}"]
