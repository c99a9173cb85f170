"""The names of what is minimised, and what some have in common."""

from typing import Literal

Loss = Literal["fvu", "mse", "ce", "kl", "mse+kl"]
IN_MODEL = ("ce", "kl", "mse+kl")
"""Losses of the model that runs on with the reconstruction in the place of the activation."""
WITHOUT_SQUARES = ("ce", "kl")
"""Those in which the squared error is not minimised."""


def nats_name(loss: Loss) -> str:
    """Return the name of the model's loss among the metrics; empty where there is none."""
    return {"ce": "ce", "kl": "kl", "mse+kl": "kl"}.get(loss, "")
