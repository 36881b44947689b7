"""Two processes that train together and cost a fraction of a second: forks of a parent that has imported everything.

Shared by the tests of this directory. The processes talk over gloo and meet in a file, so that no port is taken.
"""

from __future__ import annotations

import itertools
import mmap
import os
import pickle
import shutil
import signal
import time
import traceback

import torch
from runs import make_run, watch_files

PATIENCE_S = 60  # after which a process that lost its partner counts as hanging


class Pair:
    """Two processes that train together, forked from this one. `folder`: for what they leave behind."""

    def __init__(self, folder):
        import accelerate.data_loader  # noqa: F401
        import datasets  # noqa: F401  what accelerate imports when it prepares a loader

        import trainwright.parallel.async_max
        import trainwright.parallel.fsdp
        import trainwright.parallel.signal_agreement  # noqa: F401

        self.folder, self.numbers = folder, itertools.count()
        make_run(folder / "warm", max_steps=1, save_steps=1).train()

    def run(self, action, die_rank=None, point=0, leave_other=False):
        """`action(rank, trainers)` in both; process `die_rank` kills itself at its `point`-th file-system call.

        What each returned (None: it raised or was killed), and the step of the one that died (None: it lived).
        """
        base = self.folder / f"pair-{next(self.numbers)}"
        base.mkdir()
        shared = mmap.mmap(-1, 8)  # the step at which it died, plus one
        children = {rank: self._fork(action, rank, base, shared, die_rank, point) for rank in (0, 1)}
        codes, deadline = {}, time.monotonic() + PATIENCE_S
        while children:
            for rank, pid in list(children.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                    del children[rank]
            is_late = time.monotonic() > deadline
            if is_late or (codes.get(die_rank) == -signal.SIGKILL and not leave_other):
                for pid in children.values():
                    os.kill(pid, signal.SIGKILL)
            if is_late:
                raise AssertionError(f"after {PATIENCE_S} s process {list(children)} still waits; the others: {codes}")
            time.sleep(0.001)
        errors = [path.read_text() for path in base.glob("error-*")]
        assert die_rank is not None or not errors, "\n".join(errors)
        results = []
        for rank in (0, 1):
            path = base / f"result-{rank}"
            results.append(pickle.loads(path.read_bytes()) if codes[rank] == 0 else None)
        shutil.rmtree(base)
        died_at = int.from_bytes(shared[:8], "little")
        return results, (died_at - 1 if died_at else None)

    def _fork(self, action, rank, base, shared, die_rank, point):
        from accelerate.state import AcceleratorState, GradientState, PartialState

        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", GLOO_SOCKET_IFNAME="lo")
            os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")  # nobody listens: the store is a file
            torch.set_num_threads(1)
            for state in (AcceleratorState, GradientState, PartialState):  # what other tests built in the parent
                state._reset_state()
            torch.distributed.init_process_group("gloo", init_method=f"file://{base}/store", rank=rank, world_size=2)
            trainers, left = [], point

            def die(kind, path, tear):
                nonlocal left
                left -= 1
                if left == 0:
                    if tear is not None:
                        tear()
                    shared[:8] = ((trainers[0].state.global_step if trainers else 0) + 1).to_bytes(8, "little")
                    os.kill(os.getpid(), signal.SIGKILL)

            if rank == die_rank:
                watch_files(die)
            result = action(rank, trainers)
            if rank != die_rank:
                (base / f"result-{rank}").write_bytes(pickle.dumps(result))
            code = 0
        except BaseException:
            (base / f"error-{rank}").write_text(traceback.format_exc())
        os._exit(code)
