"""Gradients on several device meshes, on meshes of one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from trainwright.parallel import mesh


@pytest.fixture
def meshes(tmp_path):
    """Two meshes over the one process of a gloo group."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield [init_device_mesh("cpu", (1,), mesh_dim_names=(name,)) for name in ("first", "second")]
    dist.destroy_process_group()


def plain(*values):
    parameter = nn.Parameter(torch.zeros(len(values)))
    parameter.grad = torch.tensor(values)
    return parameter


def on(device_mesh, *values):
    parameter = nn.Parameter(distribute_tensor(torch.zeros(len(values)), device_mesh, [Replicate()]))
    parameter.grad = distribute_tensor(torch.tensor(values), device_mesh, [Replicate()])
    return parameter


def test_plain_gradients_lie_on_no_mesh():
    frozen = nn.Parameter(torch.zeros(1))
    assert not mesh.has_mixed_meshes([]) and not mesh.has_mixed_meshes([plain(1.0), frozen, plain(2.0)])


def test_gradients_on_a_mesh_and_on_none_or_on_two_are_mixed(meshes):
    first, second = meshes
    assert not mesh.has_mixed_meshes([on(first, 1.0), on(first, 2.0)])
    assert mesh.has_mixed_meshes([on(first, 1.0), plain(2.0)])
    assert mesh.has_mixed_meshes([on(first, 1.0), on(second, 2.0)])


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def test_the_norm_over_several_meshes_is_that_of_all_gradients_together(meshes):
    parameters = [plain(1.0, 2.0), on(meshes[0], 2.0), on(meshes[1], 4.0), nn.Parameter(torch.zeros(1))]
    norm = mesh.clip_mixed_meshes(parameters, max_norm=1.0)
    assert norm.item() == pytest.approx((1 + 4 + 4 + 16) ** 0.5)
    found = torch.cat([whole(p.grad) for p in parameters[:3]])
    torch.testing.assert_close(found, torch.tensor([1.0, 2.0, 2.0, 4.0]) / 5)


def test_small_gradients_are_not_scaled_up():
    parameters = [plain(0.3), plain(0.4)]
    assert mesh.clip_mixed_meshes(parameters, max_norm=1.0).item() == pytest.approx(0.5)
    assert [p.grad.item() for p in parameters] == pytest.approx([0.3, 0.4])


def test_what_a_single_process_broadcasts_stays(meshes):
    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    mesh.broadcast_replicated(model)
    assert torch.equal(model.weight, before)


def test_without_a_process_group_nothing_is_sent():
    mesh.broadcast_replicated(nn.Linear(2, 1))
    assert not dist.is_initialized()
