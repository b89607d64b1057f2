"""The compiled control loop against robosuite's own step: the same physics, the same episodes, no leak.

    python benchmarks/check_control.py states   --task Lift --count 500
    python benchmarks/check_control.py episodes --task Lift --count 300
    python benchmarks/check_control.py replay   --file lift_human.hdf5
    python benchmarks/check_control.py sensitivity --task Can --count 300 [--robosuite]
    python benchmarks/check_control.py soak     --task Lift --minutes 60

Each prints one JSON object. tests/test_native_control.py runs the same functions at a smaller size.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from postbc.data.scripted.hands import ScriptedOperators
from postbc.data.scripted.operators import OPERATORS
from postbc.environments.robosuite import make
from postbc.environments.robosuite.simulation import NativeSimulation, RobosuiteSimulation, Simulation
from postbc.environments.robosuite.vector import RobosuiteChunkEnv

Array = NDArray[Any]


class SquareOperator:
    """Puts the nut on the peg by feedback on the observation: enough to visit grasps and insertions. One environment."""

    PEG = np.array([0.23, 0.10])
    HANDLE = 0.054  # m from the nut's centre to its handle

    def __init__(self, seed: int) -> None:
        self.noise = 0.05 * np.random.default_rng(seed).standard_normal((2000, 6))
        self.phase = self.clock = self.since = 0
        self.yaw = 0.0

    def act(self, observation: Array) -> Array:
        """(S,) -> (7,)"""
        hand, nut = observation[:3].astype(float), observation[9:12].astype(float)
        turn = Rotation.from_quat(observation[3:7]) * Rotation.from_rotvec([-np.pi, 0, 0])
        hand_yaw, nut_yaw = (r.as_euler("ZYX")[0] for r in (turn, Rotation.from_quat(observation[12:16])))
        along = np.array([np.cos(nut_yaw), np.sin(nut_yaw)])
        handle = np.array([*(nut[:2] + self.HANDLE * along), nut[2]])
        if self.clock == 0:  # the fingers close along the hand's y axis, across the handle
            self.yaw = hand_yaw + (nut_yaw - hand_yaw + np.pi / 2) % np.pi - np.pi / 2
        target, grip = hand.copy(), 1.0
        if self.phase == 0:  # above the handle
            target, grip = handle + [0, 0, 0.08], -1.0
            self._next(np.linalg.norm(hand - target) < 0.015 and abs(hand_yaw - self.yaw) < 0.05)
        elif self.phase == 1:  # down
            target, grip = handle.copy(), -1.0
            self._next(np.linalg.norm(hand - target) < 0.01 or self.since > 40)
        elif self.phase == 2:  # close
            self._next(self.since > 10)
        elif self.phase == 3:  # up; the hand turns so that the nut is square to the peg
            target[2] = 1.02
            self.yaw = hand_yaw - ((nut_yaw + np.pi / 4) % (np.pi / 2) - np.pi / 4)
            self._next(hand[2] > 1.0)
        elif self.phase == 4:  # over the peg
            self.yaw = hand_yaw - ((nut_yaw + np.pi / 4) % (np.pi / 2) - np.pi / 4)
            target = np.array([*(hand[:2] + self.PEG - nut[:2]), 1.02])
            self._next(np.linalg.norm(self.PEG - nut[:2]) < 0.004 and self.since > 15)
        elif self.phase == 5:  # down over it
            target = np.array([*(hand[:2] + self.PEG - nut[:2]), hand[2] - 0.02])
            self._next(nut[2] < 0.86 or self.since > 60)
        else:  # let go, leave
            grip, target[2] = -1.0, hand[2] + (0.05 if self.since > 6 else 0.0)
        command = np.clip(0.8 * (target - hand) / 0.05, -0.6, 0.6)
        rotation = (Rotation.from_rotvec([0, 0, self.yaw]) * turn.inv()).as_rotvec() / 0.5
        action = np.concatenate([command, np.clip(rotation, -0.5, 0.5)]) + self.noise[self.clock % 2000]
        self.clock, self.since = self.clock + 1, self.since + 1
        return np.clip(np.append(action, grip), -1, 1)

    def _next(self, reached: bool) -> None:
        if reached:
            self.phase, self.since = self.phase + 1, 0


class Operators:
    """One scripted operator a vector environment's member, whatever the task."""

    def __init__(self, task: str, seeds: list[int], horizon: int) -> None:
        self.task = task
        if task == "Square":
            self.hands = [SquareOperator(seed) for seed in seeds]
        else:
            self.scripted = ScriptedOperators(task, len(seeds), horizon)
            people = list(OPERATORS.values())
            for i, seed in enumerate(seeds):
                self.scripted.begin(i, people[seed % len(people)], seed)

    def act(self, observations: Array) -> Array:
        """(N, S) -> (N, 1, 7)"""
        if self.task == "Square":
            return np.stack([hand.act(o) for hand, o in zip(self.hands, observations)])[:, None]
        return self.scripted.act(observations)[:, None]


def category(simulation: NativeSimulation) -> str:
    """What the arm touches: nothing, and the object rests ("free"); the object with both pads ("grasp"); that, and the object
    touches the peg or the bins ("insertion"); anything else ("contact")."""
    env, data = simulation.env, simulation.data
    gripper = env.robots[0].gripper
    ids = env.sim.model.geom_name2id
    left, right = ({ids(g) for g in gripper.important_geoms[side]} for side in ("left_fingerpad", "right_fingerpad"))
    robot = {ids(g) for g in [*gripper.contact_geoms, *env.robots[0].robot_model.contact_geoms]}
    target = getattr(env, "cube", None) or next(
        o for o in getattr(env, "objects", None) or env.nuts if o.name == env.obj_to_use
    )
    thing = {ids(g) for g in target.contact_geoms}
    pairs = [(int(c.geom1), int(c.geom2)) for c in data.contact[: data.ncon]]
    touches = [tuple(p) for p in pairs if set(p) & robot]
    held = all(any(set(p) & pad and set(p) & thing for p in pairs) for pad in (left, right))
    resting = any(set(p) & thing and not set(p) & robot for p in pairs)
    if held:
        return "insertion" if resting and simulation.observation[11] > 0.86 else "grasp"
    still = resting and np.abs(data.cvel[simulation.sensors.object]).max() < 1e-3  # not falling, landing or rolling
    return "free" if still and not touches else "contact"


def visit(task: str, seed: int, episodes: int, steps: int = 350) -> Iterator[tuple[dict[str, Any], Array, str]]:
    """States that scripted and random hands come through: (state, next action (7,), category); free is what stays so in that step."""
    env = make(task, episodes, horizon=10**6, terminate_on="never", num_threads=1)
    observations = env.reset([int(np.random.SeedSequence([seed, i, 0]).generate_state(1)[0]) for i in range(episodes)])["state"]
    hands = Operators(task, list(range(seed, seed + episodes)), 1000)
    random = np.random.default_rng(seed)
    jerk = np.zeros((episodes, 7))
    for t in range(steps):
        actions = hands.act(observations)
        if t % 10 == 0:  # a tenth of the hands flail for half a second
            jerk = random.uniform(-1, 1, (episodes, 7)) * (random.random((episodes, 1)) < 0.1)
        actions[:, 0] = np.where(jerk.any(1)[:, None], jerk, actions[:, 0])
        before = []
        for simulation in env.simulations:
            assert isinstance(simulation, NativeSimulation)
            before.append((simulation, simulation.get_state(), category(simulation)))
        observations = env.step(actions).observation["state"]
        for (simulation, state, kind), action in zip(before, actions[:, 0]):
            touched = kind == "free" and category(simulation) != "free"
            yield state, action.astype(np.float64), "contact" if touched else kind
    env.close()


def quaternion_errors(a: Array, b: Array) -> Array:
    """|a − b| of quaternions (…, 4) that may differ in sign where w = 0 (robosuite rounds to float32 before choosing it)."""
    flip = np.where((np.abs(a[..., 3:]) < 1e-5) & ((a * b).sum(-1, keepdims=True) < 0), -1.0, 1.0)
    return np.abs(a - flip * b)


