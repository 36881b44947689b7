"""Which names of the installed `transformers` become ours, and where ours are.

Owns: the table, module by module, each name at the module that defines it (other modules that hold the same object are
found by identity), and whose logger our messages go to. Leaves to others: putting them in place (`dropin.py`). What is
not listed here stays the original: availability checks, DeepSpeed's configuration (models read it), private helpers;
`tests/dropin/test_dropin.py` lists them all, so that a new release cannot add a name unnoticed.
Standard library only. Source: `api.json` of both generations, and `dir()` of the installed one.
"""

from __future__ import annotations

import importlib
from typing import Any

# Module of `transformers` -> {where ours is: the names}. "module:Class" where ours are methods of a class,
# "theirs=ours" where the two have different names.
_ROWS: dict[str, dict[str, str]] = {
    "trainer": {
        "trainer": "Trainer",
        "compat.evaluation_functions": "safe_globals",
        "compat.free_functions": "DEFAULT_CALLBACKS",
    },
    "trainer_seq2seq": {"seq2seq": "Seq2SeqTrainer"},
    "training_args": {
        "compat.installed_defaults": "TrainingArguments",
        "names": "OptimizerNames ParallelMode",
        "compat.free_functions": "default_logdir get_int_from_env str_to_bool",
    },
    "training_args_seq2seq": {"compat.installed_defaults": "Seq2SeqTrainingArguments"},
    "trainer_callback": {
        "callbacks.base": "TrainerCallback",
        "callbacks.early_stopping": "EarlyStoppingCallback",
        "callbacks.flow": "DefaultFlowCallback",
        "callbacks.handler": "CallbackHandler",
        "callbacks.progress": "PrinterCallback ProgressCallback",
        "state": "ExportableState TrainerControl TrainerState",
    },
    "trainer_utils": {
        "checkpoint.layout": "get_last_checkpoint rotate_checkpoints sort_checkpoints",
        "checkpoint.weights": "load_sharded_checkpoint",
        "data.columns": "RemoveColumnsCollator",
        "data.samplers": "has_length",
        "data.workers": "seed_worker",
        "compat.evaluation_functions": "number_of_arguments",
        "evaluation.distributed": "is_main_process total_processes_number",
        "evaluation.memory": "TrainerMemoryTracker",
        "evaluation.metrics": "speed_metrics",
        "nested": "denumpify_detensorize",
        "compat.free_functions": "compare_trainer_and_checkpoint_args unwrap_peft_model",
        "interop.neftune": "neftune_post_forward_hook",
        "oom_retry": "find_executable_batch_size",
        "names": "EvaluationStrategy FSDPOption HPSearchBackend HubStrategy IntervalStrategy SaveStrategy "
        "SchedulerType",
        "optim.groups": "check_target_module_exists",
        "outputs": "BestRun EvalLoopOutput EvalPrediction PredictionOutput TrainOutput",
        "search.spaces": "default_compute_objective default_hp_space_optuna default_hp_space_ray "
        "default_hp_space_sigopt default_hp_space_wandb",
        "seeding": "enable_full_determinism set_seed",
    },
    "trainer_pt_utils": {
        "args.accelerator_config": "AcceleratorConfig",
        "data.samplers": "BatchRebalanceSampler DistributedLengthGroupedSampler DistributedSamplerWithLoop "
        "IterableDatasetShard LengthGroupedSampler SequentialDistributedSampler ShardSampler get_dataloader_sampler "
        "get_length_grouped_indices get_tpu_sampler",
        "evaluation.buffers": "EvalLoopContainer",
        "compat.evaluation_functions": "is_attention_mask_causal reissue_pt_warnings remove_dummy_checkpoint "
        "safe_globals set_rng_state_for_device",
        "evaluation.distributed": "DistributedTensorGatherer distributed_broadcast_scalars distributed_concat "
        "nested_gather nested_xla_mesh_reduce torch_distributed_zero_first",
        "evaluation.metrics": "_secs2timedelta",
        "nested": "atleast_1d expand_like find_batch_size nested_concat nested_detach nested_new_like "
        "nested_numpify nested_truncate numpy_pad_and_concatenate torch_pad_and_concatenate",
        "compat.free_functions": "metrics_format",
        "loss": "LabelSmoother",
        "optim.groups": "get_model_param_count get_module_class_from_name get_parameter_names",
        "optim.layerwise": "LayerWiseDummyOptimizer LayerWiseDummyScheduler",
        # Functions there that take a trainer are methods here.
        "trainer:Trainer": "_get_learning_rate get_learning_rates get_num_trainable_parameters get_optimizer_group "
        "log_metrics save_metrics save_state",
    },
    "hf_argparser": {
        "argparser": "HfArg HfArgumentParser",
        "compat.free_functions": "make_choice_type_function string_to_bool",
    },
    "optimization": {
        "compat.older_adamw": "AdamW",
        "optim.adafactor": "Adafactor AdafactorSchedule get_adafactor_schedule",
        "optim.greedy": "GreedyLR StreamingAverage",
        "optim.schedules": "TYPE_TO_SCHEDULER_FUNCTION=SCHEDULES get_constant_schedule "
        "get_constant_schedule_with_warmup "
        "get_cosine_schedule_with_warmup get_cosine_with_hard_restarts_schedule_with_warmup "
        "get_cosine_with_min_lr_schedule_with_warmup get_cosine_with_min_lr_schedule_with_warmup_lr_rate "
        "get_greedy_schedule get_inverse_sqrt_schedule get_linear_schedule_with_warmup "
        "get_polynomial_decay_schedule_with_warmup get_reduce_on_plateau_schedule get_scheduler "
        "get_wsd_schedule",
    },
    "data.data_collator": {
        "data.collate": "DataCollator DataCollatorForLanguageModeling DataCollatorForMultipleChoice "
        "DataCollatorForPermutationLanguageModeling DataCollatorForSOP DataCollatorForSeq2Seq "
        "DataCollatorForTokenClassification DataCollatorForWholeWordMask DataCollatorMixin DataCollatorWithFlattening "
        "DataCollatorWithPadding DefaultDataCollator InputDataClass _numpy_collate_batch _tf_collate_batch "
        "_torch_collate_batch default_data_collator numpy_default_data_collator pad_without_fast_tokenizer_warning "
        "tf_default_data_collator to_numpy tolist torch_default_data_collator"
    },
    "integrations.integration_utils": {
        "compat.free_functions": "INTEGRATION_TO_CALLBACK default_logdir get_available_reporting_integrations "
        "run_hp_search_optuna run_hp_search_ray run_hp_search_sigopt run_hp_search_wandb",
        "tracking.azure_ml": "AzureMLCallback",
        "tracking.base": "get_reporting_integration_callbacks rewrite_logs",
        "tracking.clearml": "ClearMLCallback",
        "tracking.codecarbon": "CodeCarbonCallback",
        "tracking.comet_ml": "CometCallback",
        "tracking.dagshub": "DagsHubCallback",
        "tracking.dvclive": "DVCLiveCallback",
        "tracking.flyte": "FlyteCallback",
        "tracking.kubeflow": "KubeflowCallback",
        "tracking.mlflow": "MLflowCallback",
        "tracking.neptune": "NeptuneCallback",
        "tracking.swanlab": "SwanLabCallback",
        "tracking.tensorboard": "TensorBoardCallback",
        "tracking.trackio": "TrackioCallback",
        "tracking.wandb": "WandbCallback",
    },
    "integrations.neftune": {"interop.neftune": "neftune_post_forward_hook"},
    "utils.notebook": {"callbacks.notebook": "NotebookProgressBar NotebookProgressCallback NotebookTrainingTracker"},
    "debug_utils": {"names": "DebugOption"},
}

