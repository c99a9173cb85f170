"""Where a latent fires most: from the cache by address arithmetic, shown as text."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from saemill.assess.config import AssessConfig
from saemill.assess.evalset import Chunk
from saemill.assess.reconstruction import Reconstruction
from saemill.common.config import plain
from saemill.common.errors import ConfigError
from saemill.common.hub import loading
from saemill.common.sae.sae import Sae
from saemill.common.stores.passages import PassageStore
from saemill.common.stores.tokens import TokenStore
from saemill.common.world import Group

CONTEXT_TOKENS = 12
"""Tokens shown on either side."""
SEED = 11

Strongest = dict[int, tuple[float, int]]
"""Document → activation and address of the token there on which a latent fires most."""


@dataclass(frozen=True, slots=True)
class Context:
    """One place where a latent fires."""

    activation: float
    address: int
    document: int
    before: str
    token: str
    after: str


@dataclass(frozen=True, slots=True)
class Passage:
    """One embedded passage on which a latent fires."""

    activation: float
    address: int
    id: str | None
    text: str | None


def describe_latents(
    config: AssessConfig, name: str, sae: Sae, reconstruction: Reconstruction
) -> dict[str, Any]:
    """Describe some latents of a variant: how often they fire, and where most.

    Args:
        config: which latents, and how many contexts of each.
        name: the variant's name.
        sae: the variant.
        reconstruction: how it fired on the evaluation tokens.
    """
    evalset, firing = reconstruction.evalset, reconstruction.firing[name]
    density = reconstruction.density(name)
    live = reconstruction.live(name, config.dead_percentage_threshold)
    latents = choose_latents(live, config.latents, config.n_latents)
    if reconstruction.unusable(name):
        latents = []  # its activations are no numbers
    chunks = evalset.context_chunks(config.context_tokens) if latents else ()
    text, site, unit = evalset.text, str(sae.site), f"{evalset.text.unit}s"
    among = f" of the cache, training {text.row}s included" if evalset.cached else " of the evaluation tokens"
    top = top_addresses(chunks, site, sae, latents, text, config.n_contexts, evalset.everyone)
    reader = PassageReader(text) if isinstance(text, PassageStore) else Reader(text)
    return {
        "variant": name,
        "unit": text.unit,
        "searched": f"up to {config.context_tokens:,} {unit}{among}",
        "latents": [
            {
                "latent": latent,
                "density": float(density[latent]),
                "mean_when_active": float(firing.sum_F[latent] / max(1, int(firing.count_F[latent]))),
                "contexts": [plain(reader.context(*entry)) for entry in top[latent]],
            }
            for latent in latents
        ],
    }


def check_latents(requested: tuple[int, ...], widths: list[int]) -> None:
    """Refuse latents that not every SAE that may be shown has.

    Args:
        requested: the latents' numbers.
        widths: how many latents each of those SAEs has.

    Raises:
        ConfigError: naming the latents that do not exist.
    """
    bad = [latent for latent in requested if not 0 <= latent < min(widths)]
    if bad:
        advice = "; name the variant they belong to with --variant" if len(set(widths)) > 1 else ""
        raise ConfigError(f"latents must be in 0..{min(widths) - 1}, got {', '.join(map(str, bad))}{advice}")


def choose_latents(live: NDArray[np.bool_], requested: tuple[int, ...], n_random: int) -> list[int]:
    """Choose the latents to show: those asked for, then live ones drawn at random (never hand-picked)."""
    candidates = np.flatnonzero(live)
    drawn = np.random.default_rng(SEED).permutation(candidates)[:n_random]
    return list(dict.fromkeys([*requested, *drawn.tolist()]))


def top_addresses(
    chunks: Iterable[Chunk],
    site: str,
    sae: Sae,
    latents: list[int],
    text: TokenStore | PassageStore,
    n_contexts: int,
    everyone: Group,
) -> dict[int, list[tuple[float, int]]]:
    """Find the strongest activations of some latents, at most one per document.

    Args:
        chunks: activations that this process searches.
        site: where the SAE belongs.
        text: says which document an address belongs to.
        n_contexts: how many per latent.
        everyone: the processes that search.

    Returns: latent → (activation, address), strongest first.
    """
    best: dict[int, Strongest] = {latent: {} for latent in latents}
    requested = torch.tensor(sorted(latents))
    with torch.inference_mode():
        for chunk in chunks:
            codes = sae.encode(chunk.x[site].to(sae.W_enc.device, torch.float32))
            hit = torch.isin(codes.top_indices, requested.to(codes.top_indices.device)) & (codes.top_acts > 0)
            hit &= torch.isfinite(codes.top_acts)
            token, slot = (axis.cpu().numpy() for axis in hit.nonzero(as_tuple=True))
            acts = codes.top_acts.cpu().numpy()[token, slot]
            index = codes.top_indices.cpu().numpy()[token, slot]
            addresses = chunk.addresses_T[token]
            documents = text.document_of(addresses)
            for latent in np.unique(index):
                here = np.flatnonzero(index == latent)
                for i in here[np.argsort(-acts[here], kind="stable")][: 4 * n_contexts]:
                    _merge(best[int(latent)], {int(documents[i]): (float(acts[i]), int(addresses[i]))})
                _cut(best[int(latent)], n_contexts)
    for process_best in everyone.all_gather_objects(best):
        for latent, strongest in process_best.items():
            _merge(best[latent], strongest)
    return {latent: sorted(top.values(), reverse=True)[:n_contexts] for latent, top in best.items()}


def _merge(top: Strongest, other: Strongest) -> None:
    for document, entry in other.items():
        top[document] = max(entry, top.get(document, entry))


def _cut(top: Strongest, n_contexts: int) -> None:
    """Keep the strongest documents."""
    for document in sorted(top, key=lambda d: top[d], reverse=True)[n_contexts:]:
        del top[document]


class Reader:
    """Turns addresses into text with the tokenizer that the token store carries."""

    def __init__(self, tokens: TokenStore) -> None:
        self.tokens = tokens
        folder = tokens.tokenizer_folder
        with loading("tokenizer", str(folder)):
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=False
            )

    def context(self, activation: float, address: int) -> Context:
        """Show the token at an address with its neighbours in the same row and document."""
        row, position = divmod(address, self.tokens.ctx_len)
        start = max(0, position - CONTEXT_TOKENS)
        stop = min(self.tokens.ctx_len, position + CONTEXT_TOKENS + 1)
        base = row * self.tokens.ctx_len
        ids = self.tokens.rows(row, row + 1)[0].astype(int)
        documents = self.tokens.document_of(base + np.arange(start, stop))
        document = int(documents[position - start])
        inside = np.flatnonzero(documents == document) + start
        special = set(self.tokens.tokenizer.special_ids)
        shown = [int(i) for i in inside if ids[i] not in special or i == position]

        def text(positions: list[int]) -> str:
            return str(self.tokenizer.decode([int(ids[i]) for i in positions]))

        before, after = [i for i in shown if i < position], [i for i in shown if i > position]
        return Context(activation, address, document, text(before), text([position]), text(after))


class PassageReader:
    """Turns addresses into passages."""

    def __init__(self, passages: PassageStore) -> None:
        self.passages = passages

    def context(self, activation: float, address: int) -> Passage:
        """Show the passage at an address, whole."""
        return Passage(activation, address, *self.passages.passage(address))
