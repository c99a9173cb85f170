"""Numbers of latents as they are asked for: `7`, or `0-99` with both ends included."""

from saemill.common.errors import ConfigError


def parsed(item: str) -> range:
    """Parse `7` or `0-99` as the latents that it names.

    Raises:
        ConfigError: it is neither.
    """
    first, dash, last = item.strip().partition("-")
    ends = (first, last) if dash else (first, first)
    if not all(end.isascii() and end.isdecimal() and len(end) < 12 for end in ends):
        raise ConfigError(f"latents must be numbers and ranges as 0-99,500, got {item!r:.80}")
    start, stop = int(ends[0]), int(ends[1]) + 1
    if start >= stop:
        raise ConfigError(f"latents: a range must rise, got {item!r:.80}")
    return range(start, stop)
