from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from layton.optim import MatrixDecayAdamW, MuonAdamW, orthogonalise


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64, 128), nn.Linear(128, 2))


def gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("shape", [(2, 64, 96), (1, 96, 64), (3, 64, 64)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalise(matrices).float())
    assert (singular > 0.5).float().mean() > 0.95  # the smallest of a square matrix need more iterations
    assert singular.max() < 1.3
    # It turns nothing: the product with the input is symmetric positive, up to the rounding of bfloat16.
    inner = (orthogonalise(matrices).float() @ matrices.mT).diagonal(dim1=-2, dim2=-1)
    assert (inner > 0).all()


def test_rest_equals_adamw() -> None:
    ours, theirs = network(), network()
    small = [p for p in theirs.parameters() if p.ndim > 1 and min(p.flatten(1).shape) < 64]
    flat = [p for p in theirs.parameters() if p.ndim < 2]
    assert len(small) == 2  # the first convolution and the last matrix
    adamw = torch.optim.AdamW(
        [{"params": small, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}], lr=2e-4, betas=(0.9, 0.95)
    )
    muon = MuonAdamW(ours.parameters(), lr=1e-3, adamw_scale=0.2, weight_decay=0.1)
    for seed in range(4):
        gradients(ours, seed)
        gradients(theirs, seed)
        muon.step()
        adamw.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        if mine.ndim < 2 or min(mine.flatten(1).shape) < 64:
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
        else:
            assert not torch.equal(mine, other)


def test_matrices_equal_torchs_muon() -> None:
    torch.manual_seed(0)
    ours = nn.Linear(96, 64, bias=False)
    theirs = copy.deepcopy(ours)
    mine = MuonAdamW(ours.parameters(), lr=1e-2, weight_decay=0.1)
    other = torch.optim.Muon(theirs.parameters(), lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    before = ours.weight.clone()
    for seed in range(3):
        gradients(ours, seed)
        gradients(theirs, seed)
        mine.step()
        other.step()
    moved = (theirs.weight - before).norm()
    assert (ours.weight - theirs.weight).norm() < 0.03 * moved  # both round to bfloat16, in different orders


def test_resumes_exactly() -> None:
    straight, stopped = network(), network()
    first, second = MuonAdamW(straight.parameters()), MuonAdamW(stopped.parameters())
    for seed in range(4):
        gradients(straight, seed)
        first.step()
    for seed in range(2):
        gradients(stopped, seed)
        second.step()
    resumed = MuonAdamW(stopped.parameters())
    resumed.load_state_dict(copy.deepcopy(second.state_dict()))
    for seed in range(2, 4):
        gradients(stopped, seed)
        resumed.step()
    for one, other in zip(straight.parameters(), stopped.parameters(), strict=True):
        assert torch.equal(one, other)


def test_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="-1"):
        MuonAdamW(network().parameters(), lr=-1)


def test_decay_spares_norms_and_biases() -> None:
    layer = nn.Linear(3, 2)
    optimizer = MatrixDecayAdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(layer.weight, before[0] * (1 - 0.1 * 0.5)) and torch.equal(layer.bias, before[1])
