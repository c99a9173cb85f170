"""Random changes of a file's bytes, and of the values in its JSON."""

import json
import random
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**70, -(2**70), 0.5, 1e300, "", "x", "../x", "\ud800", "\0", [],
    {}, [1], {"k": 1}, [[[]]], "1" * 400, "topk", "layers.1",
)  # fmt: skip


def changed_bytes(raw: bytes, chance: random.Random) -> bytes:
    """One of: bits flipped, a piece cut out, zeroed, doubled or replaced, the end lost."""
    data = bytearray(raw)
    if not data:
        return bytes([chance.randrange(256)])
    # Headers are where most of the meaning is.
    most = len(data) if chance.random() < 0.5 else min(len(data), 400)
    at, length = chance.randrange(most), chance.choice((1, 1, 2, 8, 64))
    kind = chance.choice(("bit", "bit", "cut", "zero", "double", "random", "end"))
    if kind == "bit":
        data[at] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del data[at : at + length]
    elif kind == "zero":
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif kind == "double":
        data[at:at] = data[at : at + length]
    elif kind == "random":
        data[at : at + length] = chance.randbytes(len(data[at : at + length]))
    else:
        del data[at:]
    return bytes(data)


def changed_json(raw: bytes, chance: random.Random) -> Any:
    """The values with one of them, anywhere, another or gone."""
    whole = json.loads(raw)
    places = list(_places(whole))
    holder, key = chance.choice(places)
    if isinstance(holder, dict) and chance.random() < 0.2:
        del holder[key]
    elif isinstance(holder, dict) and chance.random() < 0.1:
        holder[chance.choice(("x", "k", "seal", "format"))] = chance.choice(ODD)
    else:
        holder[key] = chance.choice(ODD)
    return whole


def _places(value: Any) -> Any:
    """Every (holder, key) in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)
