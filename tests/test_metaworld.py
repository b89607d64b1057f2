"""MetaWorld's tasks by name: its own physics and success, episodes by seed, demonstrations of its experts that belong to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from postbc import cli
from postbc.data import Facts, read_dataset, write_robomimic
from postbc.data.belonging import check_belongs
from postbc.environments import find_environment
from postbc.environments.metaworld_collect import collect
from postbc.errors import InputError


def test_without_metaworld_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = find_environment("metaworld/push-v3")
    assert (environment.name, environment.horizon, environment.fps) == ("metaworld/push-v3", 500, 80)
    monkeypatch.setitem(__import__("sys").modules, "metaworld.env_dict", None)
    with pytest.raises(InputError, match=r"postbc\[metaworld\]"):
        environment.check()


def test_an_unknown_task() -> None:
    pytest.importorskip("metaworld")
    with pytest.raises(InputError, match=r"(?s)no such task.*push-v3"):
        find_environment("metaworld/pusch-v3").check()


@pytest.mark.simulator
def test_demonstrations_of_an_expert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Recorded twice they are the same; what they say is what the environment does, played back from their seeds."""
    pytest.importorskip("metaworld")
    files = [tmp_path / f"{name}.hdf5" for name in "ab"]
    collect = ["demos", "collect", "--task", "metaworld/reach-v3", "--num", "2", "--noise", "0.1", "--tail", "3", "--output"]
    for file in files:
        assert cli.main([*collect, str(file)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "2 demonstrations of metaworld/reach-v3" in capsys.readouterr().out
    dataset = read_dataset(files[0])
    environment = find_environment("metaworld/reach-v3")
    check_belongs(Facts.of_dataset(dataset), environment.belonging(dataset.shapes), file="a")
    env = environment.make(1, chunk=1, horizon=environment.horizon, terminate_on="never")
    for episode in dataset:
        assert episode.rewards is not None
        assert episode.episode_seed is not None
        stays = np.lib.stride_tricks.sliding_window_view(episode.rewards, 3 + 1).all(axis=1)
        assert stays.tolist() == [False] * (len(episode) - 4) + [True]  # recorded until it has stayed solved for three steps
        assert (episode.rewards[-1], episode.operator) == (1, "expert")
        state = env.reset([episode.episode_seed])["state"][0]
        for k, action in enumerate(episode.actions):
            np.testing.assert_allclose(state, episode.state[k], atol=1e-6)
            step = env.step(action[None, None].astype(np.float64))
            state = step.observation["state"][0]
            assert step.successes[0, 0] == bool(episode.rewards[k])
    env.close()
    noisier = read_dataset(collected(tmp_path / "c.hdf5", noise=0.5))
    assert not np.array_equal(noisier[0].actions[:5], dataset[0].actions[:5])


def collected(file: Path, noise: float) -> Path:
    write_robomimic(file, collect("reach-v3", 1, noise=noise).dataset)
    return file


def test_options_that_an_expert_does_not_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["demos", "collect", "--output", str(tmp_path / "a.hdf5"), "--task"]
    for task, options, said in (
        ("metaworld/push-v3", ["--images"], "recorded by states"), ("metaworld/push-v3", ["--operators", "better"], "operators"),
        ("metaworld/push-v3", ["--no-native"], "native"), ("Lift", ["--noise", "0.1"], "Only MetaWorld's experts"),
    ):  # fmt: skip
        assert cli.main([*command, task, *options]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
