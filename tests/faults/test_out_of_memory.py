"""Memory runs out above a number of samples: the same step in smaller parts, the same results.

The allocator is played by a model that raises what a device's allocator raises.
"""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from of_runs import losses
from trainwright import Trainer, TrainerCallback
from trainwright.checkpoint.load import load_loop_state
from trainwright.oom_retry import CannotRetry, FoundBatchSize
from trainwright.splitting import CannotSplit, join_rows, mean_weights, num_samples, split_batch


class Small(nn.Module):
    """Two layers with dropout and, on request, a running mean; runs out of memory above `limit` samples."""

    def __init__(self, limit=None, dropout=0.0, norm=False):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 1)
        self.norm = nn.BatchNorm1d(3) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.limit, self.sizes = limit, []

    def forward(self, x, labels=None):
        self.sizes.append(len(x))
        hidden = self.dropout(torch.tanh(self.first(self.norm(x))))  # random numbers are drawn before it fails
        self.allocate(len(x))
        logits = self.second(hidden)
        return {"loss": (logits - labels).pow(2).mean(), "logits": logits}

    def allocate(self, num_samples):
        if self.limit is not None and num_samples > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")


class Tagger(nn.Module):
    """Class labels per token, -100 where there is none. Divides by the count it is given where `counts`."""

    def __init__(self, limit=None, counts=False):
        super().__init__()
        torch.manual_seed(4)
        self.embedding, self.head = nn.Embedding(7, 5), nn.Linear(5, 4)
        self.limit, self.sizes, self.counts = limit, [], counts

    def loss(self, logits, labels, num_items):
        total = "mean" if num_items is None or not self.counts else "sum"
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=total)
        return loss if total == "mean" else loss / num_items


class CountingTagger(Tagger):
    def forward(self, input_ids, labels=None, **kwargs):
        self.sizes.append(len(input_ids))
        Small.allocate(self, len(input_ids))
        logits = self.head(self.embedding(input_ids))
        outputs = {"logits": logits}
        if labels is not None:
            outputs["loss"] = self.loss(logits, labels, kwargs.get("num_items_in_batch"))
        return outputs


class PlainTagger(Tagger):
    def forward(self, input_ids, labels=None):
        return CountingTagger.forward(self, input_ids, labels)


class Tokens(torch.utils.data.Dataset):
    """Rows of 6 tokens of which an uneven number has a label, some rows none."""

    def __init__(self, length=22):
        generator = torch.Generator().manual_seed(9)
        self.ids = torch.randint(0, 7, (length, 6), generator=generator)
        ends = torch.randint(0, 7, (length, 1), generator=generator)
        self.labels = torch.where(torch.arange(6) < ends, self.ids % 4, -100)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


RUN = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "optim": "adamw_torch", "auto_find_batch_size": True}


def trained(make_trainer, model, **options):
    trainer = make_trainer(trainer={"model": model, **options.pop("trainer", {})}, **{**RUN, **options})
    trainer.train()
    return trainer


def largest_difference(one, other):
    return max((a - b).abs().max().item() for a, b in zip(one.state_dict().values(), other.state_dict().values()))


# ------------------------------------------------------------------------------------------------------- training ----


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("limit", [1, 3, 5])
def test_a_run_with_too_little_memory_ends_like_one_with_enough(make_trainer, accumulation, limit):
    enough, little = Small(), Small(limit)
    one = trained(make_trainer, enough, gradient_accumulation_steps=accumulation)
    other = trained(make_trainer, little, gradient_accumulation_steps=accumulation)
    assert one.state.global_step == other.state.global_step == one.state.max_steps
    assert largest_difference(enough, little) < 1e-6
    assert losses(other) == pytest.approx(losses(one), abs=1e-6)
    assert other.state.train_batch_size == 8


@pytest.mark.parametrize("model_class, counts", [(PlainTagger, False), (CountingTagger, True), (CountingTagger, False)])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_label_weighs_the_same_whatever_the_parts(make_trainer, model_class, counts, accumulation):
    """The last of the cases takes any keyword and ignores the count: its loss is a mean, which must be found out."""
    enough, little = model_class(counts=counts), model_class(3, counts=counts)
    options = {"gradient_accumulation_steps": accumulation, "trainer": {"train_dataset": Tokens()}}
    one = trained(make_trainer, enough, **copy.copy(options))
    other = trained(make_trainer, little, **copy.copy(options))
    assert largest_difference(enough, little) < 1e-6
    assert losses(other) == pytest.approx(losses(one), abs=1e-6)


def test_a_smoothed_loss_takes_labels_out_of_the_batch_and_can_still_be_repeated(make_trainer):
    runs = [PlainTagger(), PlainTagger(3)]
    for model in runs:
        options = {"label_smoothing_factor": 0.2, "gradient_accumulation_steps": 2}
        trained(make_trainer, model, trainer={"train_dataset": Tokens()}, **options)
    assert largest_difference(*runs) < 1e-6


