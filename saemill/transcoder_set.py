"""`saemill export --format circuit-tracer`: transcoders of every layer of a model as a set, or a cross-layer
transcoder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saemill.common.errors import ConfigError
from saemill.common.log import say
from saemill.common.sae.formats import circuit_tracer, circuit_tracer_clt
from saemill.common.sae.formats.circuit_tracer import NAME
from saemill.common.sae.formats.hooks import BLOCKS, Hook, denotes, hook_of
from saemill.common.sae.sae import Sae
from saemill.common.stores import runs
from saemill.convert import check_new, config_of, new, role_of


def export(paths: Sequence[str], out: Path, model: str | None = None) -> None:
    """Write transcoders, one of each layer, as a set that circuit-tracer loads; or a cross-layer transcoder.

    Args:
        paths: runs, of which all that were trained to the end are taken, and folders of transcoders, here or
            as hf://user/repo/folder.
        out: where to; a new or empty folder.
        model: hub id or folder of the model, if not where it was cached from.

    Raises:
        StoreError: no transcoder there, or a damaged one.
        ConfigError: layers that are missing or there twice, transcoders of anything but MLPs, or that differ
            in what a set has once; an output in use; a model that cannot be found.
        DiskError: the disk is full, or the folder may not be written to.
    """
    check_new(out)
    saes = {place: Sae.load(place) for path in paths for place in _places(path)}
    model, revision = _model(saes, model)
    trusts = any(sae.config.provenance.get("trust_remote_code") for sae in saes.values())
    config = config_of(model, revision, trusts)
    n_layers = config.get_text_config().num_hidden_layers
    if any(sae.config.predicted for sae in saes.values()):
        _export_cross_layer(saes, out, model, config.model_type, n_layers)
        return
    by_layer = _by_layer(saes, config.model_type)
    _check_all_there(by_layer, n_layers)
    transcoders = [saes[by_layer[layer]] for layer in sorted(by_layer)]
    with new(out) as partial:
        circuit_tracer.write(
            [sae.parts for sae in transcoders], partial, _output(str(transcoders[0].target_site)), model
        )
    first = transcoders[0].config
    say(f"{out}: a set for {NAME}, {len(transcoders)} layers, {first.described} each")
    if first.k is not None:
        say(
            f"{NAME} reads k from a set on the hub alone, and takes transcoders of a local folder for ReLU "
            f"ones: `hf upload USER/REPO {out}` puts the set there"
        )


def _export_cross_layer(
    saes: dict[str, Sae], out: Path, model: str | None, model_type: str, n_layers: int
) -> None:
    """Write the one cross-layer transcoder that is named."""
    (place, sae), *others = saes.items()
    if others:
        raise ConfigError(
            f"{NAME} has a folder for each cross-layer transcoder, got {place} and {others[0][0]}; name one"
        )
    pairs = list(zip(sae.config.joined, sae.config.predicted, strict=True))
    found = [
        _layer(place, (reads.site, predicts.site), sae.config.provenance, model_type)
        for reads, predicts in pairs
    ]
    if found != list(range(n_layers)):
        raise ConfigError(
            f"a cross-layer transcoder for {NAME} must have each of the model's {n_layers} layers in order, "
            f"got {', '.join(map(str, found))}; train one of all of them"
        )
    hooks = Hook(0, "mlp_in").in_block, _output(sae.config.predicted[0].site)
    with new(out) as partial:
        circuit_tracer_clt.write(sae.parts, partial, hooks, model)
    say(f"{out}: for {NAME}, {sae.config.described}")


def _places(path: str) -> list[str]:
    """List the SAEs at a path: itself, or those of a run that were trained to the end."""
    folder = Path(path)
    if not runs.is_run(folder):
        return [path]
    finished = runs.finished(folder)
    left_out = finished.stopped.keys() | finished.diverged.keys()
    return [str(folder / name) for name in finished.variants if name not in left_out]


def _model(saes: dict[str, Sae], model: str | None) -> tuple[str, str | None]:
    """Find the one model of all transcoders, and its revision."""
    if model:
        return model, None
    known = {
        (sae.config.provenance.get("model"), sae.config.provenance.get("revision")) for sae in saes.values()
    }
    if len(known) > 1:
        listed = ", ".join(sorted(str(name) for name, _ in known))
        raise ConfigError(f"a set must be of one model, got transcoders of {listed}; name one with --model")
    name, revision = next(iter(known), (None, None))
    if name is None:
        raise ConfigError("the folders do not tell of which model the transcoders are; name it with --model")
    return name, revision


def _by_layer(saes: dict[str, Sae], model_type: str) -> dict[int, str]:
    """Find the layer of each transcoder."""
    by_layer: dict[int, str] = {}
    for place, sae in saes.items():
        if not sae.is_transcoder:
            raise ConfigError(f"{NAME} has transcoders, got {place}, an SAE of {sae.site}; leave it out")
        sites = str(sae.site or ""), str(sae.target_site or "")
        layer = _layer(place, sites, sae.config.provenance, model_type)
        if layer in by_layer:
            raise ConfigError(
                f"a set must have one transcoder per layer, got two for layer {layer}: {by_layer[layer]} and "
                f"{place}; name the folders of those to export in place of the run"
            )
        by_layer[layer] = place
    return by_layer


def _layer(place: str, sites: tuple[str, str], provenance: Mapping[str, Any], model_type: str) -> int:
    """Find the layer whose MLP is between the sites that a transcoder reads and predicts, or refuse it."""
    reads, predicts = (hook_of(site, model_type) for site in sites)
    target = sites[1]
    if (
        reads
        and predicts
        and (reads.kind, predicts.kind) == ("mlp_in", "mlp_out")
        and reads.layer == predicts.layer
    ):
        if (role := role_of(target, provenance)) and not denotes(predicts, role):
            raise ConfigError(
                f"{NAME} has transcoders that predict what an MLP adds to the residual stream as it is; got "
                f"{place}, of {target}, which is {role.described}"
            )
        return reads.layer
    block = BLOCKS.get(model_type)
    if block is None:
        raise ConfigError(
            f"{NAME} needs the place of a model's MLPs in TransformerLens' terms, which is not known of "
            f"{model_type}; known are {', '.join(BLOCKS)}"
        )
    path = block.path.format(0)
    raise ConfigError(
        f"{NAME} has transcoders of MLPs, in {model_type} from {path}.{block.mlp_in} to "
        f"{path}.{block.mlp_out} and so on; got {place}, from {sites[0] or None} to {target or None}"
    )


def _check_all_there(by_layer: dict[int, Any], n_layers: int) -> None:
    """Refuse a set that lacks layers."""
    if missing := sorted(set(range(n_layers)) - by_layer.keys()):
        raise ConfigError(
            f"a set must have a transcoder for each of the model's {n_layers} layers, got none for "
            f"{', '.join(map(str, missing))}; train them and name their folders too"
        )


def _output(target: str) -> str:
    """Name the hook of what is predicted. Where no norm follows the MLP the two names mean the same, and
    circuit-tracer knows the MLP's own of more models."""
    return "mlp.hook_out" if target.endswith(".mlp") else Hook(0, "mlp_out").in_block
