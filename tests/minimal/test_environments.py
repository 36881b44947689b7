"""Does the project work where only what the user asked for is installed? Run by `make test-minimal`.

Each test is an environment of its own: what `pip install .` brings (made once, by make) and one extra on top of it. The
newest releases that pip finds are tested; `constraints.txt` beside this file pins those that were tried.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent
PROJECT = HERE.parents[1]
ROOT = Path(os.environ["TRAINWRIGHT_MINIMAL"])
BASE = ROOT / "base" / "bin" / "python"
SMOKE = str(HERE / "smoke.py")
OWN_DATA = {"digits", "language_model"}  # examples that bring their own
FOR_DEVELOPERS = {"test", "bench", "dev"}
# Minutes of pip or hundreds of megabytes each. `.ci/run` leaves them out.
HEAVY = {"azureml", "dagshub", "deepspeed", "dvclive", "flyte", "liger", "mlflow", "ray"}
EXTRAS = sorted(
    set(tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]) - FOR_DEVELOPERS
)
# Liger's kernels are for models of transformers, which nobody has without that extra.
TOGETHER = {"liger": "liger,transformers"}
# What nothing misses: a peft model comes with its package; Liger's own test is `tests/unit/interop/test_liger.py`.
NEEDS_NOTHING = {"peft", "liger"}

pytestmark = pytest.mark.timeout(900)  # pip, on a machine that does other things


def run(python: Path, *arguments: str, directory: Path) -> str:
    """Run the smoke script in an environment that shares no setting with this one; what it printed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TRAINWRIGHT"))}
    done = subprocess.run(
        [str(python), *arguments], cwd=directory, env=clean, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, f"{' '.join(arguments)}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture
def environment(tmp_path):
    """A function: an environment with one extra on top of the base; removed after the test."""

    def make(extra: str) -> Path:
        folder = tmp_path / "environment"
        venv.create(folder, with_pip=False)
        packages = next(folder.glob("lib/python3*/site-packages"))
        (packages / "base.pth").write_text(str(next((ROOT / "base").glob("lib/python3*/site-packages"))))
        python = folder / "bin" / "python"
        (wheel,) = ROOT.glob("trainwright-*.whl")
        # Uncompiled: most of what comes is never imported.
        install = ["-m", "pip", "install", "-q", "--no-compile", "-c", str(HERE / "constraints.txt")]
        run(python, *install, f"{wheel}[{TOGETHER.get(extra, extra)}]", directory=tmp_path)
        assert not (packages / "torch").exists(), f"{extra} pulled another torch"
        return python

    yield make
    shutil.rmtree(tmp_path / "environment", ignore_errors=True)


def test_what_needs_no_extra_works_without_any(tmp_path):
    run(BASE, SMOKE, "with", "bare", directory=tmp_path)


@pytest.mark.parametrize(
    "extra", [pytest.param(extra, marks=[pytest.mark.heavy] if extra in HEAVY else []) for extra in EXTRAS]
)
def test_an_extra_brings_all_that_its_feature_needs(extra, environment, tmp_path):
    run(environment(extra), SMOKE, "with", extra, directory=tmp_path)


@pytest.fixture(scope="module")
def messages(tmp_path_factory) -> dict[str, str]:
    """Extra -> what is said where it is missing, in the environment without any."""
    directory = tmp_path_factory.mktemp("without")
    return json.loads(run(BASE, SMOKE, "without", directory=directory).splitlines()[-1])


@pytest.mark.parametrize("extra", sorted(set(EXTRAS) - NEEDS_NOTHING))
def test_a_missing_extra_is_an_error_with_its_pip_command(extra, messages):
    assert f"pip install 'trainwright[{extra}]'" in messages[extra], messages[extra]


@pytest.mark.parametrize(
    "script, package",
    [
        ("token_classification", "seqeval"),
        ("speech_recognition", "jiwer"),
        ("image_classification", "PIL"),
        ("digits", "sklearn"),
        ("language_model", "transformers"),
        ("text_classification", "datasets"),
    ],
)
def test_an_example_names_a_missing_package_before_it_reads_data(script, package, tmp_path):
    arguments = [] if script in OWN_DATA else ["--model_name_or_path", "none", "--train_file", "train.csv", "--plan"]
    (tmp_path / "train.csv").write_text("text,label\nred,0\n")
    done = subprocess.run(
        [str(BASE), str(PROJECT / "examples" / f"{script}.py"), *arguments, "--do_train", "--output_dir", "out"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert repr(package) in done.stderr and "pip install 'trainwright[" in done.stderr
    assert "Traceback" not in done.stderr
