"""`FsdpConfig`: how a model is sharded over processes (FSDP2), from every form in which it is asked for.

Owns: names, defaults, the names of version 1 in terms of version 2, and what `accelerate launch` puts into the
environment. Leaves to others: sharding (`parallel/fsdp.py`). Imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainwright.args.checks import typed
from trainwright.names import FSDPOption, closest

logger = logging.getLogger(__name__)

WRAP_POLICIES = ("transformer_based_wrap", "size_based_wrap", "no_wrap")
STATE_DICT_TYPES = ("full_state_dict", "sharded_state_dict")

# Of version 1, by number or by name.
_STRATEGIES = ("full_shard", "shard_grad_op", "no_shard", "hybrid_shard", "hybrid_shard_zero2")
_OTHER_NAMES = {
    "cpu_offload": "offload_params",
    "transformer_cls_to_wrap": "transformer_layer_cls_to_wrap",
    "transformer_cls_names_to_wrap": "transformer_layer_cls_to_wrap",
    "backward_prefetch_policy": "backward_prefetch",
}
_XLA = ("xla", "xla_fsdp_v2", "xla_fsdp_grad_ckpt", "xla_fsdp_settings")
# Names that are known, and why they are not taken.
_REFUSED = {
    **dict.fromkeys(_XLA, "is about torch_xla, which this release does not run on"),
    "mixed_precision_policy": "is chosen by bf16=True: weights are gathered in bfloat16, gradients summed in float32",
    "ignored_modules": "would leave parameters that no process averages; freeze them instead (requires_grad=False)",
    "param_init_fn": "is not taken: a model on the meta device is filled with the weights of process 0",
    "state_dict_config": "is not needed: state_dict_type says how checkpoints are written",
    "optim_state_dict_config": "is not needed: state_dict_type says how checkpoints are written",
}
# Of version 1, without a counterpart because version 2 always does so, or without an effect on the result.
_ALWAYS = {
    "use_orig_params": "version 2 always has the original parameters",
    "limit_all_gathers": "version 2 always limits them",
    "backward_prefetch": "version 2 always gathers the next weights during the backward pass",
}


@dataclass
class FsdpConfig:
    """How the weights, gradients and optimizer state of a model are divided over processes."""

    version: int = field(
        default=2, metadata={"help": "Of FSDP. 2 is what there is; 1 is translated, and trained with 2."}
    )
    auto_wrap_policy: str | None = field(
        default=None,
        metadata={
            "help": "What is gathered together: 'transformer_based_wrap' (each layer), 'size_based_wrap' (by "
            "min_num_params), 'no_wrap' (all at once). None: by what else is set, each repeated block otherwise."
        },
    )
    transformer_layer_cls_to_wrap: list[str] = field(
        default_factory=list, metadata={"help": "Names of the classes whose modules are gathered one at a time."}
    )
    min_num_params: int = field(
        default=0, metadata={"help": "Gather modules with at least that many parameters one at a time; 0: by class."}
    )
    reshard_after_forward: bool = field(
        default=True,
        metadata={
            "help": "Free gathered weights after the forward pass and gather them again for the backward pass: less "
            "memory, half as much communication again."
        },
    )
    replicates_over_nodes: bool = field(
        default=False, metadata={"help": "Shard within each node, and average gradients over nodes (HSDP)."}
    )
    offload_params: bool = field(
        default=False,
        metadata={"help": "Shards, their gradients and optimizer state are in the host's memory. On a CPU they are."},
    )
    state_dict_type: str = field(
        default="full_state_dict",
        metadata={
            "help": "Checkpoints: 'full_state_dict', process 0 gathers and writes all; 'sharded_state_dict', each "
            "process writes its part."
        },
    )
    sync_module_states: bool = field(
        default=True, metadata={"help": "All processes begin with the weights and buffers of process 0."}
    )
    cpu_ram_efficient_loading: bool = field(
        default=False,
        metadata={"help": "Only process 0 has loaded the weights; those of the others may be empty or on 'meta'."},
    )
    forward_prefetch: bool = field(
        default=False, metadata={"help": "Gather the weights of the next block while the forward pass is in this one."}
    )
    activation_checkpointing: bool = field(
        default=False, metadata={"help": "The same as gradient_checkpointing=True: recompute activations."}
    )
    activation_checkpointing_offload: bool = field(
        default=False, metadata={"help": "Checkpointed activations wait in the host's memory."}
    )

    @classmethod
    def parse(cls, options: Iterable[FSDPOption], given: Mapping[str, Any] | None) -> FsdpConfig:
        """From the words of `fsdp` and the keys of `fsdp_config`, each with or without "fsdp_" in front.

        Raises ValueError for an unknown key, with the nearest name, for one that is refused, with the reason, and for
        two that contradict each other.
        """
        words = {option.value for option in options}
        settings = cls._named(given or {})
        strategy = settings.pop("sharding_strategy", None)
        if strategy is not None:
            words.add(_strategy_named(strategy))
        reshard = settings.get("reshard_after_forward")
        if isinstance(reshard, str):  # a strategy of version 1 under the name of version 2
            words.add(_strategy_named(settings.pop("reshard_after_forward")))
        if "no_shard" in words:
            raise ValueError(
                "fsdp='no_shard' shards nothing: leave out fsdp, and each process trains a whole copy of the model "
                "(DistributedDataParallel), which is the same."
            )
        if words & {"shard_grad_op", "hybrid_shard_zero2"}:
            settings.setdefault("reshard_after_forward", False)
        settings["replicates_over_nodes"] = bool(words & {"hybrid_shard", "hybrid_shard_zero2"})
        if "offload" in words:
            settings["offload_params"] = True
        config = cls(**{name: value for name, value in settings.items() if value is not None})
        config._check()
        return config

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> FsdpConfig | None:
        """From the variables that `accelerate launch` sets for `distributed_type: FSDP`; None where it did not."""
        if typed(environment.get("ACCELERATE_USE_FSDP", "false")) not in (True, 1):
            return None
        known = {*cls._names(), *_OTHER_NAMES, *_ALWAYS, "sharding_strategy"}
        found = {name: environment.get(f"FSDP_{name.upper()}", "") for name in sorted(known)}
        return cls.parse((), {name: typed(text) for name, text in found.items() if text.strip()})

    @classmethod
    def _names(cls) -> list[str]:
        return [one.name for one in dataclasses.fields(cls) if one.name != "replicates_over_nodes"]

    @classmethod
    def _named(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """`given` by the names of the fields."""
        settings: dict[str, Any] = {}
        allowed = [*cls._names(), "sharding_strategy", *_ALWAYS]
        for key, value in given.items():
            name = key.removeprefix("fsdp_")
            name = _OTHER_NAMES.get(name, name)
            if name in _REFUSED:
                if value:
                    raise ValueError(f"fsdp_config: {name}={value!r} {_REFUSED[name]}. Leave it out.")
            elif name in _ALWAYS:
                if value not in (None, True, "backward_pre", "BACKWARD_PRE") and name != "limit_all_gathers":
                    logger.warning("fsdp_config: %s=%r has no effect: %s.", name, value, _ALWAYS[name])
            elif name not in allowed:
                raise ValueError(
                    f"fsdp_config has no setting {key!r}; it has {sorted(allowed)}.{closest(name, allowed)}"
                )
            elif settings.get(name, value) != value:
                raise ValueError(f"fsdp_config sets {name} twice, to {settings[name]!r} and {value!r}: keep one.")
            else:
                settings[name] = value
        return settings

    def _check(self) -> None:
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            if one.type == "bool" and not isinstance(value, bool):
                if value not in (0, 1):
                    raise TypeError(f"fsdp_config: {one.name}={value!r} must be True or False.")
                setattr(self, one.name, bool(value))
        if self.version not in (1, 2):
            raise ValueError(f"fsdp_config: version={self.version!r} is not known; it is 2, or 1, which is translated.")
        for name, allowed in (("auto_wrap_policy", WRAP_POLICIES), ("state_dict_type", STATE_DICT_TYPES)):
            value = getattr(self, name)
            if value is not None and str(value).lower() not in allowed:
                hint = (
                    " A state that only the same number of processes can read is not written."
                    if (str(value).lower() == "local_state_dict")
                    else closest(str(value).lower(), allowed)
                )
                raise ValueError(f"fsdp_config: {name}={value!r} must be one of {list(allowed)}.{hint}")
            setattr(self, name, None if value is None else str(value).lower())
        names = self.transformer_layer_cls_to_wrap
        if isinstance(names, str):
            names = [name.strip() for name in names.split(",") if name.strip()]
        self.transformer_layer_cls_to_wrap = list(names)
        if isinstance(self.min_num_params, float) and self.min_num_params == int(self.min_num_params):
            self.min_num_params = int(self.min_num_params)
        if not isinstance(self.min_num_params, int) or self.min_num_params < 0:
            raise ValueError(f"fsdp_config: min_num_params={self.min_num_params!r} must be a number of parameters.")
        if self.auto_wrap_policy == "size_based_wrap" and not self.min_num_params:
            raise ValueError("fsdp_config: auto_wrap_policy='size_based_wrap' needs min_num_params above 0.")
        if self.cpu_ram_efficient_loading and not self.sync_module_states:
            raise ValueError(
                "fsdp_config: cpu_ram_efficient_loading=True needs sync_module_states=True: all processes but the "
                "first would begin with weights that nobody loaded."
            )


def _strategy_named(strategy: Any) -> str:
    """The word of `fsdp` for a sharding strategy of version 1, which is a number from 1 or a name."""
    name = str(getattr(strategy, "name", strategy)).lower()
    if name.isdigit() and 1 <= int(name) <= len(_STRATEGIES):
        return _STRATEGIES[int(name) - 1]
    if name not in _STRATEGIES:
        raise ValueError(
            f"fsdp_config: sharding_strategy={strategy!r} must be one of {list(_STRATEGIES)}, or its number from 1."
            f"{closest(name, _STRATEGIES)}"
        )
    return name
