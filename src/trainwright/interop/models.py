"""Properties of a model, determined from the object itself.

Owns: questions about `transformers`- and peft-like models, answered without importing either, and labels as they take
them. Leaves to others: acting on the answers.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from trainwright.interop.loaded import is_deepspeed_engine, is_peft_model, is_pretrained_model

logger = logging.getLogger(__name__)


def build_model(model_init: Any, trial: Any) -> nn.Module:
    """The model that `model_init` returns; it takes no argument, or `trial`."""
    if not callable(model_init):
        raise TypeError(f"model_init={model_init!r} must be a function that returns a model.")
    parameters = inspect.signature(model_init).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if len(required) > 1:
        raise RuntimeError(f"model_init must take no argument, or one (the trial); it needs {len(required)}.")
    takes = bool(required) or len(parameters) == 1
    model = model_init(trial) if takes else model_init()
    if not isinstance(model, nn.Module):
        raise RuntimeError(f"model_init must return a torch.nn.Module; it returned {model!r}.")
    return model


def unreplicated(model: object) -> Any:
    """The model inside DataParallel, DistributedDataParallel and DeepSpeed's engine; the model itself otherwise."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or is_deepspeed_engine(model):
        model = model.module  # type: ignore[attr-defined]
    return model


def unwrapped(model: object) -> Any:
    """The model without wrappers that only change how it is called: replicas and `torch.compile`."""
    while True:
        inner = unreplicated(model)
        inner = getattr(inner, "_orig_mod", inner)  # torch.compile
        if inner is model:
            return model
        model = inner


def base_model_of(model: object) -> Any:
    """The model inside those wrappers and peft's, whose `forward` has the real signature; the model itself otherwise.

    A class is returned as it is.
    """
    inner = unwrapped(model)
    if is_peft_model(inner):
        return unwrapped(inner.get_base_model() if hasattr(inner, "get_base_model") else inner.base_model.model)
    return inner


def accepts_loss_kwargs(model: nn.Module) -> bool:
    """Whether `forward` takes `num_items_in_batch`: by the attribute `accepts_loss_kwargs`, or by its signature.

    Taking any keyword does not prove that the model's loss uses it: see `honours_num_items`.
    """
    base = base_model_of(model)
    stated = getattr(base, "accepts_loss_kwargs", None)
    if stated is not None:
        return bool(stated)
    parameters = inspect.signature(base.forward).parameters
    return "num_items_in_batch" in parameters or any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
    )


def states_loss_kwargs(model: nn.Module) -> bool:
    """Whether the model declares it explicitly, so that `honours_num_items` need not run it."""
    base = base_model_of(model)
    return (
        getattr(base, "accepts_loss_kwargs", None) is not None
        or "num_items_in_batch" in inspect.signature(base.forward).parameters
    )


