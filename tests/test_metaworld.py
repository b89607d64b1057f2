"""MetaWorld's tasks by name: its own physics and success, episodes by seed, demonstrations of its experts that belong to it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from postbc.data import Facts, read_dataset
from postbc.data.belonging import check_belongs
from postbc.environments import find_environment
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
def test_demonstrations_of_an_expert(tmp_path: Path) -> None:
    """Recorded twice they are the same; what they say is what the environment does; played back from their seeds they succeed."""
    pytest.importorskip("metaworld")
    pytest.importorskip("pyarrow")
    spec = importlib.util.spec_from_file_location("record", Path(__file__).parents[1] / "results/lerobot-metaworld/record.py")
    assert spec is not None
    assert spec.loader is not None
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name in ("a", "b"):
        script.record("reach-v3", 2, 0.1, 0, tmp_path / name)
    dataset, again = (read_dataset(tmp_path / name, parts=("rewards",)) for name in ("a", "b"))
    environment = find_environment("metaworld/reach-v3")
    facts = Facts.of_dataset(dataset)
    check_belongs(facts, environment.belonging(dataset.shapes), file="a")
    env = environment.make(1, chunk=1, horizon=environment.horizon, terminate_on="never")
    for i, episode in enumerate(dataset):
        np.testing.assert_array_equal(episode.actions, again[i].actions)
        assert episode.rewards is not None
        assert episode.rewards.max() == 1
    seed = script.episode_seed(0, 0)  # the first try succeeded
    state = env.reset([seed])["state"][0]
    for k, action in enumerate(dataset[0].actions):
        np.testing.assert_allclose(state, dataset[0].state[k], atol=1e-6)
        step = env.step(action[None, None].astype(np.float64))
        state = step.observation["state"][0]
        assert dataset[0].rewards is not None
        assert step.successes[0, 0] == bool(dataset[0].rewards[k])
    with pytest.raises(InputError, match="already"):
        script.record("reach-v3", 1, 0.1, 0, tmp_path / "a")
    env.close()
