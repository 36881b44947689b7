"""Trainwright: the Trainer API for PyTorch.

Owns: the list of public names, each found in its module when first used. Leaves to others: everything else. Importing
the package imports nothing, not even torch; `from trainwright import Trainer` imports torch and nothing optional.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trainwright.importing import collector_paused

__version__ = "0.2.0"

# Module -> the public names it defines.
_EXPORTS = {
    "argparser": ("HfArg", "HfArgumentParser"),
    "args.accelerator_config": ("AcceleratorConfig",),
    "args.seq2seq": ("Seq2SeqTrainingArguments",),
    "args.training": ("TrainingArguments",),
    "callbacks.base": ("TrainerCallback",),
    "callbacks.early_stopping": ("EarlyStoppingCallback",),
    "callbacks.flow": ("DefaultFlowCallback",),
    "callbacks.handler": ("CallbackHandler",),
    "callbacks.notebook": ("NotebookProgressCallback",),
    "callbacks.progress": ("PrinterCallback", "ProgressCallback"),
    "checkpoint.layout": ("get_last_checkpoint",),
    "data.collate": (
        "DataCollatorForLanguageModeling",
        "DataCollatorForMultipleChoice",
        "DataCollatorForPermutationLanguageModeling",
        "DataCollatorForSOP",
        "DataCollatorForSeq2Seq",
        "DataCollatorForTokenClassification",
        "DataCollatorForWholeWordMask",
        "DataCollatorWithFlattening",
        "DataCollatorWithPadding",
        "DefaultDataCollator",
        "default_data_collator",
    ),
    "interop.optional": ("MissingExtra",),
    "names": (
        "DebugOption",
        "EvaluationStrategy",
        "FSDPOption",
        "HPSearchBackend",
        "HubStrategy",
        "IntervalStrategy",
        "OptimizerNames",
        "ParallelMode",
        "SaveStrategy",
        "SchedulerType",
    ),
    "optim.adafactor": ("Adafactor", "AdafactorSchedule", "get_adafactor_schedule"),
    "optim.combined": ("CombinedOptimizer",),
    "optim.registry": ("OptimizerRequest", "OptimizerSpec", "register_optimizer"),
    "optim.greedy": ("GreedyLR", "StreamingAverage"),
    "optim.schedules": (
        "get_constant_schedule",
        "get_constant_schedule_with_warmup",
        "get_cosine_schedule_with_warmup",
        "get_cosine_with_hard_restarts_schedule_with_warmup",
        "get_cosine_with_min_lr_schedule_with_warmup",
        "get_cosine_with_min_lr_schedule_with_warmup_lr_rate",
        "get_greedy_schedule",
        "get_inverse_sqrt_schedule",
        "get_linear_schedule_with_warmup",
        "get_polynomial_decay_schedule_with_warmup",
        "get_reduce_on_plateau_schedule",
        "get_scheduler",
        "get_wsd_schedule",
    ),
    "outputs": ("BestRun", "EvalLoopOutput", "EvalPrediction", "PredictionOutput", "TrainOutput"),
    "search.spaces": (
        "default_compute_objective",
        "default_hp_space_optuna",
        "default_hp_space_ray",
        "default_hp_space_sigopt",
        "default_hp_space_wandb",
    ),
    "seeding": ("enable_full_determinism", "set_seed"),
    "seq2seq": ("Seq2SeqTrainer",),
    "state": ("ExportableState", "TrainerControl", "TrainerState"),
    "tracking.azure_ml": ("AzureMLCallback",),
    "tracking.clearml": ("ClearMLCallback",),
    "tracking.codecarbon": ("CodeCarbonCallback",),
    "tracking.comet_ml": ("CometCallback",),
    "tracking.dagshub": ("DagsHubCallback",),
    "tracking.dvclive": ("DVCLiveCallback",),
    "tracking.flyte": ("FlyteCallback",),
    "tracking.kubeflow": ("KubeflowCallback",),
    "tracking.mlflow": ("MLflowCallback",),
    "tracking.neptune": ("NeptuneCallback",),
    "tracking.swanlab": ("SwanLabCallback",),
    "tracking.tensorboard": ("TensorBoardCallback",),
    "tracking.trackio": ("TrackioCallback",),
    "tracking.wandb": ("WandbCallback",),
    "trainer": ("Trainer",),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with collector_paused():
        value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value  # the next access finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])


if TYPE_CHECKING:  # the same list again, for type checkers; a test holds the two together
    from trainwright.argparser import HfArg as HfArg
    from trainwright.argparser import HfArgumentParser as HfArgumentParser
    from trainwright.args.accelerator_config import AcceleratorConfig as AcceleratorConfig
    from trainwright.args.seq2seq import Seq2SeqTrainingArguments as Seq2SeqTrainingArguments
    from trainwright.args.training import TrainingArguments as TrainingArguments
    from trainwright.callbacks.base import TrainerCallback as TrainerCallback
    from trainwright.callbacks.early_stopping import EarlyStoppingCallback as EarlyStoppingCallback
    from trainwright.callbacks.flow import DefaultFlowCallback as DefaultFlowCallback
    from trainwright.callbacks.handler import CallbackHandler as CallbackHandler
    from trainwright.callbacks.notebook import NotebookProgressCallback as NotebookProgressCallback
    from trainwright.callbacks.progress import PrinterCallback as PrinterCallback
    from trainwright.callbacks.progress import ProgressCallback as ProgressCallback
    from trainwright.checkpoint.layout import get_last_checkpoint as get_last_checkpoint
    from trainwright.data.collate import DataCollatorForLanguageModeling as DataCollatorForLanguageModeling
    from trainwright.data.collate import DataCollatorForMultipleChoice as DataCollatorForMultipleChoice
    from trainwright.data.collate import (
        DataCollatorForPermutationLanguageModeling as DataCollatorForPermutationLanguageModeling,
    )
    from trainwright.data.collate import DataCollatorForSeq2Seq as DataCollatorForSeq2Seq
    from trainwright.data.collate import DataCollatorForSOP as DataCollatorForSOP
    from trainwright.data.collate import DataCollatorForTokenClassification as DataCollatorForTokenClassification
    from trainwright.data.collate import DataCollatorForWholeWordMask as DataCollatorForWholeWordMask
    from trainwright.data.collate import DataCollatorWithFlattening as DataCollatorWithFlattening
    from trainwright.data.collate import DataCollatorWithPadding as DataCollatorWithPadding
    from trainwright.data.collate import DefaultDataCollator as DefaultDataCollator
    from trainwright.data.collate import default_data_collator as default_data_collator
    from trainwright.interop.optional import MissingExtra as MissingExtra
    from trainwright.names import DebugOption as DebugOption
    from trainwright.names import EvaluationStrategy as EvaluationStrategy
    from trainwright.names import FSDPOption as FSDPOption
    from trainwright.names import HPSearchBackend as HPSearchBackend
    from trainwright.names import HubStrategy as HubStrategy
    from trainwright.names import IntervalStrategy as IntervalStrategy
    from trainwright.names import OptimizerNames as OptimizerNames
    from trainwright.names import ParallelMode as ParallelMode
    from trainwright.names import SaveStrategy as SaveStrategy
    from trainwright.names import SchedulerType as SchedulerType
    from trainwright.optim.adafactor import Adafactor as Adafactor
    from trainwright.optim.adafactor import AdafactorSchedule as AdafactorSchedule
    from trainwright.optim.adafactor import get_adafactor_schedule as get_adafactor_schedule
    from trainwright.optim.combined import CombinedOptimizer as CombinedOptimizer
    from trainwright.optim.greedy import GreedyLR as GreedyLR
    from trainwright.optim.greedy import StreamingAverage as StreamingAverage
    from trainwright.optim.registry import OptimizerRequest as OptimizerRequest
    from trainwright.optim.registry import OptimizerSpec as OptimizerSpec
    from trainwright.optim.registry import register_optimizer as register_optimizer
    from trainwright.optim.schedules import get_constant_schedule as get_constant_schedule
    from trainwright.optim.schedules import get_constant_schedule_with_warmup as get_constant_schedule_with_warmup
    from trainwright.optim.schedules import get_cosine_schedule_with_warmup as get_cosine_schedule_with_warmup
    from trainwright.optim.schedules import (
        get_cosine_with_hard_restarts_schedule_with_warmup as get_cosine_with_hard_restarts_schedule_with_warmup,
    )
    from trainwright.optim.schedules import (
        get_cosine_with_min_lr_schedule_with_warmup as get_cosine_with_min_lr_schedule_with_warmup,
    )
    from trainwright.optim.schedules import (
        get_cosine_with_min_lr_schedule_with_warmup_lr_rate as get_cosine_with_min_lr_schedule_with_warmup_lr_rate,
    )
    from trainwright.optim.schedules import get_greedy_schedule as get_greedy_schedule
    from trainwright.optim.schedules import get_inverse_sqrt_schedule as get_inverse_sqrt_schedule
    from trainwright.optim.schedules import get_linear_schedule_with_warmup as get_linear_schedule_with_warmup
    from trainwright.optim.schedules import (
        get_polynomial_decay_schedule_with_warmup as get_polynomial_decay_schedule_with_warmup,
    )
    from trainwright.optim.schedules import get_reduce_on_plateau_schedule as get_reduce_on_plateau_schedule
    from trainwright.optim.schedules import get_scheduler as get_scheduler
    from trainwright.optim.schedules import get_wsd_schedule as get_wsd_schedule
    from trainwright.outputs import BestRun as BestRun
    from trainwright.outputs import EvalLoopOutput as EvalLoopOutput
    from trainwright.outputs import EvalPrediction as EvalPrediction
    from trainwright.outputs import PredictionOutput as PredictionOutput
    from trainwright.outputs import TrainOutput as TrainOutput
    from trainwright.search.spaces import default_compute_objective as default_compute_objective
    from trainwright.search.spaces import default_hp_space_optuna as default_hp_space_optuna
    from trainwright.search.spaces import default_hp_space_ray as default_hp_space_ray
    from trainwright.search.spaces import default_hp_space_sigopt as default_hp_space_sigopt
    from trainwright.search.spaces import default_hp_space_wandb as default_hp_space_wandb
    from trainwright.seeding import enable_full_determinism as enable_full_determinism
    from trainwright.seeding import set_seed as set_seed
    from trainwright.seq2seq import Seq2SeqTrainer as Seq2SeqTrainer
    from trainwright.state import ExportableState as ExportableState
    from trainwright.state import TrainerControl as TrainerControl
    from trainwright.state import TrainerState as TrainerState
    from trainwright.tracking.azure_ml import AzureMLCallback as AzureMLCallback
    from trainwright.tracking.clearml import ClearMLCallback as ClearMLCallback
    from trainwright.tracking.codecarbon import CodeCarbonCallback as CodeCarbonCallback
    from trainwright.tracking.comet_ml import CometCallback as CometCallback
    from trainwright.tracking.dagshub import DagsHubCallback as DagsHubCallback
    from trainwright.tracking.dvclive import DVCLiveCallback as DVCLiveCallback
    from trainwright.tracking.flyte import FlyteCallback as FlyteCallback
    from trainwright.tracking.kubeflow import KubeflowCallback as KubeflowCallback
    from trainwright.tracking.mlflow import MLflowCallback as MLflowCallback
    from trainwright.tracking.neptune import NeptuneCallback as NeptuneCallback
    from trainwright.tracking.swanlab import SwanLabCallback as SwanLabCallback
    from trainwright.tracking.tensorboard import TensorBoardCallback as TensorBoardCallback
    from trainwright.tracking.trackio import TrackioCallback as TrackioCallback
    from trainwright.tracking.wandb import WandbCallback as WandbCallback
    from trainwright.trainer import Trainer as Trainer
