"""The hub side of one run: its repository, its model card, its pushes.

Owns: `HubSession`, which holds the run's settings, and `push_run`, which pushes after it. Leaves to others: calls to
the Hub (push), their order (queue) and repetition (retry), the words of the card (model_card), when to push (Trainer).
"""

from __future__ import annotations

import functools
import logging
import os
import shlex
import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from trainwright.checkpoint.layout import oldest_first, sort_checkpoints
from trainwright.checkpoint.manifest import problems
from trainwright.checkpoint.paths import WEIGHT_NAMES
from trainwright.hub import card_values, push, staging
from trainwright.hub.model_card import write_model_card
from trainwright.hub.queue import PushQueue, Snapshot
from trainwright.hub.retry import PushFailed, cure_of, may_pass, one_line, with_retries
from trainwright.interop.loaded import is_peft_model
from trainwright.names import HubStrategy

logger = logging.getLogger(__name__)

FIRST_DELAYS_S = (1, 2)  # of retries before training, which is not held up for longer


class HubSession:
    """The repository of one run and its pushes. `args` are TrainingArguments; the token stays in them.

    The Hub may be away: then the repository is made before the first push that reaches it. What it refuses (a wrong
    token, no access) is an error at once.
    """

    def __init__(self, args: Any, token: str | None = None, private: bool | None = None) -> None:
        self.args = args
        self.token = token or args.hub_token
        self.repo_id = push.repository_name(args.hub_model_id, args.output_dir)  # without the owner until it is known
        self._private = private if private is not None else args.hub_private_repo
        self._is_there = False
        self._is_clean = False  # of what a killed process left
        self._queue = PushQueue(self._upload, args.hub_always_push)
        try:
            with_retries(self._make_repository, f"Creating {self.repo_id}", delays_s=FIRST_DELAYS_S)
        except Exception as error:
            if not may_pass(error):
                if cure := cure_of(error, self.repo_id):
                    raise RuntimeError(f"The Hub refused {self.repo_id}: {cure} ({one_line(error)})") from error
                raise
            logger.warning(
                "The Hub cannot be reached (%s). Training starts; each save is pushed as soon as it answers.",
                one_line(error),
            )

    def push_checkpoint(self, checkpoint: str, step: int, write_card: Callable[[], None]) -> None:
        """After a save: push the files of `hub_strategy` in the background, with a fresh draft of the card."""
        self._push(f"Training in progress, step {step}", write_card, checkpoint, model_is_in_output_dir=False)

    def push_final_model(self, checkpoint: str | None, write_card: Callable[[], None]) -> None:
        """After training: push the model in `output_dir`, and what `hub_strategy` pushes of the last checkpoint."""
        self._push("End of training", write_card, checkpoint, model_is_in_output_dir=True)

    def push_output(self, message: str, token: str | None, revision: str | None, blocking: bool) -> Any:
        """Commit `output_dir`. Returns the commit, or a future when not `blocking`. Raises PushFailed, with the command
        that pushes later.
        """
        self.finish()
        revision = revision or self.args.hub_revision
        try:
            with_retries(self._make_repository, f"Creating {self.repo_id}")
            return push.push_folder(
                self.repo_id,
                self.args.output_dir,
                message=message,
                token=token or self.token,
                revision=revision,
                blocking=blocking,
            )
        except Exception as error:
            raise PushFailed(self._what_to_do(error, HubStrategy.END, revision)) from error

    def finish(self, *, wait: bool = True, hurry: bool = False) -> None:
        """Wait until the Hub has what `hub_strategy` promises; what it lacks is a warning, with the command that pushes
        it later. wait: False after Ctrl-C. hurry: wait for no retries, where a signal or an error ends the run.
        """
        if not wait:
            if self._queue.abandon():
                logger.warning("The last push was not waited for. %s", self._how_to_push(self.args.hub_strategy))
            return
        if not self._queue.is_done():
            logger.info("Waiting for the push in progress to finish.")
        error = self._queue.wait_until_done(again=True, hurry=hurry)
        if error is not None:
            self._queue.forget_failure()
            logger.warning("%s", self._what_to_do(error, self.args.hub_strategy, self.args.hub_revision))

    def _push(
        self, message: str, write_card: Callable[[], None], checkpoint: str | None, *, model_is_in_output_dir: bool
    ) -> None:
        strategy, output_dir = HubStrategy(self.args.hub_strategy), os.fspath(self.args.output_dir)
        try:
            if not self._is_clean:
                staging.remove_stale_stages(output_dir)
                self._is_clean = True
            write_card()
            done = self._queue.pushed_checkpoints
            files = staging.checkpoint_files(
                output_dir, checkpoint, strategy, done, model_is_in_output_dir=model_is_in_output_dir
            )
            folders = {path.partition("/")[0] for path in files}
            checkpoints = tuple(name for name in staging.checkpoints_in(output_dir) if name in folders)
            staged = staging.stage(files, directory=output_dir)
        except Exception as error:  # a full disk, a card that an override cannot write
            logger.warning(
                "%s: nothing was pushed, and training continues: %s", checkpoint or output_dir, one_line(error)
            )
            return
        # Files that only the previous checkpoint has would be mixed with this one's.
        replaces = staging.LAST_CHECKPOINT if strategy is HubStrategy.CHECKPOINT and checkpoint else None
        self._queue.add(Snapshot(staged, message, checkpoints, replaces))

    def _upload(self, snapshot: Snapshot, stop: threading.Event) -> None:
        with_retries(self._make_repository, f"Creating {self.repo_id}", stop=stop)
        push.push_staged(
            self.repo_id,
            snapshot.directory,
            message=snapshot.message,
            token=self.token,
            revision=self.args.hub_revision,
            replaces=snapshot.replaces,
            stop=stop,
        )

    def _make_repository(self) -> None:
        if not self._is_there:
            args = self.args
            self.repo_id = push.create_repository(
                args.hub_model_id, token=self.token, private=self._private, output_dir=args.output_dir
            )
            self._is_there = True

    def _what_to_do(self, error: BaseException, strategy: HubStrategy | str, revision: str | None) -> str:
        cure = cure_of(error, self.repo_id)
        why = f"{cure} ({one_line(error)})" if cure else one_line(error)
        return f"The last push to the Hub failed: {why} {self._how_to_push(strategy, revision)}"

    def _how_to_push(self, strategy: HubStrategy | str, revision: str | None = None) -> str:
        words = ["trainwright", "push", os.fspath(self.args.output_dir), "--repo", self.repo_id]
        words += ["--strategy", HubStrategy(strategy).value]
        if revision or self.args.hub_revision:
            words += ["--revision", revision or self.args.hub_revision]
        if self._private:
            words += ["--private"]
        return f"All files are in {self.args.output_dir}. To push them later: {shlex.join(words)}"


