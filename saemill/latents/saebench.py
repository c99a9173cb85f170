"""Results in the files of SAEBench's core evaluation (0.6.0) and SAELens' evals (6.54), from an assessment.

Their figures are saemill's where both mean the same (`IN_ASSESSMENT`), with the definitions of
docs/assessment.md; `figures.py` computes those that an assessment does not have. SAEBench's schema wants
every number, so a file is written only where all are known: what stands for "not measured" in its own files,
−1, is written nowhere.
"""

import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saemill.common import durable
from saemill.common.errors import ConfigError, StoreError
from saemill.common.sae.formats.hooks import layer_of
from saemill.common.sae.sae import Sae
from saemill.common.stores import assessments
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.assessments import Assessment, Entry, Figure
from saemill.latents import figures
from saemill.latents.figures import Sums
from saemill.latents.inputs import Opened
from saemill.latents.rows import Rows

IN_ASSESSMENT = {
    "model_behavior_preservation": {"kl_div_with_ablation": "kl_zero", "kl_div_with_sae": "kl"},
    "model_performance_preservation": {
        "ce_loss_score": "loss_recovered",
        "ce_loss_with_ablation": "ce_zero",
        "ce_loss_with_sae": "ce_spliced",
        "ce_loss_without_sae": "ce_clean",
    },
    "reconstruction_quality": {
        "explained_variance": "explained_variance",
        "mse": "mse",
        "cossim": "cosine",
    },
    "shrinkage": {"l2_ratio": "norm_ratio"},
    "sparsity": {"l0": "l0"},
}
"""Figures of an assessment by their names, in their groups."""
DEFINITIONS = {
    "explained_variance": "1 - sum |x - xhat|^2 / sum |x - mean|^2 over all tokens; SAEBench 0.6.0 prints "
    "another number, which grows with the activations' mean",
    "explained_variance_legacy": "mean over tokens of 1 - |x - xhat|^2 / |x - mean|^2, with the mean of all "
    "tokens, where SAEBench and SAELens take that of a batch",
    "mse": "mean over tokens of |x - xhat|^2, summed over dimensions, as SAELens; SAEBench 0.6.0 divides it "
    "by the tokens of a batch once more",
    "relative_reconstruction_bias": "mean |xhat|^2 / mean x . xhat over all tokens",
    "kl_div_score": "1 - kl_div_with_sae / kl_div_with_ablation; ablation replaces activations by zeros",
    "ce_loss_score": "(ablation - sae) / (ablation - clean), in nats per token",
    "tokens": "held-out documents; masked positions keep the model's own activations and are not counted",
}
"""What is meant where their tools differ among each other, or from saemill."""


@dataclass(frozen=True, slots=True)
class Result:
    """What both files are made of, for one SAE."""

    release: str
    name: str
    sae: Sae
    store: ActivationStore
    assessment: Assessment
    entry: Entry
    metrics: dict[str, dict[str, float]]
    """Figures by SAELens' groups and names."""
    misc: dict[str, float]
    """SAEBench's further figures."""
    latents: dict[str, NDArray[np.float64]]
    """Figures of each latent, by SAEBench's names, [F]; NaN where a latent has none."""
    made_at_ms: int


def check(opened: Opened) -> Assessment:
    """Read the assessment of a run, and refuse one that lacks what SAEBench's schema needs.

    Raises:
        StoreError: there is none, or it is of other SAEs or damaged.
        ConfigError: losses were not measured, or it is of other tokens.
    """
    if not (opened.run / assessments.FILE).exists():
        raise StoreError(
            f"{opened.run} has no {assessments.FILE}, whose figures are written; run "
            f"`saemill assess {opened.run}` first, with the model"
        )
    assessment = assessments.load(opened.run)
    if bad := assessments.problems(opened.run):
        raise StoreError("\n".join([*bad, assessments.REPAIR]))
    if assessment.settings.get("tokens") is not None:
        raise ConfigError(
            f"{opened.run / assessments.FILE} is of other tokens than those that were cached; run "
            f"`saemill assess {opened.run}` without --tokens"
        )
    entries = {entry.name: entry for entry in assessment.variants}
    for name in opened.saes:
        _in_assessment(entries[name])
    return assessment


