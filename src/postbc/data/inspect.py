"""What is in a demonstration file: counts, lengths, ranges, operators, and what will trouble the normalisation; with a picture."""

from __future__ import annotations

import contextlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from postbc.data.episodes import LOW_DIM_KEYS, Dataset
from postbc.data.success import step_successes
from postbc.data.training_set import NARROW, dimension_names
from postbc.errors import InputError, require
from postbc.files import write_bytes

#: Episodes whose paths are drawn at most.
PATHS = 400
#: An action this near to the controller's limit counts as at the bound.
BOUND = 0.999
#: Colours of Okabe and Ito, told apart by colour-blind readers, on white and on black.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C00", "#7F7F7F")


@dataclass(frozen=True)
class Group:
    """The demonstrations of one operator or one filter."""

    name: str
    count: int
    """Demonstrations."""
    steps: int
    """Steps of all of them."""
    length: tuple[int, float, int]
    """Shortest, mean, longest (steps)."""
    solved: float | None
    """Share that is solved at its last step; None: the rewards do not say."""
    command: float
    """Mean length of the translation part of the action (commands, first three dimensions)."""
    resting: float
    """Share of steps in which every command but the gripper's is below 0.05 in absolute value."""


@dataclass(frozen=True)
class Dimension:
    """One dimension of the observation or the action."""

    name: str
    low: float
    high: float
    mean: float
    std: float
    at_bound: float
    """Share of values with absolute value over 0.999 (meaningful for actions)."""

    @property
    def narrow(self) -> bool:
        """Spans less than 1e-3."""
        return self.high - self.low < NARROW

    @property
    def off_by_a_hundredth(self) -> float:
        """Normalised distance of a value that lies 0.01 outside the range: what an unseen state looks like to the network."""
        return 0.02 / (self.high - self.low + 1e-6)


@dataclass(frozen=True)
class Summary:
    """What :func:`summarise` finds."""

    total: Group
    operators: tuple[Group, ...]
    filters: tuple[Group, ...]
    habits: dict[str, dict[str, int]]
    """Of filters named NAME=VALUE: how many demonstrations have which value."""
    observations: tuple[Dimension, ...]
    actions: tuple[Dimension, ...]
    success: str | None
    """Why it is not known what is solved, None where it is."""


def _group(name: str, dataset: Dataset, solved: dict[str, bool] | None) -> Group:
    lengths, actions = dataset.lengths, dataset.actions
    return Group(
        name,
        len(dataset),
        dataset.num_steps,
        (int(lengths.min()), float(lengths.mean()), int(lengths.max())),
        None if solved is None else float(np.mean([solved[episode.name] for episode in dataset])),
        float(np.linalg.norm(actions[:, :3], axis=1).mean()),
        float((np.abs(actions[:, : max(actions.shape[1] - 1, 1)]) < 0.05).all(1).mean()),
    )


def _dimensions(values: np.ndarray, names: list[str]) -> tuple[Dimension, ...]:
    low, high, mean, std = values.min(0), values.max(0), values.mean(0, dtype=np.float64), values.std(0, dtype=np.float64)
    bound = (np.abs(values) > BOUND).mean(0)
    return tuple(
        Dimension(name, float(low[i]), float(high[i]), float(mean[i]), float(std[i]), float(bound[i]))
        for i, name in enumerate(names)
    )


def by_operator(dataset: Dataset) -> dict[str, list[int]]:
    """Operator -> indices of episodes; those without one under "unknown"."""
    groups: dict[str, list[int]] = {}
    for index, episode in enumerate(dataset):
        groups.setdefault(episode.operator or "unknown", []).append(index)
    return dict(sorted(groups.items()))


def summarise(dataset: Dataset) -> Summary:
    """Counts, lengths and ranges of demonstrations."""
    solved, why = None, None
    try:
        solved = {e.name: bool(s[-1]) for e, s in zip(dataset, step_successes(dataset))}
    except InputError as error:
        why = error.what
    observation_names, action_names = dimension_names(dataset)
    people = by_operator(dataset)
    operators = [_group(name, dataset.keep(dataset.names[i] for i in indices), solved) for name, indices in people.items()]
    # A filter named after an operator would only say the same again.
    filters: list[Group] = []
    habits: dict[str, dict[str, int]] = {}
    for key, names in dataset.filters.items():
        name, equals, value = key.partition("=")
        if equals:
            habits.setdefault(name, {})[value] = len(names)
        elif names and key not in people:
            filters.append(_group(key, dataset.select(key), solved))
    return Summary(
        _group("all", dataset, solved),
        tuple(operators),
        tuple(filters),
        habits,
        _dimensions(dataset.states, observation_names),
        _dimensions(dataset.actions, action_names),
        why,
    )


def draw(dataset: Dataset, path: str | Path, overwrite: bool = False) -> Path:
    """Write :func:`picture` to `path` (.png, .pdf or .svg), whole or not at all.

    Raises:
        InputError: something is there already and `overwrite` is not given, or it cannot be written.
    """
    path = Path(path)
    kind = path.suffix.lower().lstrip(".")
    require(not path.is_dir(), "The picture's name is a directory.", file=path, expected="a file name ending in .png")
    require(kind in ("png", "pdf", "svg"), "The picture's name has no known ending.", file=path, expected=".png, .pdf or .svg")
    require(overwrite or not os.path.lexists(path), "There is something of the picture's name already.", file=path,
            remedy="choose another name, or pass --overwrite to replace it")  # fmt: skip
    write_bytes(path, picture(dataset, kind))
    return path


