"""A LoRA as TLCM releases it, a folder of peft, does in diffusers' pipelines what it did in peft."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_pipelines as tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.testing import assert_close

from distill.adapters import FLOW_LORA_TARGETS, TLCM_LORA_TARGETS
from distill.condition import Condition
from distill.models import denoiser_from_pipeline
from layton.cli import main
from layton.distillation.distilled import load_distilled, pipeline_arguments


def release(kind: str, folder: Path) -> torch.Tensor:
    """Write a random adapter with peft; returns what the adapted network puts out."""
    pipe = {"xl": tiny.tiny_xl, "flux": tiny.tiny_flux}[kind]()
    name, targets = ("unet", TLCM_LORA_TARGETS) if kind == "xl" else ("transformer", FLOW_LORA_TARGETS)
    torch.manual_seed(1)
    # alpha stays at peft's own 8
    adapted = get_peft_model(
        getattr(pipe, name), LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False)
    )
    adapted.save_pretrained(folder)
    with torch.no_grad():
        return denoiser_from_pipeline(pipe)(*inputs(kind))


def inputs(kind: str) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    draw = torch.Generator().manual_seed(2)
    x_t = torch.randn(1, 4, 8, 8, generator=draw)
    if kind == "xl":
        given = Condition(
            embeds=torch.randn(1, 5, 16, generator=draw),
            pooled=torch.randn(1, 12, generator=draw),
            time_ids=torch.tensor([[16.0, 16, 0, 0, 16, 16]]),
        )
    else:
        given = Condition(
            embeds=torch.randn(1, 5, 16, generator=draw),
            pooled=torch.randn(1, 12, generator=draw),
            guidance=torch.tensor([7.0]),
        )
    return x_t, torch.tensor([749.0]), given


@pytest.mark.parametrize(("kind", "guidance"), [("xl", 1.0), ("flux", 7.0)])
def test_a_released_lora_becomes_a_distilled_student(kind: str, guidance: float, tmp_path: Path) -> None:
    wanted = release(kind, tmp_path / "tlcm")
    assert main(["convert", "lora", str(tmp_path / "tlcm"), "--out", str(tmp_path / "out")]) == 0
    pipe = {"xl": tiny.tiny_xl, "flux": tiny.tiny_flux}[kind]()
    sampling = load_distilled(pipe, tmp_path / "out")
    with torch.no_grad():
        assert_close(denoiser_from_pipeline(pipe)(*inputs(kind)), wanted, rtol=1e-5, atol=1e-5)
    assert sampling.step_counts == tuple(range(1, 9))
    assert pipeline_arguments(sampling, 4) == {"num_inference_steps": 4, "guidance_scale": guidance}
    if kind == "xl":
        assert sampling.times_for(4) == (999.0, 749.0, 499.0, 124.0)


def test_what_is_no_plain_lora_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "tlcm"
    release("xl", folder)

    def refused() -> str:
        assert main(["convert", "lora", str(folder), "--out", str(tmp_path / "out")]) == 1
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    config = folder / "adapter_config.json"
    kept = json.loads(config.read_text())
    config.write_text(json.dumps(kept | {"use_dora": True}))
    assert "use_dora" in refused()
    config.write_text(json.dumps(kept | {"init_lora_weights": "pissa_niter_4"}))
    assert "base model" in refused()
    config.write_text(json.dumps(kept))
    other = {"base_model.model.model.layers.0.q_proj.lora_A.weight": torch.zeros(4, 8)}
    other["base_model.model.model.layers.0.q_proj.lora_B.weight"] = torch.zeros(8, 4)
    save_file(other, folder / "adapter_model.safetensors")
    assert "neither a UNet's layers nor FLUX's" in refused()
    (folder / "adapter_model.safetensors").write_bytes(b"broken")
    assert "safetensors" in refused()
    (folder / "adapter_model.safetensors").unlink()
    assert "no weights" in refused()
    config.unlink()
    assert "adapter_config.json" in refused()
