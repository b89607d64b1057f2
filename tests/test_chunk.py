"""Chunks in any gymnasium vector environment: every autoreset mode, counted against environments played alone, one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from postbc.environments import ChunkAdapter, from_vector_env
from postbc.environments.stacked import make_stacked
from postbc.errors import InputError

MODES = [AutoresetMode.DISABLED, AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP]
N, T, HORIZON, OWN = 3, 4, 23, 14


class Line(gymnasium.Env):  # type: ignore[type-arg]
    """A point on a line; solved where |x| < 0.3. Its episodes' lengths are random; observed are x, the count and the seed's mark."""

    def __init__(self, says: str = "every step", key: str = "success", pixels: bool = False, ends_solved: bool = False) -> None:
        self.says, self.key, self.pixels, self.ends_solved = says, key, pixels, ends_solved
        vector = spaces.Box(-np.inf, np.inf, (3,), np.float64)
        picture = spaces.Box(0, 255, (6, 5, 3), np.uint8)
        self.observation_space = spaces.Dict({"x": vector, "top": picture}) if pixels else vector
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def observe(self) -> Any:
        vector = np.array([self.x, self.count, self.mark])
        return {"x": vector, "top": np.full((6, 5, 3), self.count, np.uint8)} if self.pixels else vector

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.x, self.mark = self.np_random.uniform(-2, 2), self.np_random.uniform()
        self.count, self.limit = 0, int(self.np_random.integers(5, OWN))
        return self.observe(), {"begun": True}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(np.asarray(action, np.float32))
        self.count += 1
        self.x += 0.5 * float(action[0])
        solved, out = abs(self.x) < 0.3, self.count >= self.limit
        info: dict[str, Any] = {"other": 1.0}
        if self.says == "every step" or (self.says == "at the end" and (out or (solved and self.ends_solved))):
            info[self.key] = solved
        return self.observe(), float(solved), solved and self.ends_solved, out, info


class Saving(Line):
    """The same with its state: random numbers included."""

    def get_state(self) -> dict[str, Any]:
        return {"line": (self.x, self.mark, self.count, self.limit)}

    def set_state(self, state: dict[str, Any]) -> None:
        self.x, self.mark, count, limit = state["line"]
        self.count, self.limit = int(count), int(limit)


def vector(kind: str, mode: AutoresetMode, make: Callable[[], Any] = Line, n: int = N) -> VectorEnv:
    cls: Any = SyncVectorEnv if kind == "sync" else AsyncVectorEnv
    return cls([make] * n, autoreset_mode=mode)


def alone(seed: int, chunks: np.ndarray, terminate_on: str, horizon: int = HORIZON, **options: Any) -> dict[str, Any]:
    """An episode played by hand, one environment and one action at a time, until it ends or the chunks (K, T, 1) do."""
    env = Line(**options)
    observation, _ = env.reset(seed=seed)
    record: dict[str, Any] = {"begin": observation, "steps": [], "rewards": [], "successes": [], "ended": None}
    total = 0
    for chunk in chunks:
        flags, rewards = np.zeros(len(chunk), bool), np.zeros(len(chunk))
        steps, ended = 0, None
        for k, action in enumerate(chunk):
            observation, reward, terminated, truncated, _ = env.step(np.clip(action, -1, 1).astype(np.float32))
            steps, total = steps + 1, total + 1
            flags[k], rewards[k] = reward > 0, reward
            if terminated or (flags[k] and terminate_on == "success"):
                ended = "terminated"
            elif truncated or total >= horizon:
                ended = "truncated"
            if ended:
                break
        if terminate_on == "chunk_success" and flags.all():
            ended = "terminated"
        record["steps"].append(steps)
        record["rewards"].append(rewards)
        record["successes"].append(flags)
        record["last"], record["ended"] = observation, ended
        if ended:
            break
    return record


def play(
    env: ChunkAdapter, chunks: np.ndarray, first: int = 100, state_at: int | None = None
) -> tuple[list[dict[str, Any]], Any]:
    """Episodes seed by seed as the environments get free; chunks (K, N, T, 1). What happened, and the state before chunk `state_at`."""
    seeds, nxt = np.arange(first, first + env.num_envs), first + env.num_envs
    observation = env.reset(seeds)
    current = [{"seed": int(s), "begin": observation["state"][i].copy(), "chunks": [], "env": i} for i, s in enumerate(seeds)]
    done: list[dict[str, Any]] = []
    saved = None
    for number, chunk in enumerate(chunks):
        if number == state_at:
            saved = env.get_state()
        step = env.step(chunk)
        for i, episode in enumerate(current):
            episode["chunks"].append((chunk[i], step.num_steps[i], step.rewards[i], step.successes[i]))
            episode["last"] = step.observation["state"][i]
        again = step.ended
        assert not (step.terminated & step.truncated).any()
        for i in np.flatnonzero(again):
            current[i]["ended"] = "terminated" if step.terminated[i] else "truncated"
            done.append(current[i])
            seeds[i], nxt = nxt, nxt + 1
        if again.any():
            observation = env.reset(seeds, again)
            for i in np.flatnonzero(again):
                current[i] = {"seed": int(seeds[i]), "begin": observation["state"][i].copy(), "chunks": [], "env": int(i)}
            others = ~again
            np.testing.assert_array_equal(observation["state"][others], step.observation["state"][others])
    return done + current, saved


def wander(count: int, seed: int = 0, n: int = N) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1.4, 1.4, (count, n, T, 1))


def compare(episodes: list[dict[str, Any]], terminate_on: str, horizon: int = HORIZON, **options: Any) -> None:
    """Every episode equals the one played alone, in what began it, what was counted, and how it ended."""
    for episode in episodes:
        own = alone(episode["seed"], np.array([c[0] for c in episode["chunks"]]), terminate_on, horizon, **options)
        np.testing.assert_allclose(episode["begin"], own["begin"], rtol=1e-6)
        assert episode.get("ended") == own["ended"]
        assert [int(c[1]) for c in episode["chunks"]] == own["steps"]
        if episode["chunks"]:
            np.testing.assert_array_equal([c[2] for c in episode["chunks"]], own["rewards"])
            np.testing.assert_array_equal([c[3] for c in episode["chunks"]], own["successes"])
            np.testing.assert_allclose(episode["last"], own["last"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_every_step_is_counted_as_an_environment_alone_counts_it(kind: str, mode: AutoresetMode) -> None:
    inner = vector(kind, mode)
    try:
        for terminate_on in ("success", "chunk_success", "never"):
            for horizon in (HORIZON, 6):
                env = ChunkAdapter(inner, T, horizon=horizon, terminate_on=terminate_on)  # type: ignore[arg-type]
                episodes, state = play(env, wander(25), state_at=3)
                assert len(episodes) > 12
                assert state is None
                compare(episodes, terminate_on, horizon)
    finally:
        inner.close()


@pytest.mark.parametrize("mode", MODES)
def test_an_environment_that_ends_its_episodes_on_success_and_says_so_only_then(mode: AutoresetMode) -> None:
    options = {"says": "at the end", "key": "is_success", "ends_solved": True}
    env = ChunkAdapter(vector("sync", mode, lambda: Line(**options)), T, horizon=HORIZON, terminate_on="never")
    episodes, _ = play(env, wander(25))
    compare(episodes, "never", ends_solved=True)
    assert {"terminated", "truncated"} <= {episode.get("ended") for episode in episodes}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("timed", [False, True])
def test_states_come_back_where_every_environment_has_them(kind: str, mode: AutoresetMode, timed: bool) -> None:
    def make() -> Any:
        return gymnasium.wrappers.TimeLimit(Saving(), 7) if timed else Saving()

    chunks = wander(12)
    first, second = vector(kind, mode, make), vector(kind, mode, make)
    try:
        env, other = (ChunkAdapter(inner, T, horizon=HORIZON, terminate_on="never") for inner in (first, second))
        env.reset([7, 8, 9])
        env.step(chunks[0])
        state = env.get_state()
        assert state is not None
        other.set_state(state)
        for k, chunk in enumerate(chunks[1:]):
            a, b = env.step(chunk), other.step(chunk)
            for name in ("rewards", "successes", "num_steps", "terminated", "truncated"):
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
            np.testing.assert_array_equal(a.observation["state"], b.observation["state"])
            if a.ended.any():
                seeds = np.arange(N) + 50 * k
                np.testing.assert_array_equal(env.reset(seeds, a.ended)["state"], other.reset(seeds, a.ended)["state"])
    finally:
        first.close()
        second.close()


def test_states_of_another_number_or_without_are_refused() -> None:
    env = ChunkAdapter(vector("sync", MODES[0], Saving), T, horizon=9)
    env.reset([1, 2, 3])
    with pytest.raises(InputError, match="another number"):
        ChunkAdapter(vector("sync", MODES[0], Saving, 2), T, horizon=9).set_state(env.get_state() or {})

    class Odd(Saving):
        def get_state(self) -> Any:
            return {"made": object()}

    env = ChunkAdapter(vector("sync", MODES[0], Odd), T, horizon=9)
    env.reset([1, 2, 3])
    with pytest.raises(InputError, match="plain data"):
        env.get_state()


class Crowd(VectorEnv):
    """Lines as one object: begins its next episodes in the same step, all seeds are its own, and it cannot reset one of them."""

    def __init__(self, n: int, mode: AutoresetMode = AutoresetMode.SAME_STEP, final: bool = True, honest: bool = True) -> None:
        self.num_envs, self.final, self.honest = n, final, honest
        self.lines = [Line() for _ in range(n)]
        self.metadata = {"autoreset_mode": mode}
        self.single_observation_space, self.single_action_space = self.lines[0].observation_space, self.lines[0].action_space

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        assert seed is None or isinstance(seed, int) or self.metadata["autoreset_mode"] == AutoresetMode.DISABLED
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        for i, line in enumerate(self.lines):
            if mask[i] or not self.honest:
                line.reset(seed=None if seed is None else seed + i if isinstance(seed, int) else seed[i])
        return np.stack([line.observe() for line in self.lines]), {}

    def step(self, actions: np.ndarray) -> Any:
        steps = [line.step(action) for line, action in zip(self.lines, actions)]
        over = np.array([s[2] or s[3] for s in steps])
        info: dict[str, Any] = {"success": np.array([s[4]["success"] for s in steps])}
        observation = np.stack([s[0] for s in steps])
        if over.any() and self.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP:
            if self.final:
                info["final_obs"] = np.array([s[0] if o else None for s, o in zip(steps, over)], object)
                info["final_info"] = np.array([s[4] if o else None for s, o in zip(steps, over)], object)
                info["success"] = np.where(over, False, info["success"])
            for i in np.flatnonzero(over):
                observation[i] = self.lines[i].reset()[0]
        rewards = np.array([s[1] for s in steps])
        return observation, rewards, np.array([s[2] for s in steps]), np.array([s[3] for s in steps]), info


def test_a_crowd_that_begins_its_own_episodes() -> None:
    env = ChunkAdapter(Crowd(N), T, horizon=HORIZON, terminate_on="never")
    assert not env.chooses_episodes
    assert env.get_state() is None
    env.reset([5, 0, 0])
    for line, seed in zip(env.env.lines, (5, 6, 7)):  # seeds of its own, from the first on
        assert line.observe()[2] == Line().reset(seed=seed)[0][2]
    marks = env.reset([5, 0, 0])["state"][:, 2].copy()
    ended = 0
    for chunk in wander(20):
        step = env.step(chunk)
        np.testing.assert_array_equal(step.observation["state"][:, 2], marks)  # never another episode's
        ended += int(step.ended.sum())
        if step.ended.any():
            marks = np.where(step.ended, env.reset([0] * N, step.ended)["state"][:, 2], marks)
    assert ended > 10


def test_a_crowd_in_the_middle_of_its_episodes_cannot_begin_another() -> None:
    env = ChunkAdapter(Crowd(N), T, horizon=3, terminate_on="never")
    env.reset([1, 2, 3])
    env.step(wander(1)[0])
    env.reset([1, 2, 3])  # all at once it can
    env.step(wander(1)[0])
    env.reset([1, 2, 3], np.array([True, False, False]))  # nobody is playing: all at once, too
    env._running[1] = True
    with pytest.raises(InputError, match="in the middle of its own"):
        env.reset([1, 2, 3], np.array([True, False, False]))
    single = ChunkAdapter(Crowd(1), T, horizon=3)
    assert single.chooses_episodes
    np.testing.assert_allclose(single.reset([4])["state"][0], Line().reset(seed=4)[0], rtol=1e-6)


def test_what_a_crowd_must_say_and_do() -> None:
    with pytest.raises(InputError, match="a step late"):
        ChunkAdapter(Crowd(2, AutoresetMode.NEXT_STEP), T, horizon=9)
    silent = Crowd(2)
    silent.metadata = {}
    with pytest.raises(InputError, match="when it begins"):
        ChunkAdapter(silent, T, horizon=9)
    env = ChunkAdapter(Crowd(2, final=False), T, horizon=99, terminate_on="never")
    env.reset([1, 2])
    with pytest.raises(InputError, match="last observation is nowhere"):
        play(env, wander(9, n=2))
    dishonest = ChunkAdapter(Crowd(2, AutoresetMode.DISABLED, honest=False), T, horizon=99)
    dishonest.reset([1, 2])
    with pytest.raises(InputError, match="not told to"):
        dishonest.reset([3, 4], np.array([True, False]))
    late = AsyncVectorEnv([Line] * 2, autoreset_mode=AutoresetMode.NEXT_STEP, shared_memory=False)
    with pytest.raises(InputError, match="shared memory"):
        ChunkAdapter(late, T, horizon=9)
    late.close()


class Faulty(Line):
    """Fails in one way, in the third step of an episode where it is of stepping."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault

    def reset(self, **options: Any) -> Any:
        if self.fault == "reset raises":
            raise OSError("no hardware")
        observation, info = super().reset(**options)
        return (observation * np.nan if self.fault == "nan at reset" else observation), info

    def step(self, action: np.ndarray) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        if self.count < 3:
            return observation, reward, terminated, truncated, info
        if self.fault == "step raises":
            raise RuntimeError("motor off")
        if self.fault == "step exits":
            raise SystemExit("bye")
        if self.fault == "four values":
            return observation, reward, terminated, info
        changed = {
            "nan": (observation * np.nan, reward), "wide": (np.zeros(5), reward), "reward": (observation, "good"),
            "nan reward": (observation, np.nan),
        }.get(self.fault, (observation, reward))  # fmt: skip
        said = {"text": "False", "nan success": np.nan, "two": 2}
        return *changed, terminated, truncated, {"success": said.get(self.fault, info["success"])}


