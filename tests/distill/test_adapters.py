"""Several adapters on one copy of the weights: each view sees its own, and only the student learns."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.testing import assert_close

from distill.adapters import (
    ATTENTION_LORA_TARGETS,
    AdapterView,
    LoraSettings,
    active_adapters,
    adapter_names,
    adapter_parameters,
    adapter_state_dict,
    add_lora,
    load_adapter_state_dict,
    networks_for,
    update_target,
    using_adapters,
)
from distill.condition import Condition
from distill.denoiser import Denoiser
from distill.models import UNetDenoiser
from distill.schedules import VPSchedule

T = torch.tensor([900, 13])
EXACT = {"rtol": 0.0, "atol": 0.0}


def make_denoiser() -> UNetDenoiser:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return UNetDenoiser(unet, VPSchedule())


class Linear(Denoiser):
    """The smallest denoiser that is no diffusers network."""

    def __init__(self):
        super().__init__(VPSchedule(), "eps")
        self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x_t, t, condition):
        return self.other(self.layer(x_t))


def shake(network: nn.Module, name: str, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(network, name):
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(2)
    draw = [torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (3, 8))]
    return draw[0], T, Condition(embeds=draw[1])


def test_settings_round_trip_and_refuse_nonsense():
    settings = LoraSettings(rank=3, alpha=2.0, targets=("a", "b"))
    assert LoraSettings.from_json(settings.to_json()) == settings
    with pytest.raises(ValueError, match="rank"):
        LoraSettings(rank=0)


def test_new_adapter_changes_nothing_and_freezes_the_rest(inputs):
    denoiser = make_denoiser()
    expected = denoiser(*inputs)
    unmatched = add_lora(denoiser, LoraSettings(rank=2, targets=("to_q", "nowhere")), "a")
    assert unmatched == ("nowhere",)
    assert_close(denoiser(*inputs), expected, **EXACT)
    trained = {name for name, p in denoiser.named_parameters() if p.requires_grad}
    assert trained and all("to_q.lora_" in name for name in trained)
    assert denoiser.unet.peft_config["a"].r == 2 and denoiser.unet.active_adapters() == ["a"]  # diffusers knows it


def test_no_matching_target_and_taken_names_are_errors():
    denoiser = make_denoiser()
    with pytest.raises(ValueError, match=r"nowhere.*else"):
        add_lora(denoiser, LoraSettings(targets=("nowhere", "else")))
    add_lora(denoiser, LoraSettings(rank=1, targets=("to_q",)))
    with pytest.raises(ValueError, match="already"):
        add_lora(denoiser, LoraSettings(rank=1, targets=("to_k",)))
    with pytest.raises(ValueError, match="'other'"):
        AdapterView(denoiser, ["other"])


def test_each_view_sees_its_own_adapters_whatever_is_on(inputs):
    denoiser = make_denoiser()
    plain = denoiser(*inputs)
    for seed, (name, targets) in enumerate({"a": ATTENTION_LORA_TARGETS, "b": ("conv1", "to_q")}.items()):
        add_lora(denoiser, LoraSettings(rank=2, targets=targets), name, active=name == "a")
        shake(denoiser, name, seed)
    bare, a, b, both = (AdapterView(denoiser, names) for names in ([], ["a"], ["b"], ["a", "b"]))
    alone = {}
    for name, targets in {"a": ATTENTION_LORA_TARGETS, "b": ("conv1", "to_q")}.items():
        other = make_denoiser()
        add_lora(other, LoraSettings(rank=2, targets=targets), name)
        load_adapter_state_dict(other, adapter_state_dict(denoiser, name), name)
        alone[name] = other(*inputs)
    assert_close(bare(*inputs), plain, **EXACT)
    assert_close(a(*inputs), alone["a"])
    assert_close(b(*inputs), alone["b"])
    assert_close(denoiser(*inputs), alone["a"])  # the resting state is as before
    with using_adapters(denoiser, "b"):
        assert_close(denoiser(*inputs), alone["b"])
        assert_close(a(*inputs), alone["a"])
        assert active_adapters(denoiser) == ("b",)
    assert active_adapters(denoiser) == ("a",)
    assert (both(*inputs) - a(*inputs)).abs().max() > 1e-3


def test_switch_is_put_back_after_an_error(inputs):
    denoiser = make_denoiser()
    add_lora(denoiser, LoraSettings(rank=1, targets=("to_q",)), "a")
    with pytest.raises(ValueError, match="embeds"):
        AdapterView(denoiser)(inputs[0], inputs[1], Condition())
    assert active_adapters(denoiser) == ("a",)


def test_adapters_of_another_user_stay_trainable_or_not():
    denoiser = make_denoiser()
    add_lora(denoiser, LoraSettings(rank=1, targets=("to_q",)), "a")
    add_lora(denoiser, LoraSettings(rank=1, targets=("to_q", "to_k")), "b", trainable=False, active=False)
    assert all(p.requires_grad for p in adapter_parameters(denoiser, "a"))
    assert not any(p.requires_grad for p in adapter_parameters(denoiser, "b"))
    assert active_adapters(denoiser) == ("a",)


def test_networks_are_one_copy_and_only_the_student_learns(inputs):
    denoiser = make_denoiser()
    expected, count = denoiser(*inputs), sum(1 for _ in denoiser.parameters())
    networks = networks_for(denoiser, LoraSettings(rank=2), target_decay=0.5)
    assert adapter_names(denoiser) == ("student", "target")
    task = nn.ModuleList([networks.student, networks.teacher, networks.target])
    assert not list(networks.teacher.parameters()) and not networks.target.state_dict()
    base = [name for name in task.state_dict() if "lora_" not in name]
    assert len(base) == len(set(base)) == count  # the shared weights once
    trained = [p for p in task.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in networks.student.parameters_of_view()}
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):
        networks.student(*inputs).square().mean().backward()
        networks.teacher(*inputs), networks.target(*inputs)
        assert all(p.grad is None for p in denoiser.parameters() if not p.requires_grad)
        optimizer.step()
    assert_close(networks.teacher(*inputs), expected, **EXACT)
    assert_close(networks.target(*inputs), expected, **EXACT)
    assert not torch.equal(networks.student(*inputs), expected)
    assert_close(denoiser(*inputs), networks.student(*inputs), **EXACT)  # at rest the student is on


@pytest.mark.parametrize("settings", [None, LoraSettings(rank=2)])
def test_target_is_the_average_of_the_student(settings, inputs):
    networks = networks_for(make_denoiser(), settings, target_decay=0.9)
    start = copy.deepcopy(networks)
    with torch.no_grad():
        for parameter in networks.student.parameters():
            if parameter.requires_grad:
                parameter += 0.01
    update_target(networks, 0.75)

    def weights(view):
        return list(view.parameters_of_view() if isinstance(view, AdapterView) else view.parameters())

    for before, after in zip(weights(start.target), weights(networks.target), strict=True):
        assert_close(after, before + 0.0025)
        assert not after.requires_grad
    update_target(networks, 0.0)
    assert_close(networks.target(*inputs), networks.student(*inputs))
    with pytest.raises(ValueError, match="decay"):
        update_target(networks, 1.5)


def test_without_averaging_the_target_is_the_student():
    for settings in (None, LoraSettings(rank=1)):
        networks = networks_for(make_denoiser(), settings)
        assert networks.target is networks.student
        update_target(networks, 0.5)


def test_adapters_that_were_on_stay_in_teacher_and_student(inputs):
    denoiser = make_denoiser()
    add_lora(denoiser, LoraSettings(rank=2, targets=("to_q",)), "style", trainable=True)
    shake(denoiser, "style")
    styled = denoiser(*inputs)
    networks = networks_for(denoiser, LoraSettings(rank=2), target_decay=0.5)
    for view in (networks.teacher, networks.student, networks.target):
        assert_close(view(*inputs), styled, **EXACT)
    assert not any(p.requires_grad for p in adapter_parameters(denoiser, "style"))


def test_gradient_checkpointing_repeats_each_forward_with_its_own_adapters(inputs):
    def gradients(checkpointing):
        denoiser = make_denoiser()
        for seed, name in enumerate(("a", "b")):
            add_lora(denoiser, LoraSettings(rank=2, targets=("to_q", "conv1")), name, active=False)
            shake(denoiser, name, seed)
        a, b = AdapterView(denoiser, ["a"]), AdapterView(denoiser, ["b"])
        if checkpointing:
            denoiser.unet.enable_gradient_checkpointing()
        denoiser.train()
        loss = b(a(*inputs), *inputs[1:]).square().mean()  # a discriminator's view upon a student's output
        AdapterView(denoiser)(*inputs)
        loss.backward()
        return [p.grad for name in ("a", "b") for p in adapter_parameters(denoiser, name)]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        assert expected.abs().max() > 0
        assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_a_look_without_gradients_under_autocast_leaves_the_student_trainable(inputs):
    networks = networks_for(make_denoiser(), LoraSettings(rank=2, targets=("to_q",)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            networks.student(*inputs)
        networks.student(*inputs).float().square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in networks.student.parameters_of_view())


def test_half_precision_networks_get_float32_adapters(inputs):
    denoiser = make_denoiser().to(torch.bfloat16)
    networks = networks_for(denoiser, LoraSettings(rank=2))
    assert all(p.dtype == torch.float32 for p in networks.student.parameters_of_view())
    assert torch.isfinite(networks.student(*inputs).float()).all()


def test_any_module_can_be_adapted():
    torch.manual_seed(0)
    denoiser = Linear()
    networks = networks_for(denoiser, LoraSettings(rank=1, targets=("layer",)), target_decay=0.5)
    shake(denoiser, "student")
    x_t = torch.randn(2, 4)
    assert not torch.equal(networks.student(x_t, T, Condition()), networks.teacher(x_t, T, Condition()))
    state = adapter_state_dict(denoiser, "student")
    assert set(state) == {"layer.lora_A.weight", "layer.lora_B.weight"}
    with pytest.raises(ValueError, match="do not fit"):
        load_adapter_state_dict(denoiser, {"layer.lora_A.weight": state["layer.lora_A.weight"]}, "target")


def test_views_notice_layers_that_are_adapted_later(inputs):
    denoiser = make_denoiser()
    plain = denoiser(*inputs)
    networks = networks_for(denoiser, LoraSettings(rank=1, targets=("to_q",)))
    networks.teacher(*inputs)
    add_lora(denoiser, LoraSettings(rank=1, targets=("conv1",)), "critic")
    shake(denoiser, "critic")
    assert_close(networks.teacher(*inputs), plain, **EXACT)
