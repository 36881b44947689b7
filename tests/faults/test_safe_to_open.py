"""Opening a checkpoint runs nothing, follows nothing out of its directory and stays small; tokens are written nowhere.

The corpus is opened in a process of its own, under an audit hook that Python calls before anything outside happens:
processes, sockets, files, pickle's look-ups of classes. Whoever made the corpus also made its manifests: a hash is no
proof of good will.
"""

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, os.path.dirname(__file__))

from runs import make_run

from trainwright.checkpoint.manifest import write_manifest

CANARY = "hf_CanaryThatMustNotLeak0123456789"
OPTIONS = {"max_steps": 2, "save_steps": 1}

# Opens each checkpoint given on the command line in every way there is, and reports what happened as JSON.
WATCHER = """
import json, os, resource, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
from runs import make_run
from trainwright.checkpoint.load import find_resumable
from trainwright.checkpoint.manifest import problems
from trainwright.cli import main
import trainwright.checkpoint.weights, trainwright.report.html

events, watching = [], False
FORBIDDEN = ("os.system", "subprocess.", "os.exec", "os.posix_spawn", "os.fork", "socket.", "pickle.find_class",
             "ctypes.dlopen", "urllib.")

def hook(event, args):
    if not watching:
        return
    if event == "open" and isinstance(args[0], (str, bytes)):
        path = os.fsdecode(args[0])
        if path.startswith("/dev/") or "outside" in os.path.basename(os.path.realpath(path)):
            events.append(["open", path])
    elif event.startswith(FORBIDDEN):
        events.append([event, repr(args)[:200]])

def too_long(*_):
    raise TimeoutError("opening it never ended")

def attempt(name, function):
    signal.alarm(20)
    try:
        function()
        said = ""
    except (ValueError, RuntimeError, OSError) as error:
        said = f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    return said

sys.addaudithook(hook)
signal.signal(signal.SIGALRM, too_long)
results = {}
devnull = open(os.devnull, "w")
for case in sys.argv[2:]:
    out = os.path.dirname(case)
    run = make_run(out, max_steps=2, save_strategy="no")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    events.clear()
    watching = True
    real, sys.stdout = sys.stdout, devnull
    said = {
        "problems": "; ".join(problems(case)),
        "check": attempt("check", lambda: main(["check", out])),
        "list": attempt("list", lambda: main(["list", out])),
        "resume": attempt("resume", lambda: run.train(resume_from_checkpoint=case)),
        "newest": attempt("newest", lambda: find_resumable(out, is_explicit=False)),
    }
    sys.stdout, watching = real, False
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    results[os.path.basename(out)] = {"said": said, "events": events[:], "grown_mib": grown}
print(json.dumps(results))
"""


class Trap:
    """Runs a command wherever a pickle of it is opened by a careless reader."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def sign(checkpoint):
    """Give a checkpoint a manifest that agrees with what now stands in it."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, manifest["step"], 1, manifest["position"])


def sparse(path, num_bytes):
    path.unlink(missing_ok=True)
    with open(path, "wb") as file:
        file.truncate(num_bytes)


