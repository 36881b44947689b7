"""DeepSpeed's configuration: where it comes from, its `auto` values, and what it cannot be combined with.

Owns: finding the configuration (`deepspeed=`, the variables of `accelerate launch`), a value for each "auto", one error
that names every contradiction with the arguments, and one that names every feature this engine does not have. Leaves to
others: the engine (`deepspeed.py`). Nothing here imports deepspeed or torch.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from trainwright.names import closest

logger = logging.getLogger(__name__)

Config = dict[str, Any]

AUTO = "auto"
TRUE = ("1", "true", "yes", "on")
OF_LAUNCHER = "accelerate launch (ACCELERATE_DEEPSPEED_*)"
STAGE = "zero_optimization.stage"
GATHERS_ON_SAVE = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
# One element after the other, so that a step on a flat part of all parameters is the step on each: measured by
# tests/unit/parallel/test_deepspeed_config.py.
ELEMENTWISE = frozenset(
    {
        "adamw_torch", "adamw_torch_fused", "adamw_apex_fused", "adamw_torch_npu_fused", "adamw_anyprecision", "sgd",
        "adagrad", "rmsprop", "lion_32bit", "rmsprop_bnb", "rmsprop_bnb_32bit", "ademamix",
        "paged_adamw_32bit", "paged_ademamix_32bit", "paged_lion_32bit",
    }
)  # fmt: skip

# The keys of a configuration, for "did you mean": DeepSpeed passes over one that it does not know.
_KEYS = frozenset(
    {
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
        "gradient_clipping", "optimizer", "scheduler", "fp16", "bf16", "bfloat16", "amp", "torch_autocast",
        "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
        "communication_data_type", "seq_parallel_communication_data_type", "prescale_gradients",
        "gradient_predivide_factor", "gradient_allreduce_op", "sparse_gradients", "steps_per_print",
        "wall_clock_breakdown", "memory_breakdown", "dump_state", "flops_profiler",
        "activation_checkpointing", "sparse_attention", "data_efficiency", "curriculum_learning",
        "data_types", "dataloader_drop_last", "data_parallel_group", "tensorboard", "wandb", "csv_monitor",
        "comet", "monitor_config", "comms_logger", "compression_training", "checkpoint", "autotuning",
        "elasticity", "aio", "timers", "disable_allgather", "disable_python_gc", "log_level",
        "managed_gradient_accumulation", "use_data_before_expert_parallelism", "hybrid_engine", "nebula",
        "pipeline", "eigenvalue", "progressive_layer_drop", "compile", "tensor_parallel",
        "sequence_parallel_size", "keep_in_fp32_modules", "expert_parallel", "graph_harvesting",
        "weight_quantization", "train_steps", "datastates_ckpt", "checkpoint_writer"
    }
)  # fmt: skip


class Requested(NamedTuple):
    """A configuration as it was given."""

    config: Config
    where: str  # it comes from, for messages

    @property
    def stage(self) -> int:
        """Of ZeRO; 0 where the configuration has none."""
        stage = get(self.config, STAGE, 0)
        return stage if isinstance(stage, int) else 0


# -- where it comes from -----------------------------------------------------------------------------------------------


def requested(args: Any, environ: Mapping[str, str] | None = None) -> Requested:
    """A copy of the configuration of a run that DeepSpeed was asked for (`engine_choice`): that of `deepspeed=`, else
    that of `accelerate launch`.

    Raises ValueError for a file that is missing, or is no JSON object.
    """
    environ = os.environ if environ is None else environ
    if isinstance(args.deepspeed, dict) and args.deepspeed:
        return Requested(copy.deepcopy(args.deepspeed), "deepspeed")
    if args.deepspeed:
        return Requested(_read(os.fspath(args.deepspeed), "deepspeed"), os.fspath(args.deepspeed))
    path = _set(environ, "ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if path is not None:
        return Requested(_read(path, "ACCELERATE_DEEPSPEED_CONFIG_FILE"), path)
    return Requested(_of_launcher(environ), OF_LAUNCHER)


def _read(path: str, name: str) -> Config:
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except OSError as error:
        raise ValueError(f"{name}={path!r} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"{name}={path!r} is no JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{name}={path!r} holds a {type(config).__name__}; DeepSpeed's configuration is an object.")
    return config


def _set(environ: Mapping[str, str], name: str) -> str | None:
    value = environ.get(name, "")
    return None if value.lower() in ("", "none", "null") else value


def _of_launcher(environ: Mapping[str, str]) -> Config:
    """The configuration that the single settings of `accelerate launch` make. It leaves ZeRO's stage at 2."""
    prefix = "ACCELERATE_DEEPSPEED_"
    zero: Config = {"stage": _number(environ, prefix + "ZERO_STAGE", 2)}
    for part, name in (("offload_optimizer", "OFFLOAD_OPTIMIZER"), ("offload_param", "OFFLOAD_PARAM")):
        device = _set(environ, f"{prefix}{name}_DEVICE")
        if device is not None:
            zero[part] = {"device": device}
            path = _set(environ, f"{prefix}{name}_NVME_PATH")
            if path is not None:
                zero[part]["nvme_path"] = path
    gathers = _set(environ, prefix + "ZERO3_SAVE_16BIT_MODEL")
    if gathers is not None:
        zero["stage3_gather_16bit_weights_on_model_save"] = gathers.lower() in TRUE
    return {
        "train_batch_size": AUTO,
        "train_micro_batch_size_per_gpu": AUTO,
        "gradient_accumulation_steps": _number(environ, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", AUTO),
        "gradient_clipping": _number(environ, "ACCELERATE_GRADIENT_CLIPPING", AUTO),
        "zero_optimization": zero,
    }


def _number(environ: Mapping[str, str], name: str, default: Any) -> Any:
    text = _set(environ, name)
    if text is None or text.lower() == AUTO:
        return default
    try:
        number = float(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} is not a number.") from None
    return int(number) if number.is_integer() else number


# -- its values --------------------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """What one key of the configuration is to hold."""

    path: str
    value: Any  # None: not known yet
    argument: str = ""  # that says the same, with its value; "": nothing to compare with
    is_filled_in: bool = False  # also where the configuration does not have the key


def filled(
    given: Requested,
    args: Any,
    *,
    num_processes: int,
    micro_batch: int | None = None,
    hidden_size: int | None = None,
    num_training_steps: int | None = None,
) -> Config:
    """`given.config` with a value for each "auto". What is not known yet (None) stays "auto".

    micro_batch: samples of one process, default `args.per_device_train_batch_size`. hidden_size: of the model; 0 where
    it has none, and DeepSpeed's own bucket sizes are used. Raises one ValueError naming every contradiction.
    """
    config = copy.deepcopy(given.config)
    contradictions = []
    micro_batch = args.per_device_train_batch_size if micro_batch is None else micro_batch
    rows = [
        *_rows_of_batches(args, micro_batch, num_processes),
        *_rows_of_precision(args),
        *_rows_of_buckets(hidden_size),
        *_rows_of_optimizer(args),
        *_rows_of_schedule(args, num_training_steps),
    ]
    for row in rows:
        missing = object()
        now = get(config, row.path, missing)
        if now is missing:
            if row.is_filled_in and row.value is not None:
                set_key(config, row.path, row.value)
        elif now == AUTO:
            if row.value is not None:
                set_key(config, row.path, row.value)
        elif row.argument and row.value is not None and not _is_same(now, row.value):
            contradictions.append(f"{row.path} is {json.dumps(now)}, and {row.argument}")
    contradictions += _contradictions_of_choice(config, args)
    if contradictions:
        raise ValueError(
            f"DeepSpeed's configuration ({given.where}) and the arguments contradict each other: "
            f'{"; ".join(contradictions)}. Write "auto" in the configuration, and the arguments decide, or let both '
            "say the same."
        )
    if hidden_size == 0:
        for path in _BUCKETS:
            drop(config, path, AUTO)
    return config


def _rows_of_batches(args: Any, micro_batch: int, num_processes: int) -> Iterator[_Row]:
    accumulation = args.gradient_accumulation_steps
    yield _Row(
        "train_micro_batch_size_per_gpu", micro_batch, f"per_device_train_batch_size={micro_batch}", is_filled_in=True
    )
    yield _Row(
        "gradient_accumulation_steps", accumulation, f"gradient_accumulation_steps={accumulation}", is_filled_in=True
    )
    yield _Row(
        "train_batch_size",
        micro_batch * accumulation * num_processes,
        f"per_device_train_batch_size={micro_batch} x gradient_accumulation_steps={accumulation} x {num_processes} "
        f"process{'es' if num_processes > 1 else ''} is {micro_batch * accumulation * num_processes}",
        is_filled_in=True,
    )
    norm = float(args.max_grad_norm or 0.0)
    yield _Row("gradient_clipping", norm, f"max_grad_norm={norm}", is_filled_in=True)


def _rows_of_precision(args: Any) -> Iterator[_Row]:
    for name in ("bf16", "fp16"):
        is_on = bool(getattr(args, name))
        yield _Row(f"{name}.enabled", is_on, f"{name}={is_on}", is_filled_in=True)
    yield _Row("amp.enabled", False)


_BUCKETS = (
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
)


def _rows_of_buckets(hidden_size: int | None) -> Iterator[_Row]:
    """Elements, as the documentation of the Trainer's DeepSpeed integration gives them."""
    sizes = None
    if hidden_size:
        sizes = hidden_size * hidden_size, int(0.9 * hidden_size * hidden_size), 10 * hidden_size
    for index, path in enumerate(_BUCKETS):
        yield _Row(path, None if sizes is None else sizes[index])
    yield _Row(GATHERS_ON_SAVE, True, is_filled_in=True)


def _rows_of_optimizer(args: Any) -> Iterator[_Row]:
    params = "optimizer.params."
    yield _Row(params + "lr", args.learning_rate, f"learning_rate={args.learning_rate}")
    betas = [args.adam_beta1, args.adam_beta2]
    yield _Row(params + "betas", betas, f"adam_beta1={betas[0]}, adam_beta2={betas[1]}")
    yield _Row(params + "eps", args.adam_epsilon, f"adam_epsilon={args.adam_epsilon}")
    yield _Row(params + "weight_decay", args.weight_decay, f"weight_decay={args.weight_decay}")


def _rows_of_schedule(args: Any, num_training_steps: int | None) -> Iterator[_Row]:
    params, warmup = "scheduler.params.", None
    yield _Row(params + "warmup_min_lr", 0.0)
    yield _Row(params + "warmup_max_lr", args.learning_rate, f"learning_rate={args.learning_rate}")
    if num_training_steps is not None:
        warmup = args.get_warmup_steps(num_training_steps)
    # DeepSpeed's schedules refuse 0, and rise over two updates at least.
    yield _Row(params + "warmup_num_steps", None if warmup is None else max(1, warmup), f"{warmup} warm-up updates")
    yield _Row(
        params + "total_num_steps",
        num_training_steps,
        f"the run makes {num_training_steps} updates (max_steps, epochs)",
    )


def _contradictions_of_choice(config: Config, args: Any) -> Iterator[str]:
    """Of an optimizer or a schedule that both name."""
    chosen, optim = get(config, "optimizer.type", None), str(getattr(args.optim, "value", args.optim))
    if chosen is not None and optim not in ("adamw_torch", "adamw_torch_fused"):
        yield f"optimizer.type is {json.dumps(chosen)}, and optim={optim!r}"
    schedule, kind = get(config, "scheduler.type", None), str(args.lr_scheduler_type.value)
    alike = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
    if schedule is not None and kind not in ("linear", alike.get(str(schedule))):
        yield f"scheduler.type is {json.dumps(schedule)}, and lr_scheduler_type={kind!r}"
    if schedule is not None and args.learning_rate_per_module:
        yield f"scheduler.type ({schedule}) gives every group one rate, and learning_rate_per_module several"


def check_filled(config: Config) -> None:
    """Raise ValueError naming each "auto" that is left in a section where DeepSpeed needs a value."""
    sections = ("optimizer", "scheduler", "zero_optimization", "fp16", "bf16")
    left = [path for path, value in walk(config) if value == AUTO and path.split(".")[0] in sections]
    if left:
        raise ValueError(
            f'DeepSpeed\'s configuration: {", ".join(left)}: there is no "auto" for that. Give a value or leave it out.'
        )


def hidden_size_of(model: Any) -> int:
    """The width of a `transformers` model; 0 where the model has no configuration that says."""
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None), getattr(config, "decoder", None)):
        for name in ("hidden_size", "hidden_sizes", "d_model", "n_embd"):
            value = getattr(part, name, None)
            if isinstance(value, (list, tuple)) and value:
                value = max(value)
            if isinstance(value, int) and value > 0:
                return value
    return 0


