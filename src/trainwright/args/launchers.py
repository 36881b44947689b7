"""What started this process, from environment variables: its ranks, where the processes meet, what `accelerate launch`
asks for.

Owns: the variables of each launcher (srun, mpirun, submitit, Kubeflow, SkyPilot, accelerate), and writing what they say
into those that torch and accelerate read: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
Leaves to others: meeting (`rendezvous`), which engine trains (`parallel/engine_choice`). Stdlib only.

torchrun, `accelerate launch`, the deepspeed launcher, Ray Train and Kubeflow's PyTorchJob set those six themselves.
What is set is never changed: WORLD_SIZE=1 makes a process train alone, however it was started.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainwright.args.training import TrainingArguments

logger = logging.getLogger(__name__)

DEFAULT_PORT = 29500  # torchrun's and accelerate's
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Slurm numbers the steps that no srun started (batch script, external, interactive) from the top of 32 bits.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
_MPI = (  # launcher, then the variables of rank, world size, local rank, local world size
    ("mpirun (Open MPI)", *(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    ("mpirun (MVAPICH)", *(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    ("mpiexec (MPICH)", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("mpiexec (PALS)", "PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
)
_adopted: dict[str, str] | None = None  # the variables as `adopt` last left them


@dataclass(frozen=True)
class Launch:
    """One of the processes that a launcher started."""

    launcher: str  # as messages name it
    rank: int
    world_size: int
    local_rank: int | None = None  # None: the launcher does not say
    local_world_size: int | None = None
    host: str | None = None  # of rank 0; None: the launcher does not say
    job: str = ""  # the same in all processes of the job, and another one in other jobs; "": the launcher does not say

    @property
    def address(self) -> str | None:
        """Where rank 0 can be reached."""
        return "127.0.0.1" if self.local_world_size == self.world_size else self.host

    @property
    def port(self) -> int:
        """Derived from the job, so that two jobs on a machine do not meet; below the ports that systems assign."""
        return 10000 + zlib.crc32(self.job.encode()) % 19000 if self.job else DEFAULT_PORT


def adopt(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set what torch and accelerate read, where a launcher said it in other variables. Does nothing in a process that
    was started alone, nor in an interactive one.

    Asked whenever a rank is read, more than a hundred times in a start: it looks again where a variable has changed.
    Raises ValueError where the variables contradict each other, or ask for processes that nobody started.
    """
    global _adopted
    raw = getattr(environ, "_data", environ)  # `os.environ` would decode each of them to be compared
    if raw == _adopted or _is_interactive():
        return
    _adopt(environ)
    _adopted = dict(raw)


def _adopt(environ: MutableMapping[str, str]) -> None:
    given = environ.get("WORLD_SIZE")
    has_ranks = given is not None and "RANK" in environ and "LOCAL_RANK" in environ
    if given == "1" or (has_ranks and "MASTER_ADDR" in environ):
        return
    found = find(environ)
    if given is None and (found is None or found.world_size == 1):
        return
    if found is None or found.world_size == 1:
        found = _by_hand(environ)
        if found is None:
            return
    if has_ranks and str(found.world_size) != given:  # torchrun's, in a task of srun
        return
    for name, value in (("WORLD_SIZE", found.world_size), ("RANK", found.rank)):
        if environ.setdefault(name, str(value)) != str(value):
            raise ValueError(
                f"{name}={environ[name]}, but {found.launcher} says {value}: unset {name}, or set WORLD_SIZE=1 to "
                "train in this process alone."
            )
    if found.local_rank is not None:
        environ.setdefault("LOCAL_RANK", str(found.local_rank))
    if found.local_world_size is not None:
        environ.setdefault("LOCAL_WORLD_SIZE", str(found.local_world_size))
    if found.address is not None:
        environ.setdefault("MASTER_ADDR", found.address)
    if "MASTER_ADDR" in environ:
        environ.setdefault("MASTER_PORT", str(found.port))


def find(environ: Mapping[str, str]) -> Launch | None:
    """What the variables of a launcher other than torchrun say; None where there are none.

    mpirun comes before srun, which starts the daemons of mpirun inside a Slurm job and leaves its variables there.
    """
    readers = (_mpi, _slurm, _submitit, _pmi_alone, _kubeflow, _skypilot)
    return next((found for found in (read(environ) for read in readers) if found is not None), None)


