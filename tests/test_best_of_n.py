"""Best-of-N: rollouts (order, files, resuming), their transitions in normalised units, the choice among samples, the whole stage."""

from __future__ import annotations

import copy
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kills import in_a_process, kill_and_resume, kill_at_every_operation
from mutations import mutate
from postbc.agents.base import AGENT_FILE, PolicyAgent, load_agent
from postbc.agents.best_of_n import BestOfNAgent, BestOfNConfig
from postbc.agents.iql import IQL, IQLConfig
from postbc.agents.networks import Critics, adam, descend
from postbc.data.episodes import Dataset, Episode
from postbc.data.lazy import SparseFrames
from postbc.data.normalization import Normalization
from postbc.data.readers import read_dataset
from postbc.data.robomimic import read_robomimic, write_robomimic
from postbc.data.transitions import TransitionConfig
from postbc.errors import InputError, NotFiniteError
from postbc.files import load_tree, save_tree
from postbc.policies.base import About
from postbc.runs import Checkpoints, Run
from postbc.training import best_of_n, rollouts
from postbc.training.best_of_n import finetune_best_of_n
from postbc.training.results import read_result
from postbc.training.rollouts import collect_rollouts, encode_rows, read_rollouts, transition_batch
from test_dsrl import diffusion_policy
from test_dsrl_training import IGNORED, CountingEnv, EncodingPolicy
from toy import PIXELS, PointReach, ToyPolicy, draw, environment, stopped


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


# -- rollouts ------------------------------------------------------------------------------------------------------------------
class WithStates(PointReach):
    """Says its simulator states, as robosuite does."""

    def sim_states(self) -> np.ndarray:
        return np.concatenate([self.steps[:, None], self.at], 1).astype(float)


def with_states() -> Any:
    return replace(environment(), make=lambda n, **options: WithStates(n, **options))


def test_rollouts_are_written_as_robomimic_files(tmp_path: Path) -> None:
    policy = ToyPolicy()
    path = collect_rollouts(policy, with_states(), 23, tmp_path, seed=2, num_envs=6)
    assert path == tmp_path / "rollouts.hdf5"
    data = read_dataset(path)
    assert data.names == tuple(f"demo_{i}" for i in range(23))
    assert data.environment["env_name"] == "PointReach"
    assert set(data.filters) == {"success", "failure"}
    assert len(data.filters["success"]) + len(data.filters["failure"]) == 23
    for t in data:
        assert t.rewards is not None
        assert t.dones is not None
        assert t.states is not None
        solved = t.name in data.filters["success"]
        assert solved == bool(t.rewards.any()) == bool(t.dones[-1])
        assert len(t) == 30 if not solved else len(t) % 2 == 0  # whole chunks
        assert set(np.unique(t.rewards)) <= {0.0, 1.0}
        moved = t.state[:-1, :2] + 0.1 * t.actions[:-1]  # the recorded action led to the next observation
        np.testing.assert_allclose(t.state[1:, :2], moved, atol=1e-5)
        np.testing.assert_allclose(t.states[:, 1:], t.state, atol=1e-6)
        begins = np.random.default_rng(t.episode_seed).uniform(-1, 1, 4)
        np.testing.assert_allclose(t.state[0], begins, atol=1e-6)
    assert len({t.episode_seed for t in data}) == 23
    written = path.read_bytes()
    assert collect_rollouts(policy, with_states(), 23, tmp_path, seed=2, num_envs=6, resume=True) == path  # nothing left to do
    assert path.read_bytes() == written
    with pytest.raises(InputError, match="input of this run"):
        collect_rollouts(ToyPolicy(drift=0.5), with_states(), 23, tmp_path, seed=2, num_envs=6, resume=True)


class Interrupted(RuntimeError):
    pass


