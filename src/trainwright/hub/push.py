"""Create a repository on the Hub and commit folders to it.

Owns: every call to `huggingface_hub`. Leaves to others: which files (staging) and when (queue).
A token is passed with each call and kept in memory only: no file, no git config, no log line holds it.
`HF_ENDPOINT` names another Hub, as everywhere in `huggingface_hub`.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import threading
from collections.abc import Sequence
from typing import Any

from trainwright.checkpoint.paths import relative_files
from trainwright.hub.retry import MissingToken, with_retries
from trainwright.hub.staging import IGNORED, files_in, stage
from trainwright.interop.optional import require
from trainwright.safe_write import earlier_bytes, write_bytes

logger = logging.getLogger(__name__)


def create_repository(
    model_id: str | None, token: str | None = None, private: bool | None = None, output_dir: str = "."
) -> str:
    """Create the model repository unless it exists; return its full name, "user/model" or "organisation/model".

    `model_id` without a "/" is created in the namespace of the token's owner; None means the name of `output_dir`.
    `private=None` leaves the choice to the namespace's default; it does not change a repository that exists.
    """
    name = repository_name(model_id, output_dir)
    hub = _library()
    if token is None and hub.get_token() is None:
        raise MissingToken(
            f"Pushing to {name!r} needs a token with write access. Run `hf auth login`, set the environment variable "
            "HF_TOKEN, or pass hub_token= to TrainingArguments."
        )
    created: str = _api(token).create_repo(name, private=private, exist_ok=True).repo_id
    return created


def repository_name(model_id: str | None, output_dir: str) -> str:
    """What a repository is asked for by; without a "/" the Hub puts the owner of the token in front."""
    return model_id or os.path.basename(os.path.abspath(output_dir))


def push_folder(
    repo_id: str,
    folder: str,
    *,
    message: str,
    token: str | None = None,
    revision: str | None = None,
    blocking: bool = True,
    path_in_repo: str | None = None,
    ignore_patterns: Sequence[str] = IGNORED,
) -> Any:
    """Commit a snapshot of the files of `folder`: a `CommitInfo`, or a `Future` of one where not `blocking`.

    `revision` names a branch, which is created where it is missing; None is the main branch. What may pass by itself
    is tried again; then the error of `huggingface_hub` is raised.
    """
    prefix = f"{path_in_repo.strip('/')}/" if path_in_repo else ""
    files = {f"{prefix}{path}": os.path.join(folder, path) for path in files_in(folder, ignore_patterns)}
    staged = stage(files, directory=folder)

    def commit() -> Any:
        try:
            return push_staged(repo_id, staged, message=message, token=token, revision=revision)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    return commit() if blocking else _api(token).run_as_future(commit)


def push_staged(
    repo_id: str,
    staged: str,
    *,
    message: str,
    token: str | None = None,
    revision: str | None = None,
    replaces: str | None = None,
    stop: threading.Event | None = None,
) -> Any:
    """Commit a directory that `staging.stage` made, as one commit: all of it is there, or nothing.

    replaces: a folder of the repository whose files are deleted unless this push contains them. stop: see
    `with_retries`.
    """
    hub, api = _library(), _api(token)

    def commit() -> Any:
        if revision is not None and revision != "main" and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        files = relative_files(staged)
        # Not `upload_folder`: its newest releases divide a folder over several commits.
        operations = [hub.CommitOperationAdd(path, os.path.join(staged, *path.split("/"))) for path in files]
        if replaces is not None:
            there = api.list_repo_files(repo_id, revision=revision)
            gone = {path for path in there if path.startswith(f"{replaces}/")}.difference(files)
            operations += [hub.CommitOperationDelete(path) for path in sorted(gone)]
        return api.create_commit(repo_id, operations, commit_message=message, revision=revision)

    return with_retries(commit, f"The push to {repo_id}", stop=stop)


def license_on_hub(repo_id: str, token: str | None = None) -> str | None:
    """The licence that `repo_id` declares; None where it declares none or the Hub cannot be asked."""
    try:
        tags = _api(token).model_info(repo_id, timeout=10).tags or []
    except Exception as error:  # a model card is not worth a failed training, whatever went wrong
        logger.info("The licence of %s is unknown: %s", repo_id, error)
        return None
    return next((tag.partition(":")[2] for tag in tags if tag.startswith("license:")), None)


def add_patterns_to_gitignore(output_dir: str, patterns: Sequence[str]) -> None:
    """Add the `patterns` that `.gitignore` in `output_dir` lacks; the Hub leaves out files that match one."""
    path = os.path.join(output_dir, ".gitignore")
    present = earlier_bytes(path)
    missing = [pattern for pattern in patterns if pattern.encode() not in present.splitlines()]
    if missing:
        end_of_line = b"\n" if present and not present.endswith(b"\n") else b""
        write_bytes(path, present + end_of_line + "".join(f"{pattern}\n" for pattern in missing).encode())


def _library() -> Any:
    return require("huggingface_hub", "push_to_hub", extra="hub")


@functools.lru_cache(maxsize=8)
def _api(token: str | None) -> Any:
    """One client per token: its background pushes wait for each other."""
    return _library().HfApi(token=token)
