"""What of a frame moves the chunk: against agents whose answer is known; along an episode; as `evaluate` and the report show it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import postbc.experiments.report as report
from made import save_policy as save_state_policy
from postbc.cli import main
from postbc.data.normalization import Normalization
from postbc.environments.coordinates import coordinates_of_episode
from postbc.errors import InputError
from postbc.policies import DiffusionConfig, DiffusionPolicy, save_policy
from postbc.policies.base import About
from postbc.policies.networks.encoders import EncoderConfig
from postbc.saliency import cameras_of, looks, occlusion, plot
from postbc.seeding import EVALUATION_SEED, make_generator
from toy import environment


class Watcher:
    """Its chunk is the mean of the upper left quarter of the newest frame, and noise of its generator."""

    chunk, action_dim, observation_steps, device = 2, 2, 1, torch.device("cpu")

    def __init__(self, steps: int = 1, size: int = 32) -> None:
        self.observation_steps, self.shapes = steps, {"image.top": (3, size, size), "state": (1,)}

    def act(self, observation: Any, generator: torch.Generator) -> Tensor:
        frames = observation["image.top"].float()
        frames = frames[:, -1] if self.observation_steps > 1 else frames
        half = frames.shape[-1] // 2
        value = frames[..., :half, :half].mean((1, 2, 3))
        return value.view(-1, 1, 1) / 255 + torch.randn(len(value), 2, 2, generator=generator)


@pytest.mark.parametrize("steps", [1, 2])
def test_only_what_is_looked_at_moves_the_chunk(steps: int) -> None:
    frames = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = torch.stack([255 - frames, frames], 1) if steps > 1 else frames
    moved = occlusion(Watcher(steps), {"image.top": seen, "state": torch.zeros(1, 1)}, "image.top", cells=4)
    expected, mean = np.zeros((4, 4)), frames.float().mean((-2, -1)).round().numpy()[0]
    for i, j in np.ndindex(2, 2):  # of 2×2 cells in that quarter
        cell = frames[0, :, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].numpy()
        expected[i, j] = abs((mean[:, None, None] - cell).sum()) / (3 * 16 * 16) / 255
    np.testing.assert_allclose(moved, expected, atol=1e-5)
    assert moved[:2, :2].min() > 0


def test_cells_of_small_and_odd_frames() -> None:
    seen = {"image.top": torch.randint(256, (1, 3, 5, 5), dtype=torch.uint8), "state": torch.zeros(1, 1)}
    assert occlusion(Watcher(size=5), seen, "image.top").shape == (5, 5)


def policy(directory: Path) -> Path:
    config = DiffusionConfig(hidden=8, denoising_steps=4, inference_steps=2, encoder=EncoderConfig(4, (4,)))
    normalization = Normalization(np.zeros(0), np.zeros(0), -np.ones(2), np.ones(2))
    made = DiffusionPolicy(
        config, {"image.top": (3, 8, 8)}, 2, 2, normalization, make_generator(0, "policy/initialisation"),
        about=About(method="bc", seed=0, task="gymnasium:reach:ReachPixels-v0"),
    )  # fmt: skip
    directory.mkdir(parents=True)
    save_policy(directory / "policy.safetensors", made)
    return directory


def test_an_episode_is_looked_at_from_its_first_to_its_last_decision(tmp_path: Path) -> None:
    agent = Watcher()
    agent.shapes = {"image.top": (3, 32, 32)}
    found = looks(agent, environment(pixels=True, horizon=11), EVALUATION_SEED, 3, horizon=11)
    assert [look.step for look in found] == [0, 4, 10]  # of six decisions, two steps each
    assert found[0].frames["image.top"].shape == (32, 32, 3)
    assert found[0].moved["image.top"].shape == (8, 8)
    plot(found, tmp_path / "a.png", "title")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert len(looks(agent, environment(pixels=True, horizon=3), EVALUATION_SEED, 9, horizon=3)) <= 2


@pytest.mark.parametrize("steps", [1, 2])
def test_a_coherent_agent_plays_its_coordinates_while_it_is_looked_at(steps: int) -> None:
    agent, met = Watcher(steps), []
    agent.shapes = {"image.top": (3, 32, 32), "posterior": (2,)}
    act = agent.act
    agent.act = lambda observation, generator: met.append(observation["posterior"]) or act(observation, generator)  # type: ignore
    assert looks(agent, environment(pixels=True, horizon=5), EVALUATION_SEED, 2, horizon=5)
    expected = torch.as_tensor(coordinates_of_episode(EVALUATION_SEED, 2))
    assert all(torch.equal(g.reshape(-1, 2), expected.expand(steps, -1)) for g in met)


def test_evaluate_draws_it_and_the_report_shows_it(tmp_path: Path) -> None:
    path = policy(tmp_path / "bc/seed_0")
    line = ["--environment", "gymnasium:reach:ReachPixels-v0", "--episodes", "2", "--videos", "0", "--saliency", "2"]
    line += ["--output", str(tmp_path / "evaluation")]
    assert main(["evaluate", "--policy", str(path.parent), *line]) == 0
    drawn = tmp_path / "evaluation/seed_0/saliency.png"
    before = drawn.read_bytes()
    drawn.unlink()
    assert main(["evaluate", "--policy", str(path.parent), *line, "--resume"]) == 0  # what is missing is made again, the same
    assert drawn.read_bytes() == before
    report.build([tmp_path / "evaluation"], tmp_path / "report")
    page = (tmp_path / "report/report.html").read_text()
    assert "Where the policies look" in page
    assert "evaluation/seed_0/saliency.png" in page


def test_who_sees_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"reads no camera[\s\S]*--saliency"):
        cameras_of(type("Blind", (Watcher,), {"__init__": lambda self: setattr(self, "shapes", {"state": (3,)})})())
    save_state_policy(tmp_path / "p", 4, 2, task="gymnasium:reach:Reach-v0")
    line = ["--environment", "gymnasium:reach:Reach-v0", "--saliency", "1", "--videos", "0", "--episodes", "1"]
    assert main(["evaluate", "--policy", str(tmp_path / "p"), "--output", str(tmp_path / "e"), *line]) != 0
    assert not (tmp_path / "e").exists()
