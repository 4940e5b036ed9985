"""The image-caption matcher as a scorer."""

from __future__ import annotations

import pytest
import torch

from distill.condition import Condition
from layton.distillation.matcher import MAX_SCALE, Matcher, MatcherScorer


def tiny(**options) -> Matcher:
    torch.manual_seed(0)
    settings = {"in_channels": 3, "size": 16, "widths": (8, 16), "text_width": 12, "text_length": 6, "dim": 32}
    return Matcher(**{**settings, "text_depth": 1, **options})


def texts(size: int, length: int = 6, seed: int = 0) -> Condition:
    return Condition(embeds=torch.randn(size, length, 12, generator=torch.Generator().manual_seed(seed)))


def test_scores_are_scaled_cosines_of_any_image_size() -> None:
    matcher = tiny()
    for side in (16, 64):
        scores = matcher(torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1)), texts(3))
        assert scores.shape == (3,) and bool((scores.abs() <= matcher.scale + 1e-4).all())
    with torch.no_grad():
        matcher.log_scale.fill_(50.0)
    assert matcher.scale == MAX_SCALE


def test_scorer_gradient_flows_through_the_decoder_into_latents_only() -> None:
    decoder = torch.nn.ConvTranspose2d(4, 3, 4, stride=4)
    scorer = MatcherScorer(tiny(), decoder.requires_grad_(False))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2), requires_grad=True)
    condition = texts(2)
    optimizer = torch.optim.Adam([latents], lr=0.05)
    before = scorer.score(latents, condition).mean().item()
    for _ in range(10):
        optimizer.zero_grad()
        (-scorer.score(latents, condition).mean()).backward()
        optimizer.step()
    assert scorer.score(latents, condition).mean().item() > before + 0.5
    assert all(parameter.grad is None for parameter in scorer.matcher.parameters())


def test_latent_scorer_needs_no_decoder() -> None:
    scorer = MatcherScorer(tiny(in_channels=4, size=8, widths=(8, 8)))
    assert scorer.score(torch.zeros(2, 4, 8, 8), texts(2)).shape == (2,)


def test_masked_positions_have_no_influence() -> None:
    matcher, full = tiny().eval(), texts(2)
    assert full.embeds is not None
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]).bool()
    changed = torch.where(mask[..., None], full.embeds, 7.0)
    a, b = (matcher.encode_text(Condition(embeds=embeds, mask=mask)) for embeds in (full.embeds, changed))
    assert torch.allclose(a, b, atol=1e-5)


def test_round_trip(tmp_path) -> None:
    matcher = tiny().eval()
    matcher.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    assert torch.equal(Matcher.from_pretrained(tmp_path)(images, texts(2)), matcher(images, texts(2)))


def test_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match="24"):
        tiny(size=24)
    with pytest.raises(ValueError, match="none"):
        tiny()(torch.zeros(1, 3, 16, 16), Condition())
    with pytest.raises(ValueError, match="6 positions"):
        tiny()(torch.zeros(1, 3, 16, 16), texts(1, length=7))
