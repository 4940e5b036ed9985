"""Wrong words on a command line, told in one line and in the words that were typed."""

from __future__ import annotations

import re
from argparse import ArgumentError
from collections.abc import Collection, Mapping
from difflib import get_close_matches

from layton.errors import UsageError

# jsonargparse of a part that may be left out and could not be made: the reason stands between its type and its settings
_OPTIONAL_PART = re.compile(
    r"Does not validate against any of the Union subtypes.*?Errors:\s*- (?P<reason>.*?)\s*"
    r"(- Expected a <class 'NoneType'>|\Z)",
    re.DOTALL,
)
_OPTIONAL_VALUE = re.compile(r'(?P<option>Parser key "\w+":).*Given value: (?P<value>\w+)\Z', re.DOTALL)
_NO_SUBCLASS = re.compile(r"\s*- Not a valid subclass of .*", re.DOTALL)  # which class a part could not be is no reason
_PLAINLY = (
    (r'Parser key "(?:(?:fit|validate|test)\.)?([\w.]+)":', r"--\1:"),
    (r"Expected an? ", "expected "),
    (r"<class '(?:\w+\.)*(\w+)'>", r"\1"),
    (r"typing\.Literal(\[.*?\])", r"one of \1"),
    (r"\b(?:fit|validate|test)\.(data|model)\b", r"--\1"),
)
_NOT_ALLOWED = re.compile(r"Importing '(?P<name>(?P<module>\w+)[\w.]*)' is not allowed")
_UNKNOWN = re.compile(r"unrecognized arguments: (?P<option>--[\w.-]+)")
_ELSEWHERE = (
    (("--num_images", "--num_images_per_prompt", "--num_samples"), ("--images_per_prompt", "--count")),
    (("--num_pairs", "--num_prompts", "--max_images", "--max_samples", "--limit", "--scenes"), ("--count",)),
    (("--images", "--image", "--input", "--dataset", "--path"), ("--data", "--count")),
    (("--prompt_file", "--prompts_file", "--captions"), ("--prompts",)),
    (("--cfg", "--cfg_scale", "--guidance", "--scale"), ("--guidance_scale", "--condition_scale")),
    (("--num_inference_steps", "--num_steps", "--inference_steps"), ("--steps",)),
    (("--output", "--output_dir", "--outdir", "--save_dir", "--output_path"), ("--out",)),
    (("--checkpoint", "--ckpt", "--model_path", "--model_id"), ("--model", "--pipeline", "--tokenizer")),
    (("--resolution", "--image_size", "--img_size"), ("--size",)),
    (("--num_workers",), ("--workers",)),
    (("--dtype", "--quantize"), ("--precision", "--weights")),
    (("--lora",), ("--student",)),
    (("--force",), ("--overwrite",)),
)
"""What other programs call an option, and what it may be here: the first of these that a command has."""


def plain_name(option: str) -> str:
    """An option as it is called in run files: ``--max-steps`` and ``--max_steps`` are the same."""
    return option.replace("-", "_").replace("__", "--", 1)


def innermost_reason(text: str) -> str:
    """What jsonargparse could not do, without what it tried around it."""
    while (optional := _OPTIONAL_PART.search(text)) is not None:
        text = optional["reason"]
    return _NO_SUBCLASS.sub("", text)


def usage_error(
    error: ArgumentError, command: str, options: Collection[str], *, meant: Mapping[str, str] | None = None
) -> UsageError:
    """The error that tells a user what a parser found.

    Args:
        error: From a parser with ``exit_on_error=False``.
        command: As it was typed, such as ``layton fit``.
        options: That it has, ``--`` included; a misspelt one is told the nearest.
        meant: Options of other programs, and what they are called here.
    """
    denied = _NOT_ALLOWED.search(str(error))
    if denied is not None:
        return UsageError(f"{denied['name']} is not allowed; --allow {denied['module']} would allow it")
    text = _one_reason(str(error))
    for pattern, plain in _PLAINLY:
        text = re.sub(pattern, plain, text)
    unknown = _UNKNOWN.search(text)
    near = "" if unknown is None else did_you_mean(unknown["option"], options, meant=meant)
    return UsageError(f"{text}{near}; `{command} --help` says what there is")


def _one_reason(text: str) -> str:
    """The innermost reason, with the option and the value of it where these were told around it."""
    reason, optional = innermost_reason(text), _OPTIONAL_VALUE.match(text)
    if optional is None or reason == text:
        return reason
    return f"{optional['option']} {reason}. Got value: {optional['value']}"


def did_you_mean(option: str, options: Collection[str], *, meant: Mapping[str, str] | None = None) -> str:
    """A question to the user, or nothing where no option is like the one that was typed; see `usage_error`."""
    plain = plain_name(option)
    known = (meant or {}).get(plain) or _called_here(plain, options)
    if known is not None:
        return f" (here it is {known})"
    found = get_close_matches(plain, list(options), n=1, cutoff=0.7)
    return f" (did you mean {found[0]}?)" if found else ""


def _called_here(option: str, options: Collection[str]) -> str | None:
    named = (name for theirs, ours in _ELSEWHERE if option in theirs for name in ours)
    return next((name for name in named if name in options), None)
