"""Options of a run: precision, compilation, counting, memory, and what a run leaves behind."""

import json

import pytest
import torch
from torch import nn

from of_runs import losses
from trainwright import Trainer, TrainerCallback


class Tokens(nn.Module):
    """An embedding and a linear layer; remembers dtypes and modes of its forward passes."""

    main_input_name = "input_ids"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(8, 4)
        self.linear = nn.Linear(4, 1)
        self.dtypes, self.embedded = [], []

    def get_input_embeddings(self):
        return self.embedding

    def floating_point_ops(self, inputs):
        return 10.0 * inputs["input_ids"].numel()

    def forward(self, input_ids, attention_mask=None, labels=None):
        embedded = self.embedding(input_ids)  # (batch, seq, 4)
        self.embedded.append(embedded.detach())
        out = self.linear(embedded.mean(1))[:, 0]
        self.dtypes.append(out.dtype)
        outputs = {"logits": out}
        return outputs if labels is None else {"loss": (out.float() - labels).pow(2).mean(), **outputs}


def token_rows(num=8, length=6):
    """Rows of which the last tokens, a growing number, are padding."""
    rows = []
    for index in range(num):
        mask = torch.ones(length, dtype=torch.long)
        mask[length - index % 3 :] = 0
        ids = torch.full((length,), index % 7 + 1) * mask
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(float(index))})
    return rows


def token_trainer(make_trainer, trainer=None, cls=Trainer, **arguments):
    given = {"model": Tokens(), "train_dataset": token_rows(), "eval_dataset": token_rows(), **(trainer or {})}
    return make_trainer(trainer=given, cls=cls, **{"max_steps": 2, **arguments})


# --------------------------------------------------------------------------------- precision, compilation, memory ----


def test_bf16_runs_forward_in_autocast_and_keeps_weights_in_fp32(make_trainer):
    trainer = token_trainer(make_trainer, bf16=True)
    trainer.train()
    assert set(trainer.model.dtypes) == {torch.bfloat16}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    plain = token_trainer(make_trainer)
    plain.train()
    assert losses(trainer) == pytest.approx(losses(plain), rel=0.05) and losses(trainer) != losses(plain)


def test_bf16_holds_in_evaluation_during_training_too(make_trainer):
    trainer = token_trainer(make_trainer, bf16=True)
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.model.dtypes == [torch.bfloat16]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_trains_to_the_same_weights_and_is_saved_under_its_own_names(make_trainer, tmp_path, backend):
    torch._dynamo.reset()
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    plain = make_trainer(max_steps=2)
    compiled = make_trainer(torch_compile=True, torch_compile_backend=backend, **options)
    plain.train(), compiled.train()
    assert compiled.args.torch_compile
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(compiled.model.state_dict()[name], value)
    from safetensors.torch import load_file

    assert set(load_file(tmp_path / "out" / "checkpoint-2" / "model.safetensors")) == set(plain.model.state_dict())
    torch._dynamo.reset()


def test_gradient_checkpointing_is_switched_on_with_its_arguments_and_gives_the_same_run(make_trainer):
    transformers = pytest.importorskip("transformers")

    def run(**options):
        torch.manual_seed(0)
        config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=32, n_positions=8)
        rows = [{"input_ids": torch.arange(6) + index, "labels": torch.arange(6) + index} for index in range(4)]
        trainer = make_trainer(
            trainer={"model": transformers.GPT2LMHeadModel(config), "train_dataset": rows}, max_steps=2, **options
        )
        trainer.train()
        return trainer

    plain = run()
    saving = run(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert saving.model.is_gradient_checkpointing and not plain.model.is_gradient_checkpointing
    assert losses(saving) == pytest.approx(losses(plain), rel=1e-6)
    assert saving.model.config.use_cache is True


def test_the_device_cache_is_emptied_every_so_many_steps(make_trainer):
    emptied = []

    class Counting(Trainer):
        def _empty_device_cache(self):
            emptied.append(self.state.global_step)
            super()._empty_device_cache()

    make_trainer(cls=Counting, max_steps=5, torch_empty_cache_steps=2).train()
    assert emptied == [2, 4]


class TooLarge(nn.Module):
    """Runs out of memory above a number of samples."""

    def __init__(self, limit):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 1)
        self.limit, self.sizes = limit, []

    def forward(self, x, labels=None):
        self.sizes.append(len(x))
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        out = self.linear(x)
        return {"loss": (out - labels).pow(2).mean(), "logits": out}


