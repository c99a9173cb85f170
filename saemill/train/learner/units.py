"""From training units to the activations' own and back: what is saved takes activations as they are.

With x̃ = (x − c_x) s_x and ỹ = (y − c_y) s_y, which are the same of an SAE:

    an SAE         b_enc / s,   b_dec = b / s + c;   it subtracts b_dec from x
    a transcoder   (s_x/s_y) W_enc,   b_enc / s_y − W_enc c_x,   b_dec = b / s_y + c_y − W_skip c_x

the last two with W_enc and W_skip as they are saved; thresholds go with b_enc. Where sites are joined, each
with its own scale g s, an SAE is saved with g W_enc and W_dec / g, and b_dec = b / (g s) + c. So is a
cross-layer transcoder, each part of its weights with the g of the site that it reads or writes to. A finished
SAE that training starts from was made in units of its own, and goes the other way into those of this run.
Where the scales of a crosscoder's sites have another ratio here, its rows are of unit length in these.
"""

import torch
from torch import Tensor

from saemill.common.errors import ConfigError
from saemill.common.sae import layers
from saemill.common.sae.formats.folding import unit_rows
from saemill.common.sae.parts import Parts
from saemill.train.backends.architecture import Inference
from saemill.train.backends.parameters import Parameters
from saemill.train.stream.scaling import Scaling


def rows_of(form: Inference, p: Parameters, scaling: Scaling, target: Scaling | None) -> dict[str, Tensor]:
    """Return the tensors with a row per latent, by their names in `Parts`.

    Args:
        form: of the SAE.
        p: its parameters.
        scaling: units of what it reads.
        target: units of what it predicts; None of an SAE.
    """
    own = {"W_enc": form.w_enc_FD, "b_enc": form.b_enc_F / (target or scaling).scale, "W_dec": form.w_dec_FD}
    gain_D = scaling.gain_D
    if target is not None and p.n_layers > 1:
        own |= _of_layers(form, own["b_enc"], scaling, target)
    elif gain_D is not None:
        own |= {"W_enc": form.w_enc_FD * gain_D, "W_dec": form.w_dec_FD / gain_D}
    if form.threshold_F is not None:
        own["threshold"] = form.threshold_F / (target or scaling).scale
    if target is not None and p.n_layers == 1:
        own["W_enc"] = form.w_enc_FD * (scaling.scale / target.scale)
        own["b_enc"] = _shifted(own["b_enc"], own["W_enc"], -scaling.centre_D)
    elif target is None and not p.is_centred:
        own["b_enc"] = _shifted(own["b_enc"], own["W_enc"], _offset(p, scaling))
    return own


def _of_layers(form: Inference, b_enc_F: Tensor, scaling: Scaling, target: Scaling) -> dict[str, Tensor]:
    """Return what each layer's latents of a cross-layer transcoder have in the units of the sites that they
    read and write to; b_enc_F has the target's scale already."""
    n = len(scaling.parts)
    reads = [own / target.scale for _, own in scaling.parts]
    writes = form.b_enc_F.new_tensor([own / target.scale for _, own in target.parts])
    W_enc = [rows * read for rows, read in zip(form.w_enc_FD.chunk(n), reads, strict=True)]
    centres = scaling.centre_D.chunk(n)
    b_enc = [_shifted(b, W, -c) for b, W, c in zip(b_enc_F.chunk(n), W_enc, centres, strict=True)]
    W_dec = [
        rows.view(len(rows), n - layer, -1) / writes[layer:, None]
        for layer, rows in enumerate(layers.blocks(form.w_dec_FD, n))
    ]
    rows = [each.flatten(0, 1) for each in W_dec]
    return {"W_enc": torch.cat(W_enc), "b_enc": torch.cat(b_enc), "W_dec": torch.cat(rows)}


def whole_of(p: Parameters, scaling: Scaling, target: Scaling | None) -> dict[str, Tensor]:
    """Return the other tensors, as `rows_of`."""
    of = target or scaling
    b_dec = _offset(p, of) + of.centre_D
    if p.w_skip_ED is None:
        return {"b_dec": b_dec}
    if p.n_layers > 1:
        ratio_L11 = _over(scaling, of).to(p.w_skip_ED)
        W_skip = (p.w_skip_ED.view(p.n_layers, -1, p.w_skip_ED.shape[1]) * ratio_L11).flatten(0, 1)
        return {"b_dec": b_dec - _skipped(W_skip, scaling), "W_skip": W_skip}
    W_skip = p.w_skip_ED * (scaling.scale / of.scale)
    return {"b_dec": _shifted(b_dec, W_skip, -scaling.centre_D), "W_skip": W_skip}


def _over(scaling: Scaling, target: Scaling) -> Tensor:
    """Divide the scale of each site that is read by that of the one that is predicted. float64 [L, 1, 1]"""
    pairs = zip(scaling.parts, target.parts, strict=True)
    return torch.tensor([own / other for (_, own), (_, other) in pairs]).double()[:, None, None]


def _skipped(W_skip: Tensor, scaling: Scaling) -> Tensor:
    """Compute what W_skip of several layers makes of the centres of the sites that they read. [L E]"""
    centre_1D = scaling.centre_D.to(W_skip.device).double()[None]
    return layers.skipped(centre_1D, W_skip.double(), len(scaling.parts))[0].to(W_skip.dtype)


def _offset(p: Parameters, scaling: Scaling) -> Tensor:
    """Return the decoder's bias in the activations' units, around their mean."""
    offset_D = p.b_D / scaling.scale
    return offset_D if scaling.gain_D is None else offset_D / scaling.gain_D


