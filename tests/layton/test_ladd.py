"""The latent diffusion decoder: neutral at the start, frozen where it must be, the same after a trip to disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from distill.adapters import adapter_parameters, add_lora
from distill.denoiser import Condition
from layton.control import CodeEmbedding, LoraSettings, base_state_dict, encode_null_caption, null_caption, resize_codes
from layton.decoders.difference import Adaptation, Difference, adapt
from layton.decoders.rebase import rebase_all, rebase_decoder
from layton.distillation.distilled import save_lora
from layton.folder import WEIGHTS_NAME, save_config, save_tensors
from layton.ladd import LADD

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SIZES = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32}


def make_unet(*, sdxl: bool = False) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
        **(SIZES if sdxl else {}),
    )


def make_ladd(*, sdxl: bool = False, **settings) -> LADD:
    unet = make_unet(sdxl=sdxl)
    return LADD(unet, code_dim=4, scheduler_config=SCHEDULER, embedding_channels=(8,), **settings)


def shake(model: LADD) -> None:
    """Move every trainable weight, as training would, so that zero convolutions hide nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(2)
    x_t = torch.randn(2, 4, 8, 8, generator=generator)
    return x_t, torch.tensor([500, 20]), Condition(spatial=torch.randn(2, 4, 4, 4, generator=generator))


@pytest.mark.parametrize("sdxl", [False, True])
def test_untrained_decoder_is_the_frozen_unet(sdxl, inputs):
    x_t, t, condition = inputs
    model = make_ladd(sdxl=sdxl, lora=LoraSettings(rank=2))
    embeds = torch.zeros(2, 5, 12)
    added = {"text_embeds": torch.zeros(2, 8), "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]] * 2)} if sdxl else None
    with torch.no_grad():
        expected = make_unet(sdxl=sdxl)(x_t, t, encoder_hidden_states=embeds, added_cond_kwargs=added).sample
        torch.testing.assert_close(model(x_t, t, condition), expected, rtol=1e-5, atol=1e-6)


def test_codes_steer_the_prediction_and_the_scale_turns_them_off(inputs):
    x_t, t, condition = inputs
    model = make_ladd()
    shake(model)
    other = Condition(spatial=-condition.spatial)
    with torch.no_grad():
        assert (model(x_t, t, condition) - model(x_t, t, other)).abs().max() > 1e-3
        off = model(x_t, t, condition, conditioning_scale=0.0)
        torch.testing.assert_close(off, model(x_t, t, other, conditioning_scale=0.0))
        half = model(x_t, t, condition, conditioning_scale=0.5)
        model.conditioning_scale = 0.5
        torch.testing.assert_close(model(x_t, t, condition), half)


def test_only_the_branch_and_the_adaptors_learn(inputs):
    x_t, t, condition = inputs
    model = make_ladd(lora=LoraSettings(rank=2)).train()
    shake(model)
    assert not model.unet.training and model.controlnet.training
    model(x_t, t, condition).square().mean().backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith("unet.") and "lora_" not in name
        assert parameter.requires_grad is not frozen, name
        assert (parameter.grad is None) is frozen, name


def test_one_step_of_training_wakes_the_zero_convolutions(inputs):
    x_t, t, condition = inputs
    model = make_ladd().train()
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=1.0)
    before = model(x_t, t, condition)
    model.target(torch.zeros_like(x_t), x_t, t).sub(before).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model(x_t, t, condition), before)


def test_one_null_token_equals_many(inputs):
    x_t, t, condition = inputs
    model = make_ladd()
    shake(model)
    many = Condition(spatial=condition.spatial, embeds=torch.zeros(2, 77, 12))
    with torch.no_grad():
        torch.testing.assert_close(model(x_t, t, condition), model(x_t, t, many), rtol=1e-5, atol=1e-5)


def test_stored_null_caption_is_used(inputs):
    x_t, t, condition = inputs
    null = torch.randn(3, 12, generator=torch.Generator().manual_seed(3))
    given = Condition(spatial=condition.spatial, embeds=null.expand(2, 3, 12))
    with torch.no_grad():
        torch.testing.assert_close(make_ladd(null_embeds=null)(x_t, t, condition), make_ladd()(x_t, t, given))


@pytest.mark.parametrize("sdxl", [False, True])
def test_saved_decoder_loads_with_equal_output(sdxl, inputs, tmp_path):
    x_t, t, condition = inputs
    null = torch.ones(2, 12)
    model = make_ladd(sdxl=sdxl, lora=LoraSettings(rank=2), null_embeds=null, conditioning_scale=0.8, resize="bicubic")
    shake(model)
    model.save_pretrained(tmp_path / "with", include_unet=True)
    model.save_pretrained(tmp_path / "without")
    assert not (tmp_path / "without" / "unet").exists()
    with torch.no_grad():
        expected = model(x_t, t, condition)
        torch.testing.assert_close(LADD.from_pretrained(tmp_path / "with")(x_t, t, condition), expected)
        apart = LADD.from_pretrained(tmp_path / "without", unet=make_unet(sdxl=sdxl))
        torch.testing.assert_close(apart(x_t, t, condition), expected)


