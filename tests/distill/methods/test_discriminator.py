from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.testing import assert_close

from distill.adapters import (
    AdapterView,
    LoraSettings,
    adapter_names,
    adapter_parameters,
    add_lora,
    networks_for,
)
from distill.condition import Condition
from distill.methods.discriminator import (
    ADAPTER,
    DiscriminatorHead,
    UNetFeatures,
    decoder_modules,
    draw_renoising,
    hinge_critic_loss,
    hinge_generator_loss,
    make_discriminator,
)
from distill.models import UNetDenoiser
from distill.schedules import FlowSchedule, VPSchedule
from distill.toy import GaussianMixtureDenoiser

# Several adapters on one network are what is meant here.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")

LORA = LoraSettings(rank=2, targets=("to_q", "to_v", "conv1", "ff.net.2"))
T = torch.tensor([700.0, 100.0])


def make_denoiser() -> UNetDenoiser:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return UNetDenoiser(unet.requires_grad_(False).eval(), VPSchedule())


def make_inputs() -> tuple[torch.Tensor, Condition, Condition]:
    generator = torch.Generator().manual_seed(0)
    x_t, embeds = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 3, 8, generator=generator)
    return x_t, Condition(embeds=embeds), Condition(embeds=torch.zeros(1, 3, 8))


def test_features_have_the_announced_widths_and_leave_no_hooks():
    denoiser = make_denoiser()
    x_t, condition, _ = make_inputs()
    features = UNetFeatures(denoiser)
    maps = features(x_t, T, condition)
    assert [one.shape[1] for one in maps] == list(features.widths) == [8, 16, 16, 16, 8]
    assert [one.shape[-1] for one in maps] == [4, 4, 4, 8, 8]
    assert not any(module._forward_hooks for module in denoiser.modules())
    assert UNetFeatures(denoiser, stages=("up",)).widths == (16, 8)


def test_the_adapter_sits_on_the_decoder_only_and_is_off_for_the_teacher():
    networks = networks_for(make_denoiser(), LORA)
    x_t, condition, _ = make_inputs()
    before = networks.teacher(x_t, T, condition)
    critic = make_discriminator(networks.teacher, "lora", lora=LORA)
    unet = networks.teacher.denoiser.unet
    own = {id(parameter) for parameter in adapter_parameters(unet, ADAPTER)}
    names = [name for name, parameter in unet.named_parameters() if id(parameter) in own]
    assert names and all(name.startswith("up_blocks.") for name in names)
    assert adapter_names(unet) == ("student", ADAPTER)
    with torch.no_grad():
        for parameter in critic.trainable_parameters():
            parameter.add_(0.3)
    assert torch.equal(networks.teacher(x_t, T, condition), before)
    assert torch.equal(networks.student(x_t, T, condition), before)  # an untrained student is the teacher
    plain = UNetFeatures(networks.teacher, unet=unet)(x_t, T, condition)
    adapted = critic.features(x_t, T, condition)
    assert torch.equal(plain[0], adapted[0]) and torch.equal(plain[2], adapted[2])  # encoder and middle
    assert not torch.allclose(plain[-1], adapted[-1])  # decoder
    registered = {id(parameter) for parameter in critic.parameters()}
    assert registered == {id(parameter) for parameter in critic.heads.parameters()}  # no second copy of the network


@pytest.mark.parametrize("kind", ["lora", "full", "heads"])
def test_only_its_own_parameters_learn(kind):
    networks = networks_for(make_denoiser(), LORA)
    x_t, condition, _ = make_inputs()
    critic = make_discriminator(networks.teacher, kind, lora=LORA)
    hinge_critic_loss(critic(x_t, T, condition), critic(-x_t, T, condition)).backward()
    learning = list(critic.trainable_parameters())
    assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in learning)
    own = {id(parameter) for parameter in learning}
    others = [p for p in networks.teacher.denoiser.parameters() if id(p) not in own]
    assert others and all(parameter.grad is None for parameter in others)
    heads = sum(parameter.numel() for parameter in critic.heads.parameters())
    total, unet = sum(p.numel() for p in learning), networks.teacher.denoiser.unet
    assert (total == heads) == (kind == "heads")
    if kind == "full":
        assert total - heads == make_denoiser().unet.num_parameters()
        shared = {id(parameter) for parameter in unet.parameters()}
        assert not shared & {id(parameter) for parameter in critic.parameters()}


def test_the_student_learns_through_it_and_it_does_not():
    critic = make_discriminator(make_denoiser(), lora=LORA)
    x_t, condition, _ = make_inputs()
    x_t.requires_grad_()
    with critic.frozen():
        scores = critic(x_t, T, condition)
    hinge_generator_loss(scores).backward()
    assert x_t.grad.abs().max() > 0
    learning = list(critic.trainable_parameters())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in learning)


