"""`Seq2SeqTrainer`: generation inside evaluation.

Owns: generating predictions in `prediction_step`, and where the generation settings come from: the call
(`evaluate(num_beams=4)`), else the arguments, else the model's own generation config. Leaves to others: everything
else. Source: seeds 001 and 003.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainwright.data import from_args
from trainwright.interop.generation_settings import padding_token, read_config
from trainwright.outputs import PredictionOutput
from trainwright.trainer import Inputs, Trainer

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler
    from torch.optim.optimizer import Optimizer
    from torch.utils.data import Sampler

    from trainwright.args.seq2seq import Seq2SeqTrainingArguments
    from trainwright.callbacks.base import TrainerCallback


class Seq2SeqTrainer(Trainer):
    """A `Trainer` for sequence-to-sequence models: with `predict_with_generate=True` the predictions are generated
    tokens.

    Arguments are those of `Trainer`; `args` is a `Seq2SeqTrainingArguments`. A generation config that cannot work is an
    error here, not after the first epoch.
    """

    args: Seq2SeqTrainingArguments

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Seq2SeqTrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., nn.Module] | None = None,
        compute_loss_func: Callable[..., torch.Tensor] | None = None,
        compute_metrics: Callable[..., dict[str, Any]] | Any = None,
        callbacks: list[TrainerCallback | type[TrainerCallback]] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        preprocess_logits_for_metrics: Callable[..., torch.Tensor] | None = None,
        **older: Any,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            **older,
        )
        self._gen_kwargs: dict[str, Any] = {}
        if not hasattr(self.args, "predict_with_generate"):
            raise TypeError(
                "Seq2SeqTrainer needs args=Seq2SeqTrainingArguments(...): TrainingArguments has no "
                "predict_with_generate."
            )
        if self.args.generation_config is not None:
            self.model.generation_config = self.load_generation_config(self.args.generation_config)

    @staticmethod
    def load_generation_config(gen_config_arg: Any) -> Any:
        """A validated `GenerationConfig`: from one, from its settings as a dict or JSON text, from a directory or a
        JSON file, or from a model's name on the hub.

        Raises ValueError for a setting that there is not, and for settings that `generate` could not follow.
        """
        return read_config(gen_config_arg)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        """`Trainer.evaluate`; further keyword arguments (`max_length`, `num_beams` ...) go to `generate`."""
        self._gen_kwargs = self._with_defaults(gen_kwargs)
        return super().evaluate(eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        **gen_kwargs: Any,
    ) -> PredictionOutput:
        """`Trainer.predict`; further keyword arguments (`max_length`, `num_beams` ...) go to `generate`."""
        self._gen_kwargs = self._with_defaults(gen_kwargs)
        return super().predict(test_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def _with_defaults(self, gen_kwargs: dict[str, Any]) -> dict[str, Any]:
        chosen = dict(gen_kwargs)
        if (
            chosen.get("max_length") is None
            and chosen.get("max_new_tokens") is None
            and self.args.generation_max_length is not None
        ):
            chosen["max_length"] = self.args.generation_max_length
        if chosen.get("num_beams") is None and self.args.generation_num_beams is not None:
            chosen["num_beams"] = self.args.generation_num_beams
        return {name: value for name, value in chosen.items() if value is not None}

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Inputs,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """Hook: generate for one batch. Returns (loss or None, token ids (batch, length), labels or None)."""
        if not self.args.predict_with_generate or prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._inputs_of_evaluation(inputs)
        settings = {k: v for k, v in (gen_kwargs or self._gen_kwargs).items() if v is not None}
        if self._strategy.shards_weights:  # each token gathers them, so all processes generate as many
            settings.setdefault("synced_gpus", True)
        generator: Any = self._strategy.unwrap(model)
        self._check_rows_each(settings.get("num_return_sequences", generator.generation_config.num_return_sequences))
        with torch.no_grad(), self.compute_loss_context_manager():
            generated = generator.generate(**_generation_inputs(inputs), **settings)
        generated = getattr(generated, "sequences", generated)  # (batch, length), also of return_dict_in_generate
        # `generate` marks a config it derived from a model's; left so, a later save_pretrained would write it back
        # changed.
        if getattr(generator.generation_config, "_from_model_config", False):
            generator.generation_config._from_model_config = False
        length = self._generated_length(generator.generation_config, settings)
        if generated.shape[-1] < length:
            generated = self._pad_tensors_to_max_len(generated, length)

        labels = inputs.get("labels")
        loss = None
        if labels is not None:
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(model, dict(inputs)).detach().mean()
            if labels.shape[-1] < length:
                labels = self._pad_tensors_to_max_len(labels, length)
        return loss, generated, labels

    def _check_rows_each(self, num_return_sequences: int | None) -> None:
        """Raise ValueError for several rows per sample where rows have to be matched with samples later."""
        if (num_return_sequences or 1) == 1:
            return
        strategy = self.args.eval_sampling_strategy or self.args.train_sampling_strategy
        if self._strategy.is_distributed or strategy in ("group_by_length", "length_sorted", "batch_rebalance"):
            raise ValueError(
                f"num_return_sequences={num_return_sequences} gives several rows for a sample, which can be matched "
                "with samples only by one process that takes these in order. Generate one sequence, or set "
                'eval_sampling_strategy="sequential" and start one process.'
            )

    @staticmethod
    def _generated_length(config: Any, settings: dict[str, Any]) -> int:
        """Tokens that every generated row is padded to, so that batches are as wide as each other."""
        new_tokens = settings.get("max_new_tokens", None if "max_length" in settings else config.max_new_tokens)
        if new_tokens is not None:
            return int(new_tokens) + 1  # and the decoder's start token
        return int(settings.get("max_length") or config.max_length or 0)

    def _token_padding(self) -> int | None:
        """The pad token where predictions are generated, so that rows of batches of different width can be decoded."""
        return padding_token(self.processing_class, self.model) if self.args.predict_with_generate else None

    def _pad_tensors_to_max_len(self, tensor: torch.Tensor, max_length: int) -> torch.Tensor:
        """(batch, length) to (batch, max_length) with the pad token, or the end token where there is none."""
        pad = padding_token(self.processing_class, self.model)
        if pad is None:
            raise ValueError(
                "Generated rows are padded to one length, which needs a pad token: set model.config.pad_token_id."
            )
        return nn.functional.pad(tensor, (0, max_length - tensor.shape[-1]), value=pad)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """Hook: with `sortish_sampler`, samples of similar length together, so that batches need little padding."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        strategy = "group_by_length" if getattr(self.args, "sortish_sampler", False) else None
        return from_args.train_sampler_for(
            dataset,
            self.args,
            batch_size=self._train_batch_size,
            model_input_name=self._length_input_name(),
            strategy=strategy,
        )


def _generation_inputs(inputs: Inputs) -> dict[str, Any]:
    """What `generate` may see: no labels, and no decoder inputs that are only the labels shifted (they hold the
    answer).
    """
    chosen = {name: value for name, value in inputs.items() if name != "labels"}
    labels, decoder_inputs = inputs.get("labels"), inputs.get("decoder_input_ids")
    if labels is not None and decoder_inputs is not None and labels.shape == decoder_inputs.shape:
        chosen.pop("decoder_input_ids")
        chosen.pop("decoder_attention_mask", None)
    return chosen
