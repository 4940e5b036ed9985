"""``layton app``: a local web page that reconstructs pictures from their tokens and draws from text."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layton.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

    from generation.drawers import Draws
    from layton.commands.reconstruction import Reconstructor
    from layton.tokenizer import LaytonTokenizer

LAYTONGEN, DIFFUSION = "LaytonGen", "latent diffusion"


def app(
    *,
    tokenizer: str = "mini",
    host: str = "127.0.0.1",
    port: int = 7860,
    device: str | None = None,
    allow: list[str] | None = None,
) -> None:
    """Serve a web page on this machine: pictures through their tokens and back, and pictures from text.

    Args:
        tokenizer: embedded tokenizer or folder; the text-to-image models beside it draw from text.
        host: address to serve; 127.0.0.1 is reached from this machine only.
        port: to serve on.
        device: where to run; the accelerator if there is one.
        allow: dotted names, or their beginnings, of classes of your own that a saved part may name.
    """
    if find_spec("gradio") is None:
        raise UsageError("layton app needs gradio: pip install 'layton[app]'")
    if not 0 < port < 65536:
        raise UsageError(f"--port must lie in 1 to 65535, got {port}")
    build_page(Studio.load(tokenizer, device=device, allow=allow)).launch(server_name=host, server_port=port)


@dataclass(frozen=True, slots=True, eq=False)
class Studio:
    """What the page can do, without the page.

    Attributes:
        name: What was loaded.
        one: Reconstructs and measures.
        painters: What draws from text, by name; may be empty.
    """

    name: str
    one: Reconstructor
    painters: dict[str, Draws]

    @classmethod
    def load(cls, name: str, *, device: str | None = None, allow: list[str] | None = None) -> Studio:
        """A tokenizer with all decoders, and the text-to-image models beside it.

        Raises:
            ValueError: If it does not exist or is damaged.
        """
        from generation.demonstration import has_generator
        from generation.drawers import DrawerOptions, load_drawer
        from generation.placed_prompts import has_places
        from layton.assets import find_pipeline
        from layton.commands.measures import ImageMeasures
        from layton.commands.reconstruction import Reconstructor
        from layton.loading import load_tokenizer

        model = load_tokenizer(name, device=device, allow=allow)
        painters: dict[str, Draws] = {}
        if has_generator(name):
            painters[LAYTONGEN] = load_drawer(DrawerOptions(name, device=device, allow=allow)).draw
        try:
            find_pipeline(name)
        except ValueError:
            pass  # a tokenizer without a latent diffusion model
        else:
            planner = name if has_places(name) else None
            painters[DIFFUSION] = load_drawer(
                DrawerOptions(
                    name, "diffusion", planner=planner, device=device, allow=None if planner is None else allow
                )
            ).draw
        return cls(name, Reconstructor(model, model.default_decoder, ImageMeasures()), painters)

    @property
    def tokenizer(self) -> LaytonTokenizer:
        """With all its decoders."""
        return self.one.tokenizer

    def reconstruct(
        self, path: str | None, decoder: str, steps: int = 0, seed: int | None = 0
    ) -> tuple[Image.Image, str]:
        """A picture through its tokens and back, in its own size, and figures in words.

        Args:
            path: An image file; None is the empty field of a page.
            decoder: Name of the code decoder.
            steps: Its network evaluations; 0 for its own number.
            seed: Of its noise; None, an empty field, is 0.

        Raises:
            ValueError: There is no image, it is refused or unreadable, or the decoder refuses the steps.
        """
        from layton.commands.images import FittedImages, ImageFiles
        from layton.commands.measures import in_words

        if path is None:
            raise ValueError("choose a picture first")
        fitted = FittedImages(
            ImageFiles([Path(path)]), self.tokenizer.image_size, policy="pad", max_bad=0, keep_original=True
        )
        result = replace(self.one, decoder=decoder, num_steps=steps or None, seed=seed or 0)(list(fitted))[0]
        return result.picture, f"{self.tokenizer.num_tokens} tokens, {in_words(result.figures)}"

    def draw(self, prompt: str, painter: str, seed: int | None = 0) -> tuple[Image.Image, str]:
        """A picture from text, and what was cut of that; the same prompt and seed give the same picture.

        Raises:
            ValueError: No such painter.
        """
        from PIL import Image

        if painter not in self.painters:
            raise ValueError(f"{painter!r} draws nothing here; there are {', '.join(self.painters) or 'none'}")
        from generation.pipeline import PromptCutWarning

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", PromptCutWarning)
            drawn = self.painters[painter]([prompt], [seed or 0])[0]
        cuts = [str(each.message) for each in caught if issubclass(each.category, PromptCutWarning)]
        return Image.fromarray(drawn), "; ".join(cuts)


def build_page(studio: Studio) -> Any:
    """The page: one tab for each thing that the studio can do."""
    import gradio

    def told(function: Any) -> Any:
        """What users may get wrong is shown on the page."""

        def call(*values: Any) -> Any:
            try:
                return function(*values)
            except ValueError as error:
                raise gradio.Error(str(error)) from error

        return call

    decoders = sorted(studio.tokenizer.decoders)
    with gradio.Blocks(title="layton", analytics_enabled=False) as page:
        gradio.Markdown(f"# layton\n`{studio.name}`: a picture is {studio.tokenizer.num_tokens} tokens.")
        with gradio.Tab("Reconstruct"):
            with gradio.Row():
                given = gradio.Image(type="filepath", label="picture")
                made = gradio.Image(type="pil", format="png", label="from its tokens")
            decoder = gradio.Dropdown(decoders, value=studio.tokenizer.default_decoder, label="decoder")
            steps = gradio.Slider(0, 50, value=0, step=1, label="steps (0: the decoder's own number)")
            noise = gradio.Number(0, precision=0, minimum=0, label="seed")
            figures = gradio.Textbox(label="figures", interactive=False)
            button = gradio.Button("Reconstruct", variant="primary")
            button.click(told(studio.reconstruct), [given, decoder, steps, noise], [made, figures])
        if studio.painters:
            with gradio.Tab("Draw from text"):
                prompt = gradio.Textbox("a red star", label="prompt")
                painter = gradio.Dropdown(list(studio.painters), value=next(iter(studio.painters)), label="model")
                seed = gradio.Number(0, precision=0, minimum=0, label="seed")
                drawn = gradio.Image(type="pil", format="png", label="picture")
                remarks = gradio.Textbox(label="remarks", interactive=False)
                paint = gradio.Button("Draw", variant="primary")
                paint.click(told(studio.draw), [prompt, painter, seed], [drawn, remarks])
    return page
