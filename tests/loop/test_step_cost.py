"""What a training step costs above a bare loop: calls, reads from the device, live tensors, bytes in a checkpoint.

Counts only, so the result does not depend on the machine or its load; `benchmarks/` has the same loops with times.
"""

import contextlib
import gc
import io
from collections import Counter

import pytest
import torch

from of_runs import benchmark_module

NUM_STEPS = 100  # one log line
# Per step above the bare loop, with all default callbacks. It clips with torch's function, whose calls we do not make.
MOST_PYTHON_CALLS, MOST_C_CALLS = -60, -40
MOST_PYTHON_CALLS_UNCLIPPED, MOST_C_CALLS_UNCLIPPED = 2, 2  # the check for NaN included
MOST_PYTHON_CALLS_PER_MICRO_BATCH, MOST_C_CALLS_PER_MICRO_BATCH = 5, 7  # for each one more


toy, probes, contenders, memory = (benchmark_module(name) for name in ("toy", "probes", "contenders", "memory"))


@pytest.fixture(autouse=True)
def no_page_is_due(monkeypatch):
    """One is written at a log line every ten seconds, which a slow machine may reach (unit/report/test_live.py)."""
    from trainwright.report import live

    monkeypatch.setattr(live, "INTERVAL_S", 1e9)


def calls_per_step(run, micro_batches=1):
    """(Python calls, C calls) of one step, from `NUM_STEPS` steps in the middle of a run."""
    counter = probes.CallCounter()
    first = 20 * micro_batches
    collator = toy.MeasuringCollator(first, first + NUM_STEPS * micro_batches, counter.start, counter.stop)
    silence = io.StringIO()
    with probes.still_progress_bars(), contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        run(collator, 20 + NUM_STEPS + 1, True)
    return counter.num_python / NUM_STEPS, counter.num_c / NUM_STEPS


def test_a_step_makes_few_calls_above_a_bare_loop():
    ours, bare = calls_per_step(contenders.with_trainer("trainwright")), calls_per_step(contenders.bare())
    assert ours[0] - bare[0] <= MOST_PYTHON_CALLS
    assert ours[1] - bare[1] <= MOST_C_CALLS


def test_a_micro_batch_of_an_accumulation_makes_few_calls_above_a_bare_loop():
    ours, bare = calls_per_step(contenders.with_trainer("trainwright", 4), 4), calls_per_step(contenders.bare(4), 4)
    one, bare_one = calls_per_step(contenders.with_trainer("trainwright")), calls_per_step(contenders.bare())
    above = [(ours[kind] - one[kind] - bare[kind] + bare_one[kind]) / 3 for kind in (0, 1)]
    assert above[0] <= MOST_PYTHON_CALLS_PER_MICRO_BATCH
    assert above[1] <= MOST_C_CALLS_PER_MICRO_BATCH


def test_a_step_in_bf16_makes_few_calls_above_a_bare_loop():
    ours = calls_per_step(contenders.with_trainer("trainwright", bf16=True))
    bare = calls_per_step(contenders.bare(bf16=True))
    assert ours[0] - bare[0] <= MOST_PYTHON_CALLS
    assert ours[1] - bare[1] <= MOST_C_CALLS


def test_a_step_without_clipping_makes_few_calls_above_a_bare_loop_although_it_looks_for_nan():
    ours = calls_per_step(contenders.with_trainer("trainwright", max_grad_norm=0.0))
    bare = calls_per_step(contenders.bare(max_grad_norm=0.0))
    assert ours[0] - bare[0] <= MOST_PYTHON_CALLS_UNCLIPPED
    assert ours[1] - bare[1] <= MOST_C_CALLS_UNCLIPPED
    unchecked = calls_per_step(contenders.with_trainer("trainwright", max_grad_norm=0.0, nonfinite="ignore"))
    assert unchecked[0] < ours[0] and unchecked[1] < ours[1]  # that it does look


def test_a_tracker_adds_nothing_to_a_step_between_two_log_lines():
    pytest.importorskip("tensorboard")  # tests/trackers/test_battery.py has the others
    silent, tracked = (
        calls_per_step(contenders.with_trainer("trainwright", logging_steps=1000, report_to=names))
        for names in ("none", "tensorboard")
    )
    assert tracked[0] <= silent[0] and tracked[1] <= silent[1]


def memory_of(run, num_steps=60):
    """(bytes of tensors at the start, most bytes above that) of `num_steps` steps in the middle of a run."""
    counter = probes.MemoryCounter()
    collator = toy.MeasuringCollator(20, 20 + num_steps, counter.start, counter.stop)
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        run(collator, 20 + num_steps + 1, True)
    return counter.start_bytes, counter.peak_bytes - counter.start_bytes


