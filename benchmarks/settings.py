"""Settings of runs that are kept in a folder, and where the peers are."""

import argparse
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
OWN_OF_PEERS = ROOT / ".venv-peers" / "bin" / "python"
"""The Python of the environment that `make .venv-peers/ready` sets up."""


def keep_settings(args: argparse.Namespace, *apart: str) -> None:
    """Refuse to mix results of different settings: finished runs in `out` are not run again.

    Args:
        args: the settings.
        apart: names of those that the names of runs show, so that they may change.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "settings.json"
    skip = ("out", "contestants", "rounds", "peers_python", *apart)
    now = {key: str(value) for key, value in vars(args).items() if key not in skip}
    if path.exists() and json.loads(path.read_text()) != now:
        raise SystemExit(f"{args.out} holds runs of other settings; choose a new folder")
    path.write_text(json.dumps(now))
