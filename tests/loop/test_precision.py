"""Half precision, TF32 and compilation in a whole run, beside plain loops that say what must come out."""

import pytest
import torch
from torch import nn

from of_runs import benchmark_module, losses
from trainwright import Trainer, TrainerCallback

FLAT = {"optim": "adamw_torch", "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential"}
ON_CPU = {"fp16": True, "half_precision_backend": "cpu_amp"}


def assert_same_weights(model, other):
    for (name, value), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


def plain_loop(model, data, dtype, num_steps, scaler=None, learning_rate=0.1, max_norm=1.0, batch_size=4):
    """What a user would write: autocast, scale, unscale, clip, step. Returns the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    found = []
    for step in range(num_steps):
        part = slice(step * batch_size, (step + 1) * batch_size)
        with torch.autocast("cpu", dtype=dtype):
            loss = model(data.x[part], data.y[part])["loss"]
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


# ----------------------------------------------------------------------------------------------------------- fp16 ----


def test_fp16_is_a_plain_loop_with_a_loss_scaler(make_trainer, line_model, line_data):
    expected = line_model()
    scaler = torch.amp.GradScaler("cpu")
    trainer = make_trainer(max_steps=5, **ON_CPU, **FLAT)
    trainer.train()
    assert losses(trainer) == plain_loop(expected, line_data(), torch.float16, 5, scaler)
    assert_same_weights(trainer.model, expected)
    assert trainer._strategy.scaler.state_dict() == scaler.state_dict()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_fp16_accumulates_like_a_plain_loop(make_trainer, line_model, line_data):
    model, data, scaler = line_model(), line_data(), torch.amp.GradScaler("cpu")
    trainer = make_trainer(
        max_steps=2, gradient_accumulation_steps=2, max_grad_norm=0.0, learning_rate=0.1, **ON_CPU, **FLAT
    )
    trainer.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    for step in range(2):
        for part in range(2):
            rows = slice((2 * step + part) * 4, (2 * step + part + 1) * 4)
            with torch.autocast("cpu", dtype=torch.float16):
                loss = model(data.x[rows], data.y[rows])["loss"] / 2
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert_same_weights(trainer.model, model)


class Overflowing(nn.Module):
    """Returns an infinite loss at one micro-batch."""

    def __init__(self, model, at):
        super().__init__()
        self.model, self.at, self.calls = model, at, 0

    def forward(self, x, labels=None):
        outputs = self.model(x, labels)
        self.calls += 1
        if self.calls == self.at:
            outputs["loss"] = outputs["loss"] * float("inf")
        return outputs


def test_an_update_that_overflows_in_fp16_is_left_out_and_the_scale_is_halved(make_trainer, line_model):
    class Watch(TrainerCallback):
        def __init__(self):
            self.weights, self.rates = [], []

        def on_step_end(self, args, state, control, model, lr_scheduler, **kwargs):
            self.weights.append(model.model.linear.weight.detach().clone())
            self.rates.append(lr_scheduler.get_last_lr()[0])

    watch = Watch()
    trainer = make_trainer(
        trainer={"model": Overflowing(line_model(), at=2), "callbacks": [watch]}, max_steps=3, **ON_CPU
    )
    trainer._strategy.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # low enough for nothing else to overflow
    trainer.train()
    assert trainer.state.global_step == 3
    assert torch.equal(watch.weights[1], watch.weights[0]) and not torch.equal(watch.weights[2], watch.weights[1])
    assert watch.rates[1] == watch.rates[0] > watch.rates[2]
    assert trainer._strategy.scaler.get_scale() == 8.0 / 2


def test_the_loss_scale_is_saved_and_a_resumed_run_is_the_same_to_the_bit(make_trainer, line_model, tmp_path):
    def trainer_for(folder, at, scale):
        trainer = make_trainer(
            trainer={"model": Overflowing(line_model(), at=at)},
            output_dir=str(tmp_path / folder),
            max_steps=5,
            save_strategy="steps",
            save_steps=3,
            **ON_CPU,
        )
        trainer._strategy.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return trainer

    whole = trainer_for("whole", at=2, scale=8.0)
    whole.train()
    saved = torch.load(tmp_path / "whole" / "checkpoint-3" / "scaler.pt", weights_only=True)
    assert saved["scale"] == 8.0 / 2 and saved["_growth_tracker"] == 1
    resumed = trainer_for("resumed", at=0, scale=1024.0)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same_weights(resumed.model, whole.model)
    assert losses(resumed) == pytest.approx(losses(whole), nan_ok=True)
    assert resumed._strategy.scaler.state_dict() == whole._strategy.scaler.state_dict()


def test_an_update_in_fp16_reads_the_device_once(make_trainer):
    toy, probes = benchmark_module("toy"), benchmark_module("probes")
    counter = probes.OpCounter()
    collator = toy.MeasuringCollator(8, 40, counter.start, counter.stop)
    parts = {"model": toy.ToyModel(), "train_dataset": toy.ToyData(400), "data_collator": collator}
    make_trainer(trainer=parts, max_steps=60, logging_steps=1000, **ON_CPU).train()
    assert counter.syncs == {"_local_scalar_dense": 40 - 8}


# ----------------------------------------------------------------------------------------------------- bf16, tf32 ----


def test_bf16_is_a_plain_loop_in_autocast(make_trainer, line_model, line_data):
    expected = line_model()
    trainer = make_trainer(max_steps=5, bf16=True, **FLAT)
    trainer.train()
    assert losses(trainer) == plain_loop(expected, line_data(), torch.bfloat16, 5)
    assert_same_weights(trainer.model, expected)


class Products(TrainerCallback):
    """Remembers the precision of float32 products at each event."""

    def __init__(self):
        self.seen = {}

    def on_event(self, args, state, control, event, **kwargs):
        self.seen.setdefault(event, torch.get_float32_matmul_precision())

    def on_step_end(self, args, state, control, **kwargs):
        self.seen["step"] = torch.get_float32_matmul_precision()

    def on_prediction_step(self, args, state, control, **kwargs):
        self.seen["prediction"] = torch.get_float32_matmul_precision()


@pytest.fixture
def tf32_allowed():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize("tf32, during", [(False, "highest"), (None, "high")])
def test_tf32_holds_while_the_trainer_works_and_not_after(make_trainer, tf32_allowed, tf32, during):
    watch = Products()
    trainer = make_trainer(trainer={"callbacks": [watch]}, max_steps=1, tf32=tf32)
    assert torch.get_float32_matmul_precision() == "high"
    trainer.train()
    assert torch.get_float32_matmul_precision() == "high"
    trainer.evaluate()
    assert watch.seen == {"step": during, "prediction": during}
    assert torch.get_float32_matmul_precision() == "high"


def test_tf32_is_put_back_when_a_run_fails(make_trainer, line_model, tf32_allowed):
    model = line_model()
    model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_trainer(trainer={"model": model}, tf32=False).train()
    assert torch.get_float32_matmul_precision() == "high"


# ------------------------------------------------------------------------------------------------------ full eval ----


@pytest.mark.parametrize("name, dtype", [("bf16_full_eval", torch.bfloat16), ("fp16_full_eval", torch.float16)])
def test_full_evaluation_uses_half_weights_and_puts_the_others_back(make_trainer, line_model, line_data, name, dtype):
    class Watch(TrainerCallback):
        def on_prediction_step(self, args, state, control, model, **kwargs):
            self.dtype = model.linear.weight.dtype

    watch = Watch()
    trainer = make_trainer(trainer={"callbacks": [watch]}, **{name: True})
    weights = list(trainer.model.parameters())
    prediction = trainer.predict(line_data(9, seed=5)).predictions
    assert watch.dtype is dtype
    assert [id(p) for p in trainer.model.parameters()] == [id(p) for p in weights]
    assert_same_weights(trainer.model, line_model())
    halved = line_model().to(dtype).eval()
    with torch.no_grad():
        expected = halved(line_data(9, seed=5).x.to(dtype))["logits"].float()
    assert torch.equal(torch.as_tensor(prediction).float(), expected)


def test_training_after_a_full_evaluation_trains_whole_weights(make_trainer):
    evaluated, plain = make_trainer(max_steps=3, bf16_full_eval=True), make_trainer(max_steps=3)
    evaluated.evaluate()
    for trainer in (evaluated, plain):
        trainer.train()
        trainer.evaluate()
        trainer.train()
    assert_same_weights(evaluated.model, plain.model)


def test_half_weights_are_put_back_when_an_evaluation_fails(make_trainer, line_model):
    def fail(prediction):
        raise ZeroDivisionError

    trainer = make_trainer(trainer={"compute_metrics": fail}, bf16_full_eval=True)
    with pytest.raises(ZeroDivisionError):
        trainer.evaluate()
    assert_same_weights(trainer.model, line_model())
    batch = next(iter(trainer.get_eval_dataloader()))
    _, logits, _ = trainer.prediction_step(trainer.model, batch, prediction_loss_only=False)
    assert logits.dtype is torch.float32  # a batch that is predicted later is not cast either


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_model_is_evaluated_in_half_precision_too(make_trainer, line_data):
    data = line_data(9, seed=5)
    traced = make_trainer(bf16_full_eval=True, jit_mode_eval=True).predict(data).predictions
    plain = make_trainer(bf16_full_eval=True).predict(data).predictions
    assert (traced == plain).all()


# ---------------------------------------------------------------------------------------------------- compilation ----


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.outer(torch.tanh(self.inner(x)))


class Deep(nn.Module):
    """Three equal blocks between two layers."""

    def __init__(self, num_blocks=3, width=3):
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(num_blocks)])
        self.head = nn.Linear(width, 1)

    def forward(self, x, labels=None):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        prediction = self.head(x)
        outputs = {"logits": prediction}
        return outputs if labels is None else {"loss": (prediction - labels).pow(2).mean(), **outputs}


@pytest.fixture
def compiled_graphs():
    """The matrix products of every graph that the backend "counting" was given."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(sum(node.target is torch._C._nn.linear for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    torch._dynamo.register_backend(backend, name="counting")
    yield graphs
    torch._dynamo.reset()
    torch._dynamo.backends.registry._COMPILER_FNS.pop("counting")


