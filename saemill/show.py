"""`saemill show` and `saemill verify`: what a folder holds, and whether it is whole."""

from pathlib import Path

from saemill.common import assessments, durable, hub
from saemill.common.activations import EMBEDDINGS, REPAIR, TEXT_FOLDERS, ActivationStore, read_settings
from saemill.common.errors import StoreError
from saemill.common.log import counted
from saemill.common.passages import PassageStore
from saemill.common.tokens import TokenStore


def describe(path: Path) -> str:
    """A few lines on a token store, an activation store or a run.

    Raises:
        StoreError: the folder is none of them, or is damaged.
    """
    kind = kind_of(path)
    if kind == "run":
        return _describe_run(path)
    if kind == "activation store":
        return _describe_activations(ActivationStore(path))
    if kind == "token store":
        return _describe_tokens(TokenStore(path))
    raise StoreError(f"{path} is no token store, activation store or run that saemill made{hint(path)}")


def kind_of(path: Path) -> str | None:
    """What saemill made of a folder; a part of a store or run, or anything else, is None."""
    hub.check_here(path)
    if (path / "identity.json").exists():
        return "run"
    if (path / "commits").exists() or (path / "passages.parquet").exists():
        return None
    if (path / "manifest.json").exists():
        return "token store"
    return "activation store" if (path / "zarr.json").exists() else None


def hint(path: Path) -> str:
    """What a wrong path is instead, and which one may be meant."""
    if not path.exists():
        return ": there is no such folder"
    if not path.is_dir():
        return ": it is a file; name a folder"
    if (path / "commits").exists():
        return f": it is one site of {path.parent}; name that"
    if (path / "passages.parquet").exists():
        return f": these are the passages of {path.parent}; name that"
    if (path / "cfg.json").exists():
        return f": it is one SAE of {path.parent}; name that"
    inside = sorted(str(folder) for folder in path.iterdir() if folder.is_dir() and kind_of(folder))
    return f"; did you mean {', '.join(inside)}?" if inside else ""


def _describe_tokens(store: TokenStore) -> str:
    manifest = store.manifest
    return "\n".join(
        [
            f"token store {store.path}",
            f"  {store.n_tokens:,} tokens: {counted(store.n_rows, 'row')} of {store.ctx_len}, "
            f"{manifest['n_held_out_rows']:,} of them held out",
            f"  {counted(manifest['n_documents'], 'document')} of {manifest['source']['name']}",
            f"  tokenizer {store.tokenizer.name} ({store.tokenizer.vocab_size:,} ids)",
            f"  fingerprint {store.fingerprint}",
        ]
    )


def _describe_activations(store: ActivationStore) -> str:
    unit = store.text.unit
    lines = [f"activation store {store.path}"]
    lines += _of_passages(store, store.text) if isinstance(store.text, PassageStore) else _of_tokens(store)
    lines.append(f"  fingerprint {store.fingerprint}")
    for name in store.sites:
        site = store.site(name)
        statistics = site.statistics
        lines.append(
            f"  {name}: D {site.width}, {site.array.n_shards * site.array.shard_bytes / 2**20:,.1f} MiB, "
            f"mean squared norm {statistics.mean_squared_norm:.4g}, "
            f"variance {statistics.total_variance:.4g} over {statistics.n_tokens:,} training {unit}s"
        )
    for name, n_commits in _unfinished(store):
        lines.append(f"  {name}: unfinished, {n_commits} of {store.n_shards} shards")
    return "\n".join(lines)


def _of_tokens(store: ActivationStore) -> list[str]:
    settings = store.settings
    return [
        f"  model {settings['model']}, computed in {settings['model_dtype']}, stored as {settings['dtype']}",
        f"  {store.n_tokens:,} tokens: {counted(store.tokens.n_rows, 'row')} of {store.ctx_len}, "
        f"{counted(store.n_shards, 'shard')} of {store.shard_tokens:,} tokens per site",
    ]


