"""Our agents and environments in LeRobot: conversions and queue (any Python), and `lerobot-eval` itself (where it is installed)."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import toy
from postbc import cli
from postbc.agents.base import PolicyAgent, load_agent
from postbc.agents.best_of_n import BestOfNAgent
from postbc.agents.dppo import DPPOAgent, DPPOConfig
from postbc.agents.dsrl import DSRLAgent, DSRLConfig, make_actor
from postbc.agents.iql import IQLConfig, make_critics
from postbc.agents.residual import Networks, ResidualAgent, ResidualConfig
from postbc.data import pusht
from postbc.data.belonging import Facts
from postbc.data.episodes import COORDINATES
from postbc.data.lerobot import StatePart, state_parts
from postbc.data.normalization import Normalization
from postbc.environments import ENVIRONMENTS
from postbc.errors import InputError
from postbc.evaluation import evaluate
from postbc.lerobot.environment import LeRobotVectorEnv
from postbc.lerobot.export import PROCESSORS, Export
from postbc.lerobot.features import WIDTHS, Features, features_of_agent, keys_and_widths
from postbc.lerobot.player import Player
from postbc.policies import load_policy
from postbc.policies import save_policy as write_policy
from postbc.policies.base import About, policy_class
from postbc.schemas import plain
from postbc.seeding import EVALUATION_SEED, make_generator

KINDS = ("policy", "dsrl", "residual", "dppo", "best-of-n")
PARTS = ("robot_at", "goal")


def policy_of(shapes: dict[str, tuple[int, ...]], keys: tuple[str, ...], widths: tuple[int, ...], *, chunk: int = 3, steps: int = 1,
              low: float = -1.0, high: float = 1.0, action_dim: int = 2) -> Any:  # fmt: skip
    """A diffusion policy with random weights, of actions between `low` and `high`."""
    made = policy_class("diffusion")
    n = shapes.get("state", (0,))[0]
    about = About(method="bc", seed=3, facts=plain(Facts(state_keys=keys, state_dims=widths)))
    normalization = Normalization([low] * n, [high] * n, [low] * action_dim, [high] * action_dim)
    config = made.Config(hidden=16, denoising_steps=4, inference_steps=2)
    policy = made(config, shapes, action_dim, chunk, normalization, make_generator(0, "policy/initialisation"), steps, about)
    return policy.eval().requires_grad_(False)


def save_agent(kind: str, policy: Any, folder: Path) -> Path:
    """An agent of that kind with random networks, as a finetuning run would have left it."""
    generator, dims = torch.Generator().manual_seed(1), (policy.feature_dim, policy.chunk * policy.action_dim)
    if kind == "policy":
        folder.mkdir(parents=True)
        write_policy(folder / "policy.safetensors", policy)
    elif kind == "dsrl":
        dsrl = DSRLConfig(hidden=8, layers=1)
        DSRLAgent(policy, make_actor(dsrl, policy, generator), dsrl).save(folder)
    elif kind == "residual":
        networks = Networks(ResidualConfig(hidden=8, layers=1, proposals=2), *dims, generator)
        torch.nn.init.normal_(networks.actor[-1].weight, generator=generator)
        ResidualAgent(policy, networks, 0.3).save(folder)
    elif kind == "dppo":
        actor = copy.deepcopy(policy.network)
        with torch.no_grad():
            for p in actor.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
        DPPOAgent(policy, actor, DPPOConfig()).save(folder)
    else:
        iql = IQLConfig(hidden=(8,))
        BestOfNAgent(policy, make_critics(iql, *dims, generator), iql, 4).save(folder)
    return folder


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """toy/PointReach, with names for the parts of its state, and toy/Seen."""
    named = replace(toy.environment(), state_keys=PARTS)
    monkeypatch.setitem(WIDTHS, PARTS[0], 2)
    monkeypatch.setitem(ENVIRONMENTS, "toy/PointReach", lambda: named)
    monkeypatch.setitem(ENVIRONMENTS, "toy/Seen", lambda: toy.environment(pixels=True))


# -- features ------------------------------------------------------------------------------------------------------------------
@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["eef_pos", "object", "joint_pos", "goal", "observation.velocity"]), st.integers(1, 3)),
                min_size=1, max_size=5, unique_by=lambda x: x[0]), st.integers(1, 3))  # fmt: skip
def test_a_state_is_taken_apart_and_put_together(parts: list[tuple[str, int]], n: int) -> None:
    keys, widths = zip(*parts)
    total = sum(widths)
    features = Features({"state": (total,)}, state_parts(keys, widths), {})
    state = np.random.default_rng(0).normal(size=(n, total)).astype(np.float32)
    raw = features.write({"state": state})
    names = {"observation.state": "agent_pos", "observation.environment_state": "environment_state"}
    batch = {theirs: torch.as_tensor(raw[ours]) for theirs, ours in names.items() if ours in raw}
    if "observation.velocity" in keys:  # no environment of LeRobot's gives it under this name
        at = int(np.cumsum([0, *widths])[keys.index("observation.velocity")])
        batch["observation.velocity"] = torch.as_tensor(state[:, at : at + widths[keys.index("observation.velocity")]])
    assert {name: tuple(value.shape[1:]) for name, value in batch.items()} == {k: v[1] for k, v in features.theirs.items()}
    assert torch.equal(features.read(batch, torch.device("cpu"))["state"], torch.as_tensor(state))


def test_frames_come_as_bytes_or_as_shares() -> None:
    """uint8 -> LeRobot's float / 255 -> uint8 is the identity, for every value."""
    frames = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(3, 1)
    features = Features({"image.top": (3, 16, 16)}, (), {"image.top": "observation.images.top"})
    pixels = features.write({"image.top": frames})["pixels"]["top"]
    assert pixels.shape == (1, 16, 16, 3)
    shares = torch.as_tensor(pixels).movedim(-1, 1).float() / 255
    for batch in (shares, torch.as_tensor(frames)):
        assert torch.equal(
            features.read({"observation.images.top": batch}, torch.device("cpu"))["image.top"], torch.as_tensor(frames)
        )