def _in_assessment(entry: Entry) -> dict[str, dict[str, float]]:
    """Read the figures that an assessment has of an SAE, in SAELens' groups.

    Raises:
        ConfigError: some were not measured, which SAEBench's schema has as numbers.
    """
    figures = {
        theirs: _figure(entry, theirs, ours)
        for names in IN_ASSESSMENT.values()
        for theirs, ours in names.items()
    }
    missing = {name: figure for name, figure in figures.items() if not isinstance(figure.value, float)}
    if missing:
        reasons = dict.fromkeys(str(figure.reason) for figure in missing.values())
        raise ConfigError(
            f"SAEBench's file has a number for {', '.join(missing)}, and {entry.name} has none: "
            f"{'; '.join(reasons)}. Nothing is written; `saemill assess` with the model measures losses"
        )
    return {group: {name: _value(figures[name]) for name in names} for group, names in IN_ASSESSMENT.items()}


def _figure(entry: Entry, theirs: str, ours: str) -> Figure:
    """Find a figure of an SAE.

    Raises:
        ConfigError: the assessment does not know it.
    """
    figure = entry.metrics.get(ours)
    if figure is None:
        raise ConfigError(
            f"the assessment is of an earlier saemill: it has no {ours}, which SAEBench needs as {theirs}; "
            "run `saemill assess` again"
        )
    return figure


def _value(figure: Figure) -> float:
    assert isinstance(figure.value, float)
    return figure.value


def measure(opened: Opened, name: str, release: str, assessment: Assessment) -> Result:
    """Compute what an assessment does not have of one SAE.

    Raises:
        StoreError: the store has other tokens than were assessed.
        ConfigError: a figure that SAEBench needs is no number.
    """
    sae, store = opened.saes[name], opened.store
    rows = Rows(store, opened.mask, store.n_tokens, None, held_out=True)
    sums = figures.measure(sae, rows, int(assessment.settings["max_tokens"]))
    if sums.n_tokens != assessment.data.n_tokens:
        raise StoreError(
            f"{opened.run / assessments.FILE} is of {assessment.data.n_tokens:,} tokens, and {store.path} "
            f"has {sums.n_tokens:,} of them; run `saemill assess {opened.run}` again"
        )
    (entry,) = (each for each in assessment.variants if each.name == name)
    density_F = sums.fired_F / sums.n_tokens
    with np.errstate(invalid="ignore"):
        per_row_F = sums.fired_F / sums.rows_F
    of_weights = figures.of_weights(sae)
    cosines = {
        f"average_{key}": float(np.mean(of_weights[key]))
        for key in ("max_encoder_cosine_sim", "max_decoder_cosine_sim")
    }
    return Result(
        release=release, name=name, sae=sae, store=store, assessment=assessment, entry=entry,
        metrics=_metrics(entry, sums, sae.config.d_in, assessment),
        misc=figures.of_densities(density_F) | cosines,
        latents={"feature_density": density_F, "consistent_activation_heuristic": per_row_F} | of_weights,
        made_at_ms=int((opened.run / assessments.FILE).stat().st_mtime * 1000),
    )  # fmt: skip


def _metrics(entry: Entry, sums: Sums, d_in: int, assessment: Assessment) -> dict[str, dict[str, float]]:
    """Bring all figures together in SAELens' groups."""
    groups = _in_assessment(entry)
    for group, content in figures.scalars(sums).items():
        groups[group] |= content
    kl = groups["model_behavior_preservation"]
    if not kl["kl_div_with_ablation"] > 0:
        raise ConfigError(
            f"kl_div_score is no number: zeros in place of the activations at {entry.site} change nothing "
            "that the model predicts"
        )
    kl["kl_div_score"] = 1 - kl["kl_div_with_sae"] / kl["kl_div_with_ablation"]
    groups["reconstruction_quality"]["mse"] *= d_in
    groups["token_stats"] = {
        "total_tokens_eval_reconstruction": assessment.data.n_tokens_with_losses,
        "total_tokens_eval_sparsity_variance": assessment.data.n_tokens,
    }
    return groups


def write(result: Result, folder: Path) -> dict[str, Any]:
    """Write SAEBench's file of one SAE.

    Returns: what SAELens' file holds of it.
    """
    name = f"{result.release}_{result.name}_eval_results.json".replace("/", "_")
    durable.write_json(folder / "core" / name, _core(result))
    return _saelens(result)


