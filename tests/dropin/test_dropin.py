"""The Trainer stack of the installed `transformers` is ours: proofs in fresh processes.

Each process answers many questions at once (`programs/`), since starting one costs seconds. `make test` runs this with
4.55 and with the newest release.
"""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
PROGRAMS = Path(__file__).parent / "programs"
SURFACE = json.loads((Path(__file__).parent.parent / "surface" / "data" / "arguments.json").read_text())

# What a replaced module still defines itself, and why: anything else would be a name that nobody decided about.
STAYS_THEIRS = {
    "helpers of tokenizers and models, not of training": "align_special_tokens _align_special_token _is_peft_model "
    "suppress_progress_bars validate_quantization_for_training get_xla_device_type",
    "whether a package is installed": "is_azureml_available is_clearml_available is_codecarbon_available "
    "is_comet_available is_dagshub_available is_dvclive_available is_flyte_deck_standard_available "
    "is_flytekit_available is_kubeflow_available is_mlflow_available is_neptune_available is_optuna_available "
    "is_ray_available is_ray_tune_available is_sigopt_available is_swanlab_available is_tensorboard_available "
    "is_trackio_available is_wandb_available",
    "helpers that take no trainer": "hp_params save_model_architecture_to_file WandbLogModel "
    "NeptuneMissingConfiguration activate_neftune deactivate_neftune DebugUnderflowOverflow detect_overflow "
    "get_abs_min_max format_time html_progress_bar text_to_html_table",
    "types for annotations": "DataClass DataClassType _T",
    "private": "_convert_str_dict _get_fsdp_ckpt_kwargs _require _get_constant_lambda "
    "_get_constant_schedule_with_warmup_lr_lambda _get_cosine_schedule_with_warmup_lr_lambda "
    "_get_cosine_with_hard_restarts_schedule_with_warmup_lr_lambda "
    "_get_cosine_with_min_lr_schedule_with_warmup_lr_rate_lambda _get_inverse_sqrt_schedule_lr_lambda "
    "_get_linear_schedule_with_warmup_lr_lambda _get_polynomial_decay_schedule_with_warmup_lr_lambda "
    "_get_wsd_scheduler_lambda",
}
THEIRS = {name for names in STAYS_THEIRS.values() for name in names.split()}


def python(*arguments, cwd=None, **environment):
    """Run Python in a fresh process; returns it when it is done."""
    variables = {**os.environ, "PYTHONPATH": python_path(), "PYTHONWARNINGS": "ignore", **environment}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=variables, cwd=cwd, capture_output=True, text=True, timeout=280
    )


def python_path():
    """The current one made absolute, so that another working directory finds the same packages."""
    return os.pathsep.join(os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path)


def answers_of(program, cwd):
    done = python(PROGRAMS / f"{program}.py", cwd=cwd)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def early(tmp_path_factory):
    return answers_of("early", tmp_path_factory.mktemp("early"))


@pytest.fixture(scope="module")
def late(tmp_path_factory):
    return answers_of("late", tmp_path_factory.mktemp("late"))


# -- installed at the start ----


def test_every_name_of_the_table_is_ours_in_its_module_and_in_the_package(early):
    assert early["not ours"] == []
    assert {module.partition(".")[0] for module in early["package"]} == {"trainwright"}


def test_a_name_that_stays_theirs_is_listed_with_its_reason(early):
    left = {name for names in early["still theirs"].values() for name in names}
    assert left <= THEIRS


def test_every_documented_name_of_both_generations_can_be_imported(early):
    assert {name.rpartition(".")[2] for name in early["absent"]} <= THEIRS


def test_classes_of_a_program_derive_from_ours_and_are_recognised(early):
    assert early["isinstance"] == [True] * 8


def test_arguments_and_enums_survive_pickling_and_copying(early):
    assert early["pickled"] == [True] * 5


def test_replacing_a_field_of_derived_arguments_keeps_the_others(early):
    assert early["replaced"] == [1e-3, 5, 0.5, 10]
    assert early["first argument"] == "out"
    assert early["parsed"] == [1.0, "o"]