def corpus(good, folder):
    """Name -> (checkpoint, whether it has a manifest that agrees)."""
    trap = folder / "outside-trap"
    secret = folder / "outside-secret"
    secret.write_bytes((good / "model.safetensors").read_bytes())
    made = {}

    def make(name, change, signed):
        checkpoint = Path(shutil.copytree(good, folder / name / "checkpoint-1"))
        change(checkpoint)
        if signed:
            sign(checkpoint)
        made[name] = checkpoint

    def pickled(file, **options):
        return lambda c: torch.save({"state": Trap(trap)}, c / file, **options)

    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        make(f"pickle in {file}", pickled(file), True)
        make(f"old pickle in {file}", pickled(file, _use_new_zipfile_serialization=False), True)

    def weights(checkpoint):
        (checkpoint / "model.safetensors").unlink()
        torch.save({"linear.weight": Trap(trap)}, checkpoint / "pytorch_model.bin")

    make("pickle as weights", weights, True)

    def foreign(checkpoint):
        weights(checkpoint)
        for file in ("manifest.json", "loop_state.json"):
            (checkpoint / file).unlink()

    make("pickle as weights without manifest", foreign, False)

    def without_manifest(change):
        def both(checkpoint):
            for file in ("manifest.json", "loop_state.json"):
                (checkpoint / file).unlink()
            change(checkpoint)

        return both

    def index(target):
        def change(checkpoint):
            (checkpoint / "model.safetensors").unlink()
            weight_map = {"linear.weight": target, "linear.bias": target}
            (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

        return change

    for number, target in enumerate((str(secret), f"../../{secret.name}", "/dev/zero", "a\\..\\b")):
        make(f"index to elsewhere {number}", index(target), True)
        make(f"index to elsewhere {number} without manifest", without_manifest(index(target)), False)

    def replaced(file, make_file):
        def change(checkpoint):
            (checkpoint / file).unlink()
            make_file(checkpoint / file)

        return change

    def device(path):
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero under another name
        except PermissionError:
            path.symlink_to("/dev/zero")

    kinds = {
        "link": lambda path: path.symlink_to(secret),
        "link to zeros": lambda path: path.symlink_to("/dev/zero"),
        "pipe": os.mkfifo,
        "device": device,
    }
    for file in ("manifest.json", "model.safetensors", "optimizer.pt", "trainer_state.json", "loop_state.json"):
        for kind, make_file in kinds.items():
            make(f"{kind} as {file}", replaced(file, make_file), False)
    for kind, make_file in kinds.items():
        make(
            f"{kind} as trainer_state.json without manifest",
            without_manifest(replaced("trainer_state.json", make_file)),
            False,
        )
    make("socket as loop_state.json", replaced("loop_state.json", bound_socket), False)

    def huge_header(checkpoint):
        (checkpoint / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")

    def huge_tensor(checkpoint):
        header = json.dumps({"linear.weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}})
        (checkpoint / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())

    def bomb(checkpoint):
        with zipfile.ZipFile(checkpoint / "optimizer.pt", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("optimizer/data.pkl", b"\0" * (1 << 28))
            archive.writestr("optimizer/version", "3")

    def nested(file):
        return lambda checkpoint: (checkpoint / file).write_text("[" * 200_000)

    make("huge header", huge_header, True)
    make("huge tensor", huge_tensor, True)
    make("compressed bomb", bomb, True)
    make("nested state", nested("trainer_state.json"), False)
    make("nested state without manifest", without_manifest(nested("trainer_state.json")), False)
    make("nested manifest", nested("manifest.json"), False)
    make("terabyte of manifest", lambda c: sparse(c / "manifest.json", 1 << 40), False)
    make(
        "terabyte of state without manifest",
        without_manifest(lambda c: sparse(c / "trainer_state.json", 1 << 40)),
        False,
    )
    make("terabyte of weights", lambda c: sparse(c / "model.safetensors", 1 << 40), False)
    return made, trap


def bound_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket may have 107 bytes only
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Each case -> what was said, which forbidden events were seen, and by how much memory grew."""
    folder = tmp_path_factory.mktemp("corpus")
    make_run(folder / "good", **OPTIONS).train()
    made, trap = corpus(folder / "good" / "checkpoint-1", folder)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WATCHER, os.path.dirname(__file__), *map(str, made.values())],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), trap


def test_every_file_of_the_corpus_is_refused_by_name(opened):
    results, _ = opened
    assert len(results) >= 50
    for case, result in results.items():
        assert result["said"]["resume"], f"{case} was loaded"
        assert "never ended" not in json.dumps(result["said"]), case
        signed_pickle = case.startswith(("pickle", "old pickle", "compressed", "index", "huge"))
        assert result["said"]["problems"] or signed_pickle, case
        for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "manifest.json"):
            if file in case:
                assert file in result["said"]["resume"], case


def test_nothing_is_run_looked_up_or_opened_outside(opened):
    results, trap = opened
    assert {case: result["events"] for case, result in results.items() if result["events"]} == {}
    assert not trap.exists()


def test_memory_does_not_follow_what_a_file_claims(opened):
    results, _ = opened
    assert {case: result["grown_mib"] for case, result in results.items() if result["grown_mib"] > 200} == {}


def test_the_corpus_is_dangerous_to_a_careless_reader(tmp_path):
    torch.save({"x": Trap(tmp_path / "touched")}, tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "touched").exists()


def everything_written(folder):
    """Every byte under `folder`, archives also unpacked, and every name."""
    for root, folders, files in os.walk(folder):
        for name in folders + files:
            yield name, name.encode()
        for name in files:
            path = os.path.join(root, name)
            yield path, Path(path).read_bytes()
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    for entry in archive.namelist():
                        yield f"{path}:{entry}", archive.read(entry)


SECRETIVE = """
import sys
sys.path.insert(0, sys.argv[1])
from runs import make_run
from trainwright.cli import main
out = sys.argv[3]
tokens = {"hub_token": sys.argv[2]} if sys.argv[4] == "new" else {"push_to_hub_token": sys.argv[2]}
if sys.argv[4] == "environment":
    tokens = {}
run = make_run(out, max_steps=4, save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
               report_to=["tensorboard"], logging_dir=out + "/logs", log_level="debug", **tokens)
print(run.args, run.args.to_json_string(), run.args.to_sanitized_dict())
run.train()
run.save_model()
run.save_state()
run.create_model_card()
run.train(resume_from_checkpoint=True)
main(["list", out]); main(["check", out]); main(["report", out])
try:
    make_run(out, max_steps=-7, save_steps=0, **tokens).train()
except Exception as error:
    print(error)
"""


@pytest.mark.parametrize("way", ["new", "old", "environment"])
def test_a_token_stands_in_no_byte_that_is_written_or_printed(tmp_path, way):
    pytest.importorskip("tensorboard")
    home = tmp_path / "home"
    home.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": str(home), "TMPDIR": str(home)}
    environment |= {"HF_HOME": str(home / "hf")}
    if way == "environment":
        environment["HF_TOKEN"] = CANARY
    done = subprocess.run(
        [sys.executable, "-c", SECRETIVE, os.path.dirname(__file__), CANARY, str(tmp_path / "out"), way],
        capture_output=True,
        env=environment,
        cwd=home,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    written = list(everything_written(tmp_path))
    assert any("tfevents" in name for name, _ in written) and any("training_args.bin:" in name for name, _ in written)
    secret = CANARY.encode()
    leaks = [name for name, content in written if secret in content]
    leaks += ["output"] * (secret in done.stdout) + ["errors"] * (secret in done.stderr)
    assert leaks == []
