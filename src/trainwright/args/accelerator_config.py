"""`AcceleratorConfig`: settings of accelerate's data handling.

Owns: names, defaults and reading them from a dict, JSON text or file. Leaves to others: building the Accelerator
(`parallel/accelerator.py`). Imports nothing heavy.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any

from trainwright.args.checks import parse_json, read_json_file, typed
from trainwright.names import closest

ACCUMULATION_SETTINGS = ("num_steps", "adjust_scheduler", "sync_with_dataloader", "sync_each_batch")
_ACCUMULATION = "accelerator_config: gradient_accumulation_kwargs"


@dataclass
class AcceleratorConfig:
    """How accelerate shares batches among processes."""

    split_batches: bool = field(
        default=False,
        metadata={"help": "Split each loaded batch among the processes instead of one batch per process."},
    )
    dispatch_batches: bool | None = field(
        default=None,
        metadata={"help": "Load on the first process only and send to the others. None: for iterable datasets."},
    )
    even_batches: bool = field(
        default=True, metadata={"help": "Repeat samples from the start where the last batches would differ in size."}
    )
    use_seedable_sampler: bool = field(
        default=True,
        metadata={
            "help": "Shuffle with a sampler that is reseeded each epoch, so that runs repeat exactly. For loaders "
            "that a script prepares with trainer.accelerator itself; those of the Trainer always are."
        },
    )
    non_blocking: bool = field(
        default=False, metadata={"help": "Copy batches to the device asynchronously. Needs pinned memory."}
    )
    gradient_accumulation_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Settings of accelerate's GradientAccumulationPlugin: sync_each_batch (exchange gradients after "
            "every micro-batch, which saves memory), adjust_scheduler and sync_with_dataloader (for what a script "
            "prepares with trainer.accelerator itself), num_steps (the same as gradient_accumulation_steps)."
        },
    )
    use_configured_state: bool = field(
        default=False, metadata={"help": "Use the accelerate state that the script has set up, instead of a fresh one."}
    )

    @classmethod
    def parse(cls, value: Any) -> AcceleratorConfig:
        """From None, a config, a dict, JSON text, or the path of a .json file; errors name unknown keys."""
        if value is None:
            return cls()
        if isinstance(value, type):
            raise TypeError("accelerator_config is a class; pass an instance: accelerator_config=AcceleratorConfig().")
        if hasattr(value, "split_batches") and hasattr(
            value, "to_dict"
        ):  # ours, or another library's of the same shape
            return value  # type: ignore[no-any-return]
        if isinstance(value, dict):
            return cls._from_dict(value)
        if isinstance(value, str) and value.lstrip().startswith("{"):
            return cls._from_dict(typed(parse_json("accelerator_config", value)))
        if isinstance(value, (str, os.PathLike)):
            return cls.from_json_file(value)
        raise TypeError(f"accelerator_config={value!r} must be a dict, JSON text, a path or an AcceleratorConfig.")

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> AcceleratorConfig:
        """From a JSON file whose keys are the fields."""
        return cls._from_dict(read_json_file("accelerator_config", os.fspath(json_file)))

    @classmethod
    def _from_dict(cls, given: dict[str, Any]) -> AcceleratorConfig:
        allowed = [one.name for one in dataclasses.fields(cls)]
        for key in given:
            if key not in allowed:
                raise ValueError(f"accelerator_config has no setting {key!r}; it has {allowed}.{closest(key, allowed)}")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Every setting by name; a copy."""
        return copy.deepcopy(self.__dict__)

    def pop(self, key: str, default: Any = None) -> Any:
        """Remove and return one setting, as `dict.pop` does; `default` where it is absent."""
        return self.__dict__.pop(key, default)


def num_accumulation_steps(settings: Any) -> int | None:
    """`num_steps` of `gradient_accumulation_kwargs`; None where it is not set.

    Raises TypeError or ValueError for settings that accelerate's GradientAccumulationPlugin does not have.
    """
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise TypeError(f"{_ACCUMULATION}={settings!r} must be a dict of {list(ACCUMULATION_SETTINGS)}.")
    for name, value in settings.items():
        if name not in ACCUMULATION_SETTINGS:
            allowed = list(ACCUMULATION_SETTINGS)
            raise ValueError(f"{_ACCUMULATION} has no setting {name!r}; it has {allowed}.{closest(name, allowed)}")
        if name != "num_steps" and not isinstance(value, bool):
            raise TypeError(f"{_ACCUMULATION}: {name}={value!r} must be True or False.")
    num_steps = settings.get("num_steps")
    if num_steps is not None and (isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1):
        raise ValueError(f"{_ACCUMULATION}: num_steps={num_steps!r} must be a whole number of at least 1.")
    return num_steps
