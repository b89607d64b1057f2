"""`postbc evaluate` and its videos: what is refused before anything is written, what is completed, that a video shows the episode."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import postbc.stages.evaluate as evaluate_module
from kills import in_a_process, kill_at_every_operation
from postbc.data.normalization import Normalization
from postbc.environments import registry
from postbc.errors import InputError
from postbc.evaluation import EVALUATION_SEED, Episode, Evaluation, Summary, TaskRate
from postbc.policies.base import About, save_policy
from postbc.policies.diffusion import DiffusionConfig, DiffusionPolicy
from postbc.schemas import read_json
from postbc.seeding import make_generator
from postbc.stages.evaluate import Evaluate, environment_of, evaluate_stage, table, task_table
from postbc.stages.seeds import seeds_of
from postbc.videos import choose, name_of, play, record, write_video

simulator = pytest.mark.simulator
torch.set_num_threads(1)


def episodes(outcomes: list[bool]) -> Evaluation:
    made = [
        Episode(10, EVALUATION_SEED + k, success, False, 5, 3 if success else None, 0.0, False, [0.0])
        for k, success in enumerate(outcomes)
    ]
    return Evaluation(tuple(made))


def test_the_table_by_task_says_the_mean_exactly_and_its_interval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One task: 1 and 5 of 16 are 6 of 32, 0.1875, whatever the shown 0.062 and 0.312 make of it; the interval is Wilson's."""
    rows = {f"seed_{seed}": [TaskRate.of("a", won, 16)] for seed, won in ((0, 1), (1, 5))}
    two = {name: [*rates, TaskRate.of("b", 16, 16)] for name, rates in rows.items()}
    for given, mean in ((rows, "0.188  [0.09, 0.35]"), (two, "0.594  [0.47, 0.71]")):
        monkeypatch.setattr(
            evaluate_module, "read_json",
            lambda path, _, given=given: SimpleNamespace(tasks=given[path.parent.name], agent_seed=int(path.parent.name[-1])),
        )  # fmt: skip
        console = Console(width=120, record=True)
        console.print(task_table(tmp_path, [0, 1]))
        (line,) = [line for line in console.export_text().splitlines() if "mean of the tasks" in line]
        assert mean in line


def policy(path: Path, width: int = 5, seed: int = 3, task: str | None = "PushT", steps: int = 1, **facts: Any) -> Path:
    """A policy that knows nothing, for Push-T's five numbers."""
    actions = 7 if width in (19, 23) else 2
    high = np.full(width, 512.0) if actions == 2 else np.ones(width)
    limit = np.full(actions, 512.0) if actions == 2 else np.ones(actions)
    normalization = Normalization(0 * high, high, -limit if actions == 7 else 0 * limit, limit)
    config = DiffusionConfig(hidden=8, denoising_steps=4, inference_steps=2)
    about = About(method="bc", seed=seed, task=task, facts={"environment": task, **facts} if task else None)
    made = DiffusionPolicy(
        config, {"state": (width,)}, actions, 4, normalization, make_generator(seed, "policy/initialisation"), steps, about
    )
    save_policy(path / "policy.safetensors", made)
    return path


def config(policy: Path, output: Path, **options: Any) -> Evaluate:
    small = {"environment": "postbc/PushT-state", "episodes": 3, "horizon": 10, "num_envs": 2, "videos": 0}
    return Evaluate(policy, output, **{**small, **options})


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "versions.json"
    }


# --- videos


def test_videos_are_chosen() -> None:
    chosen = choose(episodes([True, False, True, True, True, False]), 3)
    assert [(e.success, e.episode_seed - EVALUATION_SEED) for e in chosen] == [
        (True, 0),
        (True, 2),
        (True, 3),
        (False, 1),
        (False, 5),
    ]
    assert choose(episodes([True]), 0) == []
    assert name_of(chosen[-1]) == f"failure_{EVALUATION_SEED + 5}.mp4"


def test_video_file(tmp_path: Path) -> None:
    imageio = pytest.importorskip("imageio.v3")
    pytest.importorskip("imageio_ffmpeg")
    frames = [np.full((64, 96, 3), value, np.uint8) for value in (0, 120, 240)]
    write_video(tmp_path / "v" / "a.mp4", frames, 20)
    back = imageio.imread(tmp_path / "v" / "a.mp4")
    assert back.shape == (3, 64, 96, 3)
    assert [round(float(f.mean()), -1) for f in back] == [0, 120, 240]

    def failing() -> Iterator[np.ndarray]:
        yield frames[0]
        raise InputError("the renderer broke")

    with pytest.raises(InputError, match="renderer broke"):
        write_video(tmp_path / "v" / "b.mp4", failing(), 20)
    assert [p.name for p in (tmp_path / "v").iterdir()] == ["a.mp4"]


def test_record_closes_its_environment(tmp_path: Path) -> None:
    class Env:
        closed = False

        def close(self) -> None:
            self.closed = True

    env = Env()
    with pytest.raises(KeyError):  # no actions were recorded
        record(episodes([True]).episodes, lambda e: {}[e.episode_seed], lambda: env, tmp_path, 20)  # type: ignore
    assert env.closed


