"""The model at work: which latents fire on a text, and how the model goes on when a latent is added."""

import time
from dataclasses import dataclass
from functools import cached_property
from threading import RLock
from typing import Any

import torch
import transformers

from saemill.assess.reader import Pieces
from saemill.common.errors import ConfigError
from saemill.common.hub import loading
from saemill.common.log import say
from saemill.common.models.cached import check_model, load_model
from saemill.common.models.model import LanguageModel, attention_of
from saemill.common.sae.sae import Sae
from saemill.common.steer.edits import steer
from saemill.common.steer.splice import splice
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.passages import PassageStore
from saemill.common.stores.site_names import BESIDE, is_joined, parts_of

MOST_FIRED = 64
"""Latents listed of a token, the strongest first."""
MOST_NEW_TOKENS = 256
SEED = 11
"""Seed of the sampling, the same with and without the latent."""


@dataclass(frozen=True, slots=True)
class Fired:
    """A token of a text with the latents that fire on it."""

    text: str
    is_left_out: bool
    """Whether training left such tokens out."""
    latents: dict[int, float]
    """Latent → activation, the largest first, whatever its sign."""


@dataclass(frozen=True, slots=True)
class Continued:
    """How the model goes on, as it is and with a latent's decoder row added."""

    plain: str
    steered: str


class Trial:
    """A model with an SAE at a site of it; the model is loaded when it is first needed.

    One text is worked on at a time, whoever asks.

    Args:
        sae: on the device that the model will be on.
        store: the activations that it was trained on.
        mask: the positions that were left out.
        model: the model's folder or hub id, if it is not where it was cached from.
        device: where it runs.
    """

    def __init__(
        self, sae: Sae, store: ActivationStore, mask: MaskConfig, model: str | None, device: torch.device
    ) -> None:
        self.sae, self.store, self.mask, self.name, self.device = sae, store, mask, model, device
        self._lock = RLock()

    @property
    def missing(self) -> str | None:
        """Say why there is no model to try, if there is none."""
        if isinstance(self.store.text, PassageStore):
            return "embeddings have no language model"
        if any(part.startswith(BESIDE) for part in parts_of(str(self.sae.site))):
            return "a crosscoder of two models reads both at once, and one is loaded here"
        return None

    @property
    def no_steering(self) -> str | None:
        """Say why no latent can be added, if that is known before the model is loaded."""
        if is_joined(str(self.sae.target_site)):
            return "a crosscoder writes to several sites, and a latent is added at one"
        return self.missing

    @cached_property
    def _tokenizer(self) -> Any:
        folder = str(self.store.tokens.tokenizer_folder)
        with loading("tokenizer", folder):
            return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    @cached_property
    def _model(self) -> LanguageModel:
        started = time.perf_counter()
        model = load_model(self.name, self.store, None, self.device)
        check_model(self.name, model, self.store)
        say(f"{model.name} loaded in {time.perf_counter() - started:.1f} s")
        return model

    def read(self, text: str) -> list[Fired]:
        """Find the latents that fire on each token of a text.

        Raises:
            ConfigError: there is no model, no token, or more than a row has.
        """
        if self.missing:
            raise ConfigError(self.missing)
        with self._lock, torch.inference_mode():
            ids, sites = self._ids(text, is_whole=True), parts_of(str(self.sae.site))
            ids_RS = torch.tensor([ids])
            tokenizer = self.store.tokens.tokenizer
            found = self._model.capture(ids_RS, list(sites), attention_of(ids_RS, tokenizer))
            x_SD = self.store.site(str(self.sae.site)).rounded(
                torch.cat([found[site][0].cpu() for site in sites], 1)
            )
            codes = self.sae.encode(x_SD.to(self.device, torch.float32))
            keep_S = self.mask.keep(ids_RS.numpy(), tokenizer.special_ids)[0]
            fired, start = [], 0
            for n, piece in Pieces(self.store.tokens).of(ids):
                own = slice(start, start + n)
                latents = _strongest(codes.top_acts[own], codes.top_indices[own])
                fired.append(Fired(piece, not keep_S[own].any(), latents))
                start += n
            return fired

    def go_on(
        self, text: str, latent: int, amount: float, n_tokens: int, temperature: float = 0.0
    ) -> Continued:
        """Write on, by the model as it is and with amount · W_dec[latent] added at the site, at all positions
        that training did not leave out.

        Args:
            text: the beginning.
            latent: the latent's number.
            amount: activation that is added.
            n_tokens: tokens that are written.
            temperature: of the sampling, whose seed is the same for both; 0 takes the likeliest token.

        Raises:
            ConfigError: the model writes no text, the SAE takes the place of no one site, or there is no such
                latent.
        """
        if self.no_steering:
            raise ConfigError(self.no_steering)
        if not 0 < n_tokens <= MOST_NEW_TOKENS:
            raise ConfigError(f"tokens to write must be 1 to {MOST_NEW_TOKENS}, got {n_tokens}")
        with self._lock, torch.inference_mode():
            if self._model.head != "causal":
                raise ConfigError(f"{self._model.name} has no head that writes text on")
            ids = self._ids(text, is_whole=False)
            plain = self._generate(ids, n_tokens, temperature)
            with splice(self._model.model, str(self.sae.target_site), self.sae, steer(latent, amount)):
                return Continued(plain, self._generate(ids, n_tokens, temperature))

    def _generate(self, ids: list[int], n_tokens: int, temperature: float) -> str:
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        ids_RS = torch.tensor([ids], device=self.device)
        torch.manual_seed(SEED)
        written = self._model.model.generate(
            input_ids=ids_RS,
            attention_mask=torch.ones_like(ids_RS),
            max_new_tokens=n_tokens,
            pad_token_id=self._tokenizer.eos_token_id or 0,
            **sampling,
        )
        return "".join(text for _, text in Pieces(self.store.tokens).of(written[0, len(ids) :].tolist()))

    def _ids(self, text: str, is_whole: bool) -> list[int]:
        """Make token ids of a text as rows are made, the end of a row where it is a whole one."""
        info, most = self.store.tokens.tokenizer, self.store.tokens.ctx_len
        ids = self._tokenizer(text, add_special_tokens=False).input_ids
        if not ids:
            raise ConfigError("the text has no token; write something")
        ids = [*info.prefix_ids, *ids, *(info.suffix_ids if is_whole else ())]
        if len(ids) > most:
            raise ConfigError(f"the text has {len(ids):,} tokens, and a row has {most:,}; shorten it")
        return ids


def _strongest(acts_NK: torch.Tensor, indices_NK: torch.Tensor) -> dict[int, float]:
    """List the latents that fire on one or several tokens, the strongest first."""
    order = acts_NK.flatten().abs().argsort(descending=True)
    pairs = zip(indices_NK.flatten()[order].tolist(), acts_NK.flatten()[order].tolist(), strict=True)
    largest: dict[int, float] = {}
    for latent, act in pairs:
        if act != 0:
            largest.setdefault(latent, act)
    return dict(list(largest.items())[:MOST_FIRED])