def check_joined(parts: Parts, scaling: Scaling, site: str) -> None:
    """Refuse a crosscoder that joins sites of other widths than this run's.

    Raises:
        ConfigError: it does.
    """
    own, wanted = ([part.width for part in parts.config.joined], [width for width, _ in scaling.parts])
    if own != wanted:
        raise ConfigError(
            f"init_from: {parts.config.spans} joins widths {own}, and {site} joins {wanted}; name the sites "
            "in the order of the source's, or others of these widths"
        )


def fill_whole(p: Parameters, parts: Parts, scaling: Scaling, target: Scaling | None) -> None:
    """Fill in the parameters without a row per latent from a finished SAE, of which `whole_of` makes these.

    Args:
        p: its parameters.
        parts: the SAE, in the activations' own units.
        scaling: units of what is read here.
        target: units of what is predicted here; None of an SAE.
    """
    of, b_D = target or scaling, parts.b_dec.double()
    if target is not None and p.n_layers > 1:
        _fill_whole_of_layers(p, parts, scaling, target)
        return
    if p.w_skip_ED is not None and parts.W_skip is not None:
        W_skip = parts.W_skip.double()
        b_D = b_D + W_skip @ scaling.centre_D.cpu().double()
        p.w_skip_ED.copy_(W_skip * (of.scale / scaling.scale))
    b_D = (b_D - of.centre_D.cpu().double()) * of.scale
    p.b_D.copy_(b_D if of.gain_D is None else b_D * of.gain_D.cpu().double())


def _fill_whole_of_layers(p: Parameters, parts: Parts, scaling: Scaling, target: Scaling) -> None:
    """Do so of a cross-layer transcoder, whose sites have scales of their own."""
    b_D = parts.b_dec.double() - target.centre_D.cpu().double()
    if p.w_skip_ED is not None and parts.W_skip is not None:
        W_skip = parts.W_skip.double()
        b_D = b_D + _skipped(W_skip, scaling)
        rows_LED = W_skip.view(p.n_layers, -1, W_skip.shape[1]) / _over(scaling, target)
        p.w_skip_ED.copy_(rows_LED.flatten(0, 1))
    scale_L1 = torch.tensor([own for _, own in target.parts]).double()[:, None]
    p.b_D.copy_((b_D.view(p.n_layers, -1) * scale_L1).flatten())


def _form_of_layers(parts: Parts, scaling: Scaling, target: Scaling) -> Inference:
    """Return the latents of a cross-layer transcoder as `form_of`, of which `_of_layers` makes these; a
    decoder is of unit length over all sites that it writes to."""
    n = len(scaling.parts)
    reads, writes = ([own for _, own in of.parts] for of in (scaling, target))
    W_enc, b_enc, W_dec = (weights.double() for weights in (parts.W_enc, parts.b_enc, parts.W_dec))
    length_F = layers.lengths(W_dec, writes)
    w_enc, bias, w_dec = [], [], []
    for layer, own in enumerate(layers.blocks(W_dec, n)):
        some = slice(layer * len(own), (layer + 1) * len(own))
        length_F1, centre_D = length_F[some, None], scaling.centre_D.chunk(n)[layer].cpu().double()
        w_enc.append(W_enc[some] * length_F1 / reads[layer])
        bias.append((b_enc[some] + W_enc[some] @ centre_D) * length_F[some])
        scales_L1 = W_dec.new_tensor(writes[layer:])[:, None]
        rows = own.view(len(own), n - layer, -1) * scales_L1 / length_F1[..., None]
        w_dec.append(rows.flatten(0, 1))
    threshold_F = None if parts.threshold is None else parts.threshold.double() * length_F
    return Inference(parts.config.k, threshold_F, torch.cat(w_enc), torch.cat(bias), torch.cat(w_dec))


def form_of(p: Parameters, parts: Parts, rows: slice, scaling: Scaling, target: Scaling | None) -> Inference:
    """Return some latents of a finished SAE in training units, of which `rows_of` makes these: float64, on
    the CPU, with decoder rows of unit length.

    Args:
        p: with what `fill_whole` fills in.
        parts: the SAE, in the activations' own units.
        rows: the latents.
        scaling, target: as of `fill_whole`.
    """
    if target is not None and p.n_layers > 1:
        return _form_of_layers(parts, scaling, target)
    W_enc, b_enc, W_dec = (weights[rows].double() for weights in (parts.W_enc, parts.b_enc, parts.W_dec))
    gain_D = None if scaling.gain_D is None else scaling.gain_D.cpu().double()
    W_dec = W_dec if gain_D is None else W_dec * gain_D
    length_F, scale = W_dec.norm(dim=1), (target or scaling).scale
    W_enc, b_enc, W_dec = unit_rows(W_enc, b_enc, W_dec)
    threshold_F = None if parts.threshold is None else parts.threshold[rows].double() * length_F * scale
    if target is not None:
        b_enc = b_enc + W_enc @ scaling.centre_D.cpu().double()
    elif not p.is_centred:  # what an SAE subtracts from x is in b_enc here
        b_enc = b_enc - W_enc @ (parts.b_dec.double() - scaling.centre_D.cpu().double())
    if target is not None:
        W_enc = W_enc * (target.scale / scaling.scale)
    elif gain_D is not None:
        W_enc = W_enc / gain_D
    return Inference(parts.config.k, threshold_F, W_enc, b_enc * scale, W_dec)


def _shifted(bias: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    """Add what weights make of a vector to a bias; in float64, since the two may all but cancel."""
    return torch.addmv(bias.double(), weights.double(), x.double()).float()
