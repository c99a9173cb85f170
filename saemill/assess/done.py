"""Whether an assessment is on disk already, of the same run by the same settings."""

from saemill.assess.config import AssessConfig
from saemill.common import durable
from saemill.common.errors import StoreError
from saemill.common.stores import assessments, runs
from saemill.common.stores.tokens import TokenStore


def is_done(config: AssessConfig) -> bool:
    """Tell whether the folder holds, whole, the assessment of this run, on this text, by these settings."""
    try:
        assessment = assessments.read(config.folder)
        is_whole = not assessments.problems(config.folder)
    except StoreError:  # assessed again, it is whole
        return False
    try:
        of = hash_of(config)
    except FileNotFoundError:
        return False
    return is_whole and (assessment["settings"], assessment["of"]) == (config.identity(), of)


def hash_of(config: AssessConfig) -> str:
    """Hash what is assessed: the run, whose SAEs know their store, and the tokens if they are named.

    Raises:
        FileNotFoundError: the run or the tokens are unfinished.
    """
    run = durable.hash_file(config.run / runs.FINISHED)
    if config.tokens is None:
        return run
    return durable.hash_json([run, TokenStore(config.tokens).fingerprint])
