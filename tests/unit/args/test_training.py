"""TrainingArguments as a whole: construction, subclassing, copies, ranks, serialisation, setters."""

import copy
import dataclasses
import inspect
import json
import logging
import pickle
import subprocess
import sys

import pytest
import torch

from trainwright.args.seq2seq import Seq2SeqTrainingArguments
from trainwright.args.training import TrainingArguments
from trainwright.names import IntervalStrategy, OptimizerNames, ParallelMode, SchedulerType


@dataclasses.dataclass
class FinetuningConfig(TrainingArguments):
    learning_rate: float = 1e-3
    gradient_checkpointing: bool = True
    max_length: int = 1024


def new(**kwargs):
    return TrainingArguments("out", logging_dir="logs", report_to="none", **kwargs)


def in_fresh_interpreter(code, **env):
    import os

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_constructing_arguments_imports_no_heavy_package():
    code = (
        "import sys; from trainwright.args import TrainingArguments; TrainingArguments('out', bf16=True);"
        "print([m for m in ('torch', 'numpy', 'transformers', 'accelerate', 'yaml') if m in sys.modules])"
    )
    assert in_fresh_interpreter(code) == "[]"


def test_the_package_offers_both_classes_and_nothing_else():
    import trainwright.args as package

    assert package.TrainingArguments is TrainingArguments
    assert package.Seq2SeqTrainingArguments is Seq2SeqTrainingArguments
    with pytest.raises(AttributeError):
        _ = package.TrainingArgument


def test_constructing_arguments_creates_no_folder(tmp_path):
    TrainingArguments(str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_subclass_that_redefines_a_field_keeps_output_dir_first():
    args = FinetuningConfig("out")
    assert (args.output_dir, args.learning_rate, args.max_length) == ("out", 1e-3, 1024)


def test_a_subclass_default_reaches_the_twin_name():
    assert FinetuningConfig("out").activation_checkpointing is True
    off = FinetuningConfig("out", activation_checkpointing=False)
    assert (off.gradient_checkpointing, off.activation_checkpointing) == (False, False)


def test_the_signature_shows_the_fields_of_class_and_subclass():
    parameters = inspect.signature(TrainingArguments).parameters
    assert next(iter(parameters)) == "output_dir"
    assert list(parameters) == [f.name for f in dataclasses.fields(TrainingArguments) if f.init]
    assert inspect.signature(FinetuningConfig).parameters["learning_rate"].default == 1e-3


def test_a_misspelt_argument_is_named_with_the_nearest():
    with pytest.raises(TypeError, match=r"'learnig_rate'.*Did you mean 'learning_rate'"):
        TrainingArguments("out", learnig_rate=1)


def test_an_argument_passed_twice_is_refused():
    with pytest.raises(TypeError, match="multiple values"):
        TrainingArguments("out", output_dir="other")


def test_a_subclass_with_its_own_constructor_may_take_what_it_likes():
    class Loose(TrainingArguments):
        def __init__(self, *args, extra=None, **kwargs):
            super().__init__(*args, **kwargs)
            self.extra = extra

    with pytest.warns(FutureWarning):
        args = Loose("out", extra=3, evaluation_strategy="epoch")
    assert (args.extra, args.eval_strategy) == (3, "epoch")


def test_replace_changes_one_field_and_keeps_the_rest():
    args = new(
        eval_strategy="steps",
        fsdp="full_shard auto_wrap",
        include_num_input_tokens_seen=True,
        debug="underflow_overflow",
    )
    assert dataclasses.replace(args) == args
    changed = dataclasses.replace(args, learning_rate=1.0)
    assert changed.learning_rate == 1.0 and changed != args


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda a: pickle.loads(pickle.dumps(a))])
def test_copies_are_equal_and_find_their_own_device(copied):
    args = new(accelerator_config={"split_batches": True}, use_cpu=True)
    _ = args.device
    twin = copied(args)
    assert twin == args and "_device" not in vars(twin) and twin.device == torch.device("cpu")


def test_arguments_survive_torch_save(tmp_path):
    args = new(lr_scheduler_type="cosine")
    torch.save(args, tmp_path / "training_args.bin")
    assert torch.load(tmp_path / "training_args.bin", weights_only=False) == args


