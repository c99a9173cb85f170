"""Several sources in one: whose document comes next.

The next document is one of the source that has the fewest tokens for its share, the first of those that are
alike. So, wherever the mix ends, each source has its share of the tokens to within its longest document, and
within the rows at the end that are not full. It ends where the source whose turn it is has run out: no source
is read twice, and none makes up for another.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from saemill.tokenize.source import Batch
from saemill.tokenize.words import LabelledWords


@dataclass(frozen=True, slots=True)
class Document:
    """One document with its ids."""

    source: int
    """Number of its dataset."""
    source_index: int
    """Its number there."""
    ids: list[int]
    text: str | None = None
    roles: list[str | None] = field(default_factory=list)
    """Of a conversation, the role of each id."""
    is_special: bool = False
    """Whether its text writes a special token out."""
    label: str | None = None
    """Name of its source, of a column of these."""
    words: LabelledWords | None = None
    """Its labelled words, and below the number of the word of each id."""
    token_words: list[int] = field(default_factory=list)


def documents_of(source: int, batches: Iterator[Batch]) -> Iterator[Document]:
    """List the documents of tokenized batches of one dataset, by its number."""
    for batch in batches:
        assert batch.input_ids is not None
        for place, ids in enumerate(batch.input_ids):
            yield Document(
                source,
                batch.source_index[place],
                ids,
                None if batch.texts is None else batch.texts[place],
                [] if batch.roles is None else batch.roles[place],
                batch.special is not None and batch.special[place],
                None if batch.labels is None else batch.labels[place],
                None if batch.words is None else batch.words[place],
                [] if batch.token_words is None else batch.token_words[place],
            )


@dataclass(slots=True)
class Mix:
    """Sources that take turns by their shares; of one source all documents come in their order."""

    streams: list[Iterator[Document]]
    shares: list[float]
    n_tokens: list[int] = field(init=False)
    """Number of tokens of each source so far: whoever takes a document counts its own."""
    ran_out: int | None = field(init=False, default=None)
    """Source at whose end the mix ended; None where it did not end by itself."""

    def __post_init__(self) -> None:
        self.n_tokens = [0] * len(self.streams)

    def __iter__(self) -> Iterator[Document]:
        while True:
            each = range(len(self.streams))
            source = min(each, key=lambda number: self.n_tokens[number] / self.shares[number])
            document = next(self.streams[source], None)
            if document is None:
                self.ran_out = source
                return
            yield document
