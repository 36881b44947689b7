"""Evaluations of a run that packs: in packs, with the loss that each sample has alone, where nothing needs its row."""

import pytest
import torch
from torch import nn

from packs import LENGTHS, PACK, TOTAL, WithNumbers, WithOffsets, WithPositions, samples, tiny, trainer_for
from trainwright import Trainer
from trainwright.metrics import Accuracy, Mean, Perplexity

ROWS = samples()
NUM_LABELS = TOTAL - len(LENGTHS)
HALF_MASKED = [{**row, "labels": [-100] * (n // 2) + row["input_ids"][n // 2 :]} for row, n in zip(ROWS, LENGTHS)]
PLAIN = [WithNumbers, WithPositions, WithOffsets]


def evaluator(model, directory, data=None, **arguments):
    """A Trainer that packs, and the shapes of what its model is given."""
    data = HALF_MASKED if data is None else data
    trainer = trainer_for(model, directory, eval_dataset=data, **{"per_device_eval_batch_size": 4, **arguments})
    return trainer, shapes_seen(trainer)


def shapes_seen(trainer):
    shapes = []

    def watch(model, args, inputs):
        shapes.append(tuple(inputs["input_ids"].shape))

    trainer.model.register_forward_pre_hook(watch, with_kwargs=True)
    return shapes


def evaluated(trainer, shapes, **arguments):
    """The metrics, and the shapes of the batches of the second evaluation, which tries nothing out."""
    first = trainer.evaluate(**arguments)
    shapes.clear()
    second = trainer.evaluate(**arguments)
    assert second["eval_loss"] == first["eval_loss"]
    return second, list(shapes)


@torch.no_grad()
def loss_alone(model, data=None):
    """The mean over all labels, each sample by itself."""
    total, count, model = 0.0, 0, model.eval()
    for sample in HALF_MASKED if data is None else data:
        ids, labels = torch.tensor(sample["input_ids"]), torch.tensor(sample.get("labels", sample["input_ids"]))
        logits = model(input_ids=ids[None]).logits[0, :-1]
        total += nn.functional.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100).item()
        count += int((labels[1:] != -100).sum())
    return total / count


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
def test_an_evaluation_in_packs_has_the_loss_of_the_samples_alone(kind, attention, tmp_path):
    trainer, shapes = evaluator(tiny(kind, attention), tmp_path)
    metrics, shapes = evaluated(trainer, shapes)
    assert metrics["eval_loss"] == pytest.approx(loss_alone(trainer.model), rel=1e-6)
    assert {width for _, width in shapes} == {PACK}
    assert sum(rows for rows, _ in shapes) == -(-TOTAL // PACK)


def test_evaluations_within_and_after_training_are_packed_and_training_is_as_without_them(tmp_path):
    arguments = {"max_steps": 3, "learning_rate": 0.1}
    trainer, shapes = evaluator(tiny("llama"), tmp_path / "a", eval_strategy="steps", eval_steps=1, **arguments)
    trainer.train()
    last = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line][-1]
    assert last == pytest.approx(loss_alone(trainer.model), rel=1e-6)
    after, shapes = evaluated(trainer, shapes)
    assert after["eval_loss"] == pytest.approx(last, rel=1e-6)
    assert {width for _, width in shapes} == {PACK}
    without = trainer_for(tiny("llama"), tmp_path / "b", **arguments)
    without.train()
    assert all(map(torch.equal, trainer.model.parameters(), without.model.parameters()))


def test_a_batch_has_no_more_tokens_than_so_many_samples_without_padding(tmp_path):
    trainer, shapes = evaluator(tiny("llama"), tmp_path, per_device_eval_batch_size=len(LENGTHS) // 2)
    _, shapes = evaluated(trainer, shapes)
    most = len(LENGTHS) // 2 * TOTAL / len(LENGTHS)
    assert max(rows * width for rows, width in shapes) <= most < sum(rows * width for rows, width in shapes)


def test_samples_and_batches_are_counted_for_the_speed(tmp_path):
    trainer, shapes = evaluator(tiny("llama"), tmp_path)
    metrics, shapes = evaluated(trainer, shapes)
    ratio = metrics["eval_samples_per_second"] / metrics["eval_steps_per_second"]
    assert ratio == pytest.approx(len(LENGTHS) / len(shapes), rel=0.01)


@pytest.mark.parametrize("model", PLAIN)
def test_a_plain_module_is_evaluated_in_packs_too(model, tmp_path):
    trainer, shapes = evaluator(model(), tmp_path)
    metrics, shapes = evaluated(trainer, shapes)
    one_by_one, _ = evaluator(model(), tmp_path, per_device_eval_batch_size=1, eval_loss_average="batches")
    # The mean over samples of their means, of rows of one sample: another number, of other batches.
    assert one_by_one.evaluate()["eval_loss"] != pytest.approx(metrics["eval_loss"], rel=1e-3)
    assert sum(rows * width for rows, width in shapes) < TOTAL + PACK
    losses, counts = [], []
    for sample in HALF_MASKED:
        alone, _ = evaluator(model(), tmp_path, data=[sample], per_device_eval_batch_size=1)
        count = sum(label != -100 for label in sample["labels"][1:])
        if count:
            losses.append(alone.evaluate()["eval_loss"] * count)
            counts.append(count)
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / sum(counts), rel=1e-6)


@pytest.mark.parametrize("model", PLAIN[:2])
def test_predictions_of_a_plain_module_have_a_row_for_each_sample(model, tmp_path):
    """It takes no attention_mask, or more than that: its rows are given what packs are."""
    trainer, _ = evaluator(model(), tmp_path)
    predicted = trainer.predict(HALF_MASKED)
    assert len(predicted.predictions) == len(HALF_MASKED)
    assert predicted.metrics["test_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)


def test_a_model_that_takes_one_row_predicts_sample_by_sample_and_says_how(tmp_path):
    trainer, _ = evaluator(WithOffsets(), tmp_path)
    with pytest.raises(ValueError, match="per_device_eval_batch_size=1"):
        trainer.predict(HALF_MASKED)
    trainer, _ = evaluator(WithOffsets(), tmp_path, per_device_eval_batch_size=1)
    assert len(trainer.predict(HALF_MASKED).predictions) == len(HALF_MASKED)


class Unpacked(Trainer):
    """The same evaluation with a row for each sample."""

    def _packed_evaluation(self, dataset):
        return None


def both(tmp_path, make=tiny, cls=Trainer, data=None, attributes=(), **arguments):
    found = []
    for number, one in enumerate((cls, type("Rows", (Unpacked, cls), {}))):
        trainer, shapes = evaluator(make("llama"), tmp_path / str(number), cls=one, data=data, **arguments)
        for name, value in attributes:
            setattr(trainer, name, value)
        found.append(evaluated(trainer, shapes))
    (packed, of_packs), (rows, of_rows) = found
    assert packed["eval_loss"] == pytest.approx(rows["eval_loss"], rel=1e-6)
    return packed, rows, of_packs != of_rows


class MeanOfLosses(Trainer):
    def average_eval_losses(self, losses):
        return super().average_eval_losses(losses)


class LossOfRows(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.loss * len(inputs["labels"])
        return (loss, outputs) if return_outputs else loss


def of_rows(outputs, labels, num_items_in_batch=None):
    return outputs.logits.square().mean()


@pytest.mark.parametrize(
    ("packs", "cls", "attributes", "arguments"),
    [
        (True, Trainer, (), {}),
        (True, Trainer, (), {"label_smoothing_factor": 0.3}),
        (True, Trainer, (("compute_metrics", lambda found: {}),), {"prediction_loss_only": True}),
        (False, Trainer, (), {"eval_loss_average": "batches"}),
        (False, Trainer, (), {"dataloader_drop_last": True}),
        (False, Trainer, (("compute_loss_func", of_rows),), {}),
        (False, MeanOfLosses, (), {}),
        (False, LossOfRows, (), {}),
    ],
)
def test_the_loss_is_that_of_rows_whatever_it_is_averaged_over(packs, cls, attributes, arguments, tmp_path):
    *_, differs = both(tmp_path, cls=cls, attributes=attributes, **arguments)
    assert differs == packs


def test_metrics_that_count_labels_are_packed(tmp_path):
    metrics = (("compute_metrics", [Accuracy(), Perplexity()]),)
    packed, rows, differs = both(tmp_path, attributes=metrics)
    assert differs
    assert packed["eval_accuracy"] == rows["eval_accuracy"]
    assert packed["eval_perplexity"] == pytest.approx(rows["eval_perplexity"], rel=1e-6)


class WidestRow(Accuracy):
    def measure(self, predictions, labels):
        return {"right": torch.tensor(labels.shape[1]), "labels": torch.tensor(1)}


class NotedRows(Accuracy):
    def update(self, predictions, labels=None):
        self.widest = max(getattr(self, "widest", 0), labels.shape[1])
        super().update(predictions, labels)


@pytest.mark.parametrize("metric", [Mean(lambda logits, labels: logits.mean(dim=(1, 2))), WidestRow(), NotedRows()])
def test_metrics_that_may_see_more_of_a_sample_keep_its_row(metric, tmp_path):
    *_, differs = both(tmp_path, attributes=(("compute_metrics", [metric]),))
    assert not differs


def test_a_function_of_predictions_is_given_those_of_each_sample_and_a_line_says_why(tmp_path, caplog):
    seen = []

    def per_sample(found):
        seen.append((found.predictions.shape[0], found.label_ids.shape[0]))
        return {}

    caplog.set_level("INFO", logger="trainwright")
    *_, differs = both(tmp_path, attributes=(("compute_metrics", per_sample),))
    assert not differs
    assert set(seen) == {(len(ROWS), len(ROWS))}
    lines = [r.getMessage() for r in caplog.records if "a row for each sample" in r.getMessage()]
    assert len(lines) == 1
    assert "metrics that count labels" in lines[0]


def test_each_set_of_a_dict_is_packed_by_itself(tmp_path):
    data = {"whole": ROWS, "half": HALF_MASKED}
    trainer, shapes = evaluator(tiny("llama"), tmp_path, data=data, eval_strategy="steps", eval_steps=1, max_steps=1)
    trainer.train()
    shapes.clear()
    metrics = trainer.evaluate()
    assert {width for _, width in shapes} == {PACK}
    for name, rows in data.items():
        assert metrics[f"eval_{name}_loss"] == pytest.approx(loss_alone(trainer.model, rows), rel=1e-6)


def test_a_stream_is_evaluated_with_a_row_for_each_sample(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from HALF_MASKED

    trainer, shapes = evaluator(tiny("llama"), tmp_path, data=Stream())
    metrics, shapes = evaluated(trainer, shapes)
    assert metrics["eval_loss"] == pytest.approx(loss_alone(trainer.model), rel=1e-6)
    assert sum(rows for rows, _ in shapes) == len(ROWS)


def test_samples_longer_than_a_pack_are_not_cut(tmp_path):
    long = [*HALF_MASKED, *samples([40, 3])]
    trainer, shapes = evaluator(tiny("llama"), tmp_path, data=long, packing_long_samples="truncate")
    metrics, shapes = evaluated(trainer, shapes)
    assert metrics["eval_loss"] == pytest.approx(loss_alone(trainer.model, long), rel=1e-6)
    assert {width for _, width in shapes} == {PACK, 40}


@pytest.mark.parametrize("table", [False, True])
def test_samples_that_cannot_be_joined_are_rows(table, tmp_path):
    """They are padded already, all but the first."""
    padded = [
        {
            "input_ids": row["input_ids"] + [0] * (16 - n),
            "attention_mask": [1] * n + [0] * (16 - n),
            "labels": row["input_ids"] + [-100] * (16 - n),
        }
        for row, n in sorted(zip(ROWS, LENGTHS), key=lambda pair: -pair[1])
    ]
    assert all(padded[0]["attention_mask"])
    if table:
        padded = pytest.importorskip("datasets").Dataset.from_list(padded)
    trainer, shapes = evaluator(tiny("llama"), tmp_path, data=padded)
    metrics, shapes = evaluated(trainer, shapes)
    assert metrics["eval_loss"] == pytest.approx(loss_alone(trainer.model, ROWS), rel=1e-6)
    assert sum(rows for rows, _ in shapes) == len(ROWS)


def test_a_table_is_packed(tmp_path):
    table = pytest.importorskip("datasets").Dataset.from_list([{**row, "text": "unused"} for row in HALF_MASKED])
    trainer, shapes = evaluator(tiny("llama"), tmp_path, data=table)
    metrics, shapes = evaluated(trainer, shapes)
    assert metrics["eval_loss"] == pytest.approx(loss_alone(trainer.model), rel=1e-6)
    assert {width for _, width in shapes} == {PACK}


class MeanOfRows(WithNumbers):
    """Each row weighs the same, however many labels it has."""

    def forward(self, input_ids, labels, seq_idx):
        rows = [
            super(MeanOfRows, self).forward(*(part[None] for part in row))["loss"]
            for row in zip(input_ids, labels, seq_idx)
        ]
        return {"loss": torch.stack(rows).nanmean()}


def test_a_loss_that_is_no_mean_over_labels_is_found_and_has_rows(tmp_path):
    trainer, shapes = evaluator(MeanOfRows(), tmp_path)
    _, shapes = evaluated(trainer, shapes)
    assert sum(rows for rows, _ in shapes) == len(ROWS)


class FromWorkers(torch.utils.data.Dataset):
    def __len__(self):
        return len(HALF_MASKED)

    def __getitem__(self, index):
        return HALF_MASKED[index]


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_make_the_packs(persistent, tmp_path):
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": persistent}
    trainer, shapes = evaluator(tiny("llama"), tmp_path, data=FromWorkers(), **workers)
    metrics, shapes = evaluated(trainer, shapes)
    assert metrics["eval_loss"] == pytest.approx(loss_alone(trainer.model), rel=1e-6)
    assert {width for _, width in shapes} == {PACK}


def test_batches_that_the_model_does_not_take_are_found_before_the_first_step(tmp_path):
    class DataCollatorForSeq2Seq:  # by its name, one that only pads
        def __call__(self, rows):
            longest = max(len(row["input_ids"]) for row in rows)
            ids = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]
            labels = [row["labels"] + [-100] * (longest - len(row["labels"])) for row in rows]
            mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
            return {
                "input_ids": torch.tensor(ids),
                "labels": torch.tensor(labels),
                "attention_mask": torch.tensor(mask),
            }

    trainer, _ = evaluator(
        WithNumbers(), tmp_path, collator=DataCollatorForSeq2Seq(), eval_strategy="steps", eval_steps=1, max_steps=2
    )
    trainer.compute_metrics = lambda found: {}
    with pytest.raises(ValueError, match=r"lack \['seq_idx'\].*have \['attention_mask'\].*leave it out"):
        trainer.train()
    assert trainer.state.global_step == 0
