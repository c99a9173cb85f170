"""`saemill show` and `saemill verify`: what a folder holds, and whether it is whole."""

import re
import shlex
from pathlib import Path

from saemill.common import hub
from saemill.common.addresses import address_of, named
from saemill.common.errors import StoreError
from saemill.common.log import counted
from saemill.common.sae import formats
from saemill.common.sae.formats.circuit_tracer import layers_in
from saemill.common.sae.parts import place
from saemill.common.stores import assessments, diffs, mirror, runs, tokens
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.passages import PassageStore
from saemill.common.stores.site_records import (
    EMBEDDINGS,
    IN_MEMORY,
    REPAIR,
    known_settings,
    site_path,
    sites_in,
)
from saemill.common.stores.tokens import TokenStore
from saemill.common.stores.word_labels import WordLabels
from saemill.verify import activations_problems, diff_problems, run_problems, tokens_problems

SHARD = re.compile(r"\S+ shard \d+: ")
"""What a line on a damaged shard begins with."""
MOST_NAMES = 20
"""Most labels of a column that are named in a line."""


def describe(path: Path) -> str:
    """Describe a token store, an activation store, a run, an SAE or a diff in a few lines.

    Raises:
        StoreError: the folder is none of them, or is damaged.
    """
    kind = kind_of(path)
    if kind == "run":
        return _describe_run(path)
    if kind == "SAE":
        return _describe_sae(path)
    if kind == "diff":
        return _describe_diff(path)
    if kind == "activation store":
        return _describe_activations(ActivationStore(path))
    if kind == "token store":
        return _describe_tokens(TokenStore(path))
    raise StoreError(f"{path} is no token store, activation store, run, SAE or diff{hint(path)}")


def kind_of(path: Path) -> str | None:
    """Name the kind of a folder that saemill made, or of a transcoder's file in a set; None for a file or
    folder within a store or run, and for anything else."""
    hub.check_local(path)
    if address_of(path):  # nothing but stores is read there
        folder, _ = mirror.opened(path)
        return "token store" if (folder / mirror.TOKENS).exists() else "activation store"
    if runs.is_run(path):
        return "run"
    names = {file.name for file in path.glob("*")}
    if diffs.FILE in names:
        return "diff"
    if formats.is_sae(path):
        return "SAE"
    if names & {"commits", "passages.parquet"}:
        return None
    if names & {"manifest.json", "segments.parquet", "documents.parquet"}:
        return "token store"
    return "activation store" if "zarr.json" in names or sites_in(path) else None


def hint(path: Path) -> str:
    """Describe what a wrong path is, and which path may be meant."""
    if not path.exists():
        return ": there is no such folder"
    if not path.is_dir():
        return ": it is a file; name a folder"
    if (path / "commits").exists():
        return f": it is one site of {path.parent}; name that"
    if (path / "passages.parquet").exists():
        return f": these are the passages of {path.parent}; name that"
    inside = sorted(str(folder) for folder in path.iterdir() if folder.is_dir() and kind_of(folder))
    if inside := inside or [str(file) for file in layers_in(path)]:
        return f"; did you mean {', '.join(inside[:8])}{', …' if len(inside) > 8 else ''}?"
    return ""


def _describe_tokens(store: TokenStore) -> str:
    manifest = store.manifest
    return "\n".join(
        [
            f"token store {store.named}",
            f"  {store.n_tokens:,} tokens: {counted(store.n_rows, 'row')} of {store.ctx_len}, "
            f"{manifest.n_held_out_rows:,} of them held out",
            f"  {counted(manifest.n_documents, 'document')} of {manifest.source.name}",
            *_sources_of(store),
            *_roles_of(store),
            *map(_labels_of, manifest.labels),
            f"  tokenizer {store.tokenizer.name} ({store.tokenizer.vocab_size:,} ids)",
            f"  fingerprint {store.fingerprint}",
        ]
    )


def _sources_of(store: TokenStore) -> list[str]:
    """Tell how many tokens are of each source, a line each, of a store of several."""
    return [
        f"    {name}: {n:,} tokens ({100 * n / store.n_tokens:.2f}%)"
        for name, n in store.source_tokens.items()
    ]


def _roles_of(store: TokenStore) -> list[str]:
    """Tell how many tokens are of each role, in a line, of a store of chats."""
    if not store.manifest.roles:
        return []
    n_tokens = store.roles.n_tokens(len(store.manifest.roles))
    told = [f"{name} {n:,}" for name, n in zip(("none", *store.manifest.roles), n_tokens, strict=True)]
    return [f"  tokens by the role of their message: {', '.join(told)}"]


def _labels_of(labels: WordLabels) -> str:
    """Name the labels that a column gives to words, in a line."""
    names, more = labels.names[:MOST_NAMES], len(labels.names) - MOST_NAMES
    rest = f" and {more:,} more" if more > 0 else ""
    return f"  words are labelled by {labels.column}: {', '.join(names)}{rest}"


def _describe_activations(store: ActivationStore) -> str:
    unit = store.text.unit
    lines = [f"activation store {store.named}"]
    lines += _of_passages(store, store.text) if isinstance(store.text, PassageStore) else _of_tokens(store)
    lines.append(f"  fingerprint {store.fingerprint}")
    for name in store.sites:
        site = store.array(name)
        statistics = site.statistics
        lines.append(
            f"  {name}: D {site.width}, {site.n_bytes / 2**20:,.1f} MiB, "
            f"mean squared norm {statistics.mean_squared_norm:.4g}, "
            f"variance {statistics.total_variance:.4g} over {statistics.n_tokens:,} training {unit}s"
            + (f"; {role.described}" if (role := site.role) else "")
        )
    for name, n_commits in store.unfinished.items():
        if not (folder := site_path(store.path, name)).is_dir():
            raise StoreError(f"{folder}: folder is missing. {REPAIR}")
        consumed = store.consumed
        removed = consumed.shards if consumed and name in consumed.sites else ()
        gone = f", of which {len(removed):,} were removed when all runs had read them" if removed else ""
        lines.append(f"  {name}: unfinished, {n_commits} of {store.n_shards} shards{gone}")
    return "\n".join(lines)


