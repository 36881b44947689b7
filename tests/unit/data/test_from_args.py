"""Loaders, samplers and collators as a run's arguments ask for them."""

import types

import pytest
import torch
from torch.utils.data import IterableDataset, SequentialSampler

from trainwright import TrainingArguments
from trainwright.data import from_args
from trainwright.data.collate_base import default_data_collator
from trainwright.data.collate_padding import DataCollatorWithPadding
from trainwright.data.length_grouping import LengthGroupedSampler
from trainwright.data.rebalance import BatchRebalanceSampler
from trainwright.data.samplers import SeededRandomSampler


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(10))


class LongStream(Stream):
    def __len__(self):
        return 10


@pytest.fixture
def args_of(tmp_path):
    return lambda **options: TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **options)


SAMPLES = [{"input_ids": list(range(1 + i % 5))} for i in range(12)]


def test_streams_and_columns_are_recognised():
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"x": [1]})
    assert from_args.is_iterable(Stream()) and from_args.is_iterable(table.to_iterable_dataset())
    assert not from_args.is_iterable(table) and not from_args.is_iterable(SAMPLES)
    assert from_args.has_columns(table) and from_args.has_columns(table.to_iterable_dataset())
    assert not from_args.has_columns(SAMPLES) and not from_args.has_columns(Stream())


def test_data_that_can_be_trained_on_pass(args_of):
    from_args.check_train_dataset(SAMPLES, args_of())
    from_args.check_train_dataset(LongStream(), args_of())
    from_args.check_train_dataset(Stream(), args_of(max_steps=3))


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_a_stream_cannot_be_ordered_by_length(args_of, strategy):
    with pytest.raises(ValueError, match=rf"'{strategy}' needs the lengths.*Stream\) has no length"):
        from_args.check_train_dataset(Stream(), args_of(max_steps=3, train_sampling_strategy=strategy))


def test_what_pads_gets_a_collator_that_pads():
    tokenizer = types.SimpleNamespace(pad=lambda *a: 0, pad_token_id=0)
    extractor = types.SimpleNamespace(pad=lambda *a: 0, padding_value=0.0)
    for pads in (tokenizer, extractor):
        collator = from_args.default_collator_for(pads)
        assert isinstance(collator, DataCollatorWithPadding) and collator.tokenizer is pads
    for other in (None, types.SimpleNamespace(), types.SimpleNamespace(pad=lambda *a: 0)):
        assert from_args.default_collator_for(other) is default_data_collator


def test_the_order_has_a_seed_of_its_own_where_one_is_given(args_of):
    assert from_args.data_seed(args_of(seed=3)) == 3
    assert from_args.data_seed(args_of(seed=3, data_seed=0)) == 0


def sampler_of(args, dataset=SAMPLES, **options):
    return from_args.train_sampler_for(dataset, args, batch_size=2, model_input_name="input_ids", **options)


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        ("random", SeededRandomSampler),
        ("sequential", SequentialSampler),
        ("group_by_length", LengthGroupedSampler),
        ("batch_rebalance", BatchRebalanceSampler),
    ],
)
def test_the_strategy_decides_the_sampler(args_of, strategy, kind):
    assert isinstance(sampler_of(args_of(train_sampling_strategy=strategy)), kind)
    assert isinstance(sampler_of(args_of(), strategy=strategy), kind)  # the caller's own choice wins


def test_the_sampler_gets_the_seed_and_the_samples_of_an_update(args_of):
    args = args_of(data_seed=7, gradient_accumulation_steps=3)
    assert sampler_of(args).seed == 7
    assert sampler_of(args, strategy="group_by_length").batch_size == 2 * 3
    rebalance = sampler_of(args, strategy="batch_rebalance")
    assert (rebalance.effective_batch_size, rebalance.grad_accum, rebalance.dp_size) == (6, 3, 1)


def test_data_with_an_order_of_their_own_get_no_sampler(args_of):
    for dataset in (None, Stream(), LongStream()):
        assert sampler_of(args_of(), dataset) is None
        assert from_args.eval_sampler_for(dataset, args_of(), model_input_name="input_ids") is None


def test_evaluation_reads_in_order_unless_training_groups_by_length(args_of):
    for strategy in ("random", "sequential", "batch_rebalance"):
        sampler = from_args.eval_sampler_for(
            SAMPLES, args_of(train_sampling_strategy=strategy), model_input_name="input_ids"
        )
        assert list(sampler) == list(range(12))
    args = args_of(train_sampling_strategy="group_by_length", per_device_eval_batch_size=4)
    grouped = from_args.eval_sampler_for(SAMPLES, args, model_input_name="input_ids")
    assert isinstance(grouped, LengthGroupedSampler) and grouped.batch_size == 4
    assert sorted(grouped) == list(range(12))


def loader_of(args, is_training, dataset=range(10), sampler=None):
    return from_args.loader_for(
        dataset, args, batch_size=4, collate_fn=list, sampler=sampler, is_training=is_training, process_index=0
    )


def test_the_loader_has_the_options_of_the_arguments(args_of):
    args = args_of(
        dataloader_drop_last=True,
        dataloader_num_workers=2,
        dataloader_prefetch_factor=3,
        dataloader_persistent_workers=True,
    )
    loader = loader_of(args, True)
    assert (loader.num_workers, loader.prefetch_factor, loader.persistent_workers) == (2, 3, True)
    assert loader.drop_last and not loader.pin_memory and loader.worker_init_fn is not None


def test_evaluating_draws_nothing_from_the_global_generator(args_of):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert next(iter(loader_of(args_of(), False))) == [0, 1, 2, 3]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_samples_of_a_loader_are_known_or_nobody_knows(args_of):
    assert from_args.num_samples(loader_of(args_of(), False)) == 10
    assert from_args.num_samples(loader_of(args_of(), False, dataset=Stream())) is None
    assert from_args.num_samples(loader_of(args_of(dataloader_drop_last=True), False)) is None
    assert from_args.num_samples([1, 2]) is None


@pytest.mark.parametrize(
    ("accumulation", "workers", "expected"), [(1, 2, 2), (4, 2, 2), (8, 2, 4), (5, 2, 3), (8, 0, None)]
)
def test_workers_make_a_whole_update_ahead_because_the_loop_takes_one_at_once(
    make_trainer, accumulation, workers, expected
):
    settings = {"gradient_accumulation_steps": accumulation, "dataloader_num_workers": workers}
    loader = make_trainer(**settings).get_train_dataloader()
    assert loader.prefetch_factor == expected
    assert workers == 0 or workers * loader.prefetch_factor >= accumulation
    if workers:
        assert make_trainer(dataloader_prefetch_factor=1, **settings).get_train_dataloader().prefetch_factor == 1
        assert make_trainer(**settings).get_eval_dataloader().prefetch_factor == 2
