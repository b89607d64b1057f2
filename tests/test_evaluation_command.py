"""`postbc evaluate` and its videos: what is refused before anything is written, and that a video shows the episode itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from postbc.demonstrations import Normalization
from postbc.errors import InputError
from postbc.evaluation import EVALUATION_SEED, Episode, Evaluation
from postbc.evaluation_command import Evaluate, check_task, finetuner_of, load_actor, run_evaluation, table
from postbc.nn import make_generators
from postbc.policies import DiffusionConfig, DiffusionPolicy
from postbc.videos import choose, name_of, play, record, write_video

simulator = pytest.mark.simulator


def episodes(outcomes: list[list[bool]]) -> Evaluation:
    made = [
        Episode(m, 10 + m, EVALUATION_SEED + k, success, False, 5, 3 if success else None, 0.0, False, [0.0])
        for m, row in enumerate(outcomes)
        for k, success in enumerate(row)
    ]
    return Evaluation(tuple(made))


def policy(path: Path, observation_dim: int = 19, task: str | None = "Lift") -> Path:
    limit = np.ones(observation_dim)
    normalization = Normalization(-limit, limit, -np.ones(7), np.ones(7))
    config = DiffusionConfig(chunk=4, hidden=8, denoising_steps=4, inference_steps=2)
    about = {"task": task, "method": "bc"} if task else {}
    made = DiffusionPolicy(config, observation_dim, 7, [3, 4], make_generators([3, 4]), [normalization], about)
    made.save(path / "policy.safetensors")
    return path


def test_videos_are_chosen_from_all_members_in_turn() -> None:
    chosen = choose(episodes([[True, True, True, False], [True, False, False, False]]), 3)
    assert [(e.success, e.seed, e.episode_seed - EVALUATION_SEED) for e in chosen] == [
        (True, 10, 0), (True, 11, 0), (True, 10, 1), (False, 10, 3), (False, 11, 1), (False, 11, 2),
    ]  # fmt: skip
    assert choose(episodes([[True]]), 3)[0].success
    assert choose(episodes([[True]]), 0) == []
    assert name_of(chosen[-1]) == f"failure_seed11_{EVALUATION_SEED + 2}.mp4"


def test_video_file(tmp_path: Path) -> None:
    imageio = pytest.importorskip("imageio.v3")
    pytest.importorskip("imageio_ffmpeg")
    frames = [np.full((64, 96, 3), value, np.uint8) for value in (0, 120, 240)]
    write_video(tmp_path / "v" / "a.mp4", frames)
    back = imageio.imread(tmp_path / "v" / "a.mp4")
    assert back.shape == (3, 64, 96, 3)
    assert [round(float(f.mean()), -1) for f in back] == [0, 120, 240]

    def failing() -> Iterator[np.ndarray]:
        yield frames[0]
        raise InputError("the renderer broke")

    with pytest.raises(InputError, match="renderer broke"):
        write_video(tmp_path / "v" / "b.mp4", failing())
    assert [p.name for p in (tmp_path / "v").iterdir()] == ["a.mp4"]


@simulator
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": "none"}, "no such file"),
        ({"policy": "empty"}, "no policy here"),
        ({"task": "Can"}, "another task"),
        ({"task": "Kitchen"}, "no such task"),
        ({"policy": "wide"}, "observation size"),
        ({"policy": "nameless"}, "does not say what task"),
        ({"seed": 5}, "kept apart from training"),
        ({"episodes": 0}, "start at 1"),
        ({"inference_steps": 5}, "inference steps"),
        ({"output": "occupied"}, "already holds a run"),
    ],
)
def test_refused_before_anything_is_written(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    pytest.importorskip("robosuite")
    policy(tmp_path / "lift")
    policy(tmp_path / "wide", 23)
    policy(tmp_path / "nameless", task=None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied/config.yaml").write_text("a: 1\n")
    paths = {k: tmp_path / v for k, v in {"policy": "lift", "output": "out", **options}.items() if k in ("policy", "output")}
    rest = {k: v for k, v in options.items() if k not in paths}
    with pytest.raises(InputError, match=words):
        run_evaluation(Evaluate(**paths, **{"videos": 0, "episodes": 2, **rest}))
    assert not (tmp_path / "out").exists()


def test_which_finetuner_a_directory_is_of(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps([{"finetuner": "best-of-n"}]))
    assert finetuner_of(tmp_path) == "best-of-n"
    (tmp_path / "results.json").write_text("[]")
    assert finetuner_of(tmp_path) is None
    (tmp_path / "results.json").write_text(json.dumps([{"finetuner": "dsrl-na"}]))
    with pytest.raises(InputError, match="fixed by the finetuning run"):
        load_actor(tmp_path, inference_steps=4)


@simulator
def test_names_of_tasks() -> None:
    pytest.importorskip("robosuite")
    assert check_task(None, {"task": "PickPlaceCan"}, Path()) == "Can"
    assert check_task("Square", {"task": "NutAssemblySquare"}, Path()) == "Square"
    assert check_task("Lift", {}, Path()) == "Lift"


@simulator
def test_evaluate_writes_resumes_and_films(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("robosuite")
    torch.set_num_threads(1)
    config = Evaluate(policy(tmp_path / "lift"), tmp_path / "out", episodes=3, horizon=10, envs_per_member=2, videos=1)
    result = run_evaluation(config)
    written = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert [(m["seed"], m["episodes"]) for m in written["members"]] == [(3, 3), (4, 3)]
    assert (written["task"], written["horizon"], written["method"]) == ("Lift", 10, "bc")
    assert {e.steps for e in result.episodes} == {10}
    (video,) = (tmp_path / "out/videos").iterdir()
    frames = pytest.importorskip("imageio.v3").imread(video)
    assert frames.shape == (11, 256, 256, 3)
    assert frames.std() > 10
    again = run_evaluation(Evaluate(**{**vars(config), "resume": True}))
    assert again == result
    assert table(again, tmp_path).row_count == 3


@simulator
def test_actions_played_one_by_one_are_the_episode(tmp_path: Path) -> None:
    pytest.importorskip("robosuite")
    from postbc.environments import make

    rng = np.random.default_rng(0)
    chunks = rng.uniform(-1, 1, (5, 1, 4, 7)).astype(np.float32)
    options = {"terminate_on": "never", "autoreset": "disabled", "num_envs": 1}
    one, four = make("Lift", chunk=1, **options), make("Lift", chunk=4, **options)
    four.reset(options={"reset_mask": np.ones(1, bool), "seeds": np.array([EVALUATION_SEED])})
    for chunk in chunks:
        last = four.step(chunk)[0]
    count = sum(1 for _ in play(one, EVALUATION_SEED, chunks.reshape(-1, 7), height=32, width=32))
    assert count == 21
    np.testing.assert_array_equal(one.sim_states(), four.sim_states())
    np.testing.assert_array_equal(one._observations(), last)
    one.close()
    four.close()


@simulator
def test_without_rendering_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("robosuite")
    from postbc.environments import RobosuiteVectorEnv

    def broken(*args: Any, **options: Any) -> np.ndarray:
        raise InputError("cannot render without a display", remedy="apt-get install libegl1")

    monkeypatch.setattr(RobosuiteVectorEnv, "render_frame", broken)
    with pytest.raises(InputError, match="libegl1") as error:
        run_evaluation(Evaluate(policy(tmp_path / "lift"), tmp_path / "out", episodes=2, videos=1))
    assert "--videos 0" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_record_closes_its_environment(tmp_path: Path) -> None:
    class Env:
        closed = False

        def close(self) -> None:
            self.closed = True

    env = Env()
    with pytest.raises(KeyError):  # no actions were recorded
        record(episodes([[True]]), lambda: env, tmp_path, 1)  # type: ignore[arg-type, return-value]
    assert env.closed
