"""The SAEs that training starts from: those of a run, an SAE of any format that is read, or one on the hub.

What a variant does not say is as its source has it: site, architecture, latents, and how many are active. The
weights are read when the variant's learner is made (`learner.start`), and must be the same then.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saemill.common import durable
from saemill.common.errors import ConfigError, SaemillError, StoreError
from saemill.common.hub import SCHEME
from saemill.common.log import say
from saemill.common.sae import formats, layers, of_run
from saemill.common.sae.parts import Parts, SaeConfig
from saemill.common.stores import runs
from saemill.common.stores.site_names import parts_of
from saemill.train.architectures import BY_K, BY_L1, Architecture
from saemill.train.config import TrainConfig

LENGTH_TOLERANCE = 1e-2
"""Largest difference of a decoder row's length from 1 that is rounding."""
OF_THRESHOLDS = ("jumprelu", "gated")
"""Architectures that can start from any SAE with thresholds."""


@dataclass(frozen=True, slots=True)
class Source:
    """An SAE that variants start from."""

    address: str
    """Its folder, or its place on the hub."""
    name: str
    config: SaeConfig
    content: str
    """Hash of its weights, and of how it chooses latents."""
    has_skip: bool
    has_free_rows: bool
    """Whether decoder rows are of other lengths than 1."""
    has_many_thresholds: bool
    """Whether thresholds are not one for all latents, in units of unit rows."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Settings that it was trained with, as far as its files tell."""
        known = self.config.provenance
        return {"k": known.get("k"), **(known.get("variant") or {})}

    @property
    def sites(self) -> tuple[str, ...]:
        """Site that it reads and, of a transcoder, the one that it predicts; those that its files tell."""
        known = self.config.provenance
        names = ("site",) if self.config.d_out is None else ("site", "target_site")
        return tuple(str(known[name]) for name in names if known.get(name))


Sources = Mapping[str, tuple[Source, ...]]
"""The SAEs at each place that a run's settings name."""


def sources_of(config: TrainConfig) -> Sources:
    """Read what a run's variants start from; empty where all start from random directions.

    Raises:
        ConfigError: there is no such SAE, it cannot be represented, or a run is not finished.
        StoreError: it is damaged.
    """
    named = (config.init_from, *(entry.get("init_from") for entry in config.variants))
    return {place: tuple(_at(place)) for place in dict.fromkeys(str(name) for name in named if name)}


def _at(place: str) -> Iterator[Source]:
    """Read all SAEs of a place; of a run those that were trained to its end."""
    folder = Path(place)
    try:
        if place.startswith(SCHEME) or not runs.is_run(folder):
            yield _source(place, folder.name, formats.load(place if place.startswith(SCHEME) else folder))
            return
        if not runs.is_finished(folder):
            raise ConfigError(
                f"{folder} is a run that is not finished; run its command again to its end, or name one of "
                f"{folder / runs.STEPS}, if there are any"
            )
        record = runs.finished(folder)
        left_out = record.diverged.keys() | record.stopped.keys()
        if left_out >= set(record.variants):
            raise ConfigError(f"all SAEs of {folder} diverged or stopped early; name one of them, RUN/SAE")
        if left_out:
            say(
                f"{folder}: {', '.join(sorted(left_out))} diverged or stopped early, and nothing starts there"
            )
        for name in record.variants:
            if name not in left_out:
                of_run.check(folder / name, record.cfgs[name], folder / runs.FINISHED)
                yield _source(str(folder / name), name, formats.load(folder / name))
    except SaemillError as error:
        raise type(error)(f"init_from: {error}") from error


def _source(address: str, name: str, parts: Parts) -> Source:
    """Note what variants take from an SAE. The weights are not kept: there may be many."""
    if parts.config.norm is not None:
        raise ConfigError(
            f"{address} takes each activation through a norm first ({parts.config.norm}), which no SAE "
            "trained here does; start from another"
        )
    lengths_F = _lengths(parts)
    threshold_F = None if parts.threshold is None else parts.threshold * lengths_F
    return Source(
        address=address,
        name=name,
        config=parts.config,
        content=content_of(parts),
        has_skip=parts.W_skip is not None,
        has_free_rows=bool(((lengths_F - 1).abs() > LENGTH_TOLERANCE).any()),
        has_many_thresholds=threshold_F is not None
        and bool((threshold_F - threshold_F[0]).abs().max() > LENGTH_TOLERANCE * threshold_F[0]),
    )