@pytest.mark.parametrize("saves_state", [True, False])
def test_collection_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves_state: bool) -> None:
    """Bit for bit; or, where the environment cannot say its state, with running episodes begun again, as a warning says."""
    where = environment(saves_state=saves_state)
    reference = collect_rollouts(ToyPolicy(), where, 20, tmp_path / "a", seed=1, num_envs=4)
    original, left = PointReach.step, [0]

    def failing(self: PointReach, chunks: np.ndarray) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Interrupted
        return original(self, chunks)

    monkeypatch.setattr(PointReach, "step", failing)
    monkeypatch.setattr(Checkpoints, "due", property(lambda self: True))
    attempts, path = 0, Path()
    while attempts < 100:
        left[0], attempts = 67, attempts + 1
        try:
            restarted = pytest.warns(UserWarning, match="begin again") if attempts > 1 and not saves_state else nullcontext()
            with restarted:
                path = collect_rollouts(ToyPolicy(), where, 20, tmp_path / "b", seed=1, num_envs=4, resume=True)
            break
        except Interrupted:
            continue
    assert 1 < attempts < 100
    if saves_state:
        assert reference.read_bytes() == path.read_bytes()
    else:
        a, b = read_dataset(reference), read_dataset(path)
        assert a.names == b.names
        assert all(np.array_equal(x.state[0], y.state[0]) for x, y in zip(a, b, strict=True))


def test_checkpoints_hold_what_is_in_flight_and_finished_episodes_wait_in_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are: a checkpoint's size is that of running episodes, and each finished one is written once."""
    sizes, written = [], []
    original, writer = Run.save, rollouts.write_robomimic

    def save(self: Run, step: int, state: Any) -> Path:
        path = original(self, step, state)
        held = [part for part in state["collector"]["partial"] if part]
        sizes.append((path.stat().st_size, sum(value.nbytes for part in held for value in part.values())))
        assert len(list(self.directory.glob(".rollouts.hdf5.parts/*.hdf5"))) == len(state["collector"]["finished"])
        return path

    def write(path: Path, dataset: Dataset) -> Path:
        written.append(Path(path).name)
        return writer(path, dataset)

    monkeypatch.setattr(Run, "save", save)
    monkeypatch.setattr(rollouts, "write_robomimic", write)
    monkeypatch.setattr(Checkpoints, "due", property(lambda self: True))
    path = collect_rollouts(Seeing(), environment(pixels=True), 12, tmp_path, seed=1, num_envs=2)
    assert sorted(written) == sorted([*(f"{i}.hdf5" for i in range(12)), "rollouts.hdf5"])
    assert max(size - held for size, held in sizes) < 3 * 32 * 32 * 10  # what is left is less than ten of an episode's frames
    assert sorted(file.name for file in tmp_path.iterdir() if file.name.startswith(".")) == []
    at_once = tmp_path / "at once"
    monkeypatch.setattr(Checkpoints, "due", False)
    other = collect_rollouts(Seeing(), environment(pixels=True), 12, at_once, seed=1, num_envs=2)
    assert other.read_bytes() == path.read_bytes()


def test_an_episode_that_was_put_aside_and_is_gone_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoints, "due", property(lambda self: True))
    with stopped(PointReach, "step", 100, Interrupted("now")):
        collect_rollouts(ToyPolicy(), environment(), 20, tmp_path, seed=1, num_envs=4)
    gone = sorted((tmp_path / ".rollouts.hdf5.parts").iterdir())[0]
    gone.unlink()
    with pytest.raises(InputError, match="put aside is not there") as error:
        collect_rollouts(ToyPolicy(), environment(), 20, tmp_path, seed=1, num_envs=4, resume=True)
    assert gone.name in str(error.value)


class Drawn(PointReach):
    """Says how many frames it has drawn, and draws none while it is told so."""

    def __init__(self, num_envs: int = 1, **options: Any) -> None:
        super().__init__(num_envs, **options)
        self.draws, self.drawings, self.frames = True, 0, np.zeros((num_envs, 3, PIXELS, PIXELS), np.uint8)

    def set_drawing(self, on: bool) -> None:
        self.draws = on

    def observation(self) -> Any:
        if self.draws:
            self.frames, self.drawings = draw(self.at), self.drawings + 1
        return {"image.top": self.frames.copy()}


