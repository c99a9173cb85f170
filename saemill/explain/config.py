"""The settings of `saemill explain`."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from saemill.assess.config import AssessConfig
from saemill.common.errors import ConfigError
from saemill.common.ranges import parsed
from saemill.common.setting import about, check, like, setting

N_LATENTS = 50
"""Latents that are explained by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainConfig:
    """Settings of the command."""

    run: Path = field(metadata=about("A run that was assessed", decides=False))
    url: str = field(
        metadata=about(
            "OpenAI-compatible endpoint, as http://localhost:8000/v1: the contexts are sent there, and "
            "nowhere else",
            decides=False,
            metavar="URL",
        )
    )
    model: str = field(metadata=about("The model that explains and judges, as the endpoint calls it"))
    latents: tuple[str, ...] = setting(
        (), "Latents to explain, of those that the page shows", by_default="the first ones", metavar="I-J,K,…"
    )
    n_latents: int | None = setting(
        None, "How many of those on the page, from the first", by_default=f"{N_LATENTS}", metavar="N", least=1
    )
    api_key_env: str | None = setting(
        None,
        "Environment variable that holds the endpoint's key",
        by_default="no key is sent",
        metavar="VARIABLE",
        decides=False,
    )
    temperature: float = setting(0.0, "Temperature of the answers", within="[0, 2]")
    max_answer_tokens: int = setting(
        1000, "Most tokens of an answer; 0 leaves that to the endpoint", metavar="N", least=0
    )
    at_once: int = setting(4, "Questions that are asked at the same time", least=1, decides=False)
    timeout_seconds: float = setting(
        120.0, "Seconds to wait for an answer", metavar="SECONDS", within="(0, 86400]", decides=False
    )
    acts: Path | None = like(AssessConfig, "acts")
    with_acts: Path | None = like(AssessConfig, "with_acts")
    local_cache: str | None = like(AssessConfig, "local_cache")
    device: str = like(AssessConfig, "device")

    def __post_init__(self) -> None:
        check(self)
        parts = _split(self.url)
        if parts is None:
            raise ConfigError(
                f"url must be that of an endpoint, as http://localhost:8000/v1, got {self.url!r:.80}"
            )
        if "?" in self.url or "#" in self.url:
            raise ConfigError(
                f"url must end in the path before /chat/completions, with no ? or #, got {self.url!r:.80}"
            )
        if "@" in parts[1]:
            raise ConfigError(
                "url must hold no password; name the environment variable that holds the key with "
                "--api-key-env"
            )
        if not (self.model.strip() and self.model.isprintable()):
            raise ConfigError(f"model must be a name of printable characters, got {self.model!r:.80}")
        if self.latents and self.n_latents is not None:
            raise ConfigError("n_latents has no effect where latents are named; leave one out")
        for item in self.latents:
            parsed(item)

    @property
    def key(self) -> str | None:
        """Return the endpoint's key, which is in the environment alone.

        Raises:
            ConfigError: the variable that is named is not set.
        """
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise ConfigError(f"api_key_env: {self.api_key_env!r:.80} is not set; export it, or leave it out")
        return key


def _split(url: str) -> tuple[str, str] | None:
    """Return the scheme and the host of an address; None if it is no address of HTTP."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and url.isascii() and url.isprintable()
        return (parts.scheme, parts.netloc) if valid and parts.port != 0 and " " not in url else None
    except ValueError:
        return None
