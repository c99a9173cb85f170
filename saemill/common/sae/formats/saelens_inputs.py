"""What SAELens does to activations before its SAE sees them, folded into the tensors of the SAE.

`expected_average_only_in` multiplies them by one factor, `covariance_whitening` by a matrix after taking off
their mean. Both are linear. A checkpoint has their numbers in files beside it; SAELens folds them itself when
training ends.
"""

from pathlib import Path

from saemill.common.errors import ConfigError
from saemill.common.sae.formats.checks import check_weights, read_config
from saemill.common.sae.formats.folding import Tensors, scaled, unit_rows, widened
from saemill.common.sae.formats.tensor_files import read_tensors

SCALER = "activation_scaler.json"
WHITENING = "activation_whitening.safetensors"
LARGEST = 1e30
"""Largest factor on activations that can be folded."""
NONE, AVERAGE, WHITENED = "none", "expected_average_only_in", "covariance_whitening"


def fold(tensors: Tensors, folder: Path, normalization: str, is_rescaled: bool) -> Tensors:
    """Fold what is done to activations, and to pre-activations.

    Args:
        tensors: of an SAE that subtracts b_dec from what it sees.
        folder: of the SAE.
        normalization: `normalize_activations` of its config.
        is_rescaled: whether pre-activations are multiplied by the lengths of decoder rows.

    Raises:
        ConfigError: it is no linear step, or its numbers are not there.
        StoreError: they are damaged.
    """
    if normalization == AVERAGE:
        factor = _factor(folder)
        tensors = scaled(tensors, factor)
        return _of_unit_rows(tensors, factor) if is_rescaled else tensors
    tensors = _of_unit_rows(tensors) if is_rescaled else tensors
    return _whitened(tensors, folder) if normalization == WHITENED else tensors


def _of_unit_rows(tensors: Tensors, factor: float = 1.0) -> Tensors:
    """Move the length of decoder rows to the encoder.

    Args:
        factor: by which the rows were divided before. The threshold is one of activations with the length of
            rows before that.
    """
    dtype = widened(tensors.W_enc).dtype
    W_enc, b_enc, W_dec = unit_rows(*(weights.double() for weights in tensors[:3]))
    threshold = tensors.threshold if tensors.threshold is None else tensors.threshold / factor
    return Tensors(W_enc.to(dtype), b_enc.to(dtype), W_dec.to(dtype), tensors.b_dec.to(dtype), threshold)


def _factor(folder: Path) -> float:
    """Read the factor by which activations are multiplied."""
    scale = read_config(folder / SCALER).get("scaling_factor") if (folder / SCALER).is_file() else None
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 < scale < LARGEST:
        raise ConfigError(
            f"{folder / 'cfg.json'}: normalize_activations is {AVERAGE!r}, but {SCALER} with its "
            "scaling_factor is not there; get it from the checkpoint, or fold the factor with SAELens: "
            "sae.fold_activation_norm_scaling_factor(…), then sae.save_model(…)"
        )
    return float(scale)


def _whitened(tensors: Tensors, folder: Path) -> Tensors:
    """Fold x → (x − mean) M into the encoder, and its inverse into the decoder."""
    file, d = folder / WHITENING, len(tensors.b_dec)
    if not file.is_file():
        raise ConfigError(
            f"{folder / 'cfg.json'}: normalize_activations is {WHITENED!r}, but {WHITENING} is not "
            "there; get it from the checkpoint, or fold it with SAELens: "
            "sae.fold_activation_whitening(…), then sae.save_model(…)"
        )
    found = check_weights(
        file, read_tensors(file), {"mean": (d,), "matrix": (d, d), "inverse_matrix": (d, d)}
    )
    mean, matrix, inverse = (tensor.double() for tensor in found.values())
    dtype = widened(tensors.W_enc).dtype
    W_enc = (tensors.W_enc.double() @ matrix.T).to(dtype)
    W_dec, b_dec = tensors.W_dec.double() @ inverse, tensors.b_dec.double() @ inverse + mean
    return tensors._replace(W_enc=W_enc, W_dec=W_dec.to(dtype), b_dec=b_dec.to(dtype))