class Seeing(ToyPolicy):
    """Finds the spots in the picture."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.shapes, self.normalization = {"image.top": (3, PIXELS, PIXELS)}, Normalization.identity(0, 2)

    def encode(self, observation: Any) -> Tensor:
        mass = observation["image.top"].float()[:, :2] + 1e-6
        places = torch.linspace(-1.2, 1.2, PIXELS)
        x, y = ((mass.sum(axis) * places).sum(-1) / mass.sum((-2, -1)) for axis in (-2, -1))
        return torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1)


@pytest.mark.parametrize("horizon", [30, 29])
def test_only_frames_that_transitions_need_are_drawn(tmp_path: Path, horizon: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is learnt is what frames of every step would teach; whoever wants another frame is told, not given a wrong one."""
    envs: list[Drawn] = []

    def make(n: int, **options: Any) -> Drawn:
        envs.append(Drawn(n, pixels=True, **options))
        return envs[-1]

    where, policy = replace(environment(), make=make, horizon=horizon), Seeing(chunk=4, drift=2.0, noise=0.3)
    found = {}
    for every in (1, 4):
        with Run(tmp_path / str(every), {}) as run:
            found[every] = rollouts.collect(
                policy, where, 9, run, {}, seed=0, num_envs=3, horizon=horizon, frames_every=every
            )  # fmt: skip
    assert envs[1].drawings < 0.45 * envs[0].drawings  # a chunk's end, and resets
    whole, sparse = (read_rollouts(found[every], policy, ours=True) for every in (1, 4))
    rules = TransitionConfig(success="zero-one", tail="pad")
    (a, facts), (b, same) = (transition_batch(data, policy, 0.9, rules, ours=True) for data in (whole, sparse))
    assert facts == same
    assert facts["success"] > 0.2
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for one, other in zip(whole, sparse, strict=True):
        frames = other.observations["image.top"]
        assert frames.shape == one.observations["image.top"].shape
        np.testing.assert_array_equal(frames[::4], one.observations["image.top"][::4])
        np.testing.assert_array_equal(one.actions, other.actions)
        for index in (slice(None), 1, np.array([0, 4, 6])):
            with pytest.raises(InputError, match=r"was not drawn[\s\S]*step [16]\b[\s\S]*0, 4, 8"):
                frames[index]
    with pytest.raises(InputError, match="was not drawn"):
        transition_batch(sparse, policy, 0.9, replace(rules, stride=1), ours=True)
    # the stage asks for what its transitions need
    asked: list[int] = []
    monkeypatch.setattr(best_of_n, "collect", lambda *args, frames_every, **options: asked.append(frames_every) or 1 / 0)
    for stride in (None, 1, 6):
        with pytest.raises(ZeroDivisionError):
            finetune_best_of_n(policy, where, tmp_path / f"stage {stride}", BestOfNConfig(eval_episodes=0), None,
                               TransitionConfig(stride=stride))  # fmt: skip
    assert asked == [4, 1, 2]


def test_the_frames_of_rollouts_are_those_that_their_file_says(tmp_path: Path) -> None:
    frames = SparseFrames(np.arange(3 * 12, dtype=np.uint8).reshape(3, 3, 2, 2), 7, 3)
    data = Dataset((Episode({"image.top": frames}, np.zeros((7, 2))),))
    path = write_robomimic(tmp_path / "r.hdf5", data)
    (read,) = read_robomimic(path, observation_keys=(), image_keys=["image.top"])
    np.testing.assert_array_equal(read.observations["image.top"][np.array([0, 3, 6])], frames.drawn)
    with pytest.raises(InputError, match="was not drawn"):
        write_robomimic(tmp_path / "n.hdf5", data, next_observations=True)
    with pytest.raises(InputError, match="not one frame for each"):
        SparseFrames(frames.drawn, 10, 3)
    for every, what in ((0, "at least 1"), (2.5, "at least 1"), (2, "one frame a step")):
        changed = write_robomimic(tmp_path / f"{every}.hdf5", data)
        with h5py.File(changed, "r+") as file:
            file["data/demo_0/obs/top_image"].attrs["every"] = every
        with pytest.raises(InputError, match=what):
            read_robomimic(changed, observation_keys=(), image_keys=["image.top"])