# -- what cannot be combined -------------------------------------------------------------------------------------------


def check_supported(given: Requested, args: Any, *, device_type: str, client_optimizer: bool = False) -> None:
    """Raise one ValueError naming everything in the configuration and the arguments that this engine does not do."""
    config, stage = given.config, given.stage
    found = [*_typos(config), *_unsupported_settings(config, stage, device_type)]
    if client_optimizer and get(config, "optimizer.type", None) is not None:
        found.append(
            "the configuration has an optimizer and Trainer got another (optimizers=, optimizer_cls_and_kwargs=): keep "
            "one"
        )
    found += [f"{name}: {reason}" for name, reason in refused_features(args, stage)]
    name = str(getattr(args.optim, "value", args.optim))
    if (
        get(config, "optimizer.type", None) is None
        and not client_optimizer
        and name not in ELEMENTWISE
        and not config.get("zero_allow_untested_optimizer")
    ):
        found.append(
            f"optim={name!r}: ZeRO gives an optimizer flat parts of all parameters, and this one is not known to work "
            'element by element. Choose another, for instance "adamw_torch", or, where it does, set '
            '"zero_allow_untested_optimizer": true in the configuration'
        )
    if found:
        raise ValueError(f"DeepSpeed ({given.where}) cannot train this run: {'; '.join(found)}.")


