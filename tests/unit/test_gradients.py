"""Norms of gradients and clipping: the same bits as torch's own functions, whatever the gradients are."""

import math
from unittest import mock

import pytest
import torch
from torch import nn

from trainwright import gradients


def parameters_with(*given):
    """One parameter per gradient; None leaves a parameter without one."""
    parameters = []
    for gradient in given:
        parameter = nn.Parameter(torch.zeros(1 if gradient is None else gradient.shape))
        if gradient is not None:
            parameter.data = parameter.data.to(gradient.dtype)
        parameter.grad = gradient
        parameters.append(parameter)
    return parameters


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


GRADIENTS = {
    "one type": lambda: [random(7, 3), random(5, seed=1), random(1, 1, 2, seed=2)],
    "one": lambda: [random(3)],
    "some without": lambda: [None, random(4), None, random(2, seed=1)],
    "none": lambda: [None, None],
    "bf16": lambda: [random(9, dtype=torch.bfloat16), random(4, 4, dtype=torch.bfloat16, seed=1)],
    "two types": lambda: [random(9, dtype=torch.bfloat16), random(4), random(2, dtype=torch.bfloat16, seed=1)],
    "not contiguous": lambda: [random(4, 6).t(), random(8)[::2]],
    "not finite": lambda: [random(3), torch.tensor([1.0, math.inf])],
    "to be differentiated again": lambda: [random(3).requires_grad_(), random(3, seed=1)],
}


@pytest.mark.parametrize("max_norm", [0.1, 1000.0])
@pytest.mark.parametrize("make", GRADIENTS.values(), ids=GRADIENTS.keys())
def test_clipping_leaves_the_bits_that_torchs_own_leaves(make, max_norm):
    ours, plain = parameters_with(*make()), parameters_with(*make())
    norm, expected = gradients.clip_grad_norm(iter(ours), max_norm), nn.utils.clip_grad_norm_(plain, max_norm)
    assert torch.equal(norm, expected) and norm.dtype == expected.dtype and not norm.requires_grad
    for one, other in zip(ours, plain, strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad.nan_to_num(7.0), other.grad.nan_to_num(7.0))


@pytest.mark.parametrize("make", GRADIENTS.values(), ids=GRADIENTS.keys())
def test_the_norm_of_the_norms_is_the_norm_of_all(make):
    given = [gradient for gradient in make() if gradient is not None]
    norms = gradients.norms_of(given)
    assert torch.equal(torch.linalg.vector_norm(torch.stack(norms)), nn.utils.get_total_norm(given))
    finite = all(bool(gradient.isfinite().all()) for gradient in given)
    assert all(math.isfinite(norm) for norm in norms) == finite


@pytest.mark.parametrize("value", [3.0, math.inf, math.nan])
def test_a_sparse_gradient_counts_and_is_clipped_by_the_sums_of_its_rows(value):
    sparse = torch.sparse_coo_tensor([[1, 1, 4]], [[1.0, 0.0], [1.0, value], [2.0, 0.0]], (6, 2), check_invariants=True)
    ours, dense = parameters_with(random(3), sparse), parameters_with(random(3), sparse.to_dense())
    (measured,) = gradients.norms_of([parameter.grad for parameter in ours])
    norm, expected = gradients.clip_grad_norm(ours, 0.5), nn.utils.clip_grad_norm_(dense, 0.5)
    assert measured.item() == norm.item() == pytest.approx(expected.item()) or math.isnan(value)
    assert math.isfinite(norm) == math.isfinite(expected)
    if math.isfinite(value):
        torch.testing.assert_close(ours[1].grad.to_dense(), dense[1].grad)
        torch.testing.assert_close(ours[0].grad, dense[0].grad)


def test_only_gradients_of_one_kind_are_not_left_to_torch():
    with mock.patch.object(nn.utils, "get_total_norm", side_effect=AssertionError):
        gradients.clip_grad_norm(parameters_with(random(3), random(2)), 1.0)
    for other in (random(2, dtype=torch.bfloat16), random(2).requires_grad_(), random(2).to_sparse()):
        torchs = torch.tensor(7.0)
        with mock.patch.object(nn.utils, "get_total_norm", return_value=torchs):
            assert gradients.clip_grad_norm(parameters_with(random(3), other), 1.0) is torchs


@pytest.mark.parametrize("make", GRADIENTS.values(), ids=GRADIENTS.keys())
def test_one_operation_finds_what_is_not_finite_and_changes_no_bit(make):
    given = [gradient for gradient in make() if gradient is not None]
    before = [gradient.detach().clone() for gradient in given]
    flag = torch.zeros(1)
    looked = gradients.found_nonfinite(given, flag, torch.ones(()))
    assert looked == ({(one.dtype, one.requires_grad) for one in given} == {(torch.float32, False)})
    assert bool(flag) == (looked and not all(bool(one.isfinite().all()) for one in given))
    assert all(torch.equal(one, other) for one, other in zip(given, before, strict=True))


def test_a_gradient_that_may_not_be_written_to_is_not_looked_at():
    given = [random(3), torch.ones(1).expand(4)]
    assert not gradients.found_nonfinite(given, torch.zeros(1), torch.ones(()))
    assert all(math.isfinite(norm) for norm in gradients.norms_of(given))