RANDOM_STATE = torch.get_rng_state().numel()  # bytes; kept twice, for a resume in the middle of an epoch


@pytest.mark.parametrize("arguments", [{}, {"bf16": True}], ids=["fp32", "bf16"])
def test_the_peak_of_memory_is_that_of_a_bare_loop(arguments):
    (before, ours), (bare_before, bare) = (
        memory_of(run) for run in (contenders.with_trainer("trainwright", **arguments), contenders.bare(**arguments))
    )
    assert bare_before > 3 * 4 * (17 * 16 + 17)  # more than weights and Adam's state, so that something is compared
    assert ours <= 1.01 * bare
    assert before - bare_before <= 2 * RANDOM_STATE + 1024  # whatever the size of the model


def test_the_probe_sees_a_tensor_that_is_kept(make_trainer):
    from trainwright import Trainer

    class Keeper(Trainer):
        kept = ()

        def training_step(self, *args, **kwargs):
            self.kept = (*self.kept, torch.zeros(1000))
            return super().training_step(*args, **kwargs)

    def run(cls):
        def start(collator, num_steps, cpu):
            parts = {"model": toy.ToyModel(), "train_dataset": toy.ToyData(4 * 200), "data_collator": collator}
            make_trainer(trainer=parts, cls=cls, max_steps=num_steps, logging_steps=1000).train()

        return start

    (kept_before, kept), (before, plain) = memory_of(run(Keeper)), memory_of(run(Trainer))
    assert (kept_before - before, kept - plain) == (19 * 1000 * 4, 60 * 1000 * 4)


def language_data(length=400):
    """Sequences of 8 tokens whose last two are padding (token 0)."""
    tokens = torch.randint(1, 32, (length, 8), generator=torch.Generator().manual_seed(0))
    tokens[:, 6:] = 0
    labels = tokens.masked_fill(tokens == 0, -100)
    return [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels)]


class Tokens:
    """As much of a tokenizer as counting needs."""

    pad_token_id = 0

    def save_pretrained(self, directory):
        """Nothing to save."""


def tiny_gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"vocab_size": 32, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 1}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0))


def syncs_of(make_trainer, num_batches, *, language=False, **arguments):
    """Reads from the device during `num_batches` micro-batches in the middle of a run; also returns the trainer."""
    counter = probes.OpCounter()
    collator = toy.MeasuringCollator(8, 8 + num_batches, counter.start, counter.stop)
    model = tiny_gpt2() if language else toy.ToyModel()
    data = language_data() if language else toy.ToyData(400)
    # What a model reads inside its own forward (GPT-2 looks for packed sequences) is not the loop's doing.
    model.register_forward_pre_hook(lambda *_: setattr(counter, "excused", True))
    model.register_forward_hook(lambda *_: setattr(counter, "excused", False))
    parts = {"model": model, "train_dataset": data, "data_collator": collator}
    if language:
        parts["processing_class"] = Tokens()
    trainer = make_trainer(trainer=parts, **arguments)
    trainer.train()
    assert sum(counter.ops.values()) > 0
    return counter.syncs, trainer


RUNS = {
    "plain": {},
    "accumulation and clipping": {"gradient_accumulation_steps": 4, "max_grad_norm": 0.5},
    "no clipping": {"max_grad_norm": 0.0},
    "bf16": {"bf16": True},
    "counted labels": {"language": True, "gradient_accumulation_steps": 4},
    "counted tokens": {"language": True, "include_num_input_tokens_seen": "all"},
    "breakdown and speed": {"time_breakdown": "logs", "log_speed": True, "peak_tflops_per_s": 1.0},
    "counted tokens without padding": {"language": True, "include_num_input_tokens_seen": "non_padding"},
}


@pytest.mark.parametrize("arguments", RUNS.values(), ids=RUNS.keys())
def test_nothing_is_read_from_the_device_between_two_log_lines(make_trainer, arguments):
    syncs, _ = syncs_of(
        make_trainer,
        32,
        max_steps=80 // arguments.get("gradient_accumulation_steps", 1),
        logging_steps=1000,
        **arguments,
    )
    assert not syncs