def _lengths(parts: Parts) -> Tensor:
    """Compute the lengths of decoder rows; of several sites in the sites' own units, in which latents are
    chosen, up to a factor that all share."""
    W_dec, joined = parts.W_dec.float(), parts.config.joined
    if parts.config.predicted:
        of_layers_F = layers.lengths(W_dec, [part.scale for part in parts.config.predicted])
        return torch.div(of_layers_F, of_layers_F.mean())
    if joined:
        W_dec = W_dec * torch.cat([W_dec.new_full((part.width,), part.scale) for part in joined])
    lengths_F: Tensor = torch.linalg.vector_norm(W_dec, dim=1)
    return lengths_F / lengths_F.mean() if joined else lengths_F


def content_of(parts: Parts) -> str:
    """Hash an SAE's weights, and how it chooses latents; not where it came from."""
    known = {
        name: value for name, value in asdict(parts.config).items() if name not in ("provenance", "norm")
    }
    weights = {
        name: [
            str(tensor.dtype),
            durable.hash_bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy().data),
        ]
        for name, tensor in parts.weights.items()
    }
    return durable.hash_json([known, weights])


def read(address: str, content: str) -> Parts:
    """Read a source's weights.

    Raises:
        StoreError: they are not those that the run was planned with, or are damaged.
    """
    parts = formats.load(address if address.startswith(SCHEME) else Path(address))
    if content_of(parts) != content:
        raise StoreError(
            f"init_from: {address} has changed since the run was planned; put back the SAE that was there, "
            "or train anew with --no-resume"
        )
    return parts


def identity(config: TrainConfig, sources: Sources) -> dict[str, Any]:
    """Collect what decides a run's result: its settings, and the content of what it starts from."""
    if not sources:
        return config.identity()
    return config.identity() | {"init_from": [source.content for each in sources.values() for source in each]}


def sites_of(sources: Sources) -> tuple[str, ...]:
    """List the sites that what a run starts from reads, as far as files tell."""
    return tuple(
        dict.fromkeys(source.sites[0] for each in sources.values() for source in each if source.sites)
    )


def chosen(sources: tuple[Source, ...], sites: tuple[str, ...]) -> tuple[Source, ...]:
    """Choose, of several SAEs, those of the run's sites; all where no site is named.

    Raises:
        ConfigError: none is.
    """
    if len(sources) < 2 or not sites:
        return sources
    of_sites = tuple(source for source in sources if source.sites[:1] and source.sites[0] in sites)
    if not of_sites:
        known = sorted({source.sites[0] for source in sources if source.sites})
        raise ConfigError(
            f"init_from: no SAE of {Path(sources[0].address).parent} is of site {', '.join(sites)}; they are "
            f"of {', '.join(known)}. To start from one at another site, name it: RUN/SAE"
        )
    return of_sites


def one_of(sources: tuple[Source, ...], entry: Mapping[str, Any]) -> Source:
    """Choose the SAE that a listed variant starts from: the only one, that of its site, or of its name.

    Raises:
        ConfigError: there is none, or several.
    """
    site = entry.get("site")
    alike = chosen(sources, (str(site),) if site else ())
    named = [source for source in alike if source.name == entry.get("name")]
    if len(alike) > 1 and len(named) != 1:
        raise ConfigError(
            f"variant {dict(entry)} could start from any of {', '.join(source.name for source in alike)}; "
            "name one in its init_from: RUN/SAE"
        )
    return (named or alike)[0]


def fill_in(entry: dict[str, Any], source: Source, common: Mapping[str, Any], d: int, e: int) -> None:
    """Fill in, in place, what a variant leaves open and its source tells.

    Args:
        entry: the variant's settings, its sites and architecture among them.
        source: what it starts from.
        common: settings that all variants of the run share.
        d: width of its site.
        e: width of the site that it predicts, d of an SAE.

    Raises:
        ConfigError: the two do not go together.
    """
    config, known = source.config, source.settings
    _check_shape(entry, source, d, e)
    _check_kind(entry["architecture"], source)
    entry |= {"init_from": source.address, "init_content": source.content}
    entry |= {"num_latents": config.num_latents, "seed": known.get("seed") or 0}
    entry.pop("expansion_factor", None)
    if common.get("skip_connection") and not source.has_skip:
        raise ConfigError(f"skip_connection: {source.address} has no W_skip to start from; leave it out")
    entry["skip_connection"] = source.has_skip
    architecture = entry["architecture"]
    if architecture == "topk" and config.ks and "k" not in entry and not common.get("nested_k"):
        entry.setdefault("nested_k", config.ks[:-1])
    if architecture == "matryoshka":
        if config.prefixes and not common.get("prefixes"):
            entry.setdefault("prefixes", config.prefixes)
        if config.k is not None:
            entry.setdefault("matryoshka_rule", "topk")
    if architecture in BY_K and entry.get("k") is None:
        entry["k"] = config.k or known.get("k") or _unknown(source, "k")
    if architecture == "jumprelu":
        _take_penalty(entry, source, common, ("target_l0", "l0_coefficient"), ("sparsity_penalty",))
    if architecture in BY_L1:
        _take_penalty(entry, source, common, ("l1_coefficient",), ("lp_norm", "decoder_rows"))


