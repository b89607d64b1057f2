"""Where an agent looks: what of a camera's frame moves its chunk when it is covered (occlusion, Zeiler and Fergus 2014)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from postbc.agents.base import Agent
from postbc.data.episodes import is_image
from postbc.environments.registry import Environment
from postbc.environments.stacked import make_stacked
from postbc.errors import require
from postbc.evaluation import to_tensors
from postbc.files import atomic_path
from postbc.policies.base import Observation
from postbc.seeding import make_generator

CELLS = 8
"""Cells along a side of a frame, each covered once."""


@dataclass(frozen=True, eq=False)
class Look:
    """One decision of an agent."""

    step: int
    """Environment steps before it."""
    frames: dict[str, np.ndarray]
    """Camera -> what it sees, (H, W, C) uint8; the newest of several."""
    moved: dict[str, np.ndarray]
    """Camera -> (cells, cells): by how much the chunk moves with a cell covered, root mean square over its numbers, raw units."""


def cameras_of(agent: Agent) -> list[str]:
    """Names of the cameras that an agent reads. InputError where there is none."""
    found = [name for name in agent.shapes if is_image(name)]
    require(found, "The agent reads no camera, so it looks nowhere.", key="saliency", found=", ".join(agent.shapes),
            expected="an agent that reads images", remedy="leave --saliency out")  # fmt: skip
    return found


@torch.inference_mode()
def occlusion(agent: Agent, observation: Observation, camera: str, seed: int = 0, cells: int = CELLS) -> np.ndarray:
    """By how much the chunk moves when a cell of a frame is covered by the frame's mean colour: (cells, cells), raw units.

    Args:
        observation: raw, of one state (1, ...); of several time steps all are covered.
        seed: of the agent's random numbers, the same for every cell.
    """

    def act(frames: torch.Tensor) -> torch.Tensor:
        return agent.act({**observation, camera: frames}, make_generator(seed, "evaluation/saliency", agent.device)).float()

    frames = observation[camera]
    mean = frames.float().mean((-2, -1), keepdim=True).round().to(frames.dtype)
    rows, columns = (np.linspace(0, side, min(cells, side) + 1).round().astype(int) for side in frames.shape[-2:])
    chunk, moved = act(frames), np.zeros((len(rows) - 1, len(columns) - 1))
    for i, j in np.ndindex(*moved.shape):
        covered = frames.clone()
        covered[..., rows[i] : rows[i + 1], columns[j] : columns[j + 1]] = mean
        moved[i, j] = (act(covered) - chunk).square().mean().sqrt().item()
    return moved


@torch.inference_mode()
def looks(
    agent: Agent, environment: Environment, episode_seed: int, count: int, seed: int = 0, horizon: int | None = None
) -> list[Look]:
    """Play an episode, and look at up to `count` of its decisions, evenly from the first to the last.

    Args:
        seed: of the agent's random numbers.

    Raises:
        InputError: an agent that reads no camera.
    """
    cameras, limit = cameras_of(agent), environment.horizon if horizon is None else horizon
    generator = make_generator(seed, "evaluation/saliency", agent.device)
    env = make_stacked(
        environment.make, 1, shapes=agent.shapes, observation_steps=agent.observation_steps, chunk=agent.chunk, horizon=limit,
        terminate_on="chunk_success",
    )  # fmt: skip
    met, steps = [], [0]
    try:
        observation, ended = env.reset(np.array([episode_seed])), False
        while not ended:
            met.append(to_tensors({name: values.copy() for name, values in observation.items()}, agent))
            step = env.step(agent.act(met[-1], generator).cpu().numpy())
            observation, ended = step.observation, bool(step.ended[0])
            steps.append(steps[-1] + int(step.num_steps[0]))
    finally:
        env.close()
    found = []
    for k in np.unique(np.linspace(0, len(met) - 1, count).round().astype(int)).tolist():
        seen = {camera: met[k][camera].reshape(-1, *agent.shapes[camera])[-1].cpu().numpy() for camera in cameras}
        moved = {camera: occlusion(agent, met[k], camera, seed) for camera in cameras}
        found.append(Look(steps[k], {camera: np.moveaxis(frame, 0, -1) for camera, frame in seen.items()}, moved))
    return found


def plot(found: list[Look], path: str | Path, title: str = "") -> None:
    """Each look as a row of one PNG: every camera's frame, and over it in colour how far covering a cell moves the chunk."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cameras = list(found[0].frames)
    highest = {camera: max(float(look.moved[camera].max()) for look in found) for camera in cameras}
    figure = Figure(figsize=(3.8 * len(cameras), 0.7 + 1.9 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(found), 2 * len(cameras), squeeze=False)
    for row, look in zip(axes, found):
        row[0].set_ylabel(f"step {look.step}", fontsize=8)
        for k, camera in enumerate(cameras):
            frame, moved = look.frames[camera], look.moved[camera]
            picture = frame[..., :3] if frame.shape[-1] >= 3 else frame[..., 0]
            height, width = frame.shape[:2]
            for ax in row[2 * k : 2 * k + 2]:
                ax.imshow(picture, cmap="gray", extent=(0, width, height, 0))
                ax.set(xticks=[], yticks=[])
            row[2 * k].set_title(camera.removeprefix("image."), fontsize=8)
            row[2 * k + 1].set_title(f"moves the chunk by up to {moved.max():.3f}", fontsize=8)
            row[2 * k + 1].imshow(
                moved, "inferno", alpha=0.6, extent=(0, width, height, 0), vmin=0, vmax=max(highest[camera], 1e-12)
            )
    if title:
        figure.suptitle(title, fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
