"""Environments by name, any id of gymnasium's, a factory of one's own; and a simulator that cannot be imported here says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from postbc.data.belonging import Facts
from postbc.environments import ENVIRONMENTS, Environment, find_environment, from_vector_env, gymnasium_environment
from postbc.errors import InputError


class Reach(gymnasium.Env):  # type: ignore[type-arg]
    """A point that reaches 1."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.observation_space, self.action_space = spaces.Box(-9, 9, (1,), np.float32), spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.x = np.array([self.np_random.uniform(-1, 0)], np.float32)
        return self.x, {}

    def step(self, action: Any) -> Any:
        self.x = self.x + action
        return self.x, 0.0, False, False, {"is_success": bool(self.x[0] > 1)}

    def render(self) -> Any:
        return np.full((20, 30, 3), 100, np.uint8) if self.render_mode else None


@pytest.fixture
def registered() -> Any:
    gymnasium.register("Toy/Reach-v0", Reach, max_episode_steps=12)
    yield "Toy/Reach-v0"
    gymnasium.registry.pop("Toy/Reach-v0")


# --- names


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("postbc/Lift", "postbc/Lift"),
        ("Lift", "postbc/Lift"),
        ("PickPlaceCan", "postbc/Can"),
        ("NutAssemblySquare", "postbc/Square"),
        ("PushT", "postbc/PushT"),
        ("postbc/PushT-pixels", "postbc/PushT-pixels"),
        ("libero/kitchen", "libero/kitchen"),
        ("libero/kitchen-pixels", "libero/kitchen-pixels"),
    ],
)
def test_our_names_and_the_names_in_data_files(name: str, found: str) -> None:
    assert find_environment(name).name == found


def test_names_nobody_knows() -> None:
    for name, words in (("postbc/Lifft", "did you mean postbc/Lift"), ("", "no such"), ("[/red]", "no such")):
        with pytest.raises(InputError, match=words):
            find_environment(name)
    for name in ("gymnasium:Nothing-v0", "gymnasium:", "gymnasium:no_such_package:A-v0", "gymnasium:CartPole-v99"):
        with pytest.raises(InputError, match="gymnasium does not know"):
            find_environment(name)


def test_ones_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Environment("my/Task", lambda *a, **k: None, 10)  # type: ignore[arg-type, return-value]
    monkeypatch.setitem(ENVIRONMENTS, "my/Task", lambda: own)
    assert find_environment("my/Task") is own


def test_every_name_says_what_it_is() -> None:
    for name in (name for name in ENVIRONMENTS if name.startswith(("postbc/", "libero/"))):  # the docs' pages add others
        environment = find_environment(name)
        assert environment.name == name
        assert environment.horizon in (300, 400, 600)
        assert environment.scene is not None
        assert environment.state_keys


@pytest.mark.simulator
def test_the_facts_of_a_robosuite_task_are_those_of_its_data() -> None:
    pytest.importorskip("robosuite")
    facts = Facts.of_env_args(find_environment("Can").facts())
    assert (facts.environment, facts.version, facts.robots, facts.control_freq) == ("PickPlaceCan", "1.4.0", ("Panda",), 20)
    assert facts.controller is not None
    assert facts.controller["type"] == "OSC_POSE"


# --- gymnasium's


def test_any_id_of_gymnasiums(registered: str) -> None:
    environment = find_environment(f"gymnasium:{registered}")
    assert (environment.horizon, environment.fps) == (12, 5)
    env = environment.make(2, chunk=3, horizon=environment.horizon, terminate_on="success")
    assert env.chooses_episodes
    first = env.reset([4, 10**9])
    np.testing.assert_array_equal(first["state"][0], Reach().reset(seed=4)[0])
    step = env.step(np.ones((2, 3, 1)))
    assert step.terminated.all()
    env.close()
    assert environment.scene is not None
    scene: Any = environment.scene()
    scene.reset([1])
    assert scene.render_frame().shape == (20, 30, 3)
    assert Facts.of_env_args(environment.facts()).environment == registered


def test_ids_that_cannot_serve(registered: str) -> None:
    with pytest.raises(InputError, match="continuous"):
        find_environment("gymnasium:CartPole-v1").make(1, chunk=1, horizon=9, terminate_on="never")
    gymnasium.register("Toy/Endless-v0", Reach)
    try:
        with pytest.raises(InputError, match="no limit of steps"):
            gymnasium_environment("Toy/Endless-v0")
        assert gymnasium_environment("Toy/Endless-v0", horizon=7).horizon == 7
    finally:
        gymnasium.registry.pop("Toy/Endless-v0")


