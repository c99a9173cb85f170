"""A model's unembedding with its final norm folded in: which tokens a direction of the residual stream makes
more probable, without a pass of the model. Only these weights are read.

Between the residual stream and the logits stands a norm: x is divided by its length, after its mean is
subtracted where it is a LayerNorm, and multiplied by γ. What a direction adds to the logits is γ times that,
through the unembedding, up to the length; a constant added to all logits changes no probability.
"""

from collections.abc import Iterable
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
    head, norm = skeleton.get_output_embeddings(), _final_norm(name, skeleton)
    heads = [head, skeleton.get_input_embeddings()]  # whose weights the head has, where they are tied
    wanted = [f"{paths[id(module)]}.weight" for module in heads]
    of_norm = {key: f"{paths[id(norm)]}.{key}" for key, _ in norm.named_parameters()}
    found = _read(name, revision, [*wanted, *of_norm.values()])
    if missing := [key for key in of_norm.values() if key not in found]:
        raise NoUnembeddingError(f"the checkpoint {name!r} lacks weights: {', '.join(missing)}")
    weight_VD = next((found[key] for key in wanted if key in found), None)
    if weight_VD is None:
        raise NoUnembeddingError(f"the checkpoint {name!r} lacks weights: {wanted[0]}")
    norm = norm.to_empty(device="cpu").float()
    norm.load_state_dict({key: found[path] for key, path in of_norm.items()})
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


def _read(name: str, revision: str | None, wanted: Iterable[str]) -> dict[str, Tensor]:
    """Read some weights of a checkpoint, as far as it has them.

    Checkpoints may leave out the first parts of a path, as GPT-2's do, or have further ones.

    Raises:
        NoUnembeddingError: it is not in safetensors, or two of its weights may be meant.
    """
    parts = _parts(name, revision)
    found = {}
    for path in wanted:
        keys = [key for key in parts if f".{path}".endswith(f".{key}") or key.endswith(f".{path}")]
        keys = [path] if path in parts else keys
        if len(keys) > 1:
            raise NoUnembeddingError(f"the checkpoint {name!r} has several weights {path}: {', '.join(keys)}")
        for key in keys:
            with safe_open(_file(name, revision, parts[key]), framework="pt") as weights:
                found[path] = weights.get_tensor(key)
    return found


def _parts(name: str, revision: str | None) -> dict[str, str]:
    """List the weights of a checkpoint, each with the name of its file."""
    if index := _file(name, revision, INDEX):
        where: dict[str, str] = read_json(index)["weight_map"]
        return where
    whole = _file(name, revision, WEIGHTS)
    if whole is None:
        raise NoUnembeddingError(f"the weights of {name!r} are not in safetensors")
    with safe_open(whole, framework="pt") as weights:
        return dict.fromkeys(weights.keys(), WEIGHTS)


def _file(name: str, revision: str | None, part: str) -> Path | None:
    """Find a file of a checkpoint, from the hub if need be; None where it has no such file."""
    with loading("model", name):
        found = cached_file(name, part, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)
