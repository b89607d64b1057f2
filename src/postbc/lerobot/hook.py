"""The one place where LeRobot's training is told what it trains on: two names of its training script are replaced while it runs."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from postbc.errors import InputError, require
from postbc.lerobot.view import with_epochs

#: Versions that this was tested with.
VERSIONS = ("0.6.1",)
SCRIPT, DATASETS, SAMPLER = "lerobot.scripts.lerobot_train", "make_train_eval_datasets", "EpisodeAwareSampler"


def training_script() -> Any:
    """LeRobot's training script. InputError if it is not there, or has moved what is replaced."""
    try:
        script = importlib.import_module(SCRIPT)
        version = importlib.metadata.version("lerobot")
    except (ImportError, importlib.metadata.PackageNotFoundError) as error:
        raise InputError("LeRobot is not installed, or cannot train.", found=str(error)[:200],
                         remedy="pip install 'postbc[lerobot]' (Python 3.12 and up)") from None  # fmt: skip
    missing = [name for name in (DATASETS, SAMPLER) if not _uses(script, name)]
    if not missing and not all(
        hasattr(getattr(script, SAMPLER), name) for name in ("state_dict", "load_state_dict", "set_epoch")
    ):
        missing = [SAMPLER]
    require(not missing, "This LeRobot trains in another way than the ones that postbc knows.", key="lerobot", found=version,
            expected=f"{', '.join(VERSIONS)}: `train` calls {' and '.join(missing)} of its module",
            remedy=f"pip install 'lerobot=={VERSIONS[-1]}'")  # fmt: skip
    if version not in VERSIONS:
        warnings.warn(
            f"LeRobot {version} has not been tried with postbc; {', '.join(VERSIONS)} has.", UserWarning, stacklevel=2
        )
    return script


def _uses(script: Any, name: str) -> bool:
    train = inspect.unwrap(getattr(script, "train", lambda: None))
    return hasattr(script, name) and name in train.__code__.co_names


@contextmanager
def trained_on(wrap: Callable[[Any, Any], Any]) -> Iterator[Any]:
    """The training script, which trains on `wrap(configuration, dataset)` inside the block; the held-out set is left alone."""
    script = training_script()
    make, sampler = getattr(script, DATASETS), getattr(script, SAMPLER)

    def make_train_eval_datasets(cfg: Any) -> tuple[Any, Any]:
        training, held_out = make(cfg)
        return wrap(cfg, training), held_out

    setattr(script, DATASETS, make_train_eval_datasets)
    setattr(script, SAMPLER, with_epochs(sampler))
    try:
        yield script
    finally:
        setattr(script, DATASETS, make)
        setattr(script, SAMPLER, sampler)


def lerobot_train(arguments: Sequence[str], wrap: Callable[[Any, Any], Any]) -> None:
    """`lerobot-train` with these arguments, on `wrap(configuration, dataset)`."""
    given = sys.argv
    with trained_on(wrap) as script:
        sys.argv = ["lerobot-train", *arguments]
        try:
            script.main()
        finally:
            sys.argv = given