def compare_states(task: str, count: int, seed: int = 0) -> dict[str, Any]:
    """One control step natively and in robosuite from `count` random states; the largest differences by category."""
    native = make(task, 1, num_threads=1).simulations[0]
    reference = make(task, 1, num_threads=1, native=False).simulations[0]
    assert isinstance(native, NativeSimulation)
    assert isinstance(reference, RobosuiteSimulation)
    native.reset(0)
    reference.reset(0)
    arm, body = native.control.controller.arm.qpos, native.sensors.object
    episodes = max(2, count // 50)
    visited = list(visit(task, seed, episodes))
    random = np.random.default_rng(seed)
    kinds = sorted({kind for *_, kind in visited})
    by_kind = {kind: [v for v in visited if v[2] == kind] for kind in kinds}
    result: dict[str, Any] = {}
    left = count
    for k, (kind, found) in enumerate(sorted(by_kind.items(), key=lambda item: len(item[1]))):
        share = min(len(found), -(-left // (len(kinds) - k)))  # what a rare kind lacks, the others have more
        left -= share
        errors = np.zeros((share, 4))
        flags = np.zeros(share, bool)
        for j, index in enumerate(random.choice(len(found), share, replace=False)):
            state, action, _ = found[index]
            success = np.zeros((2, 1), bool)
            for s, simulation in enumerate((native, reference)):
                simulation.set_state(state)
                simulation.run(action[None], False, success[s])
            a, b = native.observation, reference.observation
            observed = np.abs(a - b)
            if task != "Lift":
                observed[19:23] = quaternion_errors(a[19:23], b[19:23])
            errors[j] = (
                np.abs(native.data.qpos[arm] - reference.data.qpos[arm]).max(),
                np.abs(native.data.xpos[body] - reference.data.xpos[body]).max(),
                np.abs(native.data.qpos - reference.data.qpos).max(),
                observed.max(),
            )
            flags[j] = success[0, 0] == success[1, 0]
        names = ("arm_qpos", "object_position", "any_qpos", "observation")
        result[kind] = {
            "states": share,
            "success_flags_equal": int(flags.sum()),
            **{n: {"max": float(e.max()), "median": float(np.median(e))} for n, e in zip(names, errors.T)},
        }
    return result


def episode_successes(task: str, count: int, native: bool, seed: int, moved: float | None = None) -> Array:
    """(count,) whether scripted episodes with seeds seed, seed + 1, … succeed; noise and habits depend on the seed alone.

    `moved`: put each episode into its first state again, the joint angles moved by normal noise of this size (rad).
    """
    members = min(count, 20 if native else 4)  # robosuite's own environments are large
    env = make(task, members, horizon=450, native=native, num_threads=1)
    if not native:
        _start_from_native_states(env)
    successes = np.zeros(count, bool)
    for start in range(0, count, env.num_envs):
        seeds = [seed + min(start + i, count - 1) for i in range(env.num_envs)]
        observations = env.reset(seeds)["state"]
        if moved is not None:
            states = np.array(env.sim_states())
            states[:, 1:8] += moved * np.random.default_rng(start).standard_normal((members, 7))  # after the time
            env.set_sim_states(states)
        hands = Operators(task, seeds, env.horizon + 1)
        done = np.zeros(env.num_envs, bool)
        solved = done.copy()
        while not done.all():
            step = env.step(hands.act(observations))
            observations, solved, done = step.observation["state"], solved | step.success, done | step.ended
        successes[start : start + env.num_envs] = solved[: count - start]
    env.close()
    return successes


def _start_from_native_states(env: RobosuiteChunkEnv) -> None:
    """Spare robosuite recompiling its model for every episode, which takes longer than the episode; the states are the same."""
    donor = make(env.task, 1, num_threads=1).simulations[0]

    def reset(simulation: Simulation, seed: int) -> None:
        donor.reset(seed)
        simulation.set_state(donor.get_state())

    for simulation in env.simulations:
        simulation.reset = functools.partial(reset, simulation)  # type: ignore[method-assign]


def compare_episodes(task: str, count: int, seed: int = 1000) -> dict[str, Any]:
    """Whole scripted episodes from the same seeds, stepped natively and by robosuite."""
    ours, theirs = (episode_successes(task, count, native, seed) for native in (True, False))
    rates = {"success_native": float(ours.mean()), "success_robosuite": float(theirs.mean())}
    return {"episodes": count, **rates, **agreement(ours, theirs, seed)}


def agreement(a: Array, b: Array, seed: int) -> dict[str, Any]:
    """The share of equal flags, and the seeds of the others; the first flag's is `seed`."""
    return {"equal": float((a == b).mean()), "seeds_that_differ": [int(seed + i) for i in np.flatnonzero(a != b)]}


def sensitivity(task: str, count: int, seed: int = 1000, native: bool = True, size: float = 1e-9) -> dict[str, Any]:
    """One simulator against itself, the arm's first joint angles moved by `size` rad: how far an episode's success is chance."""
    still, moved = (episode_successes(task, count, native, seed, moved=moved) for moved in (0.0, size))
    return {"episodes": count, "native": native, **agreement(still, moved, seed)}


def replay(file: str, native: bool, limit: int | None = None, draws: int = 1) -> dict[str, Any]:
    """Open-loop replay of the demonstrations of a robomimic file of Lift: which succeed."""
    import h5py

    with h5py.File(file) as h5:
        names = sorted(h5["data"], key=lambda name: int(name.split("_")[1]))[:limit]
        actions = [np.array(h5["data"][name]["actions"]) for name in names]
        states = [np.array(h5["data"][name]["states"][0]) for name in names]
    horizon = max(map(len, actions))
    env = make("Lift", len(names), horizon=horizon, native=native)
    env.reset(np.zeros(len(names), int))
    env.set_sim_states(np.stack(states))
    solved = np.zeros(len(names), bool)
    for t in range(horizon):
        command = np.stack([a[min(t, len(a) - 1)] for a in actions])
        solved |= env.step(command[:, None]).success & (
            t < np.array([len(a) for a in actions]) + 10
        )  # the last command is held for half a second
    env.close()
    return {"demonstrations": len(names), "succeeded": int(solved.sum()), "failed": [n for n, s in zip(names, solved) if not s]}


def soak(task: str, minutes: float, num_envs: int = 8) -> dict[str, Any]:
    """Random actions for a while: control steps, episodes, and the process's memory (MB) at the tenths of the time."""
    env = make(task, num_envs, chunk=4, terminate_on="never")
    env.reset(np.arange(num_envs))
    random = np.random.default_rng(0)
    start, steps, episodes, memory = time.monotonic(), 0, 0, []
    while (elapsed := time.monotonic() - start) < 60 * minutes:
        if elapsed >= 6 * minutes * (len(memory) + 1):
            memory.append(_resident())
        actions = random.uniform(-1, 1, (num_envs, 1, 7)) * np.ones((1, 4, 1))
        step = env.step(actions)
        steps += int(step.num_steps.sum())
        episodes += int(step.ended.sum())
        if step.ended.any():
            env.reset(episodes + np.arange(num_envs), step.ended)
    env.close()
    memory.append(_resident())
    return {"minutes": minutes, "control_steps": steps, "episodes": episodes, "memory_mb": memory}


def _resident() -> float:
    """Resident memory of this process (MB)."""
    try:
        with open("/proc/self/statm") as file:
            return round(int(file.read().split()[1]) * resource.getpagesize() / 1e6, 1)
    except OSError:
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["states", "episodes", "sensitivity", "replay", "soak"])
    parser.add_argument("--task", default="Lift")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", default="")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--robosuite", action="store_true", help="robosuite against itself instead of the native simulator")
    options = parser.parse_args()
    started = time.monotonic()
    if options.what == "states":
        result = compare_states(options.task, options.count, options.seed)
    elif options.what == "episodes":
        result = compare_episodes(options.task, options.count, 1000 + options.seed)
    elif options.what == "sensitivity":
        result = sensitivity(options.task, options.count, 1000 + options.seed, not options.robosuite)
    elif options.what == "replay":
        result = {"native": replay(options.file, True), "robosuite": replay(options.file, False)}
    else:
        result = soak(options.task, options.minutes)
    print(
        json.dumps(
            {"what": options.what, "task": options.task, "seconds": round(time.monotonic() - started), **result}, indent=1
        )
    )


if __name__ == "__main__":
    main()


__all__ = ["RobosuiteChunkEnv", "compare_episodes", "compare_states", "replay", "sensitivity", "soak"]