def _typos(config: Config) -> Iterator[str]:
    for key in config:
        if key not in _KEYS:
            hint = closest(str(key), _KEYS)
            if hint:
                yield f"{key!r} is no key of its configuration.{hint.rstrip('?.')}?"
            else:
                logger.warning("DeepSpeed's configuration has the key %r, which is not known here; passed on.", key)


def _unsupported_settings(config: Config, stage: int, device_type: str) -> Iterator[str]:
    if stage not in (1, 2, 3):
        given = get(config, STAGE, None)
        yield (
            f"{STAGE} is {json.dumps(given)}: 1, 2 or 3 shard something; for whole copies (DistributedDataParallel) "
            "leave deepspeed out"
        )
    wanted = {
        "tensor_parallel.autotp_size": (0, 1),
        "sequence_parallel_size": (0, 1),
        "pipeline.stages": (0, 1),
        "amp.enabled": (False, AUTO),
        "managed_gradient_accumulation": (True,),
        "gradient_allreduce_op": ("mean",),
        "curriculum_learning.enabled": (False,),
        "data_efficiency.enabled": (False,),
        "zero_optimization.compute_grad_norm": (True,),
        "zero_optimization.elastic_checkpoint": (False,),
        "zero_optimization.legacy_stage1": (False,),
        "zero_optimization.zenflow": (None,),
    }
    for path, values in wanted.items():
        value = get(config, path, None)
        if value is not None and value not in values:
            yield f"{path} is {json.dumps(value)}, which is not supported here: leave it out"
    kind = str(get(config, "optimizer.type", ""))
    if kind.lower() == "muon":
        yield 'optimizer.type "Muon" changes gradients before their norm is known, which is not supported here'
    offload = get(config, "zero_optimization.offload_param.device", "none")
    if device_type == "cpu" and offload not in ("none", None):
        yield f"zero_optimization.offload_param to {json.dumps(offload)} needs a GPU to offload from: leave it out"
    if offload not in ("none", None) and stage in (1, 2):
        yield f"zero_optimization.offload_param needs stage 3, and {STAGE} is {stage}"