@pytest.mark.parametrize("regions", [True, ["Block"], "Block"])
def test_regional_compilation_compiles_one_block_for_all(make_trainer, compiled_graphs, regions):
    compiled = make_trainer(
        trainer={"model": Deep()}, max_steps=2, torch_compile_backend="counting", use_regional_compilation=regions
    )
    compiled.train()
    assert compiled_graphs == [2]  # the two layers of one block
    plain = make_trainer(trainer={"model": Deep()}, max_steps=2)
    plain.train()
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(compiled.model.state_dict()[name], value)


def test_without_regions_the_whole_model_is_one_graph(make_trainer, compiled_graphs):
    make_trainer(trainer={"model": Deep()}, max_steps=2, torch_compile_backend="counting").train()
    assert compiled_graphs == [1 + 3 * 2 + 1]


def test_regions_of_a_transformers_model_are_its_layers(make_trainer, compiled_graphs):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=3, n_head=2, n_embd=8, vocab_size=32, n_positions=8)
    rows = [{"input_ids": torch.arange(6) + index, "labels": torch.arange(6) + index} for index in range(4)]
    model = transformers.GPT2LMHeadModel(config)
    trainer = make_trainer(
        trainer={"model": model, "train_dataset": rows}, max_steps=1, use_regional_compilation=True,
        torch_compile_backend="counting",
    )  # fmt: skip
    trainer.train()
    assert compiled_graphs
    assert [name for name, module in model.named_modules() if module._compiled_call_impl is not None] == [
        f"transformer.h.{index}" for index in range(3)
    ]


