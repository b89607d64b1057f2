"""The benchmarks are fair and leave no trace: episodes that end alike, networks of one size, the cores as they were."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import numpy as np
import pytest
from benchmarks.bench_finetuners import D, S, Shape, their_residual
from benchmarks.bench_lift_to_90 import HORIZON, Episodes, one_core

from postbc.agents.residual import Residual, ResidualConfig
from postbc.seeding import make_generator


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_one_core_is_given_back() -> None:
    """Whatever is measured next has all of them again, also after an error."""
    before = os.sched_getaffinity(0)
    with contextlib.suppress(RuntimeError), one_core():
        assert len(os.sched_getaffinity(0)) == 1
        raise RuntimeError("stop")
    assert os.sched_getaffinity(0) == before


class Robosuite:
    """What is asked of robosuite: succeeds at the steps it is told."""

    def __init__(self, *successes: int) -> None:
        self.successes, self.at = successes, 0

    def observation(self) -> dict[str, Any]:
        keys = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object-state")
        return {key: np.full(1, float(self.at)) for key in keys}

    def reset(self) -> dict[str, Any]:
        self.at = 0
        return self.observation()

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, dict[str, Any]]:
        self.at += 1
        return self.observation(), 0.0, False, {}

    def _check_success(self) -> bool:
        return self.at in self.successes


def played(ends: Any, *successes: int) -> list[tuple[int, float, bool, bool]]:
    """Chunks of four until the end: (steps so far, reward, terminated, truncated)."""
    env = Episodes.__new__(Episodes)
    env.env, env.ends, env.steps = Robosuite(*successes), ends, 0
    env.reset(seed=0)
    rows: list[tuple[int, float, bool, bool]] = []
    while not rows or not (rows[-1][2] or rows[-1][3]):
        observation, reward, terminated, truncated, _ = env.step(np.zeros((4, 7), np.float32))
        rows.append((int(observation[0]), reward, terminated, truncated))
    return rows


def test_the_references_episodes_end_as_ours_do() -> None:
    assert played("success", 6) == [(4, -4.0, False, False), (6, -1.0, True, False)]
    assert played("chunk_success", 6, 9, 10, 11, 12) == [
        (4, -4.0, False, False),
        (8, -3.0, False, False),
        (12, 0.0, True, False),
    ]
    for ends in ("success", "chunk_success"):
        assert played(ends)[-1] == (HORIZON, -4.0, False, True)
        assert len(played(ends)) == HORIZON // 4


def test_the_references_critics_are_as_large_as_the_residuals() -> None:
    pytest.importorskip("stable_baselines3")
    config = ResidualConfig(proposals=1, hidden=16, critics=3)
    ours = Residual(config, Shape(), make_generator(0, "online/initialisation")).networks  # type: ignore[arg-type]
    theirs = their_residual(3, 16, config.layers)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(ours.critics) == count(theirs.critic)
    first = next(p for p in theirs.critic.parameters())
    assert first.shape[1] == S + D
    assert len(theirs.critic.q_networks) == 3
