"""Small tensors in the messages of loader workers."""

import multiprocessing

import pytest
import torch
from torch.utils.data import DataLoader

from trainwright.data import by_value
from trainwright.data.loaders import build_dataloader


def sent(tensor):
    function, arguments = by_value._reduced(tensor)
    return function is by_value._made_again, function, arguments


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


@pytest.mark.parametrize("dtype", sorted(by_value.DTYPES, key=str), ids=str)
def test_every_dtype_arrives_bit_by_bit(dtype):
    tensor = torch.randn(7).mul(100).to(dtype)
    is_by_value, function, arguments = sent(tensor)
    received = function(*arguments)
    assert is_by_value and received.dtype == dtype
    assert torch.equal(received.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(by_value.MOST_BYTES // 4 + 1),
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
