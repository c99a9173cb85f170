"""Transcoders of one layer each as one of several layers, which takes the place of all their targets at once.

So they are measured as a cross-layer transcoder is: each layer is encoded from what the model has there after
the earlier ones were replaced, and the errors add up. Transcoders belong together where nothing but their
sites tells them apart.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import count

import torch
from torch.nn.functional import pad

from saemill.common.errors import ConfigError
from saemill.common.sae.parts import CROSS_LAYER, Joined
from saemill.common.sae.sae import Sae
from saemill.common.stores.site_names import JOINT, folder_of

OF_ONE = ("name", "site", "target_site", "init_from", "init_content")
"""Settings of a variant that those of one set need not share."""


def together(saes: Mapping[str, Sae]) -> dict[str, Sae]:
    """Make the sets of transcoders that a run has, each as a cross-layer transcoder.

    Its latents write to their own layer alone, and zeros are kept for the later ones: of L layers a set takes
    the memory of (L + 1)/2 times the decoders.

    Args:
        saes: name → SAE of a run, sites in the order in which they were named.

    Returns: the sets, by names of their own.

    Raises:
        ConfigError: the run has none.
    """
    alike: dict[str, dict[str, Sae]] = defaultdict(dict)
    for name, sae in saes.items():
        if _is_of_one_layer(sae):
            alike[_settings(sae)][name] = sae
    sets: dict[str, Sae] = {}
    for members in alike.values():
        if _are_of_several_layers(members.values()):
            sets[_name(members, saes.keys() | sets.keys())] = _as_one(members.values())
    if not sets:
        raise ConfigError(
            "together has no effect: no transcoders of this run are alike but for their layers (of "
            f"{', '.join(CROSS_LAYER)}); leave it out"
        )
    return sets


def _is_of_one_layer(sae: Sae) -> bool:
    """Tell whether it is a transcoder that a layer of a cross-layer transcoder can be."""
    config = sae.config
    can_be = config.architecture in CROSS_LAYER and not config.ks
    return sae.is_transcoder and not config.predicted and can_be


def _settings(sae: Sae) -> str:
    """Return what a transcoder was trained by, but for its layer."""
    variant = sae.config.provenance.get("variant") or {}
    own = {name: value for name, value in variant.items() if name not in OF_ONE}
    return json.dumps([own, sae.config.d_in, sae.config.d_out, sae.config.num_latents, sae.config.k])


def _are_of_several_layers(members: Collection[Sae]) -> bool:
    """Tell whether they are two or more, and no two read, or predict, one site."""
    ends = ({sae.site for sae in members}, {sae.target_site for sae in members})
    return len(members) > 1 and all(len(sites) == len(members) for sites in ends)


def _name(members: Mapping[str, Sae], taken: Collection[str]) -> str:
    """Name a set by its first site and its last, as a cross-layer transcoder, and by what the names of its
    members have beside theirs."""
    (name, first), *_, (_, last) = members.items()
    rest = name.partition(folder_of(f"{first.site}-to-{first.target_site}"))[2]
    wanted = folder_of(f"{first.site}-to-{last.target_site}-together") + rest
    return next(free for n in count(1) if (free := f"{wanted}-{n}" if n > 1 else wanted) not in taken)


def _as_one(members: Collection[Sae]) -> Sae:
    """Make the cross-layer transcoder that computes what they do, side by side."""
    first, n = next(iter(members)), len(members)
    joined = tuple(Joined(str(sae.site), sae.config.d_in, 1.0) for sae in members)
    predicted = tuple(Joined(str(sae.target_site), len(sae.b_dec), 1.0) for sae in members)
    origin = {"site": joined, "target_site": predicted}
    config = replace(
        first.config,
        d_in=n * first.config.d_in,
        d_out=n * len(first.b_dec),
        num_latents=n * first.config.num_latents,
        k=None if first.config.k is None else n * first.config.k,
        joined=joined,
        predicted=predicted,
        provenance=first.config.provenance
        | {what: JOINT.join(part.site for part in parts) for what, parts in origin.items()},
    )
    later = [(n - 1 - layer) * len(first.b_dec) for layer in range(n)]
    w_dec = [
        pad(sae.W_dec.data, (0, more)).view(-1, len(first.b_dec))
        for sae, more in zip(members, later, strict=True)
    ]
    parts = [sae.parts.weights for sae in members]
    weights = {name: torch.cat([each[name].data for each in parts]) for name in parts[0] if name != "W_dec"}
    return Sae(config, W_dec=torch.cat(w_dec), **weights)
