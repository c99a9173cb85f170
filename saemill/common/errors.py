"""The errors a user can repair; the command line prints their text without a traceback."""


class SaemillError(Exception):
    """Base of every error whose message says what was wrong, what was got and how to repair it."""


class ConfigError(SaemillError, ValueError):
    """A setting is unknown, malformed, without effect, or contradicts what is on disk."""


class StoreError(SaemillError, RuntimeError):
    """Data on disk is missing, damaged, unfinished, or made by something else."""


class MissingError(StoreError, FileNotFoundError):
    """A file that should be there is not."""


class DiskError(StoreError, OSError):
    """The disk is full, or a file on it may not be read or written."""


class DataError(SaemillError, ValueError):
    """The input data or the model produced something that cannot be used."""


class Interrupted(SaemillError):
    """A signal asked the run to stop; its state is saved and the same command continues it."""

    exit_code = 75
    """`EX_TEMPFAIL` of sysexits.h: a scheduler may requeue on it."""