def _of_passages(store: ActivationStore, passages: PassageStore) -> list[str]:
    manifest, model = passages.manifest, store.settings["model"]
    form = f"stored as {store.settings['dtype']}"
    form = f"normalized, {form}" if manifest["settings"]["normalize"] else form
    return [
        f"  embeddings of {manifest['source']['name']}" + (f" by {model}" if model else "") + f", {form}",
        f"  {counted(passages.n_rows, 'passage')}, {manifest['n_held_out_rows']:,} of them held out; "
        f"{counted(store.n_shards, 'shard')} of {store.shard_tokens:,}",
    ]


def _unfinished(store: ActivationStore) -> list[tuple[str, int]]:
    folders = sorted(
        file.parent for file in store.path.glob("*/zarr.json") if file.parent.name not in TEXT_FOLDERS
    )
    return [
        (folder.name, len(list(folder.glob("commits/*.json"))))
        for folder in folders
        if folder.name not in store.sites
    ]


def _describe_run(path: Path) -> str:
    if not (path / "finished.json").exists():
        state = "a checkpoint to go on from" if (path / "checkpoint.json").exists() else "no checkpoint yet"
        return f"run {path}: unfinished, {state}"
    finished = durable.read_json(path / "finished.json")
    lines = [
        f"run {path}: {counted(len(finished['variants']), 'SAE')}, {finished['tokens']:,} tokens in "
        f"{counted(finished['steps'], 'step')}, {finished['seconds']:,.0f} s"
    ]
    verdicts = {}
    if (path / "final_assessment.json").exists():
        assessment = assessments.read(path)
        verdicts = {entry["name"]: entry["verdict"] for entry in assessment["variants"]}
    notes = {name: f"diverged at step {step:,}" for name, step in finished["diverged"].items()}
    notes |= {n: f"stopped by halving at step {look['step']:,}" for n, look in finished["stopped"].items()}
    lines += [f"  {n}  {notes.get(n) or verdicts.get(n, 'not assessed')}" for n in finished["variants"]]
    return "\n".join(lines)


def problems(path: Path) -> list[str]:
    """Each bad file of a token store or an activation store, by size and hash.

    Raises:
        StoreError: the folder is neither.
    """
    kind = kind_of(path)
    if kind == "token store":
        return _text_problems(path)
    if kind != "activation store":
        raise StoreError(f"{path} is no finished token store or activation store{hint(path)}")
    holds_embeddings = read_settings(path).get("kind") == EMBEDDINGS
    found = _text_problems(path / ("passages" if holds_embeddings else "tokens"))
    if found:
        return [*found, REPAIR]
    store = ActivationStore(path)
    for name in store.sites:
        if not (path / name / "zarr.json").is_file():
            found.append(f"{name}/zarr.json: file is missing")
        commits = durable.read_json(path / name / "manifest.json")["shards"]
        for shard, commit in enumerate(commits):
            file = path / name / "c" / str(shard) / "0"
            if problem := _file_problem(file, commit["bytes"], commit["xxh3"]):
                found.append(f"{name} shard {shard}: {problem}")
    found += [f"{name}: unfinished, {n} of {store.n_shards} shards" for name, n in _unfinished(store)]
    return [*found, REPAIR] if found else []


def _text_problems(path: Path) -> list[str]:
    if not (path / "manifest.json").exists():
        return [f"{path / 'manifest.json'}: file is missing"]
    entries = durable.read_json(path / "manifest.json")["files"]
    checked = ((e["path"], _file_problem(path / e["path"], e["bytes"], e["xxh3"])) for e in entries)
    found = [f"{path / name}: {problem}" for name, problem in checked if problem]
    if not found and (path / "tokens").is_dir():
        try:
            TokenStore(path)  # which misses shards that the manifest does not list either
        except StoreError as error:
            found = [str(error)]
    return found


def _file_problem(file: Path, n_bytes: int, xxh3: str) -> str | None:
    if not file.is_file():
        return "file is missing"
    if file.stat().st_size != n_bytes:
        return f"file has {file.stat().st_size:,} bytes, expected {n_bytes:,}"
    return None if durable.hash_file(file) == xxh3 else "content differs from its hash"