def test_the_probe_sees_a_read_that_an_override_adds(make_trainer):
    from trainwright import Trainer

    class Curious(Trainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.last_loss = loss.item()
            return loss

    counter = probes.OpCounter()
    collator = toy.MeasuringCollator(4, 9, counter.start, counter.stop)
    parts = {"model": toy.ToyModel(), "train_dataset": toy.ToyData(200), "data_collator": collator}
    make_trainer(trainer=parts, cls=Curious, max_steps=10, logging_steps=1000).train()
    assert counter.syncs == {"_local_scalar_dense": 9 - 4}


def test_a_log_line_reads_loss_norm_and_tokens_at_once(make_trainer):
    syncs, trainer = syncs_of(
        make_trainer, 30, language=True, max_steps=60, logging_steps=10, include_num_input_tokens_seen="non_padding"
    )
    assert {"loss", "grad_norm", "learning_rate"} <= trainer.state.log_history[0].keys()
    assert syncs == {"tolist": 30 // 10}
    assert trainer.state.num_input_tokens_seen == 60 * 4 * 6  # steps x samples x tokens that are no padding


def test_the_number_of_live_tensors_does_not_grow(make_trainer):
    counts = []

    def count():
        gc.collect()
        counts.append(sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects()))

    collator = toy.MeasuringCollator(25, 325, count, count)  # both five steps after a log line
    parts = {"model": toy.ToyModel(), "train_dataset": toy.ToyData(4 * 400), "data_collator": collator}
    make_trainer(trainer=parts, max_steps=340, logging_steps=10).train()
    assert counts[0] == counts[1]


def test_nothing_but_the_log_history_grows_with_the_steps():
    objects, sizes = [], []

    def types():
        return Counter(type(item).__name__ for item in gc.get_objects())

    def count():
        gc.collect()
        objects.append(types())
        (trainer,) = (item for item in gc.get_objects() if type(item).__name__ == "Trainer")
        containers = {
            name: len(value) for name, value in vars(trainer).items() if isinstance(value, (list, dict, tuple))
        }
        window = {name: len(value) for name, value in vars(trainer.window).items() if isinstance(value, (list, dict))}
        sizes.append({**containers, **window, "lines": len(trainer.state.log_history)})

    types()  # what Counter itself leaves behind at its first use
    collator = toy.MeasuringCollator(1025, 3025, count, count)  # both a quarter of the way to the next log line
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        contenders.with_trainer("trainwright")(collator, 3030, True)
    before, after = sizes
    assert after.pop("lines") - before.pop("lines") == (3025 - 1025) // toy.LOGGING_STEPS
    assert after == before
    grown = {name: count for name, count in (objects[1] - objects[0]).items() if count > 2}  # 2: the test's own
    assert not grown


def test_log_lines_evaluations_and_saves_leave_nothing_behind():
    every, first, last = 10, 25, 225
    memory.growth(memory.evaluating_and_saving(every), 5, 15, every)  # what is imported and remembered at a first time
    left = memory.growth(memory.evaluating_and_saving(every), first, last, every)
    assert left["bytes"] == 0
    assert left["objects"] < (last - first) // every  # not one for each log line, evaluation or checkpoint


def test_the_measurement_of_growth_sees_what_an_evaluation_leaves_behind(monkeypatch):
    from trainwright import Trainer

    kept, evaluate = [], Trainer.evaluate

    def keeping(self, *args, **kwargs):
        kept.append([torch.zeros(10)])
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "evaluate", keeping)
    left = memory.growth(memory.evaluating_and_saving(10), 25, 125, 10)
    assert left["bytes"] == 10 * 10 * 4
    assert left["objects"] >= 2 * 10


def checkpoint_with_history(make_trainer, directory, num_lines):
    """The files, with their sizes in bytes, of a checkpoint written after `num_lines` log lines."""
    trainer = make_trainer(output_dir=str(directory), max_steps=1, logging_strategy="no", save_strategy="no")
    trainer.train()
    trainer.state.log_history = [{"loss": 0.5, "learning_rate": 0.25, "step": 1} for _ in range(num_lines)]
    trainer._save_checkpoint(trainer.model, trial=None)
    return {path.name: path.stat().st_size for path in (directory / "checkpoint-1").iterdir()}


def test_a_long_log_history_makes_only_its_own_file_longer(make_trainer, tmp_path):
    few = checkpoint_with_history(make_trainer, tmp_path / "few", num_lines=1)
    many = checkpoint_with_history(make_trainer, tmp_path / "all", num_lines=1000)  # a name as long, as files hold it
    assert many.pop("trainer_state.json") > few.pop("trainer_state.json")
    assert abs(many.pop("manifest.json") - few.pop("manifest.json")) < 10  # the digits of that size
    assert many == few


SEEN = {"time_breakdown": "logs", "log_speed": True}
# Per step above the same run without. Tokens are counted at each step, not at log lines alone.
MOST_SEEN_PYTHON_CALLS, MOST_SEEN_C_CALLS = 27, 27


def test_what_is_seen_of_a_run_costs_a_counted_number_of_calls():
    plain = calls_per_step(contenders.with_trainer("trainwright"))
    seen = calls_per_step(contenders.with_trainer("trainwright", **SEEN))
    assert 0 < seen[0] - plain[0] <= MOST_SEEN_PYTHON_CALLS
    assert 0 < seen[1] - plain[1] <= MOST_SEEN_C_CALLS
