"""What is in a demonstration file: counts, lengths, ranges, operators, and what will trouble the normalisation; with a picture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from postbc.demonstrations.types import LOW_DIM_KEYS, Demonstrations

#: An action this near to the controller's limit counts as at the bound.
BOUND = 0.999
#: A dimension whose values span less is called narrow; raw units (metres, quaternion components, commands).
NARROW = 1e-3
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
    solved: float
    """Share whose last reward is positive."""
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
    observations: tuple[Dimension, ...]
    actions: tuple[Dimension, ...]


def _group(name: str, demonstrations: Demonstrations) -> Group:
    lengths, actions = demonstrations.lengths, demonstrations.actions
    return Group(
        name,
        len(demonstrations),
        demonstrations.num_steps,
        (int(lengths.min()), float(lengths.mean()), int(lengths.max())),
        float(np.mean([trajectory.rewards[-1] > 0 for trajectory in demonstrations])),
        float(np.linalg.norm(actions[:, :3], axis=1).mean()),
        float((np.abs(actions[:, :-1]) < 0.05).all(1).mean()),
    )


def _dimensions(values: np.ndarray, names: list[str]) -> tuple[Dimension, ...]:
    low, high, mean, std = values.min(0), values.max(0), values.mean(0, dtype=np.float64), values.std(0, dtype=np.float64)
    bound = (np.abs(values) > BOUND).mean(0)
    return tuple(
        Dimension(name, float(low[i]), float(high[i]), float(mean[i]), float(std[i]), float(bound[i]))
        for i, name in enumerate(names)
    )


def by_operator(demonstrations: Demonstrations) -> dict[str, list[int]]:
    """Operator -> indices of trajectories; those without one under "unknown"."""
    groups: dict[str, list[int]] = {}
    for index, trajectory in enumerate(demonstrations):
        groups.setdefault(trajectory.operator or "unknown", []).append(index)
    return dict(sorted(groups.items()))


def summarise(demonstrations: Demonstrations) -> Summary:
    """Counts, lengths and ranges of demonstrations."""
    observation_names = [
        f"{key}[{i}]"
        for key, width in zip(demonstrations.observation_keys, demonstrations.observation_dims)
        for i in range(width)
    ]
    osc = ["x", "y", "z", "turn x", "turn y", "turn z", "gripper"]
    action_names = osc if demonstrations.action_dim == 7 else [f"action[{i}]" for i in range(demonstrations.action_dim)]
    people = by_operator(demonstrations)
    operators = []
    for name, indices in people.items():
        kept = tuple(demonstrations[i] for i in indices)
        operators.append(_group(name, replace(demonstrations, trajectories=kept, filters={})))
    # A filter named after an operator would only say the same again.
    filters = [
        _group(key, demonstrations.select(key)) for key, names in demonstrations.filters.items() if names and key not in people
    ]
    return Summary(
        _group("all", demonstrations),
        tuple(operators),
        tuple(filters),
        _dimensions(demonstrations.observations, observation_names),
        _dimensions(demonstrations.actions, action_names),
    )


def draw(demonstrations: Demonstrations, path: str | Path) -> Path:
    """Picture of the demonstrations: end-effector paths from above and in front, lengths, action ranges; one colour an operator."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = by_operator(demonstrations)
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(groups)}
    has_hand = demonstrations.observation_keys[0] == LOW_DIM_KEYS[0]
    figure, axes = plt.subplots(2, 2, figsize=(12, 9.5), layout="constrained")
    views = [(axes[0, 0], 0, 1, "from above"), (axes[0, 1], 1, 2, "from the front")]
    order = [(name, i) for name, indices in groups.items() for i in indices]
    for axis, u, v, title in views:
        # Paths of different people in turn, so that the last one drawn does not hide the others.
        u, v = min(u, demonstrations.observation_dim - 1), min(v, demonstrations.observation_dim - 1)
        for name, i in sorted(order, key=lambda item: groups[item[0]].index(item[1])):
            path_ = demonstrations[i].observations
            axis.plot(path_[:, u], path_[:, v], color=colour[name], lw=0.9, alpha=0.55)
            axis.plot(path_[0, u], path_[0, v], ".", color=colour[name], ms=4)
            if demonstrations.observation_keys[-1] == "object" and has_hand:
                start = 9
                axis.plot(path_[0, start + u], path_[0, start + v], "s", color="#222222", ms=2.5, alpha=0.5, mew=0)
        axis.set_xlabel(f"{'xyz'[u]} (m)" if has_hand else f"observation {u}")
        axis.set_ylabel(f"{'xyz'[v]} (m)" if has_hand else f"observation {v}")
        axis.set_title(f"End effector {title} (dots: start; squares: object)" if has_hand else "Observations", fontsize=11)
        if has_hand:
            axis.set_aspect("equal", adjustable="datalim")
        axis.grid(alpha=0.25)
    axis = axes[1, 0]
    lengths = demonstrations.lengths
    bins = np.linspace(lengths.min(), max(lengths.max(), lengths.min() + 1), 21)
    labels = [f"{name} ({len(indices)}, mean {lengths[indices].mean():.0f})" for name, indices in groups.items()]
    axis.hist(
        [lengths[indices] for indices in groups.values()], bins=bins, stacked=True, color=list(colour.values()), label=labels
    )
    axis.set_xlabel("length (steps; 20 are a second)")
    axis.set_ylabel("demonstrations")
    axis.set_title("Lengths", fontsize=11)
    axis.legend(fontsize=8, frameon=False)
    axis = axes[1, 1]
    names = [dimension.name for dimension in summarise(demonstrations).actions]
    for j, (name, indices) in enumerate(groups.items()):
        actions = np.concatenate([demonstrations[i].actions for i in indices])
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
    figure.suptitle(
        f"{len(demonstrations)} demonstrations, {demonstrations.num_steps} steps: {Path(demonstrations.source).name}"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