def _core(result: Result) -> dict[str, Any]:
    """Make SAEBench's file, in its order."""
    never_fired = np.flatnonzero(result.latents["feature_density"] == 0)
    return {
        "eval_type_id": "core",
        "eval_config": _settings(result) | {
            "model_name": str(result.store.settings.model),
            "llm_dtype": str(result.store.settings.model_dtype),
            "exclude_special_tokens_from_reconstruction": bool(result.assessment.data.mask["special_tokens"]),
            "verbose": False,
        },
        "eval_id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{result.assessment.of} {result.name}")),
        "datetime_epoch_millis": result.made_at_ms,
        "eval_result_metrics": result.metrics | {"misc_metrics": result.misc},
        "eval_result_details": _details(result.latents),
        "sae_bench_commit_hash": f"none: written by saemill {version('saemill')}",
        "sae_lens_id": result.name,
        "sae_lens_release_id": result.release,
        "sae_lens_version": None,
        "sae_cfg_dict": _cfg(result),
        "eval_result_unstructured": {
            "saemill": {
                "version": version("saemill"),
                "figures": {key: each.model_dump(mode="json") for key, each in result.entry.metrics.items()},
                "verdict": result.entry.verdict,
                "definitions": DEFINITIONS,
                "data": result.assessment.data.model_dump(mode="json"),
                "never_fired": never_fired.tolist(),
            }
        },
    }  # fmt: skip


def _saelens(result: Result) -> dict[str, Any]:
    """Make the entry of an SAE in SAELens' `all_eval_results.json`."""
    names = (
        *("feature_density", "consistent_activation_heuristic", "encoder_norm"),
        *("encoder_decoder_cosine_sim", "encoder_bias"),
    )
    about = {"library_version": f"none: written by saemill {version('saemill')}", "git_hash": "none"}
    return {
        "unique_id": f"{result.release}-{result.name}",
        "sae_set": result.release,
        "sae_id": result.name,
        "eval_cfg": _settings(result) | about,
        "metrics": result.metrics,
        "feature_metrics": {name: _numbers(result.latents[name]) for name in names},
        "sae_cfg": _cfg(result),
    }


def _settings(result: Result) -> dict[str, Any]:
    """Describe what was evaluated on in the terms that both tools share."""
    rows_at_once = int(result.assessment.settings["batch_size"])
    batch = rows_at_once * result.store.ctx_len
    stats = result.metrics["token_stats"]
    n_losses = stats["total_tokens_eval_reconstruction"]
    return {
        "dataset": result.store.tokens.manifest.source.name,
        "context_size": result.store.ctx_len,
        "batch_size_prompts": rows_at_once,
        "n_eval_reconstruction_batches": math.ceil(n_losses / batch),
        "n_eval_sparsity_variance_batches": math.ceil(stats["total_tokens_eval_sparsity_variance"] / batch),
        **{
            f"compute_{what}": True
            for what in (
                *("kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics"),
                *("featurewise_density_statistics", "featurewise_weight_based_metrics"),
            )
        },
    }


def _cfg(result: Result) -> dict[str, Any]:
    """Describe an SAE in the terms of SAELens' configs."""
    config, settings = result.sae.config, result.store.settings
    return {
        "architecture": config.architecture,
        "d_in": config.d_in,
        "d_sae": config.num_latents,
        **({} if config.k is None else {"k": config.k}),
        "dtype": str(result.sae.W_enc.dtype).removeprefix("torch."),
        "model_name": str(settings.model),
        "hook_name": result.sae.site,
        "hook_layer": layer_of(str(result.sae.site)),
        "context_size": result.store.ctx_len,
        "dataset_path": result.store.tokens.manifest.source.name,
        "prepend_bos": bool(result.store.tokens.tokenizer.prefix_ids),
    }


def _details(latents: Mapping[str, NDArray[np.float64]]) -> list[dict[str, Any]]:
    """List the figures of each latent that fired: the schema has a number for each, and one that did not fire
    has no average of tokens per row."""
    fired = np.flatnonzero(latents["feature_density"] > 0)
    columns = {name: values[fired].tolist() for name, values in latents.items()}
    return [
        {"index": index, **{name: values[at] for name, values in columns.items()}}
        for at, index in enumerate(fired.tolist())
    ]


def _numbers(values: NDArray[np.float64]) -> list[float | None]:
    """List numbers; null where there is none."""
    return [value if math.isfinite(value) else None for value in values.tolist()]
