"""Images among the words of a language model: there and back, whole, and nothing else disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from laytongen_parts import CODES, TOKENS, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from generation.llm import ImageVocabulary, WholeImages, make_room

WIDTH = 16


def text_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and a few merges: any text can be said."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(["a red star"], trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")  # noqa: S106


def language_model(size: int, *, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size,
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    ).eval()


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    return text_tokenizer()


def codes(seed: int) -> torch.Tensor:
    return torch.randint(CODES, (TOKENS,), generator=torch.Generator().manual_seed(seed))


def test_texts_and_images_come_back_in_their_order(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    before = len(words)
    known = ImageVocabulary.add_to(words, tiny_tokenizer())
    assert (len(words), known.size) == (before + CODES + 2, before + CODES + 2)
    assert ImageVocabulary.add_to(words, tiny_tokenizer()) == known and len(words) == known.size  # once
    parts = ["A red star: ", codes(1), codes(2), "und ein 星, <image> <code_3></image> in words.", codes(3)]
    ids = known.join(parts, words)
    assert sum(each == known.begin for each in ids) == 3  # what reads like an image is none
    assert (
        known.join([part.to(torch.uint16) if isinstance(part, torch.Tensor) else part for part in parts], words) == ids
    )
    for given in (ids, torch.tensor([words.bos_token_id, *ids, words.eos_token_id])):
        back = known.split(given, words)
        assert len(back) == len(parts)
        for left, right in zip(parts, back, strict=True):
            assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
    words.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert ImageVocabulary.add_to(again, tiny_tokenizer()) == known and known.join(parts, again) == ids


def test_marks_may_be_others_than_a_model_has_a_use_for(words: PreTrainedTokenizerFast) -> None:
    words.add_tokens(["<image>"], special_tokens=True)
    known = ImageVocabulary.add_to(words, tiny_tokenizer(), begin="<picture>", end="</picture>")
    assert known.begin == words.convert_tokens_to_ids("<picture>") != words.convert_tokens_to_ids("<image>")
    (back,) = known.split(known.join([codes(1)], words), words)
    assert isinstance(back, torch.Tensor) and torch.equal(back, codes(1))
    with pytest.raises(ValueError, match="must differ"):
        ImageVocabulary.add_to(words, tiny_tokenizer(), begin="<x>", end="<x>")


def test_a_mark_that_a_tokenizer_knew_keeps_its_row(words: PreTrainedTokenizerFast) -> None:
    words.add_tokens(["<image>", "later"], special_tokens=True)
    model = language_model(len(words))
    own = model.get_input_embeddings().weight.detach().clone()
    known = ImageVocabulary.add_to(words, tiny_tokenizer())
    assert known.begin == len(own) - 2
    make_room(model, known, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.get_input_embeddings().weight[: len(own)], own)


def test_images_that_are_not_whole_are_refused(words: PreTrainedTokenizerFast) -> None:
    known = ImageVocabulary.add_to(words, tiny_tokenizer())
    ids = known.ids(codes(1)[None])[0].tolist()
    for wrong in (ids[:-1], [*ids[:3], 5, *ids[4:]], [*ids[:-1], 7]):
        with pytest.raises(ValueError, match="begins at place 0 is not"):
            known.split(wrong, words)
    for wrong in ([5, known.end], [known.offset]):
        with pytest.raises(ValueError, match="none has begun"):
            known.split(wrong, words)
    with pytest.raises(ValueError, match="codes must be"):
        known.ids(codes(1)[None, :-1])
    with pytest.raises(ValueError, match="must lie in"):
        known.ids(torch.full((1, TOKENS), CODES))
    words.add_tokens([f"<code_{CODES}>"], special_tokens=True)
    with pytest.raises(ValueError, match="codes of its own"):
        ImageVocabulary.add_to(words, tiny_tokenizer())


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_makes_room_and_stays_what_it_was(words: PreTrainedTokenizerFast, tied: bool) -> None:
    before = len(words)
    model = language_model(before, tied=tied)
    text = torch.tensor([words("a red star")["input_ids"]])
    with torch.no_grad():
        said = model(text).logits
    known = ImageVocabulary.add_to(words, tiny_tokenizer())
    codebook = torch.randn(CODES, 4, generator=torch.Generator().manual_seed(1))
    codebook[1] = codebook[0] + 0.01
    make_room(model, known, generator=torch.Generator().manual_seed(0), codebook=codebook)
    table = model.get_input_embeddings().weight.detach()
    assert (
        table.shape[0] == known.size
        and (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    )
    with torch.no_grad():
        torch.testing.assert_close(model(text).logits[..., :before], said)
    new = table[known.offset :]
    assert 0.5 < float(new.std() / table[:before].std()) < 2
    near, far = (float((new[0] - new[other]).norm()) for other in (1, 2))
    assert near < 0.1 * far  # codes that look alike begin alike
    once = table.clone()
    make_room(model, ImageVocabulary.add_to(words, tiny_tokenizer()), generator=torch.Generator().manual_seed(7))
    assert torch.equal(model.get_input_embeddings().weight, once)  # what it may have learnt by now stays
    again = language_model(before, tied=tied)
    make_room(again, known, generator=torch.Generator().manual_seed(0), codebook=codebook)
    assert torch.equal(again.get_input_embeddings().weight, table)
    with pytest.raises(ValueError, match="codebook must be"):
        make_room(again, known, generator=torch.Generator(), codebook=codebook[:-1])


def test_a_model_learns_and_writes_whole_images(words: PreTrainedTokenizerFast) -> None:
    """It learns one image by heart from joined text, as any language model would, and writes it when asked."""
    tokenizer = tiny_tokenizer()
    known = ImageVocabulary.add_to(words, tokenizer)
    model = language_model(known.size)
    wanted = codes(5)
    ids = torch.tensor([known.join(["a red star", wanted], words)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    prompt = torch.tensor([[*known.join(["a red star"], words), known.begin]])
    whole = [WholeImages(known)]
    found = model.generate(prompt, max_new_tokens=TOKENS + 1, do_sample=False, logits_processor=whole)
    text, image = known.split(found[0], words)
    assert text == "a red star" and torch.equal(image, wanted)
    assert tokenizer.decode(image[None]).shape[0] == 1


def test_whatever_a_model_would_write_images_are_whole(words: PreTrainedTokenizerFast) -> None:
    known = ImageVocabulary.add_to(words, tiny_tokenizer())
    model = language_model(known.size)
    with torch.no_grad():
        model.get_output_embeddings().weight[known.begin] *= 20  # it likes to begin
    torch.manual_seed(1)
    prompt = torch.tensor([words("a red star")["input_ids"]] * 4)
    length = 3 * (TOKENS + 2)
    found = model.generate(prompt, max_new_tokens=length, do_sample=True, logits_processor=[WholeImages(known)])
    images = 0
    for row in found.tolist():
        last = len(row) - 1 - row[::-1].index(known.begin) if known.begin in row else len(row)
        whole = row if len(row) - last >= TOKENS + 2 else row[:last]  # one may be under way at the end
        images += sum(isinstance(part, torch.Tensor) for part in known.split(whole, words))
    assert images >= 3


def test_rows_of_images_begin_anew_where_the_tokenizer_knew_them_and_the_model_did_not(
    words: PreTrainedTokenizerFast,
) -> None:
    ImageVocabulary.add_to(words, tiny_tokenizer())
    known = ImageVocabulary.add_to(words, tiny_tokenizer())  # as loaded again: all of it was there before
    model = language_model(known.size - 5)
    before = model.get_input_embeddings().weight.detach().clone()
    make_room(model, known, generator=torch.Generator().manual_seed(0))
    after = model.get_input_embeddings().weight.detach()
    assert torch.equal(after[: known.begin], before[: known.begin])
    assert not (after[known.begin : len(before)] == before[known.begin :]).all(1).any()


def test_nobody_has_to_guess_whether_a_model_has_learnt_images(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    first = ImageVocabulary.add_to(words, tiny_tokenizer())
    known = ImageVocabulary.add_to(words, tiny_tokenizer())
    model = language_model(known.size + 3)  # spare rows enough
    with pytest.raises(ValueError, match="say learnt=True"):
        make_room(model, known, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.get_input_embeddings().weight[known.begin :] = 0.0
    make_room(model, known, generator=torch.Generator().manual_seed(0), learnt=False)
    rows = model.get_input_embeddings().weight.detach().clone()
    assert rows[known.begin : known.size].abs().amax(1).min() > 0
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for vocabulary in (first, known):  # as in a later run, and the first one's again
        make_room(again, vocabulary, generator=torch.Generator().manual_seed(1))
        assert torch.equal(again.get_input_embeddings().weight, rows)
    bare = language_model(known.size)
    make_room(bare, known, generator=torch.Generator().manual_seed(0), learnt=True)
    make_room(bare, known, generator=torch.Generator().manual_seed(0))  # which it has noted
    other = ImageVocabulary(known.begin, known.end, known.offset, known.vocab_size - 1, TOKENS)
    with pytest.raises(ValueError, match="images of other ids"):
        make_room(again, other, generator=torch.Generator().manual_seed(0))


def test_special_tokens_come_in_where_that_is_asked_for(words: PreTrainedTokenizerFast) -> None:
    words.add_special_tokens({"eos_token": "</s>"})
    known = ImageVocabulary.add_to(words, tiny_tokenizer())
    text = "a red star</s><image><code_3>"
    plain, special = known.join([text], words), known.join([text, codes(1)], words, special=True)
    assert words.eos_token_id not in plain and special.count(words.eos_token_id) == 1
    assert special.count(known.begin) == 1 and known.offset + 3 not in special[: -TOKENS - 2]
    assert known.split(special, words)[0] == "a red star<image><code_3>"
    for wrong in (torch.full((1, TOKENS), 1.7), torch.ones(1, TOKENS, dtype=torch.bool)):
        with pytest.raises(ValueError, match="codes must be integers"):
            known.ids(wrong)


def test_what_is_no_list_of_texts_and_codes_is_refused(words: PreTrainedTokenizerFast) -> None:
    known = ImageVocabulary.add_to(words, tiny_tokenizer())
    with pytest.raises(ValueError, match="list of texts and codes"):
        known.join("a red star", words)
    with pytest.raises(ValueError, match="those of one text"):
        known.split(torch.zeros(2, 3, dtype=torch.int64), words)
    assert known.join(["a", codes(1).tolist()], words) == known.join(["a", codes(1)], words)
