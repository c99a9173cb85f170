"""Names in place of the paths of this machine, in what is uploaded."""

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import yaml
from markupsafe import escape

from saemill.common import durable
from saemill.common.records import R

ABSOLUTE = re.compile(r"/.|~|file:|[A-Za-z]:[\\/]|\\\\")


class Names:
    """Paths that some settings hold, and the name of each: its last part.

    Args:
        documents: settings, as JSON or YAML values. Each text in them that is an absolute path is taken,
            wherever it is found later.
    """

    def __init__(self, *documents: Any) -> None:
        paths = {text for text in _texts(documents) if ABSOLUTE.match(text)}
        in_html = {html.escape(path) for path in paths} | {str(escape(path)) for path in paths}
        longest_first = sorted(paths | in_html, key=len, reverse=True)
        self._names = {path: PurePath(path.replace("\\", "/")).name or "folder" for path in longest_first}
        choice = "|".join(map(re.escape, longest_first))
        self._paths = re.compile(rf"(?<![\w.])(?:{choice})(?![\w-])" if choice else r"(?!)")

    def of(self, value: Any) -> Any:
        """Put names in place of the paths in a JSON or YAML value."""
        if isinstance(value, dict):
            return {key: self.of(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.of(item) for item in value]
        return self.in_text(value) if isinstance(value, str) else value

    def record(self, record: R) -> R:
        """Put names in place of the paths in a record."""
        return type(record).model_validate_json(json.dumps(self.of(record.model_dump(mode="json"))))

    def in_text(self, text: str) -> str:
        """Put names in place of the paths in a text or HTML."""
        return self._paths.sub(lambda match: self._names[match[0]], text)

    def content(self, file: Path) -> bytes:
        """Read a JSON, YAML or HTML file as it is uploaded; byte for byte the same if no path is in it."""
        raw = file.read_bytes()
        if file.suffix == ".html":
            return self.in_text(raw.decode()).encode()
        value = yaml.safe_load(raw) if file.suffix == ".yaml" else durable.read_json(file)
        renamed = self.of(value)
        if renamed == value:
            return raw
        if file.suffix == ".yaml":
            return yaml.safe_dump(renamed, sort_keys=False).encode()
        return as_json(renamed)


def as_json(value: Any) -> bytes:
    """Write a JSON file's content, as saemill writes it."""
    return json.dumps(value, indent=1, allow_nan=False).encode() + b"\n"


def _texts(value: Any) -> Iterator[str]:
    """List every text in a JSON or YAML value but the keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