def push_run(
    output_dir: str,
    model_id: str | None = None,
    *,
    strategy: HubStrategy | str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    message: str = "Pushed after training",
    token: str | None = None,
) -> Any:
    """Push what a run left in `output_dir`, as it would have with `hub_strategy`; returns the commit.

    strategy: None is "end" where `output_dir` itself holds a model, else "every_save": the model of the newest whole
    checkpoint. That in `output_dir` is pushed instead where it is newer. Raises ValueError where there is no model,
    PushFailed where the Hub refuses or is away.
    """
    newest = next(
        (path for path in reversed(oldest_first(sort_checkpoints(output_dir))) if not problems(path, deep=False)), None
    )
    weights_s = _written_s(output_dir)
    if strategy is None:
        strategy = HubStrategy.END if weights_s is not None else HubStrategy.EVERY_SAVE
    strategy = HubStrategy(strategy)
    if weights_s is None and (strategy is HubStrategy.END or newest is None):
        if newest is None:
            raise ValueError(f"{output_dir} holds no model, nor a checkpoint that is whole.")
        raise ValueError(f"{output_dir} holds no model itself; --strategy every_save pushes that of {newest}.")
    name = push.repository_name(model_id, output_dir)
    try:
        repo_id = with_retries(
            lambda: push.create_repository(model_id, token=token, private=private, output_dir=output_dir),
            f"Creating {name}",
        )
        checkpoint = None if strategy is HubStrategy.END else newest
        checkpoint_s = _written_s(checkpoint) if checkpoint is not None else None
        is_newer = weights_s is not None and (checkpoint_s is None or weights_s > checkpoint_s)
        files = staging.checkpoint_files(output_dir, checkpoint, strategy, model_is_in_output_dir=is_newer)
        snapshot = Snapshot(staging.stage(files, directory=output_dir), message)
        try:
            return push.push_staged(
                repo_id,
                snapshot.directory,
                message=message,
                token=token,
                revision=revision,
                replaces=staging.LAST_CHECKPOINT if strategy is HubStrategy.CHECKPOINT and checkpoint else None,
            )
        finally:
            snapshot.discard()
    except Exception as error:
        cure = cure_of(error, name)
        raise PushFailed(f"{output_dir} was not pushed: {cure} ({one_line(error)})" if cure else str(error)) from error


@functools.lru_cache(maxsize=8)
def _license_of(base: str, token: str | None) -> str | None:
    """Asked once, not for each card."""
    return push.license_on_hub(base, token)


def _written_s(folder: str) -> float | None:
    """When the weights in `folder` were written, in seconds since 1970; None where it holds none."""
    times = [os.path.getmtime(path) for name in WEIGHT_NAMES if os.path.isfile(path := os.path.join(folder, name))]
    return max(times, default=None)


def write_card(
    args: Any,
    model: nn.Module,
    log_history: Sequence[dict[str, Any]],
    num_processes: int,
    repo_id: str | None,
    data: Any,
    **chosen: Any,
) -> None:
    """Write a draft of a model card to `output_dir`: values the user chose, the others from the run."""
    tag, configuration = card_values.dataset_names(data)
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    if base is not None and os.path.isdir(base):
        base = None  # a local directory means nothing to a reader
    name = repo_id or os.path.basename(os.path.abspath(args.output_dir))
    known = {
        "model_name": name.rpartition("/")[2],
        "finetuned_from": base,
        "license": _license_of(base, args.hub_token) if base and args.push_to_hub else None,
        "dataset_tags": tag,
        "dataset_args": configuration,
    }
    values = known | {field: value for field, value in chosen.items() if value is not None}
    write_model_card(
        args.output_dir,
        **values,
        library_name="peft" if is_peft_model(model) else "transformers",
        hyperparameters=card_values.hyperparameters_of(args, num_processes),
        log_history=log_history,
        framework_versions=card_values.versions(),
    )
