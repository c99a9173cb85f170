"""`saemill show` and `saemill verify`: what a folder holds, and whether it is whole."""

from pathlib import Path

from saemill.common import durable
from saemill.common.activations import REPAIR, ActivationStore
from saemill.common.errors import StoreError
from saemill.common.tokens import TokenStore


def describe(path: Path) -> str:
    """A few lines on a token store, an activation store or a run.

    Raises:
        StoreError: the folder is none of them, or is damaged.
    """
    if (path / "identity.json").exists():
        return _describe_run(path)
    if (path / "tokens" / "manifest.json").exists():
        return _describe_activations(ActivationStore(path))
    if (path / "manifest.json").exists():
        return _describe_tokens(TokenStore(path))
    raise StoreError(f"{path} is no token store, activation store or run that saemill made")


def _describe_tokens(store: TokenStore) -> str:
    manifest = store.manifest
    return "\n".join(
        [
            f"token store {store.path}",
            f"  {store.n_tokens:,} tokens: {store.n_rows:,} rows of {store.ctx_len}, "
            f"{manifest['n_held_out_rows']:,} of them held out",
            f"  {manifest['n_documents']:,} documents of {manifest['source']['name']}",
            f"  tokenizer {store.tokenizer.name} ({store.tokenizer.vocab_size:,} ids)",
            f"  fingerprint {store.fingerprint}",
        ]
    )


def _describe_activations(store: ActivationStore) -> str:
    settings = store.settings
    lines = [
        f"activation store {store.path}",
        f"  model {settings['model']}, computed in {settings['model_dtype']}, stored as {settings['dtype']}",
        f"  {store.n_tokens:,} tokens: {store.tokens.n_rows:,} rows of {store.ctx_len}, "
        f"{store.n_shards} shards of {store.shard_tokens:,} tokens per site",
        f"  fingerprint {store.fingerprint}",
    ]
    for name in store.sites:
        site = store.site(name)
        statistics = site.statistics
        lines.append(
            f"  {name}: D {site.width}, {site.array.n_shards * site.array.shard_bytes / 2**20:,.1f} MiB, "
            f"mean squared norm {statistics.mean_squared_norm:.4g}, "
            f"variance {statistics.total_variance:.4g} over {statistics.n_tokens:,} training tokens"
        )
    for name, n_commits in _unfinished(store):
        lines.append(f"  {name}: unfinished, {n_commits} of {store.n_shards} shards")
    return "\n".join(lines)


def _unfinished(store: ActivationStore) -> list[tuple[str, int]]:
    folders = sorted(file.parent for file in store.path.glob("*/zarr.json") if file.parent.name != "tokens")
    return [
        (folder.name, len(list(folder.glob("commits/*.json"))))
        for folder in folders
        if folder.name not in store.sites
    ]


def _describe_run(path: Path) -> str:
    if not (path / "finished.json").exists():
        state = "a checkpoint to go on from" if (path / "checkpoint.pt").exists() else "no checkpoint yet"
        return f"run {path}: unfinished, {state}"
    finished = durable.read_json(path / "finished.json")
    lines = [
        f"run {path}: {len(finished['variants'])} SAEs, {finished['tokens']:,} tokens in "
        f"{finished['steps']:,} steps, {finished['seconds']:,.0f} s"
    ]
    verdicts = {}
    if (path / "final_assessment.json").exists():
        assessment = durable.read_json(path / "final_assessment.json")
        verdicts = {entry["name"]: entry["verdict"] for entry in assessment["variants"]}
    for name in finished["variants"]:
        note = f"diverged at step {finished['diverged'][name]}" if name in finished["diverged"] else ""
        lines.append(f"  {name}  {note or verdicts.get(name, 'not assessed')}")
    return "\n".join(lines)


def problems(path: Path) -> list[str]:
    """Each bad file of a token store or an activation store, by size and hash.

    Raises:
        StoreError: the folder is neither.
    """
    if not (path / "tokens" / "manifest.json").exists():
        return _token_problems(path)
    found = _token_problems(path / "tokens")
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


def _token_problems(path: Path) -> list[str]:
    if not (path / "manifest.json").exists():
        raise StoreError(f"{path} is no finished token store or activation store")
    entries = durable.read_json(path / "manifest.json")["files"]
    checked = ((e["path"], _file_problem(path / e["path"], e["bytes"], e["xxh3"])) for e in entries)
    return [f"{path / name}: {problem}" for name, problem in checked if problem]


def _file_problem(file: Path, n_bytes: int, xxh3: str) -> str | None:
    if not file.is_file():
        return "file is missing"
    if file.stat().st_size != n_bytes:
        return f"file has {file.stat().st_size:,} bytes, expected {n_bytes:,}"
    return None if durable.hash_file(file) == xxh3 else "content differs from its hash"
