"""Runs a script in which one rank has an accident, once: `accident.py KIND RANK STEP SCRIPT ARGUMENTS...`.

"kill": the process is gone, as when the machine runs out of memory. "hang": it does nothing any more. "raise": an
exception. Others: the name of a signal, which the process gets. After a restart there is none.
"""

import os
import runpy
import signal
import sys
import time

from trainwright import Trainer, TrainerCallback


class Accident(TrainerCallback):
    def __init__(self, kind, rank, step):
        self.kind, self.rank, self.step = kind, rank, step

    def on_step_begin(self, args, state, control, **kwargs):
        is_restarted = "1" in (os.environ.get("TORCHELASTIC_RESTART_COUNT"), os.environ.get("SLURM_RESTART_COUNT"))
        if is_restarted or args.process_index != self.rank or state.global_step != self.step:
            return
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "hang":
            self.hangs_here()
        elif self.kind == "raise":
            raise ValueError("a bad sample")
        else:
            os.kill(os.getpid(), getattr(signal, self.kind))

    def hangs_here(self):
        time.sleep(3600)


def run(kind, rank, step, script, arguments):
    """The script as `__main__`, with the accident in the first Trainer that it makes."""
    initialise = Trainer.__init__

    def with_accident(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        self.add_callback(Accident(kind, rank, step))

    Trainer.__init__ = with_accident
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5:])
