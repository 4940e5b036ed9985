from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import distill.merged as merged
from distill.adapters import LoraSettings, add_lora, using_adapters
from distill.merged import merging_pays, updated_weight

SETTINGS = LoraSettings(rank=6, alpha=3.0, targets=("0", "2"))


class Layers(nn.Sequential):
    """A linear layer, then a strided, padded convolution over what it gives."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 5), nn.Unflatten(1, (7, 7)), nn.Conv2d(7, 3, 3, stride=2, padding=1))


def adapted(*names: str) -> Layers:
    torch.manual_seed(0)
    network = Layers()
    for name in names:
        add_lora(network, SETTINGS, name)
    for parameter in network.parameters():
        parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return network


def run(network: Layers, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    x = x.clone().requires_grad_()
    y = network(x)
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return y.detach(), list(torch.autograd.grad(y.square().sum(), [x, *learning]))


@pytest.mark.parametrize("names", [("a",), ("a", "b")])
def test_both_forms_give_the_same_outputs_and_gradients(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    found = {}
    x = torch.randn(2, 49, 4, generator=torch.Generator().manual_seed(1))
    for form in (True, False):
        network = adapted(*names)
        monkeypatch.setattr(merged, "merging_pays", lambda form=form, **_: form)
        with using_adapters(network, *names):
            found[form] = run(network, x)
    assert_close(found[True], found[False], rtol=1e-4, atol=1e-3)


def test_a_layer_with_a_dropout_a_hook_or_half_precision_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise AssertionError("merged")

    monkeypatch.setattr(merged, "merging_pays", lambda **_: True)
    network = adapted("a")
    monkeypatch.setattr(merged, "updated_weight", refuse)
    x = torch.randn(2, 49, 4)
    with pytest.raises(AssertionError, match="merged"):
        network(x)
    hooked = copy.deepcopy(network)
    for layer in (hooked[0], hooked[2]):
        layer.base_layer.register_forward_hook(lambda *_: None)
    hooked(x)
    network.to(torch.bfloat16)(x.bfloat16())
    with using_adapters(network):
        network(x.bfloat16())


def test_the_cheaper_form_is_taken() -> None:
    narrow = {"positions": 4096, "columns": 96, "rows": 96, "rank": 64}
    wide = {"positions": 4096, "columns": 1280, "rows": 1280, "rank": 64}
    assert merging_pays(**narrow, learns=True) and merging_pays(**narrow, learns=False)
    assert not merging_pays(**wide, learns=True) and merging_pays(**wide, learns=False)
    assert not merging_pays(**narrow | {"positions": 16}, learns=False)  # the update alone costs more


def test_an_update_without_effect_changes_no_bit() -> None:
    weight, down = torch.randn(5, 4, 3, 3), torch.randn(2, 4, 3, 3)
    assert torch.equal(updated_weight(weight, down, torch.zeros(5, 2, 1, 1), 0.5), weight)
