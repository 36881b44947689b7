"""Whether, when and where a run is pushed to the Hugging Face hub.

Owns: the fields. Leaves to others: pushing (`hub/`). Tokens are kept out of `repr` and of every serialised form.
"""

# ruff: noqa: RUF009  (`option()` is `dataclasses.field` with a help text)
from __future__ import annotations

from dataclasses import dataclass

from trainwright.args.checks import check_enum
from trainwright.args.options import option
from trainwright.args.run import RunArguments
from trainwright.names import HubStrategy


@dataclass
class HubArguments(RunArguments):
    """Hub: pushing the model."""

    push_to_hub: bool = option(False, "Push the model to the hub whenever it is saved.")
    hub_model_id: str | None = option(
        None, "Repository to push to, 'user/name' or 'name'. None: the name of output_dir."
    )
    hub_strategy: HubStrategy | str = option(
        "every_save",
        "What is pushed: the model when it is saved by hand ('end'), or at 'every_save' and the end of training; also "
        "the last 'checkpoint', or 'all_checkpoints'.",
    )
    hub_token: str | None = option(
        None, "Token to push with. None: the one stored by logging in. Never written anywhere.", repr=False
    )
    hub_private_repo: bool | None = option(None, "Create the repository private. None: as the organisation prefers.")
    hub_always_push: bool = option(
        False, "Push each save; else, of those made while a push runs, only the newest one, after it."
    )
    hub_revision: str | None = option(None, "Branch to push to. None: the main branch.")
    push_to_hub_model_id: str | None = option(None, "Older way to write the last part of hub_model_id.")
    push_to_hub_organization: str | None = option(None, "Older way to write the first part of hub_model_id.")
    push_to_hub_token: str | None = option(None, "Older name of hub_token.", repr=False)

    def _check_hub(self) -> None:
        check_enum(self, "hub_strategy", HubStrategy)