# -- transitions ---------------------------------------------------------------------------------------------------------------
def episodes(rewards: np.ndarray | None = None, width: int = 4, actions: int = 2, length: int = 9, count: int = 6) -> Dataset:
    """`count` random episodes; every other one succeeds at its last step unless `rewards` (length,) says otherwise."""
    rng = np.random.default_rng(0)
    end = np.eye(length)[-1]
    return Dataset.from_arrays(
        [rng.normal(size=(length, width)) for _ in range(count)], [rng.normal(size=(length, actions)) for _ in range(count)],
        rewards=[end * (i % 2) if rewards is None else rewards for i in range(count)], dones=[end > 0] * count,
    )  # fmt: skip


def test_transitions_are_in_the_policys_units_and_a_frame_is_encoded_once() -> None:
    policy = EncodingPolicy()
    policy.normalization = Normalization.from_dict(
        {"state_low": [0.0] * 4, "state_high": [2.0] * 4, "action_low": [0.0, 0.0], "action_high": [4.0, 4.0]}
    )
    data = episodes()
    batch, info = transition_batch(data, policy, 0.9, TransitionConfig())
    used = 3 * 5 + 3 * 6  # where a transition begins or ends: 0, 2, 4, 6, 8, and of a success its last two steps
    assert policy.frames == used
    assert info == {"episodes": 6, "env_steps": 54, "success": 0.5}
    # 9 steps, chunks of 2: a failure gives 0, 2, 4, 6; a success 0, 2, 4, 6 and its last two steps
    assert len(batch.reward) == 3 * 4 + 3 * 5
    first = data[1]
    start = 4  # after the four of the failure before it
    torch.testing.assert_close(batch.features[start, :4], torch.as_tensor(first.state[0]))
    torch.testing.assert_close(batch.next_features[start, :4], torch.as_tensor(first.state[2]))
    torch.testing.assert_close(batch.action[start], torch.as_tensor(first.actions[:2] / 2 - 1).flatten(), atol=1e-5, rtol=0)
    assert batch.reward[start + 4] == 1.0
    assert batch.discount[start + 4] == 0.0
    torch.testing.assert_close(batch.features[start + 4, :4], torch.as_tensor(first.state[7]))
    assert encode_rows(data, policy, torch.tensor([7, 53, 7])).shape == (3, 6)
    assert policy.frames == used + 2


@pytest.mark.parametrize("rewards", [np.zeros(9), -np.ones(9)])
def test_rollouts_without_any_success_say_so_before_anything_is_written(tmp_path: Path, rewards: np.ndarray) -> None:
    path = write_robomimic(tmp_path / "failures.hdf5", episodes(rewards))
    for rule in ("auto", "zero-one" if rewards[0] == 0 else "minus-one-zero"):
        with pytest.raises(InputError, match="othing to learn from") as error:
            finetune_best_of_n(
                ToyPolicy(), None, tmp_path / "run", BestOfNConfig(eval_episodes=0), IQLConfig(steps=5),
                TransitionConfig(success=rule), rollouts=path,
            )  # type: ignore[arg-type]  # fmt: skip
        assert str(path) in str(error.value)
    assert not (tmp_path / "run").exists()


