"""What is served: a tokenizer with one decoder and, where there is one, the LaytonGen beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from generation.demonstration import has_generator
from generation.drawing import LaytonGenDrawer
from generation.model.weight_types import Weights
from generation.sampling.choice import SamplingChoice
from generation.serving.worker import Unwanted, Work
from layton.loading import load_with_decoder
from layton.tokenizer import LaytonTokenizer

Stop = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class TextOrder:
    """A picture that is to be drawn.

    Attributes:
        prompt: What of.
        seed: Of its random numbers.
    """

    prompt: str
    seed: int


@dataclass(frozen=True, slots=True, eq=False)
class CodesOrder:
    """A picture that is to be decoded.

    Attributes:
        codes: (N,) int64.
        seed: Of the decoder's noise.
    """

    codes: Tensor
    seed: int


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A picture that was drawn.

    Attributes:
        image: "RGB".
        codes: (N,) int64, its tokens.
        remark: What was not read of the prompt, in words; empty if all was.
    """

    image: Image.Image
    codes: Tensor
    remark: str


@dataclass(frozen=True, slots=True, eq=False)
class Engine:
    """Does the work of a `Worker`, in its thread.

    Attributes:
        name: What was loaded.
        tokenizer: With the decoder.
        decoder: Its name.
        num_steps: Its steps; its own number if None.
        drawer: Draws from text; None where there is no generator.
    """

    name: str
    tokenizer: LaytonTokenizer
    decoder: str
    num_steps: int | None
    drawer: LaytonGenDrawer | None

    @property
    def kinds(self) -> dict[str, Work]:
        """All that it can do."""
        known: dict[str, Work] = {"encode": self.encode, "decode": self.decode}
        return known if self.drawer is None else {**known, "draw": self.draw}

    def draw(self, orders: list[TextOrder], unwanted: Stop) -> list[Picture]:
        """Pictures of texts.

        Raises:
            Unwanted: Nobody waits for them any more.
            ValueError: There is no generator.
        """
        if self.drawer is None:
            raise ValueError(f"{self.name} has no generator beside it: it draws nothing from text")

        def look(_: int) -> None:
            if unwanted():
                raise Unwanted

        generators = [torch.Generator().manual_seed(order.seed) for order in orders]
        prompts = [order.prompt for order in orders]
        drawn = self.drawer.draw(prompts, generators, callback=look)
        remarks = self.drawer.remarks(prompts, drawn.cut)
        return [
            Picture(Image.fromarray(image), codes, remark)
            for image, codes, remark in zip(drawn.images, drawn.codes, remarks, strict=True)
        ]

    def encode(self, squares: list[Image.Image], unwanted: Stop) -> list[Tensor]:
        """Codes (N,) of "RGB" squares of the tokenizer's size."""
        return list(self.tokenizer.encode_images(squares).codes.cpu())

    def decode(self, orders: list[CodesOrder], unwanted: Stop) -> list[Tensor]:
        """Squares (3, S, S) in [-1, 1] of codes."""
        squares = self.tokenizer.decode(
            torch.stack([order.codes for order in orders]),
            decoder=self.decoder,
            num_steps=self.num_steps,
            generator=[torch.Generator().manual_seed(order.seed) for order in orders],
        )
        return list(squares.cpu())


def load_engine(
    name: str,
    *,
    decoder: str | None = None,
    num_steps: int | None = None,
    sampling: SamplingChoice | None = None,
    weights: Weights | None = None,
    device: str | None = None,
    allow: Sequence[str] = (),
) -> Engine:
    """A tokenizer with one decoder, and the LaytonGen beside it if there is one.

    Args:
        name: Embedded model or folder.
        decoder: Of which the tokenizer has its own choice.
        num_steps: Of the decoder.
        sampling: What is asked for beside LaytonGen's defaults.
        weights: Sets LaytonGen's for the time being.
        device: Where to run; by default the accelerator if there is one.
        allow: Prefixes of class names that may be loaded beside this library's.

    Raises:
        ValueError: If it does not exist or is damaged, or there is no generator to which ``sampling`` could apply.
    """
    if has_generator(name):
        drawer = LaytonGenDrawer.load(
            name,
            decoder=decoder,
            num_steps=num_steps,
            sampling=sampling,
            weights=weights,
            device=device,
            allow=allow,
        )
        return Engine(name, drawer.pipeline.tokenizer, str(drawer.decoder), num_steps, drawer)
    if weights is not None or (sampling is not None and sampling.given()):
        raise ValueError(f"{name} has no generator beside it, whose weights or sampling could be chosen")
    tokenizer, chosen = load_with_decoder(name, decoder, num_steps=num_steps, device=device, allow=allow)
    return Engine(name, tokenizer, chosen, num_steps, None)