def test_unet_is_saved_without_the_adaptors(tmp_path):
    model = make_ladd(lora=LoraSettings(rank=2))
    shake(model)
    model.save_pretrained(tmp_path, include_unet=True)
    again = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    expected = make_unet().state_dict()
    assert again.state_dict().keys() == expected.keys() == base_state_dict(model.unet).keys()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


def test_half_precision_file_loads_in_the_precision_of_the_unet(tmp_path):
    make_ladd().save_pretrained(tmp_path, dtype=torch.float16)
    assert {p.dtype for p in LADD.from_pretrained(tmp_path, unet=make_unet()).parameters()} == {torch.float32}


def test_loading_says_what_is_wrong(tmp_path):
    make_ladd().save_pretrained(tmp_path / "decoder")
    with pytest.raises(ValueError, match="pass unet="):
        LADD.from_pretrained(tmp_path / "decoder")
    with pytest.raises(ValueError, match=r"config\.json"):
        LADD.from_pretrained(tmp_path)
    state = make_ladd().branch_state_dict()
    state["extra"] = state.pop("null_embeds")
    state["controlnet.conv_in.bias"] = torch.zeros(3)
    with pytest.raises(
        ValueError, match=r"missing null_embeds(.|\n)*unknown extra(.|\n)*mis-shaped controlnet.conv_in"
    ):
        make_ladd().load_branch_state_dict(state)


def test_wrong_codes_are_refused(inputs):
    x_t, t, _ = inputs
    with pytest.raises(ValueError, match="code embeddings"):
        make_ladd()(x_t, t, Condition())
    with pytest.raises(ValueError, match=r"\(2, 5, 4, 4\)"):
        make_ladd()(x_t, t, Condition(spatial=torch.zeros(2, 5, 4, 4)))


