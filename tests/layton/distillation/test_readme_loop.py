"""What configs/distill/README.md says in Python runs as it is printed there; a toy takes the same methods."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import small_pipelines as tiny
import torch
from torch import Tensor, nn

from distill import LCM, MLCM, Condition, Denoiser, DistillBatch, GaussianMixtureDenoiser, VPSchedule
from distill.adapters import networks_for, update_target
from distill.samplers import renoise_sample
from layton.distillation.distilled import load_distilled, pipeline_arguments

README = Path(__file__).parents[3] / "configs" / "distill" / "README.md"


def test_the_loop_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.stable_diffusion("epsilon").save_pretrained("teacher")
    (code,) = re.findall(r"## In Python.*?```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    code = code.replace("PATH/TO/stable-diffusion-v1-5", "teacher").replace("range(1000)", "range(2)")
    names: dict[str, object] = {}
    exec(code.replace("rank=64", "rank=4"), names)  # noqa: S102  # the page's own words
    pipe = tiny.stable_diffusion("epsilon")
    sampling = load_distilled(pipe, "runs/mine")
    assert pipe("two red circles", output_type="pt", **pipeline_arguments(sampling, 4)).images.isfinite().all()


class Net(Denoiser):
    """Points in the plane."""

    def __init__(self, schedule: VPSchedule) -> None:
        super().__init__(schedule, "eps")
        self.layers = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 2))

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.layers(torch.cat([x_t, t[:, None].float() / 1000], dim=1))


@pytest.mark.parametrize("kind", [MLCM, LCM])
def test_an_unconditional_toy_in_a_plain_loop(kind: type[MLCM | LCM]) -> None:
    torch.manual_seed(0)
    schedule = VPSchedule()
    mixture = GaussianMixtureDenoiser(torch.tensor([[2.0, 0.0], [-2.0, 0.0]]), 0.2, schedule)
    method = (
        MLCM(schedule=schedule, guidance_scale=1.0)
        if kind is MLCM
        else LCM(schedule=schedule, guidance_range=(1.0, 1.0))
    )
    networks = networks_for(Net(schedule), target_decay=method.target_decay)
    method.prepare(networks)
    optimizer = torch.optim.Adam(networks.student.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        x_0 = mixture.draw(8, generator) if method.needs_latents else None
        batch = DistillBatch(Condition(), Condition(), (2,), x_0, size=8)
        loss = sum(method.losses(networks, batch, step=step, generator=generator).terms.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_target(networks, method.target_decay or 0.0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in networks.student.parameters())
    x_T = torch.randn(4, 2, generator=generator)
    times = method.inference_times(2)
    assert renoise_sample(networks.student, x_T, times, Condition(), generator=generator).shape == (4, 2)
