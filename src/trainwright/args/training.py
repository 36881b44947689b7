"""`TrainingArguments`: all topics joined, validated together, and the values derived from them.

Owns: the order in which topics are validated, ranks and device as properties, and serialisation. Leaves to others: the
fields (one file per topic), older names (`constructor.py`), finding the device (`device.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from trainwright.args import device as devices
from trainwright.args.checks import check_switch
from trainwright.args.options import option
from trainwright.args.renamed import TWINS, twin_value
from trainwright.args.reporting import LOG_LEVELS, PASSIVE
from trainwright.args.setters import GroupedArguments
from trainwright.interop.optional import require
from trainwright.log_output import library_logger
from trainwright.names import ParallelMode
from trainwright.redact import masked

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_SWITCHES = ("bool", "bool | None", bool, bool | None)  # the last two in a generation of `interop`
_TWIN_OF = {**dict(TWINS), **{newer: older for older, newer in TWINS}}


@dataclass
class TrainingArguments(GroupedArguments):
    """All arguments of a training run.

    Names and defaults are those of the documents; `python script.py --help` and each field's `metadata["help"]` explain
    them. Constructing one reads no file that was not named, touches no device, and imports no heavy package.

    Raises:
        TypeError: an argument does not exist; the message suggests the nearest.
        ValueError: a value is out of range or contradicts another; the message names both and a remedy.
    """

    _n_gpu: int = option(
        -1,
        "Number of GPUs this process uses; -1 until the device is first read.",
        init=False,
        repr=False,
        compare=False,
    )

    # Fields that may be given as JSON text, the command line's way to pass a dict.
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        "accelerator_config",
        "fsdp_config",
        "deepspeed",
        "gradient_checkpointing_kwargs",
        "activation_checkpointing_kwargs",
        "lr_scheduler_kwargs",
        "learning_rate_per_module",
        "liger_kernel_config",
    ]
    # Older names without a field, which the command line accepts but does not list.
    _hidden_arguments: ClassVar[tuple[str, ...]] = (
        "evaluation_strategy",
        "xpu_backend",
        "sharded_ddp",
        "dispatch_batches",
        "split_batches",
    )

    # Whether eval_strategy="steps" also evaluates at a last step that is no multiple of eval_steps.
    _evaluates_last_step: ClassVar[bool] = True

    deepspeed_plugin: ClassVar[Any] = None  # accelerate's, where DeepSpeed is on; other libraries read it

    def __post_init__(self) -> None:
        """Normalise and validate every field. Idempotent, since `dataclasses.replace` runs it on its result."""
        self.__dict__.pop("_initialized", None)
        self._refuse_text_for_switches()
        self._check_run()
        self._check_optimization()
        self._check_batches()
        self._check_intervals()
        self._check_evaluation()
        self._check_precision()
        self._check_averaging()
        self._check_parallel()
        self._check_reporting()
        self._check_hub()
        self._check_safety()
        self._validate_args()
        self.__dict__["_initialized"] = True

    def _refuse_text_for_switches(self) -> None:
        """Text such as "False" would count as true. Fields that a subclass adds are not checked."""
        for field in dataclasses.fields(self):
            if (
                isinstance(getattr(self, field.name, None), str)
                and field.type in _SWITCHES
                and "extension" in field.metadata
            ):
                check_switch(self, field.name)

    def _validate_args(self) -> None:
        """Refuse combinations across topics."""
        self._check_best_model(self.lr_scheduler_type)
        self._check_optimizer_in_backward()

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        twin = _TWIN_OF.get(name)
        if twin is not None and "_initialized" in self.__dict__:
            object.__setattr__(self, twin, twin_value(name, value, getattr(self, twin)))

    if not TYPE_CHECKING:  # which would take every misspelt name for an attribute

        def __getattr__(self, name: str) -> Any:
            message = f"{type(self).__name__!r} object has no attribute {name!r}"
            if sys._getframe(1).f_globals.get("__name__", "").startswith("transformers."):
                message += (
                    ". These are trainwright's arguments, and the class that reads them is of transformers: take both "
                    "from trainwright (from trainwright import Trainer, TrainingArguments), or call "
                    "trainwright.dropin.install() before transformers is imported."
                )
            raise AttributeError(message, name=name, obj=self)

    def __getstate__(self) -> dict[str, Any]:
        """Without the device: another process finds its own."""
        return {name: value for name, value in self.__dict__.items() if name != "_device"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "_n_gpu": -1})

    # Device and ranks: found on first read.

    @property
    def _setup_devices(self) -> torch.device:
        """The device; the first read chooses it, joins the process group and checks the precision."""
        if "_device" not in self.__dict__:
            self.__dict__["_device"] = devices.find_device(self)
        return self.__dict__["_device"]  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        """The device that this process computes on."""
        return self._setup_devices

    @property
    def n_gpu(self) -> int:
        """Number of GPUs that this process uses: 0 on a CPU, more than 1 only where one process drives several."""
        _ = self._setup_devices
        return self._n_gpu

    @property
    def distributed_state(self) -> Any:
        """An `accelerate.PartialState`, as libraries that build on these arguments read it."""
        _ = self._setup_devices  # joins the process group, which the state then uses
        return require("accelerate", "TrainingArguments.distributed_state").PartialState(cpu=self.device.type == "cpu")

    @property
    def mixed_precision(self) -> str:
        """The precision of autocast, as accelerate spells it: "bf16", "fp16" or "no"."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "no"

    @property
    def world_size(self) -> int:
        """Number of processes (ranks) of the run."""
        return devices.world_size()

    @property
    def process_index(self) -> int:
        """Global rank of this process."""
        return devices.process_index()

    @property
    def local_process_index(self) -> int:
        """Local rank of this process, on its machine."""
        return devices.local_process_index(self.local_rank)

    @property
    def parallel_mode(self) -> ParallelMode:
        """Several processes, one process with several GPUs, or neither."""
        if self.world_size > 1:
            return ParallelMode.DISTRIBUTED
        return ParallelMode.NOT_DISTRIBUTED if self.n_gpu > 1 else ParallelMode.NOT_PARALLEL

    @property
    def place_model_on_device(self) -> bool:
        """Whether the Trainer moves the model to the device. Subclasses override it to place it themselves."""
        return True

    @property
    def train_batch_size(self) -> int:
        """Samples of one training micro-batch in this process: the size per device times its GPUs."""
        return self.per_device_train_batch_size * max(1, self.n_gpu)

    @property
    def eval_batch_size(self) -> int:
        """Samples of one evaluation batch in this process: the size per device times its GPUs."""
        return self.per_device_eval_batch_size * max(1, self.n_gpu)

    @property
    def should_log(self) -> bool:
        """Whether this process writes logs: the first of the run, or of each machine with `log_on_each_node`."""
        return (self.local_process_index if self.log_on_each_node else self.process_index) == 0

    @property
    def should_save(self) -> bool:
        """Whether this process writes files: the first of the run, or of each machine with `save_on_each_node`."""
        return (self.local_process_index if self.save_on_each_node else self.process_index) == 0

    @property
    def ddp_timeout_delta(self) -> datetime.timedelta:
        """`ddp_timeout` as a time span."""
        return datetime.timedelta(seconds=self.ddp_timeout)

    @property
    def framework(self) -> str:
        """ "pt": the arguments are for PyTorch."""
        return "pt"

    @property
    def is_torch_greater_or_equal_than_2_8(self) -> bool:
        """True: no older torch is supported."""
        return True

    @property
    def _no_sync_in_gradient_accumulation(self) -> bool:
        """Whether gradients may stay local between updates; DeepSpeed decides that itself."""
        return not self.deepspeed

    def get_process_log_level(self) -> int:
        """The level (as in `logging`) for this process, from `log_level` or `log_level_replica` by `should_log`."""
        level = LOG_LEVELS[self.log_level if self.should_log else self.log_level_replica]
        if level != PASSIVE:
            return level
        return library_logger().getEffectiveLevel() if self.should_log else logging.WARNING

    @contextlib.contextmanager
    def main_process_first(self, local: bool = True, desc: str = "work") -> Iterator[None]:
        """Let the first process do the work while the others wait, then let the others do it (from its cache).

        Args:
            local: first means first on each machine. False for a shared file system: first of the whole run.
            desc: what the work is, for debug logs.
        """
        if self.world_size <= 1:
            yield
            return
        _ = self._setup_devices  # joins the process group
        is_first = (self.local_process_index if local else self.process_index) == 0
        if not is_first:
            logger.debug("process %d waits for the first one to do: %s", self.process_index, desc)
            devices.barrier(self)
        try:
            yield
        finally:
            if is_first:
                logger.debug("process %d has done: %s; the others continue", self.process_index, desc)
                devices.barrier(self)

    # Serialisation: secrets never leave.

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain data: enums by value, configs as dicts, secrets replaced by their name.

        Secrets are fields and keys named like one (`*_token`, `*api_key*`, `*password*`, `*secret*` ...), and passwords
        inside URLs. `TrainingArguments(**args.to_dict())` is equal but for them: a placeholder reads as None.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}
        plain = {name: _plain(value) for name, value in values.items()}
        self._dict_dtype_to_str(plain)
        return masked(plain)

    def to_json_string(self) -> str:
        """`to_dict` as indented JSON; values that JSON cannot represent are written as text."""
        return json.dumps(self.to_dict(), indent=2, default=str)

    def to_sanitized_dict(self) -> dict[str, Any]:
        """`to_dict` plus the batch sizes of this process, everything but numbers and text as text (for TensorBoard)."""
        values = {**self.to_dict(), "train_batch_size": self.train_batch_size, "eval_batch_size": self.eval_batch_size}
        return {name: value if type(value) in (bool, int, float, str) else str(value) for name, value in values.items()}

    def _dict_dtype_to_str(self, values: dict[str, Any]) -> None:
        """Write torch dtypes in `values`, nested dicts included, as "float32"; in place."""
        for name, value in values.items():
            if isinstance(value, dict):
                self._dict_dtype_to_str(value)
            elif type(value).__name__ == "dtype" and type(value).__module__ == "torch":
                values[name] = str(value).removeprefix("torch.")

    _dict_torch_dtype_to_str = _dict_dtype_to_str  # its name in 4.x

    def __str__(self) -> str:
        lines = "".join(f"{name}={value!r},\n" for name, value in sorted(self.to_dict().items()))
        return f"{type(self).__name__}(\n{lines})"

    __repr__ = __str__


def _plain(value: Any) -> Any:
    """Enums by value, objects with `to_dict` and dataclasses as dicts; copies, so that changing the result is safe."""
    if type(value) in (bool, int, float, str, type(None)):  # nearly all of them, at each save
        return value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, type):
        return str(value)
    if hasattr(value, "to_dict"):
        return _plain(value.to_dict())
    if dataclasses.is_dataclass(value):
        return _plain(dataclasses.asdict(value))  # type: ignore[arg-type]
    return value
