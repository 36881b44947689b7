"""The code samples of the seed documents, with their import line changed and what they leave out supplied.

Each sample is text that is executed: `...` and names such as `model` come from the test around it.
"""

import contextlib
import io
import logging
import sys

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "so", "film", "[EOS]"]


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def world():
    """What the samples take for granted: a model with 3 labels, its tokenizer, data, and metrics."""
    import tokenizers

    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )
    texts = ["so good film", "bad", "good film", "so bad", "film so so bad", "good"]
    table = datasets.Dataset.from_dict({**tokenizer(texts), "label": [2, 0, 2, 0, 1, 2], "text": texts})
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=3,
    )
    return {
        "torch": torch,
        "nn": torch.nn,
        "np": np,
        "sys": sys,
        "logging": logging,
        "datasets": datasets,
        "transformers": transformers,
        "tokenizer": tokenizer,
        "data_collator": transformers.DataCollatorWithPadding(tokenizer),
        "dataset": {"train": table, "test": table},
        "train_dataset": table,
        "eval_dataset": table,
        "model": transformers.BertForSequenceClassification(config),
        "compute_metrics": lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    }


def run(code, names):
    """Execute a sample in `names`; returns what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code.replace("from transformers import", "from trainwright import"), "sample", "exec"), names)
    return printed.getvalue()


def quiet_args(names, **more):
    """`training_args` and `args` for samples that do not show them."""
    from trainwright import TrainingArguments

    names["training_args"] = names["args"] = TrainingArguments(
        "your-model", report_to="none", max_steps=2, disable_tqdm=True, logging_steps=1, **more
    )
    return names


# --------------------------------------------------------------------------------------------- seed 004, in order ----

ARGUMENTS = """
from transformers import TrainingArguments

training_args = TrainingArguments(
    output_dir="your-model",
    learning_rate=2e-5,
    per_device_train_batch_size=16,
    per_device_eval_batch_size=16,
    num_train_epochs=2,
    weight_decay=0.01,
    evaluation_strategy="epoch",
    save_strategy="epoch",
    load_best_model_at_end=True,
    push_to_hub=True,
)
"""

BASIC = """
from transformers import Trainer

trainer = Trainer(
    model=model,
    args=training_args,
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    tokenizer=tokenizer,
    data_collator=data_collator,
    compute_metrics=compute_metrics,
)

trainer.train()
"""

RESUME = """
# resume from latest checkpoint
trainer.train(resume_from_checkpoint=True)

# resume from specific checkpoint saved in output directory
trainer.train(resume_from_checkpoint="your-model/checkpoint-1000")
"""


def test_the_basic_use_of_seed_004_trains_evaluates_and_resumes(world):
    with pytest.warns(FutureWarning, match="evaluation_strategy"):
        run(ARGUMENTS, world)
    args = world["training_args"]
    assert args.push_to_hub and args.eval_strategy == "epoch"
    args.push_to_hub = False  # the hub cannot be reached from a test
    args.report_to, args.disable_tqdm = [], True
    with pytest.warns(FutureWarning, match="tokenizer"):
        run(BASIC, world)
    trainer = world["trainer"]
    assert trainer.state.global_step == 2  # six samples in one batch, two epochs
    assert [line["epoch"] for line in trainer.state.log_history if "eval_accuracy" in line] == [1, 2]
    assert trainer.processing_class is trainer.tokenizer is world["tokenizer"]
    run(RESUME.replace("1000", "1"), world)
    assert trainer.state.global_step == 2


WEIGHTED = """
from torch import nn
from transformers import Trainer

class CustomTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False):
        labels = inputs.pop("labels")
        # forward pass
        outputs = model(**inputs)
        logits = outputs.get("logits")
        # compute custom loss for 3 labels with different weights
        loss_fct = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0], device=model.device))
        loss = loss_fct(logits.view(-1, self.model.config.num_labels), labels.view(-1))
        return (loss, outputs) if return_outputs else loss
