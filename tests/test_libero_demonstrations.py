"""LIBERO's demonstrations in the simulator: its own files against LIBERO, replayed, drawn; and training from them, told the task."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from made import write_demonstrations
from postbc import cli
from postbc.data import Episode, read_dataset, write_robomimic
from postbc.data.libero_tasks import KITCHEN, find_tasks
from postbc.environments.libero import make
from postbc.errors import InputError
from postbc.experiments.recipe import load_recipe
from postbc.experiments.sweep import run_recipe
from test_data_libero import random_episode, write_libero
from test_libero import BOWL, STOVE, needs_libero, official, opened

pytestmark = [pytest.mark.simulator, needs_libero]
CAMERAS = ["image.agentview", "image.wrist"]
HAND = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
TWO = "libero/kitchen/8+14"  # BOWL, STOVE


def as_libero_records(task: str, seed: int, steps: int, size: int) -> tuple[dict[str, Any], np.ndarray]:
    """An episode as LIBERO's `create_dataset.py` records it, with LIBERO's own environment; and its first five actions."""
    from robosuite.utils.transform_utils import quat2axisangle

    from postbc.environments.libero.loading import import_libero

    import_libero()
    env = official(
        task, seed, has_offscreen_renderer=True, use_camera_obs=True, camera_names=["robot0_eye_in_hand", "agentview"],
        camera_heights=size, camera_widths=size,
    ).env  # fmt: skip
    rng, skipped, rows = np.random.default_rng(seed), [], []
    for j in range(steps + 5):
        action, state = rng.uniform(-0.6, 0.6, 7), env.sim.get_state().flatten()
        seen, *_ = env.step(action)
        if j < 5:
            skipped.append(action)
            continue
        hand = np.hstack([seen["robot0_eef_pos"], quat2axisangle(np.array(seen["robot0_eef_quat"]))])
        rows.append(
            (action, state, seen["agentview_image"], seen["robot0_eye_in_hand_image"], hand, seen["robot0_gripper_qpos"])
        )
    names = ("actions", "states", "agentview_rgb", "eye_in_hand_rgb", "ee_states", "gripper_states")
    episode: dict[str, Any] = {name: np.stack(values) for name, values in zip(names, zip(*rows))}
    episode["rewards"] = episode["dones"] = (np.arange(steps) == steps - 1).astype(np.uint8)
    episode["model_file"] = env.sim.model.get_xml()
    env.close()
    return episode, np.array(skipped)


@pytest.mark.slow
def test_a_file_of_liberos_is_what_our_environment_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Read, each action stands beside what our environment of cameras observes before it; so it is where the states are drawn."""
    seed, steps, size = 16 * 7 + 14, 6, 32
    opened(lambda: make(STOVE, images=True)).close()
    episode, skipped = as_libero_records(STOVE, seed, steps, size)
    path = write_libero(tmp_path, STOVE, [episode])
    data = read_dataset(path, image_keys=CAMERAS)
    env = make(STOVE, images=True, image_size=size, terminate_on="never")
    env.reset([seed])
    for action in skipped:
        env.step(action[None, None])
    seen = env.step(episode["actions"][:1, None]).observation
    arguments = ["demos", "convert", str(path), "--image-size", str(size), "--output", str(tmp_path / "drawn.hdf5")]
    assert cli.main(arguments) == 0
    drawn = read_dataset(tmp_path / "drawn.hdf5", image_keys=CAMERAS)
    for found in (data, drawn):
        assert (len(found[0]), found[0].task, found.tasks) == (steps - 1, STOVE, KITCHEN)
    late = []
    for t in range(steps - 1):
        for found in (data, drawn):  # LIBERO observes 2 ms early after an initial state has been set
            np.testing.assert_allclose(found[0].state[t], seen["state"][0], atol=3e-3)
            np.testing.assert_allclose(found[0].actions[t], episode["actions"][t + 1], rtol=1e-6)
            for name in CAMERAS:
                ours, theirs = (x.astype(int) for x in (seen[name][0], found[0].observations[name][t]))
                assert np.abs(theirs - ours).mean() < 3 < 10 < np.abs(theirs[:, ::-1] - ours).mean(), (t, name)
        late.append(np.linalg.norm(episode["ee_states"][t + 1, :3] - seen["state"][0, :3]))  # as the file's rows stand
        seen = env.step(data[0].actions[t][None, None]).observation
    assert np.mean(late) > 5e-3
    env.close()
    assert cli.main(["demos", "replay", str(path)]) == 0
    out = capsys.readouterr().out
    assert "0 of 1 succeeded" in out  # random actions, whose path it follows
    assert float(out.split("recorded path by at most ")[1].split()[0]) < 10


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "two.hdf5"
    arguments = [
        "demos",
        "collect",
        "--task",
        TWO,
        "--num",
        "4",
        "--operators",
        "operator_g",
        "--output",
        str(path),
        "--seed",
        "2",
    ]
    assert cli.main(arguments) == 0
    return path


