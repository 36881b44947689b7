"""When data are looked at, and what is made of an error that they led to.

Owns: `Preflight`, of one run. Leaves to others: what is wrong with what (`dataset`, `batch`), where in a run it is
asked (Trainer).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trainwright.oom_retry import is_out_of_memory
from trainwright.preflight import batch as of_batch
from trainwright.preflight import dataset as of_dataset
from trainwright.preflight.model_limits import ModelLimits

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

# What data lead to in a model; of another kind (a lost process, a full disk) they are never the cause.
_OF_DATA = (IndexError, ValueError, RuntimeError, TypeError, AssertionError)
# What an error of a model or tokenizer means, where no look at the batch shows it.
_MEANINGS = (
    (
        "no padding token is defined",
        "The model finds the end of each sample by its padding token, and its config has none: "
        "model.config.pad_token_id = tokenizer.pad_token_id (where the tokenizer has none either, first "
        "tokenizer.pad_token = tokenizer.eos_token).",
    ),
    (
        "does not require grad and does not have a grad_fn",
        "The loss depends on no weight that is trained: it was detached (.item(), .detach(), torch.no_grad(), "
        "torch.tensor(loss)), or all weights that it depends on are frozen.",
    ),
    (
        "Unable to create tensor",
        "The collator pads the inputs and not the labels, which differ in length: pass data_collator="
        "DataCollatorForSeq2Seq(tokenizer) (labels of sequences) or DataCollatorForTokenClassification(tokenizer).",
    ),
)


class Preflight:
    """What one run knows of its model, to look at data with. `check_*` raise ValueError before anything is trained.

    model_gets_batches: no override changes or reads them before. loss_is_the_models: nor does a function of the user
    compute the loss. collator_is_known: it is ours or of
    transformers, and hands on labels as they are. dataset: the training data, for what they hold besides a batch.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        label_names: Sequence[str],
        model_gets_batches: bool,
        loss_is_the_models: bool,
        is_packed: bool,
        collator: object,
        dataset: Any,
    ) -> None:
        self.limits = ModelLimits.of(model)
        self._label_names, self._is_packed = label_names, is_packed
        self._model_gets_batches, self._dataset = model_gets_batches, dataset
        self._loss_is_the_models = model_gets_batches and loss_is_the_models
        self._collator_is_known = _module_of(collator).partition(".")[0] in ("trainwright", "transformers")

    def check_dataset(self, dataset: Any, name: str) -> None:
        """The column of labels, read whole where that is cheap."""
        if self._collator_is_known and self._loss_is_the_models:
            for problem in of_dataset.problems(dataset, name, self.limits):
                raise ValueError(problem)

    def check_batch(self, batch: Any) -> None:
        """One batch, as the collator made it, on whatever device."""
        for problem in self._problems(batch):
            raise ValueError(problem)
        if self._model_gets_batches and (remark := of_batch.too_long_for_training(batch, self.limits, self._is_packed)):
            logger.warning("%s", remark)

    def explained(self, error: Exception, batches: Sequence[Any]) -> Exception:
        """What to raise where a step over `batches` failed: a ValueError that names value, row and cure where they are
        the cause, else `error`, with the shapes of the batch as a note (Python 3.11).
        """
        if not isinstance(error, _OF_DATA) or is_out_of_memory(error) or _is_ours(error):
            return error
        for batch in batches:
            for problem in self._problems(batch):
                return ValueError(problem)
        for words, meaning in _MEANINGS:
            if words in str(error):
                return type(error)(f"{str(error).rstrip('. ')}. {meaning}") if type(error) in _OF_DATA else error
        if batches and hasattr(error, "add_note"):
            error.add_note(f"The batch: {of_batch.described(batches[0])}.")
        return error

    def _problems(self, batch: Any) -> Sequence[str]:
        if not self._model_gets_batches:
            return []
        try:
            found = list(
                of_batch.problems(
                    batch,
                    self.limits,
                    label_names=self._label_names,
                    loss_is_the_models=self._loss_is_the_models,
                    is_packed=self._is_packed,
                    label_like=of_dataset.label_like(self._dataset),
                )
            )
        except (RuntimeError, TypeError):  # a kind of tensor that cannot be compared (nested, quantized)
            return []
        return found


def _module_of(collator: object) -> str:
    inner = getattr(collator, "data_collator", None)  # one that removes columns first
    owner = inner if inner is not None else collator
    return str(getattr(owner, "__module__", None) or type(owner).__module__)


def _is_ours(error: Exception) -> bool:
    """Whether this package raised it, and named cause and cure itself."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return type(error).__module__.startswith("trainwright.") or str(module).startswith("trainwright.")