def test_the_batch_size_is_halved_until_it_fits_and_the_run_equals_one_that_fitted_at_once(make_trainer):
    model, small = TooLarge(limit=5), TooLarge(limit=5)
    options = {"num_train_epochs": 1, "save_strategy": "steps"}
    halved = make_trainer(
        trainer={"model": model},
        auto_find_batch_size=True,
        auto_find_batch_size_mode="restart",
        per_device_train_batch_size=16,
        **options,
    )
    direct = make_trainer(trainer={"model": small}, per_device_train_batch_size=4, **options)
    halved.train(), direct.train()
    assert model.sizes[:3] == [16, 8, 4] and halved.state.train_batch_size == 4
    assert halved.state.global_step == halved.state.max_steps == 6
    assert losses(halved) == losses(direct)
    assert torch.equal(model.linear.weight, small.linear.weight)


def test_an_error_that_is_not_about_memory_is_not_retried(make_trainer):
    class Broken(TooLarge):
        def forward(self, x, labels=None):
            self.sizes.append(len(x))
            raise RuntimeError("shapes do not match")

    model = Broken(1)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        make_trainer(trainer={"model": model}, auto_find_batch_size=True, per_device_train_batch_size=8).train()
    assert model.sizes == [8]


def test_a_model_too_large_for_one_sample_says_so(make_trainer):
    with pytest.raises(RuntimeError, match="one sample per micro-batch"):
        make_trainer(trainer={"model": TooLarge(0)}, auto_find_batch_size=True).train()


def test_memory_use_is_reported_under_the_documented_names(make_trainer):
    pytest.importorskip("psutil")
    trainer = make_trainer(max_steps=1, skip_memory_metrics=False)
    kinds = ("alloc_delta", "peaked_delta")
    train = trainer.train().metrics
    assert {f"{stage}_mem_cpu_{kind}" for stage in ("init", "train") for kind in kinds} <= set(train)
    assert "before_init_mem_cpu" in train
    assert {f"eval_mem_cpu_{kind}" for kind in kinds} <= set(trainer.evaluate())
    assert {f"test_mem_cpu_{kind}" for kind in kinds} <= set(trainer.predict(trainer.eval_dataset).metrics)


def test_memory_is_not_measured_by_default(make_trainer):
    assert not [key for key in make_trainer(max_steps=1).train().metrics if "mem" in key]


# ------------------------------------------------------------------------------------------------------- counting ----


@pytest.mark.parametrize("count, num", [(True, 6 * 4), ("all", 6 * 4), ("non_padding", 6 * 4 - (0 + 1 + 2 + 0))])
def test_input_tokens_are_counted_and_logged(make_trainer, count, num):
    trainer = token_trainer(
        make_trainer, include_num_input_tokens_seen=count, max_steps=1, train_sampling_strategy="sequential"
    )
    trainer.train()
    assert trainer.state.num_input_tokens_seen == num
    assert trainer.state.log_history[0]["num_input_tokens_seen"] == num
    assert trainer.state.log_history[0]["train_tokens_per_second"] > 0


@pytest.mark.parametrize("count", [False, "no"])
def test_tokens_are_not_counted_by_default(make_trainer, count):
    trainer = token_trainer(make_trainer, include_num_input_tokens_seen=count)
    trainer.train()
    assert trainer.state.num_input_tokens_seen == 0
    assert all("num_input_tokens_seen" not in line for line in trainer.state.log_history)


