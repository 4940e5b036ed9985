"""Trains LaytonGen on tokens: from token shards, or from images that are encoded on the fly."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from distill.held import Held
from generation.data.source import TokenShards, require_layouts
from generation.generator import Generator, GeneratorCard, SamplingDefaults, TokenizerFacts, save_generator
from generation.model.transformer import LaytonGenTransformer
from generation.model.vocabulary import FactoredVocabulary
from generation.planner import LayoutPlanner
from generation.sampling.codes import seeded_generators
from generation.sampling.decoding import generate_codes
from generation.sampling.guidance import Guidance
from generation.tasks.foresight import AnswerHead, Foresight, output_of
from generation.tasks.loss import contrast_loss, mean_of_valid, next_code_losses
from generation.tasks.reading import ReadsText
from generation.text.encoders import TextEncoder, TextFeatures, without_common_padding
from layton import assets
from layton.data.cache import differences
from layton.data.sources import walk
from layton.folder import load_config
from layton.ldm.cache import require_codes
from layton.modules import weights_digest
from layton.tasks.base import LRSchedulerCallable, OptimizerCallable
from layton.tokenizer import CLASS_NAME, LaytonTokenizer

_PREVIEWS = 8
_FACTS = "tokenizer_facts"  # key of checkpoints


class LaytonGenTask(ReadsText):
    """Next-code cross-entropy with caption dropout (LlamaGen, arXiv 2406.06525; LaytonGen, arXiv 2503.08377).

    Batches hold ``caption`` and ``codes`` (B, N) (`generation.data.source.TokenShards`) or ``image`` (B, 3, H, W);
    optionally ``text`` and ``text_mask`` (cached features) and ``valid`` (B,), false for missing samples, which then
    count nothing; with ``positions`` (B, n) the codes are windows (`layton.data.windows.ObjectWindows`). In training
    ``weights`` (B, N) may weigh the codes: weights that depend on nothing but what comes before a code leave the best
    model as it is, and quieten the noise of codes that nobody can foresee. An empty caption trains the unconditional
    model. Images must not be mirrored: captions say "left".

    Args:
        transformer: The generator.
        text_encoder: Its text encoder; learns too if it is trainable.
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the learning-rate schedule.
        tokenizer: Tokenizer folder or embedded one; the exported generator belongs to it for good.
        caption_dropout: Share of captions replaced by "none", for classifier-free guidance.
        label_smoothing: Share of the target spread over all codes.
        code_dropout: Share of the codes fed that are replaced by random ones; targets stay.
        contrast: Weight of `generation.tasks.loss.contrast_loss`, which doubles the work; false captions are the
            batch's ``contrary`` (`generation.data.source.TokenShards`), or without it other images' captions.
        foresight: Also ask the transformer, at every place, what is still to be drawn; batches then hold the answers,
            ``ahead`` (B, N, F) (`generation.data.source.TokenShards`). Not asked when a caption says nothing.
        layout_dropout: Share of the batches' ``layout`` (B, M, F) that the transformer is not told, of images whose
            caption it is told; without a caption it is told none (`generation.model.layout`).
        planner: Goes along with the exported generator, if that is told layouts (`generation.pretrained.planner`); it
            does not learn here.
        sampling: Defaults that are saved with the generator, and of the pictures made while training.
        gradient_checkpointing: Recompute each block in the backward pass instead of keeping its activations.
        compile_blocks: `torch.compile` the blocks for training, which needs a C++ compiler and half a minute. (Drawing
            has packed weights instead, `generation.model.packing`.)

    Raises:
        ValueError: If parts do not fit each other, or a share is not in [0, 1).
    """

    def __init__(
        self,
        transformer: LaytonGenTransformer,
        text_encoder: TextEncoder,
        *,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        tokenizer: str = "mini",
        caption_dropout: float = 0.1,
        label_smoothing: float = 0.0,
        code_dropout: float = 0.0,
        contrast: float = 0.0,
        foresight: Foresight | None = None,
        layout_dropout: float = 0.2,
        planner: LayoutPlanner | None = None,
        sampling: SamplingDefaults | None = None,
        gradient_checkpointing: bool = False,
        compile_blocks: bool = False,
    ) -> None:
        super().__init__(text_encoder, optimizer=optimizer, lr_scheduler=lr_scheduler)
        for share in (caption_dropout, label_smoothing, code_dropout, layout_dropout):
            if not 0.0 <= share < 1.0:
                raise ValueError(f"shares must be in [0, 1), got {share}")
        if contrast < 0:
            raise ValueError(f"contrast must be >= 0, got {contrast}")
        if contrast and (label_smoothing or code_dropout or any(asdict(transformer.dropout).values())):
            raise ValueError(
                "contrast compares two likelihoods of the same codes: label_smoothing, code_dropout and the "
                f"transformer's dropout must be 0, got {label_smoothing}, {code_dropout} and {transformer.dropout} "
                "(of a saved one: generation.pretrained.laytongen_transformer's dropout)"
            )
        self.transformer = transformer
        transformer.gradient_checkpointing = gradient_checkpointing
        if compile_blocks:
            for block in transformer.blocks:
                block.compile()  # in place: names of weights stay
        self._tokenizer = Held(_with_quickest_decoder(tokenizer))
        self.facts = TokenizerFacts.of(self._tokenizer.module)
        self.caption_dropout, self.code_dropout = caption_dropout, code_dropout
        self.label_smoothing, self.contrast = label_smoothing, contrast
        self.layout_dropout = layout_dropout
        self.foresight = foresight
        if foresight is not None:
            if foresight.block >= len(transformer.blocks):
                raise ValueError(f"the transformer has {len(transformer.blocks)} blocks, got {foresight}")
            self.foresight_head = AnswerHead(transformer.width, foresight.sizes)
        self.sampling = sampling or SamplingDefaults()
        self._told_of_cuts, self._codes_seen = False, False
        self._planner = None if planner is None else Held(planner)
        self._check_parts()
        if planner is not None:
            if text_encoder.trainable:
                raise ValueError("a planner reads the text encoder as it is: with one, that must not learn")
            self._generator()  # refuses a planner for another

    @property
    def tokenizer(self) -> LaytonTokenizer:
        """The tokenizer, on the task's device."""
        return self._tokenizer.on(self.device)

    def setup(self, stage: str) -> None:
        """Refuse token shards of another tokenizer and features of another text encoder.

        Raises:
            ValueError: With both fingerprints.
        """
        sources = self.sources()
        control = self.transformer.layout_control
        require_layouts(sources, None if control is None else control.shape)
        for source in walk(sources):
            if isinstance(source, TokenShards):
                self.require_shards(source)
        require_codes(sources, self.facts.fingerprint)

    def require_shards(self, source: TokenShards) -> None:
        """See `setup`."""
        source.require_tokenizer(self.facts.fingerprint, encoder=weights_digest(self._tokenizer.module.encoder))
        stored, wanted = (
            {name: getattr(facts, name) for name in ("vocab_size", "num_tokens", "image_size")}
            for facts in (source.header, self.facts)
        )
        if stored != wanted:
            raise ValueError(f"{source.folder} holds tokens of other sizes ({differences(stored, wanted)})")
        if source.header.text_encoder and "text" in source.sample(0, seed=0):
            found = self.frozen_text()
            if found != source.header.text_encoder:
                raise ValueError(
                    f"{source.folder} holds text features of another text encoder (stored "
                    f"{source.header.text_encoder!r}, wanted {found!r}), or this one learns: pass use_text: false"
                )

    def why_not_sharded(self) -> str | None:
        """Only with `contrast`: a batch may have nothing to contrast on one rank alone."""
        return "contrast is of as many passes as a batch asks for" if self.contrast else None

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch, ()."""
        self.look_at_captions(batch["caption"], lambda caption: self.text_encoder.unread([caption]))
        terms, weights = self.supervised_terms(batch)
        return self.log_losses(terms, weights=weights, batch_size=len(batch["caption"]))

    def supervised_terms(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """What real images' codes teach: terms of the loss (), and the weights of those whose weight is not 1."""
        generator = self.step_generator("dropout", device="cpu")
        codes = self.codes_of(batch)
        dropped = torch.rand(len(codes), generator=generator) < self.caption_dropout
        fed = codes
        if self.code_dropout:
            noise = torch.randint(self.facts.vocab_size, codes.shape, generator=generator)
            replaced = torch.rand(codes.shape, generator=generator) < self.code_dropout
            fed = torch.where(replaced.to(codes.device), noise.to(codes.device), codes)
        text, silent = self.text_of(batch), untold(batch) | dropped
        if text.layout is not None:
            hidden_from = torch.rand(len(codes), generator=generator) < self.layout_dropout
            text = replace(text, layout=self.transformer.drop_layout(text.layout, hidden_from.to(codes.device)))
        asked = self.transformer.blocks[-1 if self.foresight is None else self.foresight.block]
        with output_of(asked) as seen:
            hidden = self._hidden(fed, text, silent, batch.get("positions"))
        losses = self._losses(hidden, codes)
        terms = {"cross_entropy": mean_of_valid(losses, batch.get("valid"), batch.get("weights"))}
        weights: dict[str, float] = {}
        if self.foresight is not None:
            weights["foresight"] = self.foresight.weight
            terms["foresight"] = self._foresight(seen[0][:, -codes.shape[1] :], batch, silent)
        if self.contrast:
            rows = self._contrasted(batch, dropped)
            terms["contrast"] = self._contrast(codes[rows], losses[rows], text, batch, rows)
            weights["contrast"] = self.contrast
        return terms, weights

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Cross-entropy without smoothing and dropout, (); also logs the share of codes guessed right."""
        codes = self.codes_of(batch)
        hidden = self._hidden(codes, self.text_of(batch), untold(batch), batch.get("positions"))
        valid = batch.get("valid")
        vocabulary = self.transformer.vocabulary
        # image by image: the logits of all are large
        likeliest = torch.cat([vocabulary.logits(image).argmax(-1) for image in hidden.split(1)])
        terms = {
            "cross_entropy": mean_of_valid(next_code_losses(vocabulary.linear_head(hidden), codes), valid),
            "accuracy": mean_of_valid((likeliest == codes).float(), valid),
        }
        return self.log_losses(terms, weights={"accuracy": 0.0}, batch_size=len(codes))

    def codes_of(self, batch: dict[str, Any]) -> Tensor:
        """Codes (B, N) int64 of a batch, encoded in fp32 if it holds images."""
        if "codes" in batch:
            return self._checked(batch["codes"].long(), windows="positions" in batch)
        with torch.autocast(self.device.type, enabled=False):
            return self.tokenizer.encode(batch["image"].float())

    def _checked(self, codes: Tensor, *, windows: bool) -> Tensor:
        """Codes that are whole images' (or windows of them); values are looked at once, as that waits for a GPU."""
        facts = self.facts
        if codes.ndim != 2 or not (windows or codes.shape[1] == facts.num_tokens):
            raise ValueError(f"codes must be (B, {facts.num_tokens}), got {tuple(codes.shape)}")
        if not self._codes_seen and codes.numel():
            low, high = (int(value) for value in codes.aminmax())
            if not 0 <= low <= high < facts.vocab_size:
                raise ValueError(f"codes must be in [0, {facts.vocab_size - 1}], got {low} to {high}")
            self._codes_seen = True
        return codes

    def _whole(self, batch: dict[str, Any]) -> Tensor:
        """Codes (B, N) for a preview; around windows stands code 0."""
        codes, positions = self.codes_of(batch), batch.get("positions")
        if positions is None:
            return codes
        return codes.new_zeros(len(codes), self.facts.num_tokens).scatter(1, positions, codes)

    def text_of(self, batch: dict[str, Any]) -> TextFeatures:
        """Text features of a batch: cached ones, or made now; its layouts. Captions that are cut are told once."""
        layout = batch.get("layout")
        if "text" in batch:
            return TextFeatures(batch["text"].float(), batch["text_mask"], layout=layout)
        text = replace(self.text_encoder.encode(batch["caption"]), layout=layout)
        if text.cut and not self._told_of_cuts:
            self._told_of_cuts = True
            rank_zero_warn(f"captions are longer than the text encoder reads; the first: {text.cut[0]}")
        return text

    @torch.no_grad()
    def generate(self, text: TextFeatures, seeds: list[int]) -> Tensor:
        """Images (B, 3, S, S) in [-1, 1] for text features, each from its own seed, by the quickest decoder."""
        with torch.autocast(self.device.type, enabled=False):
            return self.tokenizer.decode(self.draw(text, seeds).clone())

    @torch.no_grad()
    def draw(self, text: TextFeatures, seeds: list[int]) -> Tensor:
        """Codes (B, N) int64 for text features, each image's from its own seed."""
        with torch.autocast(self.device.type, enabled=False):
            return generate_codes(
                self.transformer,
                text.features.float(),
                text.mask,
                generators=seeded_generators(seeds),
                sampling=self.sampling.options(),
                guidance=Guidance(self.sampling.guidance_scale),
                layout=text.layout,
            )

    def picture_grid(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Validation images through their tokens, over images generated from their captions."""
        few = {name: value[:_PREVIEWS] for name, value in batch.items()}
        with torch.autocast(self.device.type, enabled=False):
            tokens = self.tokenizer.decode(self._whole(few))
            text = self.text_of(few)
        return {"tokens": tokens, "generated": self.generate(text, list(range(len(tokens))))}

    def export(self, folder: Path) -> None:
        """Write the generator's folder; see `generation.generator`."""
        save_generator(folder, self._generator())

    def _generator(self) -> Generator:
        encoder = self._text_encoder.module
        planner = None if self._planner is None else self._planner.module.eval()
        card = GeneratorCard(self.facts, self.frozen_text() or encoder.fingerprint(), self.sampling)
        return Generator(self.transformer, encoder, card, planner)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record which tokenizer the codes are of."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_FACTS] = asdict(self.facts)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained on another tokenizer's codes.

        Raises:
            ValueError: With every fact that differs.
        """
        differs = differences(checkpoint.get(_FACTS) or {}, asdict(self.facts))
        if differs:
            raise ValueError(f"the checkpoint was trained with another tokenizer ({differs})")
        super().on_load_checkpoint(checkpoint)

    def _foresight(self, hidden: Tensor, batch: dict[str, Any], silent: Tensor) -> Tensor:
        """Cross-entropy of what the transformer knows to be ahead, of images with captions, ()."""
        if "ahead" not in batch:
            raise ValueError("foresight needs batches that hold 'ahead': give TokenShards ahead: true")
        told = (~silent).to(self.device)
        valid = batch.get("valid")
        if valid is not None:
            told = told & valid.bool() if valid.ndim == 1 else told[:, None] & valid.bool()
        return self.foresight_head(hidden, batch["ahead"], valid=told)

    def _contrasted(self, batch: dict[str, Any], dropped: Tensor) -> Tensor:
        """(B,): images that are there, with a caption, and a false one where the batch brings those."""
        rows = ~(untold(batch) | dropped)
        false = batch["contrary"] if "contrary" in batch else [batch["caption"][-1], *batch["caption"][:-1]]
        rows &= torch.tensor([bool(caption) for caption in false])
        valid = batch.get("valid")
        rows = rows.to(self.device)
        return rows if valid is None else rows & (valid if valid.ndim == 1 else valid.any(1)).bool()

    def _contrast(self, codes: Tensor, true: Tensor, text: TextFeatures, batch: dict[str, Any], rows: Tensor) -> Tensor:
        """`contrast_loss` of the rows (B,) of a batch that are chosen; the first two belong to those rows alone."""
        if not len(codes):
            return true.sum()
        layout = None if text.layout is None else text.layout[rows]  # the two differ in their captions alone
        contrary = replace(self._contrary_text(batch, text, rows), layout=layout)
        positions, valid = batch.get("positions"), batch.get("valid")
        told = torch.zeros(len(codes), dtype=torch.bool)
        hidden = self._hidden(codes, contrary, told, None if positions is None else positions[rows])
        counted = None if valid is None or valid.ndim == 1 else valid[rows]
        return contrast_loss(true, self._losses(hidden, codes), valid=counted)

    def _contrary_text(self, batch: dict[str, Any], text: TextFeatures, rows: Tensor) -> TextFeatures:
        """Features of false captions of rows: the batch's own, or where it brings none, those of the images before."""
        if "contrary" not in batch:
            return TextFeatures(text.features.roll(1, 0)[rows], text.mask.roll(1, 0)[rows])
        said = [caption for caption, chosen in zip(batch["contrary"], rows.tolist(), strict=True) if chosen]
        if "text" not in batch:
            return self.text_encoder.encode(said)
        with torch.autocast(self.device.type, enabled=False):  # as cached ones were made: rounding must not tell
            return self.text_encoder.encode(said)

    def _losses(self, hidden: Tensor, codes: Tensor) -> Tensor:
        head = self.transformer.vocabulary.linear_head(hidden)
        return next_code_losses(head, codes, label_smoothing=self.label_smoothing)

    def _hidden(self, codes: Tensor, text: TextFeatures, dropped: Tensor, positions: Tensor | None) -> Tensor:
        text = without_common_padding(text)
        silent = dropped.to(codes.device)
        condition = self.transformer.drop_condition(text.features, silent)
        layout = None if text.layout is None else self.transformer.drop_layout(text.layout, silent)
        return self.transformer.hidden(codes, condition, text.mask, positions=positions, layout=layout)

    def _check_parts(self) -> None:
        transformer, encoder, facts = self.transformer, self._text_encoder.module, self.facts
        shape = transformer.caption
        if shape is None or shape.dim != encoder.width or shape.length < encoder.max_length:
            raise ValueError(
                f"the transformer takes captions {shape}, the text encoder gives {encoder.max_length} x {encoder.width}"
            )
        if getattr(encoder, "padding", "left") != "left":
            raise ValueError("captions must be padded on the left: their last place predicts the first code")
        if (transformer.vocab_size, transformer.num_tokens) != (facts.vocab_size, facts.num_tokens):
            raise ValueError(
                f"the transformer writes {transformer.num_tokens} of {transformer.vocab_size} codes, "
                f"the tokenizer has {facts.num_tokens} of {facts.vocab_size}"
            )
        vocabulary = transformer.vocabulary
        if isinstance(vocabulary, FactoredVocabulary) and vocabulary.factors.code_dim:
            transformer.set_codebook(self._tokenizer.module.quantizer.codebook)


def untold(batch: dict[str, Any]) -> Tensor:
    """(B,): whose caption is empty, and so "none"."""
    return torch.tensor([not caption for caption in batch["caption"]])


def _with_quickest_decoder(name: str) -> LaytonTokenizer:
    """The tokenizer with the decoder that shows a picture soonest: the light one if there is one."""
    config = load_config(assets.resolve(name), expected_class=CLASS_NAME)
    known = config["decoders"] if isinstance(config["decoders"], dict) else {}
    chosen = "light" if "light" in known else str(config["default_decoder"])
    return LaytonTokenizer.from_pretrained(name, decoders=[chosen] if chosen in known else []).requires_grad_(False)
