"""The variables of each launcher, as its processes have them, and what torch reads of them."""

import logging

import pytest

from trainwright.args import TrainingArguments, launchers

SLURM_JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "gpu[007-009,12]-ib,login",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "6",
    "SLURM_TASKS_PER_NODE": "4,2",
}


def srun(rank, local_rank, node, **more):
    task = {"SLURM_PROCID": rank, "SLURM_LOCALID": local_rank, "SLURM_NODEID": node, "SLURM_STEP_ID": 0}
    step = {"SLURM_STEP_NUM_TASKS": 6, "SLURM_STEP_NUM_NODES": 2, "SLURM_STEP_TASKS_PER_NODE": "4,2"}
    return {**SLURM_JOB, **{name: str(value) for name, value in {**task, **step, **more}.items()}}


def mpi(names, rank, size, local_rank, local_size):
    return dict(zip(names.split(), map(str, (rank, size, local_rank, local_size)), strict=True))


OPEN_MPI = "OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_RANK OMPI_COMM_WORLD_LOCAL_SIZE"
LAUNCHERS = {
    "srun": ([srun(0, 0, 0), srun(5, 1, 1)], [(0, 6, 0, 4), (5, 6, 1, 2)], "gpu007-ib"),
    "srun on one node": (
        [srun(rank, rank, 0, SLURM_STEP_NUM_TASKS=2, SLURM_STEP_NUM_NODES=1) for rank in range(2)],
        [(0, 2, 0, 2), (1, 2, 1, 2)],
        "127.0.0.1",
    ),
    "Open MPI": ([mpi(OPEN_MPI, rank, 2, rank, 2) for rank in range(2)], [(0, 2, 0, 2), (1, 2, 1, 2)], "127.0.0.1"),
    "MPICH": (
        [mpi("PMI_RANK PMI_SIZE MPI_LOCALRANKID MPI_LOCALNRANKS", rank, 2, rank, 2) for rank in range(2)],
        [(0, 2, 0, 2), (1, 2, 1, 2)],
        "127.0.0.1",
    ),
    "mpirun in a Slurm job": (
        [{**srun(1, 0, 1, SLURM_STEP_NUM_TASKS=2), **mpi(OPEN_MPI, rank, 8, rank - 4, 4)} for rank in (4, 7)],
        [(4, 8, 0, 4), (7, 8, 3, 4)],
        "gpu007-ib",
    ),
    "submitit on one machine": (
        [
            {"SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": rank, "SUBMITIT_LOCAL_LOCALID": rank}
            for rank in "01"
        ],
        [(0, 2, 0, 2), (1, 2, 1, 2)],
        "127.0.0.1",
    ),
    "Kubeflow's PyTorchJob": (
        [
            {
                "WORLD_SIZE": "2",
                "RANK": rank,
                "MASTER_ADDR": "train-master-0",
                "MASTER_PORT": "23456",
                "KUBERNETES_SERVICE_HOST": "10.0.0.1",
            }
            for rank in "01"
        ],
        [(0, 2, 0, 1), (1, 2, 0, 1)],
        "train-master-0",
    ),
    "Kubeflow's Trainer": (
        [
            {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": rank, "PET_MASTER_ADDR": "node-0"}
            for rank in "01"
        ],
        [(0, 2, 0, 1), (1, 2, 0, 1)],
        "node-0",
    ),
    "SkyPilot": (
        [
            {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": rank, "SKYPILOT_NODE_IPS": "10.1.0.4\n10.1.0.5"}
            for rank in "01"
        ],
        [(0, 2, 0, 1), (1, 2, 0, 1)],
        "10.1.0.4",
    ),
    "by hand on one machine": (
        [{"WORLD_SIZE": "2", "RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": "1"} for rank in "01"],
        [(0, 2, 0, 2), (1, 2, 1, 2)],
        "localhost",
    ),
}
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_launcher_gives_ranks_and_a_place_to_meet(name):
    environments, expected, host = LAUNCHERS[name]
    ports = set()
    for environ, numbers in zip(environments, expected, strict=True):
        launchers.adopt(environ)
        assert tuple(int(environ[variable]) for variable in NAMES) == numbers
        assert environ["MASTER_ADDR"] == host
        ports.add(int(environ["MASTER_PORT"]))
        launchers.check(environ)
        again = dict(environ)
        launchers.adopt(again)
        assert again == environ
    assert len(ports) == 1 and 0 < ports.pop() < 32768  # from there on the system assigns ports itself


ALONE = {
    "nothing": {},
    "the script of sbatch": {**SLURM_JOB, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
    "the shell of salloc": SLURM_JOB,
    "the shell of salloc, an interactive step": srun(0, 0, 0, SLURM_STEP_ID=0xFFFFFFFA, SLURM_STEP_NUM_TASKS=1),
    "a shell by srun --pty": srun(0, 0, 0, SLURM_STEP_NUM_TASKS=1),
    "one task": srun(0, 0, 0, SLURM_STEP_NUM_TASKS=1, PMIX_RANK=0),
    "mpirun -n 1": mpi(OPEN_MPI, 0, 1, 0, 1),
    "four tasks that train alone": {**srun(3, 3, 0), "WORLD_SIZE": "1"},
    "one machine of SkyPilot": {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"},
    "one machine of Kubeflow": {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "auto", "PET_NODE_RANK": "0"},
}


@pytest.mark.parametrize("name", ALONE)
def test_a_process_that_was_started_alone_stays_alone(name):
    environ = dict(ALONE[name])
    launchers.adopt(environ)
    launchers.check(environ)
    assert environ == ALONE[name]


def test_the_variables_are_looked_at_once_and_again_where_one_has_changed(monkeypatch, tmp_path):
    looks = []
    find = launchers.find
    monkeypatch.setattr(launchers, "find", lambda environ: looks.append(1) or find(environ))
    for name, value in srun(0, 0, 0, SLURM_STEP_NUM_TASKS=1).items():
        monkeypatch.setenv(name, value)
    for _ in range(2):
        args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
        assert (args.world_size, args.process_index, args.local_process_index, args.local_rank) == (1, 0, 0, -1)
    assert len(looks) == 1
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.MonkeyPatch.context() as of_two:
        for name in (*NAMES, "MASTER_ADDR", "MASTER_PORT"):  # which are taken back
            of_two.setenv(name, "")
            of_two.delenv(name)
        assert (args.world_size, args.local_rank) == (2, 0)
        assert len(looks) == 2
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert (args.world_size, args.local_rank) == (1, -1)


def test_a_shell_that_somebody_types_into_stays_alone(monkeypatch):
    monkeypatch.setattr("sys.ps1", ">>> ", raising=False)
    environ = srun(0, 0, 0)
    launchers.adopt(environ)
    assert environ == srun(0, 0, 0)


def test_what_torchrun_set_inside_a_task_of_srun_is_left_alone():
    ranks = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}
    for place in ({"MASTER_ADDR": "a", "MASTER_PORT": "1"}, {}):
        environ = srun(0, 0, 0, SLURM_STEP_NUM_TASKS=2, **ranks, **place)
        before = dict(environ)
        launchers.adopt(environ)
        assert environ == before


def test_two_jobs_on_a_machine_meet_at_two_ports():
    ports = set()
    for job in range(4711, 4731):
        environ = srun(0, 0, 0, SLURM_JOB_ID=job)
        launchers.adopt(environ)
        ports.add(environ["MASTER_PORT"])
    assert len(ports) == 20


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[3-5]", "node3"),
        ("node[003-005,9]", "node003"),
        ("rack[2-3]n[7,9]-ib,x", "rack2n7-ib"),
        ("a-b.example.org", "a-b.example.org"),
    ],
)
def test_the_first_host_of_slurms_list_is_found(nodes, first):
    assert launchers.first_host(nodes) == first


TWO = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
WRONG = {
    "RANK=2 and WORLD_SIZE=2 do not fit": {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
    "LOCAL_RANK=1 and LOCAL_WORLD_SIZE=1 do not fit": {
        "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1",
    },
    "WORLD_SIZE=0 must be 1 or more": {"WORLD_SIZE": "0"},
    "WORLD_SIZE='two' must be a whole number": {"WORLD_SIZE": "two"},
    "RANK=1 says that there are other processes, but WORLD_SIZE is not set": {"RANK": "1"},
    "WORLD_SIZE=2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set: start the script with `torchrun": {
        "WORLD_SIZE": "2"
    },
    "WORLD_SIZE=8, but srun says 6": {**srun(0, 0, 0), "WORLD_SIZE": "8"},
    "RANK=0, but srun says 5": {**srun(5, 1, 1), "RANK": "0"},
    "MASTER_ADDR not set: start": {**TWO, "MASTER_ADDR": "", "MASTER_PORT": "29500"},
    "MASTER_PORT='http' must be a whole number": {**TWO, "MASTER_ADDR": "a", "MASTER_PORT": "http"},
    "MASTER_PORT=99999 is no port": {**TWO, "MASTER_ADDR": "a", "MASTER_PORT": "99999"},
    "MASTER_ADDR, MASTER_PORT not set: mpirun (Open MPI) does not say it": mpi(OPEN_MPI, 5, 8, 1, 4),
    "PMIX_RANK=1 says that a process manager started this process, but not how many": {"PMIX_RANK": "1"},
    "make the command `torchrun script.py`": {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "8", "PET_NODE_RANK": "0"},
    "torchrun --nnodes=2 --node-rank=$SKYPILOT_NODE_RANK --nproc-per-node=8 --master-addr=10.1.0.4": {
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_IPS": "10.1.0.4\n10.1.0.5",
    },
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_variables_that_do_not_fit_are_named_with_a_remedy(message):
    environ = dict(WRONG[message])
    with pytest.raises(ValueError) as caught:
        launchers.adopt(environ)
        launchers.check(environ)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("WORLD_SIZE", "world_size"),
        ("RANK", "process_index"),
        ("LOCAL_RANK", "local_process_index"),
        ("LOCAL_RANK", "local_rank"),
    ],
)
def test_a_rank_that_is_no_number_is_named_wherever_it_is_read(monkeypatch, name, read):
    for variable, value in {**TWO, "MASTER_ADDR": "a", "MASTER_PORT": "29500", name: "1.0"}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=rf"{name}='1\.0' must be a whole number"):
        getattr(TrainingArguments("out", report_to="none"), read)


