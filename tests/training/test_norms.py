"""Batch norms over several processes: here a group of one, which must be the plain norm; see also `test_processes`."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, distributed, nn

from beitzoo.training.norms import SharedBatchNorm, share_norms
from beitzoo.training.processes import Processes

CPU = torch.device("cpu")


@pytest.fixture
def _group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def moved(norm: nn.BatchNorm2d, batches: list[Tensor]) -> list[Tensor]:
    """Outputs, gradients of inputs, weight and bias, and running statistics."""
    results = []
    for batch in batches:
        x = batch.clone().requires_grad_()
        y = norm.train()(x)
        (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        results += [y, x.grad]
    assert norm.num_batches_tracked is not None
    return [*results, *(p.grad for p in norm.parameters()), *norm.buffers(), norm.eval()(batches[0])]


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_norm_is_the_plain_one(momentum: float | None) -> None:
    plain, other = (nn.BatchNorm2d(3, momentum=momentum, dtype=torch.float64) for _ in range(2))
    for norm in (plain, other):
        nn.init.uniform_(norm.weight, generator=torch.Generator().manual_seed(1))
    batches = [torch.randn(size, 3, 4, 5, dtype=torch.float64) * 3 + 100 for size in (2, 4)]
    torch.testing.assert_close(moved(SharedBatchNorm.of(other), batches), moved(plain, batches), rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("_group")
def test_half_precision_stays_and_is_summed_in_full() -> None:
    x = torch.randn(8, 2, 16, 16).bfloat16()
    plain, shared = nn.BatchNorm2d(2), SharedBatchNorm.of(nn.BatchNorm2d(2))
    y = shared(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, plain(x), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(shared.running_var, plain.running_var, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_group")
def test_batches_of_nothing_and_of_one_value() -> None:
    norm = SharedBatchNorm.of(nn.BatchNorm2d(2))
    norm(torch.empty(0, 2, 4, 4, requires_grad=True)).sum().backward()
    assert norm.weight.grad is not None
    assert norm.weight.grad.tolist() == [0, 0]
    nn.init.constant_(norm.bias, 0.5)
    x = torch.ones(1, 2, 1, 1, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert y.flatten().tolist() == [0.5, 0.5]
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [0, 0]
    assert [buffer.tolist() for buffer in norm.buffers()] == [[0, 0], [1, 1], 0]


def test_norms_are_replaced_in_place() -> None:
    """Parameters, buffers and names are those there were; one process needs nothing."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4)))
    state = model.state_dict(keep_vars=True)
    share_norms(model, Processes(0, 1, CPU))
    assert type(model[1][0]) is nn.BatchNorm2d
    share_norms(model, Processes(1, 2, CPU))
    assert type(model[1][0]) is SharedBatchNorm
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(after[name] is state[name] for name in state)
