"""Errors that a user can mend: the command line prints them without a traceback and exits with status 2."""

from __future__ import annotations

from pathlib import Path


class InputError(ValueError):
    """Something the user gave cannot be used.

    Args:
        what: one sentence saying what is wrong.
        file: the file or directory concerned.
        key: the HDF5 key, configuration field or argument concerned.
        found: what was found there.
        expected: what would have been accepted.
        remedy: what to do about it, in the imperative.

    The message names every part that was given, one a line.
    """

    def __init__(
        self,
        what: str,
        *,
        file: str | Path | None = None,
        key: str | None = None,
        found: object | None = None,
        expected: object | None = None,
        remedy: str | None = None,
    ) -> None:
        parts = [("file", file), ("key", key), ("found", found), ("expected", expected), ("what to do", remedy)]
        super().__init__("\n".join([what, *(f"  {name}: {value}" for name, value in parts if value is not None)]))
        self.what = what

    def __reduce__(self) -> tuple[object, ...]:  # a job's process hands it to its parent
        return type(self), (str(self),)


class NotFiniteError(InputError):
    """A number that decides a result is NaN or infinite; the run has ended, and its last checkpoint is good."""


class InUseError(InputError):
    """Another process works in a directory."""


def require(
    condition: object,
    what: str,
    *,
    file: str | Path | None = None,
    key: str | None = None,
    found: object | None = None,
    expected: object | None = None,
    remedy: str | None = None,
) -> None:
    """Raise :class:`InputError` unless `condition` holds: a requirement on input is one statement, and the algorithm stays visible."""
    if not condition:
        raise InputError(what, file=file, key=key, found=found, expected=expected, remedy=remedy)