# --- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": "none"}, "no such file"),
        ({"policy": "empty"}, "no policy"),
        ({"environment": "gymnasium:Pendulum-v1"}, "PushT"),
        ({"environment": "Kitchen"}, "no such environment"),
        ({"policy": "wide"}, "observation size"),
        ({"policy": "nameless", "environment": None}, "does not say what environment"),
        ({"policy": "other"}, "control.freq"),
        ({"seeds": (1,)}, "no policy of this seed"),
        ({"episode_seed": 5}, "episode_seed"),
        ({"episodes": 0}, "episodes"),
        ({"videos": -1}, "videos"),
        ({"num_envs": 0}, "num_envs"),
        ({"inference_steps": 5}, "inference"),
        ({"cover": ("image.top",)}, "no such camera"),
        ({"output": "occupied"}, "already holds a run"),
    ],
)
def test_refused_before_anything_is_written(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    pytest.importorskip("gym_pusht")
    policy(tmp_path / "good")
    policy(tmp_path / "wide", 6)
    policy(tmp_path / "nameless", task=None)
    policy(tmp_path / "other", control_freq=20)
    (tmp_path / "empty").mkdir()
    (tmp_path / "occupied/seed_3").mkdir(parents=True)
    (tmp_path / "occupied/seed_3/config.yaml").write_text("a: 1\n")
    paths = {k: tmp_path / v for k, v in {"policy": "good", "output": "out", **options}.items() if k in ("policy", "output")}
    rest = {k: v for k, v in options.items() if k not in paths}
    with pytest.raises(InputError, match=words):
        _all(config(**paths, **rest))
    assert not (tmp_path / "out").exists()


def _all(config: Evaluate) -> list[Evaluation]:
    return [evaluate_stage(config, seed) for seed in seeds_of(config)]


# --- what is written


def test_every_seed_that_is_there(tmp_path: Path) -> None:
    pytest.importorskip("gym_pusht")
    for seed in (0, 4):
        policy(tmp_path / f"bc/seed_{seed}", seed=seed)
    chosen = config(tmp_path / "bc", tmp_path / "out", environment="PushT-state")
    assert seeds_of(chosen) == [0, 4]
    results = _all(chosen)
    assert [r.episodes[0].seed for r in results] == [0, 4]
    summary = read_json(tmp_path / "out/seed_4/evaluation.json", Summary)
    assert (summary.agent_seed, summary.episodes, summary.horizon, summary.environment) == (4, 3, 10, "postbc/PushT-state")
    assert {e.steps for e in results[0].episodes} == {10}
    assert table(tmp_path / "out", [0, 4]).row_count == 3
    assert seeds_of(config(tmp_path / "bc/seed_4", tmp_path / "other")) == [4]
    assert _all(config(tmp_path / "bc/seed_4/policy.safetensors", tmp_path / "other")) == [results[1]]


def test_whatever_is_missing_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before each of its files, and resumed: the files of an undisturbed run, byte for byte."""
    pytest.importorskip("gym_pusht")
    pytest.importorskip("imageio_ffmpeg")
    import postbc.stages.evaluate as stage

    path, out = policy(tmp_path / "bc"), tmp_path / "out/seed_3"
    chosen = config(path, tmp_path / "out", videos=1)
    (whole,) = _all(chosen)
    expected = files(out)
    assert sorted(expected) == ["config.yaml", "episodes.jsonl", "evaluation.json", f"videos/failure_{EVALUATION_SEED}.mp4"]
    resumed = config(path, tmp_path / "out", videos=1, resume=True)
    assert _all(resumed) == [whole]
    assert files(out) == expected

    class Killed(BaseException): ...

    def killed(*args: Any, **options: Any) -> None:
        raise Killed

    for name in ("evaluate", "write_json", "record"):
        shutil.rmtree(out)
        with monkeypatch.context() as patch:
            patch.setattr(stage, name, killed)
            with pytest.raises(Killed):
                _all(chosen)
        assert files(out) != expected
        assert _all(resumed) == [whole]
        assert files(out) == expected
    for lost in ("episodes.jsonl", "evaluation.json", f"videos/failure_{EVALUATION_SEED}.mp4"):
        (out / lost).unlink()
        assert _all(resumed) == [whole]
        assert files(out) == expected
    policy(tmp_path / "bc", seed=5)  # another policy in its place
    with pytest.raises(InputError, match="input"):
        evaluate_stage(Evaluate(**{**vars(resumed), "policy": _renamed(tmp_path / "bc")}), 3)


def _renamed(path: Path) -> Path:
    """The same directory, its policy under another seed's name."""
    policy(path, seed=3, width=5, control_freq=10)
    return path


@pytest.mark.parametrize(
    ("task", "facts", "name"),
    [
        ("PushT", {}, "postbc/PushT"),
        ("PushT", {"state_keys": ("state",)}, "postbc/PushT-state"),
        ("PushT", {"state_keys": ("agent_pos",)}, "postbc/PushT-pixels"),
        ("PushT", {"state_keys": (), "images": {"image.top": (3, 96, 96)}}, "postbc/PushT-pixels"),
        ("PickPlaceCan", {"state_keys": ("robot0_eef_pos",)}, "postbc/Can"),
        (None, {"environment": "Lift"}, "postbc/Lift"),
        ("libero/kitchen", {}, "libero/kitchen"),
        ("libero/kitchen", {"images": {"image.wrist": (3, 128, 128)}}, "libero/kitchen-pixels"),
    ],
)
def test_the_policys_own_environment(task: str | None, facts: dict[str, Any], name: str) -> None:
    assert environment_of(None, About(task=task, facts=facts), Path()).name == name
    assert environment_of("Square", About(task=task, facts=facts), Path()).name == "postbc/Square"


@simulator
def test_lift_is_evaluated_and_filmed(tmp_path: Path) -> None:
    pytest.importorskip("robosuite")
    chosen = Evaluate(
        policy(tmp_path / "lift", 19, task="Lift"), tmp_path / "out", episodes=2, horizon=10, num_envs=2, videos=1
    )
    (result,) = _all(chosen)
    assert {e.steps for e in result.episodes} == {10}
    (video,) = (tmp_path / "out/seed_3/videos").iterdir()
    frames = pytest.importorskip("imageio.v3").imread(video)
    assert frames.shape == (11, 256, 256, 3)
    assert frames.std() > 10
    with pytest.raises(InputError, match="Can"):
        _all(Evaluate(tmp_path / "lift", tmp_path / "no", environment="Can", videos=0))
    assert not (tmp_path / "no").exists()


@simulator
def test_actions_played_one_by_one_are_the_episode() -> None:
    pytest.importorskip("robosuite")
    from postbc.environments.robosuite import make

    chunks = np.random.default_rng(0).uniform(-1, 1, (5, 1, 4, 7)).astype(np.float32)
    one, four = make("Lift", chunk=1, terminate_on="never"), make("Lift", chunk=4, terminate_on="never")
    four.reset([EVALUATION_SEED])
    for chunk in chunks:
        last = four.step(chunk).observation["state"]
    assert sum(1 for _ in play(one, EVALUATION_SEED, chunks.reshape(-1, 7), height=32, width=32)) == 21
    np.testing.assert_array_equal(one.sim_states(), four.sim_states())
    np.testing.assert_array_equal(one.reset([0], np.zeros(1, bool))["state"], last)
    one.close()
    four.close()


def test_without_rendering_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gym_pusht")
    from postbc.environments.pusht import PushTChunkEnv

    def broken(*args: Any, **options: Any) -> np.ndarray:
        raise InputError("cannot render without a display", remedy="apt-get install libegl1")

    monkeypatch.setattr(PushTChunkEnv, "render_frame", broken)
    with pytest.raises(InputError, match="libegl1") as error:
        _all(config(policy(tmp_path / "bc"), tmp_path / "out", videos=1))
    assert "--videos 0" in str(error.value)
    made = registry.find_environment("postbc/PushT-state")
    blind = registry.Environment(made.name, made.make, made.horizon, state_keys=made.state_keys)
    monkeypatch.setitem(registry.ENVIRONMENTS, made.name, lambda: blind)
    with pytest.raises(InputError, match="cannot be drawn"):
        _all(config(tmp_path / "bc", tmp_path / "out", videos=1))
    assert not (tmp_path / "out").exists()


def test_killed_at_every_file_operation(tmp_path: Path) -> None:
    pytest.importorskip("gym_pusht")
    pytest.importorskip("imageio_ffmpeg")
    policy(tmp_path / "bc")
    in_a_process(__file__, tmp_path)


if __name__ == "__main__":
    here = Path(sys.argv[1])
    small = {"episodes": 2, "horizon": 4, "videos": 1, "resume": True}
    evaluate_stage(config(here / "bc", here / "first", **small), 3)  # imports everything
    kill_at_every_operation(
        lambda d: evaluate_stage(config(here / "bc", d, **small), 3), here / "killed", ("*/versions.json",), stride=7
    )


def test_a_policy_at_another_seeds_place_is_refused_and_odd_names_are_no_seeds(tmp_path: Path) -> None:
    for seed in (0, 1):
        policy(tmp_path / f"p/seed_{seed}", seed=seed)
    for name in ("seed_00", "seed_٣", "seed_x"):
        shutil.copytree(tmp_path / "p/seed_1", tmp_path / "p" / name)
    assert seeds_of(config(tmp_path / "p", tmp_path / "out")) == [0, 1]
    shutil.copy(tmp_path / "p/seed_1/policy.safetensors", tmp_path / "p/seed_0/policy.safetensors")
    with pytest.raises(InputError, match="another seed"):
        evaluate_stage(config(tmp_path / "p", tmp_path / "out"), 0)
    assert not (tmp_path / "out").exists()