def test_the_student_learns_through_it_under_gradient_checkpointing():
    denoiser = make_denoiser()
    critic = make_discriminator(denoiser, lora=LORA)
    x_t, condition, _ = make_inputs()
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            denoiser.unet.enable_gradient_checkpointing()
            denoiser.unet.train()
        x = x_t.clone().requires_grad_()
        with critic.frozen():
            scores = critic(x, T, condition)
        hinge_generator_loss(scores).backward()
        grads.append(x.grad)
    assert_close(grads[0], grads[1])


def test_condition_reaches_it_unless_unconditional():
    denoiser = make_denoiser()
    x_t, condition, null = make_inputs()
    other = Condition(embeds=condition.embeds + 1.0)

    def same(critic, first, second) -> bool:
        return all(torch.equal(a, b) for a, b in zip(critic(*first), critic(*second), strict=True))

    critic = make_discriminator(denoiser, "heads")
    assert not same(critic, (x_t, T, condition, null), (x_t, T, other, null))
    assert not same(critic, (x_t, T, condition, null), (x_t, T + 100.0, condition, null))
    blind = make_discriminator(denoiser, "heads", conditional=False)
    assert same(blind, (x_t, T, condition, null), (x_t, T + 100.0, other, null))
    assert not same(blind, (x_t, T, condition, null), (x_t + 1.0, T, condition, null))
    with pytest.raises(ValueError, match="null condition"):
        blind(x_t, T, condition)


def test_hinge_losses_have_their_known_values():
    real, fake = [torch.tensor([2.0, 0.0])], [torch.tensor([-3.0, 1.0])]
    assert hinge_critic_loss(real, fake).item() == 0.5 + 1.0  # relu(1 - D) of 0 and 1; relu(1 + D) of 0 and 2
    assert hinge_generator_loss(fake).item() == 1.0
    both = hinge_critic_loss([*real, torch.tensor([9.0])], [*fake, torch.tensor([-9.0])])
    assert both.item() == 0.75  # a second head without error halves it, whatever its size


@pytest.mark.parametrize("width", [8, 24, 64])
def test_heads_keep_the_map_and_take_any_width(width):
    assert DiscriminatorHead(width)(torch.zeros(2, width, 4, 6)).shape == (2, 1, 4, 6)


@pytest.mark.parametrize("schedule", [VPSchedule(), FlowSchedule()], ids=["vp", "flow"])
def test_renoising_fills_its_range(schedule):
    t, noise = draw_renoising(schedule, torch.zeros(500, 1), torch.Generator().manual_seed(0), (0.2, 0.4))
    assert 195 <= t.min() <= 215 and 385 <= t.max() <= 405
    assert noise.std().item() == pytest.approx(1.0, abs=0.1)


def test_refuses_networks_and_names_it_does_not_know():
    toy = GaussianMixtureDenoiser(torch.zeros(1, 2), 1.0, VPSchedule())
    with pytest.raises(ValueError, match="GaussianMixtureDenoiser has no UNet"):
        make_discriminator(toy)
    with pytest.raises(ValueError, match="middle"):
        UNetFeatures(make_denoiser(), stages=("middle",))
    with pytest.raises(ValueError, match="none"):
        make_discriminator(make_denoiser(), "none")
    with pytest.raises(ValueError, match="nothing_such"):
        decoder_modules(make_denoiser().unet, ("nothing_such",))


@pytest.mark.parametrize("kind", ["lora", "full", "heads"])
def test_it_begins_as_its_teacher_also_where_that_has_adaptors(kind):
    denoiser = make_denoiser()
    add_lora(denoiser.unet, LORA, "default")
    with torch.no_grad():
        for parameter in adapter_parameters(denoiser.unet, "default"):
            parameter.add_(0.3)
    x_t, condition, _ = make_inputs()
    wanted = UNetFeatures(denoiser)(x_t, T, condition)
    found = make_discriminator(denoiser, kind, lora=LORA).features(x_t, T, condition)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other)


def test_a_view_is_read_with_its_adapters():
    networks = networks_for(make_denoiser(), LORA)
    x_t, condition, _ = make_inputs()
    unet = networks.teacher.denoiser.unet
    with torch.no_grad():
        for parameter in adapter_parameters(unet, "student"):
            parameter.add_(0.3)
    bare = UNetFeatures(networks.teacher, unet=unet)(x_t, T, condition)
    with_student = UNetFeatures(AdapterView(networks.teacher.denoiser, ("student",)), unet=unet)(x_t, T, condition)
    assert not torch.allclose(bare[0], with_student[0])
