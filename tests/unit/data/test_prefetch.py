"""Copies on a stream of their own: in which order they are begun, waited for and recorded."""

import contextlib

import pytest
import torch

from trainwright.data.prefetch import DevicePrefetcher


class Streams:
    """Stands for a side stream and the one that computes; notes what happens, in order."""

    def __init__(self):
        self.events, self.is_side = [], False

    @contextlib.contextmanager
    def use(self, stream):
        assert stream == "side"
        self.is_side = True
        yield
        self.is_side = False

    def wait_stream(self, stream):
        self.events.append(("wait for", stream))


class Copied(torch.Tensor):
    """A tensor that notes being copied and recorded."""

    @staticmethod
    def made(number, streams):
        tensor = torch.tensor([number]).as_subclass(Copied)
        tensor.number, tensor.streams = number, streams
        return tensor

    def to(self, device, non_blocking=False):
        assert non_blocking and device.type == "cpu" and self.streams.is_side
        self.streams.events.append(("copy", self.number))
        return self

    def record_stream(self, stream):
        assert stream is self.streams
        self.streams.events.append(("record", self.number))


def prefetcher(streams):
    return DevicePrefetcher(torch.device("cpu"), stream="side", current_stream=lambda: streams, use=streams.use)


def test_the_next_batch_is_on_its_way_when_one_is_given_and_is_not_waited_for():
    streams = Streams()
    for batch in prefetcher(streams)([{"x": Copied.made(number, streams)} for number in range(3)]):
        streams.events.append(("step", batch["x"].number))
    assert streams.events == [
        ("copy", 0),
        *[("wait for", "side"), ("record", 0), ("copy", 1), ("step", 0)],
        *[("wait for", "side"), ("record", 1), ("copy", 2), ("step", 1)],
        *[("wait for", "side"), ("record", 2), ("step", 2)],
    ]


def test_one_batch_and_none_are_given_as_they_are():
    streams = Streams()
    given = list(prefetcher(streams)([{"x": Copied.made(0, streams)}]))
    assert [batch["x"].number for batch in given] == [0]
    assert streams.events == [("copy", 0), ("wait for", "side"), ("record", 0)]
    assert list(prefetcher(streams)([])) == []


def test_tensors_inside_of_other_things_are_copied_and_the_rest_is_passed_on():
    streams = Streams()
    batch = {"pair": (Copied.made(1, streams), "text"), "deep": {"list": [Copied.made(2, streams)]}, "most": 7}
    (given,) = prefetcher(streams)([batch])
    assert given == batch and isinstance(given["pair"], tuple)
    assert [event for event in streams.events if event[0] != "wait for"] == [
        ("copy", 1),
        ("copy", 2),
        ("record", 1),
        ("record", 2),
    ]


@pytest.fixture
def made(monkeypatch):
    """The prefetchers that runs make."""
    made = []

    def make(device):
        made.append(DevicePrefetcher(device))
        return made[-1]

    monkeypatch.setattr("trainwright.data.prefetch.DevicePrefetcher", make)
    return made


def test_a_run_on_cpu_copies_nothing_ahead(make_trainer, made):
    make_trainer(max_steps=1).train()
    assert made == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_batches_arrive_whole_while_the_device_is_busy():
    device = torch.device("cuda")
    batches = [{"x": torch.full((1 << 20,), number).pin_memory()} for number in range(8)]
    busy = torch.ones(2048, 2048, device=device)
    sums = []
    for batch in DevicePrefetcher(device)(batches):
        assert batch["x"].device.type == "cuda"
        for _ in range(20):
            busy = (busy @ busy).clamp_(0, 1)
        sums.append(batch["x"].sum())  # not read yet: nothing waits for the device in this loop
        del batch
    assert torch.stack(sums).tolist() == [number << 20 for number in range(8)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_run_copies_ahead_and_learns_what_it_learns_without(make_trainer, made):
    losses = []
    for has_prefetch in (True, False):
        trainer = make_trainer(max_steps=6, gradient_accumulation_steps=2, use_cpu=False)
        if not has_prefetch:
            trainer._prepare_input = trainer._prepare_input  # an override of its own
        trainer.train()
        assert len(made) == 1  # by the first of the two runs
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[0] == losses[1]