FAULTS = {
    "reset raises": r"failed[\s\S]*reset[\s\S]*OSError: no hardware[\s\S]*my/Line", "nan at reset": r"not finite[\s\S]*state",
    "step raises": r"failed[\s\S]*step[\s\S]*RuntimeError: motor off[\s\S]*test_chunk", "step exits": "SystemExit: bye",
    "four values": "failed[\\s\\S]*step", "nan": r"not finite[\s\S]*my/Line, step 3", "wide": "failed", "reward": "reward|failed",
    "nan reward": "finite number", "text": "yes or no[\\s\\S]*'False'", "nan success": "yes or no",
    "two": "yes or no",
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fault", FAULTS)
def test_an_environment_that_fails_is_an_input_error_that_names_it(fault: str, mode: AutoresetMode) -> None:
    environment = from_vector_env(lambda n: vector("sync", mode, lambda: Faulty(fault), n), name="my/Line", horizon=HORIZON)
    env = environment.make(2, chunk=1, horizon=HORIZON, terminate_on="never")

    def episode() -> None:
        env.reset([1, 2])
        for _ in range(4):
            env.step(np.zeros((2, 1, 1)))

    with pytest.raises(InputError, match=FAULTS[fault]):
        episode()


def test_an_environment_that_cannot_be_made_is_an_input_error() -> None:
    def factory(n: int) -> VectorEnv:
        raise TypeError("unexpected keyword argument 'render_mode'")

    environment = from_vector_env(factory, name="my/Line", horizon=9, scene=lambda: factory(1))
    with pytest.raises(InputError, match=r"construction[\s\S]*render_mode"):
        environment.make(1, chunk=1, horizon=9, terminate_on="never")
    assert environment.scene is not None
    with pytest.raises(InputError, match="construction"):
        environment.scene()


@pytest.mark.parametrize("mode", MODES)
def test_success_that_is_never_reported_is_an_error_at_the_first_end(mode: AutoresetMode) -> None:
    for options in ({"says": "never"}, {"key": "solved"}):
        env = ChunkAdapter(vector("sync", mode, lambda options=options: Line(**options)), T, horizon=HORIZON)
        with pytest.raises(InputError, match=r'never said[\s\S]*success="terminated"') as error:
            play(env, wander(4))
        assert "other" in str(error.value)


@pytest.mark.parametrize(("rule", "options"), [("solved", {"key": "solved"}), (1.0, {"says": "never"})])
def test_success_by_a_key_or_a_reward(rule: Any, options: Any) -> None:
    env = ChunkAdapter(
        vector("sync", MODES[2], lambda: Line(**options)), T, horizon=HORIZON, terminate_on="success", success=rule
    )
    compare(play(env, wander(15))[0], "success")


def test_success_by_the_environments_own_end() -> None:
    make = lambda: Line(says="never", ends_solved=True)  # noqa: E731
    env = ChunkAdapter(vector("sync", MODES[1], make), T, horizon=HORIZON, terminate_on="never", success="terminated")
    compare(play(env, wander(15))[0], "never", ends_solved=True)
    for rule in (True, float("nan"), None):
        with pytest.raises(InputError, match="no such rule"):
            ChunkAdapter(vector("sync", MODES[1]), T, horizon=9, success=rule)  # type: ignore[arg-type]


def test_observations_by_name() -> None:
    env = ChunkAdapter(vector("sync", MODES[2], lambda: Line(pixels=True)), T, horizon=HORIZON, terminate_on="never")
    assert env.shapes == {"state": (3,), "image.top": (3, 6, 5)}
    observation = env.reset([1, 2, 3])
    assert observation["image.top"].dtype == np.uint8
    for chunk in wander(8):
        step = env.step(chunk)
        for i in range(N):  # an ended one's own, too
            assert (step.observation["image.top"][i] == step.observation["state"][i, 1]).all()
        if step.ended.any():
            env.reset([4, 5, 6], step.ended)


@pytest.mark.parametrize(
    ("space", "words"), [(spaces.Discrete(3), "not read"), (spaces.Box(0, 1, (2, 2)), "not read"), (spaces.Text(3), "not read")]
)
def test_observations_that_are_not_read(space: Any, words: str) -> None:
    class Other(Line):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = space

    with pytest.raises(InputError, match=words):
        ChunkAdapter(vector("sync", MODES[0], Other), T, horizon=9)


@pytest.mark.parametrize(("space", "words"), [(spaces.Discrete(3), "continuous"), (spaces.Box(0, 1, (4, 2)), "vectors")])
def test_actions_that_cannot_be_given(space: Any, words: str) -> None:
    class Other(Line):
        def __init__(self) -> None:
            super().__init__()
            self.action_space = space

    with pytest.raises(InputError, match=words):
        ChunkAdapter(vector("sync", MODES[0], Other), T, horizon=9)


def test_gymnasiums_vector_wrappers_around_it() -> None:
    for mode in MODES:
        inner = RecordEpisodeStatistics(vector("sync", mode, Saving))
        env = ChunkAdapter(inner, T, horizon=HORIZON)
        assert env.chooses_episodes
        compare(play(env, wander(10))[0], "success")
        assert env.get_state() is None  # the wrapper remembers something


def test_waiting_environments_wait_and_calls_that_cannot_be_served() -> None:
    env = ChunkAdapter(vector("sync", MODES[1]), T, horizon=3, terminate_on="never")
    with pytest.raises(InputError, match="reset before"):
        env.step(wander(1)[0])
    env.reset([1, 2, 3], np.array([True, True, False]))  # the third never begins
    assert env.step(wander(1)[0]).num_steps.tolist() == [3, 3, 0]
    before = env.reset([1, 2, 3], np.array([True, False, False]))["state"]
    step = env.step(wander(1)[0])
    assert step.num_steps.tolist() == [3, 0, 0]
    np.testing.assert_array_equal(step.observation["state"][1], before[1])
    assert not step.ended[1]
    with pytest.raises(InputError, match="not finite"):
        env.step(np.full((N, T, 1), np.nan))
    with pytest.raises(InputError, match="shape"):
        env.step(np.zeros((N, 1)))
    with pytest.raises(InputError, match="out of range"):
        env.reset([1, 2, -3])
    with pytest.raises(InputError, match="mask"):
        env.reset([1, 2, 3], np.ones(2, bool))


@pytest.mark.parametrize("terminate_on", ["success", "chunk_success", "never"])
def test_the_newest_few_observations(terminate_on: Any) -> None:
    environment = from_vector_env(lambda n: vector("sync", MODES[0], Saving, n), name="Line", horizon=HORIZON)
    chunks = wander(14)
    options: dict[str, Any] = {"chunk": T, "horizon": HORIZON, "terminate_on": terminate_on}
    env, plain = (make_stacked(environment.make, N, shapes={}, observation_steps=k, **options) for k in (3, 1))
    observation = env.reset([1, 2, 3])
    begin = plain.reset([1, 2, 3])
    np.testing.assert_array_equal(observation["state"], np.repeat(begin["state"][:, None], 3, 1))
    for k, chunk in enumerate(chunks):
        if k == 5:
            state, other = env.get_state(), make_stacked(environment.make, N, shapes={}, observation_steps=3, **options)
            assert state is not None
            other.set_state(state)
            env = other
        saved = env.get_state()
        assert saved is not None
        a, b = env.step(chunk), plain.step(chunk)
        for name in ("rewards", "successes", "num_steps", "terminated", "truncated"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
        np.testing.assert_array_equal(a.observation["state"][:, -1], b.observation["state"])
        counts = a.observation["state"][:, :, 1]
        assert (np.diff(counts, axis=1)[counts[:, :-1] > 0] == 1).all()  # consecutive steps of one episode
        if a.ended.any():
            seeds = np.arange(N) + 10 * k
            waiting = env.step(chunk)  # does nothing where an episode has ended
            assert not waiting.num_steps[a.ended].any()
            np.testing.assert_array_equal(waiting.observation["state"][a.ended], a.observation["state"][a.ended])
            env.set_state(saved)
            env.step(chunk)
            env.reset(seeds, a.ended)
            plain.reset(seeds, a.ended)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    gymnasium.logger.min_level, before = 50, gymnasium.logger.min_level
    yield
    gymnasium.logger.min_level = before
