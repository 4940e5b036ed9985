"""An account of broken images: skipped, counted and named, and too many of them stop the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable


class TooManyBadImagesError(RuntimeError):
    """More images were broken than the caller allowed; the message names the last ones."""


class BadImages:
    """Broken images, each counted once however often it is met (reasons do not change from one reading to the next).

    Args:
        max_bad: How many different broken images are tolerated; None for any number.
        tell: Called once for each with "name: what is wrong with it" and how many there are by now.
    """

    def __init__(self, max_bad: int | None = None, *, tell: Callable[[str, int], None] | None = None) -> None:
        if max_bad is not None and max_bad < 0:
            raise ValueError(f"max_bad must be >= 0 or None, got {max_bad}")
        self.max_bad, self._tell = max_bad, tell
        self._reasons: dict[str, None] = {}  # in order, each once

    def record(self, reason: str) -> None:
        """Note one broken image.

        Args:
            reason: "name: what is wrong with it".

        Raises:
            TooManyBadImagesError: If there are now more than `max_bad`.
        """
        if reason not in self._reasons:
            self._reasons[reason] = None
            if self._tell is not None:
                self._tell(reason, self.count)
        if self.max_bad is not None and self.count > self.max_bad:
            raise TooManyBadImagesError(
                f"{self.count} broken images, {self.max_bad} allowed (max_bad of the source and of the data module, or "
                f"--max_bad); the last: {'; '.join(self.reasons[-3:])}"
            )

    def record_all(self, reasons: Iterable[str]) -> None:
        """Note several broken images, as `record` does.

        Args:
            reasons: "name: what is wrong with it" for each.
        """
        for reason in reasons:
            self.record(reason)

    def restore(self, reasons: Iterable[str]) -> None:
        """Take over what an earlier part of a run has met and told.

        Args:
            reasons: Its `reasons`.
        """
        self._reasons = dict.fromkeys([*reasons, *self._reasons])

    @property
    def count(self) -> int:
        """How many different images are broken."""
        return len(self._reasons)

    @property
    def names(self) -> list[str]:
        """Their names, in the order they were met."""
        return [reason.split(": ", 1)[0] for reason in self._reasons]

    @property
    def reasons(self) -> list[str]:
        """What is wrong with each, as "name: reason", in the order they were met."""
        return list(self._reasons)
