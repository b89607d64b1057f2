"""How differently people act where they see the same: actions of each demonstration of Lift near three states, file beside file.

    postbc demos collect --output lift.hdf5 --task Lift --num 80 --seed 0 --operators all
    python -m benchmarks.compare_demonstrators OUTPUT.png lift.hdf5 human.hdf5

A state is where the hand is relative to the cube and how far the gripper is open. Of each demonstration the nearest step
counts, where it is near enough. Written beside the picture: standard deviations, as CSV.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from postbc.data.episodes import Dataset
from postbc.data.readers import read_dataset

#: Name -> hand − cube (m), fingers' opening (m; open 0.08), and how near counts (m).
STATES: dict[str, tuple[tuple[float, float, float], float, float]] = {
    "above: 8 cm over the cube, open": ((0.0, 0.0, 0.08), 0.08, 0.035),
    "coming down: 3 cm over the cube, open": ((0.0, 0.0, 0.03), 0.08, 0.02),
    "at the cube, closed on it": ((0.0, 0.0, 0.0), 0.042, 0.02),
}
AXES = ("x", "y", "z", "turn x", "turn y", "turn z", "gripper")


def actions_near(dataset: Dataset, where: tuple[float, float, float], opening: float, near: float) -> np.ndarray:
    """(M, 7): of each demonstration that comes near enough, the action at its nearest step."""
    found = []
    for episode in dataset:
        state = np.asarray(episode.observations["state"][:])
        hand, fingers, cube = state[:, :3], state[:, 7] - state[:, 8], state[:, 9:12]
        distance = np.sqrt(((hand - cube - where) ** 2).sum(1) + (fingers - opening) ** 2)
        if distance.min() < near:
            found.append(episode.actions[distance.argmin()])
    return np.array(found).reshape(-1, len(AXES))


def main() -> None:
    """Draw the picture and write its numbers."""
    output, files = Path(sys.argv[1]), [Path(word) for word in sys.argv[2:]]
    figure, axes = plt.subplots(
        len(files), len(STATES), figsize=(4.4 * len(STATES), 2.6 * len(files)), sharey=True, squeeze=False
    )
    rows, jitter = [], np.random.default_rng(0)
    for row, file in zip(axes, files, strict=True):
        dataset = read_dataset(file)
        for panel, (name, state) in zip(row, STATES.items(), strict=True):
            actions = actions_near(dataset, *state)
            for k in range(len(AXES)):
                panel.plot(k + jitter.uniform(-0.25, 0.25, len(actions)), actions[:, k], ".", markersize=3, alpha=0.6)
            panel.set_title(f"{file.stem}, {len(actions)} of {len(dataset)}\n{name}", fontsize=8)
            panel.set_xticks(range(len(AXES)), AXES, fontsize=7)
            panel.set_ylim(-1.1, 1.1)
            panel.grid(axis="y", alpha=0.3)
            spread = actions.std(0) if len(actions) else np.full(len(AXES), np.nan)
            rows.append([file.stem, name, len(actions), *(f"{value:.3f}" for value in spread)])
    figure.tight_layout()
    figure.savefig(output, dpi=110)
    with output.with_suffix(".csv").open("w", newline="") as written:
        csv.writer(written).writerows([["file", "state", "demonstrations", *AXES], *rows])


if __name__ == "__main__":
    main()