# --- a factory of one's own


def test_a_factory() -> None:
    environment = from_vector_env(
        lambda n: SyncVectorEnv([Reach] * n, autoreset_mode=AutoresetMode.SAME_STEP),
        name="mine",
        horizon=5,
        facts={"env_name": "Mine"},
    )
    env = environment.make(2, chunk=2, horizon=environment.horizon, terminate_on="never")
    env.reset([1, 2])
    assert env.step(np.zeros((2, 2, 1))).num_steps.tolist() == [2, 2]
    assert environment.scene is None
    assert environment.facts() == {"env_name": "Mine"}
    blind: Any = from_vector_env(
        lambda n: SyncVectorEnv([Reach] * n), name="mine", horizon=5, scene=lambda: SyncVectorEnv([Reach])
    )
    scene = blind.scene()
    scene.reset([1])
    with pytest.raises(InputError, match="draws no frames"):
        scene.render_frame()


# --- a simulator that cannot be imported here

_LIFT = """
import sys
from postbc.environments import find_environment
from postbc.errors import InputError
try:
    environment = find_environment("Lift")
    environment.check()
    {then}
    print("works", end="")
except InputError as error:
    print(error, end="")
"""


def say(tmp_path: Path, site: str = "", then: str = "", **variables: str | None) -> str:
    """What a fresh process says to Lift's `check`; `site` is run before anything else in it."""
    (tmp_path / "sitecustomize.py").write_text(site)
    path = os.pathsep.join([str(tmp_path), *[p for p in sys.path if p]])
    env = {
        k: v for k, v in {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", **variables}.items() if v is not None
    }
    done = subprocess.run([sys.executable, "-c", _LIFT.format(then=then)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("missing", ["robosuite", "mujoco", "numba"])
def test_without_the_extra(tmp_path: Path, missing: str) -> None:
    said = say(tmp_path, f"import sys; sys.modules[{missing!r}] = None")
    assert "cannot be imported" in said
    assert "pip install 'postbc[robosuite]'" in said


@pytest.mark.simulator
@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"MUJOCO_GL": "vulkan"}, "MUJOCO_GL has a value"),
        ({"MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "egl"}, "PYOPENGL_PLATFORM and MUJOCO_GL disagree"),
    ],
)
def test_opengl_variables_that_cannot_be(tmp_path: Path, variables: dict[str, str], words: str) -> None:
    pytest.importorskip("robosuite")
    said = say(tmp_path, **variables)
    assert words in said
    assert "unset" in said


@pytest.mark.simulator
def test_somebody_elses_log_file(tmp_path: Path) -> None:
    pytest.importorskip("robosuite")
    refuse = """
import logging
real = logging.FileHandler._open
def refuse(self):
    if self.baseFilename == "/tmp/robosuite.log":
        raise PermissionError(13, "Permission denied", self.baseFilename)
    return real(self)
logging.FileHandler._open = refuse
"""
    assert say(tmp_path, refuse) == "works"


@pytest.mark.simulator
def test_no_place_for_compiled_code(tmp_path: Path) -> None:
    pytest.importorskip("robosuite")
    refuse = """
import tempfile
real = tempfile.TemporaryFile
def refuse(*args, **kwargs):
    if "postbc-numba-" not in str(kwargs.get("dir") or "postbc-numba-"):  # numba and we ask the same way
        raise OSError(30, "Read-only file system", str(kwargs["dir"]))
    return real(*args, **kwargs)
tempfile.TemporaryFile = refuse
"""
    then = "import postbc.environments.robosuite.vector"  # everything that is compiled is defined, nothing is compiled yet
    assert say(tmp_path, refuse, then) == "works"


def test_push_t_without_its_extra(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['gym_pusht'] = None")
    program = "from postbc.environments import find_environment; find_environment('PushT').check()"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *[p for p in sys.path if p]])}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=300)
    assert "InputError: Push-T cannot be imported" in done.stderr
    assert "postbc[pusht]" in done.stderr


def test_importing_environments_imports_no_simulator() -> None:
    program = (
        "import sys, postbc.environments, postbc.environments.libero, postbc.environments.robosuite, postbc.evaluation\n"
        "print([m for m in ('robosuite', 'mujoco', 'libero', 'numba', 'gym_pusht', 'pygame') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr
