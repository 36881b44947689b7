"""A loader of one process answers what accelerate's loaders answer."""

import pytest
import torch
from torch.utils.data import DataLoader

from trainwright.data.run_loader import with_answers

accelerate = pytest.importorskip("accelerate")
ANSWERS = ("total_batch_size", "total_dataset_length")


def sizes(loader):
    return [len(batch["x"]) for batch in loader]


@pytest.mark.parametrize("which", ["train", "eval", "test"])
def test_it_answers_what_the_loader_answers_that_accelerate_prepares(make_trainer, line_data, which):
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