def draw_beside(dataset: Dataset) -> Path:
    """Write the picture beside the dataset's file under a name that is free: NAME.png, NAME-2.png, …; nothing is ever replaced.

    Raises:
        InputError: the directory cannot be written.
    """
    source = Path(dataset.source)
    stem, content = source.name.split(".")[0] or source.name, picture(dataset, "png")
    for n in range(1, 1000):
        path = source.with_name(f"{stem}.png" if n == 1 else f"{stem}-{n}.png")
        if not os.path.lexists(path) and _claim(path, content):
            return path
    raise InputError("The picture cannot be written.", file=source.parent, found="a thousand names that are taken")


def _claim(path: Path, content: bytes) -> bool:
    """Write a file of a name that was free, by a link, which replaces nothing; False if somebody took the name meanwhile."""
    whole = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_bytes(whole, content)
        os.link(whole, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links: claim the name first
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            return False
        except OSError as error:
            raise InputError("The picture cannot be written.", file=path, found=error.strerror or str(error)) from None
        os.replace(whole, path)
    finally:
        with contextlib.suppress(OSError):
            whole.unlink()
    return True


def picture(dataset: Dataset, kind: str = "png") -> bytes:
    """Picture of the demonstrations: end-effector paths from above and in front, lengths, action ranges; one colour an operator."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    with plt.rc_context({"text.parse_math": False, "svg.hashsalt": "postbc"}):  # names are names, not formulas
        figure = _figure(dataset, plt)
        figure.savefig(buffer, dpi=110, format=kind)
        plt.close(figure)
    return buffer.getvalue()


def _figure(dataset: Dataset, plt: Any) -> Any:
    groups = by_operator(dataset)
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(groups)}
    has_hand, width = dataset.state_keys == LOW_DIM_KEYS, dataset.states.shape[1]
    figure, axes = plt.subplots(2, 2, figsize=(12, 9.5), layout="constrained")
    views = [(axes[0, 0], 0, 1, "from above"), (axes[0, 1], 1, 2, "from the front")]
    # paths of different people in turn, so that the last one drawn does not hide the others; of many episodes the first ones
    turns = sorted((turn, name, i) for name, indices in groups.items() for turn, i in enumerate(indices))[:PATHS]
    paths = [] if not width else [(name, dataset[i].state) for _, name, i in turns]
    for axis, u, v, title in views:
        u, v = min(u, width - 1), min(v, width - 1)
        for name, path_ in paths:
            axis.plot(path_[:, u], path_[:, v], color=colour[name], lw=0.9, alpha=0.55)
            axis.plot(path_[0, u], path_[0, v], ".", color=colour[name], ms=4)
            if has_hand:
                start = 9
                axis.plot(path_[0, start + u], path_[0, start + v], "s", color="#222222", ms=2.5, alpha=0.5, mew=0)
        axis.set_xlabel(f"{'xyz'[u]} (m)" if has_hand else f"state {u}")
        axis.set_ylabel(f"{'xyz'[v]} (m)" if has_hand else f"state {v}")
        axis.set_title(
            f"End effector {title} (dots: start; squares: object)" if has_hand else "States (dots: start)", fontsize=11
        )
        if has_hand:
            axis.set_aspect("equal", adjustable="datalim")
        axis.grid(alpha=0.25)
    axis = axes[1, 0]
    lengths = dataset.lengths
    bins = np.linspace(lengths.min(), max(lengths.max(), lengths.min() + 1), 21)
    labels = [f"{name} ({len(indices)}, mean {lengths[indices].mean():.0f})" for name, indices in groups.items()]
    axis.hist(
        [lengths[indices] for indices in groups.values()], bins=bins, stacked=True, color=list(colour.values()), label=labels
    )
    axis.set_xlabel("length (steps)")
    axis.set_ylabel("demonstrations")
    axis.set_title("Lengths", fontsize=11)
    axis.legend(fontsize=8, frameon=False)
    axis = axes[1, 1]
    names = dimension_names(dataset)[1]
    for j, (name, indices) in enumerate(groups.items()):
        actions = np.concatenate([dataset[i].actions for i in indices])
        x = np.arange(actions.shape[1]) + (j - (len(groups) - 1) / 2) * 0.8 / len(groups)
        low, q1, median, q3, high = np.percentile(actions, [0, 10, 50, 90, 100], axis=0)
        axis.vlines(x, low, high, color=colour[name], lw=1, alpha=0.6)
        axis.vlines(x, q1, q3, color=colour[name], lw=4)
        axis.plot(x, median, "_", color="white", ms=4, mew=1.2)
    axis.set_xticks(range(len(names)), names)
    axis.axhline(1, color="#888888", lw=0.6, ls=":")
    axis.axhline(-1, color="#888888", lw=0.6, ls=":")
    axis.set_title("Actions: range (thin), 10 to 90 % (thick), median", fontsize=11)
    axis.grid(alpha=0.25, axis="y")
    figure.suptitle(f"{len(dataset)} demonstrations, {dataset.num_steps} steps: {Path(dataset.source).name}")
    return figure
