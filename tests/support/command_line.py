"""`saemill …` within the tests' own process."""

from typing import Any

from typer.testing import CliRunner

from saemill import cli


def call(*arguments: Any) -> str:
    """What `saemill …` prints; its errors are raised."""
    result = CliRunner().invoke(cli.app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output
