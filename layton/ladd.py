"""LADD, Layton's latent diffusion decoder: a frozen diffusion UNet steered by image codes.

A trainable copy of the UNet's encoder reads the codes and adds its features, through zero convolutions, to the frozen
UNet: ``O = ZC(F_train(z_t, C, t)) + F(z_t, t)`` (Layton, arXiv 2503.08377, section 3; the construction is ControlNet's,
arXiv 2302.05543). In contrast with ControlNet the condition is not an image but a grid of code embeddings, so its
embedding has no strides: the codes are resized to the latent grid first. The text input is a null caption.

Legend: B batch, C latent channels, h w latent grid, d code dimension, L text length, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from diffusers import UNet2DConditionModel
from einops import repeat
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from distill.denoiser import Condition, Denoiser
from distill.parameterization import prediction_type_from_config
from distill.schedules import schedule_from_config
from layton.control import (
    PAPER_CHANNELS,
    CodeEmbedding,
    LoraSettings,
    Resize,
    copy_encoder,
    load_unet,
    read_pipeline,
    resize_codes,
    save_unet,
)
from layton.folder import WEIGHTS_NAME, JsonValue, load_config, load_tensors, require_match, save_config, save_tensors
from layton.pixel_decoder import CodeReader

CLASS_NAME = "layton.ladd.LADD"
READER = "light"  # the decoder that a tokenizer's other ones may listen to


class Shortcut(nn.Sequential):
    """What a reader makes of the codes, straight to the prediction: two convolutions, the last of them zero at first.

    Args:
        width: Of the reader's features.
        channels: Between the two.
        out_channels: C of the latents.
    """

    def __init__(self, width: int, channels: int, out_channels: int) -> None:
        last = nn.Conv2d(channels, out_channels, 3, padding=1)
        super().__init__(nn.Conv2d(width, channels, 1, bias=False), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(cast(Tensor, last.bias))
        self.channels = channels


class LADD(Denoiser):
    """Latent diffusion decoder: predicts as its LDM does, given the code embeddings in ``condition.spatial``.

    The UNet stays frozen and in eval mode; ``parameters()`` with ``requires_grad`` are the control branch and, if
    asked for, the LoRA and the shortcut. Before training the output is exactly the frozen UNet's.

    Args:
        unet: The LDM's denoiser. It is taken over: frozen in place, and given the LoRA if there is one.
        code_dim: d of the code embeddings.
        scheduler_config: The LDM's diffusers scheduler configuration; gives the noise schedule and prediction type.
        embedding_channels: Hidden widths of the code embedding; smaller ones for small models.
        resize: How codes are brought to the latent grid when the sizes differ; the paper's is nearest.
        conditioning_scale: Factor on the control branch's residuals, and on the shortcut, if there is one; the
            released demo uses 0.8 with its weights.
        pixels_per_latent: Image side over latent side, for the size conditioning of SDXL-shaped UNets.
        null_embeds: Null caption of the LDM (L, D), for instance its encoding of ""; default one zero vector, which
            gives the same as any number of them, because attention over equal tokens returns that token.
        lora: Adaptors on the UNet, trained with the branch.

    Raises:
        ValueError: ``code_dim`` or a width is not positive, or ``null_embeds`` does not fit the UNet's text width.
    """

    null_embeds: Tensor

    def __init__(
        self,
        unet: UNet2DConditionModel,
        *,
        code_dim: int,
        scheduler_config: Mapping[str, JsonValue],
        embedding_channels: Sequence[int] = PAPER_CHANNELS,
        resize: Resize = "nearest",
        conditioning_scale: float = 1.0,
        pixels_per_latent: int = 8,
        null_embeds: Tensor | None = None,
        lora: LoraSettings | None = None,
    ) -> None:
        with torch.device("cpu"):  # a table of numbers, also where the networks are built on the meta device
            schedule = schedule_from_config(scheduler_config)
        super().__init__(schedule, prediction_type_from_config(scheduler_config))
        if code_dim < 1 or any(width < 1 for width in embedding_channels):
            raise ValueError(f"widths must be positive, got code_dim {code_dim}, channels {tuple(embedding_channels)}")
        self.code_dim = code_dim
        self.embedding_channels = tuple(embedding_channels)
        self.resize: Resize = resize
        self.conditioning_scale = conditioning_scale
        self.pixels_per_latent = pixels_per_latent
        self.lora = lora
        self.scheduler_config = dict(scheduler_config)
        text_dim = int(unet.config.cross_attention_dim)
        null = torch.zeros(1, text_dim) if null_embeds is None else null_embeds.detach().clone()
        if null.ndim != 2 or null.shape[1] != text_dim:
            raise ValueError(f"null_embeds must be (L, {text_dim}), got {tuple(null.shape)}")
        self.register_buffer("null_embeds", null)
        self.unet = unet.requires_grad_(False).eval()
        self.controlnet = copy_encoder(unet, code_dim=code_dim, hidden_channels=self.embedding_channels)
        self.reader: CodeReader | None = None
        self.reader_name: str | None = None
        self.shortcut: Shortcut | None = None
        self._read: tuple[Tensor, Tensor] | None = None  # the last codes and what was told of them
        if lora is not None:
            self.unet.add_adapter(lora.to_peft())

    def listen_to(self, reader: CodeReader, *, name: str = READER) -> None:
        """Tell the branch, beside the codes, what a light decoder's transformer makes of them.

        Not in the paper, whose branch has to learn to read the codes from nothing: it starts at a zero convolution, so
        predictions stay as they are until that has learnt. Diffusion on top of a first reconstruction is known from
        SWYCC (arXiv 2409.02529).

        Args:
            reader: Is kept frozen, and not saved with this decoder.
            name: Of the decoder, beside this one in a tokenizer's folder, whose transformer it is.

        Raises:
            ValueError: It reads codes of another width.
        """
        if reader.code_dim != self.code_dim:
            raise ValueError(f"the reader {name!r} reads codes of {reader.code_dim} dimensions, not {self.code_dim}")
        cast(CodeEmbedding, self.controlnet.controlnet_cond_embedding).hear(reader.width)
        self.reader, self.reader_name, self._read = reader.to(self.unet.device, self.unet.dtype), name, None

    def cut_short(self, channels: int) -> None:
        """Add to predictions, by a `Shortcut`, what the reader makes of the codes; they stay as they are at first.

        Not in the paper. A light decoder's transformer has most of a picture ready, in a form that two small
        convolutions can turn into latents; through the branch and the UNet, less of it arrives.

        Args:
            channels: Between the two convolutions.

        Raises:
            ValueError: There is no reader, or ``channels`` is not positive.
        """
        if self.reader is None or channels < 1:
            raise ValueError(f"a shortcut needs a reader and channels, got {self.reader_name!r} and {channels}")
        shortcut = Shortcut(self.reader.width, channels, int(self.unet.config.out_channels))
        self.shortcut = shortcut.to(self.unet.device, self.unet.dtype)

    @classmethod
    def from_pipeline(
        cls,
        folder: str | Path,
        *,
        code_dim: int,
        embedding_channels: Sequence[int] = PAPER_CHANNELS,
        resize: Resize = "nearest",
        conditioning_scale: float = 1.0,
        null_embeds: Tensor | None = None,
        lora: LoraSettings | None = None,
    ) -> Self:
        """Build an untrained decoder on the UNet of a local diffusers pipeline folder (SD1.5, SDXL, our own).

        Args:
            folder: Pipeline folder with ``unet/``, ``scheduler/`` and ``vae/``.
            code_dim: d of the code embeddings.
            embedding_channels: See the class.
            resize: See the class.
            conditioning_scale: See the class.
            null_embeds: See the class; ``layton.control.encode_null_caption`` computes it.
            lora: See the class.

        Raises:
            ValueError: A part of the folder is missing.
        """
        ldm = read_pipeline(Path(folder))
        return cls(
            ldm.unet,
            code_dim=code_dim,
            scheduler_config=ldm.scheduler_config,
            embedding_channels=embedding_channels,
            resize=resize,
            conditioning_scale=conditioning_scale,
            pixels_per_latent=ldm.pixels_per_latent,
            null_embeds=null_embeds,
            lora=lora,
        )

    def forward(
        self, x_t: Tensor, t: Tensor, condition: Condition, *, conditioning_scale: float | None = None
    ) -> Tensor:
        """Predict as the LDM does (eps or v, see ``prediction_type``).

        Args:
            x_t: Noisy latents (B, C, h, w).
            t: Time steps (B,) or (), 0 clean to 999 noise.
            condition: ``spatial`` (B, d, h', w') holds the code embeddings; a text given in ``embeds`` (B, L, D),
                ``pooled`` (B, P) or ``time_ids`` (B, 6) takes the place of the null caption.
            conditioning_scale: Factor on the control residuals for this call, default the model's own.

        Returns:
            The prediction (B, C, h, w).

        Raises:
            ValueError: The condition has no codes, or codes of another width.
        """
        x_t = x_t.to(self.unet.dtype)  # states are float32 between steps
        condition = condition.expand(x_t.shape[0])
        codes = condition.spatial
        if codes is None or codes.ndim != 4 or codes.shape[1] != self.code_dim:
            given = None if codes is None else tuple(codes.shape)
            raise ValueError(f"condition.spatial must be code embeddings (B, {self.code_dim}, h, w), got {given}")
        embeds, added = self._text(x_t, condition)
        told = self._told(codes)
        scale = self.conditioning_scale if conditioning_scale is None else conditioning_scale
        told = resize_codes(told.to(x_t.dtype), size=(x_t.shape[-2], x_t.shape[-1]), mode=self.resize)
        down, mid = self.controlnet(
            x_t,
            t,
            encoder_hidden_states=embeds,
            controlnet_cond=told,
            conditioning_scale=scale,
            added_cond_kwargs=added,
            return_dict=False,
        )
        (prediction,) = self.unet(
            x_t,
            t,
            encoder_hidden_states=embeds,
            down_block_additional_residuals=tuple(down),
            mid_block_additional_residual=mid,
            added_cond_kwargs=added,
            return_dict=False,
        )
        if self.shortcut is not None:
            prediction = prediction + scale * self.shortcut(told[:, self.code_dim :])
        return cast(Tensor, prediction)

    def _told(self, codes: Tensor) -> Tensor:
        """What the branch is told: the codes (B, d, h, w), and after them what the reader makes of them."""
        if self.reader is None:
            return codes
        last = None if torch.is_grad_enabled() else self._read
        if last is not None and last[0].device == codes.device and torch.equal(last[0], codes):
            return last[1]  # the next step of the same pictures
        told = torch.cat([codes, self.reader(codes.to(self.unet.dtype)).to(codes)], dim=1)
        self._read = None if torch.is_grad_enabled() else (codes.clone(), told)
        return told

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move it; what the reader has read in another number format is forgotten."""
        self._read = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        """Load it, the reader maybe, too."""
        self._read = None
        super()._load_from_state_dict(*args, **options)

    def _text(self, x_t: Tensor, condition: Condition) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Null caption (B, L, D) and, for SDXL-shaped UNets, zero pooled text and the size in pixels."""
        batch, _, height, width = x_t.shape
        embeds = condition.embeds
        if embeds is None:
            embeds = repeat(self.null_embeds, "l d -> b l d", b=batch)
        embeds = embeds.to(x_t.dtype)
        if self.unet.config.addition_embed_type != "text_time":
            return embeds, None
        pooled, time_ids = condition.pooled, condition.time_ids
        if pooled is None:
            size_dim = 6 * self.unet.config.addition_time_embed_dim
            pooled = x_t.new_zeros(batch, self.unet.config.projection_class_embeddings_input_dim - size_dim)
        if time_ids is None:
            pixels = (height * self.pixels_per_latent, width * self.pixels_per_latent)
            # original size, crop offset, target size, each (height, width)
            time_ids = repeat(x_t.new_tensor((*pixels, 0, 0, *pixels), dtype=torch.float32), "k -> b k", b=batch)
        return embeds, {"text_embeds": pooled, "time_ids": time_ids}

    def train(self, mode: bool = True) -> Self:
        """Set training mode of the control branch; the UNet stays in eval mode."""
        super().train(mode)
        self.unet.eval()
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Trade compute for memory in both networks."""
        self.controlnet.enable_gradient_checkpointing()
        self.unet.enable_gradient_checkpointing()

    def merge_lora(self) -> None:
        """Fold the adaptors into the UNet's weights: the same predictions, fewer operations, nothing to train."""
        if self.lora is not None:
            self.unet.fuse_lora()
            self.unet.unload_lora()
            self.lora = None

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The control branch's parameters and the LoRA's."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def branch_state_dict(self) -> dict[str, Tensor]:
        """All that is not the frozen UNet: ``controlnet.*``, ``null_embeds``, ``lora.*`` and ``shortcut.*``."""
        state: dict[str, Tensor] = {f"controlnet.{name}": value for name, value in self.controlnet.state_dict().items()}
        state["null_embeds"] = self.null_embeds
        if self.lora is not None:
            adaptors = get_peft_model_state_dict(self.unet, adapter_name="default")
            state.update({f"lora.{name}": value for name, value in adaptors.items()})
        if self.shortcut is not None:
            state.update({f"shortcut.{name}": value for name, value in self.shortcut.state_dict().items()})
        return state

    def load_branch_state_dict(self, state: Mapping[str, Tensor], *, source: Path | str = "state") -> None:
        """Load what ``branch_state_dict`` gave.

        Raises:
            ValueError: Keys are missing, unknown or mis-shaped; all of them are listed.
        """
        require_match(self.branch_state_dict(), state, source=source, target="this decoder")
        prefixed = {name.removeprefix("controlnet."): state[name] for name in state if name.startswith("controlnet.")}
        self.controlnet.load_state_dict(prefixed, strict=True)
        self.null_embeds.copy_(state["null_embeds"])
        if self.lora is not None:
            adaptors = {name.removeprefix("lora."): state[name] for name in state if name.startswith("lora.")}
            set_peft_model_state_dict(self.unet, adaptors, adapter_name="default")
        if self.shortcut is not None:
            straight = {name.removeprefix("shortcut."): state[name] for name in state if name.startswith("shortcut.")}
            self.shortcut.load_state_dict(straight, strict=True)

    def save_pretrained(
        self, folder: str | Path, *, dtype: torch.dtype | None = None, include_unet: bool = False
    ) -> None:
        """Write ``config.json`` and ``model.safetensors`` (control branch, null caption, LoRA, shortcut).

        Args:
            folder: Where to write; made if needed.
            dtype: Floating-point type on disk, default the parameters' own.
            include_unet: Also write the frozen UNet, without the LoRA, to ``unet/`` in diffusers' format.
        """
        root = Path(folder)
        config: dict[str, JsonValue] = {
            "class": CLASS_NAME,
            "code_dim": self.code_dim,
            "embedding_channels": list(self.embedding_channels),
            "resize": self.resize,
            "conditioning_scale": self.conditioning_scale,
            "pixels_per_latent": self.pixels_per_latent,
            "null_length": self.null_embeds.shape[0],
            "scheduler": dict(self.scheduler_config),
            "lora": None if self.lora is None else self.lora.to_json(),
        }
        if self.reader is not None:
            config["reader"], config["reader_fingerprints"] = self.reader_name, list(self.reader.fingerprints())
        if self.shortcut is not None:
            config["shortcut"] = self.shortcut.channels
        if include_unet:
            save_unet(self.unet, root / "unet", dtype=dtype)
        save_tensors(root / WEIGHTS_NAME, self.branch_state_dict(), dtype=dtype)
        save_config(root, config)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, unet: UNet2DConditionModel | None = None, reader: str | Path | None = None
    ) -> Self:
        """Load what ``save_pretrained`` wrote, in the UNet's precision.

        Args:
            folder: A folder with ``config.json`` and ``model.safetensors``.
            unet: The frozen UNet it was trained on; default ``folder/unet``, then ``unet`` beside the folder.
            reader: Folder of the light decoder that it listens to, if it does; by default the one beside the folder.

        Raises:
            ValueError: Files are missing, the weights do not fit, no UNet is to be found, or the reader is another.
        """
        root = Path(folder)
        config = load_config(root, expected_class=CLASS_NAME)
        if unet is None:
            candidates = [place for place in (root / "unet", root.parent / "unet") if place.is_dir()]
            if not candidates:
                raise ValueError(f"{root} refers to a UNet that is neither in it nor beside it; pass unet=...")
            unet = load_unet(candidates[0])
        lora = cast("dict[str, JsonValue] | None", config["lora"])
        state = load_tensors(root / WEIGHTS_NAME)
        decoder = cls(
            unet,
            code_dim=cast(int, config["code_dim"]),
            scheduler_config=cast("dict[str, JsonValue]", config["scheduler"]),
            embedding_channels=cast("list[int]", config["embedding_channels"]),
            resize=cast(Resize, config["resize"]),
            conditioning_scale=cast(float, config["conditioning_scale"]),
            pixels_per_latent=cast(int, config["pixels_per_latent"]),
            null_embeds=torch.zeros(cast(int, config["null_length"]), int(unet.config.cross_attention_dim)),
            lora=None if lora is None else LoraSettings.from_json(lora),
        )
        if (name := cast("str | None", config.get("reader"))) is not None:
            decoder.listen_to(read_codes(reader, beside=root, name=name), name=name)
            require_reader(decoder, cast("list[str]", config.get("reader_fingerprints")), source=root)
        if (channels := cast("int | None", config.get("shortcut"))) is not None:
            decoder.cut_short(channels)
        decoder.to(dtype=unet.dtype)
        decoder.load_branch_state_dict(state, source=root / WEIGHTS_NAME)
        return decoder.eval()


def read_codes(folder: str | Path | None, *, beside: Path, name: str = READER) -> CodeReader:
    """The reader of a decoder, from the light decoder's folder or the one of that name beside the decoder's own.

    Raises:
        ValueError: If it is not there.
    """
    place = Path(folder) if folder is not None else beside.parent / name
    if not place.is_dir():
        raise ValueError(f"{beside} listens to the decoder {name!r}: {place} is missing")
    return CodeReader.from_pretrained(place)


def require_reader(network: LADD, wanted: Sequence[str] | None, *, source: Path | str) -> None:
    """Refuse weights that learnt by another reader than a network has.

    Args:
        network: The network.
        wanted: Fingerprints of the reader that the weights learnt by; None if they know none.
        source: Of the weights, for the message.

    Raises:
        ValueError: With both fingerprints.
    """
    own = None if network.reader is None else network.reader.fingerprints()
    if own is not None and wanted and not set(own) & set(wanted):
        raise ValueError(
            f"{source} learnt by another {network.reader_name!r} decoder: the fingerprint of this one's reader is "
            f"{own[0]}, not {' or '.join(wanted)}"
        )