"""


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_weighted_loss_of_seed_004_is_what_is_trained_and_evaluated(world, accumulation):
    quiet_args(world, gradient_accumulation_steps=accumulation, per_device_train_batch_size=3, eval_strategy="steps")
    run(WEIGHTED, world)
    world["model"].eval()
    rows = world["tokenizer"].pad({key: world["train_dataset"][key] for key in ("input_ids", "attention_mask")})
    with torch.no_grad():
        logits = world["model"](**{key: torch.tensor(value) for key, value in rows.items()}).logits
    labels = torch.tensor(world["train_dataset"]["label"])
    loss = torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    expected = loss(logits, labels).item()
    trainer = world["CustomTrainer"](
        world["model"], world["args"], world["data_collator"], world["train_dataset"], world["eval_dataset"]
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)  # one batch of six
    assert trainer.train().global_step == 2


STOPPING = """
from transformers import TrainerCallback

class EarlyStoppingCallback(TrainerCallback):
    def __init__(self, num_steps=10):
        self.num_steps = num_steps

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.num_steps:
            return {"should_training_stop": True}
        else:
            return {}
"""

WITH_CALLBACK = """
from transformers import Trainer

trainer = Trainer(
    model=model,
    args=training_args,
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    tokenizer=tokenizer,
    data_collator=data_collator,
    compute_metrics=compute_metrics,
    callback=[EarlyStoppingCallback()],
)
"""


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_callback_of_seed_004_that_returns_a_dict_stops_after_ten_steps(world):
    quiet_args(world)
    world["training_args"].max_steps = 20
    run(STOPPING + WITH_CALLBACK, world)
    assert world["trainer"].train().global_step == 10


LOGGING = """
logger = logging.getLogger("my_app")

logging.basicConfig(
    format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
    datefmt="%m/%d/%Y %H:%M:%S",
    handlers=[logging.StreamHandler(sys.stdout)],
)

log_level = training_args.get_process_log_level()
logger.setLevel(log_level)
datasets.utils.logging.set_verbosity(log_level)
transformers.utils.logging.set_verbosity(log_level)

trainer = Trainer(model, training_args)
"""


def test_the_logging_sample_of_seed_004_sets_the_levels_of_all_libraries(world):
    levels = datasets.utils.logging.get_verbosity(), transformers.utils.logging.get_verbosity()
    try:
        quiet_args(world, log_level="error", log_level_replica="error")
        run("from transformers import Trainer\n" + LOGGING, world)
        assert world["log_level"] == world["logger"].level == logging.ERROR
        assert datasets.utils.logging.get_verbosity() == transformers.utils.logging.get_verbosity() == logging.ERROR
    finally:
        datasets.utils.logging.set_verbosity(levels[0])
        transformers.utils.logging.set_verbosity(levels[1])
        logging.getLogger("trainwright").setLevel(logging.WARNING)


NEFTUNE = """
from transformers import TrainingArguments, Trainer

training_args = TrainingArguments(..., neftune_noise_alpha=0.1)
trainer = Trainer(..., args=training_args)
"""


def test_the_neftune_sample_of_seed_004_trains_and_leaves_the_embeddings_as_they_were(world):
    code = NEFTUNE.replace("Arguments(...", 'Arguments("your-model", report_to="none", max_steps=1')
    run(code.replace("Trainer(...", "Trainer(model, data_collator=data_collator, train_dataset=train_dataset"), world)
    world["trainer"].train()
    assert len(world["model"].get_input_embeddings()._forward_hooks) == 0


# ---------------------------------------------------------------------------------------------- seeds 000 and 002 ----

PRINTER = """
from transformers import TrainerCallback