def test_own_rollouts_without_any_success_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A seed without a result would bias a comparison."""
    config = BestOfNConfig(episodes=3, eval_episodes=2)
    finetune_best_of_n(ToyPolicy(drift=0.0, noise=1e-3), environment(), tmp_path, config, IQLConfig(steps=5), seed=1)
    assert "none of the 3 rollouts succeeded" in " ".join(capsys.readouterr().out.split())
    assert read_result(tmp_path).rollout_success == 0


def test_success_is_never_guessed(tmp_path: Path) -> None:
    """Shaped rewards need a rule; with one, they are used."""
    shaped = np.linspace(0.1, 0.8, 9)
    path = write_robomimic(tmp_path / "shaped.hdf5", episodes(shaped))
    policy, none = ToyPolicy(), BestOfNConfig(eval_episodes=0, log_every=5)
    with pytest.raises(InputError, match=r"shaped[\s\S]*say what success is"):
        finetune_best_of_n(policy, None, tmp_path / "run", none, IQLConfig(steps=5, hidden=(8,)), rollouts=path)
    rule = TransitionConfig(success=0.75)
    finetune_best_of_n(policy, None, tmp_path / "run", none, IQLConfig(steps=5, hidden=(8,)), rule, rollouts=path)
    assert read_result(tmp_path / "run").rollout_success == 1.0


@pytest.mark.parametrize(("width", "actions", "message"), [(5, 2, "observations"), (4, 3, "actions")])
def test_rollouts_of_another_robot_are_refused_and_nothing_is_written(
    tmp_path: Path, width: int, actions: int, message: str
) -> None:
    path = write_robomimic(tmp_path / "other.hdf5", episodes(width=width, actions=actions))
    with pytest.raises(InputError, match=message):
        finetune_best_of_n(
            ToyPolicy(), None, tmp_path / "run", BestOfNConfig(eval_episodes=0), IQLConfig(steps=5), rollouts=path
        )
    assert not (tmp_path / "run").exists()


def test_rollouts_of_another_task_are_refused(tmp_path: Path) -> None:
    path = write_robomimic(tmp_path / "other.hdf5", replace(episodes(), environment={"env_name": "Can"}))
    policy = ToyPolicy()
    policy.about = About(facts={"environment": "Lift"})  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"does not belong[\s\S]*Can[\s\S]*Lift"):
        read_rollouts(path, policy)
    policy.about = About(facts={"environment": "PickPlaceCan"})  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="does not belong"):
        finetune_best_of_n(policy, environment(), tmp_path / "run", BestOfNConfig(episodes=2), IQLConfig(steps=2))
    assert not (tmp_path / "run").exists()


def test_rollouts_of_a_real_robot_need_no_simulator(tmp_path: Path) -> None:
    path = write_robomimic(tmp_path / "robot.hdf5", episodes())
    with h5py.File(path, "a") as file:
        file["data"].attrs.pop("env_args", None)
    config = BestOfNConfig(eval_episodes=0, log_every=5)
    finetune_best_of_n(ToyPolicy(), None, tmp_path / "run", config, IQLConfig(steps=10, hidden=(8,)), rollouts=path)
    result = read_result(tmp_path / "run")
    assert result.success_after is None
    assert result.curve == ()
    assert result.rollout_success == 0.5
    with pytest.raises(InputError, match="environment is needed"):
        finetune_best_of_n(ToyPolicy(), None, tmp_path / "other", BestOfNConfig(), rollouts=path)


def test_replaced_rollouts_are_refused_on_resume(tmp_path: Path) -> None:
    path, config = write_robomimic(tmp_path / "r.hdf5", episodes()), BestOfNConfig(eval_episodes=0)
    finetune_best_of_n(ToyPolicy(), None, tmp_path / "run", config, IQLConfig(steps=2, hidden=(8,)), rollouts=path)
    write_robomimic(path, episodes(count=8))
    with pytest.raises(InputError, match=r"input of this run[\s\S]*rollouts"):
        finetune_best_of_n(
            ToyPolicy(), None, tmp_path / "run", config, IQLConfig(steps=2, hidden=(8,)), rollouts=path, resume=True
        )


# -- the choice ----------------------------------------------------------------------------------------------------------------
class Linear(Critics):
    """Q_i = the sum of the chunk, plus or minus something that only the mean forgives."""

    def __init__(self) -> None:
        super().__init__(4, 4, (), generator(0))

    def forward(self, features: Tensor, action: Tensor) -> Tensor:
        total = action.sum(-1)
        return torch.stack((total, 2 * action[..., 0] - total))


def test_one_sample_is_the_pretrained_policy() -> None:
    policy, observation = ToyPolicy(), {"state": normal(7, 4, seed=3)}
    for k in range(3):
        chunk = BestOfNAgent(policy, Linear(), samples=1).act(observation, generator(k))
        assert torch.equal(chunk, PolicyAgent(policy).act(observation, generator(k)))


@pytest.mark.parametrize("aggregate", ["min", "mean"])
def test_the_best_of_the_samples_is_played(aggregate: Any) -> None:
    policy, state = ToyPolicy(), normal(7, 4, seed=3)
    chunk = BestOfNAgent(policy, Linear(), samples=16, aggregate=aggregate).act({"state": state}, generator(5))
    assert chunk.shape == (7, 2, 2)
    noise = policy.seen[-1].view(16, 7, 2, 2)  # the same draws, one state at a time
    for j in range(7):
        single = ToyPolicy().sample(state[j].expand(16, 4), noise=noise[:, j])
        q = Linear()(state[j].expand(16, 4), single.flatten(1))
        q = q.min(0).values if aggregate == "min" else q.mean(0)
        torch.testing.assert_close(chunk[j], single[q.argmax()], atol=1e-5, rtol=1e-5)


def saved(directory: Path) -> BestOfNAgent:
    policy = diffusion_policy()
    agent = BestOfNAgent(policy, Critics(3, 4, (8,), generator(1), "relu").requires_grad_(False), IQLConfig(hidden=(8,)), 4)
    agent.save(directory)
    return agent


@pytest.fixture(scope="module")
def agent_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BestOfNAgent, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("agent")
    return directory, saved(directory), load_tree(directory / AGENT_FILE)


def test_an_agent_is_loaded_without_demonstrations(agent_files: Any) -> None:
    directory, original, tree = agent_files
    save_tree(directory / AGENT_FILE, tree)
    loaded, about = load_agent(directory)
    observation = {"state": normal(5, 3)}
    assert torch.equal(loaded.act(observation, generator(1)), original.act(observation, generator(1)))
    assert about.method == "bc"
    assert BestOfNAgent.load(directory, samples=7).samples == 7


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_changed_file_is_refused_or_plays_the_same(agent_files: Any, data: st.DataObject) -> None:
    directory, original, tree = agent_files
    tree = copy.deepcopy(tree)
    mutate(tree, data)
    save_tree(directory / AGENT_FILE, tree)
    refused, agent = "", original
    try:
        agent, _ = load_agent(directory)
    except InputError as error:
        refused = str(error)
    assert not refused or AGENT_FILE in refused
    if agent.samples < 1000:
        assert bool(agent.act({"state": normal(5, 3)}, generator(3)).isfinite().all())


# -- the whole stage -----------------------------------------------------------------------------------------------------------
SMALL = BestOfNConfig(episodes=20, samples=8, eval_episodes=20, log_every=50)
IQL_SMALL = IQLConfig(steps=120, hidden=(16,), expectile=0.7, discount=0.97, lr=3e-3, tau=0.02, layer_norm=False, batch_size=32)
NEGATIVE = TransitionConfig(reward="negative")


def test_a_runs_numbers_are_those_of_the_first_house(tmp_path: Path) -> None:
    finetune_best_of_n(ToyPolicy(drift=0.6), environment(), tmp_path, SMALL, IQL_SMALL, NEGATIVE, seed=3)
    result = read_result(tmp_path)
    assert result.curve == ((0, 0.35), (556, 0.15))
    assert (result.rollout_success, result.budget_env_steps, result.rollout_episodes) == (0.35, 556, 20)
    critics = load_tree(tmp_path / AGENT_FILE)["parameters"]
    assert [float(p.double().abs().sum()) for p in critics.values()] == pytest.approx(
        [70.324072, 9.127736, 9.246554, 0.383895], abs=1e-4
    )


def test_best_of_n_improves_the_toy_and_writes_its_results(tmp_path: Path) -> None:
    policy, config = ToyPolicy(drift=0.6), replace(SMALL, episodes=150, samples=16, eval_episodes=60, log_every=200)
    iql = replace(IQL_SMALL, steps=800, hidden=(64, 64), batch_size=256)
    finetune_best_of_n(policy, environment(), tmp_path / "run", config, iql, NEGATIVE, seed=0)
    result = read_result(tmp_path / "run")
    assert (result.finetuner, result.task, result.seed, result.episodes) == ("best-of-n", "toy/PointReach", 0, 60)
    assert result.success_before is not None
    assert result.success_after is not None
    assert result.success_after > result.success_before + 0.25
    assert result.budget_env_steps == read_dataset(tmp_path / "run/rollouts.hdf5").num_steps
    assert BestOfNAgent.load(tmp_path / "run", policy).samples == 16
    with pytest.raises(InputError, match="already holds a run"):
        finetune_best_of_n(policy, environment(), tmp_path / "run", config, iql, NEGATIVE, seed=0)
    # another critic from the same collection, given as a file, is the same critic
    finetune_best_of_n(
        policy, environment(), tmp_path / "again", config, iql, NEGATIVE, rollouts=tmp_path / "run/rollouts.hdf5", seed=0
    )  # fmt: skip
    a, b = (load_tree(tmp_path / d / AGENT_FILE)["parameters"] for d in ("run", "again"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_diverging_critic_ends_the_run_and_is_not_saved(tmp_path: Path) -> None:
    path = write_robomimic(tmp_path / "r.hdf5", episodes())
    iql = replace(IQL_SMALL, lr=1e11, steps=400)
    with pytest.raises(NotFiniteError, match=r"not finite[\s\S]*step \d+"):
        finetune_best_of_n(
            ToyPolicy(), None, tmp_path / "run", BestOfNConfig(eval_episodes=0, log_every=10), iql, rollouts=path
        )
    assert not (tmp_path / "run" / AGENT_FILE).exists()


def test_an_environment_is_made_for_whole_chunks_of_single_steps(tmp_path: Path) -> None:
    """Rollouts go on after the first success of a chunk, and end there."""
    envs: list[CountingEnv] = []

    def make(n: int, **options: Any) -> CountingEnv:
        envs.append(CountingEnv(n, **options))
        return envs[-1]

    collect_rollouts(ToyPolicy(drift=2.0), replace(environment(), make=make), 4, tmp_path, num_envs=10)
    assert (envs[-1].num_envs, envs[-1].chunk, envs[-1].terminate_on) == (4, 1, "never")
    for t in read_dataset(tmp_path / "rollouts.hdf5"):
        assert t.rewards is not None
        assert t.rewards[:-2].sum() == 0  # the chunk of the first success is the last


def stage(directory: Path) -> None:
    config = replace(SMALL, episodes=8, eval_episodes=4, checkpoint_seconds=0.0, log_every=10, num_envs=4)
    iql = replace(IQL_SMALL, steps=60, hidden=(8,), batch_size=16)
    finetune_best_of_n(ToyPolicy(drift=0.6), environment(), directory, config, iql, seed=3, resume=True)


def test_a_stage_that_is_interrupted_ends_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage(tmp_path / "a")
    original, calls = IQL.learn, [0]

    def failing(self: IQL, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] % 3 == 0:
            raise Interrupted
        return original(self, *args)

    monkeypatch.setattr(IQL, "learn", failing)
    for _ in range(20):
        try:
            stage(tmp_path / "b")
            break
        except Interrupted:
            continue
    assert calls[0] > 6
    for name in (AGENT_FILE, "metrics.csv", "rollouts.hdf5"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_rollouts_of_another_run_are_refused_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: IQL, *args: Any) -> Any:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(IQL, "learn", failing)
        with pytest.raises(Interrupted):
            stage(tmp_path / "a")
    other = collect_rollouts(ToyPolicy(drift=0.6), environment(), 8, tmp_path / "b", seed=4)
    other.replace(tmp_path / "a/rollouts.hdf5")
    with pytest.raises(InputError, match="not those that this run began"):
        stage(tmp_path / "a")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("when", ["at random", "at every operation"])
def test_kills_change_nothing(tmp_path: Path, when: str) -> None:
    in_a_process(__file__, tmp_path, when)


if __name__ == "__main__":
    weight = torch.zeros(1, requires_grad=True)
    descend(adam([weight], 1e-3), weight.sum())  # imports much at its first step, which the forks then have already
    if sys.argv[2] == "at random":
        kill_and_resume(stage, Path(sys.argv[1]), sys.argv[2], IGNORED)
    else:
        kill_at_every_operation(stage, Path(sys.argv[1]), IGNORED, stride=17)