def test_a_script_that_reads_its_local_rank_gets_that_of_srun(monkeypatch):
    for name, value in srun(5, 1, 1).items():
        monkeypatch.setenv(name, value)
    for name in (*NAMES, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that monkeypatch removes what is set now
        monkeypatch.delenv(name)
    args = TrainingArguments("out", report_to="none")
    assert (args.local_rank, args.process_index, args.world_size, args.should_save) == (1, 5, 6, False)


# -- accelerate launch -------------------------------------------------------------------------------------------------

OF_LAUNCH = {"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_DYNAMO_MODE": "default", "ACCELERATE_MIXED_PRECISION": "no"}


def adopted(environ, **options):
    args = TrainingArguments("out", report_to="none", **options)
    launchers.adopt_accelerate(args, {**OF_LAUNCH, **environ})
    return args


def test_what_accelerate_launch_was_told_holds_where_the_arguments_say_nothing():
    args = adopted({"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "True"})
    assert (args.bf16, args.fp16, args.use_cpu, args.mixed_precision) == (True, False, True, "bf16")
    args = adopted({"ACCELERATE_DYNAMO_BACKEND": "AOT_EAGER", "ACCELERATE_DYNAMO_MODE": "reduce-overhead"})
    compiled = (args.torch_compile, args.torch_compile_backend, args.torch_compile_mode)
    assert compiled == (True, "aot_eager", "reduce-overhead")
    args = adopted({})
    assert (args.bf16, args.fp16, args.use_cpu, args.torch_compile) == (False, False, False, False)


def test_arguments_that_say_something_win_over_accelerate_launch():
    args = adopted({"ACCELERATE_MIXED_PRECISION": "fp16"}, bf16=True)
    assert (args.bf16, args.fp16) == (True, False)


def test_a_precision_that_other_code_left_in_the_environment_is_not_that_of_a_run():
    args = TrainingArguments("out", report_to="none")
    launchers.adopt_accelerate(args, {"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert args.mixed_precision == "no"


def test_a_precision_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="mixed_precision=fp8"):
        adopted({"ACCELERATE_MIXED_PRECISION": "fp8"})


def test_one_process_where_accelerate_launch_was_asked_for_several_is_said(caplog):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    with caplog.at_level(logging.WARNING, "trainwright"):
        adopted({**place, "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"})
        adopted({})
        assert not caplog.records
        adopted(place)
    assert "started this one alone" in caplog.text and "torchrun" in caplog.text
