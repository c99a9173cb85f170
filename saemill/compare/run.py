"""`saemill compare`: every two dictionaries of some SAEs and runs, matched latent by latent."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from saemill.common import config as settings
from saemill.common import durable
from saemill.common.device import choose_device
from saemill.common.errors import ConfigError
from saemill.common.log import progress, say
from saemill.compare.activations import MIN_FIRINGS, Codes, Stores, correlations, of_pairs
from saemill.compare.config import CompareConfig
from saemill.compare.dictionaries import Dictionary, differing, find, pairs
from saemill.compare.matching import Blocks, cosines
from saemill.compare.pair import Latents, Matched
from saemill.compare.random_rows import isotropic, same_covariance
from saemill.compare.report import table, write_html
from saemill.compare.stability import Pair, Stability, stabilities

FORMAT = "saemill comparison 1"
ASSIGNMENT_LIMIT = 1 << 14
MAX_TOKENS = 1 << 17
STABILITY = "stability.parquet"


def run(config: CompareConfig) -> dict[str, Any]:
    """Compare every two dictionaries; print a table, and write a report if `out` is given.

    Returns: the content of `comparison.json`.

    Raises:
        StoreError: a folder holds no SAE, or its run is not finished.
        ConfigError: dictionaries that cannot be compared by this similarity.
    """
    device = choose_device(config.device)
    if config.out is not None:
        _check_out(config.out)
    dictionaries = find(config.saes)
    every = pairs(dictionaries, any_width=config.by == "activations")
    if config.matching == "assignment":
        _check_sizes(dictionaries, config.assignment_limit or ASSIGNMENT_LIMIT)
    stores = Stores(config.acts, config.max_tokens or MAX_TOKENS, config.local_cache) if config.acts else None
    codes = _encode(stores, dictionaries, device) if stores else {}
    entries: list[dict[str, Any]] = []
    matched_pairs: list[Pair] = []
    with progress("compare", len(every), "pairs") as advance:
        for a, b in every:
            matched = _match(config, a, b, codes, device)
            entry = matched.entry(config.threshold) | {"differs_in": differing(a, b)}
            if codes:
                entry["correlation_of_matched"] = _correlation(matched, codes)
            entries.append(entry)
            matched_pairs.append((a, b, matched))
            advance(1)
    stable = stabilities(matched_pairs, config.threshold)
    comparison = {
        "format": FORMAT,
        "settings": settings.plain(config) | {"min_firings": MIN_FIRINGS},
        "n_tokens": stores.n_tokens if stores else None,
        "dictionaries": [_describe(dictionary) for dictionary in dictionaries],
        "pairs": entries,
        "stability": [of.entry() for of in stable],
        "notes": _notes(every, config.by),
        "versions": {name: version(name) for name in ("saemill", "torch", "scipy")},
    }
    say(table(comparison))
    if config.out is not None:
        _write(config.out, comparison, matched_pairs, stable)
    return comparison


def _check_out(out: Path) -> None:
    settings.check_folder(out)
    if out.exists() and any(out.iterdir()) and not (out / "comparison.json").exists():
        raise ConfigError(f"{out} holds something else than a comparison; choose another folder")


def _check_sizes(dictionaries: list[Dictionary], limit: int) -> None:
    """Refuse an assignment that would not end, or not fit into memory."""
    largest = max(dictionaries, key=lambda dictionary: dictionary.num_latents)
    n = largest.num_latents
    if n > limit:
        raise ConfigError(
            f"{largest.name} has {n:,} latents: an assignment of as many takes {8 * n * n / 1e9:,.1f} GB and "
            f"time that grows with their cube. Say --matching nearest for nearest latents alone, or "
            f"--assignment-limit {n} if memory and time are there"
        )


def _encode(stores: Stores, dictionaries: list[Dictionary], device: torch.device) -> dict[str, Codes]:
    """Compute every SAE's codes on the stores' tokens, by its name."""
    stores.check(dictionaries)
    codes = {}
    with progress("encode", len(dictionaries), "SAEs") as advance:
        for dictionary in dictionaries:
            codes[dictionary.name] = stores.codes(dictionary, device)
            advance(1)
    return codes


def _match(
    config: CompareConfig, a: Dictionary, b: Dictionary, codes: Mapping[str, Codes], device: torch.device
) -> Matched:
    latents = [Latents(d.name, _live(d, codes)) for d in (a, b)]
    chance: dict[str, Blocks]
    if config.by == "activations":
        columns_a, columns_b = (
            codes[d.name].standardised(chosen.numbers) for d, chosen in zip((a, b), latents, strict=True)
        )
        shifted = codes[b.name].shifted().standardised(latents[1].numbers)
        blocks = correlations(columns_a, columns_b)
        chance = {"shifted_tokens": correlations(columns_a, shifted)}
    else:
        a_FD, b_FD = (
            d.rows(config.by, device)[torch.from_numpy(chosen.numbers).to(device)]
            for d, chosen in zip((a, b), latents, strict=True)
        )
        blocks = cosines(a_FD, b_FD)
        chance = {
            "isotropic": cosines(a_FD, isotropic(b_FD, config.seed)),
            "same_covariance": cosines(a_FD, same_covariance(b_FD, config.seed)),
        }
    return Matched.of(latents[0], latents[1], blocks, chance, config.matching == "assignment")


def _live(dictionary: Dictionary, codes: Mapping[str, Codes]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """List the latents that are compared: all, or those that fire where there are tokens."""
    if dictionary.name not in codes:
        return np.arange(dictionary.num_latents)
    live = codes[dictionary.name].live
    if len(live) == 0:
        raise ConfigError(
            f"no latent of {dictionary.name} is active on {MIN_FIRINGS} of the tokens; leave it out"
        )
    return live


def _correlation(matched: Matched, codes: Mapping[str, Codes]) -> dict[str, float]:
    """Correlate the codes of latents that are each other's nearest: mean and median."""
    side = matched.sides[0]
    own, other = matched.a.numbers[side.mutual], matched.b.numbers[side.nearest[side.mutual]]
    values = of_pairs(codes[matched.a.name].standardised(own), codes[matched.b.name].standardised(other))
    return {"n": len(values), "mean": float(values.mean()), "median": float(np.median(values))}