def test_what_is_not_observed_is_said() -> None:
    features = Features({"state": (3,)}, (StatePart("a", "observation.state", 0, 3),), {})
    for batch, found in (
        ({"observation.goal": torch.zeros(1, 3)}, "observation.goal"),
        ({"observation.state": torch.zeros(1, 4)}, "4"),
    ):
        with pytest.raises(InputError, match=f"(?s)observation.state.*{found}"):
            features.read(batch, torch.device("cpu"))


def test_widths_that_are_not_known() -> None:
    keys = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")
    assert keys_and_widths(keys, 23) == (keys, (3, 4, 2, 14))
    assert keys_and_widths((), 5) == (("state",), (5,))
    assert keys_and_widths(("a", "b"), 5) == (("state",), (5,))
    assert keys_and_widths((), 0) == ((), ())


# -- the player ----------------------------------------------------------------------------------------------------------------
def batches(count: int, size: int = 2) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(5)
    names = ("observation.state", "observation.environment_state")
    return [{**{name: torch.rand(size, 2, generator=draw) for name in names}, "task": [""] * size} for _ in range(count)]


@pytest.mark.parametrize(("steps", "play"), [(1, None), (2, None), (2, 2), (3, 1)])
def test_every_batch_is_seen_and_some_decide(steps: int, play: int | None) -> None:
    """As if the agent had been asked at every `n_action_steps`-th state, with the newest observations, the first repeated before it."""
    agent = PolicyAgent(policy_of({"state": (4,)}, PARTS, (2, 2), steps=steps))
    features = features_of_agent(agent, agent.policy.about)
    player, generator = Player(agent, features, 7, play), make_generator(7, "evaluation/acting")
    for _ in range(2):  # two episodes
        player.reset()
        seen = batches(7)
        states = [torch.cat([b["observation.state"], b["observation.environment_state"]], 1) for b in seen]
        for i, batch in enumerate(seen):
            k = i % (play or agent.chunk)
            if k == 0:
                newest = torch.stack([states[max(0, j)] for j in range(i - steps + 1, i + 1)], 1)
                chunk = agent.act({"state": newest if steps > 1 else states[i]}, generator)
            assert torch.equal(player.select_action(batch), chunk[:, k])
    with pytest.raises(InputError, match="number of states has changed"):
        player.select_action(batches(1, size=3)[0])
    player.reset()
    assert player.select_action(batches(1, size=3)[0]).shape == (3, 2)
    assert player.predict_action_chunk(batches(1, size=3)[0]).shape == (3, agent.chunk, 2)


