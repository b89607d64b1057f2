"""A folder of HDF5 files as one dataset: LIBERO has a file a task, and people who record have a file a day."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from postbc.data.episodes import Dataset, choose
from postbc.data.libero import environment_name
from postbc.data.robomimic import Listing
from postbc.errors import require

APART = (
    "put them into folders of their own; which tasks other suites of LIBERO have, LIBERO knows: pip install 'postbc[libero]'"
)


def files_of(folder: str | Path) -> list[Path]:
    """The HDF5 files that are directly in a folder, sorted; none of anything else."""
    with contextlib.suppress(OSError):  # said by whoever opens it
        if os.path.isdir(folder):
            return sorted(p for p in Path(folder).iterdir() if p.suffix in (".hdf5", ".h5") and p.is_file())
    return []


def _prefix(path: Path) -> str:
    return path.stem.removesuffix("_demo")


def place_of(source: str | Path, name: str) -> tuple[Path, str]:
    """The file that a demonstration is in, and its name there: of a folder, or of a file itself."""
    for path in sorted(files_of(source), key=lambda path: -len(_prefix(path))):  # a_demo_1.hdf5 before a.hdf5
        if name.startswith(f"{_prefix(path)}_demo_"):
            return path, name.removeprefix(f"{_prefix(path)}_")
    return Path(source), name


def list_folder(folder: str | Path, list_one: Callable[[Path], Listing], asked: Iterable[str] | None = None) -> Listing:
    """As of one file: a demonstration's name begins with its file's, and each file is a filter. Of files with one of `asked` alone."""
    begin = None if asked is None else {name[:i] for name in asked for i, letter in enumerate(name) if letter == "_"}
    names: list[str] = []
    files: dict[str, str] = {}
    members_of: dict[str, tuple[str, ...]] = {}
    filters: dict[str, tuple[str, ...]] = {}
    task_of: dict[str, str] = {}
    for path in files_of(folder):
        if begin is not None and _prefix(path) not in begin:
            continue
        listing, prefix = list_one(path), _prefix(path)
        own = tuple(f"{prefix}_{name}" for name in listing.names)
        names += own
        task_of |= {f"{prefix}_{name}": task for name, task in listing.task_of.items()}
        require(prefix not in files, "Two files of a folder give their demonstrations the same names.", file=path, key=prefix,
                found=files.get(prefix), remedy="rename one of them")  # fmt: skip
        files[prefix], members_of[prefix] = path.name, own
        for key, members in listing.filters.items():
            filters[key] = (*filters.get(key, ()), *(f"{prefix}_{name}" for name in members))
    for prefix, own in members_of.items():
        require(set(filters.get(prefix, own)) == set(own), "A filter has the name of a file, and other demonstrations.",
                file=Path(folder) / files[prefix], key=f"mask/{prefix}", remedy="rename the file")  # fmt: skip
        filters[prefix] = own
    return Listing(tuple(names), filters, task_of)


def read_folder(
    folder: str | Path,
    read_one: Callable[..., Dataset],
    list_one: Callable[[Path], Listing],
    *,
    filter_key: str | None = None,
    names: Iterable[str] | None = None,
    **options: Any,
) -> Dataset:
    """The files of a folder as one dataset, read by `read_one`; files without an episode that is asked for are left alone.

    Raises:
        InputError: the files do not belong together: other observations, another robot, other tasks than "language" tells apart.
    """
    names = None if names is None else [*names]
    listing = list_folder(folder, list_one, names)
    wanted = list(listing.names) if filter_key is None else choose(listing.names, listing.filters, filter_key, str(folder))
    asked = set(wanted if names is None else names)
    unknown = sorted(asked - set(listing.names))
    require(not unknown, "There is no such demonstration.", file=folder, key="names", found=unknown[:5])
    asked &= set(wanted)
    parts: list[Dataset] = []
    for path in files_of(folder):
        prefix = _prefix(path)
        own = [name.removeprefix(f"{prefix}_") for name in listing.filters.get(prefix, ()) if name in asked]
        if own:
            read = read_one(path, names=own, **options)
            renamed = tuple(replace(episode, name=f"{prefix}_{episode.name}") for episode in read)
            parts.append(replace(read, episodes=renamed, filters={}))
    require(parts, "There are no episodes.", file=folder, found=0, expected="at least 1")
    first = parts[0]
    for part in parts:
        for what in ("state_keys", "state_dims", "tasks"):
            ours, theirs = getattr(first, what), getattr(part, what)
            require(ours == theirs, "The files of a folder do not belong together.", file=part.source, key=what.replace("_", " "),
                    found=str(theirs)[:200], expected=f"{str(ours)[:200]}, as in {first.source}",
                    remedy=APART)  # fmt: skip
    environment = _together(parts)
    episodes = tuple(episode for part in parts for episode in part)
    filters = {key: tuple(name for name in members if name in asked) for key, members in listing.filters.items()}
    return replace(
        first, episodes=episodes, environment=environment, filters={k: v for k, v in filters.items() if v}, source=str(folder)
    )


def _together(parts: list[Dataset]) -> dict[str, Any]:
    """The environment of all: their own, or, of several of LIBERO's tasks, that of all of them."""
    first = dict(parts[0].environment)
    if all(str(part.environment.get("env_name")).startswith("libero/") for part in parts):
        if any(part.environment["env_name"] != first["env_name"] for part in parts):
            first["env_name"] = environment_name([str(e.task) for part in parts for e in part], parts[0].tasks)
        return first
    for part in parts:
        require(part.environment == first, "The files of a folder are of different environments.", file=part.source, key="env_args",
                found=str(part.environment)[:200], expected=f"{str(first)[:200]}, as in {parts[0].source}")  # fmt: skip
    return first