def test_the_size_is_remembered_so_memory_runs_out_once_per_halving(make_trainer):
    model = Small(limit=3)
    trained(make_trainer, model, max_steps=6, num_train_epochs=3, gradient_accumulation_steps=1)
    too_large = [size for size in model.sizes if size > 3]
    assert too_large == [8, 4]
    assert model.sizes[:3] == [8, 4, 2]
    assert sum(model.sizes) - sum(too_large) == 22 * 2  # each sample once per pass: the global batch is unchanged


def test_with_dropout_the_same_shortage_gives_the_same_weights_again(make_trainer):
    runs = [Small(3, dropout=0.5) for _ in range(2)]
    for model in runs:
        trained(make_trainer, model)
    assert largest_difference(*runs) == 0


def by_hand(batches, model, limits):
    """The plain loop: an update over micro-batches, each cut to at most its limit."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    model.train()
    for batch, limit in zip(batches, limits):
        parts = split_batch(batch, -(-len(batch["x"]) // limit))
        for part in parts:
            (model(**part)["loss"] * len(part["x"]) / len(batch["x"]) / len(batches)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


class FailsOnce(Small):
    """Runs out of memory in its second forward pass, after random numbers were drawn, and in no other."""

    def allocate(self, num_samples):
        if len(self.sizes) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")


class Follows(TrainerCallback):
    """Notes the events of an update and the random state at its start; takes memory away after a micro-batch."""

    def __init__(self, limit=None):
        self.limit, self.events, self.states = limit, [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.events.append("step")
        self.states.append(torch.get_rng_state())

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        self.events.append("substep")
        model.limit = self.limit


@pytest.mark.parametrize(
    "model_class, limit, sizes, limits",
    [
        (FailsOnce, None, [8, 8, 8, 4, 4], [8, 4]),  # the first micro-batch is repeated as it was, whole
        (Small, 4, [8, 8, 8, 4, 4, 4, 4], [4, 4]),  # it does not fit any more either
    ],
)
def test_all_that_a_failed_attempt_did_is_dropped_exactly(make_trainer, line_data, model_class, limit, sizes, limits):
    """The second micro-batch fails. What counts are both, cut to `limits`, with dropout and running means from the
    state at the update's start: the same update by hand is equal to the last bit. Events do not come twice.
    """
    model, callback = model_class(dropout=0.5, norm=True), Follows(limit)
    expected = copy.deepcopy(model)
    options = {"gradient_accumulation_steps": 2, "max_steps": 1, "train_sampling_strategy": "sequential"}
    trained(make_trainer, model, trainer={"callbacks": [callback]}, **options)
    assert model.sizes == sizes and callback.events == ["step", "substep"]
    data = line_data()
    torch.set_rng_state(callback.states[0])
    expected.sizes += [0, 0]  # past the pass that fails
    by_hand([{"x": data.x[i : i + 8], "labels": data.y[i : i + 8]} for i in (0, 8)], expected, limits)
    assert largest_difference(expected, model) == 0


def test_one_sample_that_does_not_fit_is_a_clear_error(make_trainer):
    with pytest.raises(RuntimeError, match=r"even for one sample per micro-batch.*gradient_checkpointing"):
        trained(make_trainer, Small(limit=0))


def test_an_error_that_is_not_about_memory_is_not_repeated(make_trainer):
    class Broken(Small):
        def allocate(self, num_samples):
            raise RuntimeError("shapes do not match")

    model = Broken()
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trained(make_trainer, model)
    assert model.sizes == [8]


def test_on_request_the_run_starts_again_with_half_the_batch(make_trainer):
    model, small = Small(limit=5), Small()
    restarted = trained(make_trainer, model, auto_find_batch_size_mode="restart")
    direct = trained(make_trainer, small, per_device_train_batch_size=4)
    assert restarted.state.train_batch_size == 4 and restarted.state.max_steps == direct.state.max_steps
    assert largest_difference(model, small) == 0


def packed(samples):
    """All samples in one row, as a flattening collator gives them, with their bounds."""
    x = torch.stack([sample["x"] for sample in samples])
    return {"x": x, "labels": torch.stack([sample["labels"] for sample in samples]), "bounds": torch.arange(len(x) + 1)}


class Packed(Small):
    def forward(self, x, labels=None, bounds=None):
        return super().forward(x, labels)


def test_a_batch_that_cannot_be_split_starts_the_run_again_while_nothing_is_lost(make_trainer, caplog):
    model, small = Packed(limit=5), Packed()
    parts = {"data_collator": packed}
    restarted = trained(make_trainer, model, trainer=parts)
    direct = trained(make_trainer, small, per_device_train_batch_size=4, trainer=parts)
    assert "bounds has 9" in caplog.text and "starts again with half" in caplog.text
    assert restarted.state.train_batch_size == 4 and largest_difference(model, small) == 0
    assert model.sizes[:2] == [8, 4] and direct.state.global_step == restarted.state.global_step


def test_a_batch_that_cannot_be_split_ends_a_run_that_has_made_updates(make_trainer):
    parts = {"data_collator": packed, "callbacks": [ShrinksAfterStep(2)]}
    with pytest.raises(CannotRetry, match="per_device_train_batch_size"):
        trained(make_trainer, Packed(), trainer=parts)


class ShrinksAfterStep(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            model.limit = 3


def test_a_shortage_in_the_middle_of_a_run_costs_no_step(make_trainer):
    enough, little = Small(), Small()
    one = trained(make_trainer, enough)
    other = trained(make_trainer, little, trainer={"callbacks": [ShrinksAfterStep(3)]})
    assert one.state.global_step == other.state.global_step
    assert [size for size in little.sizes if size > 3][3:] == [8, 4]
    assert largest_difference(enough, little) < 1e-6


def test_an_older_training_step_that_divides_by_the_documented_attribute_is_weighted_too(make_trainer):
    class Older(Trainer):
        def training_step(self, model, inputs):
            model.train()
            inputs = self._prepare_inputs(inputs)
            loss = self.compute_loss(model, inputs) / self.current_gradient_accumulation_steps
            loss.backward()
            return loss.detach()

    runs = [Small(), Small(3)]
    for model in runs:
        make_trainer(cls=Older, trainer={"model": model}, **{**RUN, "gradient_accumulation_steps": 2}).train()
    assert largest_difference(*runs) < 1e-6


def test_switched_off_nothing_is_wrapped_and_an_error_passes(make_trainer):
    trainer = make_trainer(trainer={"model": Small(3)}, per_device_train_batch_size=8, max_steps=1)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    with pytest.raises(torch.OutOfMemoryError):
        trainer.evaluate()
    assert trainer._run.splitting is None


SAVING = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}


def resumed(make_trainer, model, tmp_path, **options):
    trainer = make_trainer(
        trainer={"model": model}, **{**RUN, **SAVING, "output_dir": str(tmp_path / "two"), **options}
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    return trainer


def test_a_resumed_run_keeps_to_the_size_that_was_found_and_ends_the_same(make_trainer, tmp_path):
    whole, again = Small(limit=3, dropout=0.5), Small(limit=3, dropout=0.5)
    trained(make_trainer, whole, **SAVING)
    resumed(make_trainer, again, tmp_path)
    assert [size for size in whole.sizes if size > 3] == [8, 4]
    assert max(again.sizes) <= 3  # no second shortage
    assert largest_difference(whole, again) == 0


@pytest.mark.parametrize("size", [4, 16])
def test_another_batch_size_on_resume_is_tried_as_it_is(make_trainer, tmp_path, size):
    trained(make_trainer, Small(limit=3), **SAVING)
    again = Small(limit=3)
    resumed(make_trainer, again, tmp_path, per_device_train_batch_size=size)
    assert again.sizes[0] == min(size, 22 - 16)  # 16 samples of the first epoch's 22 were seen


def test_a_checkpoint_without_a_shortage_says_nothing_of_sizes(make_trainer, tmp_path):
    trained(make_trainer, Small(), **SAVING)
    assert load_loop_state(tmp_path / "out" / "checkpoint-2")["batch_size"] is None
    again = Small()
    resumed(make_trainer, again, tmp_path)
    assert again.sizes[0] == 6  # the rest of the epoch, whole


def test_a_run_that_had_to_start_over_goes_on_with_its_smaller_batch(make_trainer, tmp_path):
    options = {"auto_find_batch_size_mode": "restart"}
    whole, again = Small(limit=5), Small(limit=5)
    one = trained(make_trainer, whole, **SAVING, **options)
    other = resumed(make_trainer, again, tmp_path, **options)
    assert max(again.sizes) == 4 and other.state.train_batch_size == one.state.train_batch_size == 4
    assert other.state.max_steps == one.state.max_steps
    assert largest_difference(whole, again) == 0


def test_another_number_of_processes_goes_on_with_what_the_smallest_could():
    found = FoundBatchSize(8, 8, (None, 3))
    assert [found.limit(rank, 2) for rank in (0, 1)] == [None, 3]
    assert [found.limit(rank, 3) for rank in (0, 1, 2)] == [3, 3, 3]
    assert FoundBatchSize(8, 8).limit(0, 1) is None


# ----------------------------------------------------------------------------------------------------- evaluation ----


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_an_evaluation_with_too_little_memory_gives_the_same_arrays(make_trainer, limit):
    def predicted(limit):
        model = PlainTagger(limit)
        trainer = make_trainer(
            trainer={"model": model, "compute_metrics": lambda p: {"sum": float(p.predictions.sum())}},
            auto_find_batch_size=True,
            per_device_eval_batch_size=8,
        )
        output = trainer.predict(Tokens())
        metrics = trainer.evaluate(Tokens())
        return output, metrics, model

    (enough, metrics, _), (little, less, model) = predicted(None), predicted(limit)
    np.testing.assert_allclose(little.predictions, enough.predictions, atol=1e-6)
    assert np.array_equal(little.label_ids, enough.label_ids)
    assert less["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-6)
    assert less["eval_sum"] == pytest.approx(metrics["eval_sum"], abs=1e-4)
    assert max(model.sizes[4:]) <= limit  # after at most four attempts no batch is too large, nor in evaluate()


def test_a_size_that_one_evaluation_found_is_the_next_ones_first(make_trainer):
    model = Small(limit=3)
    trainer = make_trainer(trainer={"model": model}, auto_find_batch_size=True, per_device_eval_batch_size=8)
    trainer.evaluate()
    first = len(model.sizes)
    trainer.predict(trainer.eval_dataset)
    assert max(model.sizes[:first]) == 8 and max(model.sizes[first:]) <= 3


def test_an_evaluation_sample_that_does_not_fit_alone_is_a_clear_error(make_trainer):
    trainer = make_trainer(trainer={"model": Small(limit=0)}, auto_find_batch_size=True)
    with pytest.raises(RuntimeError, match="one sample per evaluation batch"):
        trainer.evaluate()


# ------------------------------------------------------------------------------------------------------ splitting ----


def test_tensors_are_cut_and_other_values_repeated():
    inputs = {
        "x": torch.arange(10).reshape(5, 2),
        "nested": {"y": torch.arange(5.0), "pair": (torch.ones(5, 1), torch.zeros(5))},
        "texts": ["a", "b", "c", "d", "e"],
        "array": np.arange(5),
        "scale": torch.tensor(2.0),
        "flag": True,
        "names": ["only", "two"],
    }
    parts = split_batch(inputs, 2)
    assert [num_samples(part) for part in parts] == [3, 2]
    assert torch.equal(parts[1]["x"], inputs["x"][3:]) and torch.equal(parts[0]["nested"]["y"], torch.arange(3.0))
    assert [tensor.shape[0] for tensor in parts[1]["nested"]["pair"]] == [2, 2]
    assert parts[0]["texts"] == ["a", "b", "c"] and parts[1]["array"].tolist() == [3, 4]
    for part in parts:
        assert part["scale"] is inputs["scale"] and part["flag"] is True and part["names"] == ["only", "two"]
    assert torch.equal(join_rows([part["x"] for part in parts]), inputs["x"])


def test_a_batch_of_a_tokenizer_keeps_its_type():
    transformers = pytest.importorskip("transformers")
    batch = transformers.BatchEncoding({"input_ids": torch.arange(12).reshape(4, 3), "labels": torch.arange(4)})
    parts = split_batch(batch, 3)
    assert [type(part) for part in parts] == [transformers.BatchEncoding] * 3
    assert torch.equal(torch.cat([part["input_ids"] for part in parts]), batch["input_ids"])


def test_there_are_never_more_parts_than_samples():
    assert [len(part["x"]) for part in split_batch({"x": torch.ones(2)}, 5)] == [1, 1]


@pytest.mark.parametrize(
    "inputs, reason",
    [
        ({"x": torch.ones(4), "bounds": torch.ones(5)}, "x has 4, bounds has 5"),
        ({"x": torch.ones(4), "return_loss": True}, "pairs of samples"),
        ({"flag": True, "x": torch.tensor(1.0)}, "no tensor"),
        ({"x": torch.ones(2), "images": [torch.ones(2, 3), torch.ones(2, 3)]}, "one per sample or one per input"),
    ],
)
def test_what_cannot_be_cut_without_guessing_is_refused(inputs, reason):
    with pytest.raises(CannotSplit, match=reason):
        split_batch(inputs, 2)


def test_parts_weigh_their_class_labels_and_else_their_samples():
    labels = torch.tensor([[1, 2, -100], [-100, -100, -100], [3, 1, 2]])
    parts = split_batch({"x": torch.ones(3, 3), "labels": labels}, 3)
    assert mean_weights(parts) == [2 / 5, 0, 3 / 5]
    assert mean_weights(parts, labels_are_shifted=True) == [1 / 3, 0, 2 / 3]
    assert mean_weights(split_batch({"labels": torch.ones(3, 2)}, 2)) == [2 / 3, 1 / 3]
