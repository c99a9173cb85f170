"""YAML as settings are written in it: strict, so that nothing is read that was not meant.

A key that stands twice in a group is refused, with both lines. A number becomes one only where it is written
as Python writes it, and a date never: the setting decides what its text means, so that `revision: 0123` and
`run_name: 2024-01-01` stay what they are. Text that would grow without bound (aliases of aliases) is refused.
"""

from typing import Any

import yaml

from saemill.common.errors import ConfigError

MOST_VALUES = 100_000
"""Most values in one file, aliases written out."""


class _Loader(yaml.SafeLoader):
    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        if _n_values(node, {}) > MOST_VALUES:
            raise ConfigError(f"it holds more than {MOST_VALUES:,} values, aliases written out")
        return self.construct_document(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Read a group of settings; its keys are the words that stand there."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"line {line}: a key must be a plain name")
            if key.value in lines:
                raise ConfigError(
                    f"{key.value!r} is given in line {lines[key.value]} and again in line {line}; keep one"
                )
            lines[key.value] = line
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}

    def construct_number(self, node: Any) -> Any:
        """Read a number that its text says exactly, else the text."""
        text = node.value
        for kind in (int, float):
            try:
                number = kind(text)
            except (TypeError, ValueError):  # no number, or one of more digits than Python accepts
                continue
            if str(number) == text:
                return number
        return text

    def construct_text(self, node: Any) -> Any:
        return node.value


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader.construct_text)


def parse(text: str, where: str) -> Any:
    """Parse YAML.

    Args:
        text: the YAML.
        where: its place, for messages.

    Raises:
        ConfigError: it is no YAML, or none that settings are written in.
    """
    try:
        return yaml.load(text, _Loader)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from error
    except RecursionError:
        raise ConfigError(f"{where} is nested too deeply to be settings") from None
    except (ValueError, LookupError, AttributeError, TypeError) as error:  # a tag that its value does not fit
        raise ConfigError(f"{where} is not valid YAML: {error}; leave out tags such as !!int") from error


def _n_values(node: Any, known: dict[int, int]) -> int:
    """Count the values that a node stands for, each alias counted with all it stands for."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = MOST_VALUES + 1  # what holds itself has no end
    children = (
        [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else node.value
    )
    n = 1 if isinstance(node, yaml.ScalarNode) else 1 + sum(_n_values(child, known) for child in children)
    known[id(node)] = n
    return n