# Module of `transformers` -> {name: where ours is, as "module:attribute"}.
REPLACED: dict[str, dict[str, str]] = {
    module: {
        name: f"{where}{'.' if ':' in where else ':'}{own or name}"
        for where, names in rows.items()
        for name, _, own in (entry.partition("=") for entry in names.split())
    }
    for module, rows in _ROWS.items()
}

# Names that some generation has in a package itself; added there where the installed one lacks them.
_OF_PACKAGES: dict[str, dict[str, str]] = {
    "transformers": {
        "data.data_collator": "DataCollatorForSOP DataCollatorForWholeWordMask",
        "optimization": "AdamW GreedyLR get_cosine_with_min_lr_schedule_with_warmup get_greedy_schedule "
        "get_cosine_with_min_lr_schedule_with_warmup_lr_rate get_reduce_on_plateau_schedule",
    },
    "transformers.integrations": {"integrations.integration_utils": "KubeflowCallback SwanLabCallback TrackioCallback"},
}
OF_PACKAGES: dict[str, dict[str, str]] = {
    package: {name: REPLACED[module][name] for module, names in rows.items() for name in names.split()}
    for package, rows in _OF_PACKAGES.items()
}

# Module of this package, or package -> module of `transformers` whose logger its messages go to.
_LOGGERS: dict[str, str] = {
    "args": "training_args",
    "argparser": "hf_argparser",
    "callbacks": "trainer_callback",
    "data.collate": "data.data_collator",
    "data.collate_language": "data.data_collator",
    "optim": "optimization",
    "seq2seq": "trainer_seq2seq",
    "tracking": "integrations.integration_utils",
}
_LOGGERS_SINCE_5 = {"run.resume": "trainer_utils"}  # which warns of changed settings there


def logger_of(module: str, generation: int) -> str:
    """Name of the logger of `transformers` for the messages of our module `module` ("callbacks.handler").

    What is in no row is the Trainer's: a program that captures its log finds the messages of all its parts there.
    `generation`: the major number of the installed release.
    """
    rows = {**_LOGGERS, **_LOGGERS_SINCE_5} if generation >= 5 else _LOGGERS
    theirs = rows.get(module) or rows.get(module.partition(".")[0]) or "trainer"
    return f"transformers.{theirs}"


def ours(where: str) -> Any:
    """The object at "module:attribute" or "module:Class.attribute" of this package."""
    module, _, path = where.partition(":")
    found: Any = importlib.import_module(f"trainwright.{module}")
    for name in path.split("."):
        found = getattr(found, name)
    return found
