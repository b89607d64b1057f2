"""Evaluation against a toy environment whose episodes can be computed by hand, and against what the first house found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import toy
from postbc.environments.chunk import ChunkStep, Observations
from postbc.environments.registry import Environment
from postbc.errors import InputError
from postbc.evaluation import Episode, Evaluation, evaluate
from postbc.seeding import EVALUATION_SEED, episode_seed, evaluation_seeds, make_generator

S, T, A = 3, 4, 2


class Plane:
    """A point on a plane: x += action, successful within 0.5 of the origin. The seed decides where it starts."""

    action_dim, chooses_episodes = A, True

    def __init__(self, num_envs: int, chunk: int, horizon: int, terminate_on: str, width: int = S, log: Any = None) -> None:
        assert (chunk, terminate_on) == (T, "chunk_success")
        self.num_envs, self.chunk, self.horizon, self.log = num_envs, chunk, horizon, log
        self.shapes: Mapping[str, tuple[int, ...]] = {"state": (width,)}
        self.x, self.t, self.live = np.zeros((num_envs, A)), np.zeros(num_envs, int), np.zeros(num_envs, bool)
        self.closed = False

    def reset(self, seeds: Any, mask: np.ndarray | None = None) -> Observations:
        for i in np.flatnonzero(np.ones(self.num_envs, bool) if mask is None else mask):
            self.x[i] = np.random.default_rng(int(seeds[i])).uniform(-3, 3, A)
            self.t[i], self.live[i] = 0, True
            if self.log is not None:
                self.log.append(int(seeds[i]))
        return self.observation()

    def observation(self) -> Observations:
        return {"state": np.column_stack([self.x, self.t]).astype(np.float32)}

    def step(self, chunks: np.ndarray) -> ChunkStep:
        was = self.live.copy()
        taken = np.where(was, np.minimum(T, self.horizon - self.t), 0)
        hits = np.zeros((self.num_envs, T), bool)
        for k in range(T):
            on = k < taken
            self.x[on] += chunks[on, k]
            hits[:, k] = on & (np.linalg.norm(self.x, axis=1) < 0.5)
        self.t += taken
        whole = hits.all(1)
        out = was & ~whole & (self.t >= self.horizon)
        self.live &= ~(whole | out)
        return ChunkStep(self.observation(), hits * 1.0, hits, taken, whole, out, np.zeros(self.num_envs, bool))

    def get_state(self) -> None: ...

    def set_state(self, state: Any) -> None: ...

    def close(self) -> None:
        self.closed = True


def plane(**options: Any) -> Environment:
    return Environment("toy/Plane", lambda num_envs, **arguments: Plane(num_envs, **arguments, **options), 18, T)


class Homing:
    """Goes to the origin over a chunk, with noise. Raw units."""

    chunk, action_dim, observation_steps, shapes = T, A, 1, {"state": (S,)}
    device = torch.device("cpu")

    def __init__(self, clumsiness: float) -> None:
        self.clumsiness = clumsiness

    def act(self, observation: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        assert torch.is_inference_mode_enabled()
        state = observation["state"]
        noise = torch.randn(len(state), T, A, generator=generator) * self.clumsiness
        return -state[:, None, :2] / torch.tensor([2.0, 2.0, 1e9, 1e9]).view(T, 1) + noise


def by_hand(clumsiness: float, seed: int, episodes: int, n: int, horizon: int = 18) -> list[tuple[bool, bool, int, int | None]]:
    """One environment after another, with the draws that `evaluate` documents."""
    found: dict[int, tuple[bool, bool, int, int | None]] = {}
    generator = make_generator(seed, "evaluation/acting")
    index, t = list(range(n)), [0] * n
    seeds = evaluation_seeds(episodes)
    x = [np.random.default_rng(int(seeds[i])).uniform(-3, 3, A) for i in range(n)]
    first: list[int | None] = [None] * n
    while len(found) < episodes:
        noise = torch.randn(n, T, A, generator=generator).double().numpy() * clumsiness
        for j in range(n):
            start = np.float32(x[j])
            plan = (-start[None] / np.array([[2.0], [2.0], [1e9], [1e9]], np.float32)) + np.float32(noise[j])
            hits = []
            for k in range(min(T, horizon - t[j])):
                x[j] = x[j] + plan[k]
                t[j] += 1
                hits.append(bool(np.linalg.norm(x[j]) < 0.5))
                if hits[-1] and first[j] is None:
                    first[j] = t[j]
            whole = len(hits) == T and all(hits)
            if whole or t[j] >= horizon:
                if index[j] < episodes:
                    found[index[j]] = (first[j] is not None, whole, t[j], first[j])
                index[j] += n
                x[j] = np.random.default_rng(int(seeds[min(index[j], episodes - 1)])).uniform(-3, 3, A)
                t[j], first[j] = 0, None
    return [found[i] for i in range(episodes)]


def run(clumsiness: float, **options: Any) -> Evaluation:
    return evaluate(Homing(clumsiness), plane(), progress=False, **{"episodes": 23, "num_envs": 5, **options})


def seen(evaluation: Evaluation) -> list[tuple[bool, bool, int, int | None]]:
    return [(e.success, e.chunk_success, e.steps, e.first_success_step) for e in evaluation.episodes]


def test_episodes_equal_those_computed_by_hand() -> None:
    for clumsiness, seed in ((0.02, 3), (0.4, 11)):
        result = run(clumsiness, agent_seed=seed)
        assert [e.episode_seed for e in result.episodes] == evaluation_seeds(23).tolist()
        assert {e.seed for e in result.episodes} == {seed}
        assert seen(result) == by_hand(clumsiness, seed, 23, 5)
    assert 0 < result.chunk_success_rate < result.success_rate  # the two definitions differ here
    assert run(0.4, agent_seed=11) == result  # and again
    assert run(0.4, agent_seed=12) != result


def test_episodes_equal_those_of_the_first_house() -> None:
    """`evaluate` of the first house with one member, seed 11: the random numbers and the book-keeping are the same."""
    result = run(0.4, agent_seed=11)
    assert [e.steps for e in result.episodes] == GOLDEN["steps"]
    assert [e.first_success_step for e in result.episodes] == GOLDEN["first"]
    assert [e.total_reward for e in result.episodes] == GOLDEN["reward"]


GOLDEN: dict[str, list[Any]] = {
    "steps": [18, 18, 18, 18, 18, 18, 18, 18, 18, 18, 18, 18, 18, 18, 18, 18, 18, 12, 18, 18, 18, 18, 18],
    "first": [5, 1, 2, 2, 2, 12, 5, 6, 2, 2, None, 5, 2, 10, 2, 1, 2, 3, 2, 17, 5, 5, 13],
    "reward": [5, 2, 8, 7, 6, 4, 3, 3, 4, 3, 0, 2, 2, 3, 5, 6, 5, 7, 6, 2, 5, 5, 4],
}


def test_recorded_actions_replay_the_episode() -> None:
    result = run(0.4, record_actions=True)
    for e in result.episodes:
        actions = result.actions[e.episode_seed]
        assert actions.shape == (e.steps, A)
        x = np.random.default_rng(e.episode_seed).uniform(-3, 3, A) + np.cumsum(actions.astype(float), 0)
        hits = np.flatnonzero(np.linalg.norm(x, axis=1) < 0.5)
        assert (hits[0] + 1 if len(hits) else None) == e.first_success_step
        assert e.initial_observation is not None
        np.testing.assert_allclose(
            e.initial_observation[:2], np.random.default_rng(e.episode_seed).uniform(-3, 3, A), rtol=1e-6
        )


def test_seeds_are_disjoint_from_training_and_checked() -> None:
    log: list[int] = []
    evaluate(Homing(0.1), plane(log=log), episodes=6, num_envs=4, progress=False)
    assert set(log) == set(range(EVALUATION_SEED, EVALUATION_SEED + 6))
    assert max(episode_seed(k, 7) for k in range(2000)) < EVALUATION_SEED
    with pytest.raises(InputError, match="kept apart"):
        run(0.1, seed=5)
    with pytest.raises(InputError, match="at least one episode"):
        run(0.1, episodes=0)
    assert run(0.4, seed=EVALUATION_SEED + 1000) != run(0.4)


def test_fewer_episodes_than_environments_and_closing() -> None:
    made: list[Plane] = []

    def make(num_envs: int, **options: Any) -> Plane:
        made.append(Plane(num_envs, **options))
        return made[-1]

    result = evaluate(Homing(0.1), Environment("x", make, 18), episodes=3, progress=False)
    assert len(result.episodes) == made[0].num_envs == 3
    assert made[0].closed


def test_wrong_sizes_are_input_errors() -> None:
    with pytest.raises(InputError, match="observation size"):
        evaluate(Homing(0.1), plane(width=23), episodes=2, progress=False)
    agent = Homing(0.1)
    agent.shapes = {"image.top": (3, 4, 4)}  # type: ignore[dict-item]
    with pytest.raises(InputError, match=r"does not have[\s\S]*image.top"):
        evaluate(agent, plane(), episodes=2, progress=False)
    agent = Homing(0.1)
    agent.action_dim = 7
    with pytest.raises(InputError, match="action size"):
        evaluate(agent, plane(), episodes=2, progress=False)


class Looking:
    """Moves towards the goal that it sees in the newest of two pictures, and checks that they are of consecutive steps."""

    chunk, action_dim, observation_steps, shapes = 2, 2, 2, {"image.top": (3, toy.PIXELS, toy.PIXELS)}
    device = torch.device("cpu")

    def act(self, observation: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        pictures = observation["image.top"]
        assert pictures.dtype == torch.uint8
        assert pictures.shape[1:] == (2, 3, toy.PIXELS, toy.PIXELS)
        newest = pictures[:, -1].float()
        grid = torch.linspace(-1.2, 1.2, toy.PIXELS)
        places = []
        for channel in (0, 1):
            weight = newest[:, channel] / newest[:, channel].sum((1, 2), keepdim=True)
            places.append(torch.stack([(weight.sum(1) * grid).sum(1), (weight.sum(2) * grid).sum(1)], 1))
        move = ((places[1] - places[0]) / toy.SPEED / 2).clamp(-1, 1)
        return move[:, None].expand(-1, 2, -1)


def test_from_pictures_and_with_a_past() -> None:
    result = evaluate(Looking(), toy.environment(pixels=True), episodes=12, num_envs=4, progress=False)
    assert result.success_rate == 1
    assert result.episodes[0].initial_observation is None


def test_file_round_trip(tmp_path: Path) -> None:
    result = run(0.4)
    result.save(tmp_path / "episodes.jsonl")
    assert Evaluation.load(tmp_path / "episodes.jsonl") == result
    row = result.summary()
    assert row["episodes"] == 23
    assert row["success_interval"][0] <= row["success"] <= row["success_interval"][1]
    assert row["success"] == pytest.approx(np.mean([e.success for e in result.episodes]))
    with pytest.raises(InputError, match="no such file"):
        Evaluation.load(tmp_path / "none.jsonl")


LINE = '{"seed": 0, "episode_seed": 5, "success": true, "chunk_success": false, "steps": 3, "first_success_step": 1, '
WHOLE = LINE + '"total_reward": 0.0, "diverged": false, "initial_observation": null}\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"member": 0}\n', "line 1"),
        ("", "no episodes"),
        (WHOLE + WHOLE, "not one evaluation"),
        (WHOLE + WHOLE.replace('"seed": 0', '"seed": 1').replace(": 5", ": 6"), "not one evaluation"),
        (WHOLE.replace("true", '"<b>"'), "line 1"),
        (WHOLE.replace('"steps": 3', '"steps": -3'), "line 1"),
        (WHOLE.replace("0.0", "NaN"), "line 1"),
        (WHOLE + "[" * 10_000 + "\n", "line 2"),
        ("\xff", "line 1"),
    ],
)
def test_files_that_are_no_evaluation(tmp_path: Path, text: str, words: str) -> None:
    assert Evaluation.load(_written(tmp_path / "good.jsonl", WHOLE)).episodes[0] == Episode(
        0, 5, True, False, 3, 1, 0.0, False, None
    )
    with pytest.raises(InputError, match=words) as error:
        Evaluation.load(_written(tmp_path / "bad.jsonl", text))
    assert "bad.jsonl" in str(error.value)
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        Evaluation.load(tmp_path / "bytes.jsonl")


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