def refused_features(args: Any, stage: int) -> Iterator[tuple[str, str]]:
    """(argument, why) of each of our features that is set in `args` and does not work with this engine."""
    for name, (is_on, stages, reason) in REFUSED.items():
        if stage in stages and is_on(getattr(args, name, None)):
            yield name, reason


_ALL, _THREE = (0, 1, 2, 3), (3,)

# The table of docs/distributed.md is held against this one.
REFUSED: dict[str, tuple[Any, tuple[int, ...], str]] = {
    "async_save": (bool, _ALL, "DeepSpeed writes its part of a checkpoint itself, while training waits"),
    "auto_find_batch_size": (
        bool, _ALL, "a process that repeats its share of an update alone leaves the others waiting"
    ),
    "save_on_each_node": (bool, _ALL, "its parts belong together: save into a directory that all machines share"),
    "optimizer_in_backward": (bool, _ALL, "DeepSpeed owns gradients until its step"),
    "nonfinite": (
        lambda value: value == "rollback", _ALL, '"rollback" cannot put an engine back: use "raise" or "skip"'
    ),
    "torch_compile": (bool, _ALL, "the engine's hooks are not compiled"),
    "jit_mode_eval": (bool, _THREE, "weights that are gathered layer by layer cannot be traced"),
    "ema_decay": (lambda value: value is not None, _THREE, "the weights to average are in parts: use stage 1 or 2"),
    "bf16_full_eval": (bool, _THREE, "weights in parts are not converted: train in bf16 instead"),
    "fp16_full_eval": (bool, _THREE, "weights in parts are not converted: train in fp16 instead"),
}  # fmt: skip