def _of_tokens(store: ActivationStore) -> list[str]:
    settings = store.settings
    return [
        f"  model {settings.model}, computed in {settings.model_dtype}, stored as {settings.stored_as}",
        f"  {store.n_tokens:,} tokens: {counted(store.tokens.n_rows, 'row')} of {store.ctx_len}, "
        f"{counted(store.n_shards, 'shard')} of {store.shard_tokens:,} tokens per site",
    ]


def _of_passages(store: ActivationStore, passages: PassageStore) -> list[str]:
    manifest, model = passages.manifest, store.settings.model
    form = f"stored as {store.settings.stored_as}"
    form = f"normalized, {form}" if manifest.settings.normalize else form
    return [
        f"  embeddings of {manifest.source.name}" + (f" by {model}" if model else "") + f", {form}",
        f"  {counted(passages.n_rows, 'passage')}, {manifest.n_held_out_rows:,} of them held out; "
        f"{counted(store.n_shards, 'shard')} of {store.shard_tokens:,}",
    ]


def _describe_run(path: Path) -> str:
    if not runs.is_finished(path):
        state = "a checkpoint to go on from" if (path / runs.CHECKPOINT).exists() else "no checkpoint yet"
        return "\n".join([f"run {path}: unfinished, {state}", *_points(path)])
    finished = runs.finished(path)
    trained = (
        f"{finished.tokens:,} tokens in {counted(finished.steps, 'step')}, {finished.seconds:,.0f} s"
        if not finished.imported
        else f"trained elsewhere, on {finished.acts}"
    )
    lines = [f"run {path}: {counted(len(finished.variants), 'SAE')}, {trained}"]
    verdicts = {}
    if (path / assessments.FILE).exists():
        assessment = assessments.read(path)
        entries = [*assessment["variants"], *assessment["controls"]]
        verdicts = {entry["name"]: entry["verdict"] for entry in entries}
    notes = {name: f"diverged at step {step:,}" for name, step in finished.diverged.items()}
    notes |= {name: f"stopped by halving at step {look.step:,}" for name, look in finished.stopped.items()}
    lines += [f"  {n}  {notes.get(n) or verdicts.get(n, 'not assessed')}" for n in finished.variants]
    return "\n".join([*lines, *_points(path)])


def _points(path: Path) -> list[str]:
    """Tell which SAEs a run kept on the way, in a line, if it kept any."""
    steps = [f"{int(point.name):,}" for point in runs.points(path)]
    return [f"  kept on the way, in {runs.STEPS}/: after {', '.join(steps)} steps"] if steps else []


def _describe_sae(path: Path) -> str:
    sae = formats.load(path)
    config = sae.config
    provenance = config.provenance
    width = f"{config.d_in:,}" + ("" if config.d_out is None else f" → {config.d_out:,}")
    of = " of ".join(part for part in (place(provenance), provenance.get("model")) if part)
    return f"SAE {path}: {config.described}, D {width}" + (f", {of}" if of else "")


def _describe_diff(path: Path) -> str:
    found = diffs.read(path)
    sides = " and ".join(f"{side.name} (FVU {side.fvu:.3f})" for side in found.sides)
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in found.kinds.items() if n)
    return "\n".join(
        [
            f"diff {path}: {sides}",
            f"  {found.described}: {kinds}",
            f"  measured on {counted(found.n_tokens, f'held-out {found.unit}')}",
        ]
    )


def problems(path: Path) -> list[str]:
    """List each bad file of a store, a run, an SAE or a diff, by size and hash, with the advice.

    Raises:
        StoreError: the folder is none of them.
    """
    kind = kind_of(path)
    if kind == "run":
        return run_problems(path)
    if kind == "SAE":
        return formats.problems(path)
    if kind == "token store":
        lines, repair = tokens_problems(path), tokens.REPAIR
    elif kind == "diff":
        return [*run_problems(path / diffs.RUN), *diff_problems(path)]
    elif kind == "activation store":
        lines = activations_problems(path)
        repair = _repair(path, lines)
    else:
        raise StoreError(f"{path} is no token store, activation store, run, SAE or diff{hint(path)}")
    if address := address_of(path):  # of which the files here are a mirror
        lines = [line.replace(str(mirror.folder_of(address)), address) for line in lines]
    return [*lines, repair] if lines else []


def _repair(path: Path, lines: list[str]) -> str:
    """Choose the repair of an activation store. Where nothing but shards is damaged, those that a model
    computed are computed again."""
    settings = known_settings(mirror.opened(path)[0])
    if settings is None or settings.kind == EMBEDDINGS or settings.converted_from:
        return REPAIR
    if not all(SHARD.match(line) for line in lines):
        return REPAIR
    name = settings.model or ""
    is_lost = name.endswith(IN_MEMORY) or (Path(name).is_absolute() and not Path(name).exists())
    verify = f"saemill verify {shlex.quote(named(path))} --repair{' --model FOLDER' if is_lost else ''}"
    first = "`cache_activations` with the model" if name.endswith(IN_MEMORY) else "`saemill cache`"
    return (
        f"`{verify}` computes the bad shards again, as they were; {first}, called as at first, does so too."
    )
