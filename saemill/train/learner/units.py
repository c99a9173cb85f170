"""From training units to the activations' own: what is to be saved takes and gives activations as they are.

With x̃ = (x − c_x) s_x and ỹ = (y − c_y) s_y, which are the same of an SAE:

    an SAE         b_enc / s,   b_dec = b / s + c;   it subtracts b_dec from x
    a transcoder   (s_x/s_y) W_enc,   b_enc / s_y − W_enc c_x,   b_dec = b / s_y + c_y − W_skip c_x

the last two with W_enc and W_skip as they are saved; thresholds go with b_enc. Where sites are joined, each
with its own scale g s, an SAE is saved with g W_enc and W_dec / g, and b_dec = b / (g s) + c.
"""

import torch
from torch import Tensor

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
    if gain_D is not None:
        own |= {"W_enc": form.w_enc_FD * gain_D, "W_dec": form.w_dec_FD / gain_D}
    if form.threshold_F is not None:
        own["threshold"] = form.threshold_F / (target or scaling).scale
    if target is not None:
        own["W_enc"] = form.w_enc_FD * (scaling.scale / target.scale)
        own["b_enc"] = _shifted(own["b_enc"], own["W_enc"], -scaling.centre_D)
    elif not p.is_centred:
        own["b_enc"] = _shifted(own["b_enc"], own["W_enc"], _offset(p, scaling))
    return own


def whole_of(p: Parameters, scaling: Scaling, target: Scaling | None) -> dict[str, Tensor]:
    """Return the other tensors, as `rows_of`."""
    of = target or scaling
    b_dec = _offset(p, of) + of.centre_D
    if p.w_skip_ED is None:
        return {"b_dec": b_dec}
    W_skip = p.w_skip_ED * (scaling.scale / of.scale)
    return {"b_dec": _shifted(b_dec, W_skip, -scaling.centre_D), "W_skip": W_skip}


def _offset(p: Parameters, scaling: Scaling) -> Tensor:
    """Return the decoder's bias in the activations' units, around their mean."""
    offset_D = p.b_D / scaling.scale
    return offset_D if scaling.gain_D is None else offset_D / scaling.gain_D


def _shifted(bias: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    """Add what weights make of a vector to a bias; in float64, since the two may all but cancel."""
    return torch.addmv(bias.double(), weights.double(), x.double()).float()
