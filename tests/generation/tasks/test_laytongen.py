from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from laytongen_parts import CODES, SIZE, TOKENS, tiny_text_encoder, tiny_tokenizer, tiny_transformer
from torch.nn import functional as F
from torch.optim import AdamW

from generation.data.source import TokenShards
from generation.data.tokenizing import TokenizeJob, tokenize_dataset
from generation.generator import TokenizerFacts, load_generator
from generation.tasks.foresight import AnswerHead, Foresight
from generation.tasks.laytongen import LaytonGenTask, untold
from layton.data.loader import collate
from layton.data.sources import ScenesSource
from layton.data.windows import ObjectWindows
from layton.scenes import AHEAD_SIZES


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and tokens of eight scenes."""
    root = tmp_path_factory.mktemp("parts")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(root / "tokenizer")
    source = ScenesSource(split="train", length=8, size=SIZE)
    tokenize_dataset(TokenizeJob(source, tokenizer, "scenes", text_encoder=tiny_text_encoder()), root / "tokens")
    return root


def task_of(place: Path, *, trainable: bool = True, dropout: float = 0.1, **options: Any) -> LaytonGenTask:
    return LaytonGenTask(
        tiny_transformer(dropout=dropout),
        tiny_text_encoder(trainable=trainable),
        optimizer=lambda parameters: AdamW(parameters, lr=3e-3),
        tokenizer=str(place / "tokenizer"),
        **options,
    )


def batch_of(place: Path, *, use_text: bool = False, ahead: bool = False) -> dict[str, Any]:
    tokens = TokenShards(str(place / "tokens"), use_text=use_text, ahead=ahead)
    return collate([tokens.sample(index, seed=0) for index in range(8)])


def test_it_learns_eight_images_by_their_captions(place: Path) -> None:
    task, batch = task_of(place, caption_dropout=0.0).train(), batch_of(place)
    optimizer = AdamW(task.trainable_parameters(), lr=3e-3)
    before = task.validation_step(batch, 0).item()
    for _ in range(40):
        optimizer.zero_grad()
        task.training_step(batch, 0).backward()
        optimizer.step()
    task.eval()
    after = task.validation_step(batch, 0).item()
    swapped = task.validation_step({**batch, "caption": batch["caption"][::-1]}, 0).item()
    assert after < before - 0.5
    assert swapped > after + 0.05  # the caption tells which image it is


def test_codes_are_the_same_from_images_and_from_shards(place: Path) -> None:
    task, batch = task_of(place), batch_of(place)
    source = ScenesSource(split="train", length=8, size=SIZE)
    images = torch.stack([source.sample(index, seed=0)["image"] for index in range(8)])
    assert task.codes_of({"image": images}).equal(batch["codes"])


def test_a_frozen_encoder_is_no_part_of_checkpoints_and_its_cache_counts(place: Path) -> None:
    task = task_of(place, trainable=False).eval()
    assert not any("text" in name for name in task.state_dict())
    assert any("text" in name for name in task_of(place).state_dict())
    now, cached = (task.validation_step(batch_of(place, use_text=use), 0) for use in (False, True))
    torch.testing.assert_close(now, cached, atol=2e-3, rtol=2e-3)
    task.require_shards(TokenShards(str(place / "tokens")))
    with pytest.raises(ValueError, match="this one learns"):
        task_of(place).require_shards(TokenShards(str(place / "tokens")))


def test_shards_of_another_tokenizer_are_refused_inside_windows_too(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, shards = task_of(place), TokenShards(str(place / "tokens"), use_text=False)
    source = ObjectWindows(shards, side=1)
    task._trainer = cast(Any, SimpleNamespace(datamodule=SimpleNamespace(train=[source])))
    task.setup("fit")
    header = shards.header
    monkeypatch.setattr(shards, "header", replace(header, fingerprint="another"))
    with pytest.raises(ValueError, match="another tokenizer"):
        task.setup("fit")
    monkeypatch.setattr(shards, "header", replace(header, encoder="another"))
    with pytest.raises(ValueError, match=r"another tokenizer \(encoder: stored"):
        task.setup("fit")


def test_missing_samples_count_nothing(place: Path) -> None:
    task, batch = task_of(place).eval(), batch_of(place)
    half = {name: value[:4] for name, value in batch.items()}
    other = {**batch, "codes": batch["codes"].clone(), "valid": torch.arange(8) < 4}
    other["codes"][4:] = 0
    torch.testing.assert_close(task.validation_step(other, 0), task.validation_step(half, 0))
    each = {**other, "valid": other["valid"][:, None].expand(8, TOKENS)}  # said of every code
    torch.testing.assert_close(task.validation_step(each, 0), task.validation_step(half, 0))


def test_codes_that_are_no_images_are_refused(place: Path) -> None:
    task, batch = task_of(place), batch_of(place)
    for length in (TOKENS - 1, TOKENS + 1):
        wrong = {**batch, "codes": torch.zeros(8, length, dtype=torch.long)}
        with pytest.raises(ValueError, match=rf"codes must be \(B, {TOKENS}\), got \(8, {length}\)"):
            task.training_step(wrong, 0)
    with pytest.raises(ValueError, match=r"codes must be in \[0, \d+\], got -1 to"):
        task.training_step({**batch, "codes": batch["codes"] - batch["codes"].min() - 1}, 0)


def test_an_empty_caption_is_no_caption(place: Path) -> None:
    task, batch = task_of(place).eval(), batch_of(place)
    few = {name: value[:2] for name, value in batch.items()}
    silent = {**few, "caption": ["", ""]}
    unspoken = task._hidden(few["codes"], task.text_of(silent), untold(silent), None)
    text = task.text_encoder.encode(["", ""])
    null = task.transformer.hidden(few["codes"], task.transformer.null_condition(text.features), text.mask)
    torch.testing.assert_close(unspoken, null)


def test_padding_that_all_captions_have_is_not_computed_and_changes_nothing(place: Path) -> None:
    task, batch = task_of(place).eval(), batch_of(place)
    text = task.text_of(batch)
    assert not bool(text.mask[:, 0].any())  # there is such padding here
    whole = task.transformer.hidden(batch["codes"], text.features, text.mask)
    torch.testing.assert_close(task._hidden(batch["codes"], text, torch.zeros(8, dtype=torch.bool), None), whole)
    seen: list[int] = []
    task.transformer.prefix.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    task._hidden(batch["codes"], text, torch.zeros(8, dtype=torch.bool), None)
    assert seen == [int(text.mask.sum(1).max())] and seen[0] < text.mask.shape[1]


def test_dropout_is_the_same_after_a_resume_and_changes_what_is_fed(place: Path) -> None:
    options: dict[str, Any] = {"caption_dropout": 0.5, "code_dropout": 0.5}
    first, second = task_of(place, **options), task_of(place, **options)
    first.transformer.eval(), second.transformer.eval()
    batch = batch_of(place)
    assert first.training_step(batch, 0).equal(second.training_step(batch, 0))
    plain = task_of(place, caption_dropout=0.0)
    plain.transformer.eval()
    assert not plain.training_step(batch, 0).equal(first.training_step(batch, 0))


def test_pictures_and_export(place: Path, tmp_path: Path) -> None:
    task, batch = task_of(place).eval(), batch_of(place)
    rows = task.picture_grid(batch)
    assert {name: tuple(row.shape) for name, row in rows.items()} == dict.fromkeys(
        ("tokens", "generated"), (8, 3, SIZE, SIZE)
    )
    task.export(tmp_path / "export")
    loaded = load_generator(tmp_path / "export")
    assert loaded.card.tokenizer == task.facts
    codes = torch.randint(CODES, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    text = loaded.text_encoder.encode(["a star"])
    torch.testing.assert_close(
        loaded.transformer(codes, text.features, text.mask), task.transformer(codes, text.features, text.mask)
    )


def test_parts_that_do_not_fit_are_refused(place: Path) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        task_of(place, caption_dropout=1.0)
    wide = tiny_text_encoder(trainable=True)
    wide.width = 17
    with pytest.raises(ValueError, match="the text encoder gives"):
        LaytonGenTask(tiny_transformer(), wide, optimizer=AdamW, tokenizer=str(place / "tokenizer"))
    other = place / "other"
    tiny_tokenizer(seed=1).save_pretrained(other)
    task = task_of(place)
    task_other = LaytonGenTask(tiny_transformer(), tiny_text_encoder(), optimizer=AdamW, tokenizer=str(other))
    task.require_shards(TokenShards(str(place / "tokens"), use_text=False))
    with pytest.raises(ValueError, match="another tokenizer"):
        task_other.require_shards(TokenShards(str(place / "tokens")))


def test_a_checkpoint_names_its_tokenizer_and_another_one_is_refused(place: Path, tmp_path: Path) -> None:
    task = task_of(place)
    checkpoint: dict[str, Any] = {"state_dict": task.state_dict()}
    task.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "c.ckpt")
    stored = torch.load(tmp_path / "c.ckpt", weights_only=True)  # plain values alone
    assert stored["tokenizer_facts"] == asdict(TokenizerFacts.of(tiny_tokenizer()))
    task_of(place).on_load_checkpoint(stored)

    tiny_tokenizer(seed=1).save_pretrained(tmp_path / "other")
    other = LaytonGenTask(tiny_transformer(), tiny_text_encoder(), optimizer=AdamW, tokenizer=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"another tokenizer \(fingerprint: stored '\w{16}', wanted '\w{16}'\)"):
        other.on_load_checkpoint(stored)
    for name, value in stored["tokenizer_facts"].items():
        changed = {**stored["tokenizer_facts"], name: "0" * 16 if isinstance(value, str) else value + 1}
        with pytest.raises(ValueError, match=f"another tokenizer \\({name}: stored"):
            task_of(place).on_load_checkpoint({**stored, "tokenizer_facts": changed})


def test_a_checkpoint_names_its_frozen_text_encoder(place: Path) -> None:
    checkpoints: list[dict[str, Any]] = [{"state_dict": {}}, {"state_dict": {}}]
    task_of(place, trainable=False).on_save_checkpoint(checkpoints[0])
    task_of(place).on_save_checkpoint(checkpoints[1])
    task_of(place, trainable=False).on_load_checkpoint(checkpoints[0])
    task_of(place).on_load_checkpoint(checkpoints[1])
    for checkpoint in ({**checkpoints[0], "frozen_text_encoder": "0" * 16}, checkpoints[1]):
        with pytest.raises(ValueError, match="another frozen text encoder"):
            task_of(place, trainable=False).on_load_checkpoint(checkpoint)


def test_a_checkpoint_that_names_no_tokenizer_is_refused(place: Path) -> None:
    with pytest.raises(ValueError, match="fingerprint: stored None, wanted"):
        task_of(place).on_load_checkpoint({"state_dict": {}})


def test_contrast_asks_more_of_images_with_a_false_caption_alone(place: Path) -> None:
    task = task_of(place, caption_dropout=0.0, contrast=0.5, dropout=0.0).train()
    plain = task_of(place, caption_dropout=0.0, dropout=0.0).train()
    batch = batch_of(place)
    false = [*batch["caption"][1:5], "", "", "", ""]
    with torch.no_grad():
        base = plain.training_step(batch, 0)
        surprise = []
        for row in range(4):
            true, other = (
                plain.transformer(batch["codes"][row : row + 1], text.features, text.mask)
                for text in (plain.text_encoder.encode([said]) for said in (batch["caption"][row], false[row]))
            )
            target = batch["codes"][row]
            surprise.append(
                F.cross_entropy(true[0], target, reduction="sum") - F.cross_entropy(other[0], target, reduction="sum")
            )
        expected = base + 0.5 * F.softplus(torch.stack(surprise)).mean()
        torch.testing.assert_close(task.training_step({**batch, "contrary": false}, 0), expected, atol=1e-5, rtol=1e-5)
        none = task.training_step({**batch, "contrary": [""] * 8}, 0)
        torch.testing.assert_close(none, base)
        there = torch.tensor([True, True] + [False] * 6)
        some = task.training_step({**batch, "contrary": false, "valid": there}, 0)
        more = 0.5 * F.softplus(torch.stack(surprise[:2])).mean()
        torch.testing.assert_close(some, plain.training_step({**batch, "valid": there}, 0) + more, atol=1e-5, rtol=1e-5)
        # a batch without false captions takes those of other images
        assert task.training_step(batch, 0) > base
    with pytest.raises(ValueError, match=r"contrast must be >= 0, got -1"):
        task_of(place, contrast=-1)
    with pytest.raises(ValueError, match=r"must be 0, got 0\.1, 0\.0"):
        task_of(place, contrast=1, label_smoothing=0.1, dropout=0.0)


def test_foresight_learns_what_is_ahead_and_leaves_nothing_behind(place: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = task_of(place, caption_dropout=0.0, dropout=0.0, foresight=Foresight(AHEAD_SIZES, block=0, weight=0.5))
    plain, batch = task_of(place, caption_dropout=0.0, dropout=0.0), batch_of(place, ahead=True)
    terms, weights = task.train().supervised_terms(batch)
    assert terms["cross_entropy"].equal(plain.train().supervised_terms(batch)[0]["cross_entropy"])
    assert weights == {"foresight": 0.5}
    optimizer = AdamW(task.trainable_parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        task.training_step(batch, 0).backward()
        optimizer.step()
    after = task.supervised_terms(batch)[0]["foresight"]
    assert after < 0.5 * terms["foresight"]
    task.export(tmp_path / "export")
    assert load_generator(tmp_path / "export").transformer.state_dict().keys() == plain.transformer.state_dict().keys()


def test_foresight_is_not_asked_of_images_without_a_caption(place: Path) -> None:
    task = task_of(place, caption_dropout=0.0, dropout=0.0, foresight=Foresight(AHEAD_SIZES, block=0)).train()
    batch = batch_of(place, ahead=True)
    first = {name: value[:4] for name, value in batch.items()}
    wanted = task.supervised_terms(first)[0]["foresight"]
    silent = {**batch, "caption": [*batch["caption"][:4], *[""] * 4]}
    torch.testing.assert_close(task.supervised_terms(silent)[0]["foresight"], wanted)
    missing = {**batch, "valid": torch.arange(8) < 4}
    torch.testing.assert_close(task.supervised_terms(missing)[0]["foresight"], wanted)
    missing["valid"] = missing["valid"][:, None].expand(8, TOKENS)
    torch.testing.assert_close(task.supervised_terms(missing)[0]["foresight"], wanted)


def test_foresight_that_cannot_be_is_refused(place: Path) -> None:
    task = task_of(place, foresight=Foresight(AHEAD_SIZES, block=0))
    with pytest.raises(ValueError, match="give TokenShards ahead: true"):
        task.training_step(batch_of(place), 0)
    blocks = len(task.transformer.blocks)
    with pytest.raises(ValueError, match=f"the transformer has {blocks} blocks"):
        task_of(place, foresight=Foresight(AHEAD_SIZES, block=blocks))
    for arguments in (((), 0, 0.3), ((1,), 0, 0.3), ((6,), -1, 0.3), ((6,), 0, 0.0)):
        with pytest.raises(ValueError, match="need answers"):
            Foresight(*arguments)
    with pytest.raises(ValueError, match=r"need answers \(2, 3, 1\), got \(2, 3, 2\)"):
        AnswerHead(4, (6,))(torch.zeros(2, 3, 4), torch.zeros(2, 3, 2, dtype=torch.int64))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler looks at .grad of tensors that have none
def test_compiled_blocks_learn_and_export_the_same(place: Path, tmp_path: Path) -> None:
    batch, losses = batch_of(place), []
    for compiled in (False, True):
        task = task_of(place, dropout=0.0, caption_dropout=0.0, compile_blocks=compiled).train()
        optimizer = AdamW(task.trainable_parameters(), lr=3e-3)
        for _ in range(3):
            optimizer.zero_grad()
            loss = task.training_step(batch, 0)
            loss.backward()
            optimizer.step()
        task.eval()
        text = task.text_of(batch)
        losses.append(
            [loss.item(), task.validation_step(batch, 0).item(), float(task.draw(text, list(range(8))).sum())]
        )
        task.export(tmp_path / str(compiled))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    plain, compiled_too = (load_generator(tmp_path / name).transformer.state_dict() for name in ("False", "True"))
    assert plain.keys() == compiled_too.keys()
    for name, value in plain.items():
        torch.testing.assert_close(value, compiled_too[name], rtol=1e-3, atol=1e-4)