def test_more_than_a_chunk_is_refused() -> None:
    agent = PolicyAgent(policy_of({"state": (4,)}, PARTS, (2, 2)))
    with pytest.raises(InputError, match=r"(?s)n_action_steps.*1 to 3"):
        Player(agent, features_of_agent(agent, agent.policy.about), 0, 4)


def test_one_hypothesis_an_episode() -> None:
    """A coherent policy's coordinates are drawn at a reset, and stay."""
    agent: Any = PolicyAgent(policy_of({"state": (4,), COORDINATES: (5,)}, PARTS, (2, 2)))
    features, seen = features_of_agent(agent, agent.policy.about), []
    assert set(features.theirs) == {"observation.state", "observation.environment_state"}
    player = Player(agent, features, 0, 1)
    agent.act = lambda observation, generator: seen.append(observation[COORDINATES]) or torch.zeros(2, 3, 2)
    for episode in range(2):
        player.reset()
        for batch in batches(2):
            player.select_action(batch)
        assert torch.equal(seen[2 * episode], seen[2 * episode + 1])
        assert seen[0].shape == (2, 5)
    assert not torch.equal(seen[0], seen[2])


# -- the environment -----------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("toys")
def test_an_environment_as_lerobot_steps_it() -> None:
    env = LeRobotVectorEnv(ENVIRONMENTS["toy/PointReach"](), 3, horizon=5)
    observation, info = env.reset(seed=EVALUATION_SEED)
    assert env.observation_space.contains(observation)
    reference = toy.PointReach(3, chunk=1, horizon=5)
    expected = reference.reset(EVALUATION_SEED + np.arange(3))["state"]
    np.testing.assert_array_equal(np.concatenate([observation["agent_pos"], observation["environment_state"]], 1), expected)
    assert info["is_success"].tolist() == [False] * 3
    done = np.zeros(3, bool)
    for _ in range(5):
        goal = observation["environment_state"] - observation["agent_pos"]
        observation, rewards, terminated, truncated, info = env.step(goal.astype(np.float32))
        step = reference.step(goal[:, None])
        assert (rewards.tolist(), info["is_success"].tolist()) == (step.rewards[:, 0].tolist(), step.success.tolist())
        assert not (done & info["is_success"]).any()  # who has ended waits
        done |= terminated | truncated
    assert done.all()
    again, _ = env.reset(seed=[7, 8, 9], options={"reset_mask": np.array([True, False, False])})
    assert not np.array_equal(again["agent_pos"][0], observation["agent_pos"][0])
    np.testing.assert_array_equal(again["agent_pos"][1:], observation["agent_pos"][1:])
    assert env.call("_max_episode_steps") == (5, 5, 5)
    assert (env.call("task"), env.call("task_description")) == (("toy/PointReach",) * 3, ("",) * 3)
    with pytest.raises(AttributeError):
        env.get_attr("envs")
    with pytest.warns(UserWarning, match="cannot be drawn"):
        assert env.call("render")[2].shape == (256, 256, 3)
    with pytest.raises(InputError, match="one entry an environment"):
        env.reset(seed=[1])
    a, _ = env.reset()
    b, _ = env.reset()
    assert not np.array_equal(a["agent_pos"], b["agent_pos"])


@pytest.mark.usefixtures("toys")
def test_a_seen_environment() -> None:
    env = LeRobotVectorEnv(ENVIRONMENTS["toy/Seen"](), 2, task_description="reach", render=False)
    observation, _ = env.reset(seed=[1, 2])
    assert env.observation_space.contains(observation)
    np.testing.assert_array_equal(observation["pixels"]["top"], np.moveaxis(env.env.observation()["image.top"], 1, -1))
    assert env.call("task_description") == ("reach", "reach")
    assert not np.any(env.call("render"))


