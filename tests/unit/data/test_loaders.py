"""DataLoaders with legal options only, their sizes, and what they answer as accelerate's loaders do."""

import warnings
from functools import partial
from itertools import chain

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from trainwright.data.distributed_samplers import IterableDatasetShard
from trainwright.data.loaders import build_dataloader, num_examples, num_tokens, set_epoch, with_answers
from trainwright.data.rebalance import BatchRebalanceSampler
from trainwright.data.samplers import SeededRandomSampler
from trainwright.data.workers import seed_worker


class Stream(IterableDataset):
    def __init__(self, num_samples=10):
        self.num_samples = num_samples

    def __iter__(self):
        return iter(range(self.num_samples))


class Noise(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.randint(2**31, (1,)).item()


def batches_of(loader):
    return [list(batch) for batch in loader]


def test_batches_keep_order_and_size_and_drop_the_last_if_asked():
    assert batches_of(build_dataloader(range(5), batch_size=2, collate_fn=list)) == [[0, 1], [2, 3], [4]]
    assert batches_of(build_dataloader(range(5), batch_size=2, collate_fn=list, drop_last=True)) == [[0, 1], [2, 3]]


def test_a_stream_ignores_sampler_and_drop_last():
    loader = build_dataloader(Stream(5), batch_size=2, collate_fn=list, sampler=None, drop_last=True)
    assert batches_of(loader) == [[0, 1], [2, 3], [4]]


def test_a_batch_sampler_decides_the_batches():
    sampler = BatchRebalanceSampler([5, 1, 1, 1], 4, 1, 2, shuffle=False)
    assert batches_of(build_dataloader(range(4), batch_size=99, collate_fn=list, sampler=sampler)) == [[0], [1, 2, 3]]


def test_pinning_memory_without_an_accelerator_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = build_dataloader(range(4), batch_size=2, collate_fn=list, pin_memory=True)
        assert len(batches_of(loader)) == 2
    assert loader.pin_memory == torch.accelerator.is_available()


@pytest.mark.parametrize(
    "option", [{"persistent_workers": True}, {"prefetch_factor": 2}, {"multiprocessing_context": "spawn"}], ids=str
)
def test_worker_options_without_workers_are_refused_by_name(option):
    with pytest.raises(ValueError, match=f"dataloader_{next(iter(option))}=.*dataloader_num_workers"):
        build_dataloader(range(4), batch_size=2, collate_fn=list, **option)


def test_a_random_sampler_without_a_generator_gets_an_order_that_can_be_had_again():
    build = partial(build_dataloader, range(20), batch_size=4, collate_fn=list, seed=3)
    loader = build(sampler=RandomSampler(range(20)))
    assert list(chain(*loader)) == list(SeededRandomSampler(20, seed=3))
    set_epoch(loader, 2)
    assert list(chain(*loader)) == list(SeededRandomSampler(20, seed=3, epoch=2))
    own = RandomSampler(range(20), generator=torch.Generator().manual_seed(1))
    for kept in (own, RandomSampler(range(20), num_samples=5), RandomSampler(range(20), replacement=True)):
        assert build(sampler=kept).sampler is kept


def test_the_epoch_reaches_samplers_inside_batch_samplers_and_data_sets():
    class Epochs(list):
        def set_epoch(self, epoch):
            self.epoch = epoch

    data = Epochs(range(4))
    loader = build_dataloader(data, batch_size=2, collate_fn=list, sampler=SeededRandomSampler(data, seed=0))
    set_epoch(loader, 5)
    assert (loader.sampler.epoch, data.epoch) == (5, 5)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_equal_seeds_give_equal_batches_with_and_without_workers(num_workers):
    def run():
        torch.manual_seed(0)
        init = partial(seed_worker, num_workers=num_workers, rank=1)
        loader = build_dataloader(
            Noise(),
            batch_size=2,
            collate_fn=list,
            num_workers=num_workers,
            worker_init_fn=init,
            sampler=SeededRandomSampler(8, seed=1),
        )
        return batches_of(loader)

    first = run()
    assert first == run()
    assert len({value for batch in first for value in batch}) == 8


def test_the_number_of_examples_is_that_of_the_data_or_the_best_guess():
    class Sized(Stream):
        def __len__(self):
            return 10

    class Loader:
        batch_size = 4

        def __len__(self):
            return 3

    assert num_examples(DataLoader(range(7), batch_size=4)) == 7
    shard = IterableDatasetShard(Sized(), batch_size=2, num_processes=2)
    assert num_examples(DataLoader(shard, batch_size=2)) == 10
    assert num_examples(Loader()) == 12
    assert num_examples(Loader(), batch_size=5) == 15
    with pytest.raises(TypeError):
        num_examples(DataLoader(Stream()))


def test_tokens_are_counted_or_estimated_from_the_first_batch(caplog):
    loader = [{"input_ids": torch.zeros(2, 3)}, {"input_ids": torch.zeros(1, 5)}]
    assert num_tokens(loader) == 2 * 3 + 1 * 5
    assert num_tokens(loader, max_steps=10) == 2 * 3 * 10
    assert num_tokens([{"pixel_values": torch.zeros(1)}]) == 0
    assert "input_ids" in caplog.text


ANSWERS = ("total_batch_size", "total_dataset_length")


def sizes(loader):
    return [len(batch["x"]) for batch in loader]


@pytest.mark.parametrize("which", ["train", "eval", "test"])
def test_it_answers_what_the_loader_answers_that_accelerate_prepares(make_trainer, line_data, which):
    pytest.importorskip("accelerate")
    trainer = make_trainer(per_device_eval_batch_size=3)
    arguments = [line_data(10)] if which == "test" else []
    loader = getattr(trainer, f"get_{which}_dataloader")(*arguments)
    prepared = trainer.accelerator.prepare_data_loader(loader)
    assert {name: getattr(loader, name) for name in ANSWERS} == {name: getattr(prepared, name) for name in ANSWERS}
    assert isinstance(loader, DataLoader) and sizes(loader) == sizes(loader.base_dataloader) == sizes(prepared)


def order_of(loader):
    return torch.cat([batch["x"] for batch in loader])


def test_set_epoch_chooses_the_order_of_an_epoch(make_trainer):
    loader, other = make_trainer().get_train_dataloader(), make_trainer().get_train_dataloader()
    first = order_of(loader)
    loader.set_epoch(3)
    other.set_epoch(3)
    third = order_of(loader)
    assert torch.equal(third, order_of(other)) and not torch.equal(third, first)
    loader.set_epoch(0)
    assert torch.equal(order_of(loader), first)


def test_a_stream_answers_its_batch_size_and_has_no_length():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(4))

    loader = with_answers(DataLoader(Stream(), batch_size=2))
    assert loader.total_batch_size == 2
    with pytest.raises(TypeError):
        _ = loader.total_dataset_length


def test_batches_of_unequal_size_answer_their_mean(make_trainer):
    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 24

        def __getitem__(self, index):
            return {"x": torch.ones(3), "labels": torch.ones(1), "input_ids": [0] * (1 + index % 5)}

    trainer = make_trainer(
        trainer={"train_dataset": Data()}, train_sampling_strategy="batch_rebalance", gradient_accumulation_steps=2
    )
    assert trainer.get_train_dataloader().total_batch_size == 4


def test_a_loader_of_the_user_stays_what_it_is():
    class Own(DataLoader):
        pass

    own = Own([1, 2])
    assert type(with_answers(own)) is Own and with_answers(3) == 3
