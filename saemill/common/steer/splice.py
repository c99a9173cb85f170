"""A model run with an SAE spliced in: its latents watched, ablated or steered while the model computes.

With the error kept only the edit reaches the model. Without, and without an edit, it is the splice that
`saemill assess` measures. `substitute` has the formula.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
from saemill.common.steer.edits import LatentEdit
from saemill.common.steer.substitute import Edit, Substitute
from saemill.common.stores.site_names import module_of

Where = Callable[[Tensor, Tensor], Tensor]
"""Function that chooses positions: token ids and positions, int64 [B, S] → bool [B, S]. A position counts the
tokens before, in the cache too, without padding; that of padding is -1."""


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
) -> "Iterator[Spliced]":
    """Replace the activations at `site`, while the block runs, by those that `sae` makes of them.

    A transcoder makes them of what the model has at another site, so that it takes the place of what lies
    between the two: of an MLP, say.

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
    if spans := sae.config.spans:
        raise ConfigError(f"{spans} takes the place of no one site; splice an SAE of one")
    base = base_of(model)
    modules = dict(base.named_modules())
    origin, edits = sae.config.provenance, _edits(edit, sae)
    own = origin.get("site"), origin.get("hook_name")
    predicted = origin.get("target_site"), origin.get("hook_name_out")
    if read is not None and not sae.is_transcoder:
        raise ConfigError(f"read is the site that a transcoder reads, got {read!r} with an SAE; leave it out")
    name = _find_site(base, site, predicted if sae.is_transcoder else own)
    read_name = _find_site(base, read, own, "read=") if sae.is_transcoder else None
    spliced = Spliced(sae, edits, keep_error, _trained_on(sae) if where is None else where, name, read_name)

    def begin(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        spliced._begin(_by_name(inspect.signature(module.forward), arguments, named))

    # Either may be called, and not every model with a head calls its base model as a whole (OPT's).
    handles = []
    for called in {model, base}:
        handles.append(called.register_forward_pre_hook(begin, with_kwargs=True))
        handles.append(called.register_forward_hook(spliced._end, always_call=True))
    try:
        with ExitStack() as hooks:
            if read_name is not None:
                hooks.enter_context(replacing(modules, read_name, spliced._read))
            hooks.enter_context(replacing(modules, name, spliced._change))
            yield spliced
    finally:
        for handle in handles:
            handle.remove()
    spliced._fired()


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
        self._where = where
        self._arguments: dict[str, Any] = {}
        self._depth = 0
        """Number of calls that have begun and not ended: a head calls its base."""

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

    def _fired(self) -> tuple[Encoded, Tensor]:
        if self._substitute.fired is None:
            raise ConfigError(
                f"nothing ran through {self.site} of the model that the SAE was spliced into; run that model "
                "inside the block, and choose a site that its forward pass calls"
            )
        return self._substitute.fired

    def _begin(self, arguments: dict[str, Any]) -> None:
        """Note that a forward pass begins, or that the head calls its base model.

        The outermost call's arguments count: not every head passes the attention mask on (RWKV's does not).
        """
        named = {name: value for name, value in arguments.items() if value is not None}
        if self._depth == 0:
            self._arguments, self._substitute.fired, self._read_BSD = {}, None, None
        self._arguments = named | self._arguments
        self._depth += 1

    def _end(self, *_: Any) -> None:
        """Note that a call is over, also by an error."""
        self._depth = max(0, self._depth - 1)

    def _read(self, x_BSD: Tensor) -> Tensor:
        """Note what a transcoder reads, and leave it."""
        assert self.read_site is not None
        self._check(x_BSD, self.read_site, self.sae.config.d_in)
        self._read_BSD = x_BSD
        return x_BSD

    def _change(self, x_BSD: Tensor) -> Tensor:
        self._check(x_BSD, self.site, len(self.sae.b_dec))
        if self.read_site is not None and self._read_BSD is None:
            raise ConfigError(
                f"{self.site} runs before {self.read_site}, which the transcoder reads; name others"
            )
        return self._substitute(x_BSD, self._positions(x_BSD), self._read_BSD)

    def _check(self, x: Any, site: str, width: int) -> None:
        """Refuse an activation that the SAE is not made for."""
        inputs = self._arguments.get("input_ids", self._arguments.get("inputs_embeds"))
        if inputs is None:
            raise ConfigError("call the model as a whole, with input_ids or inputs_embeds, not a part of it")
        shape = inputs.shape[:2]
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 3 or x.shape[:2] != shape:
            raise ConfigError(f"{site} does not give one vector per token; name another module")
        if x.shape[-1] != width:
            raise ConfigError(
                f"the SAE takes activations of width {width}, but those at {site} have {x.shape[-1]}; "
                "it belongs to another site or model"
            )
        if x.device != (device := self.sae.W_enc.device):
            raise ConfigError(
                f"the SAE is on {device}, the model on {x.device}; move it: sae.to({str(x.device)!r})"
            )
        if self._substitute.fired is not None:
            raise ConfigError(f"{site} runs more than once in a forward pass; name another module")

    def _positions(self, x_BSD: Tensor) -> Tensor:
        """Choose the positions to splice. bool [B, S]."""
        position_BS = positions(self._arguments, x_BSD)
        if isinstance(self._where, Tensor):
            where_BS = self._where.to(x_BSD.device)
        else:
            ids_BS = self._arguments.get("input_ids")
            if ids_BS is None:
                raise ConfigError(
                    "the model was called without input_ids, which tell the positions to splice; "
                    "say where as a bool tensor"
                )
            where_BS = self._where(ids_BS.to(x_BSD.device), position_BS)
        if where_BS.shape != position_BS.shape or where_BS.dtype != torch.bool:
            raise ConfigError(
                f"where must be bool {tuple(position_BS.shape)}, as the forward pass is, "
                f"got {where_BS.dtype} {tuple(where_BS.shape)}; for passes of several shapes, as in "
                "generate, give a function"
            )
        return where_BS & (position_BS >= 0)


def positions(arguments: dict[str, Any], x_BSD: Tensor) -> Tensor:
    """Count the tokens before each one, padding left out; -1 for padding. int64 [B, S].

    Args:
        arguments: what the base model was called with.
        x_BSD: an activation of that pass.

    Raises:
        ConfigError: the model keeps a cache without a known length.
    """
    n_rows, n_positions = x_BSD.shape[:2]
    attention, position_ids = arguments.get("attention_mask"), arguments.get("position_ids")
    if isinstance(attention, Tensor) and attention.dim() == 2:
        attended = attention.to(x_BSD.device) > 0
        position_BS = (attended.long().cumsum(1) - 1).masked_fill(~attended, -1)
        return position_BS[:, -n_positions:]
    if isinstance(position_ids, Tensor) and position_ids.dim() == 2:
        return position_ids.to(x_BSD.device).expand(n_rows, -1)
    if arguments.get("cache_params") is not None:
        raise ConfigError(
            "the model's cache does not tell how many tokens it holds, and so neither the positions; "
            "run it with use_cache=False"
        )
    cache = arguments.get("past_key_values")
    n_before = int(cache.get_seq_length()) if cache is not None else 0
    return torch.arange(n_before, n_before + n_positions, device=x_BSD.device).expand(n_rows, -1)


def _by_name(
    signature: inspect.Signature, arguments: tuple[Any, ...], named: dict[str, Any]
) -> dict[str, Any]:
    """Bind the arguments of a call to their names, those that its signature does not name included."""
    bound = signature.bind_partial(*arguments, **named).arguments
    rest = [name for name, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD]
    return bound | (bound.pop(rest[0], {}) if rest else {})


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
