from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from laytongen_parts import LENGTH, WIDTH, WORDS, tiny_text_encoder
from safetensors.torch import load_file, save_file

from generation.data.inputs import JobOptions
from generation.text import loading
from generation.text.encoders import TransformersTextEncoder, pad_left, text_encoder
from generation.text.loading import clean_caption

PROMPTS = [
    "",
    "   ",
    "a red circle",
    "x" * 10_000,
    "a " * 5_000,
    "😀 🎉",
    "一个红色的圆",
    "nul\0",
    "a\nb",
    "\ud800",
    "مرحبا",
]


@pytest.fixture(scope="module")
def encoder() -> TransformersTextEncoder:
    return tiny_text_encoder()


def test_every_prompt_has_a_defined_result(encoder: TransformersTextEncoder) -> None:
    text = encoder.encode(PROMPTS)
    assert text.features.shape == (len(PROMPTS), LENGTH, WIDTH)
    assert bool(text.features.isfinite().all())
    assert [(cut.index, cut.kept, cut.total) for cut in text.cut if cut.index < 5] == [(3, 32, 10_002), (4, 32, 5_002)]
    assert not text.features[~text.mask].any()
    assert text.mask[:, -1].all()  # padded on the left, and no prompt is without a token
    assert int(text.mask[0].sum()) == 2  # the empty prompt: its two special tokens


def test_features_do_not_depend_on_neighbours_or_padding(encoder: TransformersTextEncoder) -> None:
    together = encoder.encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        # to the last bit, of which int8 layers make codes
        assert encoder.encode([prompt]).features[0].equal(together.features[row])
    longer = TransformersTextEncoder(encoder.tokenizer, encoder.model, max_length=8)
    text = longer.encode(["a red circle"])
    torch.testing.assert_close(text.features[0][text.mask[0]], together.features[2][together.mask[2]])


@pytest.mark.parametrize("wrong", [[], "a text alone", [3], [None]], ids=str)
def test_what_is_no_list_of_texts_is_refused(encoder: TransformersTextEncoder, wrong: list[str]) -> None:
    with pytest.raises(ValueError, match="prompts must be"):
        encoder.encode(wrong)


def test_padding_goes_round_to_the_left() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    features = torch.arange(12.0).view(3, 4, 1) * mask[..., None]
    moved, left = pad_left(features, mask)
    assert left.tolist() == [[False, False, True, True], [True] * 4, [False] * 4]
    assert moved[0, :, 0].tolist() == [0, 0, 0, 1]
    assert moved[1].equal(features[1])


def test_saved_and_loaded_it_is_the_same(encoder: TransformersTextEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path / "text", dtype=torch.float16)
    loaded = TransformersTextEncoder.from_pretrained(tmp_path / "text")
    assert loaded.fingerprint() == encoder.fingerprint()  # also after rounding to fp16
    torch.testing.assert_close(loaded.encode(WORDS).features, encoder.encode(WORDS).features, atol=2e-2, rtol=0)
    assert tiny_text_encoder(seed=1).fingerprint() != encoder.fingerprint()
    assert "path" not in (tmp_path / "text" / "model" / "config.json").read_text()
    plain = text_encoder(str(tmp_path / "text"), max_length=12)
    assert plain.max_length == 12
    with pytest.raises(ValueError, match="max_length"):
        text_encoder(str(tmp_path / "text"), max_length=LENGTH + 1)
    with pytest.raises(ValueError, match="no tokenizer"):
        text_encoder(str(tmp_path))


def test_only_a_trainable_encoder_gets_gradients() -> None:
    frozen, learning = tiny_text_encoder(), tiny_text_encoder(trainable=True)
    assert not frozen.encode(["a"]).features.requires_grad
    assert not frozen.train().training
    learning.encode(["a"]).features.square().sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in learning.parameters())


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_encoders_of_other_families(encoder: TransformersTextEncoder, kind: str) -> None:
    import transformers

    size = len(encoder.tokenizer)
    if kind == "t5":
        config = transformers.T5Config(vocab_size=size, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        model = transformers.T5EncoderModel(config)
    else:
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        model = transformers.BertModel(transformers.BertConfig(vocab_size=size, **shape))
    other = TransformersTextEncoder(encoder.tokenizer, model.eval(), name=kind)
    both, alone = other.encode(["a", "two blue stars"]), other.encode(["a"])
    torch.testing.assert_close(both.features[0], alone.features[0])
    assert both.features.shape == (2, LENGTH, 16)


def test_captions_are_cleaned_as_the_released_models_were_and_that_is_saved(
    encoder: TransformersTextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleaned = TransformersTextEncoder(encoder.tokenizer, encoder.model, padding="right", cleaning="deepfloyd").eval()
    given, plain = "<b>A  Red</b> Star", "a red star"
    assert clean_caption(given) == plain and clean_caption(plain) == plain
    assert cleaned.tokenize([given])[0].equal(encoder.tokenize([plain])[0])
    assert (
        cleaned.fingerprint()
        != TransformersTextEncoder(encoder.tokenizer, encoder.model, padding="right").fingerprint()
    )
    cleaned.save_pretrained(tmp_path / "saved")
    for loaded in (TransformersTextEncoder.from_pretrained(tmp_path / "saved"), text_encoder(str(tmp_path / "saved"))):
        assert (loaded.cleaning, loaded.padding, loaded.max_length) == ("deepfloyd", "right", cleaned.max_length)
        assert loaded.fingerprint() == cleaned.fingerprint()
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    asked = JobOptions(text_encoder="x", text_cleaning="deepfloyd")
    for need in (asked.check, lambda: text_encoder(str(tmp_path / "saved"))):
        with pytest.raises(ValueError, match=r"needs bs4 and ftfy: pip install 'layton\[clean\]'"):
            need()
    with pytest.raises(ValueError, match="cleaning"):
        TransformersTextEncoder(encoder.tokenizer, encoder.model, cleaning="soap")  # type: ignore[arg-type]


def bert_folder(encoder: TransformersTextEncoder, folder: Path, *, drop: str | None = None) -> str:
    """What `BertForMaskedLM` saves, which has no pooler, less the weights with ``drop`` in their names."""
    encoder.tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(encoder.tokenizer), **sizes)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if drop is None or drop not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_what_is_not_in_the_folder_is_not_drawn_at_random(encoder: TransformersTextEncoder, tmp_path: Path) -> None:
    first, second = (text_encoder(bert_folder(encoder, tmp_path / "whole")) for _ in range(2))
    again = text_encoder(str(tmp_path / "whole"))
    assert second.fingerprint() == again.fingerprint() != first.fingerprint()  # the first's weights were others
    assert second.model.pooler is None
    again.save_pretrained(tmp_path / "saved")
    assert text_encoder(str(tmp_path / "saved")).fingerprint() == again.fingerprint()
    with pytest.raises(ValueError, match=r"lacks \d+ weights of its text encoder, such as encoder\.layer\.1"):
        text_encoder(bert_folder(encoder, tmp_path / "part", drop="layer.1.attention"))