# -- paths such as "zero_optimization.stage" ---------------------------------------------------------------------------


def get(config: Config, path: str, default: Any) -> Any:
    node: Any = config
    for key in path.split("."):
        if not isinstance(node, dict) or key not in node:
            return default
        node = node[key]
    return node


def set_key(config: Config, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    node = config
    for key in parents:
        node = node.setdefault(key, {})
    node[last] = value


def drop(config: Config, path: str, value: Any) -> None:
    """Remove the entry at `path` where it holds `value`."""
    *parents, last = path.split(".")
    node: Any = config
    for key in parents:
        node = node.get(key, {}) if isinstance(node, dict) else {}
    if isinstance(node, dict) and node.get(last) == value:
        del node[last]


def walk(config: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of each entry that is no section."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from walk(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_same(given: Any, of_arguments: Any) -> bool:
    if isinstance(given, (list, tuple)) and isinstance(of_arguments, (list, tuple)):
        return len(given) == len(of_arguments) and all(map(_is_same, given, of_arguments))
    if isinstance(given, bool) or isinstance(of_arguments, bool):
        return given is of_arguments
    if isinstance(given, (int, float)) and isinstance(of_arguments, (int, float)):
        return math.isclose(given, of_arguments, rel_tol=1e-12, abs_tol=0.0)
    return bool(given == of_arguments)
