"""Tools on tokens: go on from an image's first tokens, draw chosen tokens again, walk from one image to another.

Codes come from ``pipeline.tokenizer.encode`` or from an earlier result's ``codes``. The transformer sees what stands
before a token only: a token that is drawn again knows its row so far and the rows above, not those below.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from generation.model.layout import PlacedObject
from generation.pictures import OutputType
from generation.pipeline import LaytonGenOutput, LaytonGenPipeline
from generation.sampling.decoding import FREE
from generation.text.encoders import TextFeatures
from layton.interface import Generators


def continue_image(
    pipeline: LaytonGenPipeline,
    codes: Tensor,
    prompt: str | Sequence[str],
    *,
    keep: int,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_entropy: float | None = None,
    candidates: int | None = None,
    layouts: Sequence[Sequence[PlacedObject] | None] | None = None,
    decoder: str | None = None,
    num_inference_steps: int | None = None,
    generator: Generators | None = None,
    output_type: OutputType = "pil",
) -> LaytonGenOutput:
    """Keep the first tokens of images, from the top left, and draw the others.

    Args:
        pipeline: Draws.
        codes: (B, N) int64 of B images, or (1, N) for one image continued in B ways.
        prompt: One for all images, or B.
        keep: k in [0, N]; the first k codes stay.
        guidance_scale: As for the pipeline; so are all others.
        temperature: See there.
        top_k: See there.
        top_p: See there.
        min_entropy: See there.
        candidates: See there.
        layouts: See there; nobody plans where objects stand in an image of which codes are known.
        decoder: See there.
        num_inference_steps: See there.
        generator: See there.
        output_type: See there.

    Raises:
        ValueError: If codes are not those of images, or k is out of range.
    """
    if not isinstance(keep, int) or not 0 <= keep <= pipeline.num_tokens:
        raise ValueError(f"keep must be a number of tokens in [0, {pipeline.num_tokens}], got {keep}")
    drawn = torch.arange(pipeline.num_tokens) >= keep
    return resample_tokens(
        pipeline,
        codes,
        prompt,
        drawn,
        guidance_scale=guidance_scale,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_entropy=min_entropy,
        candidates=candidates,
        layouts=layouts,
        decoder=decoder,
        num_inference_steps=num_inference_steps,
        generator=generator,
        output_type=output_type,
    )


def resample_tokens(
    pipeline: LaytonGenPipeline,
    codes: Tensor,
    prompt: str | Sequence[str],
    chosen: Tensor,
    *,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_entropy: float | None = None,
    candidates: int | None = None,
    layouts: Sequence[Sequence[PlacedObject] | None] | None = None,
    decoder: str | None = None,
    num_inference_steps: int | None = None,
    generator: Generators | None = None,
    output_type: OutputType = "pil",
) -> LaytonGenOutput:
    """Draw chosen tokens of images again; all others stay.

    Args:
        pipeline: Draws.
        codes: (B, N) int64 of B images, or (1, N) for one image changed in B ways.
        prompt: One for all images, or B.
        chosen: (N,) or (B, N) bool, true where a token is drawn; `token_box` makes one from a rectangle.
        guidance_scale: As for the pipeline; so are all others.
        temperature: See there.
        top_k: See there.
        top_p: See there.
        min_entropy: See there.
        candidates: See there.
        layouts: See there; nobody plans where objects stand in an image of which codes are known.
        decoder: See there.
        num_inference_steps: See there.
        generator: See there.
        output_type: See there.

    Raises:
        ValueError: If codes are not those of images, or shapes do not fit.
    """
    pipeline.tokenizer.quantizer.check_codes(codes, grid=pipeline.tokenizer.grid)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    count = max(len(prompts), len(codes))
    if {len(prompts), len(codes)} - {1, count} or chosen.dtype != torch.bool:
        raise ValueError(f"{len(codes)} images, {len(prompts)} prompts and a mask of {chosen.dtype} do not fit")
    if chosen.shape not in ((codes.shape[1],), (count, codes.shape[1])):
        raise ValueError(f"the mask must be ({codes.shape[1]},) or ({count}, {codes.shape[1]}), got {chosen.shape}")
    known = torch.where(chosen.to(codes.device), FREE, codes.long()).expand(count, -1)
    return pipeline(
        prompts * (count if len(prompts) == 1 else 1),
        guidance_scale=guidance_scale,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_entropy=min_entropy,
        candidates=candidates,
        layouts=layouts,
        decoder=decoder,
        num_inference_steps=num_inference_steps,
        generator=generator,
        output_type=output_type,
        known_codes=known,
    )


def token_box(grid: tuple[int, int], *, top: int, left: int, bottom: int, right: int) -> Tensor:
    """Mask (N,) bool of the tokens in rows [top, bottom) and columns [left, right) of a grid (h, w).

    Raises:
        ValueError: If the rectangle is empty or leaves the grid.
    """
    if not (0 <= top < bottom <= grid[0] and 0 <= left < right <= grid[1]):
        raise ValueError(f"rows {top} to {bottom}, columns {left} to {right} are no rectangle of a grid {grid}")
    mask = torch.zeros(grid, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask.flatten()


@torch.no_grad()
def interpolate_images(
    pipeline: LaytonGenPipeline,
    first: Tensor,
    last: Tensor,
    *,
    steps: int,
    decoder: str | None = None,
    num_inference_steps: int | None = None,
) -> Tensor:
    """Pictures between two images: their code embeddings are mixed on the sphere and decoded, not quantized again.

    Args:
        pipeline: Its tokenizer decodes.
        first: Codes (N,) int64 of the first picture.
        last: Codes (N,) int64 of the last picture.
        steps: Number of pictures, both ends included.
        decoder: Name of the decoder.
        num_inference_steps: Its steps.

    Returns:
        (steps, 3, S, S) in [-1, 1]; the noise of the decoder is the same for all.

    Raises:
        ValueError: If there are fewer than 2 steps, or codes are not those of an image.
    """
    shares = _shares(steps).to(pipeline.device)
    tokenizer = pipeline.tokenizer
    pair = tokenizer.quantizer.codes_to_embeddings(torch.stack([first, last]).to(pipeline.device), tokenizer.grid)
    return tokenizer.decoder(decoder).decode(_on_sphere(pair[0], pair[1], shares), num_steps=num_inference_steps)


def interpolate_prompts(
    pipeline: LaytonGenPipeline,
    first: str,
    last: str,
    *,
    steps: int,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_entropy: float | None = None,
    seed: int = 0,
) -> Tensor:
    """Codes of images between two prompts: text features are mixed linearly; all images draw with the same seed.

    Args:
        pipeline: Draws.
        first: First prompt.
        last: Last prompt.
        steps: Number of images, both ends included: these have the codes that the prompts alone give, drawn once.
        guidance_scale: As for the pipeline.
        temperature: See there.
        top_k: See there.
        top_p: See there.
        min_entropy: See there.
        seed: Of every image.

    Returns:
        (steps, N) int64.

    Raises:
        ValueError: If there are fewer than 2 steps.
    """
    shares = _shares(steps).to(pipeline.device)
    text = pipeline.encode_prompt([first, last])
    features = text.features[0] * (1 - shares[:, None, None]) + text.features[1] * shares[:, None, None]
    # between the ends a token counts that either prompt has; at the ends only the prompt's own
    inside = (text.mask[0] | text.mask[1]).expand(steps, -1).clone()
    inside[0], inside[-1] = text.mask[0], text.mask[1]
    sampling, guidance = pipeline.options(
        guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p, min_entropy=min_entropy
    )
    generators = [torch.Generator().manual_seed(seed) for _ in range(steps)]
    for generator in generators:  # as in the pipeline, which takes a number for the decoder's noise first
        torch.randint(2**62, (1,), generator=generator)
    text = pipeline.planned(TextFeatures(features, inside), generators)
    return pipeline.draw_codes(text, generators=generators, sampling=sampling, guidance=guidance)


def _shares(steps: int) -> Tensor:
    if steps < 2:
        raise ValueError(f"steps must be >= 2, got {steps}")
    return torch.linspace(0, 1, steps)


def _on_sphere(first: Tensor, last: Tensor, shares: Tensor) -> Tensor:
    """Great-circle mixture (T, d, h, w) of unit vectors (d, h, w); straight lines where they nearly coincide."""
    cosine = torch.cosine_similarity(first, last, dim=0).clamp(-1, 1)
    angle = cosine.acos()
    weights = shares.view(-1, 1, 1, 1)
    sine = angle.sin()
    straight = (1 - weights) * first + weights * last
    curved = ((1 - weights) * angle).sin() / sine * first + (weights * angle).sin() / sine * last
    return torch.where(sine > 1e-4, curved, straight)
