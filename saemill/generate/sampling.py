"""A batch of samples: transformers' `generate`, each token chosen by a random number of its own.

Sample i of a model and seed owns a row of numbers u in [0, 1), one per position. A token is drawn by
inverting the distribution: the first id, in order of ids, up to which the probabilities sum to more than
u. So a sample is a function of the model, the settings, the seed and i, whatever else is in its batch,
but for rounding: the same batch gives the same bits, and in another batch the logits may round apart,
which matters where u falls between two roundings of a sum.
"""

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from saemill.common.errors import ConfigError, DataError, Interrupted
from saemill.common.models.model import LanguageModel
from saemill.common.stores.permutation import combine

U_BITS = 48
"""Bits of a random number: fine beside the probabilities' rounding, and u · sum < sum holds exactly."""


def uniforms(name: str, seed: int, first: int, n_samples: int, max_tokens: int) -> Tensor:
    """Draw the random numbers of samples first, first + 1, …, by Philox (Salmon et al. 2011).

    Args:
        name: of the model; two models' numbers are independent, a copy's under another name are too.

    Returns: float64 [n_samples, max_tokens], multiples of 2⁻⁴⁸ in [0, 1); a longer row begins like a
    shorter one.
    """
    key = combine(seed, xxhash.xxh3_64_intdigest(name.encode()))
    samples = range(first, first + n_samples)
    raw = [np.random.Philox(key=[key, sample]).random_raw(max_tokens) for sample in samples]
    return torch.from_numpy((np.array(raw) >> (64 - U_BITS)).astype(np.float64) / 2.0**U_BITS)


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a model's samples begin and end."""

    start_id: int
    """The id that a sample begins with; it is not sampled."""
    end_ids: tuple[int, ...]
    """A sample ends before the first of them; empty: it goes on to its full length."""


def frame_of(tokenizer: Any, model_config: Any, name: str, stop_at_eos: bool) -> Frame:
    """Choose BOS, or EOS where there is none, to begin with, and every EOS of tokenizer and config to end.

    Raises:
        ConfigError: there is neither.
    """
    eos = model_config.get_text_config().eos_token_id
    ends = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ConfigError(
            f"the tokenizer of {name!r} has neither a BOS nor an EOS token for a sample to begin with; "
            "set its bos_token and save it to the model's folder"
        )
    if stop_at_eos and not ends:
        raise ConfigError(f"{name!r} names no EOS token; say --no-stop-at-eos to sample without one")
    return Frame(start, tuple(sorted(ends)) if stop_at_eos else ())


def check_causal(model: LanguageModel, name: str, start_id: int) -> None:
    """Refuse a model to which the tokens that follow make a difference, whatever its class is called.

    Args:
        model: with its LM head.
        name: for the message.
        start_id: what samples begin with.

    Raises:
        ConfigError: the logits of a first token change with the second.
    """
    ids_RS = torch.tensor([[start_id, start_id], [start_id, 0 if start_id else 1]], device=model.device)
    with torch.no_grad():
        first, second = model.model(input_ids=ids_RS).logits[:, 0].float()
    if not torch.allclose(first, second, rtol=1e-2, atol=1e-2 * float(first.abs().max())):
        raise ConfigError(
            f"{name!r} reads a text in both directions, so no text can be sampled from it; name a causal "
            "language model"
        )


class Sampler(LogitsProcessor):  # type: ignore[misc]
    """Keeps of each row of logits the one token that the sample's random number chooses.

    Args:
        u_RS: float64 [samples, max_tokens].
        temperature: divides the logits.
        top_p: the most probable tokens that sum to this stay (Holtzman et al. 2020).
        stop: when set, the next token raises `Interrupted`.
    """

    def __init__(self, u_RS: Tensor, temperature: float, top_p: float, stop: threading.Event) -> None:
        self.u_RS, self.stop = u_RS, stop
        self.warpers = [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Choose a token. input_ids: [R, 1 + tokens sampled so far]; scores: fp32 [R, W].

        Returns: [R, W], 0 for the chosen token, -inf for all others.
        """
        if self.stop.is_set():
            raise Interrupted("stopped")
        position = input_ids.shape[1] - 1
        for warp in self.warpers:
            scores = warp(input_ids, scores)
        sums_RW = scores.double().softmax(-1).cumsum(-1)
        total_R = sums_RW[:, -1]
        if not total_R.isfinite().all():
            raise DataError("the model's logits are not finite; try --dtype fp32")
        wanted_R1 = (self.u_RS[:, position] * total_R)[:, None]
        chosen_R1 = torch.searchsorted(sums_RW, wanted_R1, right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen_R1, 0.0)


def sample(
    model: LanguageModel,
    frame: Frame,
    u_RS: Tensor,
    temperature: float,
    top_p: float,
    stop: threading.Event,
) -> list[list[int]]:
    """Sample texts from a causal model, as ids without the start and the end.

    Args:
        model: with its LM head.
        u_RS: float64 [samples, max_tokens], from `uniforms`.

    Raises:
        Interrupted: `stop` was set; the batch is lost.
        DataError: the model gives no finite logits.
    """
    model.model.generation_config = GenerationConfig()  # a checkpoint's own holds penalties and limits
    n_samples, max_tokens = u_RS.shape
    start_R1 = torch.full((n_samples, 1), frame.start_id, device=model.device)
    rows = model.model.generate(
        input_ids=start_R1,
        attention_mask=torch.ones_like(start_R1),
        logits_processor=[Sampler(u_RS.to(model.device), temperature, top_p, stop)],
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=list(frame.end_ids) or None,
            pad_token_id=frame.end_ids[0] if frame.end_ids else frame.start_id,
        ),
    )
    return [_until_end(row[1:], frame.end_ids) for row in rows.tolist()]


def _until_end(ids: list[int], end_ids: tuple[int, ...]) -> list[int]:
    ends = (place for place, token in enumerate(ids) if token in end_ids)
    return ids[: next(ends, len(ids))]