@pytest.mark.simulator
def test_lift_one_action_at_a_time_is_lift_in_chunks() -> None:
    pytest.importorskip("robosuite")
    lift = ENVIRONMENTS["postbc/Lift"]()
    env, reference = LeRobotVectorEnv(lift, 2), lift.make(2, chunk=4, horizon=300, terminate_on="never")
    observation, _ = env.reset(seed=EVALUATION_SEED)
    chunks, expected = np.random.default_rng(0).uniform(-1, 1, (3, 2, 4, 7)), reference.reset(EVALUATION_SEED + np.arange(2))
    for chunk in chunks:
        np.testing.assert_array_equal(
            np.concatenate([observation["agent_pos"], observation["environment_state"]], 1), expected["state"]
        )
        for k in range(4):
            observation, *_ = env.step(chunk[:, k])
        expected = reference.step(chunk).observation
    env.close()
    reference.close()


# -- export --------------------------------------------------------------------------------------------------------------------
def test_export_and_its_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = policy_of({"state": (4,)}, PARTS, (2, 2), steps=2)
    agent = save_agent("dsrl", policy, tmp_path / "dsrl/seed_3")
    command = ["lerobot", "export", "--agent", str(tmp_path / "dsrl"), "--output", str(tmp_path / "out")]
    assert cli.main([*command, "--n-action-steps", "4"]) == 2
    assert not (tmp_path / "out").exists()
    assert cli.main([*command, "--n-action-steps", "2"]) == 0
    for name in ("agent.safetensors", "base_policy.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (agent / name).read_bytes()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["type"], config["n_obs_steps"], config["n_action_steps"], config["seed"]) == ("postbc", 2, 2, None)
    assert config["input_features"] == {
        "observation.state": {"type": "STATE", "shape": [2]}, "observation.environment_state": {"type": "ENV", "shape": [2]}
    }  # fmt: skip
    assert cli.main(command) == 2
    assert "something already" in capsys.readouterr().err
    save_agent("policy", policy, tmp_path / "dsrl/seed_4")
    assert cli.main([*command[:-1], str(tmp_path / "other")]) == 2
    assert "several" in capsys.readouterr().err
    told = policy_of({"state": (4,), "language": (3,)}, PARTS, (2, 2))
    save_agent("policy", told, tmp_path / "told")
    with pytest.raises(InputError, match="told its task"):
        Export(tmp_path / "told", tmp_path / "other").run()
    file = tmp_path / "told/policy.safetensors"
    write_policy(file, policy)
    Export(file, tmp_path / "of_a_file").run()
    assert load_policy(tmp_path / "of_a_file").observation_steps == 2


def test_an_imported_policy_reads_what_it_read() -> None:
    """Its own split of the state, whatever the parts are called, and its own names of cameras."""

    class Config:
        kind, own, cameras = "lerobot", 1, {"image.top": "observation.image"}

    agent: Any = PolicyAgent(policy_of({"state": (4,)}, PARTS, (2, 2)))
    agent.policy.config, agent.shapes = Config, {"state": (4,), "image.top": (3, 8, 8)}
    assert features_of_agent(agent, agent.policy.about).theirs == {
        "observation.state": ("STATE", (1,)), "observation.environment_state": ("ENV", (3,)), "observation.image": ("VISUAL", (3, 8, 8))
    }  # fmt: skip


# -- where LeRobot is installed (make test-lerobot) ----------------------------------------------------------------------------
needs_plugins = pytest.mark.skipif(
    importlib.util.find_spec("lerobot_policy_postbc") is None, reason="needs LeRobot: make test-lerobot"
)


def lerobot(script: str, *arguments: str) -> None:
    module, before = importlib.import_module(f"lerobot.scripts.{script}"), sys.argv
    sys.argv = [script, *arguments]
    try:
        module.main()
    finally:
        sys.argv = before


def lerobot_eval(output: Path, *arguments: str, episodes: int = 3, batch: int = 3, render: bool = False) -> dict[str, Any]:
    """Successes and returns of `lerobot-eval` on `postbc evaluate`'s episodes."""
    lerobot("lerobot_eval", *arguments, f"--env.render={render}", "--policy.device=cpu", f"--eval.n_episodes={episodes}",
            f"--eval.batch_size={batch}", f"--seed={EVALUATION_SEED}", f"--output_dir={output}")  # fmt: skip
    metrics: dict[str, Any] = json.loads((output / "eval_info.json").read_text())["per_task"][0]["metrics"]
    return metrics


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@needs_plugins
@pytest.mark.usefixtures("toys", "offline")
@pytest.mark.parametrize("kind", KINDS)
def test_lerobot_eval_is_our_evaluation(tmp_path: Path, kind: str) -> None:
    """The same returns and successes on the same episodes, by --policy.type and by --policy.path; saved again it is the same folder."""
    folder = save_agent(kind, policy_of({"state": (4,)}, PARTS, (2, 2), steps=2), tmp_path / "run/seed_3")
    agent, _ = load_agent(folder)
    ours = evaluate(agent, "toy/PointReach", episodes=12, num_envs=12, agent_seed=3, progress=False)
    returns = [-float(e.first_success_step - 1 if e.success else e.steps) for e in ours.episodes]
    task = ["--env.type=postbc", "--env.task=toy/PointReach"]
    chosen = ["--policy.type=postbc", f"--policy.agent={tmp_path / 'run'}"]
    found = lerobot_eval(tmp_path / "a", *chosen, *task, episodes=12, batch=12)
    assert (found["successes"], found["sum_rewards"]) == ([e.success for e in ours.episodes], returns)
    assert 0 < sum(found["successes"]) < 12
    exported = tmp_path / "exported"
    assert cli.main(["lerobot", "export", "--agent", str(folder), "--output", str(exported)]) == 0
    again = lerobot_eval(tmp_path / "b", f"--policy.path={exported}", *task, episodes=12, batch=12)
    assert again["sum_rewards"] == returns
    two = lerobot_eval(tmp_path / "c", f"--policy.path={exported}", *task, episodes=4, batch=2)
    assert len(two["successes"]) == 4
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    config = PreTrainedConfig.from_pretrained(exported, cli_overrides=["--device=cpu"])
    policy = get_policy_class("postbc").from_pretrained(exported, config=config)
    policy.save_pretrained(tmp_path / "saved")
    for made, expected in zip(make_pre_post_processors(config), PROCESSORS):
        made.save_pretrained(tmp_path / "saved")
        assert json.loads((tmp_path / "saved" / f"{expected['name']}.json").read_text()) == expected
    assert {f.name for f in exported.iterdir()} == {f.name for f in (tmp_path / "saved").iterdir()}
    assert get_policy_class("postbc").from_pretrained(tmp_path / "saved", config=None).config == config


@needs_plugins
@pytest.mark.usefixtures("toys", "offline")
def test_cameras_in_lerobot_eval(tmp_path: Path) -> None:
    folder = save_agent("dsrl", policy_of({"image.top": (3, 32, 32)}, (), ()), tmp_path / "run")
    agent, _ = load_agent(folder)
    ours = evaluate(agent, "toy/Seen", episodes=4, num_envs=4, agent_seed=3, progress=False)
    found = lerobot_eval(tmp_path / "a", "--policy.type=postbc", f"--policy.agent={folder}", "--env.type=postbc", "--env.task=toy/Seen",
                         episodes=4, batch=4)  # fmt: skip
    assert found["sum_rewards"] == [-float(e.first_success_step - 1 if e.success else e.steps) for e in ours.episodes]


@needs_plugins
@pytest.mark.usefixtures("offline")
def test_push_t_in_lerobot_eval(tmp_path: Path) -> None:
    """Returns of the covered share, to rounding, and a video."""
    pytest.importorskip("gym_pusht")
    policy = policy_of({"state": (18,)}, pusht.STATE_KEYS, pusht.STATE_DIMS, chunk=8, low=0, high=512)
    folder = save_agent("dsrl", policy, tmp_path / "run")
    agent, _ = load_agent(folder)
    ours = evaluate(agent, "postbc/PushT", episodes=2, num_envs=2, agent_seed=3, horizon=20, progress=False)
    found = lerobot_eval(tmp_path / "a", "--policy.type=postbc", f"--policy.agent={folder}", "--env.type=postbc", "--env.task=PushT",
                         "--env.episode_length=20", episodes=2, batch=2, render=True)  # fmt: skip
    np.testing.assert_allclose(found["sum_rewards"], [e.total_reward for e in ours.episodes], atol=1e-9)
    assert max(found["sum_rewards"]) > 0
    assert len(list((tmp_path / "a/videos").glob("**/*.mp4"))) == 2


@needs_plugins
@pytest.mark.simulator
@pytest.mark.usefixtures("offline")
def test_lift_in_lerobot_eval(tmp_path: Path) -> None:
    pytest.importorskip("robosuite")
    from postbc.environments.robosuite.tasks import STATE_KEYS

    path = save_agent("policy", policy_of({"state": (19,)}, STATE_KEYS, (3, 4, 2, 10), action_dim=7), tmp_path / "policy")
    found = lerobot_eval(tmp_path / "a", "--policy.type=postbc", f"--policy.agent={path}", "--env.type=postbc", "--env.task=Lift",
                         "--env.episode_length=6", episodes=2, batch=2)  # fmt: skip
    assert found["successes"] == [False, False]
    assert found["sum_rewards"] == [0, 0]


@needs_plugins
@pytest.mark.usefixtures("toys", "offline")
@pytest.mark.parametrize(("arguments", "says"), [
    (["--policy.type=postbc"], "Which agent"),
    (["--policy.type=postbc", "--policy.agent=nowhere"], "no such file"),
    (["--policy.type=postbc", "--policy.agent=run", "--policy.n_action_steps=9"], "so many actions"),
    (["--policy.type=postbc", "--policy.agent=wide"], "not observed here"),
])  # fmt: skip
def test_refused_in_lerobot_eval(tmp_path: Path, arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_agent("policy", policy_of({"state": (4,)}, PARTS, (2, 2)), tmp_path / "run")
    save_agent("policy", policy_of({"state": (5,)}, PARTS, (2, 3)), tmp_path / "wide")
    with pytest.raises(InputError, match=says):
        lerobot_eval(tmp_path / "out", *arguments, "--env.type=postbc", "--env.task=toy/PointReach")


@needs_plugins
@pytest.mark.usefixtures("toys", "offline")
def test_a_robot_plays_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LeRobot's own way from a robot's numbers and bytes to an action, one state at a time; and its refusal to train."""
    shapes = {"state": (4,), "image.top": (3, 32, 32)}
    folder = save_agent("best-of-n", policy_of(shapes, ("robot_at",), (4,)), tmp_path / "run")
    Export(folder, tmp_path / "exported").run()
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors
    from lerobot.policies.utils import prepare_observation_for_inference
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    config = PreTrainedConfig.from_pretrained(tmp_path / "exported", cli_overrides=["--device=cpu"])
    policy = get_policy_class(config.type).from_pretrained(tmp_path / "exported", config=config)
    before, after = make_pre_post_processors(config, str(tmp_path / "exported"))
    agent, about = load_agent(folder)
    rng, generator = np.random.default_rng(0), make_generator(about.seed or 0, "evaluation/acting")
    policy.reset()
    for step in range(4):
        state, frame = rng.normal(size=4).astype(np.float32), rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        robot = {"observation.state": state, "observation.images.top": frame}
        batch = before(prepare_observation_for_inference(robot, torch.device("cpu"), "a task", "a robot"))
        with torch.inference_mode():
            action = after(policy.select_action(batch))
        if step % agent.chunk == 0:
            seen = {"state": torch.as_tensor(state)[None], "image.top": torch.as_tensor(frame).movedim(-1, 0)[None]}
            chunk = agent.act(seen, generator)
        torch.testing.assert_close(action, chunk[:, step % agent.chunk])
    with pytest.raises(InputError, match="not trained by LeRobot"):
        policy.forward(batch)
    with pytest.raises(InputError, match="not trained by LeRobot"):
        config.get_optimizer_preset()


def test_every_kind_of_agent_is_here() -> None:
    from postbc.agents.base import AGENTS

    assert set(KINDS) == {"policy", *AGENTS}
