"""What a model can do, asked of small models of each family and of plain modules."""

import contextlib
import types

import pytest
import torch
from torch import nn

from trainwright.interop import models
from trainwright.techniques import checkpointing

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


def gpt2(**changes):
    sizes = {"vocab_size": 11, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, **changes}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def llama():
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def t5():
    config = transformers.T5Config(
        vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


CLIP_PART = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
BERT = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 16,
}


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**BERT))


MODELS = {"gpt2": gpt2, "llama": llama, "t5": t5, "bert": bert}


def inputs_for(name):
    ids = torch.arange(2, 8).reshape(2, 3)  # (batch, seq)
    return {"input_ids": ids, "labels": torch.tensor([0, 1]) if name == "bert" else ids}


class Regression(nn.Module):
    """A plain module; `forward` takes what the test says."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x, labels=None):
        return {"loss": self.linear(x).pow(2).mean()}


class Swallows(Regression):
    def forward(self, x, labels=None, **kwargs):
        return super().forward(x)


class Divides(Regression):
    def forward(self, x, labels=None, num_items_in_batch=1):
        return {"loss": self.linear(x).pow(2).sum() / num_items_in_batch}


class DividesTuple(Regression):
    def forward(self, x, labels=None, **kwargs):
        return (self.linear(x).pow(2).sum() / kwargs["num_items_in_batch"],)


@pytest.mark.parametrize("name", MODELS)
def test_whether_a_model_divides_by_the_item_count_is_found_by_running_it(name):
    """Computed here from the two losses, so that it holds whatever a release of transformers does."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]().eval(), inputs_for(name)
    if not models.accepts_loss_kwargs(model):
        pytest.skip(f"{name} takes no num_items_in_batch in this release")
    with torch.no_grad():
        one, two = (model(**inputs, num_items_in_batch=count).loss for count in (2, 4))
    assert models.honours_num_items(model, inputs, 2) == torch.isclose(one, 2 * two).item()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_language_models_divide_by_the_item_count(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    assert models.accepts_loss_kwargs(model) and models.honours_num_items(model, inputs_for(name), torch.tensor(5))


def test_plain_modules_are_told_apart():
    x = {"x": torch.ones(3, 2)}
    assert not models.accepts_loss_kwargs(Regression()) and not models.states_loss_kwargs(Regression())
    assert models.accepts_loss_kwargs(Swallows()) and not models.states_loss_kwargs(Swallows())
    assert models.accepts_loss_kwargs(Divides()) and models.states_loss_kwargs(Divides())
    assert not models.honours_num_items(Swallows(), x, 3)
    assert models.honours_num_items(Divides(), x, 3) and models.honours_num_items(DividesTuple(), x, 3)


def test_what_the_model_states_counts_more_than_its_signature():
    model = Swallows()
    model.accepts_loss_kwargs = False
    assert models.states_loss_kwargs(model) and not models.accepts_loss_kwargs(model)


@pytest.mark.parametrize("training", [True, False])
def test_asking_leaves_no_trace(training):
    model = gpt2().train(training)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    models.honours_num_items(model, inputs_for("gpt2"), 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training == training and all(p.grad is None for p in model.parameters())


def test_outputs_without_a_loss_honour_nothing():
    assert models.loss_value({"logits": 1}) is None and models.loss_value((torch.tensor([1.0, 3.0]),)) == 2.0


def lora(model, target="c_attn"):
    return peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=[target], fan_in_fan_out=True))


def test_an_adapted_model_is_asked_about_what_is_inside():
    inner = gpt2()
    adapted = lora(inner)
    assert models.base_model_of(adapted) is inner and models.base_model_of(inner) is inner
    assert models.accepts_loss_kwargs(adapted)
    assert models.main_input_name(adapted) == "input_ids" == models.main_input_name(nn.Linear(1, 1))


def test_the_main_input_is_what_the_model_says():
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=4, patch_size=2
    )
    assert models.main_input_name(transformers.ViTModel(config)) == "pixel_values"


def test_bare_encoders_lack_a_head():
    assert models.lacks_a_head(transformers.BertModel(transformers.BertConfig(**BERT)))
    assert models.lacks_a_head(gpt2().transformer)
    assert not any(models.lacks_a_head(make()) for make in MODELS.values())
    clip = transformers.CLIPConfig(text_config=CLIP_PART, vision_config={**CLIP_PART, "image_size": 8, "patch_size": 4})
    assert not models.lacks_a_head(transformers.CLIPModel(clip))  # a loss without labels
    assert not models.lacks_a_head(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({}, False),
        ({"hf_device_map": {"a": 0, "b": 0}}, False),
        ({"hf_device_map": {"a": 0, "b": 1}}, True),
        ({"hf_device_map": {"a": 0, "b": "cpu", "c": "disk"}}, False),
        ({"is_parallelizable": True, "model_parallel": True}, True),
        ({"is_parallelizable": True, "model_parallel": False}, False),
    ],
)
def test_a_model_on_several_devices_is_recognised(attributes, expected):
    model = nn.Linear(1, 1)
    for name, value in attributes.items():
        setattr(model, name, value)
    assert models.spans_devices(model) == expected