@contextlib.contextmanager
def undisturbed(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Evaluation mode without gradients for running a model on `inputs`; mode and RNG states are restored."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [t.device for t in inputs.values() if isinstance(t, torch.Tensor) and t.device.type == "cuda"]
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, was_training in modes:
                module.training = was_training


def honours_num_items(
    model: nn.Module, inputs: Mapping[str, Any], num_items: torch.Tensor | int, call: Callable[..., Any] | None = None
) -> bool:
    """Whether the model divides its loss by `num_items_in_batch`: called with n and 2n, the second must be half.

    Many models ignore the keyword and return the mean over the micro-batch; used as already normalised, their loss and
    gradients would be too large by the accumulation count. Costs two forward passes of one micro-batch, once, without
    side effects.

    A term of the loss that is not divided (an auxiliary loss of a router) makes the answer False. The halves are the
    same float but for the exponent, so the tolerance is for nondeterministic kernels. `call`: calls the model, where
    that is done in another way than by itself.
    """
    call = model if call is None else call
    with undisturbed(model, inputs):
        once, twice = (loss_value(call(**inputs, num_items_in_batch=num_items * factor)) for factor in (1, 2))
    return once is not None and twice is not None and abs(once - 2 * twice) <= 1e-5 * abs(once)


def loss_value(outputs: Any) -> float | None:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
    return float(loss.mean()) if isinstance(loss, torch.Tensor) else None


def main_input_name(model: nn.Module) -> str:
    """The name of the main input: "input_ids" unless the model has another."""
    return str(getattr(base_model_of(model), "main_input_name", "input_ids"))


def lacks_a_head(model: nn.Module) -> bool:
    """A bare `transformers` encoder or decoder: it returns hidden states and takes neither labels nor `return_loss`."""
    base = base_model_of(model)
    if not is_pretrained_model(base):
        return False
    mapping = sys.modules.get("transformers.models.auto.modeling_auto")
    names = getattr(mapping, "MODEL_MAPPING_NAMES", None)
    if names is None:
        return False
    bare: set[str] = set()
    for value in names.values():
        bare.update(value if isinstance(value, (tuple, list)) else [value])
    return type(base).__name__ in bare and not {"labels", "return_loss"} & {*inspect.signature(base.forward).parameters}


def spans_devices(model: nn.Module) -> bool:
    """Whether the model's layers are already on several devices, so that it must not be moved or wrapped."""
    device_map = getattr(model, "hf_device_map", None)
    if device_map:
        return len({d for d in device_map.values() if d not in ("cpu", "disk")}) > 1
    return bool(getattr(model, "is_parallelizable", False) and getattr(model, "model_parallel", False))


def move_with_ties(model: nn.Module, device: torch.device) -> None:
    """Move `model` to `device`. Tied parameters stay tied, and no others become so.

    torch preserves ties where the data of a parameter is replaced; where it is not (XLA), each module gets a separate
    parameter. A model's `tie_weights` would follow the config instead, and replace a head that was untied on purpose.
    """
    shared: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                shared.setdefault(id(parameter), []).append((module, name))
    model.to(device)
    for (module, name), *others in shared.values():
        for other, other_name in others:
            other._parameters[other_name] = module._parameters[name]


@contextlib.contextmanager
def on_host(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the block, the weights of an XLA `model` are on the host, where they can be saved; then on `device`."""
    import torch_xla.core.xla_model as xm  # type: ignore[import-not-found,unused-ignore]

    xm.mark_step()
    model.to("cpu")
    yield
    model.to(device)


def warn_of_untied_head(model: nn.Module) -> None:
    """Warn of an untied head where the config has tie_word_embeddings=True: it is trained and saved as it is, but
    `from_pretrained` of some releases replaces it.
    """
    base: Any = model
    if not (is_pretrained_model(model) and getattr(base, "_tied_weights_keys", None)):
        return
    weight = getattr(base.get_output_embeddings(), "weight", None)
    if weight is None or not getattr(base.config, "tie_word_embeddings", False):
        return
    if sum(parameter is weight for _, parameter in model.named_parameters(remove_duplicate=False)) == 1:
        logger.warning(
            "%s has a head with separate weights, and its config says tie_word_embeddings=True. They are trained and "
            "saved as they are, but from_pretrained may replace them by the embedding's. Set "
            "model.config.tie_word_embeddings = False.",
            type(model).__name__,
        )


def is_quantised(model: nn.Module) -> bool:
    """Whether the model declares that its weights are quantised, also through a peft wrapper."""
    return bool(getattr(model, "is_quantized", False)) or getattr(model, "quantization_method", None) is not None


def quantisation_of(model: nn.Module) -> str:
    """The name of the method, for messages: "bitsandbytes", "gptq" ..."""
    method = getattr(model, "quantization_method", None)
    return str(getattr(method, "value", method)) if method is not None else "an unnamed method"


def quantised_without_adapter(model: nn.Module) -> bool:
    """A quantised model whose weights cannot be trained, and that carries no trainable adapter."""
    if not is_quantised(model):
        return False
    quantizer = getattr(model, "hf_quantizer", None)
    if getattr(quantizer, "is_qat_trainable", False):
        return False
    return not (is_peft_model(model) or getattr(model, "_hf_peft_config_loaded", False))


def refuses_adapters(model: nn.Module) -> bool:
    """A quantised model whose method has no backward pass, so that no adapter on it can be trained either."""
    quantizer = getattr(model, "hf_quantizer", None)
    return (
        is_quantised(model)
        and getattr(quantizer, "is_trainable", True) is False
        and not getattr(quantizer, "is_qat_trainable", False)
    )


class FlopCounter:
    """Floating-point operations of a forward and backward pass over a batch.

    A model that defines `floating_point_ops(inputs)` computes them. For other `transformers` models it is 6 per token
    and non-embedding parameter (Kaplan et al. 2020, section 2.1). Parameters are counted once, at the first batch (4 ms
    at 32 layers).
    """

    def __init__(self, model: nn.Module) -> None:
        base = base_model_of(model)
        method = getattr(type(base), "floating_point_ops", None)
        # The default of transformers walks the parameters at each call.
        is_theirs = method is None or method.__module__ == "transformers.modeling_utils"
        self._of_model = None if is_theirs else base.floating_point_ops
        self._model: Any = base if is_theirs and is_pretrained_model(base) else None
        self._per_token: float | None = None

    @property
    def has_own(self) -> bool:
        """Whether the model defines it itself."""
        return self._of_model is not None

    @property
    def can_count(self) -> bool:
        return self._of_model is not None or self._model is not None

    def __call__(self, inputs: Any) -> float:
        """0 for a model that cannot count."""
        if self._of_model is not None:
            return float(self._of_model(inputs))
        if self._model is None:
            return 0.0
        try:
            tokens = inputs.get(self._model.main_input_name)
        except AttributeError:  # a batch that is no dict, such as a list of prompts
            return 0.0
        if tokens is None:
            return 0.0
        if self._per_token is None:
            self._per_token = 6.0 * self._model.num_parameters(exclude_embeddings=True)
        return float(self._per_token * tokens.numel())


def configs_of(model: nn.Module) -> list[Any]:
    """The config of a model and, of one for several kinds of data, that of its language model."""
    config: Any = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    return [config] if text is config else [config, text]


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Within the block `model` keeps no keys and values of past tokens, which are memory that nobody reads.

    `generate` keeps them all the same.
    """
    configs = [(config, config.use_cache) for config in configs_of(model) if getattr(config, "use_cache", False)]
    for config, _ in configs:
        config.use_cache = False
    try:
        yield
    finally:
        for config, before in configs:
            config.use_cache = before


def traced(model: nn.Module, inputs: Mapping[str, Any], autocast: contextlib.AbstractContextManager[Any]) -> nn.Module:
    """`model` traced on `inputs` by torch.jit; `model` itself, with a warning, when it cannot be traced."""
    parameters = inspect.signature(base_model_of(model).forward).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    example = {name: inputs[name] for name in parameters if name in inputs}
    others = {name: value for name, value in inputs.items() if takes_any and name not in parameters}
    try:
        with autocast, torch.no_grad():
            if others:  # a graph has no **kwargs: it is given them by position
                names = [*example, *others]
                example = {**example, **others}
                graph = torch.jit.trace(  # type: ignore[no-untyped-call]
                    _ByPosition(model, names).eval(), tuple(example.values()), strict=False
                )
                frozen: nn.Module = _ByName(torch.jit.freeze(graph), names)
            else:
                graph = torch.jit.trace(  # type: ignore[no-untyped-call]
                    model.eval(), example_kwarg_inputs=example, strict=False
                )
                frozen = torch.jit.freeze(graph)
            frozen(**example)
        return frozen
    except Exception as error:  # whatever a model or the tracer raises
        logger.warning(
            "jit_mode_eval: %s cannot be traced (%s); it is evaluated as it is.", type(model).__name__, error
        )
        return model


class _ByPosition(nn.Module):
    """Calls a model with its inputs by name, given in the order of `names`."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Any) -> Any:
        return self.model(**dict(zip(self.names, values)))


class _ByName(nn.Module):
    """Calls a graph with inputs given by name, in the order of `names`; other inputs did not exist at tracing."""

    def __init__(self, graph: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.graph, self.names = graph, names

    def forward(self, **inputs: Any) -> Any:
        return self.graph(*[inputs[name] for name in self.names])


def labels_for(model: Any, inputs: Any) -> torch.Tensor | None:
    """Take the labels out of `inputs`, for a loss that is not the model's; None where there are none.

    Where an encoder-decoder makes its decoder's inputs of the labels, that is done first, as it will not see them.
    """
    if "labels" not in inputs:
        return None
    labels: torch.Tensor = inputs["labels"]
    if "decoder_input_ids" not in inputs and "decoder_inputs_embeds" not in inputs:
        base = base_model_of(model)
        if getattr(getattr(base, "config", None), "is_encoder_decoder", False) is True:
            prepare = getattr(base, "prepare_decoder_input_ids_from_labels", None)
            if prepare is None:
                return labels  # the model makes them, and a loss that is not used
            inputs["decoder_input_ids"] = prepare(labels=labels)
    del inputs["labels"]
    return labels


def why_not_smoothed(model: Any, labels: Any = None) -> str | None:
    """Why label smoothing has no meaning for this model or these labels, in words; None where it has."""
    problem = getattr(getattr(base_model_of(model), "config", None), "problem_type", None)
    if problem in ("multi_label_classification", "regression"):
        return f"the model has problem_type={problem!r}"
    if isinstance(labels, torch.Tensor) and labels.is_floating_point():
        return f"its labels are numbers ({labels.dtype})"
    return None
