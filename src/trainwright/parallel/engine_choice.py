"""Which engine trains the model: what the arguments ask for, and what `accelerate launch` asks for.

Owns: `asked_engine`, and the `Strategy` of that engine. Leaves to others: the engines, and the settings that they read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from trainwright.args.device import world_size
from trainwright.interop.environment import env_flag
from trainwright.names import ParallelMode

if TYPE_CHECKING:
    from trainwright.args.training import TrainingArguments
    from trainwright.parallel.strategy import Strategy

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


def strategy_for(args: TrainingArguments, accelerator: Callable[[], Any], *, client_optimizer: bool) -> Strategy:
    """The `Strategy` of the engine that is asked for; `accelerator` builds an Accelerator with the settings of the run.

    client_optimizer: the optimizer is not built from `args.optim`. Raises ValueError as `asked_engine` does, and for an
    engine of several processes in a run of one.
    """
    engine: Engine = asked_engine(args)
    strategy: Strategy
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

        strategy = DistributedStrategy(accelerator(), args)
    strategy.should_save = args.should_save
    return strategy
