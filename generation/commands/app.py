"""``layton app``: a local web page that reconstructs pictures from their tokens and draws from text."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layton.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from generation.drawing import LaytonGenDrawer
    from layton.commands.reconstruction import Reconstructor
    from layton.tokenizer import LaytonTokenizer

    Painter = Callable[[str, int], tuple[NDArray[np.uint8], str]]

LAYTONGEN, DIFFUSION = "LaytonGen", "latent diffusion"
MAX_SEED = 2**32  # torch's generator on a CPU takes no more of a seed
_MAX_FILE = "64mb"
_MAX_WAITING = 32
_KEPT_FOR = 3600  # seconds for which pictures stay in gradio's folder of temporary files


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
    from generation.pipeline import PromptWarning
    from generation.serving.sockets import listening

    listening(host, port).close()  # a port that is taken is told before models are loaded
    warnings.filterwarnings("ignore", category=PromptWarning)  # the page tells it
    page = build_page(Studio.load(tokenizer, device=device, allow=allow))
    page.queue(max_size=_MAX_WAITING).launch(server_name=host, server_port=port, max_file_size=_MAX_FILE)


@dataclass(frozen=True, slots=True, eq=False)
class Studio:
    """What the page can do, without the page.

    Attributes:
        name: What was loaded.
        one: Reconstructs and measures.
        painters: What draws from text, by name; may be empty. Each gives a picture, uint8 (H, W, 3), and what it did
            not read of the prompt, in words.
    """

    name: str
    one: Reconstructor
    painters: dict[str, Painter]

    @classmethod
    def load(cls, name: str, *, device: str | None = None, allow: list[str] | None = None) -> Studio:
        """A tokenizer with all decoders, and the text-to-image models beside it.

        Raises:
            ValueError: If it does not exist or is damaged.
        """
        from generation.demonstration import has_generator
        from generation.drawing import LaytonGenDrawer
        from layton.assets import find_pipeline
        from layton.commands.measures import ImageMeasures
        from layton.commands.reconstruction import Reconstructor
        from layton.loading import load_tokenizer

        model = load_tokenizer(name, device=device, allow=allow)
        painters: dict[str, Painter] = {}
        if has_generator(name):
            painters[LAYTONGEN] = _by_laytongen(LaytonGenDrawer.load(name, device=device, allow=allow or ()))
        try:
            folder = find_pipeline(name)
        except ValueError:
            pass  # a tokenizer without a latent diffusion model
        else:
            painters[DIFFUSION] = _by_diffusion(name, folder, device=device, allow=allow)
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
        from layton.commands.images import FittedImage
        from layton.commands.measures import in_words
        from layton.data.geometry import fit_image
        from layton.data.images import load_image

        if path is None:
            raise ValueError("choose a picture first")
        image = load_image(Path(path), name="the picture")
        square, geometry = fit_image(image, self.tokenizer.image_size, policy="pad")
        fitted = FittedImage("the picture", image, square, geometry)
        result = replace(self.one, decoder=decoder, num_steps=steps or None, seed=_checked(seed))([fitted])[0]
        return result.picture, f"{self.tokenizer.num_tokens} tokens, {in_words(result.figures)}"

    def draw(self, prompt: str, painter: str, seed: int | None = 0) -> tuple[Image.Image, str]:
        """A picture from text, and what was not read of that; the same prompt and seed give the same picture.

        Raises:
            ValueError: No such painter, nothing to draw, or no seed.
        """
        from PIL import Image

        if painter not in self.painters:
            raise ValueError(f"{painter!r} draws nothing here; there are {', '.join(self.painters) or 'none'}")
        if not prompt.strip():
            raise ValueError("say what to draw")
        drawn, remark = self.painters[painter](prompt, _checked(seed))
        return Image.fromarray(drawn), remark


def _checked(seed: int | None) -> int:
    if not 0 <= (seed or 0) < MAX_SEED:
        raise ValueError(f"a seed lies in [0, {MAX_SEED}), got {seed}")
    return seed or 0


def _by_laytongen(drawer: LaytonGenDrawer) -> Painter:
    import torch

    def paint(prompt: str, seed: int) -> tuple[NDArray[np.uint8], str]:
        drawn = drawer.draw([prompt], [torch.Generator().manual_seed(seed)])
        return drawn.images[0], drawer.remarks([prompt], drawn.cut)[0]

    return paint


def _by_diffusion(name: str, folder: Path, *, device: str | None, allow: list[str] | None) -> Painter:
    """With the planner of the LaytonGen beside it, where the model has learnt what that says."""
    from transformers import AutoTokenizer

    from generation.drawers import DrawerOptions, load_drawer
    from generation.placed_prompts import has_places
    from layton.ldm.text import remark_on, unread_words

    planner = name if has_places(name) else None
    told = None if planner is None else allow
    draw = load_drawer(DrawerOptions(name, "diffusion", planner=planner, device=device, allow=told)).draw
    words = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)

    def paint(prompt: str, seed: int) -> tuple[NDArray[np.uint8], str]:
        total = len(words(prompt).input_ids)
        remark = remark_on(prompt, unread_words(words, prompt), kept=min(total, words.model_max_length), total=total)
        return draw([prompt], [seed])[0], remark

    return paint


def _path_of(upload: Any) -> str | None:
    return None if upload is None else str(upload.path)


def build_page(studio: Studio) -> Any:
    """The page: one tab for each thing that the studio can do."""
    import gradio

    def told(function: Any) -> Any:
        """What users may get wrong is shown on the page."""

        def call(*values: Any) -> Any:
            try:
                return function(*values)
            except ValueError as error:
                raise gradio.Error(str(error), print_exception=False) from error

        return call

    decoders = sorted(studio.tokenizer.decoders)
    with gradio.Blocks(title="layton", analytics_enabled=False, delete_cache=(_KEPT_FOR, _KEPT_FOR)) as page:
        gradio.Markdown(f"# layton\n`{studio.name}`: a picture is {studio.tokenizer.num_tokens} tokens.")
        with gradio.Tab("Reconstruct"):
            with gradio.Row():
                given = gradio.Image(type="filepath", sources=["upload", "clipboard"], label="picture")
                given.preprocess = _path_of  # gradio's would decode it, with no limits, and lose alpha and depth
                made = gradio.Image(type="pil", format="png", label="from its tokens")
            decoder = gradio.Dropdown(decoders, value=studio.tokenizer.default_decoder, label="decoder")
            steps = gradio.Slider(0, 50, value=0, step=1, label="steps (0: the decoder's own number)")
            noise = gradio.Number(0, precision=0, minimum=0, maximum=MAX_SEED - 1, label="seed")
            figures = gradio.Textbox(label="figures", interactive=False)
            button = gradio.Button("Reconstruct", variant="primary")
            button.click(told(studio.reconstruct), [given, decoder, steps, noise], [made, figures])
        if studio.painters:
            with gradio.Tab("Draw from text"):
                prompt = gradio.Textbox("a red star", label="prompt")
                painter = gradio.Dropdown(list(studio.painters), value=next(iter(studio.painters)), label="model")
                seed = gradio.Number(0, precision=0, minimum=0, maximum=MAX_SEED - 1, label="seed")
                drawn = gradio.Image(type="pil", format="png", label="picture")
                remarks = gradio.Textbox(label="remarks", interactive=False)
                paint = gradio.Button("Draw", variant="primary")
                paint.click(told(studio.draw), [prompt, painter, seed], [drawn, remarks])
    return page
