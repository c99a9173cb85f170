"""How far each stage is, by what it has written; SLURM is not asked."""

import json
from pathlib import Path

from saemill.assess.config import AssessConfig
from saemill.common import config as settings
from saemill.common.addresses import address_of, is_there
from saemill.common.errors import SaemillError, StoreError
from saemill.common.log import counted
from saemill.common.stores import assessments, runs
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.site_array import SiteArray
from saemill.common.stores.tokens import TokenStore
from saemill.slurm.pipeline import Pipeline
from saemill.train.config import TrainConfig
from saemill.train.sites import with_sites


def by_stage(folder: Path, run: Path) -> dict[str, list[str]]:
    """Write a few lines per stage, in the pipeline's order.

    Args:
        folder: of the run's jobs; its config.yaml names the stages and their outputs.
        run: the run, which names them where there were no jobs.

    Raises:
        StoreError: nothing is known of such a run.
    """
    if (folder / "config.yaml").exists():
        configs = Pipeline.read(folder / "config.yaml").stages
        tokens, acts = (configs[s].out if s in configs else None for s in ("tokenize", "cache"))
    elif (run / runs.CONFIG).exists():
        configs = {
            "train": settings.resolve(TrainConfig, "train", {"out": run}, run / runs.CONFIG),
            "assess": AssessConfig(run=run),
        }
        acts = Path(runs.finished(run).acts) if runs.is_finished(run) else configs["train"].acts
        tokens = None if address_of(acts) else acts / "tokens"
    elif runs.is_finished(run):
        raise StoreError(f"{run} was imported, so nothing of it runs; `saemill show {run}` tells of it")
    else:
        raise StoreError(
            f"{run} is no run of `saemill train`, and {folder} holds no jobs of `saemill submit`; name the "
            "run's folder (`saemill show` tells of stores)"
        )
    lines_by_stage = {
        "tokenize": [_tokenized(tokens)] if tokens else [],
        "cache": _cached(acts) if acts else [],
        "train": [_trained(configs["train"])] if "train" in configs else [],
        "assess": [_assessed(configs["assess"])] if "assess" in configs else [],
    }
    return {stage: lines for stage, lines in lines_by_stage.items() if lines}


def _tokenized(out: Path) -> str:
    if (out / "manifest.json").exists():
        return f"{TokenStore(out).n_rows:,} rows"
    # Where folders cannot be locked, every process that tokenizes has one of its own.
    partial = [len(list(folder.glob("tokens/c/*/0"))) for folder in out.parent.glob(f"{out.name}.partial*")]
    return f"{counted(max(partial), 'full shard')} so far" if partial else f"nothing in {out}"


def _cached(out: Path) -> list[str]:
    try:
        store = ActivationStore(out)
    except SaemillError as error:
        return [f"nothing in {out}" if address_of(out) is None else str(error)]
    n_done = dict.fromkeys(store.sites, store.n_shards) | store.unfinished
    lines = [f"{name}: {n_done[name]:,} of {store.n_shards:,} shards" for name in sorted(n_done)]
    return lines or [f"no site in {out}"]


def _trained(config: TrainConfig) -> str:
    if runs.is_finished(config.out):
        return f"finished, {runs.finished(config.out).steps:,} steps"
    step, n_steps = _last_step(config.out / runs.METRICS), _n_steps(config)
    if step is None:
        begun = (config.out / runs.IDENTITY).exists()
        return "no step logged yet" if begun else f"nothing in {config.out}"
    return f"step {step:,}" + (f" of {n_steps:,}" if n_steps else "")


def _last_step(metrics: Path) -> int | None:
    """Read the step of the last whole line: a line that is being written is no JSON yet.

    Raises:
        StoreError: the line is none that was logged.
    """
    step = None
    if metrics.exists():
        with metrics.open("rb") as lines:
            for line in lines:
                if line.endswith(b"\n"):
                    step = line
    if step is None:
        return None
    try:
        return int(json.loads(step)["step"])
    except (ValueError, LookupError, TypeError) as error:
        raise StoreError(f"{metrics} is damaged: its last line is no record of a step") from error


def _n_steps(config: TrainConfig) -> int | None:
    """Count the steps of the run; None where a mask of its own, or tokens that are too long, make the epoch
    differ from the store's."""
    n_tokens = config.max_tokens
    if n_tokens is None and is_there(config.acts / "zarr.json"):
        store = ActivationStore(config.acts, config.with_acts)
        named = [store.site(name) for name in with_sites(config, store.sites).site or store.sites[:1]]
        sites = [part for site in named for part in site.parts.values()]
        mask = config.mask.positions(store.mask)
        if not any(mask != site.store.mask or _n_long(config, site) for site in sites):
            n_tokens = (config.epochs or 1) * sites[0].statistics.n_tokens
    return None if n_tokens is None else n_tokens // config.step_tokens


def _n_long(config: TrainConfig, site: SiteArray) -> int:
    """Count the rows that training leaves out at a site since they are too long, as far as norms are kept."""
    sketch, norm_over_median = site.sketch, config.mask.norm_over_median
    return sketch.n_beyond(norm_over_median * sketch.median) if sketch and norm_over_median else 0


def _assessed(config: AssessConfig) -> str:
    other = config.run if config.tokens is None else config.run / f"on-{config.tokens.name}"
    folder = config.out or other
    if not (folder / assessments.FILE).exists():
        return "not assessed"
    found = assessments.read(folder)
    others = [best["variant"] for best in found.get("best_at_other_sites", ())]
    return f"assessed, best {', '.join([found['best_variant'], *others])}"
