"""saemill: cache transformer activations once, train many sparse autoencoders over them.

The public names; each is imported when it is first used, so that `import saemill` stays quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saemill.common.sae.parts import SaeConfig as SaeConfig
    from saemill.common.sae.sae import Sae as Sae
    from saemill.common.steer.edits import ablate as ablate
    from saemill.common.steer.edits import clamp as clamp
    from saemill.common.steer.edits import scale as scale
    from saemill.common.steer.edits import steer as steer
    from saemill.common.steer.splice import splice as splice
    from saemill.common.stores.activations import ActivationStore as ActivationStore
    from saemill.common.stores.tokens import TokenStore as TokenStore
    from saemill.results import Run as Run
    from saemill.stages import assess_saes as assess_saes
    from saemill.stages import cache_activations as cache_activations
    from saemill.stages import cache_and_train as cache_and_train
    from saemill.stages import tokenize_text as tokenize_text
    from saemill.stages import train_saes as train_saes

__all__ = [
    "ActivationStore",
    "Run",
    "Sae",
    "SaeConfig",
    "TokenStore",
    "ablate",
    "assess_saes",
    "cache_activations",
    "cache_and_train",
    "clamp",
    "scale",
    "splice",
    "steer",
    "tokenize_text",
    "train_saes",
]

_HOMES = {
    "ActivationStore": "saemill.common.stores.activations",
    "Run": "saemill.results",
    "Sae": "saemill.common.sae.sae",
    "SaeConfig": "saemill.common.sae.parts",
    "TokenStore": "saemill.common.stores.tokens",
    "ablate": "saemill.common.steer.edits",
    "assess_saes": "saemill.stages",
    "cache_activations": "saemill.stages",
    "cache_and_train": "saemill.stages",
    "clamp": "saemill.common.steer.edits",
    "scale": "saemill.common.steer.edits",
    "splice": "saemill.common.steer.splice",
    "steer": "saemill.common.steer.edits",
    "tokenize_text": "saemill.stages",
    "train_saes": "saemill.stages",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'saemill' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
