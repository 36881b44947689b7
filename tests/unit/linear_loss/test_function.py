"""The cross-entropy of a linear head in chunks: the numbers of the logits, and what it does not compute."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from trainwright.linear_loss import function
from trainwright.linear_loss.function import Term, chunk_rows, cross_entropy_of, linear_cross_entropy

ROWS, WIDTH, CLASSES = 50, 8, 40


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 16 rows, so that there are several."""
    monkeypatch.setattr(function, "FEWEST_ROWS", 16)
    monkeypatch.setattr(function, "CHUNK_BYTES", 1)


def head(dtype=torch.float64, seed=0, requires_grad=True):
    generator = torch.Generator().manual_seed(seed)
    shapes = (ROWS, WIDTH), (CLASSES, WIDTH), (CLASSES,)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_(requires_grad) for shape in shapes]


def targets(ignored=3):
    """Targets of which each `ignored`th is left out."""
    chosen = torch.randint(0, CLASSES, (ROWS,), generator=torch.Generator().manual_seed(1))
    chosen[::ignored] = -100
    return chosen


def relative(ours, theirs):
    return max(((one - other).norm() / other.norm()).item() for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_loss_and_gradients_are_those_of_the_logits(has_bias, reduction, label_smoothing):
    hidden, weight, bias = head()
    inputs = (hidden, weight, bias)[: 3 if has_bias else 2]
    settings = {"reduction": reduction, "label_smoothing": label_smoothing}
    theirs = F.cross_entropy(F.linear(*inputs), targets(), **settings)
    ours = linear_cross_entropy(hidden, weight, targets(), bias if has_bias else None, **settings)
    assert torch.allclose(ours, theirs, rtol=1e-12)
    assert relative(torch.autograd.grad(3 * ours, inputs), torch.autograd.grad(3 * theirs, inputs)) < 1e-12


def test_in_bfloat16_the_gradients_are_as_close_to_the_exact_ones_as_those_of_logits():
    exact = head()
    half = [one.detach().bfloat16().requires_grad_() for one in exact]
    widened = [one.detach().double().requires_grad_() for one in half]
    expected = torch.autograd.grad(F.cross_entropy(F.linear(*widened), targets()), widened)
    ours = torch.autograd.grad(linear_cross_entropy(half[0], half[1], targets(), half[2]), half)
    theirs = torch.autograd.grad(F.cross_entropy(F.linear(*half).float(), targets()), half)
    assert {one.dtype for one in ours} == {torch.bfloat16}
    assert relative(ours, expected) <= 1.2 * relative(theirs, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_multiplies_in_its_dtype_and_gives_gradients_in_that_of_the_weights(dtype):
    inputs = head(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        ours = linear_cross_entropy(inputs[0], inputs[1], targets(), inputs[2])
        theirs = F.cross_entropy(F.linear(*inputs).float(), targets())
    assert ours.dtype == torch.float32 and torch.allclose(ours, theirs, rtol=1e-5)
    gradients = torch.autograd.grad(ours, inputs)
    assert {one.dtype for one in gradients} == {torch.float32}
    assert relative(gradients, torch.autograd.grad(theirs, inputs)) < 0.01


def test_gradients_in_float16_hold_what_a_loss_scale_saves():
    hidden, weight, bias = head(torch.float32)
    with torch.no_grad():
        bias += torch.where(torch.arange(CLASSES) == 0, 20.0, 0.0)  # of the others the probability is below 2**-24
    labels = torch.zeros(ROWS, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.float16):
        scaled = linear_cross_entropy(hidden, weight, labels, bias) * 2**16
    (gradient,) = torch.autograd.grad(scaled, weight)
    exact = [one.detach().double().requires_grad_() for one in (hidden, weight, bias)]
    (expected,) = torch.autograd.grad(F.cross_entropy(F.linear(*exact), labels) * 2**16, exact[1])
    assert ((gradient - expected).norm() / expected.norm()).item() < 0.02


def test_a_sum_of_two_products_is_one_head():
    hidden, weight, _ = head()
    narrow, wide = torch.randn(ROWS, 2, dtype=torch.float64), torch.randn(CLASSES, 2, dtype=torch.float64)
    inputs = [hidden, weight, narrow.requires_grad_(), wide.requires_grad_()]
    ours = cross_entropy_of([Term(hidden, weight), Term(narrow, wide)], targets())
    theirs = F.cross_entropy(hidden @ weight.T + narrow @ wide.T, targets())
    assert relative(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs)) < 1e-12


def test_a_soft_cap_is_part_of_the_loss_and_of_its_gradients():
    hidden, weight, bias = head()
    inputs = (hidden, weight, bias)

    def cap(logits):
        return 2 * torch.tanh(logits / 2)

    ours = cross_entropy_of([Term(hidden, weight)], targets(), bias, pointwise=(cap,))
    theirs = F.cross_entropy(cap(F.linear(*inputs)), targets())
    assert relative(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs)) < 1e-12


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that an operation made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else (result,):
            self.numel = max(self.numel, one.numel() if isinstance(one, torch.Tensor) else 0)
        return result


def test_no_tensor_is_larger_than_a_chunk_of_logits_or_the_weight():
    hidden, weight, bias = head()
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, targets(), bias).backward()
    chunk = chunk_rows(int((targets() != -100).sum()), CLASSES)
    assert largest.numel == max(chunk * CLASSES, weight.numel()) < ROWS * CLASSES


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_the_head_multiplies_for_labelled_rows_only():
    inputs = head()
    labelled = int((targets() != -100).sum())
    counted = flops(lambda: linear_cross_entropy(inputs[0], inputs[1], targets()).backward())
    assert counted == 3 * 2 * labelled * WIDTH * CLASSES  # forward, and two products backward