def check(environ: Mapping[str, str] = os.environ) -> None:
    """Raise ValueError for ranks that cannot be, and for some that are set without the others."""
    values = {name: number(environ, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    size = values["WORLD_SIZE"]
    if size is not None and size < 1:
        raise ValueError(f"WORLD_SIZE={size} must be 1 or more: it is the number of processes.")
    for name, of in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        rank, limit = values[name], values[of]
        if rank is not None and (rank < 0 or (limit is not None and rank >= limit)):
            raise ValueError(
                f"{name}={rank} and {of}={limit} do not fit: ranks count from 0 to {of} - 1. Start the script with "
                "`torchrun --nproc-per-node N script.py`, which sets both."
            )
        if rank and size is None:
            raise ValueError(
                f"{name}={rank} says that there are other processes, but WORLD_SIZE is not set, so this one would "
                f"train alone: start the script with `torchrun --nproc-per-node N script.py`, or unset {name}."
            )
    if size is None or size == 1:
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    port = None if missing else number(environ, "MASTER_PORT")
    if port is not None and not 0 < port < 2**16:
        raise ValueError(f"MASTER_PORT={port} is no port: set it to a free one from 1024 to 65535, the same in all.")
    if missing:
        raise ValueError(f"WORLD_SIZE={size}, but {', '.join(missing)} not set: {_remedy(missing, find(environ))}")


def _remedy(missing: list[str], launch: Launch | None) -> str:
    if launch is None:
        return (
            "start the script with `torchrun --nproc-per-node N script.py` or `accelerate launch`, which set all of "
            "them, or unset WORLD_SIZE."
        )
    pairs = {"RANK": "N", "LOCAL_RANK": "N", "MASTER_ADDR": "HOST_OF_RANK_0", "MASTER_PORT": str(DEFAULT_PORT)}
    return (
        f"{launch.launcher} does not say it. Set it in every process ("
        f"{' '.join(f'{name}={pairs[name]}' for name in missing)}; Open MPI passes a variable on with "
        "`mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500`), or WORLD_SIZE=1 to train in each process alone."
    )


def number(environ: Mapping[str, str], name: str) -> int | None:
    """The variable `name`; None where it is not set."""
    text = environ.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"The environment variable {name}={text!r} must be a whole number.") from None


def _first_number(environ: Mapping[str, str], *names: str) -> int | None:
    return next((found for found in (number(environ, name) for name in names) if found is not None), None)


def _is_interactive() -> bool:
    """Somebody types here, in a shell or notebook: this process is not one of several, whatever started its shell."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", None)  # not there yet while another thread imports it
    return hasattr(sys, "ps1") or (shell is not None and shell() is not None)


# -- launchers ---------------------------------------------------------------------------------------------------------


def _mpi(environ: Mapping[str, str]) -> Launch | None:
    for launcher, rank, size, local_rank, local_size in _MPI:
        if rank in environ and size in environ and local_rank in environ:
            numbers = [number(environ, name) for name in (rank, size, local_rank, local_size)]
            job = environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid") or _slurm_job(environ)
            host = _host_of_batch_system(environ)
            return Launch(launcher, numbers[0] or 0, numbers[1] or 1, numbers[2], numbers[3], host, job)
    return None


def _pmi_alone(environ: Mapping[str, str]) -> Launch | None:
    """Process managers that do not say the local rank, or not even how many processes there are."""
    if "PMI_RANK" in environ and "PMI_SIZE" in environ:
        rank, size = number(environ, "PMI_RANK"), number(environ, "PMI_SIZE")
        return Launch("the process manager (PMI)", rank or 0, size or 1, host=_host_of_batch_system(environ))
    if "PMIX_RANK" in environ and "WORLD_SIZE" not in environ:
        raise ValueError(
            f"PMIX_RANK={environ['PMIX_RANK']} says that a process manager started this process, but not how many "
            "there are: set WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in every process, or WORLD_SIZE=1 to "
            "train in each alone."
        )
    return None


def _slurm(environ: Mapping[str, str]) -> Launch | None:
    """A task of srun. The script of sbatch and the shell of salloc have the variables of the job, too, but are no task:
    they have no step, or a special one."""
    rank = number(environ, "SLURM_PROCID")
    if rank is None:
        return None
    step = _first_number(environ, "SLURM_STEP_ID", "SLURM_STEPID")
    if (step is None and rank == 0) or (step is not None and not 0 <= step < _FIRST_SPECIAL_STEP):
        return None
    size = _first_number(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS") or 1
    counts = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or ""
    num_nodes = _first_number(environ, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
    here = size if num_nodes == 1 else _tasks_of_node(counts, number(environ, "SLURM_NODEID"))
    local_rank = number(environ, "SLURM_LOCALID")
    return Launch("srun", rank, size, local_rank, here, _host_of_batch_system(environ), _slurm_job(environ))


def _slurm_job(environ: Mapping[str, str]) -> str:
    job = environ.get("SLURM_JOB_ID") or environ.get("SLURM_JOBID")
    return f"{job}.{environ.get('SLURM_STEP_ID', '')}" if job else ""


def _tasks_of_node(counts: str, node: int | None) -> int | None:
    """How many tasks node number `node` has, from "4(x2),3": two nodes with 4 tasks and one with 3."""
    expanded: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        expanded += [int(number)] * min(int(times or 1), 1 << 20)
    return expanded[node] if node is not None and node < len(expanded) else None


def _host_of_batch_system(environ: Mapping[str, str]) -> str | None:
    """The first node of a Slurm step or job, or of a PBS job, where rank 0 runs."""
    nodes = next((environ[name] for name in _NODE_LISTS if environ.get(name)), None)
    if nodes:
        return first_host(nodes)
    try:
        with open(environ["PBS_NODEFILE"], encoding="utf-8") as file:
            return file.readline().strip() or None
    except (KeyError, OSError):
        return None


_NODE_LISTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")


def first_host(nodes: str) -> str:
    """The first of Slurm's list of hosts: "gpu[007-009,12]-ib,login" begins with "gpu007-ib"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes.strip())
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group() if first else "")


