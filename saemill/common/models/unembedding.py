"""A model's unembedding with its final norm folded in: which tokens a direction of the residual stream makes
more probable, without a pass of the model. Only these weights are read.

Between the residual stream and the logits stands a norm: x is divided by its length, after its mean is
subtracted where it is a LayerNorm, and multiplied by γ. What a direction adds to the logits is γ times that,
through the unembedding, up to the length; a constant added to all logits changes no probability.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import cached_file

from saemill.common.durable import read_json
from saemill.common.errors import ConfigError
from saemill.common.hub import loading
from saemill.common.models.sites import load_model_config
from saemill.common.models.structure import base_of, block_names, is_encoder_decoder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class NoUnembeddingError(ConfigError):
    """A model has no unembedding that reads its residual stream through one norm, or none that is found."""


@dataclass(frozen=True, slots=True)
class Unembedding:
    """Unembedding of a causal language model."""

    weight_VD: Tensor
    """Logits per unit of each dimension, float32 [V, D]: γ folded in, their mean over tokens subtracted."""
    centres: bool
    """Whether the final norm subtracts the mean over dimensions."""

    def logits(self, rows_LD: Tensor) -> Tensor:
        """Compute what directions add to the logits, up to a positive factor. [L, D] → [L, V]"""
        rows_LD = rows_LD.float()
        if self.centres:
            rows_LD = rows_LD - rows_LD.mean(1, keepdim=True)
        return rows_LD @ self.weight_VD.T


def load_unembedding(name: str, revision: str | None, n_ids: int) -> Unembedding:
    """Read the unembedding and the final norm of a model.

    Args:
        name: hub id or local folder.
        revision: the hub's revision.
        n_ids: number of ids that the tokenizer has; rows beyond are padding.

    Raises:
        NoUnembeddingError: the model has none, or one behind something else than a norm; or its weights are
            not in safetensors, or under other names.
        ConfigError: it cannot be found.
    """
    skeleton = _skeleton(name, load_model_config(name, revision))
    paths = {id(module): path for path, module in skeleton.named_modules()}
    norm, weights = _final_norm(name, skeleton), Checkpoint(name, revision)
    of_norm = {key: weights.read(f"{paths[id(norm)]}.{key}") for key, _ in norm.named_parameters()}
    head, embedding = skeleton.get_output_embeddings(), skeleton.get_input_embeddings()
    head_path, embedding_path = (f"{paths[id(module)]}.weight" for module in (head, embedding))
    if weights.find(head_path):
        weight_VD = weights.read(head_path)
    elif skeleton.config.get_text_config().tie_word_embeddings:
        weight_VD = weights.read(embedding_path)
    else:
        weight_VD = weights.read_renamed(head_path, tuple(head.weight.shape), embedding_path)
    norm = norm.to_empty(device="cpu").float()
    norm.load_state_dict(of_norm)
    gamma_D, centres = _traits(norm, weight_VD.shape[1])
    weight_VD = weight_VD[:n_ids].float() * gamma_D
    return Unembedding(weight_VD - weight_VD.mean(0), centres)


def _skeleton(name: str, config: Any) -> Any:
    """Make a causal language model without its weights.

    Raises:
        NoUnembeddingError: the checkpoint is of another kind.
    """
    architecture = next(iter(config.architectures or ()), "")
    causal = architecture.endswith(("CausalLM", "LMHeadModel", "ForConditionalGeneration"))
    cls = getattr(transformers, architecture, None)
    if not causal or cls is None or is_encoder_decoder(config):
        raise NoUnembeddingError(
            f"{name!r} ({architecture or 'of no architecture'}) is no causal language model"
        )
    with loading("model", name), torch.device("meta"):
        return cls._from_config(config)


def _final_norm(name: str, skeleton: Any) -> nn.Module:
    """Find the norm between the last block and the head: the one beside the list of blocks.

    Raises:
        NoUnembeddingError: there is none, or several.
    """
    base = base_of(skeleton)
    blocks = block_names(base)
    if not blocks:
        raise NoUnembeddingError(f"the final norm of {name!r} is not known: it has no list of blocks")
    above = base.get_submodule(blocks[0].rpartition(".")[0].rpartition(".")[0])
    norms = [
        (path, module)
        for path, module in above.named_children()
        if "norm" in type(module).__name__.lower() and "embed" not in path
    ]
    if len(norms) != 1:
        listed = ", ".join(path for path, _ in norms) or "none"
        raise NoUnembeddingError(f"the final norm of {name!r} is not known: beside its blocks are {listed}")
    found: nn.Module = norms[0][1]
    return found


def _traits(norm: nn.Module, width: int) -> tuple[Tensor, bool]:
    """Try what a norm multiplies each dimension by, and whether it subtracts the mean.

    What it is made of differs: some multiply by the weight, some by 1 + weight. On a vector of mean 0 and
    mean square 1 either norm is γ x + β.
    """
    generator = torch.Generator().manual_seed(0)
    x_D = 0.5 + torch.rand(width, generator=generator)
    x_D *= torch.where(torch.arange(width) % 2 == 0, 1.0, -1.0)
    x_D = (x_D - x_D.mean()) / x_D.std(correction=0)
    with torch.inference_mode():
        plus_D, minus_D, moved_D = norm(torch.stack([x_D, -x_D, x_D + 1])[None])[0]
    return (plus_D - minus_D) / (2 * x_D), bool(torch.allclose(moved_D, plus_D, rtol=1e-3, atol=1e-4))


class Checkpoint:
    """The weights of a model on disk or on the hub, of which some are read.

    Raises:
        NoUnembeddingError: they are not in safetensors.
    """

    def __init__(self, name: str, revision: str | None) -> None:
        self.name, self.revision = name, revision
        self.parts = self._parts()
        """Names of the weights, each with the name of its file."""

    def find(self, path: str) -> str | None:
        """Find the name of a weight. Checkpoints may leave out the first parts of a path, as GPT-2's do, or
        have further ones.

        Raises:
            NoUnembeddingError: two of the weights may be meant.
        """
        if path in self.parts:
            return path
        keys = [key for key in self.parts if f".{path}".endswith(f".{key}") or key.endswith(f".{path}")]
        if len(keys) > 1:
            raise NoUnembeddingError(
                f"the checkpoint {self.name!r} has several weights {path}: {', '.join(keys)}"
            )
        return keys[0] if keys else None

    def read(self, path: str) -> Tensor:
        """Read a weight.

        Raises:
            NoUnembeddingError: there is none of this name.
        """
        key = self.find(path)
        if key is None:
            raise NoUnembeddingError(f"the checkpoint {self.name!r} lacks weights: {path}")
        with safe_open(self._file(self.parts[key]), framework="pt") as weights:
            found: Tensor = weights.get_tensor(key)
        return found

    def read_renamed(self, path: str, shape: tuple[int, ...], but: str) -> Tensor:
        """Read a weight that transformers calls otherwise than the file: the one of this shape outside of the
        blocks.

        Args:
            path: its name in transformers.
            shape: its shape.
            but: a weight that may have the same shape.

        Raises:
            NoUnembeddingError: there is none, or several.
        """
        outside = [key for key in self.parts if not any(part.isdecimal() for part in key.split("."))]
        keys = [key for key in outside if key != self.find(but) and self._shape(key) == shape]
        if len(keys) != 1:
            raise NoUnembeddingError(f"the checkpoint {self.name!r} lacks weights: {path}")
        return self.read(keys[0])

    def _shape(self, key: str) -> tuple[int, ...]:
        with safe_open(self._file(self.parts[key]), framework="pt") as weights:
            return tuple(weights.get_slice(key).get_shape())

    def _parts(self) -> dict[str, str]:
        if index := self._file(INDEX):
            where: dict[str, str] = read_json(index)["weight_map"]
            return where
        whole = self._file(WEIGHTS)
        if whole is None:
            raise NoUnembeddingError(f"the weights of {self.name!r} are not in safetensors")
        with safe_open(whole, framework="pt") as weights:
            return dict.fromkeys(weights.keys(), WEIGHTS)

    def _file(self, part: str) -> Path | None:
        """Find a file, from the hub if need be; None where there is no such file."""
        with loading("model", self.name):
            found = cached_file(
                self.name, part, revision=self.revision, _raise_exceptions_for_missing_entries=False
            )
        return None if found is None else Path(found)
