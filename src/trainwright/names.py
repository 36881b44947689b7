"""Names that the documented interface fixes: file names inside a checkpoint and the enums that arguments accept.

Owns: strings. Leaves to others: what the strings switch on. Imports nothing outside the standard library.
Source: seed 001 (arguments), `api.json` of both generations (members of each enum).
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Collection
from enum import Enum
from typing import Any

# Files of a checkpoint. The names are shared with other implementations so that each side reads the other's
# checkpoints.
CHECKPOINT_PREFIX = "checkpoint"
SAFE_WEIGHTS_NAME = "model.safetensors"
SAFE_WEIGHTS_INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "pytorch_model.bin"
WEIGHTS_INDEX_NAME = "pytorch_model.bin.index.json"
ADAPTER_SAFE_WEIGHTS_NAME = "adapter_model.safetensors"
ADAPTER_WEIGHTS_NAME = "adapter_model.bin"
OPTIMIZER_NAME = "optimizer.pt"
SCHEDULER_NAME = "scheduler.pt"
SCALER_NAME = "scaler.pt"
TRAINER_STATE_NAME = "trainer_state.json"
METRICS_NAME = "metrics.jsonl"
REPORT_NAME = "training_report.html"
TRAINING_ARGS_NAME = "training_args.bin"
# Files that only we write; others ignore them.
MANIFEST_NAME = "manifest.json"
LOOP_STATE_NAME = "loop_state.json"
EMA_WEIGHTS_NAME = "ema.safetensors"

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")  # that end a run at a step's end; Windows has no SIGUSR1
SAMPLE_LENGTHS = "sample_lengths"  # in a batch of packs: for each pack the lengths of its samples; no model is given it
IGNORE_INDEX = -100  # a label with this value takes no part in the loss, and pads label and prediction arrays


def some(texts: Collection[Any], limit: int, separator: str = ", ", show: Callable[[Any], str] = str) -> str:
    """The first `limit` of `texts` as `show` gives them, and how many more there are.

    >>> some(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    text = separator.join(show(one) for one in itertools.islice(texts, limit))
    return text + (f" and {len(texts) - limit:,} more" if len(texts) > limit else "")


def closest(word: str, options: Any) -> str:
    """Return " Did you mean 'x'?" for the option nearest to `word`, or "" where none is near.

    Appended to an error about a misspelt name, so that the message carries the likely intention.
    """
    matches = difflib.get_close_matches(str(word), [str(option) for option in options], n=1, cutoff=0.6)
    return f" Did you mean {matches[0]!r}?" if matches else ""


class ExplicitEnum(str, Enum):
    """A string enum whose look-up error lists what is allowed and suggests the nearest."""

    @classmethod
    def _missing_(cls, value: object) -> Any:
        allowed = [member.value for member in cls]
        raise ValueError(
            f"{value!r} is not a valid {cls.__name__}; choose one of {allowed}.{closest(str(value), allowed)}"
        )


class IntervalStrategy(ExplicitEnum):
    """When something that happens at intervals happens (`logging_strategy`, `eval_strategy`)."""

    NO = "no"
    STEPS = "steps"
    EPOCH = "epoch"


EvaluationStrategy = IntervalStrategy  # an older name of the enum, which 4.55 still has


class SaveStrategy(ExplicitEnum):
    """When a checkpoint is written (`save_strategy`)."""

    NO = "no"
    STEPS = "steps"
    EPOCH = "epoch"
    BEST = "best"


class SchedulerType(ExplicitEnum):
    """Learning-rate schedules (`lr_scheduler_type`)."""

    LINEAR = "linear"
    COSINE = "cosine"
    COSINE_WITH_RESTARTS = "cosine_with_restarts"
    POLYNOMIAL = "polynomial"
    CONSTANT = "constant"
    CONSTANT_WITH_WARMUP = "constant_with_warmup"
    INVERSE_SQRT = "inverse_sqrt"
    REDUCE_ON_PLATEAU = "reduce_lr_on_plateau"
    COSINE_WITH_MIN_LR = "cosine_with_min_lr"
    COSINE_WARMUP_WITH_MIN_LR = "cosine_warmup_with_min_lr"
    WARMUP_STABLE_DECAY = "warmup_stable_decay"
    GREEDY = "greedy"


class OptimizerNames(ExplicitEnum):
    """Optimizers (`optim`)."""

    ADAMW_TORCH = "adamw_torch"
    ADAMW_TORCH_FUSED = "adamw_torch_fused"
    ADAMW_TORCH_XLA = "adamw_torch_xla"
    ADAMW_TORCH_NPU_FUSED = "adamw_torch_npu_fused"
    ADAMW_APEX_FUSED = "adamw_apex_fused"
    ADAFACTOR = "adafactor"
    ADAMW_ANYPRECISION = "adamw_anyprecision"
    ADAMW_TORCH_4BIT = "adamw_torch_4bit"
    ADAMW_TORCH_8BIT = "adamw_torch_8bit"
    ADEMAMIX = "ademamix"
    SGD = "sgd"
    ADAGRAD = "adagrad"
    ADAMW_BNB = "adamw_bnb_8bit"
    ADAMW_8BIT = "adamw_8bit"
    ADEMAMIX_8BIT = "ademamix_8bit"
    LION_8BIT = "lion_8bit"
    LION = "lion_32bit"
    PAGED_ADAMW = "paged_adamw_32bit"
    PAGED_ADAMW_8BIT = "paged_adamw_8bit"
    PAGED_ADEMAMIX = "paged_ademamix_32bit"
    PAGED_ADEMAMIX_8BIT = "paged_ademamix_8bit"
    PAGED_LION = "paged_lion_32bit"
    PAGED_LION_8BIT = "paged_lion_8bit"
    RMSPROP = "rmsprop"
    RMSPROP_BNB = "rmsprop_bnb"
    RMSPROP_8BIT = "rmsprop_bnb_8bit"
    RMSPROP_32BIT = "rmsprop_bnb_32bit"
    GALORE_ADAMW = "galore_adamw"
    GALORE_ADAMW_8BIT = "galore_adamw_8bit"
    GALORE_ADAFACTOR = "galore_adafactor"
    GALORE_ADAMW_LAYERWISE = "galore_adamw_layerwise"
    GALORE_ADAMW_8BIT_LAYERWISE = "galore_adamw_8bit_layerwise"
    GALORE_ADAFACTOR_LAYERWISE = "galore_adafactor_layerwise"
    LOMO = "lomo"
    ADALOMO = "adalomo"
    GROKADAMW = "grokadamw"
    SCHEDULE_FREE_RADAM = "schedule_free_radam"
    SCHEDULE_FREE_ADAMW = "schedule_free_adamw"
    SCHEDULE_FREE_SGD = "schedule_free_sgd"
    APOLLO_ADAMW = "apollo_adamw"
    APOLLO_ADAMW_LAYERWISE = "apollo_adamw_layerwise"
    STABLE_ADAMW = "stable_adamw"


class HubStrategy(ExplicitEnum):
    """What is pushed to the hub, and when (`hub_strategy`)."""

    END = "end"
    EVERY_SAVE = "every_save"
    CHECKPOINT = "checkpoint"
    ALL_CHECKPOINTS = "all_checkpoints"


class FSDPOption(ExplicitEnum):
    """What `fsdp=` may name."""

    FULL_SHARD = "full_shard"
    SHARD_GRAD_OP = "shard_grad_op"
    NO_SHARD = "no_shard"
    HYBRID_SHARD = "hybrid_shard"
    HYBRID_SHARD_ZERO2 = "hybrid_shard_zero2"
    OFFLOAD = "offload"
    AUTO_WRAP = "auto_wrap"


class DebugOption(ExplicitEnum):
    """What `debug=` may name."""

    UNDERFLOW_OVERFLOW = "underflow_overflow"
    TPU_METRICS_DEBUG = "tpu_metrics_debug"


class ParallelMode(Enum):
    """How many devices and processes a run uses (`TrainingArguments.parallel_mode`)."""

    NOT_PARALLEL = "not_parallel"
    NOT_DISTRIBUTED = "not_distributed"
    DISTRIBUTED = "distributed"
    SAGEMAKER_MODEL_PARALLEL = "sagemaker_model_parallel"
    SAGEMAKER_DATA_PARALLEL = "sagemaker_data_parallel"
    TPU = "tpu"


class HPSearchBackend(ExplicitEnum):
    """Hyper-parameter search engines (`Trainer.hyperparameter_search(backend=)`)."""

    OPTUNA = "optuna"
    RAY = "ray"
    SIGOPT = "sigopt"
    WANDB = "wandb"


class QuantizationMethod(ExplicitEnum):
    """Quantisation methods a model may carry in its config."""

    BITS_AND_BYTES = "bitsandbytes"
    GPTQ = "gptq"
    AWQ = "awq"
    AQLM = "aqlm"
    VPTQ = "vptq"
    QUANTO = "quanto"
    EETQ = "eetq"
    HIGGS = "higgs"
    HQQ = "hqq"
    COMPRESSED_TENSORS = "compressed-tensors"
    FBGEMM_FP8 = "fbgemm_fp8"
    TORCHAO = "torchao"
    BITNET = "bitnet"
    SPQR = "spqr"
    FP8 = "fp8"
    QUARK = "quark"
    FPQUANT = "fp_quant"
    AUTOROUND = "auto-round"
    MXFP4 = "mxfp4"
    GGUF = "gguf"
    NVFP4 = "nvfp4"
    MXFP8 = "mxfp8"
    METAL = "metal"
    FOUR_OVER_SIX = "fouroversix"
    SINQ = "sinq"
    GEMMA = "gemma"