def test_ours_say_their_tasks_and_replay_exactly(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = read_dataset(recorded)
    assert (data.tasks, data.environment["env_name"]) == (KITCHEN, TWO)
    assert sorted(e.task or "" for e in data) == [BOWL] * 2 + [STOVE] * 2
    for episode in data:
        assert episode.task is not None
        assert (episode.state[:, -16:] == np.eye(16)[KITCHEN.index(episode.task)]).all()  # observed as all sixteen are
    assert cli.main(["demos", "replay", str(recorded)]) == 0
    out = capsys.readouterr().out
    assert "4 of 4 succeeded" in out
    assert "at most 0.0 mm" in out


def cut(episode: Episode, steps: int) -> Episode:
    """Its first steps."""
    kept = {name: getattr(episode, name)[:steps] for name in ("actions", "rewards", "dones", "states")}
    return replace(episode, observations={name: values[:steps] for name, values in episode.observations.items()}, **kept)


@pytest.mark.slow
def test_drawing_equals_the_cameras_and_goes_on_where_it_was_stopped(recorded: Path, tmp_path: Path) -> None:
    """To the pixel what the environment shows; two processes write the same file as one, from whatever is there."""
    opened(lambda: make(STOVE, images=True)).close()
    from postbc.environments.libero import playback

    data, size = read_dataset(recorded, observation_keys=HAND), 16
    names = [next(e.name for e in data if e.task == task) for task in (BOWL, STOVE)]
    few = tmp_path / "few.hdf5"
    write_robomimic(few, replace(data, filters={}, episodes=tuple(cut(e, 8) for e in data if e.name in names)))

    def convert(output: str, *options: str) -> int:
        arguments = ["demos", "convert", str(few), "--image-size", str(size), "--output", str(tmp_path / output)]
        return cli.main([*arguments, *options])

    original, drawn_so_far = playback.write_robomimic, []

    def killed(path: Path, dataset: Any) -> Path:
        drawn_so_far.append(path)
        if len(drawn_so_far) > 1:
            raise KeyboardInterrupt
        return original(path, dataset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(playback, "write_robomimic", killed)
        with pytest.raises(KeyboardInterrupt):
            convert("one.hdf5")
    assert not (tmp_path / "one.hdf5").exists()
    stamp = drawn_so_far[0].stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(playback, "complete", lambda output, dataset: pytest.skip("stopped"))
        with pytest.raises(BaseException, match="stopped"):
            convert("one.hdf5")
    assert drawn_so_far[0].stat().st_mtime_ns == stamp  # it was not drawn again
    assert convert("one.hdf5") == 0
    assert convert("two.hdf5", "--jobs", "2") == 0
    assert (tmp_path / "one.hdf5").read_bytes() == (tmp_path / "two.hdf5").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["few.hdf5", "one.hdf5", "two.hdf5"]
    env = make("kitchen/8+14", images=True, image_size=size, terminate_on="never")
    drawn = read_dataset(tmp_path / "one.hdf5", image_keys=CAMERAS)
    assert drawn.shapes == {"state": (9,), "image.agentview": (3, size, size), "image.wrist": (3, size, size)}
    for episode in drawn:
        seen = env.reset([episode.episode_seed or 0])
        for t in range(8):
            for name in drawn.shapes:
                np.testing.assert_array_equal(np.asarray(episode.observations[name][t]), seen[name][0])
            seen = env.step(episode.actions[t][None, None]).observation
    env.close()


def test_what_cannot_be_played_or_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lift = write_demonstrations(tmp_path / "lift.hdf5")
    assert cli.main(["demos", "convert", str(lift), "--image-size", "16", "--output", str(tmp_path / "x.hdf5")]) == 2
    assert "none of LIBERO's tasks" in capsys.readouterr().err
    path = write_libero(tmp_path, find_tasks(STOVE)[0].name, [random_episode(np.random.default_rng(0))])
    assert cli.main(["demos", "replay", str(path)]) == 2
    assert "not this simulator's" in capsys.readouterr().err
    env = make(STOVE)
    width = 1 + env.playing[0].model.nq + env.playing[0].model.nv
    env.close()
    for xml in ("<mujoco/>", "no xml"):
        episode = {**random_episode(np.random.default_rng(0)), "states": np.zeros((9, width)), "model_file": xml}
        path = write_libero(tmp_path / "models", STOVE, [episode])
        assert cli.main(["demos", "replay", str(path)]) == 2
        assert "not of this scene" in capsys.readouterr().err
    assert not (tmp_path / "x.hdf5").exists()


def run(*arguments: str) -> None:
    assert cli.main([*arguments]) == 0


def test_from_cameras_and_language_to_a_finetuned_policy(recorded: Path, tmp_path: Path) -> None:
    """Demonstrations drawn, BC, posterior, PostBC, evaluation by task, Best-of-N: each command finds the environment by itself."""
    opened(lambda: make(STOVE, images=True)).close()
    seen = str(tmp_path / "seen.hdf5")
    few = read_dataset(recorded)
    one = next(e for e in few if e.task == STOVE)
    write_robomimic(tmp_path / "few.hdf5", replace(few, filters={}, episodes=(cut(one, 12),)))
    run("demos", "convert", str(tmp_path / "few.hdf5"), "--image-size", "16", "--output", seen)
    data = [
        "--data.demonstrations", seen, "--data.image-keys", "agentview_image", "wrist_image", "--data.language", "one-hot",
        "--data.minimum-range", "0.1",
    ]  # fmt: skip
    policy = ["--policy.hidden", "8", "--policy.encoder.keypoints", "2", "--policy.encoder.channels", "4"]
    few_steps = ["--pretraining.steps", "3", "--pretraining.batch-size", "4", "--policy.denoising-steps", "4"]
    policy += ["--policy.inference-steps", "2", *few_steps]
    run("pretrain", *data, *policy, "--pretraining.method", "bc", "--output", str(tmp_path / "bc"))
    small = ["--ensemble.ensemble-size", "2", "--ensemble.hidden", "8", "--ensemble.steps", "3"]
    run("posterior", "fit", *data, *small, "--encoder", str(tmp_path / "bc"), "--output", str(tmp_path / "posterior"))
    run("pretrain", *data, *policy, "--posterior", str(tmp_path / "posterior"), "--output", str(tmp_path / "postbc"))
    play = ["--policy", str(tmp_path / "postbc"), "--output"]
    run("evaluate", *play, str(tmp_path / "e"), "--episodes", "2", "--horizon", "8", "--num-envs", "2", "--videos", "0")
    summary = json.loads((tmp_path / "e/seed_0/evaluation.json").read_text())
    assert summary["environment"] == f"{TWO}-pixels16"
    assert [rate["task"] for rate in summary["tasks"]] == [BOWL, STOVE]
    best = [
        "--best-of-n.episodes",
        "2",
        "--best-of-n.num-envs",
        "2",
        "--best-of-n.horizon",
        "8",
        "--best-of-n.eval-episodes",
        "2",
    ]
    learn = ["--best-of-n.samples", "2", "--iql.steps", "3", "--iql.hidden", "8", "--iql.batch-size", "4"]
    run("finetune", "best-of-n", *play, str(tmp_path / "best"), *best, *learn)
    rollouts = read_dataset(tmp_path / "best/seed_0/rollouts.hdf5", image_keys=CAMERAS, check_actions=False)
    assert {e.task for e in rollouts} <= {BOWL, STOVE}
    assert {e.observations["image.wrist"].every for e in rollouts} == {4}  # drawn where chunks begin
    # one task at a time, of the same policy
    one = ["--environment", "libero/kitchen/14-pixels16", "--seeds", "0"]
    run(
        "evaluate",
        *play,
        str(tmp_path / "stove"),
        *one,
        "--episodes",
        "2",
        "--horizon",
        "8",
        "--num-envs",
        "2",
        "--videos",
        "0",
    )
    assert "tasks" not in json.loads((tmp_path / "stove/seed_0/evaluation.json").read_text())
    with pytest.raises(InputError, match="size"):
        make_wrong(tmp_path)


@pytest.mark.slow
def test_the_recipe_of_cameras_records_draws_and_finetunes_by_task(tmp_path: Path) -> None:
    opened(lambda: make(STOVE, images=True)).close()
    tiny: dict[str, Any] = {
        "environment": "libero/kitchen/14-pixels16", "finetune_in": ["libero/kitchen/14-pixels16"], "collect_num": 1,
        "collect_operators": ["operator_g"], "data": {"num_trajectories": 1}, "methods": ["bc"], "finetuners": ["best-of-n"],
        "seeds": [0], "episodes": 2, "horizon": 20, "num_envs": 2, "policy": {"hidden": 8, "encoder": {"channels": [4], "crop": 12}},
        "pretraining": {"steps": 3, "batch_size": 4}, "best_of_n": {"episodes": 2, "samples": 2},
        "iql": {"steps": 3, "hidden": [8], "batch_size": 4}, "jobs": 1,
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(json.dumps({"base": "libero-images-laptop", "about": "tiny", **tiny}))
    report = run_recipe(load_recipe(tmp_path / "tiny.yaml"), tmp_path / "x")
    drawn = read_dataset(tmp_path / "x/demonstrations.hdf5", image_keys=CAMERAS)
    assert (drawn.shapes["image.wrist"], drawn[0].task) == ((3, 16, 16), STOVE)
    (entry,) = json.loads((report / "summary.json").read_text())
    assert (entry["task"], entry["finetuner"]) == ("libero/kitchen/14-pixels16", "best-of-n")
    assert (tmp_path / "x/best-of-n/bc/libero_kitchen_14-pixels16/seed_0/results.json").exists()


def make_wrong(folder: Path) -> None:
    from postbc.stages.evaluate import Evaluate, evaluate_stage

    evaluate_stage(Evaluate(folder / "bc", folder / "wrong", environment=f"{TWO}-pixels24", episodes=1, videos=0), 0)
