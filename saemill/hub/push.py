"""`saemill push`: a run as a model repository, a store as a dataset repository."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from saemill.common import hub
from saemill.common.addresses import address_of
from saemill.common.errors import ConfigError, StoreError
from saemill.common.log import counted, say
from saemill.common.sae.formats.sparsify import WEIGHTS
from saemill.common.stores import runs
from saemill.hub.card import keep_metadata
from saemill.hub.contents import Contents, contents_of
from saemill.show import problems


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
    """Upload a run, a token store or an activation store, with a card that describes it.

    Absolute paths in settings are uploaded as names. A push that was interrupted
    continues when it is run again: what the hub has is not sent twice.

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
    check_repo(repo)
    if address := address_of(path):
        raise ConfigError(
            f"{address} is no folder here, and a folder is what is pushed; copy it to a disk first"
        )
    place = f"{repo}@{quote(revision, safe='')}" if revision else repo
    contents = contents_of(path, place, variants)
    if dry_run:
        say(_listing(contents, place))
        say(contents.written[runs.CARD].decode())
        return
    check_may_push()
    with hub.asking(repo):  # before the store is hashed, which may take long
        contents = _open(contents, repo, private, revision)
    if contents.repo_type == "dataset" and (damage := problems(path)):
        raise StoreError("\n".join(damage))
    message = message or f"Upload {path.absolute().name} with saemill"
    _upload(contents, repo, revision, message)


def upload(contents: Contents, repo: str, *, private: bool, message: str) -> None:
    """Upload files to a repository, which is made if it is not there. `check_may_push` comes first.

    Raises:
        ConfigError: the hub refuses.
    """
    with hub.asking(repo):
        contents = _open(contents, repo, private, None)
    _upload(contents, repo, None, message)


def _upload(contents: Contents, repo: str, revision: str | None, message: str) -> None:
    """Upload files to a repository that is open."""
    place = f"{repo}@{quote(revision, safe='')}" if revision else repo
    say(f"{contents.folder} to {contents.repo_type} {place}: {_total(contents)}")
    with hub.asking(repo):
        _send(contents, repo, revision, message)
    say(f"{hub.SCHEME}{'datasets/' if contents.repo_type == 'dataset' else ''}{place} is there")


def check_repo(repo: str) -> None:
    """Refuse what is no repository's name.

    Raises:
        ConfigError: it is none.
    """
    uri = hub.parse(hub.SCHEME + repo)
    if uri.path_in_repo or uri.revision or uri.type != "model":
        raise ConfigError(f"repo must be user/repo, got {repo!r}; a branch is named with --revision")


def check_may_push() -> None:
    """Refuse to begin without a token of the hub, or offline.

    Raises:
        ConfigError: nothing can be pushed.
    """
    from huggingface_hub import get_token, is_offline_mode

    if is_offline_mode():
        raise ConfigError("HF_HUB_OFFLINE is set, so that nothing can be pushed; unset it")
    if get_token() is None:
        raise ConfigError(f"pushing needs a token of the hub with write access; {hub.LOG_IN}")


def _open(contents: Contents, repo: str, private: bool, revision: str | None) -> Contents:
    """Make the repository and the branch where they are not there; refuse one that holds something else.

    Returns: what to upload, the card with metadata that someone added there, such as a license.
    """
    from huggingface_hub import HfApi, metadata_load

    api, repository = HfApi(), {"repo_id": repo, "repo_type": contents.repo_type}
    api.create_repo(**repository, private=private or None, exist_ok=True)
    if private and not api.repo_info(**repository).private:
        raise ConfigError(f"{repo} is there and public; make it private on its page, or leave --private out")
    if revision:  # a new branch begins without what main holds
        first = api.list_repo_commits(**repository)[-1].commit_id
        api.create_branch(**repository, branch=revision, revision=first, exist_ok=True)
    files = api.list_repo_files(**repository, revision=revision)
    stored = {file for file in files if Path(file).name in (WEIGHTS, "zarr.json")}
    stale = sorted(stored - set(contents.sizes))
    if stale:
        raise ConfigError(
            f"{repo} holds more than is pushed now, which would seem to belong to it: {', '.join(stale[:5])}"
            f"{', …' if len(stale) > 5 else ''}. Push these as well, delete them there, or name another "
            "repository or --revision"
        )
    if runs.CARD not in files:
        return contents
    added = metadata_load(api.hf_hub_download(**repository, revision=revision, filename=runs.CARD)) or {}
    card = keep_metadata(contents.written[runs.CARD].decode(), added)
    return replace(contents, written={**contents.written, runs.CARD: card.encode()})


def _send(contents: Contents, repo: str, revision: str | None, message: str) -> None:
    """Upload the large files, in one commit or several, then in one what makes them readable."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api, repository = HfApi(), {"repo_id": repo, "repo_type": contents.repo_type, "revision": revision}
    api.upload_folder(
        **repository,
        folder_path=contents.folder,
        allow_patterns=list(contents.as_they_are),
        ignore_patterns=list(contents.written),
        commit_message=f"{message}: files",
    )
    operations = [CommitOperationAdd(name, content) for name, content in contents.written.items()]
    api.create_commit(**repository, operations=operations, commit_message=message)


def _listing(contents: Contents, place: str) -> str:
    lines = [f"{n_bytes:>15,}  {name}" for name, n_bytes in sorted(contents.sizes.items())]
    return "\n".join([f"to {contents.repo_type} {place}: {_total(contents)}", *lines, ""])


def _total(contents: Contents) -> str:
    return f"{counted(len(contents.sizes), 'file')}, {sum(contents.sizes.values()) / 2**20:,.1f} MiB"