class PrinterCallback(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        _ = logs.pop("total_flos", None)
        if state.is_local_process_zero:
            print(logs)
"""


def test_the_printer_of_seed_000_prints_each_log_line_without_the_operations(world):
    quiet_args(world)
    code = "from transformers import Trainer\n"
    code += "trainer = Trainer(model, args, data_collator, train_dataset, callbacks=[PrinterCallback])\n"
    code += "from transformers import PrinterCallback as Ours\ntrainer.remove_callback(Ours)\ntrainer.train()\n"
    lines = run(PRINTER + code, world).strip().splitlines()
    assert len(lines) == 3 and "'loss'" in lines[0] and "'train_loss'" in lines[2]
    assert "total_flos" not in lines[2]
    assert "total_flos" in world["trainer"].state.log_history[-1]  # the callback changed its own copy of the line


GREETING = """
from transformers import Trainer, TrainerCallback

class MyCallback(TrainerCallback):
    "A callback that prints a message at the beginning of training"

    def on_train_begin(self, args, state, control, **kwargs):
        print("Starting training")

    def on_train_end(self, args, state, control, **kwargs):
        print('Finishing training')

trainer = Trainer(
    model,
    args,
    train_dataset=train_dataset,
    eval_dataset=eval_dataset,
    callbacks=[MyCallback],  # We can either pass the callback class this way or an instance of it (MyCallback())
)
"""

ADDING = """
trainer = Trainer(model, args, train_dataset=train_dataset)
trainer.add_callback(MyCallback)
# Alternatively, we can pass an instance of the callback class
trainer.add_callback(MyCallback())
"""


@pytest.mark.parametrize("code, times", [(GREETING, 1), (GREETING + ADDING, 2)], ids=["passed", "added twice"])
def test_the_callbacks_of_seeds_000_and_002_print_at_both_ends(world, code, times):
    quiet_args(world)
    code += "trainer.data_collator = data_collator\ntrainer.train()"
    lines = [line for line in run(code, world).splitlines() if "training" in line]
    assert lines == ["Starting training"] * times + ["Finishing training"] * times


FLYTE = """
from transformers import Trainer, FlyteCallback
from flytekit import current_context, task


@task
def train_hf_transformer():
    cp = current_context().checkpoint
    trainer = Trainer(model, args, data_collator, train_dataset, callbacks=[FlyteCallback()])
    output = trainer.train(resume_from_checkpoint=cp.restore())
"""


def test_the_flyte_sample_of_seed_000_can_be_defined(world):
    pytest.importorskip("flytekit")
    quiet_args(world)
    run(FLYTE, world)
    assert callable(world["train_hf_transformer"])


# ------------------------------------------------------------------------------------------------------- seed 003 ----

GLUE = """
from transformers import Trainer

trainer = Trainer(
    model,
    training_args,
    data_collator,
    train_dataset,
    eval_dataset,
    tokenizer,
    model_init=None,
    compute_metrics=compute_metrics,  # Callable
    callbacks=None,
    optimizers=None,
    preprocess_logits_for_metrics=None,  # Callable
)

checkpoint = None
if training_args.resume_from_checkpoint is not None:
    checkpoint = training_args.resume_from_checkpoint
train_result = trainer.train(resume_from_checkpoint=checkpoint)
metrics = train_result.metrics

metrics = trainer.evaluate(eval_dataset=eval_dataset)

predict_dataset = eval_dataset
predict_dataset = predict_dataset.remove_columns("label")
predictions = trainer.predict(predict_dataset, metric_key_prefix="predict").predictions
predictions = np.squeeze(predictions) if is_regression else np.argmax(predictions, axis=1)
"""


def test_the_classification_script_of_seed_003_trains_evaluates_and_predicts(world):
    names = {**quiet_args(world), "is_regression": False}
    run(GLUE, names)
    global_step, training_loss, metrics = names["train_result"]
    assert global_step == 2 and training_loss == metrics["train_loss"]
    assert names["metrics"]["eval_accuracy"] >= 0
    assert names["predictions"].shape == (6,)


# ------------------------------------------------------------------------------------------------------- seed 001 ----


def test_a_metrics_report_of_seed_001_lists_memory_by_stage(world, capsys):
    pytest.importorskip("psutil")
    quiet_args(world, skip_memory_metrics=False)
    run("from transformers import Trainer\ntrainer = Trainer(model, args, data_collator, train_dataset)", world)
    trainer = world["trainer"]
    metrics = trainer.train().metrics
    capsys.readouterr()
    trainer.log_metrics("train", metrics)
    printed = capsys.readouterr().out
    for name in ("init_mem_cpu_alloc_delta", "init_mem_cpu_peaked_delta", "train_mem_cpu_alloc_delta"):
        (line,) = [line for line in printed.splitlines() if line.split()[:1] == [name]]
        assert line.endswith("MB")
