"""Whether a model shifts its labels, asked of small models of each kind; what is right is seen in their losses."""

import pytest
import torch
from torch import nn

from trainwright.interop.label_shift import shifts_labels

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

PARTS = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
DECODER = {
    "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 16,
}  # fmt: skip


def gpt2_config():
    return transformers.GPT2Config(vocab_size=16, n_positions=16, n_embd=8, n_layer=1, n_head=2)


def gpt2(cls=None):
    torch.manual_seed(0)
    return (cls or transformers.GPT2LMHeadModel)(gpt2_config())


class NamedOtherwise(transformers.GPT2LMHeadModel):
    """A subclass whose name says nothing."""


class WithAPenalty(transformers.GPT2LMHeadModel):
    """A subclass with a forward of its own."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.loss = outputs.loss + 0.1
        return outputs


class Around(nn.Module):
    """A module around a model, that passes on what it gets."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, **kwargs):
        return self.inner(**kwargs)


class AroundWithNames(Around):
    def forward(self, input_ids, labels=None, **kwargs):
        return self.inner(input_ids=input_ids, labels=labels, **kwargs)


class Plain(nn.Module):
    """A language model without any library; it shifts, or expects the data to."""

    def __init__(self, shifts):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.shifts = nn.Embedding(16, 8), nn.Linear(8, 16), shifts

    def forward(self, input_ids, labels=None):
        logits = self.head(self.embed(input_ids))
        if self.shifts:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def with_head_of_zeros(model):
    """Every label has the same loss, so that none shows anything."""
    nn.init.zeros_(model.lm_head.weight)
    return model


def lora(model, **config):
    return peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=["c_attn"], fan_in_fan_out=True, **config))


@pytest.fixture(autouse=True)
def without_compiling():
    """What `torch.compile` returns is called as it is: what wraps a model is asked here, not the code it makes."""
    with torch.compiler.set_stance("force_eager"):
        yield


def compiled(model):
    return torch.compile(model, backend="eager")


def bert(name):
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=16, max_position_embeddings=16, **PARTS)
    config.is_decoder = name == "BertLMHeadModel"
    return getattr(transformers, name)(config)


def vision_language():
    torch.manual_seed(0)
    text = transformers.LlamaConfig(vocab_size=16, **PARTS)
    vision = transformers.CLIPVisionConfig(image_size=4, patch_size=2, projection_dim=8, **PARTS)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=15)
    return transformers.LlavaForConditionalGeneration(config)


def bart(name):
    torch.manual_seed(0)
    return getattr(transformers, name)(transformers.BartConfig(vocab_size=16, **DECODER))


def prompt_tuned(kind):
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=2)
    return peft.get_peft_model(gpt2(), config)


SHIFTING = {
    "library": gpt2,
    "subclass": lambda: gpt2(NamedOtherwise),
    "subclass with forward": lambda: gpt2(WithAPenalty),
    "module around": lambda: Around(gpt2()),
    "module around with names": lambda: AroundWithNames(gpt2()),
    "module around a compiled model": lambda: AroundWithNames(compiled(gpt2())),
    "compiled": lambda: compiled(gpt2()),
    "replicated": lambda: nn.DataParallel(gpt2()),
    "replicated and compiled": lambda: nn.DataParallel(compiled(gpt2())),
    "adapted": lambda: lora(gpt2()),
    "adapted and compiled": lambda: compiled(lora(gpt2())),
    "compiled and adapted": lambda: lora(compiled(gpt2())),
    "rotary": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=16, **PARTS)),
    "decoder of BERT": lambda: bert("BertLMHeadModel"),
    "vision and language": vision_language,
    "double heads": lambda: gpt2(transformers.GPT2DoubleHeadsModel),
    "no library, by its name": lambda: type("TinyForCausalLM", (Plain,), {})(True),
    "head of zeros": lambda: with_head_of_zeros(gpt2(WithAPenalty)),
    "prefix tuning": lambda: prompt_tuned("PrefixTuningConfig"),
}
NOT_SHIFTING = {
    "no library": lambda: Plain(False),
    "token classifier": lambda: bert("BertForTokenClassification"),
    "classifier": lambda: bert("BertForSequenceClassification"),
    "masked": lambda: bert("BertForMaskedLM"),
    "causal by name alone": lambda: bart("BartForCausalLM"),
    "encoder-decoder": lambda: bart("BartForConditionalGeneration"),
    "encoder-decoder in a module": lambda: AroundWithNames(bart("BartForConditionalGeneration")),
    "other inputs": lambda: nn.Linear(1, 1),
    "prompt tuning": lambda: prompt_tuned("PromptTuningConfig"),
}


@pytest.mark.parametrize("name", SHIFTING)
def test_models_that_shift_their_labels_are_found(name):
    assert shifts_labels(SHIFTING[name]())


@pytest.mark.parametrize("name", NOT_SHIFTING)
def test_models_that_do_not_are_told_apart(name):
    assert not shifts_labels(NOT_SHIFTING[name]())


@pytest.mark.parametrize("name", [*SHIFTING, *NOT_SHIFTING])
def test_the_answer_is_that_of_the_loss(name):
    """The first label is exchanged for another: the loss of a model that shifts stays the same."""
    model = {**SHIFTING, **NOT_SHIFTING}[name]().eval()
    if name in ("other inputs", "classifier", "head of zeros"):
        pytest.skip("its loss says nothing of positions")
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    others = torch.tensor([[9, 4, 5, 6, 7]])
    if name == "token classifier":
        ids, others = ids % 2, torch.tensor([[0, 0, 1, 0, 1]])
    with torch.no_grad():
        first, second = (model(input_ids=ids, labels=labels)["loss"] for labels in (ids, others))
    assert torch.equal(first, second) == shifts_labels(model)


def test_asking_leaves_no_trace():
    model = AroundWithNames(gpt2())
    model.inner.transformer.eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert shifts_labels(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_module_without_a_library_is_not_run_to_find_out():
    model, calls = Plain(True), []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert not shifts_labels(model) and not calls
