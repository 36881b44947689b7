"""Metrics that count labels go through the output layer a chunk at a time: no batch has all its logits."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from packs import samples, tiny, trainer_for
from trainwright.evaluation.streaming import StreamingMetrics
from trainwright.linear_loss import function
from trainwright.linear_loss.deferred import DeferredLogits
from trainwright.linear_loss.function import Term
from trainwright.metrics import AUROC, F1, Accuracy, Mean, Perplexity, TopK

CLASSES, CHUNK = 4096, 8  # classes of the output layer; rows that go through it at once
LENGTHS = [16, 12, 16, 9, 16, 14, 16, 16]
ROWS = [{**row, "labels": [-100] * (n // 2) + row["input_ids"][n // 2 :]} for row, n in zip(samples(LENGTHS), LENGTHS)]
BATCH = 4


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(function, "FEWEST_ROWS", CHUNK)
    monkeypatch.setattr(function, "CHUNK_BYTES", CHUNK * CLASSES * 4)


class Largest(TorchDispatchMode):
    """The most numbers of a tensor of classes that an operation returned, over the number of classes; and the rows that
    went through the output layer.
    """

    def __init__(self):
        super().__init__()
        self.rows = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.t.default:  # a view of the weight
            return out
        for one in out if isinstance(out, (tuple, list)) else [out]:
            if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm) and one.shape[-1] == CLASSES:
                self.products += len(one)
            if isinstance(one, torch.Tensor) and one.shape and one.shape[-1] == CLASSES:
                self.rows = max(self.rows, one.numel() // CLASSES)
        return out


def evaluate(directory, metrics, data=ROWS, preprocess=None, counts_products=False, **arguments):
    trainer = trainer_for(
        tiny("llama", vocab_size=CLASSES), directory, eval_dataset=data,
        **{"packing": False, "packing_length": None, "per_device_eval_batch_size": BATCH, **arguments},
    )  # fmt: skip
    from trainwright.data.collate_packing import DataCollatorForUnpacked

    trainer.data_collator = DataCollatorForUnpacked(trainer.data_collator)
    trainer.compute_metrics, trainer.preprocess_logits_for_metrics = metrics, preprocess
    trainer.evaluate()  # what is tried once
    with Largest() as largest:
        found = trainer.evaluate()
    found = {k: v for k, v in found.items() if "runtime" not in k and "per_second" not in k}
    return (found, largest.products) if counts_products else (found, largest.rows)


def same(found, expected):
    assert found.keys() == expected.keys()
    assert all(found[name] == pytest.approx(expected[name], rel=1e-5) for name in expected)


@pytest.mark.parametrize("packs", [False, True])
def test_metrics_are_those_of_all_logits_and_only_a_chunk_of_them_is_made(packs, tmp_path):
    packing = {"packing": True, "packing_length": 32} if packs else {}
    metrics = [Accuracy(), Perplexity(), TopK(3)]
    found, rows = evaluate(tmp_path / "a", metrics, **packing)
    expected, all_rows = evaluate(tmp_path / "b", metrics, linear_cross_entropy=False)
    same(found, expected)
    assert found["eval_perplexity"] == pytest.approx(math.exp(found["eval_loss"]), rel=1e-5)
    assert rows <= CHUNK
    assert all_rows == BATCH * max(LENGTHS)


TIMES = [([Perplexity()], 1), ([Perplexity(), Perplexity("b")], 1), ([Accuracy(), Perplexity()], 2), ([TopK(3)], 2)]


@pytest.mark.parametrize(("metrics", "times"), TIMES, ids=["perplexity", "twice", "accuracy, too", "top 3"])
def test_perplexity_is_that_of_the_losses_and_computes_no_logits_again(metrics, times, tmp_path):
    found, rows = evaluate(tmp_path / "a", metrics, counts_products=True)
    expected, _ = evaluate(tmp_path / "b", metrics, linear_cross_entropy=False)
    same(found, expected)
    assert rows == times * sum(label != -100 for row in ROWS for label in row["labels"][1:])


@pytest.mark.parametrize("are_shifted", [False, True])
def test_logits_that_were_changed_in_place_are_counted_as_they_are_then(are_shifted):
    logits = DeferredLogits([Term(torch.randn(2, 5, 3), torch.randn(7, 3))])
    logits.fill_(1.0)
    metrics = StreamingMetrics([Perplexity()], labels_are_shifted=are_shifted)
    metrics.update(logits, torch.ones(2, 5, dtype=torch.long), lambda rows: rows)
    assert metrics.compute()["perplexity"] == pytest.approx(7.0)


def test_each_metric_has_its_own_shift(tmp_path):
    metrics = [Perplexity(), Perplexity("unshifted", shift_labels=False), Perplexity("shifted", shift_labels=True)]
    found, rows = evaluate(tmp_path / "a", metrics)
    expected, _ = evaluate(tmp_path / "b", metrics, linear_cross_entropy=False)
    same(found, expected)
    assert found["eval_shifted"] == found["eval_perplexity"] != found["eval_unshifted"]
    assert rows <= CHUNK


def test_a_batch_without_a_label_adds_nothing(tmp_path):
    unlabelled = [{**row, "labels": [-100] * len(row["input_ids"])} for row in ROWS[:BATCH]]
    metrics = [Accuracy(), Perplexity(), F1(num_classes=CLASSES), AUROC(num_bins=2)]
    with_them, rows = evaluate(tmp_path / "a", metrics[:2], data=[*ROWS, *unlabelled])
    without, _ = evaluate(tmp_path / "b", metrics[:2])
    same(with_them, without)
    assert rows <= CHUNK
    alone, _ = evaluate(tmp_path / "c", metrics[:2], data=unlabelled)
    expected, _ = evaluate(tmp_path / "d", metrics[:2], data=unlabelled, linear_cross_entropy=False)
    assert math.isnan(alone["eval_accuracy"])
    assert math.isnan(expected["eval_accuracy"])


@pytest.mark.parametrize("case", ["another metric", "a function", "preprocessed"])
def test_what_reads_logits_is_given_them(case, tmp_path):
    seen = []

    def mean_of(logits, labels):
        seen.append(type(logits))
        return logits.float().mean(-1)

    def function_of(found):
        seen.append(found.predictions.shape)
        return {"mean": float(found.predictions.mean())}

    metrics = {"another metric": [Accuracy(), Mean(mean_of)], "a function": function_of, "preprocessed": [Accuracy()]}
    preprocess = (lambda logits, labels: logits * 1.0) if case == "preprocessed" else None
    found, rows = evaluate(tmp_path / "a", metrics[case], preprocess=preprocess)
    expected, _ = evaluate(tmp_path / "b", metrics[case], preprocess=preprocess, linear_cross_entropy=False)
    same(found, expected)
    assert rows >= BATCH * (max(LENGTHS) - 1)
    assert set(seen) <= {torch.Tensor, (len(LENGTHS), max(LENGTHS), CLASSES)}


def test_predictions_are_whole(tmp_path):
    trainer = trainer_for(tiny("llama", vocab_size=CLASSES), tmp_path, packing=False, packing_length=None)
    trainer.compute_metrics = [Accuracy()]
    whole = [row for row in ROWS if len(row["input_ids"]) == 16]
    assert trainer.predict(whole).predictions.shape == (len(whole), 16, CLASSES)


def test_generated_predictions_have_their_loss_without_logits(tmp_path):
    transformers = pytest.importorskip("transformers")
    from trainwright import Seq2SeqTrainer, Seq2SeqTrainingArguments

    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=CLASSES, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    data = [{"input_ids": list(range(1, 13)), "labels": list(range(1, 13))}] * BATCH
    found = {}
    for asked in ("auto", False):
        model = transformers.T5ForConditionalGeneration(config)
        nn.init.normal_(model.lm_head.weight, generator=torch.Generator().manual_seed(0))
        args = Seq2SeqTrainingArguments(
            str(tmp_path), predict_with_generate=True, generation_max_length=4, per_device_eval_batch_size=BATCH,
            report_to="none", use_cpu=True, disable_tqdm=True, linear_cross_entropy=asked,
        )  # fmt: skip
        torch.manual_seed(0)
        trainer = Seq2SeqTrainer(model, args, eval_dataset=data)
        trainer.compute_metrics = lambda found: {}
        trainer.evaluate()
        with Largest() as largest:
            trainer.evaluate()
        found[asked] = largest.rows
    assert found["auto"] <= CHUNK < BATCH * 12 <= found[False]
