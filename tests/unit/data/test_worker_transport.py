"""Batches of workers: received before the loop asks for them, small tensors sent by value, and the switch for both."""

import gc
import itertools
import multiprocessing
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from trainwright.data import worker_recovery, worker_transport
from trainwright.data.loaders import build_dataloader
from trainwright.data.worker_transport import ReceivedBatches, Receiver, iterate_ahead

NUM_BATCHES = 6


class Numbers(torch.utils.data.Dataset):
    """Sample `n` is a tensor of n's, large enough to come as a file descriptor; sample `bad` fails."""

    def __init__(self, bad=None):
        self.bad = bad

    def __len__(self):
        return 2 * NUM_BATCHES

    def __getitem__(self, index):
        if index == self.bad:
            raise KeyError(f"no sample {index}")
        return torch.full((2**15,), float(index))


class CannotBeRead:
    """Arrives as an error: what its message says to call fails in the process that receives it."""

    def __reduce__(self):
        return int, ("no number",)


def loader_of(dataset, **options):
    options = {"batch_size": 2, "num_workers": 2, **options}
    return DataLoader(dataset, **options)


def receivers():
    gc.collect()
    return [thread for thread in threading.enumerate() if isinstance(thread, Receiver)]


def eventually(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def firsts(batches):
    return [batch[:, 0].tolist() for batch in batches]


def test_the_batches_are_those_of_the_loader_in_its_order():
    assert firsts(iterate_ahead(loader_of(Numbers()))) == [[2.0 * n, 2.0 * n + 1] for n in range(NUM_BATCHES)]
    assert not receivers()


def test_batches_are_received_before_they_are_asked_for_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(worker_transport, "MOST_AHEAD", 3)
    iterator = iterate_ahead(loader_of(Numbers(), num_workers=1, prefetch_factor=NUM_BATCHES))  # all are made ahead
    (receiver,) = receivers()
    assert eventually(lambda: receiver._received.qsize() == 3)
    next(iterator)
    assert eventually(lambda: receiver._received.qsize() == 3)
    assert len(firsts(iterator)) == NUM_BATCHES - 1


def test_the_sampler_is_asked_by_the_loop_at_the_moments_it_would_be_without():
    threads = []

    class Noting(RandomSampler):
        def __iter__(self):
            for index in super().__iter__():
                threads.append(threading.current_thread())
                yield index if torch.rand(1) < 2 else None  # draws from the generator that the loop draws from too

    def numbers(iterate):
        torch.manual_seed(3)
        drawn = []
        for batch in iterate(loader_of(Numbers(), sampler=Noting(Numbers()))):
            drawn += [*batch[:, 0].tolist(), torch.rand(1).item()]
        return drawn

    assert numbers(iterate_ahead) == numbers(iter)
    assert set(threads) == {threading.main_thread()}


def test_an_error_of_the_data_set_comes_at_its_batch_and_shows_the_line_of_the_worker():
    iterator = iterate_ahead(loader_of(Numbers(bad=5)))
    assert firsts(itertools.islice(iterator, 2)) == [[0.0, 1.0], [2.0, 3.0]]
    with pytest.raises(KeyError, match=r"DataLoader worker process[\s\S]*__getitem__[\s\S]*no sample 5"):
        next(iterator)
    iterator._shutdown_workers()  # left to the garbage collector, torch waits ten seconds for workers it told nothing


def test_an_error_while_receiving_comes_at_its_batch():
    samples = [torch.zeros(1), torch.zeros(1), CannotBeRead()]
    iterator = iterate_ahead(DataLoader(samples, batch_size=None, num_workers=1))
    assert len(list(itertools.islice(iterator, 2))) == 2
    with pytest.raises(ValueError, match="no number"):
        next(iterator)
    iterator._shutdown_workers()
    assert not receivers()


@pytest.mark.parametrize("num_taken", [0, 1, NUM_BATCHES])
def test_no_thread_outlives_an_iterator_that_is_let_go_of(num_taken):
    iterator = iterate_ahead(loader_of(Numbers()))
    assert len(receivers()) == 1
    assert len(list(itertools.islice(iterator, num_taken))) == num_taken
    del iterator
    assert not receivers()


def test_a_thread_that_waits_for_room_ends_with_its_iterator(monkeypatch):
    monkeypatch.setattr(worker_transport, "MOST_AHEAD", 1)
    iterator = iterate_ahead(loader_of(Numbers()))
    assert eventually(lambda: receivers()[0]._received.qsize() == 1)
    del iterator
    assert not receivers()


def test_a_worker_killed_in_the_middle_of_a_message_does_not_stop_the_loop(monkeypatch):
    """The thread then reads for as long as anybody could write the rest, and is not waited for."""
    monkeypatch.setattr(worker_transport, "MOST_AHEAD", 1)
    monkeypatch.setattr(worker_transport, "MOST_WAIT_S", 0.1)
    samples = [b"x" * 2**20] * 4  # more than a pipe holds
    iterator = iterate_ahead(DataLoader(samples, batch_size=None, num_workers=1, prefetch_factor=4))
    worker_recovery._leave_losses_to_us()
    (receiver,), (worker,) = receivers(), iterator._workers
    assert eventually(lambda: receiver._received.qsize() == 1)
    assert eventually(lambda: not iterator._worker_result_queue.empty())
    worker.kill()
    worker.join()
    assert next(iterator) == samples[0]
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        next(iterator)
    iterator._shutdown_workers()
    iterator._worker_result_queue._writer.close()  # the last end at which it could be written
    assert eventually(lambda: not receivers())


def test_persistent_workers_keep_one_thread_over_epochs_also_after_one_that_was_left():
    loader = loader_of(Numbers(), persistent_workers=True)
    assert firsts(itertools.islice(iterate_ahead(loader), 1)) == [[0.0, 1.0]]
    before = receivers()
    for _ in range(2):
        assert firsts(iterate_ahead(loader)) == [[2.0 * n, 2.0 * n + 1] for n in range(NUM_BATCHES)]
    assert len(before) == 1 and receivers() == before
    del loader, before
    assert not receivers()


def test_a_loader_without_workers_and_other_iterables_are_left_as_they_are():
    loader = loader_of(Numbers(), num_workers=0)
    assert type(iterate_ahead(loader)) is type(iter(loader))
    assert type(iterate_ahead([1, 2])) is type(iter([]))


def test_an_iterator_of_a_torch_that_names_its_parts_otherwise_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(worker_transport, "USED", (*worker_transport.USED, "a_part_of_another_name"))
    iterator = iterate_ahead(loader_of(Numbers()))
    assert type(iterator).__module__ == DataLoader.__module__ and not receivers()
    assert len(list(iterator)) == len(loader_of(Numbers()))


def test_a_loader_of_accelerate_receives_ahead():
    accelerate = pytest.importorskip("accelerate")
    loader = accelerate.Accelerator(cpu=True).prepare_data_loader(loader_of(Numbers()))
    iterator = iterate_ahead(loader)
    assert firsts(itertools.islice(iterator, 1)) == [[0.0, 1.0]]
    assert len(receivers()) == 1
    assert len(firsts(iterator)) == NUM_BATCHES - 1
    assert not receivers()


class Longer(IterableDataset):
    """A stream that says it is shorter than it is."""

    def __len__(self):
        return 2

    def __iter__(self):
        return iter(range(3))


def test_torch_still_warns_of_a_stream_that_is_longer_than_it_says():
    loader = DataLoader(Longer(), batch_size=1, num_workers=1)
    assert len(loader) == 2
    with pytest.warns(UserWarning, match="3 samples have been fetched"):
        assert len(list(iterate_ahead(loader))) == 3


def test_a_profiler_sees_the_wait_for_each_batch():
    iterator = iterate_ahead(loader_of(Numbers()))
    assert isinstance(iterator, ReceivedBatches)
    next(iterator)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        next(iterator)
        next(iterator)
    waits = [event for event in profiler.key_averages() if event.key.startswith("enumerate(DataLoader)")]
    assert [event.count for event in waits] == [2]


@pytest.mark.parametrize("ending", ["", "raise SystemExit(0)", "import os; iterator.kept = iterator"])
def test_a_program_ends_though_batches_were_not_taken(ending):
    program = f"""
        import torch
        from torch.utils.data import DataLoader
        from trainwright.data.worker_transport import iterate_ahead

        loader = DataLoader(torch.zeros(64, 2**15), batch_size=2, num_workers=2, persistent_workers=True)
        iterator = iterate_ahead(loader)
        next(iterator)
        {ending}
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")


# ------------------------------------------------------------------------------------------------ sending by value ----


def sent(tensor):
    function, arguments = worker_transport._reduced(tensor)
    return function is worker_transport._made_again, function, arguments


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 1, 3, 1)])
def test_a_small_tensor_arrives_bit_by_bit(shape):
    tensor = torch.randn(shape)
    is_by_value, function, arguments = sent(tensor)
    received = function(*arguments)
    assert is_by_value and torch.equal(received, tensor)
    assert (received.dtype, received.shape, received.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
    received += 1  # its memory is its own


def test_strides_that_say_how_places_of_one_element_lie_are_kept():
    tensor = torch.randn(6).as_strided((2, 1, 3, 1), (3, 1, 1, 1))
    assert tensor.is_contiguous() and tensor.stride() != torch.empty(tensor.shape).stride()
    is_by_value, function, arguments = sent(tensor)
    assert is_by_value and function(*arguments).stride() == tensor.stride()


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_one_element_out_of_a_row_arrives_though_its_stride_is_that_of_the_row(shape):
    """As the first tokens of a batch of one sample: its message must not be lost, for which the loop would wait."""
    tensor = torch.randn(1, 5).as_strided(shape, (5,) * len(shape), 2)
    assert tensor.is_contiguous()
    is_by_value, function, arguments = sent(tensor)
    received = function(*arguments)
    assert is_by_value and torch.equal(received, tensor) and received.stride() == tensor.stride()


@pytest.mark.parametrize("dtype", sorted(worker_transport.DTYPES, key=str), ids=str)
def test_every_dtype_arrives_bit_by_bit(dtype):
    tensor = torch.randn(7).mul(100).to(dtype)
    is_by_value, function, arguments = sent(tensor)
    received = function(*arguments)
    assert is_by_value and received.dtype == dtype
    assert torch.equal(received.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(worker_transport.MOST_BYTES // 4 + 1),
        lambda: torch.zeros(0, 3),
        lambda: torch.zeros(4, 4)[:, ::2],
        lambda: torch.zeros(3, requires_grad=True),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
        lambda: torch.zeros(3, device="meta"),
    ],
    ids=["large", "empty", "with gaps", "gradient", "sparse", "nested", "negated", "meta"],
)
def test_any_other_tensor_goes_the_way_of_torch(make):
    assert not sent(make())[0]


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"small": torch.full((3,), index), "large": torch.full((2**15,), float(index))}


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_send_small_tensors_by_value_and_large_ones_in_shared_memory(context):
    if context not in multiprocessing.get_all_start_methods():
        pytest.skip("not on this system")
    loader = build_dataloader(Samples(), batch_size=2, collate_fn=None, num_workers=1, multiprocessing_context=context)
    batches = list(loader)
    assert [batch["small"][:, 0].tolist() for batch in batches] == [[0, 1], [2, 3]]
    assert [batch["large"][:, 0].tolist() for batch in batches] == [[0, 1], [2, 3]]
    assert [(batch["small"].is_shared(), batch["large"].is_shared()) for batch in batches] == [(False, True)] * 2


def test_the_training_process_goes_on_sending_as_torch_does():
    list(build_dataloader(Samples(), batch_size=2, collate_fn=None, num_workers=1))
    assert next(iter(DataLoader(Samples(), batch_size=2, num_workers=1)))["small"].is_shared()


def test_a_function_that_starts_a_worker_is_called_as_before(tmp_path):
    def start(worker_id):
        (tmp_path / str(worker_id)).touch()

    list(build_dataloader(Samples(), batch_size=2, collate_fn=None, num_workers=2, worker_init_fn=start))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


# ----------------------------------------------------------------------------------------------------- the switch ----


def transported(loader):
    iterator = iterate_ahead(loader)
    num_receivers = len(receivers())
    batches = list(iterator)
    return batches, num_receivers, torch.rand(2).tolist()


@pytest.mark.parametrize("persistent_workers", [False, True])
def test_switched_off_the_same_batches_come_as_torch_passes_them_on(monkeypatch, persistent_workers):
    found = []
    for value in ("", "torch"):
        monkeypatch.setenv("TRAINWRIGHT_WORKER_TRANSPORT", value)
        torch.manual_seed(4)
        options = {"num_workers": 2, "persistent_workers": persistent_workers, "seed": 1}
        loader = build_dataloader(Samples(), batch_size=2, collate_fn=None, sampler=RandomSampler(Samples()), **options)
        found.append(transported(loader))
    (ours, num_receivers, drawn), (torchs, num_without, drawn_without) = found
    assert (num_receivers, num_without) == (1, 0) and drawn == drawn_without
    assert len(ours) == len(torchs) == 2
    for one, other in zip(ours, torchs):
        assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)
        assert not one["small"].is_shared() and other["small"].is_shared()


def test_any_other_value_of_the_switch_is_refused(monkeypatch):
    monkeypatch.setenv("TRAINWRIGHT_WORKER_TRANSPORT", "off")
    with pytest.raises(ValueError, match=r"TRAINWRIGHT_WORKER_TRANSPORT='off'.*'torch'"):
        iterate_ahead([1])