def _take_penalty(
    entry: dict[str, Any],
    source: Source,
    common: Mapping[str, Any],
    names: tuple[str, ...],
    kind: tuple[str, ...],
) -> None:
    """Take the weight of a penalty, or its target, from a source whose penalty is of the same kind."""
    if any(entry.get(name) is not None for name in names):
        return
    known = source.settings
    is_alike = all(known.get(name) == entry.get(name, common.get(name)) for name in kind)
    own = {name: known[name] for name in names if known.get(name) is not None}
    if own and not is_alike:
        others = ", ".join(f"{name} {known.get(name)}" for name in kind)
        raise ConfigError(
            f"{source.address} was trained with {', '.join(own)} and {others}, and here the penalty is "
            f"another; give {' or '.join(names)}, or {' and '.join(kind)} as there"
        )
    entry |= own or {names[0]: _unknown(source, names[0])}


def _unknown(source: Source, name: str) -> Any:
    raise ConfigError(f"{source.address} does not tell the {name} that it is to have; give {name}")


def _check_shape(entry: Mapping[str, Any], source: Source, d: int, e: int) -> None:
    """Refuse an SAE of another width than the sites', or of another number of latents than is asked for."""
    config, target, address = source.config, entry.get("target_site"), source.address
    n_joined, site = len(parts_of(entry["site"])), entry["site"]
    if n_joined != (len(config.joined) or 1):
        joins = f"joins {n_joined} sites" if n_joined > 1 else "is one site"
        raise ConfigError(
            f"{address} is {config.spans or 'of one site'}, and {site} {joins}; start from an SAE of as many "
            "sites"
        )
    if (config.d_out is None) != (target is None):
        advice = "leave target_site out" if target else "say which site it predicts with target_site"
        raise ConfigError(f"{address} is {'an SAE' if target else 'a transcoder'}; {advice}")
    for name, own, width in ((entry["site"], config.d_in, d), (target, config.d_out or e, e)):
        if own != width:
            raise ConfigError(
                f"{address} is of width {own:,}, the activations at {name} are of width {width:,}; start "
                "from an SAE of that width, or train on another site"
            )
    factor, n = entry.get("expansion_factor"), entry.get("num_latents")
    asked = n if n is not None else int(factor) * d if factor is not None else config.num_latents
    if asked != config.num_latents:
        raise ConfigError(
            f"{address} has {config.num_latents:,} latents, not {asked:,}; leave num_latents and "
            "expansion_factor out"
        )


def _check_kind(architecture: Architecture, source: Source) -> None:
    """Refuse an architecture in which the source cannot be written."""
    config, own = source.config, source.config.architecture
    among_k = {architecture, own} <= {*BY_K} - {"groupmax", "abs-topk"}
    if not (architecture == own or among_k or (architecture in OF_THRESHOLDS and config.k is None)):
        raise ConfigError(
            f"{source.address} is a {own} SAE, which cannot be written as {architecture}; leave architecture "
            f"out{'' if config.k is not None else ', or take jumprelu'}"
        )
    if architecture in BY_K and source.has_free_rows:
        raise ConfigError(
            f"{source.address} has decoder rows of other lengths than 1. Its latents are chosen by size "
            "before that, and would not be the same with rows of length 1, which are trained here; start "
            f"from another SAE{'' if config.k is not None else ', or take architecture jumprelu'}"
        )
    if architecture in BY_K and source.has_many_thresholds:
        raise ConfigError(
            f"{source.address} has thresholds of its own for each latent, where {architecture} has one for "
            "all; take architecture jumprelu"
        )