def test_a_field_that_only_we_have_too_is_named_and_packing_is_left_to_the_program(early):
    packing, warned = early["namesakes"]
    assert packing == ["tight", False, True]
    ((message, is_at_its_line),) = warned
    assert message.startswith("Namesakes defines ema_decay, which is an argument of trainwright") and is_at_its_line


def test_defaults_are_those_of_the_installed_generation(early):
    generation = "5.23" if early["version"].startswith("5.") else "4.55"
    expected = SURFACE[generation]["TrainingArguments"]
    plain = {name: value for name, value in expected.items() if not isinstance(value, dict)}
    assert {name: early["defaults"][name] for name in plain} == plain
    assert early["without arguments"]


# -- installed late, and taken out again ----


def test_names_that_loaded_modules_hold_are_replaced(late):
    assert late["in this program"] == [True, True]
    assert late["in another module"] and late["arguments in another module"] and late["table"] and late["active"]


def test_a_class_derived_too_early_is_named_in_a_warning(late):
    (message,) = late["warning"]
    assert "__main__.DerivedTrainer" in message and "__main__.DerivedArguments" in message
    assert "EarlierCallback" not in message


def test_a_callback_and_arguments_made_before_are_taken_over(late):
    assert late["run"] == [4, 4, 2]
    assert late["taken over"]["class"]
    assert late["taken over"]["values"] == [3e-4, "cosine", 2]
    assert late["taken over"]["config"] is False


def test_uninstalling_puts_every_name_back(late):
    assert late["restored"] == [] and late["left behind"] == []
    assert late["another module is theirs again"] and not late["active after"] and late["default arguments"]


CALLED_OTHERWISE = {
    "metrics_format(self)",  # a method in 4.55, a function in 5: ours is called in both ways, by position
    "metrics_format(metrics)",
    "rewrite_logs(d)",  # called by position everywhere
    "distributed_broadcast_scalars(device)",  # a GPU there, where there may be none; None finds the device
}


def test_a_replaced_function_has_the_parameters_and_defaults_of_the_installed_one(late):
    assert set(late["called otherwise"]) - CALLED_OTHERWISE == set()


# -- messages ----


def test_messages_follow_the_verbosity_and_the_loggers_of_the_installed_release(tmp_path):
    done = python(PROGRAMS / "verbosity.py", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.strip().splitlines()[-1]) == {
        "TRANSFORMERS_VERBOSITY=error silences a warning": True,
        "verbosity info": True,
        "verbosity warning": False,
        "log_level info": True,
        "verbosity after log_level info": logging.INFO,
        "log_level error": False,
        "verbosity after log_level error": logging.ERROR,
        "disable_tqdm at verbosity error": True,
        "process level": logging.ERROR,
        "disable_tqdm at verbosity warning": False,
        "callback twice": True,
        "changed settings": [
            "save_steps: 2 (from args) != 1 (from trainer_state.json)",
            "per_device_train_batch_size: 4 (from args) != 8 (from trainer_state.json)",
        ],
        "imported later": True,
        "after uninstall": [True, False],
    }
    assert done.stderr.count("Running training") == 2  # by their handler, and by no other


# -- programs of each generation ----

ERAS = ["4_31", "4_37", "4_45", "4_55", "5_23"]
ONE_AFTER_THE_OTHER = """
import json, os, sys, traceback
from trainwright.compat.run_script import run_script
(programs, directory, *eras), failed = sys.argv[1:], {}
for era in eras:
    try:
        run_script(os.path.join(programs, f"written_for_{era}.py"), [os.path.join(directory, era)])
    except BaseException:
        failed[era] = traceback.format_exc()
sys.__stdout__.write("\\n" + json.dumps(failed))
"""


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """Era -> traceback, of those scripts that failed. One process runs them all."""
    directory = tmp_path_factory.mktemp("eras")
    done = python("-c", ONE_AFTER_THE_OTHER, PROGRAMS, directory, *ERAS, cwd=directory)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    for era in ERAS:  # a run of ours leaves a manifest
        if era not in found and not list((directory / era).glob("checkpoint-*/manifest.json")):
            found[era] = "the script ran, but not on this engine"
    return found


@pytest.mark.parametrize("era", ERAS)
def test_a_script_written_for_a_generation_runs_unchanged(era, failures):
    assert era not in failures, failures.get(era)
