"""`trainwright run`: a program runs as `python program` would, on our Trainer.

Nothing here depends on the release of `transformers`, so it runs with the newest alone.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
PROGRAMS = Path(__file__).parent / "programs"
pytestmark = pytest.mark.skipif(
    importlib.metadata.version("transformers").startswith("4."), reason="proved with the newest transformers"
)


def python(*arguments, cwd):
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_a_script_finds_its_arguments_its_folder_and_itself_also_in_spawned_processes(tmp_path):
    done = python("-m", "trainwright", "run", "--", PROGRAMS / "processes.py", "spawn", "-m", "--help", cwd=tmp_path)
    assert done.returncode == 7, done.stderr[-4000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers["argv"] == ["spawn", "-m", "--help"]
    assert answers["argv[0]"] and answers["path"] and answers["pickle"]
    assert answers["main"] == [True, True, True]
    assert answers["trainer"] == ["trainwright.trainer", []]  # trackers are off by default since 5.0
    engine = "trainwright.trainer"
    assert answers["children"] == {m: [engine, engine, "__mp_main__", True] for m in ("spawn", "forkserver")}


def test_a_module_runs_as_python_m_would(tmp_path):
    done = python("-m", "trainwright", "run", "-m", "processes", "as module", cwd=PROGRAMS)
    assert done.returncode == 7, done.stderr[-4000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers["argv"] == ["as module"] and answers["argv[0]"] and answers["path"]
    assert answers["main"] == [True, False, True] and answers["trainer"][0] == "trainwright.trainer"


@pytest.mark.slow
def test_torchrun_starts_it_in_two_processes_that_share_the_data(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone"]
    done = python(*launcher, "-m", "trainwright", "run", PROGRAMS / "replicas.py", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    both = [json.loads((tmp_path / "out" / f"process-{rank}.json").read_text()) for rank in (0, 1)]
    samples = 3 * 4  # updates x samples per process
    assert [one["seen"] for one in both] == [samples, samples]
    assert all(one["world"] == 2 and one["engine"] == "trainwright.trainer" for one in both)
    assert len(both[0]["losses"]) == 3 and both[0]["losses"] == both[1]["losses"]
    assert (tmp_path / "out" / "checkpoint-3" / "manifest.json").is_file()


def test_pytest_runs_a_suite_on_our_trainer(tmp_path):
    (tmp_path / "conftest.py").write_text("from transformers import Trainer\nENGINE = Trainer.__module__\n")
    (tmp_path / "test_it.py").write_text(
        "import conftest\nfrom transformers import TrainerState\n\n"
        "def test_engine():\n    assert {conftest.ENGINE, TrainerState.__module__} == "
        "{'trainwright.trainer', 'trainwright.state'}\n"
    )
    done = python("-m", "pytest", "-q", "-p", "trainwright.dropin", "-p", "no:cacheprovider", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "needs a program"),
        (["no_such_file.py"], "there is no file no_such_file.py"),
        (["-m", "no_such.module"], "there is no module 'no_such.module'"),
    ],
)
def test_a_program_that_is_not_there_is_named(arguments, words, capsys):
    from trainwright.cli import main

    path = sys.path[0]
    try:
        assert main(["run", *arguments]) == 2
    finally:
        sys.path[0] = path
    assert words in capsys.readouterr().err


def test_the_help_of_run_shows_how_to_start_it(capsys):
    from trainwright.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["run", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for words in (
        "trainwright run train.py",
        "-m MODULE",
        "torchrun",
        "accelerate launch",
        "pytest -p trainwright.dropin",
    ):
        assert words in text
