"""SAEs that were trained with a frozen decoder, as controls of those that differ from them in this alone.

What such an SAE reaches, its encoder does: its directions are as random as a random dictionary's. Korznikov
et al. 2026 (arXiv 2602.14111) find frozen ones close to trained ones by several measures of how well latents
can be understood.
"""

import json
from collections.abc import Mapping

from saemill.common.sae.sae import Sae


def frozen_twins(saes: Mapping[str, Sae]) -> dict[str, str]:
    """Find the frozen SAE beside each of the others; those without one are left out.

    Args:
        saes: name → SAE of a run.
    """
    frozen = {_but_for_the_decoder(sae): name for name, sae in saes.items() if _is_frozen(sae)}
    twins = {name: frozen.get(_but_for_the_decoder(sae)) for name, sae in saes.items() if not _is_frozen(sae)}
    return {name: twin for name, twin in twins.items() if twin is not None}


def _is_frozen(sae: Sae) -> bool:
    """Tell whether the decoder was left as it started."""
    return _settings(sae).get("decoder") == "frozen"


def _but_for_the_decoder(sae: Sae) -> str:
    """Return what an SAE was trained by, but for whether its decoder was."""
    return json.dumps({key: value for key, value in _settings(sae).items() if key not in ("name", "decoder")})


def _settings(sae: Sae) -> Mapping[str, object]:
    """Return the variant's settings; none where the SAE does not tell."""
    return sae.config.provenance.get("variant") or {}