def _submitit(environ: Mapping[str, str]) -> Launch | None:
    """submitit's local executor; on Slurm it starts tasks by srun."""
    if "SUBMITIT_LOCAL_GLOBALID" not in environ:
        return None
    size = number(environ, "SUBMITIT_LOCAL_NTASKS") or 1
    rank, local_rank = (number(environ, f"SUBMITIT_LOCAL_{name}") for name in ("GLOBALID", "LOCALID"))
    return Launch("submitit", rank or 0, size, local_rank, size, job=environ.get("SUBMITIT_LOCAL_JOB_ID", ""))


def _kubeflow(environ: Mapping[str, str]) -> Launch | None:
    """Kubeflow's Trainer, which tells torchrun by PET_ variables what to start on each of several machines."""
    nodes, per_node = environ.get("PET_NNODES", "1"), environ.get("PET_NPROC_PER_NODE", "1")
    if "WORLD_SIZE" in environ or (nodes == "1" and not (per_node.isdigit() and int(per_node) > 1)):
        return None
    rank = number(environ, "PET_NODE_RANK")
    if not nodes.isdigit() or per_node != "1" or rank is None:
        raise ValueError(
            f"PET_NNODES={nodes} and PET_NPROC_PER_NODE={per_node} tell torchrun to start the processes, and plain "
            "python would train in one alone: make the command `torchrun script.py`, or set WORLD_SIZE=1."
        )
    return Launch("Kubeflow", rank, int(nodes), 0, 1, environ.get("PET_MASTER_ADDR"), environ.get("PET_RDZV_ID", ""))


def _skypilot(environ: Mapping[str, str]) -> Launch | None:
    """A command that SkyPilot runs on each of several machines."""
    size, rank = number(environ, "SKYPILOT_NUM_NODES"), number(environ, "SKYPILOT_NODE_RANK")
    if rank is None or size is None or size < 2:
        return None
    num_gpus = number(environ, "SKYPILOT_NUM_GPUS_PER_NODE") or 0
    hosts = environ.get("SKYPILOT_NODE_IPS", "").split()
    if num_gpus > 1 and "WORLD_SIZE" not in environ:
        raise ValueError(
            f"SkyPilot started this command on {size} machines with {num_gpus} GPUs each, and plain python is one "
            f"process: make it `torchrun --nnodes={size} --node-rank=$SKYPILOT_NODE_RANK --nproc-per-node={num_gpus} "
            f"--master-addr={hosts[0] if hosts else 'HOST'} script.py`, or set WORLD_SIZE=1 to train on each machine "
            "alone."
        )
    job = environ.get("SKYPILOT_TASK_ID", "")
    return Launch("SkyPilot", rank, size, 0, 1, hosts[0] if hosts else None, job)


