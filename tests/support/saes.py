"""An SAE of random weights, and whether another tool computes the same with it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saemill import Sae, SaeConfig
from saemill.common.sae.parts import Joined

ROUNDING = {"rtol": 1e-5, "atol": 1e-5}
"""fp32, sums in another order."""


def make_sae(d: int = 12, f: int = 40, k: int = 5) -> Sae:
    """Random weights, always the same ones."""
    torch.manual_seed(0)
    w_dec = torch.nn.functional.normalize(torch.randn(f, d), dim=1)
    config = SaeConfig(d_in=d, num_latents=f, k=k, provenance={"site": "layers.1"})
    return Sae(config, torch.randn(f, d), torch.randn(f), w_dec, torch.randn(d))


def make_threshold_sae(
    architecture: str = "jumprelu", d: int = 12, f: int = 40, provenance: dict[str, Any] | None = None
) -> Sae:
    """The same weights with thresholds: of its own for each latent, one for all, or 0, as the architecture
    has them. Matryoshka prefixes are at a quarter, a half and all."""
    parts = make_sae(d, f).parts
    generator = torch.Generator().manual_seed(1)
    threshold = {
        "relu": torch.zeros(f),
        "batchtopk": torch.full((f,), 1.7),
        "matryoshka": torch.full((f,), 1.7),
    }.get(architecture, 3 * torch.rand(f, generator=generator))
    prefixes = (f // 4, f // 2, f) if architecture == "matryoshka" else ()
    config = SaeConfig(
        d_in=d, num_latents=f, k=None, provenance=provenance or {"site": "layers.1"},
        architecture=architecture, prefixes=prefixes,
    )  # fmt: skip
    return Sae(config, parts.W_enc, parts.b_enc, parts.W_dec, parts.b_dec, threshold)


def make_transcoder(
    architecture: str = "topk", *, has_skip: bool = False, d: int = 12, e: int = 12, f: int = 40
) -> Sae:
    """Random weights that read D and predict E, with k or thresholds as the architecture has them."""
    base = make_sae(d, f) if architecture == "topk" else make_threshold_sae(architecture, d, f)
    generator = torch.Generator().manual_seed(2)
    W_dec = torch.nn.functional.normalize(torch.randn(f, e, generator=generator), dim=1)
    W_skip = torch.randn(e, d, generator=generator) if has_skip else None
    config = replace(
        base.config, d_out=e, provenance={"site": "layers.1.norm", "target_site": "layers.1.mlp"}
    )
    b_dec = torch.randn(e, generator=generator)
    return Sae.of(replace(base.parts, config=config, W_dec=W_dec, b_dec=b_dec, W_skip=W_skip))


def ours(sae: Sae, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [T, F] and reconstructions [T, D]."""
    with torch.no_grad():
        reconstruction, acts, indices = sae(x_TD)
    return torch.zeros(len(x_TD), sae.config.num_latents).scatter_add(1, indices, acts), reconstruction


def check_same(sae: Sae, x_TD: torch.Tensor, theirs: Path) -> None:
    """Compare with the latents and reconstructions that a peer wrote."""
    latents, reconstruction = ours(sae, x_TD)
    with np.load(theirs) as found:
        torch.testing.assert_close(latents, torch.from_numpy(found["latents"]), **ROUNDING)
        torch.testing.assert_close(reconstruction, torch.from_numpy(found["reconstruction"]), **ROUNDING)
    assert (latents > 0).sum() > len(x_TD)


def make_cross_layer(
    architecture: str = "jumprelu", *, n_layers: int = 3, d: int = 12, e: int = 12, f: int = 30, **told: Any
) -> Sae:
    """A cross-layer transcoder of random weights, with k 6 or thresholds as the architecture has them."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((f, d), (f,), (f * (n_layers + 1) // 2, e), (n_layers * e,))
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    threshold = {"topk": None, "relu": torch.zeros(f)}.get(
        architecture, 3 * torch.rand(f, generator=generator)
    )
    ends = {
        name: tuple(Joined(f"layers.{layer}.{site}", width, 0.5 + layer) for layer in range(n_layers))
        for name, site, width in (("joined", "post_attention_layernorm", d), ("predicted", "mlp", e))
    }
    places = zip(("site", "target_site"), ends.values(), strict=True)
    origin = {end: "+".join(part.site for part in parts) for end, parts in places}
    config = SaeConfig(
        d_in=n_layers * d, d_out=n_layers * e, num_latents=f, k=6 if architecture == "topk" else None,
        provenance=origin | told, architecture=architecture, **ends,
    )  # fmt: skip
    return Sae(config, *weights, threshold)