def test_tokens_appear_nowhere():
    args = new(hub_token="hf_secret")
    shown = FinetuningConfig("out", hub_token="hf_secret", report_to="none")
    everything = [repr(args), str(args), repr(shown), str(shown), args.to_json_string(), repr(args.to_sanitized_dict())]
    assert not any("hf_secret" in text for text in everything)
    assert args.to_dict()["hub_token"] == "<HUB_TOKEN>" and args.hub_token == "hf_secret"


def test_to_dict_holds_plain_data_and_is_a_copy():
    args = new(lr_scheduler_type="cosine", debug="underflow_overflow", lr_scheduler_kwargs={"dtype": torch.float16})
    values = args.to_dict()
    assert values["lr_scheduler_type"] == "cosine" and type(values["lr_scheduler_type"]) is str
    assert values["debug"] == ["underflow_overflow"]
    assert values["accelerator_config"]["even_batches"] is True
    assert values["lr_scheduler_kwargs"] == {"dtype": "float16"}
    assert json.loads(args.to_json_string()) == values
    values["lr_scheduler_kwargs"]["dtype"] = "x"
    assert args.lr_scheduler_kwargs == {"dtype": torch.float16}


def test_the_sanitized_dict_holds_numbers_and_text_only():
    values = new(use_cpu=True).to_sanitized_dict()
    assert {type(value) for value in values.values()} <= {bool, int, float, str}
    assert values["train_batch_size"] == 8


def test_printing_shows_every_field_sorted_one_per_line():
    lines = str(new()).splitlines()
    names = [line.split("=")[0] for line in lines[1:-1]]
    assert lines[0] == "TrainingArguments(" and names == sorted(
        f.name for f in dataclasses.fields(TrainingArguments) if f.init
    )


def test_without_a_folder_trainer_output_is_used():
    assert TrainingArguments().output_dir == "trainer_output"


def test_a_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert TrainingArguments("~/run").output_dir == "/home/someone/run"


def test_run_name_and_logging_dir_follow_the_folder():
    args = TrainingArguments("out")
    assert args.run_name == "out" and args.logging_dir.startswith("out/runs/")


def test_report_to_is_resolved_to_tracker_names():
    assert TrainingArguments("out", report_to="none").report_to == []
    assert TrainingArguments("out", report_to="tensorboard").report_to == ["tensorboard"]
    with pytest.raises(ValueError, match="tensorboard"):
        TrainingArguments("out", report_to="tensorbord")


@pytest.mark.parametrize("installed, default", [((4, 55, 4), "all"), ((5, 23, 0), "none"), (None, "none")])
def test_report_to_has_the_default_of_the_installed_generation(installed, default, monkeypatch):
    monkeypatch.setattr("trainwright.args.reporting.installed_version", lambda _: installed)
    assert TrainingArguments("out").report_to == TrainingArguments("out", report_to=default).report_to