def _describe(dictionary: Dictionary) -> dict[str, Any]:
    origin = {key: dictionary.provenance.get(key) for key in ("site", "target_site", "model", "dataset")}
    return {
        "name": dictionary.name,
        "path": str(dictionary.path),
        "d_in": dictionary.d_in,
        "num_latents": dictionary.num_latents,
        **origin,
    }


def _notes(every: list[tuple[Dictionary, Dictionary]], by: str) -> list[str]:
    """List what the reader should know of the pairs."""
    notes = [
        f"some pairs differ in the {key}: a direction need not mean the same in both; "
        "--by activations compares what latents do"
        for key in ("model", "site", "target_site")
        if by != "activations" and any(key in differing(a, b) for a, b in every)
    ]
    of_one_seed = [
        (a, b) for a, b in every if a.traits().get("seed") is not None and "seed" not in differing(a, b)
    ]
    if of_one_seed:
        notes.append(
            "SAEs of one seed began from the same directions, and share latents for that reason too: "
            "compare sources, sites and settings by pairs that differ in the seed as well"
        )
    return notes


def _write(out: Path, comparison: dict[str, Any], pairs: list[Pair], stable: list[Stability]) -> None:
    (out / STABILITY).unlink(missing_ok=True)
    with durable.replacing(out / "matches.parquet") as partial:
        pq.write_table(pa.concat_tables([matched.table() for _, _, matched in pairs]), partial)
    if stable:
        with durable.replacing(out / STABILITY) as partial:
            pq.write_table(pa.concat_tables([of.table() for of in stable]), partial)
    write_html(out / "report.html", comparison)
    durable.write_json(out / "comparison.json", comparison)
    files = ["comparison.json", "matches.parquet", *([STABILITY] if stable else []), "report.html"]
    say(f"{out}: {', '.join(files)}")