@pytest.mark.parametrize(("is_frozen", "products"), [((False, True), 2), ((True, False), 2), ((True, True), 1)])
def test_what_is_frozen_costs_no_product(is_frozen, products):
    hidden, weight, _ = head()
    hidden, weight = (one.detach().requires_grad_(not frozen) for one, frozen in zip((hidden, weight), is_frozen))
    labelled = int((targets() != -100).sum())
    counted = flops(lambda: linear_cross_entropy(hidden, weight, targets()))
    assert counted == products * 2 * labelled * WIDTH * CLASSES


def test_without_gradients_only_the_loss_is_computed():
    hidden, weight, _ = head()
    labelled = int((targets() != -100).sum())
    with torch.no_grad():
        counted = flops(lambda: linear_cross_entropy(hidden, weight, targets()))
    assert counted == 2 * labelled * WIDTH * CLASSES


def test_chunks_have_one_size_and_cover_all_rows(monkeypatch):
    assert chunk_rows(50, CLASSES) == 13  # 4 chunks of at most 16
    monkeypatch.setattr(function, "CHUNK_BYTES", 4 * CLASSES * 100)
    assert chunk_rows(50, CLASSES) == 50
    assert chunk_rows(0, CLASSES) == 1


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_without_a_labelled_row_the_loss_is_that_of_torch_and_its_gradients_are_zero(reduction):
    inputs = head()
    nothing = torch.full((ROWS,), -100)
    ours = linear_cross_entropy(inputs[0], inputs[1], nothing, inputs[2], reduction=reduction)
    theirs = F.cross_entropy(F.linear(*inputs), nothing, reduction=reduction)
    assert torch.equal(ours.isnan(), theirs.isnan()) and (ours.isnan() or ours == 0)
    gradients = torch.autograd.grad(ours, inputs)
    assert all(not one.nan_to_num().any() for one in gradients)


@pytest.fixture
def device(monkeypatch):
    """As on a device, where the host does not read what is computed."""
    monkeypatch.setattr(function, "is_on_host", lambda tensor: False)
    monkeypatch.setattr(function, "FEWEST_ROWS_ON_DEVICE", 16)


@pytest.mark.parametrize("most_labels", [33, 40, ROWS, None])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_bound_of_labels_changes_nothing_but_the_rows_that_are_computed(device, reduction, most_labels):
    hidden, weight, bias = head()
    labelled = int((targets() != -100).sum())
    assert labelled == 33
    inputs, settings = (hidden, weight, bias), {"reduction": reduction, "label_smoothing": 0.1}
    theirs = F.cross_entropy(F.linear(*inputs), targets(), **settings)
    ours = cross_entropy_of([Term(hidden, weight)], targets(), bias, most_labels=most_labels, **settings)
    assert torch.allclose(ours, theirs, rtol=1e-12)
    assert relative(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs)) < 1e-12
    counted = flops(lambda: cross_entropy_of([Term(hidden, weight)], targets(), most_labels=most_labels))
    assert counted == 3 * 2 * (most_labels or ROWS) * WIDTH * CLASSES


def test_more_labels_than_their_bound_are_never_left_out_silently(device):
    hidden, weight, _ = head()
    for reduction in ("mean", "sum"):
        assert cross_entropy_of([Term(hidden, weight)], targets(), reduction=reduction, most_labels=32).isnan()


def test_on_a_device_chunks_have_more_rows(monkeypatch):
    monkeypatch.setattr(function, "FEWEST_ROWS_ON_DEVICE", 25)
    assert chunk_rows(50, CLASSES, on_host=False) == 25


def test_a_second_backward_pass_is_an_error_with_a_remedy():
    hidden, weight, _ = head()
    loss = linear_cross_entropy(hidden, weight, targets())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"a second time.*linear_cross_entropy=False"):
        loss.backward()


def test_gradients_of_gradients_are_an_error_with_a_remedy():
    hidden, weight, _ = head()
    with pytest.raises(RuntimeError, match=r"create_graph=True.*linear_cross_entropy=False"):
        torch.autograd.grad(linear_cross_entropy(hidden, weight, targets()), hidden, create_graph=True)


def test_another_ignored_label_is_left_out():
    hidden, weight, _ = head()
    other = targets().where(targets() != -100, 7)
    theirs = F.cross_entropy(hidden @ weight.T, other, ignore_index=7)
    assert torch.allclose(linear_cross_entropy(hidden, weight, other, ignore_index=7), theirs)
