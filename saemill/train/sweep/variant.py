"""One SAE's settings, and what does not go together among them."""

import itertools
import math
from dataclasses import dataclass
from typing import Literal

from saemill.common.errors import ConfigError
from saemill.common.sae.parts import CROSS_LAYER
from saemill.common.setting import check, like, written
from saemill.common.stores.runs import check_variant_name
from saemill.common.stores.site_names import module_of, parts_of
from saemill.train.architectures import Architecture
from saemill.train.config import ADAM_BETAS, OptimizerName, TrainConfig
from saemill.train.losses import WITHOUT_SQUARES, Loss

WITHOUT_SIGNUM = {
    "weight_average": "which averages weights itself",
    "clip_grad_norm": "whose steps are as large as the rate",
}
"""Settings without effect on signum, and why."""
TARGET_L0 = 32.0
"""Active latents per token that JumpReLU leads to by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One SAE to be trained, all settings resolved: those of `TrainConfig` that it has one value of."""

    name: str
    """Unique in the run; the name of its folder, so none of the run's own files."""
    site: str
    """Several joined by + of a crosscoder or a cross-layer transcoder."""
    target_site: str | None = None
    """Site that is predicted, several joined by + of a cross-layer transcoder; None of an SAE, which
    reconstructs its own."""
    skip_connection: bool = like(TrainConfig, "skip_connection")
    init_from: str | None = like(TrainConfig, "init_from")
    """Place of one SAE."""
    init_content: str | None = None
    """Hash of that SAE, as `sources.content_of` makes it."""
    architecture: Architecture = like(TrainConfig, "architecture", default="topk")
    k: int | float | None = like(TrainConfig, "k", default=None)
    """None with an architecture that has none; so are other settings that it has not."""
    num_latents: int
    lr: float
    """Peak learning rate."""
    seed: int = 0
    """Seed of the initial decoder."""
    optimizer: OptimizerName = like(TrainConfig, "optimizer")
    optimizer_state: Literal["fp32", "bf16", "8bit"] = like(TrainConfig, "optimizer_state")
    adam_betas: tuple[float, float] = like(TrainConfig, "adam_betas")
    weight_decay: float = like(TrainConfig, "weight_decay", default=0.0, most=None)
    clip_grad_norm: float | None = like(TrainConfig, "clip_grad_norm")
    weight_average: float | None = like(TrainConfig, "weight_average")
    auxk_alpha: float = like(TrainConfig, "auxk_alpha", most=None)
    k_aux: int | None = like(TrainConfig, "k_aux", most=None)
    k_anneal_steps: int = like(TrainConfig, "k_anneal_steps")
    multi_topk: bool = like(TrainConfig, "multi_topk")
    nested_k: tuple[int, ...] = like(TrainConfig, "nested_k")
    prefixes: tuple[int, ...] = like(TrainConfig, "prefixes")
    """Ascending, `num_latents` last."""
    matryoshka_rule: Literal["batchtopk", "topk"] = like(TrainConfig, "matryoshka_rule")
    target_l0: float | None = like(TrainConfig, "target_l0", default=None)
    l0_coefficient: float | None = like(TrainConfig, "l0_coefficient", default=None)
    sparsity_penalty: Literal["step", "tanh"] = like(TrainConfig, "sparsity_penalty")
    bandwidth: float | None = like(TrainConfig, "bandwidth")
    preact_coefficient: float = like(TrainConfig, "preact_coefficient")
    most_density: float | None = like(TrainConfig, "most_density")
    l1_coefficient: float | None = like(TrainConfig, "l1_coefficient", default=None)
    lp_norm: float = like(TrainConfig, "lp_norm")
    decoder_rows: Literal["unit", "free"] = like(TrainConfig, "decoder_rows")
    resample_at: tuple[int, ...] = like(TrainConfig, "resample_at")
    penalty_warmup_steps: int | None = like(TrainConfig, "penalty_warmup_steps")
    loss: Loss = like(TrainConfig, "loss")
    apply_b_dec_to_input: bool = like(TrainConfig, "apply_b_dec_to_input")
    decoder: Literal["trained", "frozen"] = like(TrainConfig, "decoder")
    b_dec_init: Literal["mean", "geometric_median"] = like(TrainConfig, "b_dec_init")

    def __post_init__(self) -> None:
        check_variant_name(self.name)
        self._check_l0()
        if self.target_site == self.site:
            raise ConfigError(
                f"target_site must be another site than site, got {self.site} as both; without it an "
                "SAE reconstructs its own site"
            )
        if len(self.parts) > 1:
            self._check_joined()
        elif self.n_layers > 1:
            raise ConfigError(
                f"target_site {self.target_site} joins several, and site {self.site} is one; read as many"
            )
        if self.target_site is not None and not self.apply_b_dec_to_input:
            raise ConfigError("apply_b_dec_to_input has no effect with target_site; leave it out")
        if self.skip_connection and self.target_site is None:
            raise ConfigError("skip_connection has no effect without target_site; leave it out, or name one")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"lr must be positive, got {self.lr}")
        if self.optimizer != "adam" and self.optimizer_state != "fp32":
            raise ConfigError(f"optimizer_state {self.optimizer_state} has an effect with adam only")
        if self.optimizer != "adam" and self.adam_betas != ADAM_BETAS:
            raise ConfigError("adam_betas have an effect with adam only; leave them out")
        for name, why in WITHOUT_SIGNUM.items():
            if self.optimizer == "signum" and getattr(self, name) is not None:
                raise ConfigError(f"{name} has no effect with signum, {why}; leave it out")
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ConfigError(f"adam_betas must be two numbers from 0 to below 1, got {self.adam_betas}")
        if self.loss in WITHOUT_SQUARES and (
            self.architecture == "matryoshka" or self.nested_k or self.multi_topk
        ):
            raise ConfigError(
                f"loss {self.loss} is of one reconstruction, and matryoshka, nested_k and multi_topk have "
                "several; take mse+kl, in which KL is that of the whole SAE"
            )
        if self.is_frozen and self.resample_at:
            raise ConfigError(
                "resample_at gives dead latents new decoder rows, and a frozen decoder keeps its own; leave "
                "it out, or decoder frozen"
            )
        check(self)

    @property
    def parts(self) -> tuple[str, ...]:
        """Sites that it joins; one alone of an SAE."""
        return parts_of(self.site)

    @property
    def is_frozen(self) -> bool:
        """Tell whether the decoder's rows stay as they start."""
        return self.decoder == "frozen"

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites that it is trained on; joined ones count as one."""
        return (self.site,) if self.target_site is None else (self.site, self.target_site)

    @property
    def n_layers(self) -> int:
        """Layers of a cross-layer transcoder; 1 of others."""
        return 1 if self.target_site is None else len(parts_of(self.target_site))

    @property
    def l0(self) -> float:
        """Active latents per token that it is meant to have; a guess where a penalty decides."""
        return self.k or self.target_l0 or TARGET_L0

    def _check_joined(self) -> None:
        """Refuse settings that have no meaning for a crosscoder, or a cross-layer transcoder."""
        name = "a crosscoder" if self.target_site is None else "a cross-layer transcoder"
        if self.target_site is not None:
            self._check_layers()
        if self.loss != "fvu":
            raise ConfigError(
                f"loss {self.loss} is in the units of one site, and {name} has several; use loss fvu"
            )

    def _check_layers(self) -> None:
        """Refuse what a cross-layer transcoder is not, and settings that have no meaning for it."""
        n, targets = len(self.parts), parts_of(str(self.target_site))
        if len(targets) != n:
            raise ConfigError(
                f"a cross-layer transcoder predicts a site of each layer that it reads, got {n} to read, "
                f"{self.site}, and {len(targets)} to predict, {self.target_site}"
            )
        reads, writes = ([_layer(name) for name in names] for names in (self.parts, targets))
        if any(later < one for names in (reads, writes) for one, later in itertools.pairwise(names)) or any(
            read > write for read, write in zip(reads, writes, strict=True)
        ):
            raise ConfigError(
                "a cross-layer transcoder names the sites of each layer in the order in which the model runs "
                f"them, and both in the same; got {self.site}, and to predict {self.target_site}"
            )
        if self.architecture not in CROSS_LAYER:
            raise ConfigError(
                f"a cross-layer transcoder is one of {', '.join(CROSS_LAYER)}, got architecture "
                f"{self.architecture}"
            )
        if self.decoder_rows == "free":
            raise ConfigError("decoder_rows of a cross-layer transcoder are of unit length; leave free out")
        for what in ("nested_k", "multi_topk", "resample_at"):
            if getattr(self, what):
                raise ConfigError(f"{what} is not there for a cross-layer transcoder; leave it out")
        if self.optimizer == "muon":
            raise ConfigError(
                "optimizer muon steps whole matrices, and those of a cross-layer transcoder are in parts; "
                "take adam"
            )
        uneven = {"num_latents": self.num_latents} | ({"k": self.k} if self.architecture == "topk" else {})
        for what, value in uneven.items():
            if value is not None and value % n:
                fitting = round(value // n * n) or n
                raise ConfigError(
                    f"{what} counts those of all {n} layers, each of which has an equal share, got {value}; "
                    f"take {fitting} or {fitting + n}"
                )

    def _check_l0(self) -> None:
        """Refuse numbers of active latents that F latents cannot have, or the architecture cannot."""
        n = self.num_latents
        for name in ("k", "target_l0"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= n:
                raise ConfigError(f"{name} must be in 1..{n} (the number of latents), got {value}")
        per_token = self.architecture in ("topk", "abs-topk", "groupmax") or self.matryoshka_rule == "topk"
        if self.k is not None and self.k != round(self.k) and per_token:
            raise ConfigError(
                f"k is a whole number of each token's latents, got {self.k}; batchtopk takes a mean"
            )
        if self.architecture == "groupmax" and n % round(self.k or 1):
            raise ConfigError(
                f"k must divide the number of latents of groupmax, which has k groups of equal size; got k "
                f"{self.k} and {n} latents"
            )
        if self.nested_k and (
            list(self.nested_k) != sorted({*self.nested_k}) or self.nested_k[-1] >= (self.k or 0)
        ):
            raise ConfigError(
                f"nested_k must be ascending and below k ({self.k}), got {written(self.nested_k)}"
            )
        if self.nested_k and self.multi_topk:
            raise ConfigError("give nested_k or multi_topk, not both")
        if self.multi_topk and 4 * (self.k or 0) > n:
            raise ConfigError(
                f"multi_topk fits 4 k latents, more than the {n} there are; lower k, or leave it out"
            )


def _layer(site: str) -> int:
    """Return the number of the layer that a site is in, 0 where its name has none."""
    return next((int(part) for part in module_of(site).split(".") if part.isdecimal()), 0)
