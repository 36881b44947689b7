"""What a subclass, or a program at run time, has put in the place of our hooks.

Owns: which hooks are overridden, which arguments the overrides take, and what follows for the loop, found out once and
not in each step. Leaves to others: calling the hooks (Trainer), withholding arguments and error messages
(`interop/signatures`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from trainwright.interop import signatures

if TYPE_CHECKING:
    import torch

    from trainwright.loss import LabelSmoother
    from trainwright.micro_batch_weights import LossKind

# Hooks that the loop binds, or knows facts about, before its first step. One that a callback replaces in the middle of
# a run is noticed after that step; all other hooks are looked up whenever they are called.
BOUND = frozenset(
    (
        "training_step",
        "compute_loss",
        "get_batch_samples",
        "_maybe_log_save_evaluate",
        "_prepare_input",
        "_prepare_context_parallel_inputs",
        "floating_point_ops",
    )
)


def ours(trainer_class: type) -> dict[str, Any]:
    """The methods of `trainer_class` as they are written: a program may put others in their place later."""
    return {name: value for name, value in vars(trainer_class).items() if not name.startswith("__")} | {
        name: getattr(trainer_class, name)
        for name, value in vars(trainer_class).items()
        if isinstance(value, (staticmethod, classmethod))
    }


class HasLoss(Protocol):
    """What has hooks; of one of them the signature is looked at."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any: ...


class Hooks:
    """The hooks of one Trainer as they are now. It is not stored, only what was found out about it.

    `methods`: of the base class, as `ours` gives them. `loss_func`: the user's `compute_loss_func`.
    """

    def __init__(
        self, instance: HasLoss, methods: Mapping[str, Any], loss_func: Callable[..., Any] | None = None
    ) -> None:
        # Compared here, not by a call for each of the 170 methods.
        replaced, owner = vars(instance), type(instance)
        self.overridden = frozenset(
            name
            for name, method in methods.items()
            if inspect.isfunction(method) and (name in replaced or getattr(owner, name) is not method)
        )
        self._classes = {name: getattr(type(instance), name) for name in BOUND}
        # Set on the instance itself: by a callback, or where an override demands an argument that ours has a default
        # for (`signatures.give_defaults`).
        self._instance = {name: method for name, method in vars(instance).items() if name in BOUND}
        compute_loss: Callable[..., Any] = instance.compute_loss
        self.compute_loss_is_ours = "compute_loss" not in self.overridden
        self.compute_loss_takes_items = signatures.accepts(compute_loss, "num_items_in_batch")
        self.loss_func_takes_items = loss_func is not None and signatures.accepts(loss_func, "num_items_in_batch")
        self.has_loss_func = loss_func is not None
        self.prepare_input_is_ours = "_prepare_input" not in self.overridden
        self.splits_sequences = "_prepare_context_parallel_inputs" in self.overridden
        self.log_save_is_ours = "_maybe_log_save_evaluate" not in self.overridden

    def are_those_of(self, instance: object) -> bool:
        """Whether none of BOUND was replaced since, in the class or on the instance."""
        now = {name: method for name, method in vars(instance).items() if name in BOUND}
        return (
            now.keys() == self._instance.keys()
            and all(now[name] is method for name, method in self._instance.items())
            and all(getattr(type(instance), name) is method for name, method in self._classes.items())
        )

    @property
    def asks_for_items(self) -> bool:
        """Whether an override of `compute_loss` has room for the number of items in an update."""
        return self.compute_loss_takes_items and not self.compute_loss_is_ours

    def divides_by_items(self, model_does: bool, smoother: LabelSmoother | None) -> bool:
        """Whether `compute_loss`, given `num_items_in_batch`, divides by it: a micro-batch's loss is then its share of
        the update's, and else the mean over its items.

        model_does: the model's own loss does (`model_accepts_loss_kwargs`). smoother: takes the place of that loss.
        """
        if not self.compute_loss_is_ours:
            return self.compute_loss_takes_items and model_does
        if self.has_loss_func:
            return self.loss_func_takes_items
        return model_does or smoother is not None

    def loss_is_normalized(
        self,
        num_items: torch.Tensor | int | None,
        declared: bool | None,
        model_does: bool,
        smoother: LabelSmoother | None,
    ) -> bool:
        """Whether the losses of micro-batches add up to the update's as they are: divided by `num_items`, the items of
        the whole update, or because the subclass says so (`declared`, its `loss_is_scaled_for_ga`).
        """
        if declared is not None:
            return declared
        return num_items is not None and self.divides_by_items(model_does, smoother)

    def kind_of_loss(
        self,
        num_items: torch.Tensor | int | None,
        declared: bool | None,
        model_does: bool,
        smoother: LabelSmoother | None,
    ) -> LossKind:
        """What a micro-batch's loss is; arguments as for `loss_is_normalized`. What an override of `compute_loss`
        returns is to be divided by the number of micro-batches.
        """
        if not self.compute_loss_is_ours or declared is not None:
            return "override"
        return "share" if self.loss_is_normalized(num_items, None, model_does, smoother) else "mean"
