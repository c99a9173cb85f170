"""`saemill export-latents`: what SAEs' latents do on the cached tokens, in the files of other tools."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saemill.common import durable
from saemill.common.device import choose_device
from saemill.common.errors import ConfigError
from saemill.common.log import counted, say
from saemill.common.models.sites import load_model_config
from saemill.common.models.unembedding import NoUnembeddingError, Unembedding, load_unembedding
from saemill.common.sae.formats.hooks import hook_of, layer_of
from saemill.common.sae.sae import Sae
from saemill.convert import check_new, new
from saemill.latents import delphi, saebench, saedashboard
from saemill.latents.config import MAX_TOKENS, ExportLatentsConfig
from saemill.latents.inputs import Opened, chosen_latents, open_run
from saemill.latents.rows import Rows
from saemill.latents.saedashboard import Place, Shown
from saemill.latents.vocabulary import Vocabulary

USUAL_CTX = 128
"""Tokens per row of SAEDashboard's default, and of what Neuronpedia shows."""


def run(config: ExportLatentsConfig) -> None:
    """Write the files of one format for an SAE, or for each of a run.

    Raises:
        StoreError: the run or its activations are missing, unfinished or damaged.
        ConfigError: SAEs or settings that the format has no word for, or an output in use.
        DiskError: the disk is full, or the folder may not be written to.
    """
    check_new(config.out)
    opened = open_run(config, choose_device(config.device))
    if config.format == "delphi":
        _for_delphi(config, opened)
    elif config.format == "saedashboard":
        _for_saedashboard(config, opened)
    else:
        _for_saebench(config, opened)


def _for_delphi(config: ExportLatentsConfig, opened: Opened) -> None:
    rows, latents = _rows(config, opened, config.ctx), chosen_latents(config.latents, opened.saes)
    model = config.model or str(opened.store.settings.model)
    with new(config.out) as partial:
        for name, sae in opened.saes.items():
            folder = opened.folder_of(name, partial)
            delphi.write(sae, rows, latents[name], folder, model, config.n_splits)
    _say_written(config, opened, latents, rows)


def _for_saedashboard(config: ExportLatentsConfig, opened: Opened) -> None:
    ctx_len = opened.store.ctx_len
    ctx = USUAL_CTX if config.ctx is None and ctx_len % USUAL_CTX == 0 else config.ctx
    rows, latents = _rows(config, opened, ctx), chosen_latents(config.latents, opened.saes)
    vocabulary = Vocabulary(opened.store.tokens)
    places = {name: _place(config, opened, name) for name in opened.saes}
    unembeddings = _unembeddings(config, opened)
    with new(config.out) as partial:
        for name, sae in opened.saes.items():
            shown = Shown(sae, rows, places[name], vocabulary, unembeddings[name])
            saedashboard.write(shown, latents[name], opened.folder_of(name, partial))
    _say_written(config, opened, latents, rows)


def _for_saebench(config: ExportLatentsConfig, opened: Opened) -> None:
    assessment, release = saebench.check(opened), config.release or opened.run.name
    results = [saebench.measure(opened, name, release, assessment) for name in opened.saes]
    with new(config.out) as partial:
        of_saelens = [saebench.write(result, partial) for result in results]
        durable.write_json(partial / "saelens" / "all_eval_results.json", of_saelens)
    say(
        f"{config.out}: core evaluations of {counted(len(of_saelens), 'SAE')} for SAEBench in core, and for "
        "SAELens in saelens"
    )


def _rows(config: ExportLatentsConfig, opened: Opened, ctx: int | None) -> Rows:
    max_tokens = config.max_tokens or MAX_TOKENS[config.format]
    return Rows(opened.store, opened.mask, max_tokens, ctx, config.held_out)


def _say_written(
    config: ExportLatentsConfig, opened: Opened, latents: dict[str, NDArray[np.int64]], rows: Rows
) -> None:
    for name, of_sae in latents.items():
        say(
            f"{opened.folder_of(name, config.out)}: {counted(len(of_sae), 'latent')} of {name} for "
            f"{config.format}, on {counted(rows.n_rows, 'row')} of {rows.ctx} tokens"
        )


def _place(config: ExportLatentsConfig, opened: Opened, name: str) -> Place:
    """Name an SAE as Neuronpedia does.

    Raises:
        ConfigError: its site is in no layer.
    """
    site, settings = str(opened.saes[name].site), opened.store.settings
    layer = layer_of(site)
    if layer is None:
        raise ConfigError(f"saedashboard has SAEs of a layer, by its number, got {name}, of the site {site}")
    return Place(
        model_id=Path(config.model or str(settings.model)).name,
        layer=layer,
        sae_set=config.release or opened.run.name,
        sae_id_suffix=name,
        dataset=opened.store.tokens.manifest.source.name,
    )


def _unembeddings(config: ExportLatentsConfig, opened: Opened) -> dict[str, Unembedding | None]:
    """Read the unembedding of the model, for each SAE that writes to what it reads; for others None, with a
    sentence.

    Raises:
        ConfigError: the model cannot be found.
    """
    settings, n_ids = opened.store.settings, opened.store.tokens.tokenizer.vocab_size
    model = config.model or str(settings.model)
    revision = None if config.model else settings.revision
    model_type = load_model_config(model, revision).model_type
    without = "without the tokens that latents make more probable"
    try:
        found = load_unembedding(model, revision, n_ids)
    except NoUnembeddingError as error:
        say(f"{without}: {error}")
        return dict.fromkeys(opened.saes)
    suited: dict[str, Unembedding | None] = {}
    for name, sae in opened.saes.items():
        why = _writes_elsewhere(sae, model_type, found)
        suited[name] = None if why else found
        if why:
            say(f"{name} {without}: {why}")
    return suited


def _writes_elsewhere(sae: Sae, model_type: str, unembedding: Unembedding) -> str:
    """Say why an SAE's decoder does not write to what the unembedding reads; empty where it does."""
    site, width = str(sae.target_site), unembedding.weight_VD.shape[1]
    hook = hook_of(site, model_type)
    if hook is not None and hook.kind == "mlp_in":
        return f"{site} is what an MLP takes, and no part of the residual stream"
    if sae.W_dec.shape[1] != width:
        return f"{site} is {sae.W_dec.shape[1]} wide, and the unembedding reads {width}"
    return ""