def test_gradient_checkpointing_gives_the_same_gradients(inputs):
    x_t, t, condition = inputs
    gradients = []
    for checkpointing in (False, True):
        model = make_ladd(lora=LoraSettings(rank=2)).train()
        shake(model)
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(x_t, t, condition).square().mean().backward()
        gradients.append([p.grad for p in model.trainable_parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("hidden", [(32, 64), (32, 96, 256)])
def test_codes_reach_the_zero_convolution_with_their_strength(hidden: tuple[int, ...]) -> None:
    """torch's own start leaves 0.002 of it, and stage 1 then learns to do without the codes."""
    torch.manual_seed(0)
    embedding = CodeEmbedding(8, 16, hidden_channels=hidden)
    codes = torch.nn.functional.normalize(torch.randn(8, 8, 16, 16), dim=1)
    reached: list[torch.Tensor] = []
    embedding.conv_out.register_forward_pre_hook(lambda module, inputs: reached.append(inputs[0]))
    assert not embedding(codes).any()
    assert 0.1 < float(reached[0].detach().std((0, 2, 3)).mean()) < 1.0


def test_code_embedding_keeps_the_resolution_and_starts_at_zero():
    embedding = CodeEmbedding(8, 16)
    assert [tuple(block.weight.shape[:2]) for block in embedding.blocks] == [
        (8, 8), (32, 8), (32, 32), (96, 32), (96, 96), (256, 96),
    ]  # fmt: skip
    output = embedding(torch.randn(1, 8, 6, 5))
    assert output.shape == (1, 16, 6, 5) and not output.any()


def test_resizing_repeats_codes_and_leaves_equal_grids_alone():
    codes = torch.arange(4.0).reshape(1, 1, 2, 2)
    assert resize_codes(codes, size=(2, 2), mode="nearest") is codes
    assert resize_codes(codes, size=(4, 4), mode="nearest")[0, 0, 1].tolist() == [0, 0, 1, 1]


def test_builds_from_a_pipeline_folder(tmp_path, inputs):
    x_t, t, condition = inputs
    make_unet().save_pretrained(tmp_path / "unet")
    for name, text in {
        "scheduler/scheduler_config.json": '{"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}',
        "vae/config.json": '{"block_out_channels": [8, 8, 8, 8, 8]}',
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    model = LADD.from_pipeline(tmp_path, code_dim=4, embedding_channels=(8,))
    assert model.prediction_type == "v" and model.pixels_per_latent == 16
    assert model(x_t, t, condition).shape == x_t.shape
    with pytest.raises(ValueError, match=r"unet/config\.json"):
        LADD.from_pipeline(tmp_path / "unet", code_dim=4)


def test_null_caption_is_the_pipelines_own(tmp_path):
    """What StableDiffusionPipeline feeds its UNet for an empty negative prompt."""
    torch.manual_seed(0)
    tokens = ["<|startoftext|>", "<|endoftext|>", "a", "a</w>"]
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=6)
    sizes = {"hidden_size": 12, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=4, max_position_embeddings=6, bos_token_id=0, eos_token_id=1, **sizes)
    text_encoder = CLIPTextModel(config).eval()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    text_encoder.save_pretrained(tmp_path / "text_encoder")
    pipeline = StableDiffusionPipeline(
        vae=None,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=make_unet(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    _, negative = pipeline.encode_prompt("a", torch.device("cpu"), 1, True)
    torch.testing.assert_close(encode_null_caption(tmp_path), negative[0])
    with pytest.raises(ValueError, match="no tokenizer"):
        encode_null_caption(tmp_path / "files")
    torch.testing.assert_close(null_caption(tmp_path), negative[0])
    (tmp_path / "text_encoder_2").mkdir()
    assert null_caption(tmp_path) is None, "SDXL takes zeros"


@torch.no_grad()
@pytest.mark.parametrize(("rounding", "near"), [(None, 1e-5), (torch.float16, 3e-3)])
def test_decoders_stay_as_they_are_when_their_unet_goes_on_learning_by_adaptors(
    tmp_path: Path, inputs, rounding: torch.dtype | None, near: float
) -> None:
    decoder = make_ladd(lora=LoraSettings(rank=2, alpha=1.0))
    shake(decoder)
    decoders, pipeline = tmp_path / "decoders", tmp_path / "pipeline"
    decoder.save_pretrained(decoders / "diffusion")
    record = adapt(decoder, Adaptation(unet="lora", branch="lora", lora=LoraSettings(rank=1)))
    shake(decoder)
    save_tensors(decoders / "few" / WEIGHTS_NAME, record.tensors(decoder))
    save_config(decoders / "few", {"difference": record.to_json()})

    unet = make_unet()  # the same, which learns something else meanwhile
    add_lora(unet, LoraSettings(rank=3, alpha=6.0))
    for parameter in adapter_parameters(unet, "default"):
        parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    save_lora(unet, pipeline / "lora")
    unet.fuse_lora()
    unet.unload_lora()
    unet.save_pretrained(pipeline / "unet")
    x_t, t, condition = inputs
    before = make_ladd(lora=LoraSettings(rank=2, alpha=1.0))
    shake(before)
    assert (unet(x_t, t, torch.zeros(2, 5, 12)).sample - make_unet()(x_t, t, torch.zeros(2, 5, 12)).sample).std() > 0.1

    make_unet().save_pretrained(tmp_path / "old")
    unrelated = make_unet()
    unrelated.conv_out.weight += 0.1
    unrelated.save_pretrained(tmp_path / "unrelated")
    stored = (decoders / "diffusion" / WEIGHTS_NAME).read_bytes()
    with pytest.raises(ValueError, match=r"did not begin with .*unrelated: conv_out.weight"):
        rebase_all(decoders, tmp_path / "unrelated", pipeline, rounding=rounding)
    assert (decoders / "diffusion" / WEIGHTS_NAME).read_bytes() == stored

    rebase_all(decoders, tmp_path / "old", pipeline, rounding=rounding)
    after = LADD.from_pretrained(decoders / "diffusion", unet=UNet2DConditionModel.from_pretrained(pipeline / "unet"))
    assert after.lora is not None and after.lora.rank == 5
    torch.testing.assert_close(after(x_t, t, condition), before(x_t, t, condition), rtol=1e-4, atol=near)
    saved = json.loads((decoders / "few" / "config.json").read_text())["difference"]
    Difference.from_json(saved).apply(after, decoders / "few" / WEIGHTS_NAME)  # knows its base by the new fingerprint
    torch.testing.assert_close(after(x_t, t, condition), decoder(x_t, t, condition), rtol=1e-4, atol=near)


def test_adaptors_of_other_layers_cannot_be_taken_out(tmp_path: Path) -> None:
    make_ladd(lora=LoraSettings(rank=2, targets=("to_q",))).save_pretrained(tmp_path / "decoder")
    unet = make_unet()
    add_lora(unet, LoraSettings(rank=3, targets=("to_k",)))
    save_lora(unet, tmp_path / "lora")
    with pytest.raises(ValueError, match="adapt other layers"):
        rebase_decoder(tmp_path / "decoder", tmp_path / "lora")
    make_ladd().save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no LoRA"):
        rebase_decoder(tmp_path / "bare", tmp_path / "lora")
