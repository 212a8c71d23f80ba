"""Publishing a result on the Hugging Face Hub: in one commit, after it is clear that it may go there."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .._version import __version__
from ..checkpoint.files import Folder
from ..checkpoint.index import INDEX_SUFFIX, WEIGHT_SUFFIXES
from ..errors import HubError
from ..options import PublishTarget
from ..progress import StartTransfer
from .answers import account_of, describe, files_of
from .client import checked_token, explaining, interruptible, not_a_hub, with_retries

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

_READ = (".safetensors", INDEX_SUFFIX)  # what engines read of a repository


def default_name(label: str) -> str:
    """Return the name of the repository for what was made from the source `label`."""
    name = re.sub(r"[^A-Za-z0-9._-]+|-{2,}|\.{2,}", "-", label.split("/")[-1]).strip("-.") or "model"
    return f"{name[:80].rstrip('-.')}-marlin"


def check_target(target: PublishTarget, *, token: str | None, force: bool) -> PublishTarget:
    """Return the target with its owner's name, if this user may write there; changes nothing on the Hub.

    Raises HubError when the user may not, or, without `force`, when weights that are there would be overwritten.
    """
    token = checked_token(token)
    with explaining(target.repo_id, target.branch, doing="upload"):
        from huggingface_hub import HfApi, constants, get_token
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        validate_repo_id(target.repo_id)
        if constants.HF_HUB_OFFLINE:
            raise HubError(f"{target.repo_id}: offline mode is on (HF_HUB_OFFLINE); nothing can be uploaded.")
        if not (token or get_token()):
            raise HubError(f"{target.repo_id}: publishing needs a token; log in with `hf auth login` or give --token.")
        api = HfApi(token=token)
        target = _with_owner(api, target)
        if (
            _exists(api, target, token)
            and not (target.create_pr or force)
            and _weights_there(target, _head(target, token), token)
        ):
            raise HubError(_other_weights(target))
    return target


def create_repository(target: PublishTarget, *, token: str | None) -> None:
    """Create the repository, unless it is there."""
    with explaining(target.repo_id, target.branch, doing="upload"):
        from huggingface_hub import HfApi

        api = HfApi(token=checked_token(token))
        with_retries(lambda: api.create_repo(target.repo_id, private=target.private or None, exist_ok=True))


def push(
    folder: Path,
    target: PublishTarget,
    *,
    token: str | None,
    force: bool,
    transfer: StartTransfer | None = None,
) -> str:
    """Upload every file of `folder` in one commit; the address of the commit or pull request.

    What an earlier try has uploaded is not uploaded again. With `transfer`, as `Progress` has it, weight files go one
    after another, and it hears of each. Raises HubError; the repository then is as it was.
    """
    token = checked_token(token)
    target = check_target(target, token=token, force=True)
    create_repository(target, token=token)
    with explaining(target.repo_id, target.branch, doing="upload"):
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

        api = HfApi(token=token)
        added = {name: CommitOperationAdd(name, str(folder / name)) for name in Folder(folder).names}
        head = _head(target, token)
        if not force and not target.create_pr:
            for name, sha in _weights_there(target, head, token).items():
                if sha and (name not in added or added[name].upload_info.sha256.hex() != sha):
                    raise HubError(_other_weights(target))
        if head is None and target.branch:
            branch = target.branch
            with_retries(lambda: api.create_branch(target.repo_id, branch=branch, exist_ok=True))
            head = _head(target, token)
        # Other weights in the repository would be loaded together with these.
        there = _weights_there(target, head, token)
        stale = [CommitOperationDelete(n) for n in there if n not in added and n.endswith(_READ) and "/" not in n]
        if transfer is not None:
            weights = [name for name in added if name.endswith(WEIGHT_SUFFIXES)]
            on_bytes = transfer("uploading", sum(added[name].upload_info.size for name in weights))
            for name in weights:
                _upload(api, target, added[name])
                on_bytes(added[name].upload_info.size)
        message = target.commit_message or f"Marlin checkpoint, by marlin-convert {__version__}"
        done = interruptible(
            lambda: with_retries(
                lambda: api.create_commit(
                    target.repo_id, [*added.values(), *stale], commit_message=message, create_pr=target.create_pr,
                    revision=target.branch, parent_commit=head,  # refused if somebody else has committed since
                ),
                garbled=True,  # huggingface_hub assumes that any answer about the card is JSON
            )
        )  # fmt: skip
    address = str(done.pr_url or done.commit_url)
    # It becomes a link: where the answer has none of the Hub's own, the repository's.
    return address if address.startswith(f"{constants.ENDPOINT}/") else f"{constants.ENDPOINT}/{target.repo_id}"


def _upload(api: HfApi, target: PublishTarget, added: CommitOperationAdd) -> None:
    """Let the Hub have a file's content; a commit that names it comes later."""
    interruptible(
        lambda: with_retries(
            lambda: api.preupload_lfs_files(
                target.repo_id, [added], revision=target.branch, create_pr=target.create_pr, free_memory=False
            )
        )
    )


def _with_owner(api: HfApi, target: PublishTarget) -> PublishTarget:
    """Return the target with its owner's name; raises HubError when whose token it is may not write there."""
    try:
        who = account_of(with_retries(api.whoami))
    except (AttributeError, LookupError, TypeError):
        raise not_a_hub(target.repo_id, "it does not say whose the token is") from None
    if who.role == "read":
        raise HubError(f"{target.repo_id}: the token may only read; give one that may write.")
    if "/" not in target.repo_id:
        target = replace(target, repo_id=f"{who.name}/{target.repo_id}")
    owner = target.repo_id.split("/")[0]
    if owner != who.name and not target.create_pr and who.orgs.get(owner, "read") == "read":
        raise HubError(
            f"{target.repo_id}: {who.name} may not write there; choose a repository of your own, or --create-pr."
        )
    return target


def _exists(api: HfApi, target: PublishTarget, token: str | None) -> bool:
    """Tell whether the repository is there; raises when it is and may not be written to."""
    from huggingface_hub import CommitOperationAdd, errors

    try:
        private = describe(target.repo_id, None, token).private
    except errors.RepositoryNotFoundError:
        return False
    if target.private and not private:
        raise HubError(f"{target.repo_id}: it exists and is public; make it private first, or leave --private out.")
    # Asks how a file would be uploaded, which only who may write is told; a small one is not uploaded by it.
    card = CommitOperationAdd("README.md", b"-")
    with_retries(lambda: api.preupload_lfs_files(target.repo_id, [card], create_pr=target.create_pr))
    return True


def _head(target: PublishTarget, token: str | None) -> str | None:
    """Return the commit that the result will follow; None when the target's branch is not there."""
    from huggingface_hub import errors

    revision = None if target.create_pr else target.branch
    try:
        return describe(target.repo_id, revision, token).commit
    except errors.RevisionNotFoundError:
        return None


def _weights_there(target: PublishTarget, commit: str | None, token: str | None) -> dict[str, str]:
    """Return names and SHA-256 (of LFS files, as weights are) of the weights and indexes at a commit, if it is one."""
    if commit is None:
        return {}
    files = files_of(target.repo_id, commit, token)
    return {f.name: f.oid if len(f.oid) == 64 else "" for f in files.values() if f.name.endswith(WEIGHT_SUFFIXES)}


def _other_weights(target: PublishTarget) -> str:
    where = f", branch {target.branch}," if target.branch else ""
    return f"{target.repo_id}{where} holds other weights; choose another repository, or overwrite them with --force."