def _by_hand(environ: Mapping[str, str]) -> Launch | None:
    """WORLD_SIZE and RANK without LOCAL_RANK: one process in each of several pods (Kubeflow's PyTorchJob), or all on
    this machine."""
    size, rank = number(environ, "WORLD_SIZE"), number(environ, "RANK")
    if size is None or rank is None:
        return None
    if "KUBERNETES_SERVICE_HOST" in environ or "PET_NNODES" in environ:
        return Launch("Kubernetes", rank, size, 0, 1)
    if environ.get("MASTER_ADDR") in LOOPBACK:
        return Launch("MASTER_ADDR", rank, size, rank, size)
    return None


# -- restarts ----------------------------------------------------------------------------------------------------------


def jobs(environ: Mapping[str, str] = os.environ) -> dict[str, bool]:
    """The jobs that this process is part of and that outlive it, by a name that all their lives share, and whether this
    is not the first life: of torchrun with `--max-restarts`, and of Slurm, which puts jobs back into its queue."""
    found = {}
    run = environ.get("TORCHELASTIC_RUN_ID")
    if run == "none":  # without --rdzv-id: the address, and when the agent, which restarts its workers, has begun
        began = _start_of_parent()
        run = f"{environ.get('MASTER_ADDR')}:{environ.get('MASTER_PORT')} {began}" if began else None
    if run:
        found[f"torchrun {run}"] = (number(environ, "TORCHELASTIC_RESTART_COUNT") or 0) > 0
    if job := _slurm_job(environ):
        found[f"slurm {job}"] = (number(environ, "SLURM_RESTART_COUNT") or 0) > 0
    return found


def _start_of_parent() -> str | None:
    """Number of the parent process and when it began, in ticks since the machine did; None where that is not known."""
    try:
        with open(f"/proc/{os.getppid()}/stat", encoding="utf-8") as file:
            return f"{os.getppid()}:{file.read().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return None


# -- accelerate launch -------------------------------------------------------------------------------------------------


def adopt_accelerate(args: TrainingArguments, environ: Mapping[str, str] = os.environ) -> None:
    """Take over into `args` what the configuration file or the flags of `accelerate launch` say, where `args` say
    nothing: the CPU, the precision, compilation.

    Only in a process that `accelerate launch` started: other code leaves ACCELERATE_MIXED_PRECISION behind.
    """
    if not {"ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_USE_DEEPSPEED"} & environ.keys():
        return
    changed: dict[str, bool | str] = {}
    if environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1") and not args.use_cpu:
        changed["use_cpu"] = True
    precision = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision == "fp8":
        raise ValueError(
            "`accelerate launch` asks for mixed_precision=fp8 (ACCELERATE_MIXED_PRECISION), which this release does "
            "not do: pass --mixed_precision bf16."
        )
    if precision in ("bf16", "fp16") and args.mixed_precision == "no":
        changed[precision] = True
    backend = environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").lower()
    if backend != "no" and not args.torch_compile:
        mode = environ.get("ACCELERATE_DYNAMO_MODE", "default")
        changed |= {"torch_compile": True, "torch_compile_backend": backend}
        changed |= {} if mode == "default" else {"torch_compile_mode": mode}
    if changed:
        for name, value in changed.items():
            setattr(args, name, value)
        args.__post_init__()  # which validates them together
        logger.info("From `accelerate launch`: %s.", ", ".join(f"{name}={value}" for name, value in changed.items()))
    if {"MASTER_ADDR", "MASTER_PORT"} <= environ.keys() and not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & environ.keys():
        logger.warning(
            "`accelerate launch` was asked for several processes and has started this one alone, as it does on a CPU "
            "(MULTI_CPU): it trains on all the data. For several use `torchrun --nproc-per-node N script.py`, or a "
            "hostfile (--mpirun_hostfile)."
        )
