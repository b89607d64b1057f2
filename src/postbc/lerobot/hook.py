"""The one place where LeRobot's training is told what it trains on.

While it runs, four names of its training script are replaced: what makes the datasets (a view with PostBC's targets), the sampler
(which says the epoch), what saves a checkpoint (our options are put into it), and what sends a training to a rented machine (refused:
PostBC is not there). And of the dataset that is trained on, the table that its reader asks for numbers (:func:`hold_numbers`).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from postbc.data.lerobot_files import is_number
from postbc.errors import InputError, require
from postbc.lerobot.columns import Columns
from postbc.lerobot.view import with_epochs

#: Versions that this was tested with.
VERSIONS = ("0.6.1",)
SCRIPT = "lerobot.scripts.lerobot_train"
DATASETS, SAMPLER, SAVE, SUBMIT = "make_train_eval_datasets", "EpisodeAwareSampler", "save_checkpoint", "submit_to_hf"


class Trains(Protocol):
    """What LeRobot's training asks of us."""

    def view(self, cfg: Any, dataset: Any) -> Any:
        """What is trained on instead of the dataset that LeRobot made of its configuration."""

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint stands in this folder."""


def training_script() -> Any:
    """LeRobot's training script. InputError if it is not there, or has moved what is replaced."""
    try:
        script = importlib.import_module(SCRIPT)
        version = importlib.metadata.version("lerobot")
    except (ImportError, importlib.metadata.PackageNotFoundError) as error:
        raise InputError("LeRobot is not installed, or cannot train.", found=str(error)[:200],
                         remedy="pip install 'postbc[lerobot]' (Python 3.12 and up)") from None  # fmt: skip
    missing = [name for name in (DATASETS, SAMPLER, SAVE, SUBMIT) if not _uses(script, name)]
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


def hold_numbers(dataset: Any) -> None:
    """Let a LeRobotDataset read its numbers (states, actions, times) from memory: the same items, to the bit.

    Raises:
        InputError: its reader keeps its table elsewhere than that of the versions that are known.
    """
    reader = getattr(dataset, "reader", None)
    require(getattr(reader, "hf_dataset", None) is not None, "This LeRobot reads in another way than the ones that postbc knows.",
            key="lerobot", found=type(dataset).__name__, expected=f"{', '.join(VERSIONS)}: `dataset.reader.hf_dataset`",
            remedy=f"pip install 'lerobot=={VERSIONS[-1]}'")  # fmt: skip
    shapes = {name: tuple(feature["shape"]) for name, feature in dataset.meta.features.items() if is_number(feature)}
    reader.hf_dataset = Columns(reader.hf_dataset, shapes)  # type: ignore[union-attr]


@contextmanager
def trained_on(ours: Trains) -> Iterator[Any]:
    """The training script, which trains on `ours.view(configuration, dataset)` inside the block; the held-out set is left alone.

    Raises:
        InputError: it did not ask for that view, or was about to train on another machine.
    """
    script, asked = training_script(), False
    theirs = {name: getattr(script, name) for name in (DATASETS, SAMPLER, SAVE, SUBMIT)}

    def make_train_eval_datasets(cfg: Any) -> tuple[Any, Any]:
        nonlocal asked
        asked = True
        training, held_out = theirs[DATASETS](cfg)
        return ours.view(cfg, training), held_out

    def save_checkpoint(checkpoint_dir: Any, *args: Any, **kwargs: Any) -> None:
        theirs[SAVE](checkpoint_dir, *args, **kwargs)
        ours.saved(Path(checkpoint_dir))

    def submit_to_hf(cfg: Any) -> None:
        raise InputError("A job on a rented machine would train plainly: PostBC's targets are made on this one.", key="job.target",
                         found=getattr(getattr(cfg, "job", None), "target", None), expected="local",
                         remedy="run `postbc lerobot train` on that machine, or leave out --job.target")  # fmt: skip

    for replacement in (make_train_eval_datasets, save_checkpoint, submit_to_hf):
        setattr(script, replacement.__name__, replacement)
    setattr(script, SAMPLER, with_epochs(theirs[SAMPLER]))
    try:
        yield script
    finally:
        for name, value in theirs.items():
            setattr(script, name, value)
    require(asked, "LeRobot came to its end without PostBC's targets: if it has trained, then plainly.", key="lerobot",
            found="its training asked for no dataset")  # fmt: skip


def lerobot_train(arguments: Sequence[str], ours: Trains) -> None:
    """`lerobot-train` with these arguments, on `ours.view(configuration, dataset)`."""
    given = sys.argv
    with trained_on(ours) as script:
        sys.argv = ["lerobot-train", *arguments]
        try:
            script.main()
        finally:
            sys.argv = given