def test_tokens_after_the_last_log_line_are_counted_too(make_trainer, tmp_path):
    options = {"include_num_input_tokens_seen": "non_padding", "train_sampling_strategy": "sequential"}
    trainer = token_trainer(
        make_trainer, max_steps=2, logging_steps=100, save_strategy="steps", save_steps=1, **options
    )
    trainer.train()
    per_step = [6 * 4 - (0 + 1 + 2 + 0), 6 * 4 - (1 + 2 + 0 + 1)]
    assert trainer.state.num_input_tokens_seen == sum(per_step)
    for step in (1, 2):
        state = json.loads((tmp_path / "out" / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["num_input_tokens_seen"] == sum(per_step[:step])


def test_tokens_per_second_are_part_of_the_result(make_trainer):
    metrics = token_trainer(make_trainer, include_tokens_per_second=True).train().metrics
    assert metrics["train_tokens_per_second"] == pytest.approx(2 * 24 / metrics["train_runtime"], rel=0.2)
    assert "train_tokens_per_second" not in token_trainer(make_trainer).train().metrics


def test_operations_are_counted_by_the_model_that_knows_them(make_trainer):
    trainer = token_trainer(make_trainer, max_steps=3)
    result = trainer.train()
    assert result.metrics["total_flos"] == trainer.state.total_flos == 3 * 10 * 24
    assert make_trainer(max_steps=1).train().metrics["total_flos"] == 0


def test_the_result_holds_the_documented_metrics(make_trainer):
    result = make_trainer(max_steps=3).train()
    assert set(result.metrics) == {
        "train_runtime",
        "train_samples_per_second",
        "train_steps_per_second",
        "total_flos",
        "train_loss",
        "epoch",
    }
    assert (result.global_step, result.training_loss, result.metrics) == tuple(result)


# --------------------------------------------------------------------------------------- what a run leaves behind ----


def test_metrics_and_state_are_written_beside_the_model(make_trainer, tmp_path, capsys):
    trainer = make_trainer(max_steps=2)
    metrics = trainer.train().metrics
    capsys.readouterr()
    trainer.log_metrics("train", metrics)
    printed = capsys.readouterr().out
    assert printed.startswith("***** train metrics *****") and "train_loss" in printed
    trainer.save_metrics("train", metrics)
    trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_state()
    out = tmp_path / "out"
    assert json.loads((out / "train_results.json").read_text())["train_loss"] == metrics["train_loss"]
    assert {"train_loss", "eval_loss"} <= set(json.loads((out / "all_results.json").read_text()))
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 2


def test_save_metrics_may_leave_the_combined_file_alone(make_trainer, tmp_path):
    make_trainer().save_metrics("test", {"test_loss": 1.0}, combined=False)
    assert (tmp_path / "out" / "test_results.json").exists()
    assert not (tmp_path / "out" / "all_results.json").exists()


def test_metrics_are_formatted_for_people(make_trainer):
    trainer = make_trainer()
    formatted = trainer.metrics_format({"train_runtime": 61.25, "total_flos": 2**31, "loss": 0.123456})
    assert formatted == {"train_runtime": "0:01:01.25", "total_flos": "2GF", "loss": 0.1235}


def test_save_model_writes_weights_processor_and_arguments(make_trainer, tmp_path):
    class Processor:
        def save_pretrained(self, directory):
            with open(f"{directory}/processor.json", "w") as file:
                file.write("{}")

    trainer = make_trainer(trainer={"processing_class": Processor()})
    trainer.save_model(str(tmp_path / "final"))
    names = {path.name for path in (tmp_path / "final").iterdir()}
    assert {"model.safetensors", "processor.json", "training_args.bin"} <= names


def test_a_transformers_model_that_was_saved_loads_again(make_trainer, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=32, n_positions=8)
    trainer = make_trainer(trainer={"model": transformers.GPT2LMHeadModel(config)})
    trainer.save_model()
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


# -------------------------------------------------------------------------------------------------------- neftune ----


def test_neftune_puts_noise_on_embeddings_in_training_only_and_is_gone_afterwards(make_trainer):
    class Noise(TrainerCallback):
        hooks = -1

        def on_step_end(self, args, state, control, model, **kwargs):
            self.hooks = len(model.embedding._forward_hooks)

    watch = Noise()
    noisy = token_trainer(make_trainer, trainer={"callbacks": [watch]}, neftune_noise_alpha=5.0, max_steps=1)
    plain = token_trainer(make_trainer, max_steps=1)
    noisy.train(), plain.train()
    difference = (noisy.model.embedded[0] - plain.model.embedded[0]).abs().max().item()
    assert 0 < difference <= 5.0 / (6 * 4) ** 0.5  # alpha / sqrt(sequence length * width)
    assert watch.hooks == 1
    assert len(noisy.model.embedding._forward_hooks) == 0


def test_the_log_level_of_the_arguments_is_that_of_the_package(make_trainer):
    import logging

    make_trainer(log_level="error")
    assert logging.getLogger("trainwright").level == logging.ERROR
    make_trainer(log_level="info")
    assert logging.getLogger("trainwright").level == logging.INFO
    logging.getLogger("trainwright").setLevel(logging.WARNING)