def test_quantised_weights_are_trained_through_an_adapter_or_a_quantiser_that_can():
    model = gpt2()
    assert not models.quantised_without_adapter(model)
    model.is_quantized = True
    assert models.quantised_without_adapter(model)
    model.hf_quantizer = types.SimpleNamespace(is_qat_trainable=True)
    assert not models.quantised_without_adapter(model)


def operations(model, num_tokens):
    """6 per token and parameter that is no embedding, and what transformers says where a release still says it."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    expected = 6 * num_tokens * sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
    if hasattr(model, "floating_point_ops"):
        assert model.floating_point_ops({"input_ids": torch.zeros(num_tokens, 1)}) == expected
    return expected


@pytest.mark.parametrize("name", MODELS)
def test_operations_are_those_of_a_pass_over_all_tokens(name):
    model = MODELS[name]()
    counter = models.FlopCounter(model)
    assert counter.can_count and counter(inputs_for(name)) == operations(model, 6) > 0


def test_operations_of_an_adapted_model_are_those_of_what_is_inside():
    model = lora(gpt2())
    assert models.FlopCounter(model)(inputs_for("gpt2")) == operations(model.get_base_model(), 6)


def test_a_model_that_counts_itself_is_asked_and_another_cannot():
    class Counts(Regression):
        def floating_point_ops(self, inputs):
            return 7 * inputs["x"].numel()

    assert models.FlopCounter(Counts())({"x": torch.ones(3, 2)}) == 42.0
    counter = models.FlopCounter(Regression())
    assert not counter.can_count and counter({"x": torch.ones(3, 2)}) == 0.0
    assert models.FlopCounter(gpt2())({"labels": torch.ones(1)}) == 0.0  # a batch without the main input
    assert models.FlopCounter(gpt2())([{"prompt": "a"}]) == 0.0  # a batch that is no dict


def training_args(**changes):
    names = ("gradient_checkpointing", "activation_checkpointing", "gradient_checkpointing_kwargs", "use_cache")
    return types.SimpleNamespace(**{**dict.fromkeys(names), **changes})


def test_the_cache_is_off_for_training_only():
    model = gpt2()
    model.config.use_cache = True
    restore = checkpointing.prepare_for_training(model, training_args())
    assert model.config.use_cache is False
    restore()
    assert model.config.use_cache is True
    checkpointing.prepare_for_training(model, training_args(use_cache=True))
    assert model.config.use_cache is True
    checkpointing.prepare_for_training(nn.Linear(1, 1), training_args())()


def test_the_cache_of_a_language_model_inside_another_is_off_too():
    text = types.SimpleNamespace(use_cache=True)
    model = nn.Linear(1, 1)
    model.config = types.SimpleNamespace(get_text_config=lambda: text)
    restore = checkpointing.prepare_for_training(model, training_args())
    assert text.use_cache is False
    restore()
    assert text.use_cache is True


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for switched in (False, True):
        torch.manual_seed(0)
        model = gpt2(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0).train()
        asked = training_args(gradient_checkpointing=switched, gradient_checkpointing_kwargs={"use_reentrant": False})
        checkpointing.prepare_for_training(model, asked)
        assert model.is_gradient_checkpointing == switched
        model(**inputs_for("gpt2")).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_model_that_can_be_traced_gives_the_same_numbers():
    model, inputs = Regression().eval(), {"x": torch.ones(3, 2), "unused": 1}
    traced = models.traced(model, inputs, contextlib.nullcontext())
    assert isinstance(traced, torch.jit.ScriptModule)
    torch.testing.assert_close(traced(x=inputs["x"])["loss"], model(inputs["x"])["loss"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_that_cannot_be_traced_is_used_as_it_is(caplog):
    class Cannot(Regression):
        def forward(self, x):
            raise ValueError("not for tracing")

    model = Cannot()
    assert models.traced(model, {"x": torch.ones(1, 2)}, contextlib.nullcontext()) is model
    assert "Cannot cannot be traced (not for tracing" in caplog.text


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_column_that_forward_takes_among_its_keywords_is_traced_too(caplog):
    class Weighted(Regression):
        def forward(self, x, **others):
            return {"loss": (super().forward(x)["loss"] * others["weight"]).mean()}

    model, inputs = Weighted().eval(), {"x": torch.ones(3, 2), "weight": torch.arange(3.0)}
    traced = models.traced(model, inputs, contextlib.nullcontext())
    assert traced is not model and not caplog.records
    for factor in (1, 2):
        given = {"weight": inputs["weight"] * factor, "x": inputs["x"]}  # in another order, with other numbers
        torch.testing.assert_close(traced(**given)["loss"], model(**given)["loss"])
