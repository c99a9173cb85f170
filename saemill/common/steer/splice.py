"""A model run with an SAE spliced in: its latents watched, ablated or steered while the model computes.

With the error kept only the edit reaches the model. Without, and without an edit, it is the splice that
`saemill assess` measures. `substitute` has the formula.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saemill.common.config import nearest
from saemill.common.errors import ConfigError
from saemill.common.log import counted
from saemill.common.models.sites import replacing
from saemill.common.models.structure import base_of, block_names
from saemill.common.sae.formats.hooks import site_of
from saemill.common.sae.sae import Encoded, Sae
from saemill.common.steer.across_layers import AcrossLayers
from saemill.common.steer.edits import LatentEdit
from saemill.common.steer.forward_pass import ForwardPass, Where, by_name
from saemill.common.steer.substitute import Edit, Substitute
from saemill.common.stores.site_names import module_of


@contextmanager
def splice(
    model: Any,
    site: str | None,
    sae: Sae,
    edit: Edit | Sequence[Edit] | None = None,
    *,
    keep_error: bool = True,
    where: Where | Tensor | None = None,
    read: str | None = None,
) -> "Iterator[Spliced | SplicedLayers]":
    """Replace the activations at `site`, while the block runs, by those that `sae` makes of them.

    A transcoder makes them of what the model has at another site, so that it takes the place of what lies
    between the two: of an MLP, say. A cross-layer transcoder takes the place of those of all its layers.

    Works with gradients, in `generate` with or without a cache, and inside other splices; where two are
    at one site, the second sees what the first made.

    Args:
        model: a HuggingFace transformer, with or without a head, on the SAE's device.
        site: module path in the base model, with `:in` for what the module takes, or `residual.4`; None for
            the one that the SAE was trained at, or that the transcoder was trained to predict.
        sae: of any format that `Sae.load` reads.
        edit: of the latents: `ablate`, `scale`, `clamp`, `steer`, a function, or several in order. None
            leaves them, to watch, or to splice the reconstruction in as it is.
        keep_error: add what the SAE does not reconstruct, x − x̂, to the edited reconstruction.
        where: positions to splice: a function of token ids and positions, or bool [B, S] for forward
            passes of that shape. None: those that the SAE was trained on, as far as its folder says
            (without special tokens and the first position, by default); else all. Never padding.
        read: the site that a transcoder reads, which runs before `site`; None for the one that it was
            trained at.

    Yields: what fired, of the latest forward pass.

    Raises:
        ConfigError: the site, a latent or the width does not exist; no site is known; SAE and model are on
            different devices; or nothing ran through the site inside the block.
    """
    if not isinstance(getattr(model, "base_model", None), torch.nn.Module):
        raise ConfigError(f"model must be a HuggingFace transformer, got {type(model).__name__}")
    base, edits = base_of(model), _edits(edit, sae)
    where = _trained_on(sae) if where is None else where
    spliced: Spliced | SplicedLayers
    if sae.config.predicted:
        spliced = SplicedLayers(sae, edits, keep_error, where, _sites_of_layers(base, sae, site, read))
    else:
        spliced = Spliced(sae, edits, keep_error, where, *_sites(base, sae, site, read))
    with ExitStack() as hooks:
        _follow(model, base, spliced.forward_pass, hooks)
        modules = dict(base.named_modules())
        for name, change in spliced.changes.items():
            hooks.enter_context(replacing(modules, name, change))
        yield spliced
    spliced.check_ran()


def _follow(model: Any, base: Any, forward_pass: ForwardPass, hooks: ExitStack) -> None:
    """Tell a forward pass of the model's calls, until `hooks` is closed."""

    def begin(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        forward_pass.begin(by_name(inspect.signature(module.forward), arguments, named))

    # Either may be called, and not every model with a head calls its base model as a whole (OPT's).
    for called in {model, base}:
        hooks.callback(called.register_forward_pre_hook(begin, with_kwargs=True).remove)
        hooks.callback(called.register_forward_hook(forward_pass.end, always_call=True).remove)


def _sites(base: Any, sae: Sae, site: str | None, read: str | None) -> tuple[str, str | None]:
    """Find the paths of the site that is spliced, and of the one that a transcoder reads."""
    if sae.config.joined:
        raise ConfigError(f"{sae.config.spans} takes the place of no one site; splice an SAE of one")
    origin = sae.config.provenance
    own = origin.get("site"), origin.get("hook_name")
    predicted = origin.get("target_site"), origin.get("hook_name_out")
    if read is not None and not sae.is_transcoder:
        raise ConfigError(f"read is the site that a transcoder reads, got {read!r} with an SAE; leave it out")
    name = _find_site(base, site, predicted if sae.is_transcoder else own)
    return name, _find_site(base, read, own, "read=") if sae.is_transcoder else None


def _sites_of_layers(base: Any, sae: Sae, site: str | None, read: str | None) -> list[tuple[str, str]]:
    """Find the paths of the sites that each layer of a cross-layer transcoder reads and predicts."""
    if site is not None or read is not None:
        raise ConfigError(
            f"{sae.config.spans} has sites of its own, got {site or read!r}; splice(model, None, sae)"
        )
    pairs = zip(sae.config.joined, sae.config.predicted, strict=True)
    model_type = base.config.model_type
    return [
        (
            _find_site(base, site_of(reads.site, model_type) or reads.site, (None, None)),
            _find_site(base, site_of(predicts.site, model_type) or predicts.site, (None, None)),
        )
        for reads, predicts in pairs
    ]


class Spliced:
    """The codes at a spliced site, in the latest forward pass.

    With gradients on, `torch.autograd.grad(metric, spliced.top_acts)` is the effect of each active latent
    on the metric through the decoder, to first order.
    """

    def __init__(
        self,
        sae: Sae,
        edits: Sequence[Edit],
        keep_error: bool,
        where: Where | Tensor,
        site: str,
        read_site: str | None = None,
    ) -> None:
        self.sae, self.site, self.read_site = sae, site, read_site
        self._read_BSD: Tensor | None = None
        """What a transcoder reads, of this forward pass."""
        self._substitute = Substitute(sae, edits, keep_error=keep_error)
        self.forward_pass = ForwardPass(where, self._forget)

    @property
    def changes(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """Return what is done to activations, by the paths of their sites."""
        reads = {} if self.read_site is None else {self.read_site: self._read}
        return reads | {self.site: self._change}

    def _forget(self) -> None:
        self._substitute.fired, self._read_BSD = None, None

    @property
    def top_acts(self) -> Tensor:
        """Activations of the latents, [B, S, k], before the edit; a 0 is an unused slot."""
        return self._fired()[0].top_acts

    @property
    def top_indices(self) -> Tensor:
        """Numbers of the latents, int64 [B, S, k]."""
        return self._fired()[0].top_indices

    @property
    def where(self) -> Tensor:
        """Positions that were spliced, bool [B, S]."""
        return self._fired()[1]

    def check_ran(self) -> None:
        """Refuse to end where nothing ran through the site."""
        self._fired()

    def _fired(self) -> tuple[Encoded, Tensor]:
        if self._substitute.fired is None:
            raise _nothing_ran(self.site)
        return self._substitute.fired

    def _read(self, x_BSD: Tensor) -> Tensor:
        """Note what a transcoder reads, and leave it."""
        assert self.read_site is not None
        self.forward_pass.check(x_BSD, self.read_site, self.sae.config.d_in, self.sae.W_enc.device)
        _check_once(self._substitute.fired, self.read_site)
        self._read_BSD = x_BSD
        return x_BSD

    def _change(self, x_BSD: Tensor) -> Tensor:
        self.forward_pass.check(x_BSD, self.site, len(self.sae.b_dec), self.sae.W_enc.device)
        _check_once(self._substitute.fired, self.site)
        if self.read_site is not None and self._read_BSD is None:
            raise ConfigError(
                f"{self.site} runs before {self.read_site}, which the transcoder reads; name others"
            )
        return self._substitute(x_BSD, self.forward_pass.positions(x_BSD), self._read_BSD)


class SplicedLayers:
    """The codes of a cross-layer transcoder, in the latest forward pass.

    With gradients on, the activations in `layers` are leaves, as `Spliced.top_acts` is.
    """

    def __init__(
        self,
        sae: Sae,
        edits: Sequence[Edit],
        keep_error: bool,
        where: Where | Tensor,
        sites: Sequence[tuple[str, str]],
    ) -> None:
        self.sae, self.sites = sae, sites
        """Paths of the sites that each layer reads and predicts."""
        self._across = AcrossLayers(sae, edits, keep_error=keep_error)
        self.forward_pass = ForwardPass(where, self._across.forget)

    @property
    def changes(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """Return what is done to activations, by the paths of their sites."""
        reads = {site: partial(self._read, layer) for layer, (site, _) in enumerate(self.sites)}
        return reads | {site: partial(self._write, layer) for layer, (_, site) in enumerate(self.sites)}

    @property
    def layers(self) -> list[Encoded]:
        """Codes of each layer, [B, S, k], before the edit, by their numbers among all layers' latents."""
        if (fired := self._across.fired) is None:
            raise _nothing_ran(" and ".join(site for site, _ in self.sites))
        return fired

    @property
    def top_acts(self) -> Tensor:
        """Activations of all layers' latents, [B, S, k], before the edit; a 0 is an unused slot."""
        return torch.cat([codes.top_acts for codes in self.layers], -1)

    @property
    def top_indices(self) -> Tensor:
        """Numbers of the latents, int64 [B, S, k]."""
        return torch.cat([codes.top_indices for codes in self.layers], -1)

    @property
    def where(self) -> Tensor:
        """Positions that were spliced, bool [B, S]."""
        fired = self._across.layers[0].fired
        if fired is None:
            raise _nothing_ran(self.sites[0][0])
        return fired[1]

    def check_ran(self) -> None:
        """Refuse to end where nothing ran through one of the sites that are read."""
        _ = self.layers

    def _read(self, layer: int, x_BSD: Tensor) -> Tensor:
        own, site = self._across.layers[layer], self.sites[layer][0]
        self.forward_pass.check(x_BSD, site, own.sae.config.d_in, self.sae.W_enc.device)
        _check_once(own.fired, site)
        return self._across.read(layer, self.forward_pass.positions(x_BSD), x_BSD)

    def _write(self, layer: int, x_BSE: Tensor) -> Tensor:
        width = self.sae.config.predicted[layer].width
        self.forward_pass.check(x_BSE, self.sites[layer][1], width, self.sae.W_enc.device)
        return self._across.write(layer, x_BSE)


def _nothing_ran(site: str) -> ConfigError:
    """Make the error of a splice that nothing ran through."""
    return ConfigError(
        f"nothing ran through {site} of the model that the SAE was spliced into; run that model "
        "inside the block, and choose a site that its forward pass calls"
    )


def _check_once(fired: object, site: str) -> None:
    """Refuse a site that the model comes to again in a forward pass."""
    if fired is not None:
        raise ConfigError(f"{site} runs more than once in a forward pass; name another module")


def _find_site(base: Any, site: str | None, known: tuple[str | None, str | None], argument: str = "") -> str:
    """Find the path of a site's module.

    Args:
        base: the base model.
        site: as the user named it; None for the one that the SAE tells.
        known: the site that it tells, and the hook.
        argument: by which the user names it.

    Raises:
        ConfigError: it is not known, or the model has no such module.
    """
    if site is None:
        site = known[0] or site_of(known[1] or "", base.config.model_type)
    if site is None:
        example = (
            "splice(model, None, sae, read='layers.4')" if argument else "splice(model, 'layers.4', sae)"
        )
        raise ConfigError(f"the SAE does not tell its site; name it: {example}")
    blocks = {f"residual.{i}": block for i, block in enumerate(block_names(base))}
    modules = [name for name, _ in base.named_modules() if name]
    module = module_of(site)
    name = blocks.get(module, module) + site.removeprefix(module)
    if module_of(name) not in modules:
        raise ConfigError(
            f"{type(base).__name__} has no module {module!r}; {nearest(module, [*modules, *blocks])}"
        )
    return name


def _edits(edit: Edit | Sequence[Edit] | None, sae: Sae) -> Sequence[Edit]:
    """List the edits in order, their latents checked."""
    edits = [] if edit is None else [edit] if callable(edit) else list(edit)
    n_latents = sae.config.num_latents
    for each in edits:
        latents = each.latents if isinstance(each, LatentEdit) else ()
        if bad := [latent for latent in latents if not 0 <= latent < n_latents]:
            raise ConfigError(
                f"latents must be in 0..{n_latents - 1} of an SAE with {counted(n_latents, 'latent')}, "
                f"got {', '.join(map(str, bad))}"
            )
    return edits


def _trained_on(sae: Sae) -> Where:
    """Choose the positions that the SAE's training saw; all where its files do not say."""
    left_out = sae.config.provenance.get("left_out")
    if left_out is None:
        return lambda ids_BS, _: torch.ones_like(ids_BS, dtype=torch.bool)

    def where(ids_BS: Tensor, position_BS: Tensor) -> Tensor:
        ids = torch.tensor(left_out["token_ids"], dtype=ids_BS.dtype, device=ids_BS.device)
        special_BS = torch.isin(ids_BS, ids)
        return ~special_BS & (position_BS >= int(left_out["first_positions"]))

    return where
