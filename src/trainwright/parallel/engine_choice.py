"""Which engine trains the model: what the arguments ask for, and what `accelerate launch` asks for.

Owns: `asked_engine`, the `Strategy` of that engine, and the sizes in `parallelism_config`. Leaves to others: the
engines, and the settings that they read.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from trainwright.args.device import world_size
from trainwright.args.parallel import FSDP_CONFIG_DEFAULTS
from trainwright.interop.environment import env_flag
from trainwright.names import ParallelMode

if TYPE_CHECKING:
    from torch import nn

    from trainwright.args.training import TrainingArguments
    from trainwright.parallel.strategy import Strategy

logger = logging.getLogger(__name__)

Engine = Literal["plain", "ddp", "fsdp", "deepspeed"]

# Set by `accelerate launch`, from its configuration file or its flags.
_VARIABLES: Mapping[str, Engine] = {"ACCELERATE_USE_FSDP": "fsdp", "ACCELERATE_USE_DEEPSPEED": "deepspeed"}
_UNKNOWN = {"ACCELERATE_USE_MEGATRON_LM": "Megatron-LM", "ACCELERATE_USE_SAGEMAKER": "SageMaker's own libraries"}


class _Arguments(Protocol):
    """Of TrainingArguments."""

    @property
    def fsdp(self) -> object: ...
    @property
    def deepspeed(self) -> object: ...
    @property
    def parallelism_config(self) -> Any: ...


def sources(args: _Arguments) -> dict[str, Engine]:
    """What asks for an engine, as messages name it, and for which."""
    found: dict[str, Engine] = {}
    if args.fsdp:
        found["fsdp"] = "fsdp"
    if args.deepspeed:
        found["deepspeed"] = "deepspeed"
    for variable, engine in _VARIABLES.items():
        if env_flag(variable):
            found[f"{variable}={os.environ[variable]} (accelerate launch)"] = engine
    return found


def asked_engine(args: _Arguments) -> Engine:
    """The engine that `args` or the environment ask for; without a word, "ddp" where there are several processes.

    Raises ValueError where they ask for two, or for one that nobody here has.
    """
    for variable, name in _UNKNOWN.items():
        if env_flag(variable):
            raise ValueError(
                f"{variable}={os.environ[variable]}: `accelerate launch` asks for {name}, which this Trainer cannot "
                "train with. Take it out of the configuration file, or of the flags, of accelerate launch."
            )
    found = sources(args)
    engines = sorted(set(found.values()))
    if len(engines) > 1:
        raise ValueError(
            f"{' and '.join(found)} ask for two engines, {' and '.join(engines)}, which both shard the model: keep one "
            "of them."
        )
    return engines[0] if engines else ("ddp" if world_size() > 1 else "plain")


def strategy_for(
    args: TrainingArguments, accelerator: Callable[[], Any], model: nn.Module | None, *, client_optimizer: bool
) -> Strategy:
    """The `Strategy` of the engine that is asked for; `accelerator` builds an Accelerator with the settings of the run.

    model: which may be divided already; None: `model_init` builds it. client_optimizer: the optimizer is not built from
    `args.optim`. Raises ValueError as `asked_engine` does, and for an engine of several processes in a run of one.
    """
    engine: Engine = asked_engine(args)
    strategy: Strategy
    if engine != "fsdp" and args.fsdp_config != FSDP_CONFIG_DEFAULTS:
        logger.warning("fsdp_config has settings, but fsdp is not set, so nothing is sharded: say fsdp='full_shard'.")
    if engine == "deepspeed":
        from trainwright.parallel.deepspeed import DeepSpeedStrategy

        strategy = DeepSpeedStrategy(accelerator, args, client_optimizer=client_optimizer)
    elif args.parallel_mode != ParallelMode.DISTRIBUTED:
        from trainwright.parallel.strategy import Strategy

        if engine == "fsdp":
            raise ValueError(
                f"{' and '.join(sources(args))} shards the model over several processes, and this run has one. Start "
                "the script with torchrun or accelerate launch, or leave that out."
            )
        strategy = Strategy(args.device, fp16=args.fp16)
    elif engine == "fsdp":
        from trainwright.parallel.fsdp import FsdpStrategy

        strategy = FsdpStrategy(accelerator(), args)
    else:
        from trainwright.parallel.distributed import DistributedStrategy
        from trainwright.parallel.tensor import TensorParallelStrategy, mesh_for

        device_mesh = mesh_for(args, model)
        if device_mesh is None:
            strategy = DistributedStrategy(accelerator(), args)
        else:
            strategy = TensorParallelStrategy(accelerator(), args, device_mesh)
    strategy.should_save = args.should_save
    return strategy


# -- sizes -------------------------------------------------------------------------------------------------------------

_SIZES = ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size")
_SPLIT_SEQUENCES = {"cp_size": "context parallel", "sp_size": "sequence parallel"}


def parallel_size(config: Any, name: str) -> int:
    """`name` in accelerate's ParallelismConfig, or in a dict; 1 where nothing is said."""
    value = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
    return int(value or 1)


def check_parallelism(args: _Arguments) -> None:
    """Raise ValueError for sizes in `parallelism_config` that this run cannot have. FSDP checks its sizes itself."""
    config, engine = args.parallelism_config, asked_engine(args)
    sizes = {name: size for name in _SIZES if (size := parallel_size(config, name)) > 1}
    if not sizes or engine == "fsdp":
        return
    if engine == "deepspeed":
        name, size = next(iter(sizes.items()))
        raise ValueError(f"parallelism_config: {name}={size} together with deepspeed is not in this release.")
    for name, what in _SPLIT_SEQUENCES.items():
        if name in sizes:
            raise ValueError(
                f"parallelism_config: {name}={sizes[name]} ({what}) is not in this release; accelerate runs it on GPUs "
                "only. Leave it out, and save memory with gradient_checkpointing=True or fsdp='full_shard'."
            )
    if "dp_shard_size" in sizes:
        raise ValueError(
            f"parallelism_config: dp_shard_size={sizes['dp_shard_size']} shards the model, which fsdp='full_shard' "
            "does."
        )
    product, num_processes = math.prod(sizes.values()), world_size()
    named = " x ".join(f"{name}={size}" for name, size in sizes.items())
    if num_processes % product:
        raise ValueError(
            f"parallelism_config: {named} does not divide the number of processes of this run, {num_processes}."
        )
    if "dp_replicate_size" in sizes and product != num_processes:
        raise ValueError(
            f"parallelism_config: {named} is {product} processes, and this run has {num_processes}: dp_replicate_size "
            f"is {num_processes // sizes.get('tp_size', 1)}, or left out."
        )
