"""What a run does about faults: full disks, too little memory, signals, NaN.

Owns: the fields and their ranges. Leaves to others: detecting and handling them (`checkpoint/save_failures.py`,
`oom_retry.py`, `interrupt.py`, `nonfinite/`).
"""

from __future__ import annotations

from dataclasses import dataclass

from trainwright.args.checks import check_choice, check_number, check_switch
from trainwright.args.options import option
from trainwright.args.run import RunArguments


@dataclass
class SafetyArguments(RunArguments):
    """Faults: disks and memory that run full."""

    max_save_failures: int = option(
        3,
        "How many checkpoints in a row may be lost to a full, read-only or failing disk before the run stops. Until "
        "then training continues with a warning, and older checkpoints stay.",
        extension=True,
    )
    auto_find_batch_size_mode: str = option(
        "split",
        "What auto_find_batch_size does when memory runs out. 'split': run the same micro-batch again in smaller "
        "parts, whose gradients add up to the same update, and stay at that size. 'restart': start the run again with "
        "per_device_train_batch_size halved, which makes every update smaller.",
        extension=True,
    )
    dataloader_timeout: float = option(
        0.0,
        "Seconds that a loader worker may take for a batch before it counts as hung and is replaced. 0: it may take as "
        "long as it likes.",
        extension=True,
    )
    save_on_signal: bool = option(
        True,
        "On SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 finish the step, write a checkpoint, and end the process; Ctrl-C twice "
        "ends it at once. False: signals do what they do without the Trainer, and steps since the last checkpoint are "
        "lost.",
        extension=True,
    )
    exit_code_on_signal: int | None = option(
        None,
        "Exit code of a process that a signal ended. None: 128 plus the signal's number, so 143 for SIGTERM.",
        extension=True,
    )
    requeue_on_signal: bool = option(
        False,
        "On Slurm, put the job back into its queue (scontrol requeue) after SIGUSR1, once the checkpoint is written; "
        "its next life resumes by itself. Ask for the signal ahead of the time limit: sbatch --requeue "
        "--signal=USR1@120.",
        extension=True,
    )
    save_on_exception: bool = option(
        False,
        "Write a checkpoint when an exception ends the run between two steps (in a callback, a metric, a tracker). "
        "Needs a run with one process.",
        extension=True,
    )

    nonfinite: str = option(
        "raise",
        "What to do about a loss or gradient that is NaN or infinite, before the optimizer uses it: 'raise' an error "
        "that names step and samples; 'skip' the update; 'rollback' to the last checkpoint and skip the data; "
        "'ignore' it. docs/reliability.md lists the limits of each optimizer.",
        extension=True,
    )

    preflight: bool = option(
        True,
        "Before the first step, compare the data with the model: the column of labels, the first batch, and "
        "compute_metrics on a batch of the evaluation set. False: mistakes are found where they end the run.",
        extension=True,
    )

    def _check_safety(self) -> None:
        check_choice(self, "nonfinite", ("raise", "skip", "rollback", "ignore"))
        check_number(self, "max_save_failures", 1, whole=True)
        check_number(self, "dataloader_timeout", 0)
        check_choice(self, "auto_find_batch_size_mode", ("split", "restart"))
        check_switch(self, "save_on_signal")
        check_switch(self, "save_on_exception")
        check_switch(self, "requeue_on_signal")
        check_switch(self, "preflight")
        if self.requeue_on_signal and not self.save_on_signal:
            raise ValueError(
                "requeue_on_signal=True needs save_on_signal=True: a job that is requeued without a checkpoint would "
                "start over."
            )
        check_number(self, "exit_code_on_signal", 0, 255, whole=True, optional=True)
