"""saemill: cache transformer activations once, train many sparse autoencoders over them.

The public names; each is imported when it is first used, so that `import saemill` stays quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saemill.common.activations import ActivationStore as ActivationStore
    from saemill.common.edits import ablate as ablate
    from saemill.common.edits import clamp as clamp
    from saemill.common.edits import scale as scale
    from saemill.common.edits import steer as steer
    from saemill.common.sae import Sae as Sae
    from saemill.common.sae import SaeConfig as SaeConfig
    from saemill.common.splice import splice as splice
    from saemill.common.tokens import TokenStore as TokenStore

__all__ = ["ActivationStore", "Sae", "SaeConfig", "TokenStore", "ablate", "clamp", "scale", "splice", "steer"]

_HOMES = {
    "ActivationStore": "saemill.common.activations",
    "Sae": "saemill.common.sae",
    "SaeConfig": "saemill.common.sae",
    "TokenStore": "saemill.common.tokens",
    "ablate": "saemill.common.edits",
    "clamp": "saemill.common.edits",
    "scale": "saemill.common.edits",
    "splice": "saemill.common.splice",
    "steer": "saemill.common.edits",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'saemill' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
