"""Errors that the command line tells in one line."""

from __future__ import annotations


class UsageError(ValueError):
    """The command was called wrongly: exit status 2."""
