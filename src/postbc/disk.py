"""The disk: files are written whole or not at all, only plain files are read, and every refusal of the system is a clear error."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from postbc.errors import InputError, require

#: What a kill may leave behind: the temporary files of :func:`atomic_path`.
TEMPORARY = re.compile(r"\..*\.[0-9a-f]{8}\.tmp")


# -- the disk's refusals -----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def os_errors(path: str | Path, doing: str = "written") -> Iterator[None]:
    """Every OSError inside (full disk, read-only, name too long, a name that the disk cannot hold …) is an :class:`InputError`."""
    try:
        yield
    except InputError:
        raise
    except (OSError, UnicodeError, ValueError, RuntimeError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left" in str(error):  # libraries raise their own kinds
            raise InputError(
                "The disk is full; nothing was written.", file=path,
                remedy="free some space, then run the same command with --resume",
            ) from error  # fmt: skip
        if isinstance(error, OSError):
            found = error.strerror or str(error)
        elif isinstance(error, UnicodeEncodeError) or "null byte" in str(error) or "null character" in str(error):
            found = f"a name that a file cannot have: {os.fspath(path)!r}"
        else:
            raise
        remedy = "give the name of a file that can be read" if doing == "read" else "choose another place, or free this one"
        raise InputError(f"This path cannot be {doing}.", file=path, found=found, remedy=remedy) from error


@contextlib.contextmanager
def blame(file: str | Path | None, what: str = "The contents of this file do not fit.") -> Iterator[None]:
    """Putting a file's contents into place: a missing key, another type or another size inside is an :class:`InputError` naming it."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        found = f"no {error}" if isinstance(error, KeyError) else str(error).strip()
        raise InputError(
            what, file=file, found=found if len(found) < 500 else found[:500] + "…",
            remedy="use a file that this version of postbc wrote for the same configuration",
        ) from error  # fmt: skip


# -- writing -----------------------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed to `path`, on failure removed.

    Raises:
        InputError: the disk refuses (full, read-only, name too long …), or `path` is no regular file.
    """
    path = Path(path)
    with os_errors(path):
        require(
            path.is_file() or not os.path.lexists(path) or (path.is_symlink() and not path.exists()),
            "This path cannot be written.", file=path, found="a directory" if path.is_dir() else "a device, pipe or socket",
            expected="a regular file or a free name", remedy="choose another name",
        )  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.name[:40]}.{secrets.token_hex(4)}.tmp"
        try:
            handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)  # less the umask, as of any new file
            mode = stat.S_IMODE(os.fstat(handle).st_mode)
            os.close(handle)
            yield temporary
            os.chmod(temporary, mode)  # a library may have put a private file in its place
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError, ValueError):
                temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """A rename or removal in this directory survives a power cut (where the system can promise that)."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_bytes(path: str | Path, content: bytes | bytearray | memoryview) -> None:
    """Write a file atomically."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(content)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically, lines ending in \\n on every system; what UTF-8 cannot hold (surrogates) as escapes."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically, indented, with a final newline. ValueError if a number is not finite."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def remove_leftovers(directory: str | Path) -> None:
    """Remove what killed writes of :func:`atomic_path` left in `directory` and below, but not in runs of their own below it."""
    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if not os.path.exists(os.path.join(folder, name, "config.yaml"))]
        for name in names:
            if TEMPORARY.fullmatch(name):
                with os_errors(path := Path(folder, name), "removed"):
                    path.unlink(missing_ok=True)


# -- reading -----------------------------------------------------------------------------------------------------------------------
def require_file(path: str | Path, what: str = "a file") -> Path:
    """InputError unless `path` is a regular file (a pipe would hang, a directory would not open)."""
    path = Path(path)
    with os_errors(path, "read"):
        require(path.exists(), "There is no such file.", file=path, expected=what, remedy="check the path")
        require(
            path.is_file(), "This is not a file.", file=path, found="a directory" if path.is_dir() else "a device, pipe or socket",
            expected=what,
        )  # fmt: skip
    return path


def digest(path: str | Path) -> str:
    """SHA-256 (hex) of a file's contents, or of a directory's: names and contents of all files in it.

    Raises:
        InputError: it is missing, cannot be read, or is neither.
    """
    path, found = Path(path), hashlib.sha256()
    with os_errors(path, "read"):
        if path.is_dir():
            for file in sorted(p for p in path.rglob("*") if not p.is_dir()):
                found.update(f"{file.relative_to(path).as_posix()}\0{digest(file)}\n".encode("utf-8", "surrogateescape"))
            return found.hexdigest()
        require_file(path)
        with open(path, "rb") as opened:
            while block := opened.read(1 << 20):
                found.update(block)
    return found.hexdigest()


def read_yaml(path: str | Path, limit: int = 1 << 18, remedy: str = "restore it, or choose another --output") -> dict[str, Any]:
    """A small YAML file that is one mapping from names: plain values, no aliases (they can grow without bound), no depth.

    Raises:
        InputError: missing, unreadable, too large or deep, not UTF-8, not YAML, not a mapping.
    """
    path = require_file(path, "a YAML file")
    with os_errors(path, "read"):
        size = path.stat().st_size
        require(size <= limit, "This file is too large.", file=path, found=f"{size:,} bytes", expected=f"at most {limit:,}")
        content = path.read_bytes()
    what = "This file is not a configuration."
    try:
        text, depth = content.decode("utf-8"), 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            require(depth <= 30, what, file=path, found="values nested too deeply")
            require(not isinstance(event, yaml.AliasEvent), what, file=path, found="an alias (*name)")
        values = yaml.safe_load(text)
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        raise InputError(what, file=path, found=str(error)[:300], remedy=remedy) from error
    require(
        isinstance(values, dict) and all(isinstance(key, str) for key in values), what, file=path,
        found="nothing" if values is None else type(values).__name__, expected="a mapping from names to values",
        remedy="restore it, or choose another --output",
    )  # fmt: skip
    return values
