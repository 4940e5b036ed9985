"""The sampling record: exact on its way to disk, strict about steps, equal to diffusers' schedulers."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import TCDScheduler
from torch.testing import assert_close

from distill.condition import Condition
from distill.denoiser import Denoiser
from distill.few_step import FewStepSampling
from distill.samplers import lcm_boundary, renoise_sample
from distill.schedules import VPSchedule
from distill.toy import GaussianMixtureDenoiser

TIMES = ((999.0,), (999.0, 499.0), (999.0, 749.0, 499.0, 249.0))
EMPTY = Condition()


def toy(prediction_type="eps"):
    means = torch.tensor([[1.0, -1.0], [-0.5, 0.3]])
    return GaussianMixtureDenoiser(means, 0.3, VPSchedule(), prediction_type=prediction_type)


def noise():
    return torch.randn(5, 2, generator=torch.Generator().manual_seed(0))


def seeded():
    return torch.Generator().manual_seed(1)


def test_record_survives_json():
    record = FewStepSampling(times=TIMES, kind="tcd", gamma=0.2, guidance=7.5, prediction="v")
    assert FewStepSampling.from_json(json.loads(json.dumps(record.to_json()))) == record
    older = {name: value for name, value in record.to_json().items() if name != "start"}
    assert FewStepSampling.from_json(older).start == "noise"


@pytest.mark.parametrize("change", [{"extra": 1}, {"times": {"2": [999.0]}}, {"times": 3}, {"kind": "magic"}])
def test_malformed_records_are_refused(change):
    with pytest.raises(ValueError, match=r"expected|times"):
        FewStepSampling.from_json(FewStepSampling(times=TIMES).to_json() | change)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"times": ()}, "at least one"),
        ({"times": ((),)}, "at least one"),
        ({"times": ((3.0, 5.0),)}, "decrease"),
        ({"times": ((3.0,), (5.0,))}, "twice"),
        ({"times": TIMES, "gamma": 2.0}, "gamma"),
        ({"times": TIMES, "kind": "ddim", "boundary": "lcm"}, "renoise"),
        ({"times": TIMES, "prediction": "noise"}, "noise"),
    ],
)
def test_nonsense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        FewStepSampling(**fields)


def test_untrained_steps_and_other_networks_are_refused():
    record = FewStepSampling(times=TIMES)
    with pytest.raises(ValueError, match="trained for 1, 2, 4 steps, not for 3"):
        record.sample(toy(), noise(), EMPTY, num_steps=3, generator=seeded())
    with pytest.raises(ValueError, match="eps network, got a v"):
        record.sample(toy("v"), noise(), EMPTY, num_steps=1)
    with pytest.raises(ValueError, match="generator"):
        record.sample(toy(), noise(), EMPTY, num_steps=2)


@pytest.mark.parametrize("boundary", ["none", "lcm"])
def test_renoising_is_the_samplers(boundary):
    record = FewStepSampling(times=TIMES, boundary=boundary)
    found = record.sample(toy(), noise(), EMPTY, num_steps=4, generator=seeded())
    function = lcm_boundary if boundary == "lcm" else None
    expected = renoise_sample(toy(), noise(), torch.tensor(TIMES[2]), EMPTY, generator=seeded(), boundary=function)
    assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_tcd_equals_diffusers(gamma):
    scheduler = TCDScheduler(original_inference_steps=1000, beta_schedule="scaled_linear")
    scheduler.set_timesteps(timesteps=[int(t) for t in TIMES[2]])
    denoiser, x, generator = toy(), noise(), seeded()
    for t in scheduler.timesteps:
        output = denoiser(x, t.expand(5), EMPTY)
        x = scheduler.step(output, t, x, eta=gamma, generator=generator).prev_sample
    record = FewStepSampling(times=TIMES, kind="tcd", gamma=gamma)
    found = record.sample(toy(), noise(), EMPTY, num_steps=4, generator=seeded())
    assert_close(found, x, rtol=1e-4, atol=1e-4)
    if gamma == 0.0:  # ddim differs in its last step only, whose x_0 it returns
        x = noise()
        scheduler.set_timesteps(timesteps=[int(t) for t in TIMES[2]])
        for t in scheduler.timesteps[:-1]:
            x = scheduler.step(denoiser(x, t.expand(5), EMPTY), t, x, eta=0.0).prev_sample
        last = scheduler.timesteps[-1].expand(5)
        clean = denoiser.predict(x, last, EMPTY).x_0
        ddim = FewStepSampling(times=TIMES, kind="ddim").sample(toy(), noise(), EMPTY, num_steps=4)
        assert_close(ddim, clean, rtol=1e-4, atol=1e-4)


def test_guidance_is_fed_to_the_network():
    seen = []

    class Listener(Denoiser):
        def forward(self, x_t, t, condition):
            seen.append(condition.guidance)
            return x_t

    record = FewStepSampling(times=TIMES, guidance=7.5)
    record.sample(Listener(VPSchedule(), "eps"), noise(), EMPTY, num_steps=1)
    given = Condition(guidance=torch.ones(5))
    record.sample(Listener(VPSchedule(), "eps"), noise(), given, num_steps=1)
    assert seen[0].tolist() == [7.5] * 5 and seen[1].tolist() == [1.0] * 5
