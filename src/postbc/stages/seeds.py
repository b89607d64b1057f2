"""A stage's seeds: what is recorded of one, and where its files are."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from postbc.agents.base import AGENT_FILE, load_agent
from postbc.errors import require
from postbc.policies.base import POLICY_FILE, About
from postbc.progress import say
from postbc.schemas import plain

C = TypeVar("C", bound=Any)


def of_one_seed(config: Any, seed: int) -> dict[str, Any]:
    """A stage's configuration as one seed's run records it: `seed` instead of `seeds`, so that others can be added later."""
    return {"seed": seed, **{name: value for name, value in plain(config).items() if name != "seeds"}}


def file_of_seed(path: str | Path, seed: int, name: str, stage: str) -> Path:
    """The file `name` of a seed: `path` itself, in the directory `path`, or in `path`/seed_<seed>.

    Raises:
        InputError: none of them is there.
    """
    path = Path(path)
    candidates = [path] if path.is_file() else [path / name, path / f"seed_{seed}" / name]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    seeds = sorted(p.parent.name for p in path.glob(f"seed_*/{name}")) if path.is_dir() else []
    require(found is not None, f"There is no {name} of seed {seed} here.", file=path, found=", ".join(seeds) or None,
            expected=f"seed_{seed}/{name}",
            remedy=f"run `{stage}` with --seeds {seed} too" if seeds else f"give the directory that `{stage}` wrote")  # fmt: skip
    assert found is not None
    return found


def agents_in(path: Path) -> dict[int, Path]:
    """The policies or agents below `path`: seed -> what `load_agent` reads. Of a single one, the seed is its own.

    Raises:
        InputError: there is none.
    """
    if path.is_dir() and not any((path / name).is_file() for name in (POLICY_FILE, AGENT_FILE)):
        found = {}
        for folder in path.glob("seed_*"):
            number = folder.name.removeprefix("seed_")
            if re.fullmatch("0|[1-9][0-9]*", number, re.ASCII) and any(
                (folder / name).is_file() for name in (POLICY_FILE, AGENT_FILE)
            ):
                found[int(number)] = folder
        if found:
            return dict(sorted(found.items()))
    _, about = load_agent(path)
    return {about.seed or 0: path}


def one_agent(path: Path) -> Path:
    """What `load_agent` reads of a path that holds one agent. InputError if it holds none, or several."""
    there = agents_in(path)
    require(len(there) == 1, "This directory holds agents of several seeds.", file=path, key="agents",
            found=", ".join(f"seed_{seed}" for seed in there), remedy=f"name one: {next(iter(there.values()))}")  # fmt: skip
    return next(iter(there.values()))


def seeds_of(config: Any) -> list[int]:
    """The seeds that a stage plays: `config.seeds`, or all that `config.policy` has. InputError for one that is not there."""
    there = agents_in(config.policy)
    _require_there(config.policy, there, config.seeds or ())
    return list(config.seeds or there)


def agent_of(policy: Path, seed: int) -> Path:
    """The file or directory of one seed's policy or agent. InputError if it is not there."""
    there = agents_in(policy)
    _require_there(policy, there, (seed,))
    return there[seed]


def require_seed(about: About, seed: int, path: Path) -> None:
    """InputError if what lies at a seed's place says that it is another seed's: two rows of a table would be one policy."""
    require(about.seed in (None, seed), "This is another seed's policy.", file=path, key="seed", found=about.seed, expected=seed,
            remedy="put each seed's files where they were written, or give this one alone: --policy " + str(path))  # fmt: skip


def _require_there(policy: Path, there: Mapping[int, Path], seeds: Iterable[int]) -> None:
    missing = [seed for seed in seeds if seed not in there]
    require(
        not missing, "There is no policy of this seed.", file=policy, key="seeds", found=", ".join(map(str, missing)),
        expected=", ".join(map(str, there)), remedy="choose among them, or pretrain with this seed",
    )  # fmt: skip


def epochs_to_steps(epochs: int, windows: int, batch_size: int) -> int:
    """Gradient steps of so many epochs: epochs · ⌈windows / batch⌉."""
    return epochs * math.ceil(windows / batch_size)


def in_epochs(config: C, epochs: int | None, windows: int) -> C:
    """The configuration of a training with the `steps` that `epochs` are, where these are given; that its own are unused is said."""
    if epochs is None:
        return config
    steps, given = epochs_to_steps(epochs, windows, config.batch_size), config.steps
    if given not in (steps, type(config)().steps):
        say(f"note: {epochs:,} epochs are trained, {steps:,} steps; the {given:,} steps that are given, too, are not looked at")
    return replace(config, steps=steps)
