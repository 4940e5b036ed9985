"""What stage 2 changes in a stage-1 network, and how to keep only that.

A distilled decoder shares most of its weights with the decoder it came from. `adapt` makes a part of a network
trainable, by adaptors or as a whole; the `Difference` that it returns names those weights, saves and loads them, and
knows by a fingerprint the one network that they belong to.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from distill.adapters import LoraSettings, add_lora
from layton.control import HEARD, base_state_dict
from layton.folder import (
    WEIGHTS_NAME,
    JsonValue,
    load_config,
    load_tensors,
    read_class,
    require_match,
    weights_hashes,
)
from layton.ladd import LADD, READER, require_reader
from layton.pixel_decoder import CodeReader

Change = Literal["frozen", "lora", "full"]
ADAPTER = "consistency"
_SHORTCUT = "shortcut"


@dataclass(frozen=True, slots=True)
class Adaptation:
    """Which weights of a stage-1 decoder are trained on.

    The paper trains all of its LADD (arXiv 2503.08377, section 3), which is the control branch and a LoRA on the UNet.

    Attributes:
        unet: The latent diffusion model's own UNet.
        branch: The control branch.
        lora: Shape of the adaptors, where there are any; None is rank 64 on the published layers.
        shortcut: Channels of a way from the reader's features straight to the prediction (`LADD.cut_short`), which is
            trained, too; 0 for none. Not in the paper.

    Raises:
        ValueError: If a part is none of the three, ``shortcut`` is negative, or nothing would be trained.
    """

    unet: Change = "lora"
    branch: Change = "full"
    lora: LoraSettings | None = None
    shortcut: int = 0

    def __post_init__(self) -> None:
        if not {self.unet, self.branch} <= set(get_args(Change)):
            raise ValueError(f"parts must be one of {get_args(Change)}, got unet {self.unet!r}, branch {self.branch!r}")
        if self.shortcut < 0:
            raise ValueError(f"shortcut must be >= 0, got {self.shortcut}")
        if self.unet == self.branch == "frozen" and not self.shortcut:
            raise ValueError("with unet and branch both frozen, and no shortcut, there is nothing to train")

    @property
    def adapters(self) -> LoraSettings:
        """Shape of the adaptors."""
        return LoraSettings() if self.lora is None else self.lora

    def parts(self) -> dict[str, Change]:
        """What happens to each part of a `LADD`."""
        found: dict[str, Change] = {"unet": self.unet, "controlnet": self.branch}
        return found | {_SHORTCUT: "full"} if self.shortcut else found


@dataclass(frozen=True, slots=True)
class Difference:
    """Record of how a network came from another one.

    Attributes:
        base: Name of the decoder, beside this one, that it came from.
        fingerprints: Of that decoder's UNet and branch, see `fingerprints`, and of the reader.
        adaptation: What was changed.
        reader: Name of the light decoder, beside this one, that it listens to and its base does not.
    """

    base: str
    fingerprints: Mapping[str, tuple[str, ...]]
    adaptation: Adaptation
    reader: str | None = None

    def tensors(self, network: LADD) -> dict[str, Tensor]:
        """The changed weights of an adapted network by name; LoRA keys look like ``unet.X.lora_A.weight``."""
        parts = self.adaptation.parts()
        chosen: dict[str, Tensor] = {}
        for name, parameter in network.named_parameters():
            change = parts.get(name.partition(".")[0], "frozen")
            heard = self.reader is not None and name.startswith(HEARD)
            if change == "full" or (change == "lora" and ".lora_" in name) or heard:
                chosen[name.replace(f".{ADAPTER}.", ".")] = parameter
        return chosen

    @torch.no_grad()
    def load(self, network: LADD, tensors: Mapping[str, Tensor], *, source: Path | str) -> None:
        """Put what `tensors` gave into a network that was adapted alike.

        Raises:
            ValueError: If names or shapes do not match; all that do not are listed.
        """
        own = self.tensors(network)
        require_match(own, tensors, source=source, target="this decoder")
        for name, parameter in own.items():
            parameter.copy_(tensors[name])

    def to_json(self) -> dict[str, JsonValue]:
        """The record as JSON values."""
        record: dict[str, JsonValue] = {
            "base": self.base,
            "fingerprints": {part: list(found) for part, found in self.fingerprints.items()},
            "unet": self.adaptation.unet,
            "branch": self.adaptation.branch,
            "lora": self.adaptation.adapters.to_json(),
        }
        record |= {"shortcut": self.adaptation.shortcut} if self.adaptation.shortcut else {}
        return record if self.reader is None else record | {"reader": self.reader}

    @classmethod
    def from_json(cls, values: Mapping[str, JsonValue]) -> Difference:
        """The record that `to_json` gave."""
        adaptation = Adaptation(
            unet=cast(Change, values["unet"]),
            branch=cast(Change, values["branch"]),
            lora=LoraSettings.from_json(cast("dict[str, JsonValue]", values["lora"])),
            shortcut=cast(int, values.get("shortcut", 0)),
        )
        saved = cast("dict[str, list[str]]", values["fingerprints"])
        prints = {part: tuple(found) for part, found in saved.items()}
        return cls(str(values["base"]), prints, adaptation, cast("str | None", values.get("reader")))

    def resume(self, network: LADD, folder: Path) -> None:
        """Go on from the finished weights of a decoder that was adapted alike.

        It may have had no reader yet, and no shortcut.

        Raises:
            ValueError: They do not fit, or learnt by another reader.
        """
        weights = folder / WEIGHTS_NAME
        config = load_config(folder, expected_class=read_class(folder))
        saved = cast("dict[str, JsonValue] | None", config.get("difference"))
        learnt = {} if saved is None else self.from_json(saved).fingerprints
        require_reader(network, learnt.get("reader"), source=weights)
        own = self.tensors(network)
        begun = {name: value for name, value in own.items() if name.startswith((HEARD, f"{_SHORTCUT}."))}
        self.load(network, begun | load_tensors(weights), source=weights)

    def apply(self, network: LADD, weights: Path, *, reader: CodeReader | None = None) -> None:
        """Turn the base network into the changed one, in place, from a file of `tensors`.

        Args:
            network: The base.
            weights: The file.
            reader: What it listens to, if it does.

        Raises:
            ValueError: If it is not the network, or reader, that the weights were trained on, or they do not fit.
        """
        for part, found in fingerprints(network, reader).items():
            if not set(found) & set(self.fingerprints.get(part, ())):
                raise ValueError(
                    f"{weights} was trained on another {self.base!r} decoder: the fingerprint of this one's {part} is "
                    f"{found[0]}, not {' or '.join(self.fingerprints.get(part, ('any',)))}"
                )
        adapt(network, self.adaptation, base=self.base, reader=reader)
        self.load(network, load_tensors(weights), source=weights)


def adapt(
    network: LADD,
    adaptation: Adaptation,
    *,
    base: str = "diffusion",
    reader: CodeReader | None = None,
    seed: int = 0,
) -> Difference:
    """Make the chosen weights of a stage-1 network trainable, all others frozen. Its predictions stay as they are.

    Args:
        network: Changed in place; a LoRA that it has already is folded into its weights.
        adaptation: What to train.
        base: Name of the decoder that the network is of.
        reader: What the network is to listen to from now on (`LADD.listen_to`); what hears it is trained.
        seed: Of the adaptors' first halves (the second ones are zero).

    Raises:
        ValueError: If it listens to a reader already and is given one, or is to have a shortcut and listens to none.
    """
    if reader is not None and network.reader is not None:
        raise ValueError(f"the decoder {base!r} listens to {network.reader_name!r} itself: leave the reader out")
    if adaptation.shortcut and network.shortcut is not None:
        raise ValueError(f"the decoder {base!r} has a shortcut itself")
    record = Difference(base, fingerprints(network, reader), adaptation, None if reader is None else READER)
    network.merge_lora()
    if reader is not None:
        network.listen_to(reader)
    network.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if adaptation.shortcut:
            network.cut_short(adaptation.shortcut)
        for name, change in adaptation.parts().items():
            part = cast(nn.Module, getattr(network, name))
            if change == "lora":
                add_lora(part, adaptation.adapters, ADAPTER)
    for parameter in record.tensors(network).values():
        parameter.requires_grad_(True)
    return record


def copy_sharing(network: LADD, shared: Collection[nn.Parameter]) -> LADD:
    """A frozen copy of a network that has some of its parameters in common with it, in memory and for good."""
    twin = copy.deepcopy(network, {id(parameter): parameter for parameter in shared})
    common = {id(parameter) for parameter in shared}
    for parameter in twin.parameters():
        if id(parameter) not in common:
            parameter.requires_grad_(False)
    return twin.eval()


def fold_adapters(network: nn.Module, *, fold: bool = True) -> None:
    """Add the adaptors to the weights they adapt (or take them out again): the same predictions, fewer operations."""
    for module in network.modules():
        if isinstance(module, BaseTunerLayer) and ADAPTER in module.active_adapters and fold != module.merged:
            if fold:
                module.merge()
            else:
                module.unmerge()


def fingerprints(network: LADD, reader: CodeReader | None = None) -> dict[str, tuple[str, ...]]:
    """`layton.folder.weights_hashes` of a network's ``unet`` and ``branch``, and of a ``reader``, if there is one."""
    found: dict[str, tuple[str, ...]] = {
        "unet": weights_hashes(base_state_dict(network.unet)),
        "branch": weights_hashes(network.branch_state_dict()),
    }
    if reader is not None:
        found["reader"] = reader.fingerprints()
    return found
