"""Pairs of noise and what a code decoder of many steps makes of it: made once, then 25 forwards cheaper per sample."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distill.condition import Condition
from distill.methods.pairs import DEFAULT_SOLVER, TeacherSolver
from layton.assets import DIFFUSION, LDM, LIGHT, resolve
from layton.data.sources import SampleSource
from layton.decoders.consistency import ConsistencyDecoder
from layton.decoders.latent import read_network
from layton.devices import choose_device
from layton.distillation.pairs import PairPlan, PairSource, captions_digest, generate_pairs, made_once
from layton.folder import read_class, resolve_class
from layton.ladd import CLASS_NAME as STAGE_1
from layton.ladd import LADD
from layton.ldm.cache import digest, load_code_parts
from layton.ldm.unet import use_fast_attention


class DecoderPairs(SampleSource):
    """A source of pairs (codes, noise, latent), made by a decoder when first asked for and then read from disk.

    A sample holds ``latent`` and ``noise`` (C, h, w), ``codes`` (N,), ``caption`` and ``key``, and the ``image`` where
    the source's samples do. Noise is kept as a seed. An interrupted run goes on with the part it was at.

    Args:
        source: Samples with ``codes`` and ``latent``, usually a `layton.ldm.cache.CachedLatents`; only the shape of
            their latents counts.
        ldm: Diffusers pipeline folder, or the name of an embedded one.
        tokenizer: Folder with ``encoder/`` and ``quantizer/``, or ``mini``, whose codes they are.
        decoder: The teacher: stage 1's export, or one of what was distilled from it, such as a 2-rectified flow.
        folder: Where the pairs lie.
        base: Stage 1's export, for a teacher that was distilled from it.
        reader: Folder of the light decoder, for a teacher that listens to it.
        solver: How the teacher turns noise into latents; without guidance, for codes have no null.
        num_pairs: How many; more than there are samples gives each several noises. None: one for each sample.
        seed: Of all noises.
        part_size: Pairs in a file.
        batch_size: Pairs made at once.
        device: Where the teacher runs while pairs are made; the accelerator if there is one.

    Raises:
        CacheMismatchError: The folder holds pairs made by something else.
        ValueError: The solver is guided, or the samples have no codes or latents.
    """

    def __init__(
        self,
        source: SampleSource,
        *,
        ldm: str,
        tokenizer: str,
        decoder: str,
        folder: str,
        base: str | None = None,
        reader: str | None = None,
        solver: TeacherSolver = DEFAULT_SOLVER,
        num_pairs: int | None = None,
        seed: int = 0,
        part_size: int = 1024,
        batch_size: int = 32,
        device: str | None = None,
    ) -> None:
        first = source.sample(0, seed=0)
        if solver.is_guided or not {"codes", "latent"} <= first.keys():
            raise ValueError(
                f"pairs of a code decoder need codes, latents and no guidance; got {list(first)}, {solver}"
            )
        self._source = source
        ldm, tokenizer = str(resolve(ldm, part=LDM)), str(resolve(tokenizer))
        decoder, base = (
            str(resolve(decoder, part=DIFFUSION)),
            None if base is None else str(resolve(base, part=DIFFUSION)),
        )
        reader = None if reader is None else str(resolve(reader, part=LIGHT))
        channels, height, width = first["latent"].shape
        count = len(source) if num_pairs is None else num_pairs
        plan = PairPlan(count, (channels, height, width), solver, seed, part_size, batch_size, ("codes",))
        networks = [f"{ldm}/unet", f"{tokenizer}/quantizer", decoder, *(part for part in (base, reader) if part)]
        teacher_id = "-".join(digest(Path(place)) for place in networks)
        wanted = plan.fingerprint(teacher=teacher_id, captions=captions_digest(source, plan))

        def make() -> PairSource | None:
            _, quantizer = load_code_parts(tokenizer)
            place = choose_device(device)
            quantizer.to(place)

            def condition_of(batch: Mapping[str, Any]) -> Condition:
                codes = batch["codes"].long().to(place)
                side = int(codes.shape[1] ** 0.5)
                return Condition(spatial=quantizer.codes_to_embeddings(codes, (side, side)))

            teacher = read_teacher(Path(decoder), ldm, base, reader).to(place)
            use_fast_attention(teacher.unet, teacher.controlnet)
            with torch.no_grad():
                return generate_pairs(teacher, source, condition_of, folder, plan, teacher_id=teacher_id)

        self._pairs = made_once(folder, wanted, make)

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self._pairs)

    def sample(self, index: int, *, seed: int) -> dict[str, Any]:
        """One pair, and the picture that its codes are of; the seed has no influence."""
        pair = self._pairs.sample(index)
        del pair["seed"]
        original = self._source.sample(index % len(self._source), seed=0)
        return pair | {name: original[name] for name in ("image",) if name in original}


def read_teacher(decoder: Path, ldm: str, base: str | None, reader: str | None = None) -> LADD:
    """The network of stage 1's export, or of a decoder that was distilled from it, frozen.

    Raises:
        ValueError: The folder holds neither, or does not fit.
    """
    found = read_class(decoder)
    if found == STAGE_1:
        network, _ = read_network(decoder, ldm, reader=reader)
    else:
        kind = resolve_class(found, ConsistencyDecoder)
        network = kind.from_pretrained(decoder, ldm=ldm, base=base, reader=reader).network
    return network.requires_grad_(False).eval()
