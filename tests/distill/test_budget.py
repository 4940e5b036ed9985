"""Forward-equivalents of training steps whose cost is known."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F

from distill.adapters import LoraSettings, networks_for
from distill.budget import Budget, count_flops, flop_counter
from distill.condition import Condition
from distill.denoiser import Denoiser, GuidedDenoiser
from distill.schedules import VPSchedule

B = 4
X = torch.randn(B, 8, generator=torch.Generator().manual_seed(0))
T = torch.full((B,), 500)
CONDITION, NULL = Condition(embeds=torch.zeros(B, 1, 2)), Condition(embeds=torch.ones(1, 1, 2))


class Linear(Denoiser):
    def __init__(self):
        super().__init__(VPSchedule(), "eps")
        self.layer = nn.Linear(8, 8)

    def forward(self, x_t, t, condition):
        return self.layer(x_t)


def test_plain_denoising_costs_three():
    budget, denoiser = Budget(), Linear()
    budget.watch(denoiser)
    loss = denoiser(X, T, CONDITION).square().mean()
    assert budget.total == B  # the backward is counted when it happens
    loss.backward()
    assert budget.total == 3 * B


def test_latent_consistency_distillation_costs_six_through_views():
    denoiser = Linear()
    networks = networks_for(denoiser, LoraSettings(rank=1, targets=("layer",)), target_decay=0.9)
    budget = Budget()
    with budget.watching({"denoiser": (denoiser, 1.0)}):
        student = networks.student(X, T, CONDITION)
        with torch.no_grad():
            guided = GuidedDenoiser(networks.teacher, 7.5, NULL)(X, T, CONDITION)
            target = networks.target(X + guided, T, CONDITION)
        (student - target).square().mean().backward()
    assert budget.total == 6 * B
    denoiser(X, T, CONDITION)
    assert budget.total == 6 * B  # no longer watched


def test_accounts_with_relative_costs_add_up_and_survive():
    budget, critic = Budget(), nn.Linear(8, 2)
    budget.watch(critic, "discriminator", cost=0.5)
    critic(X).sum().backward()
    budget.add(25.0, "data")
    assert budget.accounts == {"discriminator": 0.5 * 3 * B, "data": 25.0}
    later = Budget()
    later.load_state_dict(budget.state_dict())
    later.add(1.0, "data")
    assert later.total == budget.total + 1.0 and budget.accounts["data"] == 25.0


def test_several_outputs_are_one_backward():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 1), nn.Linear(8, 1)

        def forward(self, *, x):
            return [self.a(x), self.b(x)]

    budget, heads = Budget(), Heads()
    budget.watch(heads)
    sum(output.sum() for output in heads(x=X)).backward()
    assert budget.total == 3 * B


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="cost"):
        Budget().watch(nn.Linear(1, 1), cost=0.0)
    with pytest.raises(ValueError, match="-1"):
        Budget().add(-1.0)


class Deep(Denoiser):
    """Two blocks; the features after the first are what a discriminator would read."""

    def __init__(self):
        super().__init__(VPSchedule(), "eps")
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.features = None

    def forward(self, x_t, t, condition):
        self.features = self.blocks[0](x_t)
        return self.blocks[1](self.features)


@pytest.mark.parametrize("entry", ["output", "features", "both", "none"])
def test_a_backward_pass_counts_once_wherever_it_enters(entry):
    network, budget = Deep().requires_grad_(False), Budget()
    x = X.clone().requires_grad_()  # frozen weights, as a discriminator's backbone has: the gradient passes through
    handle = budget.watch(network)
    output = network(x, T, CONDITION)
    loss = {"output": output, "features": network.features, "both": output + network.features, "none": x}[entry]
    loss.sum().backward()
    assert budget.total == (B if entry == "none" else 3 * B)
    handle.remove()
    network(x, T, CONDITION).sum().backward()
    assert budget.total == (B if entry == "none" else 3 * B)


def test_attention_on_a_cpu_counts() -> None:
    query = torch.randn(2, 3, 50, 64, requires_grad=True)
    product = 2 * 2 * 3 * 50 * 50 * 64
    assert count_flops(lambda: F.scaled_dot_product_attention(query, query, query)) == 2 * product
    with flop_counter() as counter:
        F.scaled_dot_product_attention(query, query, query).sum().backward()
    assert counter.get_total_flops() == (2 + 5) * product  # the scores are made again


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="needs oneDNN")
def test_products_with_packed_weights_count() -> None:
    weight = torch.ops.mkldnn._reorder_linear_weight(torch.randn(64, 32), 2)
    rows = torch.randn(4, 2, 32)
    counted = count_flops(lambda: torch.ops.mkldnn._linear_pointwise.default(rows, weight, None, "none", [], ""))
    assert counted == 2 * 4 * 2 * 32 * 64


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs MKL")
def test_products_with_weights_in_mkls_order_count() -> None:
    plain, rows = torch.randn(64, 32), torch.randn(4, 2, 32)
    weight = torch.ops.mkl._mkl_reorder_linear_weight(plain, 2)
    counted = count_flops(lambda: torch.ops.mkl._mkl_linear.default(rows, weight, plain, None, 8))
    assert counted == 2 * 4 * 2 * 32 * 64


def test_a_watched_network_keeps_nothing_alive_that_it_would_have_freed():
    """Else gradient checkpointing would have nothing to free."""

    class Blocks(Denoiser):
        def __init__(self):
            super().__init__(VPSchedule(), "eps")
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
            self.seen = []

        def forward(self, x_t, t, condition):
            for block in self.blocks:
                x_t = torch.utils.checkpoint.checkpoint(self.run, block, x_t, use_reentrant=False)
                alive = [ref() is not None for ref in self.seen]
                assert not any(alive)
            return x_t

        def run(self, block, x):
            y = block(x)
            self.seen.append(weakref.ref(y))
            return y * 1.0

    budget, denoiser = Budget(), Blocks()
    budget.watch(denoiser)
    denoiser(X, T, CONDITION).square().mean().backward()
    assert budget.total == 3 * B
