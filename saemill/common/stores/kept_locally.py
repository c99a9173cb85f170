"""How much of the stores in buckets is kept on a disk here; what is kept, and how, is in `local_cache.py`."""

from dataclasses import dataclass

from saemill.common.setting import setting
from saemill.common.sizes import size_of


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptLocally:
    """The setting of all commands that read activations."""

    local_cache: str | None = setting(
        None,
        "Most room on the disk for blocks of stores in buckets, for later reads, as 200GB; 0 for none",
        by_default="half of what is free",
        metavar="SIZE",
        decides=False,
    )
    """In the user's cache folder; of all stores and processes together."""

    @property
    def max_bytes(self) -> int | None:
        """`local_cache` in bytes; None where it is half of what is free.

        Raises:
            ConfigError: it is no size.
        """
        return None if self.local_cache is None else size_of(self.local_cache, "local_cache")
