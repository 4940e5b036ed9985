"""Class-conditional generation through the border of prompts: each class's name stands for one learnt vector.

A LaytonGen with one caption token and this encoder is LlamaGen's class-conditional model (arXiv 2406.06525), trained
from a run file, sampled and guided as any other; its prompts are the names.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Self, cast

import torch
from torch import nn

from generation.text.encoders import TextEncoder, TextFeatures
from layton.data.prompts import read_lines
from layton.folder import WEIGHTS_NAME, class_name, load_config, load_tensors, require_match, save_config, save_tensors


class ClassNames(TextEncoder):
    """A table of vectors by name. The empty prompt stands for none, and is zero.

    Args:
        names: Of the classes, all different.
        width: D of their vectors.
        trainable: Let them learn together with the generator.

    Raises:
        ValueError: If there is no name, an empty one, or one twice.
    """

    def __init__(self, names: Sequence[str], width: int, *, trainable: bool = True) -> None:
        super().__init__()
        if isinstance(names, str) or not names or not all(names):
            raise ValueError(f"classes need names, at least one, got {str(list(names))[:80]}")
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ValueError(f"each class needs a name of its own, got {twice[0]!r} more than once")
        if width < 1:
            raise ValueError(f"width must be >= 1, got {width}")
        self.names = tuple(names)
        self.max_length, self.width, self.trainable = 1, width, trainable
        self.name = f"{len(self.names)} classes"
        self._numbers = {"": 0} | {name: number for number, name in enumerate(self.names, start=1)}
        self.table = nn.Embedding(len(self.names) + 1, width, padding_idx=0).requires_grad_(trainable)

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Vectors (B, 1, D) of B names; see `TextEncoder.encode`.

        Raises:
            ValueError: If there is no prompt, or one is no class.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts must be a list of at least one text, got {str(prompts)[:80]!r}")
        unknown = [prompt for prompt in prompts if prompt not in self._numbers]
        if unknown:
            raise ValueError(
                f"{str(unknown[0])[:80]!r} is none of the {len(self.names)} classes, such as {self.names[0]!r}"
            )
        numbers = torch.tensor([self._numbers[prompt] for prompt in prompts], device=self.table.weight.device)
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            features = self.table(numbers)[:, None]
        return TextFeatures(features, torch.ones(features.shape[:2], dtype=torch.bool, device=features.device))

    def fingerprint(self) -> str:
        """See `TextEncoder.fingerprint`."""
        digest = hashlib.sha256(json.dumps(self.names).encode())
        digest.update(self.table.weight.detach().cpu().half().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        dtype = torch.float16 if dtype == torch.bfloat16 else dtype  # the fingerprint counts weights as float16
        save_tensors(Path(folder) / WEIGHTS_NAME, self.state_dict(), dtype=dtype)
        save_config(Path(folder), {"class": class_name(type(self)), "names": list(self.names), "width": self.width})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read what `save_pretrained` wrote, in float32, frozen.

        Raises:
            ValueError: If the folder holds something else.
        """
        root = Path(folder)
        config = load_config(root, expected_class=class_name(cls))
        try:
            found = cls(cast("list[str]", config["names"]), int(str(config["width"])), trainable=False)
        except KeyError as error:
            raise ValueError(f"{folder}: config.json has no {error}") from error
        tensors = load_tensors(root / WEIGHTS_NAME)
        require_match(found.state_dict(), tensors, source=root, target=cls.__name__)
        found.load_state_dict({name: value.float() for name, value in tensors.items()})
        return found.eval()


def class_names(file: str, width: int) -> ClassNames:
    """Classes from a UTF-8 file of one name a line, for run files; the names are the captions of the data.

    Args:
        file: The file; blank lines do not count.
        width: D of their vectors, the ``dim`` of the transformer's ``caption``.

    Raises:
        ValueError: If it cannot be read, or its names are not those of classes.
    """
    return ClassNames([text for _, text in read_lines(Path(file))], width)
