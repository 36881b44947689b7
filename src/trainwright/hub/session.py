"""The hub side of one run: its repository, its model card, its pushes.

Owns: `HubSession`, which holds the run's settings. Leaves to others: calls to the Hub (push,
queue), the words of the card (model_card), when to push (Trainer).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from trainwright.hub import card_values, push
from trainwright.hub.model_card import write_model_card
from trainwright.hub.queue import PushQueue
from trainwright.interop.loaded import is_peft_model

logger = logging.getLogger(__name__)


class HubSession:
    """The repository of one run and its pushes. `args` are TrainingArguments; the token stays in them."""

    def __init__(self, args: Any, token: str | None = None, private: bool | None = None) -> None:
        self.args = args
        self.token = token or args.hub_token
        self.repo_id = push.create_repository(
            args.hub_model_id,
            token=self.token,
            private=private if private is not None else args.hub_private_repo,
            output_dir=args.output_dir,
        )
        self._queue = PushQueue(args.hub_always_push)

    def push_checkpoint(self, checkpoint: str, step: int) -> None:
        """Start a push in the background, after a save, of the files of `hub_strategy`."""
        self._queue.push_checkpoint(
            self.repo_id,
            self.args.output_dir,
            checkpoint,
            strategy=self.args.hub_strategy,
            message=f"Training in progress, step {step}",
            token=self.token,
            revision=self.args.hub_revision,
        )

    def push_output(self, message: str, token: str | None, revision: str | None, blocking: bool) -> Any:
        """Commit `output_dir`. Returns the commit, or a future when not `blocking`."""
        self.finish()
        return push.push_folder(
            self.repo_id,
            self.args.output_dir,
            message=message,
            token=token or self.token,
            revision=revision or self.args.hub_revision,
            blocking=blocking,
        )

    def finish(self) -> None:
        """Wait for the pushes that run in the background."""
        if not self._queue.is_done():
            logger.info("Waiting for the push in progress to finish.")
            self._queue.wait_until_done()


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
        "license": push.license_on_hub(base, args.hub_token) if base and args.push_to_hub else None,
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
