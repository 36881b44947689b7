"""The basics of a run: where it writes, what it does, and its seeds.

Owns: `RunArguments`, the root of every topic. `output_dir` lives here and nowhere else, so that a subclass which
redefines any field keeps it the first positional argument. Leaves to others: every other topic.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from trainwright.args.checks import check_number
from trainwright.args.constructor import ArgumentsMeta
from trainwright.args.options import option


@dataclass
class RunArguments(metaclass=ArgumentsMeta):
    """The run: folder, tasks, seeds, resuming."""

    output_dir: str | None = option(
        None,
        "Folder for checkpoints, the final model and predictions. Without it: 'trainer_output' in the current folder.",
    )
    overwrite_output_dir: bool = option(
        False,
        "Allow training to start in a folder that already holds a model. Your script reads it; nothing is deleted.",
    )
    do_train: bool = option(False, "Ask your script to train. Read by scripts, not by the Trainer.")
    do_eval: bool = option(
        False, "Ask your script to evaluate. Becomes True by itself when eval_strategy is not 'no'. Read by scripts."
    )
    do_predict: bool = option(False, "Ask your script to predict on a test set. Read by scripts, not by the Trainer.")
    resume_from_checkpoint: str | None = option(
        None,
        "Checkpoint folder to continue from, or 'auto': the newest good one in output_dir, and a fresh start where "
        "there is none yet, as a job needs that is requeued. Read by scripts, which hand it to `trainer.train()`.",
    )
    ignore_data_skip: bool = option(
        False,
        "On resume start with the first sample again instead of the next unseen one: starts at once, but repeats "
        "data and "
        "no longer equals an uninterrupted run.",
    )
    restore_callback_states_from_checkpoint: bool = option(
        False, "On resume let the callbacks saved in the checkpoint replace those of the same class that were passed."
    )
    enable_jit_checkpoint: bool = option(
        False,
        "Save a checkpoint when the machine is about to stop (SIGTERM). Part of save_on_signal; with "
        "save_on_signal=False it catches SIGTERM alone.",
    )
    seed: int = option(
        42,
        "Seed of every random generator, set when training starts. Weights drawn earlier need `model_init` to be "
        "covered.",
    )
    data_seed: int | None = option(
        None, "Separate seed for the order of the data. Without it the order follows `seed`."
    )
    full_determinism: bool = option(
        False, "Use deterministic kernels only: two runs agree to the bit, at a lower speed. Meant for debugging."
    )

    def _check_run(self) -> None:
        self.output_dir = os.path.expanduser("trainer_output" if self.output_dir is None else self.output_dir)
        if not self.output_dir:
            raise ValueError(
                "output_dir='' is not allowed: name a folder, or leave it out to write to 'trainer_output'."
            )
        if self.resume_from_checkpoint is not None and not isinstance(self.resume_from_checkpoint, bool):
            self.resume_from_checkpoint = os.path.expanduser(self.resume_from_checkpoint)
        check_number(self, "seed", 0, 2**32 - 1, whole=True, hint="numpy accepts seeds of 32 bits.")
        check_number(self, "data_seed", 0, 2**63 - 1, whole=True, optional=True)
