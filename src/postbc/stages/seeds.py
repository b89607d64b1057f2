"""A stage's seeds: what is recorded of one, and where its files are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from postbc.errors import require
from postbc.schemas import plain


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


def epochs_to_steps(epochs: int, windows: int, batch_size: int) -> int:
    """Gradient steps of so many epochs: epochs · ⌈windows / batch⌉."""
    return epochs * math.ceil(windows / batch_size)
