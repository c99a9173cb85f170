"""The latents beside the page: all of an SAE, in shards that the page's script loads one by one.

A page that is opened from a disk may fetch nothing, but it may load scripts that lie beside it. So a shard is
a script with one call, of a function of the page, and what it hands over is JSON, packed by gzip, whose own
checksum the browser checks, and written in base64:

    shard("12", "H4sIA…")

A shard's JSON has the stamp of the assessment, by which the page knows its own, and the HTML of each latent
as the page itself has it. `words` has the words of every latent, by which a reader finds it.
"""

import base64
import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from saemill.assess.report.latents import page_of, words_of
from saemill.common import durable
from saemill.common.stores.features import Features, Latent

PER_SHARD = 64
"""Latents of a shard."""
WORDS = "words.js"
LATENT_BYTES = {"token": 2_400, "passage": 8_000}
"""Bytes of a latent and its words in the shards, about, by what the store holds."""


@dataclass(frozen=True, slots=True)
class Shards:
    """The latents that lie beside a page."""

    folder: str
    """Name of the folder."""
    stamp: str
    """Hash of the assessment that they are of."""
    n_latents: int
    per_shard: int = PER_SHARD


def n_files(n_latents: int) -> int:
    """Count the files of so many latents."""
    return -(-n_latents // PER_SHARD) + 1


def write_shards(
    folder: Path, shards: Shards, features: Features, latents: Iterable[Latent]
) -> dict[str, Path]:
    """Write every latent of an SAE into a folder.

    Args:
        folder: new.
        shards: what the page will know of them.
        features: what the latents were looked for in; those in it are left aside.
        latents: all, by their numbers from 0 on.

    Returns: each file, by its path from the page's folder.
    """
    words: list[str] = []
    for number, some in enumerate(_shards(latents)):
        pages = {latent.latent: page_of(latent, features) for latent in some}
        words += [words_of(latent) for latent in some]
        _write(folder / f"{number}.js", {"stamp": shards.stamp, "latents": pages})
    _write(folder / WORDS, {"stamp": shards.stamp, "words": words})
    return {f"{shards.folder}/{file.name}": file for file in sorted(folder.iterdir())}


def _shards(latents: Iterable[Latent]) -> Iterator[list[Latent]]:
    rest = iter(latents)
    while some := list(islice(rest, PER_SHARD)):
        yield some


def _write(file: Path, content: Mapping[str, Any]) -> None:
    durable.write_bytes(file, [packed(file.stem, content)])


def packed(name: str, content: Any) -> bytes:
    """Make the script that hands a content over under a name."""
    text = base64.b64encode(gzip.compress(json.dumps(content, ensure_ascii=False).encode(), mtime=0)).decode()
    return f'shard("{name}", "{text}");\n'.encode()


def unpacked(script: bytes) -> Any:
    """Return what a script hands over; the inverse of `packed`."""
    return json.loads(gzip.decompress(base64.b64decode(script.split(b'"')[3])))
