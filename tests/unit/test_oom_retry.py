"""Recognising an out-of-memory error, and halving after one."""

import gc
import weakref

import pytest
import torch

from trainwright.oom_retry import find_executable_batch_size, is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("x"),
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_errors_of_allocators_are_recognised(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory"), KeyError("x")])
def test_other_errors_are_not(error):
    assert not is_out_of_memory(error)


def fits(limit, tried):
    def train(batch_size, *args, **kwargs):
        tried.append(batch_size)
        if batch_size > limit:
            raise torch.OutOfMemoryError("too large")
        return batch_size, args, kwargs

    return train


def test_the_batch_size_is_halved_until_it_fits_and_further_arguments_are_passed_on():
    tried = []
    assert find_executable_batch_size(fits(5, tried), 48, True)(1, key=2) == (3, (1,), {"key": 2})
    assert tried == [48, 24, 12, 6, 3]


def test_it_may_be_a_decorator_and_begins_with_128():
    tried = []

    @find_executable_batch_size(auto_find_batch_size=True)
    def train(batch_size):
        return fits(40, tried)(batch_size)[0]

    assert train() == 32 and tried == [128, 64, 32]
    assert find_executable_batch_size(starting_batch_size=10, auto_find_batch_size=True)(fits(9, tried))()[0] == 5


def test_each_call_starts_from_the_top():
    tried = []
    train = find_executable_batch_size(fits(2, tried), 4, True)
    train(), train()
    assert tried == [4, 2, 4, 2]


def test_unless_it_is_switched_on_it_calls_once_whatever_place_the_batch_size_has():
    with pytest.raises(torch.OutOfMemoryError):
        find_executable_batch_size(fits(1, []), 4)()
    assert find_executable_batch_size(fits(9, []), 4, auto_find_batch_size=False)()[0] == 4
    assert find_executable_batch_size(lambda epochs, batch_size: (epochs, batch_size), 4)(7) == (7, 4)
    assert find_executable_batch_size(lambda size, epochs: (size, epochs), 4)(7) == (4, 7)


def test_one_sample_that_does_not_fit_says_so():
    tried = []
    with pytest.raises(RuntimeError, match="even with one sample"):
        find_executable_batch_size(fits(0, tried), 3, True)()
    assert tried == [3, 1]


def test_another_error_is_not_retried():
    with pytest.raises(KeyError):
        find_executable_batch_size(lambda batch_size: {}[batch_size], 4, True)()


def test_a_function_without_a_batch_size_is_an_error_that_names_it():
    def train():
        pass

    with pytest.raises(TypeError, match=r"train must take the batch size as its first argument"):
        find_executable_batch_size(train)


def test_what_the_failed_attempt_held_is_freed_before_the_next():
    class Block:
        pass

    held = []

    def train(batch_size):
        if held:
            assert held[-1]() is None
        block = Block()
        block.itself = block  # a cycle, as tensors in a traceback are part of
        held.append(weakref.ref(block))
        if batch_size > 1:
            raise MemoryError
        return batch_size

    gc.disable()
    try:
        assert find_executable_batch_size(train, 4, True)() == 1 and len(held) == 3
    finally:
        gc.enable()