def test_a_tracker_that_is_there_because_all_includes_it_is_known_as_such_in_every_copy():
    args = TrainingArguments("out", report_to=["all", "wandb"])
    for copied in (args, dataclasses.replace(args, seed=7), copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        assert "tensorboard" in copied.report_to.unasked and "wandb" not in copied.report_to.unasked


def test_progress_is_hidden_only_when_warnings_are_too(monkeypatch):
    assert new().disable_tqdm is False
    monkeypatch.setattr(logging.getLogger("trainwright"), "level", logging.ERROR)
    logging.getLogger("trainwright").manager._clear_cache()
    assert new().disable_tqdm is True
    monkeypatch.undo()
    logging.getLogger("trainwright").manager._clear_cache()


def test_log_levels_follow_the_rank(monkeypatch):
    args = new(log_level="info", log_level_replica="error")
    assert args.get_process_log_level() == logging.INFO
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert args.get_process_log_level() == logging.ERROR
    assert new(log_level_replica="passive").get_process_log_level() == logging.WARNING


def test_ranks_come_from_the_launcher_when_asked_for(monkeypatch):
    args = new()
    assert (args.local_rank, args.world_size, args.process_index, args.local_process_index) == (-1, 1, 0, 0)
    for name, value in {"LOCAL_RANK": "1", "RANK": "5", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert (args.local_rank, args.world_size, args.process_index, args.local_process_index) == (1, 8, 5, 1)
    assert not args.should_log and not args.should_save and args.parallel_mode == ParallelMode.DISTRIBUTED
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert args.should_log and not args.should_save
    assert not new(log_on_each_node=False).should_log and new(save_on_each_node=True).should_save


def test_main_process_first_runs_the_body_once_in_a_single_process():
    ran = []
    with new().main_process_first(desc="tokenising"):
        ran.append(1)
    assert ran == [1]


@pytest.mark.parametrize(
    ("given", "expected"), [({"warmup_steps": 7}, 7), ({"warmup_ratio": 0.1}, 11), ({"warmup_steps": 0.1}, 11), ({}, 0)]
)
def test_warmup_counts_updates_or_a_share_rounded_up(given, expected):
    assert new(**given).get_warmup_steps(101) == expected


def test_warmup_steps_win_over_the_ratio():
    assert new(warmup_steps=5, warmup_ratio=0.5).get_warmup_steps(100) == 5


def test_a_twin_name_follows_a_later_change():
    args = new()
    args.gradient_checkpointing = True
    args.train_sampling_strategy = "group_by_length"
    assert args.activation_checkpointing is True and args.group_by_length is True
    args.group_by_length = False
    assert args.train_sampling_strategy == "random"


def test_small_facts():
    args = new(ddp_timeout=60)
    assert args.ddp_timeout_delta.total_seconds() == 60
    assert args.framework == "pt" and args.place_model_on_device and args.is_torch_greater_or_equal_than_2_8
    assert args.default_optim == "adamw_torch_fused" and args._no_sync_in_gradient_accumulation


# The setters, with the examples of seed 001.


def test_set_training():
    args = new().set_training(learning_rate=1e-4, batch_size=32)
    assert args.learning_rate == 1e-4 and args.per_device_train_batch_size == 32 and args.do_train


def test_set_evaluate():
    args = new().set_evaluate(strategy="steps", steps=100)
    assert args.eval_steps == 100 and args.do_eval and args.eval_strategy is IntervalStrategy.STEPS


def test_set_evaluate_with_no_leaves_do_eval_alone():
    assert not new().set_evaluate().do_eval


def test_set_testing():
    args = new().set_testing(batch_size=32)
    assert args.per_device_eval_batch_size == 32 and args.do_predict


def test_set_save():
    args = new().set_save(strategy="steps", steps=100, total_limit=2)
    assert (args.save_steps, args.save_total_limit) == (100, 2)


def test_set_logging():
    args = new().set_logging(strategy="steps", steps=100)
    assert args.logging_steps == 100 and args.report_to == [] and args.logging_nan_inf_filter is False


def test_set_push_to_hub():
    args = new().set_push_to_hub("me/awesome-model")
    assert args.hub_model_id == "me/awesome-model" and args.push_to_hub


def test_set_optimizer():
    args = new().set_optimizer(name="adamw_torch", beta1=0.8)
    assert args.optim is OptimizerNames.ADAMW_TORCH and args.adam_beta1 == 0.8


def test_set_lr_scheduler():
    args = new().set_lr_scheduler(name="cosine", warmup_ratio=0.05)
    assert args.warmup_ratio == 0.05 and args.lr_scheduler_type is SchedulerType.COSINE


def test_set_dataloader():
    args = new().set_dataloader(train_batch_size=16, eval_batch_size=64, sampler_seed=3)
    assert (args.per_device_train_batch_size, args.per_device_eval_batch_size, args.data_seed) == (16, 64, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda a: a.set_training(batch_size=0),
        lambda a: a.set_save(steps=0),
        lambda a: a.set_logging(level="loud"),
        lambda a: a.set_dataloader(prefetch_factor=2),
        lambda a: a.set_optimizer("adamm"),
        lambda a: a.set_push_to_hub("me/model", strategy="never"),
    ],
)
def test_setters_refuse_what_the_constructor_refuses(wrong):
    with pytest.raises(ValueError):
        wrong(new())


def test_a_warmup_ratio_of_none_is_left_out():
    args = TrainingArguments("out", warmup_ratio=None)
    assert args.warmup_ratio == 0.0 and args.get_warmup_steps(100) == 0


def test_what_libraries_read_of_the_processes_and_precision_is_there():
    args = TrainingArguments("out", use_cpu=True, bf16=True)
    assert args.distributed_state.num_processes == args.world_size == 1
    assert args.distributed_state.device == args.device
    assert args.mixed_precision == "bf16" and args.deepspeed_plugin is None
    assert TrainingArguments("out", use_cpu=True).mixed_precision == "no"
