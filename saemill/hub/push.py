"""`saemill push`: a run as a model repository, a store as a dataset repository."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import yaml

from saemill.common import durable, hub
from saemill.common.activations import ActivationStore
from saemill.common.config import nearest
from saemill.common.errors import ConfigError, StoreError
from saemill.common.formats.sparsify import WEIGHTS
from saemill.common.log import counted, say
from saemill.common.tokens import TokenStore
from saemill.hub.card import keep_metadata, model_card
from saemill.hub.names import Names, as_json
from saemill.hub.store_card import activations_card, tokens_card
from saemill.show import hint, kind_of, problems

CARD = "README.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """What a repository shall hold."""

    repo_type: str
    """model or dataset."""
    folder: Path
    as_they_are: tuple[str, ...]
    """Files below the folder that are uploaded first, as globs."""
    written: Mapping[str, bytes]
    """Path in the repository → content: the card, and what makes the rest readable. It goes last."""

    @property
    def sizes(self) -> dict[str, int]:
        """Path in the repository → bytes, of every file."""
        files = {file for pattern in self.as_they_are for file in self.folder.glob(pattern)}
        found = {str(file.relative_to(self.folder)): file.stat().st_size for file in files}
        return found | {name: len(content) for name, content in self.written.items()}


def push(
    path: Path,
    repo: str,
    *,
    variants: Sequence[str] = (),
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
) -> None:
    """Upload a run, a token store or an activation store, with a card that tells of it.

    Absolute paths in settings are uploaded as names. A push that was interrupted goes on where it was when
    it is run again: what the hub has is not sent twice.

    Args:
        path: the folder.
        repo: `user/repo`; created if it is not there.
        variants: of a run, those to upload; all by default.
        private: whether the repository is made a private one.
        revision: branch to upload to, created if it is not there; by default main.
        message: of the commit.
        dry_run: only show what would be uploaded.

    Raises:
        StoreError: the folder is nothing that saemill made, unfinished or damaged.
        ConfigError: unknown variants, or the hub refuses.
    """
    uri = hub.parse(hub.SCHEME + repo)
    if uri.path_in_repo or uri.revision or uri.type != "model":
        raise ConfigError(f"repo must be user/repo, got {repo!r}; a branch is named with --revision")
    place = f"{repo}@{quote(revision, safe='')}" if revision else repo
    upload = _plan(path, place, variants)
    if dry_run:
        say(_listing(upload, place))
        say(upload.written[CARD].decode())
        return
    _check_may_push()
    with hub.asking(repo):
        upload = _open(upload, repo, private, revision)
    if upload.repo_type == "dataset" and (found := problems(path)):
        raise StoreError("\n".join(found))
    say(f"{path} to {upload.repo_type} {place}: {_total(upload)}")
    with hub.asking(repo):
        _send(upload, repo, revision, message or f"Upload {path.absolute().name} with saemill")
    say(f"{hub.SCHEME}{'datasets/' if upload.repo_type == 'dataset' else ''}{place} is there")


def _plan(path: Path, place: str, variants: Sequence[str]) -> Upload:
    kind = kind_of(path)
    if kind == "run":
        return _run(path, place, variants)
    if kind is None:
        raise StoreError(f"{path} is no run, token store or activation store that saemill made{hint(path)}")
    if variants:
        raise ConfigError(f"--variant has no effect on the {kind} {path}; leave it out")
    return _tokens(path, place) if kind == "token store" else _activations(path, place)


def _run(path: Path, place: str, chosen: Sequence[str]) -> Upload:
    """A finished run: its SAEs, how they were made and what they were found to be."""
    if not (path / "finished.json").exists():
        raise StoreError(f"the run {path} is unfinished; finish it with `saemill train`")
    finished = durable.read_json(path / "finished.json")
    for name in chosen:
        if name not in finished["variants"]:
            raise ConfigError(f"{path} has no variant {name!r}; {nearest(name, finished['variants'])}")
    kept = [name for name in finished["variants"] if not chosen or name in chosen]
    for name in kept:
        for file in ("cfg.json", WEIGHTS):
            if not (path / name / file).is_file():
                raise StoreError(f"{path / name / file} is missing; leave the variant out with --variant")
    saes = {name: durable.read_json(path / name / "cfg.json") for name in kept}
    finished |= {
        key: {n: finished[key][n] for n in finished[key] if n in kept} for key in ("diverged", "stopped")
    }
    names = Names(yaml.safe_load((path / "config.yaml").read_bytes()), finished, saes)
    named = ["config.yaml", "identity.json", "final_assessment.json", "report.html"]
    written = {name: names.content(path / name) for name in named if (path / name).is_file()}
    written |= {f"{name}/cfg.json": names.content(path / name / "cfg.json") for name in kept}
    finished = names.of(finished | {"variants": kept})
    assessed = path / "final_assessment.json"
    card = model_card(
        place,
        names.of(saes),
        finished,
        durable.read_json(path / "identity.json"),
        names.of(durable.read_json(assessed)) if assessed.is_file() else None,
    )
    written |= {"finished.json": as_json(finished), CARD: card.encode()}
    weights = tuple(f"{name}/{WEIGHTS}" for name in kept)
    return Upload(repo_type="model", folder=path, as_they_are=weights, written=written)


def _tokens(path: Path, place: str) -> Upload:
    store = TokenStore(path)
    names = Names(store.manifest)
    written = _token_files(store, names) | {CARD: tokens_card(place, store, names).encode()}
    return Upload(repo_type="dataset", folder=path, as_they_are=_token_globs(store), written=written)


def _activations(path: Path, place: str) -> Upload:
    store = ActivationStore(path)
    if not store.sites:
        raise StoreError(f"no site of {path} is finished; finish one with `saemill cache`")
    names = Names(store.settings, store.tokens.manifest)
    group = durable.read_json(path / "zarr.json")
    named = names.of(group)
    if named != group:
        named["attributes"]["saemill"]["fingerprint"] = store.fingerprint
    written = {f"tokens/{name}": content for name, content in _token_files(store.tokens, names).items()}
    written |= {"zarr.json": as_json(named) if named != group else (path / "zarr.json").read_bytes()}
    per_site = ("zarr.json", "manifest.json", "c/*/0", "commits/*.json")
    globs = [f"{site}/{file}" for site in store.sites for file in per_site]
    globs += [f"tokens/{file}" for file in _token_globs(store.tokens)]
    card = activations_card(place, store, names).encode()
    return Upload(repo_type="dataset", folder=path, as_they_are=tuple(globs), written=written | {CARD: card})


def _token_globs(store: TokenStore) -> tuple[str, ...]:
    """All files of a token store but its manifest."""
    listed = [entry["path"] for entry in store.manifest["files"] if "/c/" not in entry["path"]]
    return (*listed, "tokens/c/*/0", "held_out/c/*/0")


def _token_files(store: TokenStore, names: Names) -> dict[str, bytes]:
    """The manifest, and what of the tokenizer names a path, whose hash is then another one."""
    manifest, written = durable.read_json(store.path / "manifest.json"), {}
    for entry in manifest["files"]:
        file = store.path / entry["path"]
        if entry["path"].startswith("tokenizer/") and file.suffix == ".json":
            content = names.content(file)
            if content != file.read_bytes():
                written[entry["path"]] = content
                entry |= {"bytes": len(content), "xxh3": durable.hash_bytes(content)}
    return written | {"manifest.json": as_json(names.of(manifest))}


def _check_may_push() -> None:
    from huggingface_hub import get_token, is_offline_mode

    if is_offline_mode():
        raise ConfigError("HF_HUB_OFFLINE is set, so that nothing can be pushed; unset it")
    if get_token() is None:
        raise ConfigError(f"pushing needs a token of the hub with write access; {hub.LOG_IN}")


def _open(upload: Upload, repo: str, private: bool, revision: str | None) -> Upload:
    """Make the repository and the branch where they are not there; refuse one that holds something else.

    Returns: what to upload, the card with metadata that someone added there, such as a license.
    """
    from huggingface_hub import HfApi, metadata_load

    api, there = HfApi(), {"repo_id": repo, "repo_type": upload.repo_type}
    api.create_repo(**there, private=private or None, exist_ok=True)
    if private and not api.repo_info(**there).private:
        raise ConfigError(f"{repo} is there and public; make it private on its page, or leave --private out")
    if revision:
        api.create_branch(**there, branch=revision, exist_ok=True)
    parts = {WEIGHTS, "zarr.json"}
    files = api.list_repo_files(**there, revision=revision)
    stale = sorted(f for f in files if Path(f).name in parts and f not in upload.sizes)
    if stale:
        raise ConfigError(
            f"{repo} holds more than is pushed now, which would seem to belong to it: {', '.join(stale[:5])}"
            f"{', …' if len(stale) > 5 else ''}. Push these as well, delete them there, or name another "
            "repository or --revision"
        )
    if CARD not in files:
        return upload
    added = metadata_load(api.hf_hub_download(**there, revision=revision, filename=CARD)) or {}
    card = keep_metadata(upload.written[CARD].decode(), added)
    return replace(upload, written={**upload.written, CARD: card.encode()})


def _send(upload: Upload, repo: str, revision: str | None, message: str) -> None:
    """Upload the large files, in one commit or several, then in one what makes them readable."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api, there = HfApi(), {"repo_id": repo, "repo_type": upload.repo_type, "revision": revision}
    api.upload_folder(
        **there,
        folder_path=upload.folder,
        allow_patterns=list(upload.as_they_are),
        ignore_patterns=list(upload.written),
        commit_message=f"{message}: files",
    )
    operations = [CommitOperationAdd(name, content) for name, content in upload.written.items()]
    api.create_commit(**there, operations=operations, commit_message=message)


def _listing(upload: Upload, place: str) -> str:
    lines = [f"{n_bytes:>15,}  {name}" for name, n_bytes in sorted(upload.sizes.items())]
    return "\n".join([f"to {upload.repo_type} {place}: {_total(upload)}", *lines, ""])


def _total(upload: Upload) -> str:
    return f"{counted(len(upload.sizes), 'file')}, {sum(upload.sizes.values()) / 2**20:,.1f} MiB"
