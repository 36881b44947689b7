"""Create a repository on the Hub and commit folders to it.

Owns: every call to `huggingface_hub`. Leaves to others: which files (staging) and when (queue).
A token is passed with each call and kept in memory only: no file, no git config, no log line holds it.
`HF_ENDPOINT` names another Hub, as everywhere in `huggingface_hub`.
"""

from __future__ import annotations

import functools
import glob
import logging
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from trainwright.hub.staging import IGNORED, files_and_foreign, files_in, stage
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
    name = model_id or os.path.basename(os.path.abspath(output_dir))
    hub = _library()
    if token is None and hub.get_token() is None:
        raise RuntimeError(
            f"Pushing to {name!r} needs a token with write access. Run `hf auth login`, set the environment variable "
            "HF_TOKEN, or pass hub_token= to TrainingArguments."
        )
    created: str = _api(token).create_repo(name, private=private, exist_ok=True).repo_id
    return created


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
    """Commit the files of `folder`: a `CommitInfo`, or a `Future` of one where not `blocking`.

    In the background, a snapshot of the files is pushed. `revision` names a branch, which is created where it is
    missing; None is the main branch.
    """
    files = {path: os.path.join(folder, path) for path in files_in(folder, ignore_patterns)}
    if blocking:
        # The library follows links: those that were left out above are excluded by literal patterns.
        left_out = files_and_foreign(folder, ignore_patterns)[1]
        patterns = [*ignore_patterns, *(escaped for path in left_out for escaped in _as_patterns(path))]
        return _commit(token, repo_id, folder, message, revision, path_in_repo, patterns)
    staged = stage(files, directory=folder)
    return push_staged(repo_id, staged, message=message, token=token, revision=revision, path_in_repo=path_in_repo)


def push_staged(
    repo_id: str,
    staged: str,
    *,
    message: str,
    token: str | None = None,
    revision: str | None = None,
    path_in_repo: str | None = None,
    delete_patterns: Sequence[str] | None = None,
) -> Future[Any]:
    """Commit a directory that `staging.stage` made, in the background, then remove it.

    Pushes with the same token run one after the other, so commits appear in the order of the calls. `delete_patterns`
    name files of the repository that are deleted unless this push contains them.
    """

    def commit() -> Any:
        try:
            return _commit(token, repo_id, staged, message, revision, path_in_repo, (), delete_patterns)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    future: Future[Any] = _api(token).run_as_future(commit)
    return future


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


def _as_patterns(path: str) -> tuple[str, str]:
    """Patterns of the Hub that match `path`, and what is below it where it is a link to a directory."""
    return glob.escape(path), f"{glob.escape(path)}/*"


def _library() -> Any:
    return require("huggingface_hub", "push_to_hub", extra="hub")


@functools.lru_cache(maxsize=8)
def _api(token: str | None) -> Any:
    """One client per token: its background pushes wait for each other."""
    return _library().HfApi(token=token)


def _commit(
    token: str | None,
    repo_id: str,
    folder: str,
    message: str,
    revision: str | None,
    path_in_repo: str | None,
    ignore_patterns: Sequence[str],
    delete_patterns: Sequence[str] | None = None,
) -> Any:
    api = _api(token)
    if revision is not None and revision != "main" and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        path_in_repo=path_in_repo,
        commit_message=message,
        revision=revision,
        ignore_patterns=list(ignore_patterns),
        delete_patterns=list(delete_patterns) if delete_patterns else None,
    )