def test_asking_for_regions_switches_compilation_on(make_trainer):
    args = make_trainer(use_regional_compilation=True).args
    assert args.torch_compile and args.torch_compile_backend == "inductor"
    assert make_trainer(use_regional_compilation="Block, Other").args.use_regional_compilation == ["Block", "Other"]
    assert not make_trainer(use_regional_compilation=False).args.torch_compile


@pytest.mark.parametrize("regions, num_compiled", [(None, 1), (True, 3)])
def test_backend_and_mode_reach_the_compiler(make_trainer, monkeypatch, regions, num_compiled):
    asked = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: asked.append((type(module), options)))
    make_trainer(
        trainer={"model": Deep()}, max_steps=1, torch_compile_mode="reduce-overhead", use_regional_compilation=regions
    ).train()
    options = {"backend": "inductor", "mode": "reduce-overhead"}
    assert asked == [(Block if regions else Deep, options)] * num_compiled


def test_regions_that_are_not_there_are_named(make_trainer):
    with pytest.raises(ValueError, match=r"use_regional_compilation=True.*LineModel has no nn.ModuleList.*'Linear'"):
        make_trainer(use_regional_compilation=True).train()
    with pytest.raises(ValueError, match=r"names the class 'Blok'.*Did you mean 'Block'"):
        make_trainer(trainer={"model": Deep()}, use_regional_compilation=["Blok"]).train()
    with pytest.raises(TypeError, match=r"use_regional_compilation=3 is not allowed"):
        make_trainer(use_regional_compilation=3)


# -------------------------------------------------------------------------------------------------------- retired ----


@pytest.mark.parametrize(
    "given, words",
    [
        ({"half_precision_backend": "apex"}, r"'apex' is retired.*fp16_opt_level='O1'.*fp16=True"),
        ({"half_precision_backend": "apex", "fp16_opt_level": "O0"}, r"'O0' leave out fp16"),
        ({"use_ipex": True}, r"use_ipex=True is retired.*bf16=True and torch_compile=True"),
        ({"half_precision_backend": "cpu_amp", "fp16": True, "bf16": True}, r"bf16=True and fp16=True exclude"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_retired_switch_says_what_replaces_it(make_trainer, given, words):
    with pytest.raises(ValueError, match=words):
        make_trainer(**given)


def test_the_name_of_apex_that_others_read_is_there(make_trainer):
    assert Trainer.use_apex.fget(make_trainer()) is False
