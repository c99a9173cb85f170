"""Whether wandb would ask for an API key: `python -m saemill.common.tracking.key` ends with 1 and says so.

In a process of its own, since wandb's import changes the one that it is in.
"""

import sys

from saemill.common.tracking.process import OFFLINE

NO_KEY = (
    "wandb knows no API key: run `wandb login` or set WANDB_API_KEY; without a network set "
    "WANDB_MODE=offline; or leave out --log-to-wandb (for assess: --no-log-to-wandb)"
)


def main() -> None:
    """Look for the key; no server is asked."""
    import wandb

    if wandb.setup().settings.mode in OFFLINE:
        return
    try:
        known = wandb.login(verify=False)
    except Exception:
        known = False
    if not known:
        print(NO_KEY)
        sys.exit(1)


if __name__ == "__main__":
    main()
