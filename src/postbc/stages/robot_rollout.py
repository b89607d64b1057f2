"""`postbc robot rollout`: episodes of a policy or an agent on a robot, labelled, each on the disk before the next begins."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table
from rich.text import Text

from postbc.agents.base import Agent, load_agent
from postbc.data.belonging import check_source
from postbc.devices import Compute
from postbc.environments.robot.registry import Robot, find_robot
from postbc.errors import require
from postbc.files import write_json
from postbc.policies.base import About
from postbc.progress import note
from postbc.robot.rollout import Control, Loop, Person, Play
from postbc.robot.summary import SUMMARY, SessionSummary, read_summary, summarise
from postbc.runs import Run, digest
from postbc.schemas import Count, Seed, later, plain, schema
from postbc.seeding import episode_seed
from postbc.stages.evaluate import digests, take_samples
from postbc.stages.seeds import agent_of, of_one_seed, require_seed

STREAM = 17_001  # of the scenes
#: What may change between two sittings of a session.
_PERSON = tuple(f"person.{name}" for name in ("label", "automatic_resets", "by", "host", "port"))
REVISABLE = ("compute", "policy", "episodes", "robot_config", *_PERSON)


@schema
class RobotRollout:
    """Play a policy or an agent on a robot in real time, and let a person reset the scene and label every episode.

    Writes, in seed_<seed>/ of the output directory, episodes/episode_00000.hdf5 …, timing/episode_00000.csv …, labels.jsonl and
    session.json. `postbc finetune best-of-n --rollouts OUTPUT` learns from it, `postbc robot label OUTPUT/seed_0` relabels.
    """

    policy: Path
    """policy.safetensors or its directory, the directory of a finetuned seed, or the directory of a stage with its seeds."""
    robot: str
    """sim/Lift (its state), sim/Lift-pixels64 (two cameras), widowx, lerobot, or gymnasium:ID of any Env; see docs/robot.md."""
    output: Path
    """Directory of the stage; each seed's session is seed_<seed> in it."""
    robot_config: Path | None = None
    """YAML file of the robot's own options."""
    episodes: Count = 100
    """Episodes of a session, discarded ones included (paper: 100). More can be played later: --resume with a larger number."""
    horizon: Count | None = None
    """Control steps of an episode; default the robot's."""
    samples: Count | None = later(None)
    """Of a Best-of-N agent: N instead of its own; its critics are the same for every N."""
    seeds: tuple[Seed, ...] = ()
    """Seeds of the policy, one session after another; default: every one that is there."""
    control: Annotated[Control, tyro.conf.arg(name="")] = Control()
    person: Annotated[Person, tyro.conf.arg(name="")] = Person()
    allow_version_mismatch: bool = False
    """Go on although the policy's data were made with another version of the simulator."""
    compute: Annotated[Compute, tyro.conf.arg(name="")] = Compute()
    resume: bool = False
    """Go on with the sessions in the output directory."""

    def __post_init__(self) -> None:
        require(len(set(self.seeds)) == len(self.seeds), "A seed is there twice.", key="seeds", found=self.seeds)
        check_options(self.control, self.person)


def check_options(control: Control, person: Person) -> None:
    """InputError for options that contradict one another."""
    require(not person.wrong_labels or person.label == "simulator", "Only the simulator's labels are flipped.", key="wrong_labels",
            found=f"--label {person.label}", expected="simulator")  # fmt: skip


def robot_of(name: str, config: Path | None, control: Control, person: Person) -> Robot:
    """The robot asked for, which can be used here, and as it is to be used. InputError if not; nothing has moved."""
    robot = find_robot(name, config)
    for key, on in (("fast", control.fast), ("label", person.label == "simulator")):
        require(not on or robot.simulated, "Only a simulated robot can do this.", key=key, found=robot.name,
                expected='sim/Lift, …, or an Env whose class has metadata["simulated"] = True',
                remedy="leave out --fast, and give --label keyboard, page or later")  # fmt: skip
    robot.check()
    return robot


def agent_for(path: Path, robot: Robot, device: Any, allow_version_mismatch: bool) -> tuple[Agent, About]:
    """An agent whose data belong to the robot, as far as either says. InputError if they do not."""
    agent, about = load_agent(path, device)
    note(
        check_source(about.facts, robot.belonging(), robot.name, file=str(path), allow_version_mismatch=allow_version_mismatch)
    )
    return agent, about


def state_keys_of(about: About) -> tuple[str, ...]:
    """The parts of "state" in the order of an agent's data; empty: unknown."""
    return tuple((about.facts or {}).get("state_keys") or ())


def recorded_person(person: Person) -> Person:
    """As a run records it: a token is nobody's business."""
    return dataclasses.replace(person, token=None)


def roll_out(config: RobotRollout, seed: int) -> SessionSummary:
    """One seed's session, until its episodes are played or a person ends it; resumable at the next episode.

    Raises:
        InputError: the policy cannot be used or does not belong to the robot, the robot cannot be used, or the directory holds another
            session; nothing has moved and nothing is written then. Or the robot fails, where nobody is there to look.
    """
    config = dataclasses.replace(config, compute=config.compute.resolved())
    device = config.compute.start()
    path = agent_of(config.policy, seed)
    robot = robot_of(config.robot, config.robot_config, config.control, config.person)
    agent, about = agent_for(path, robot, device, config.allow_version_mismatch)
    require_seed(about, seed, path)
    take_samples(agent, config.samples, path)
    person = recorded_person(config.person)
    recorded = of_one_seed(dataclasses.replace(config, robot=robot.name, person=person), seed)
    inputs = digests(path) | ({} if config.robot_config is None else {"robot_config": digest(config.robot_config)})

    def choose(number: int, labels: Any) -> Play | None:
        return None if number >= config.episodes else Play(0, episode_seed(STREAM, seed, number), (seed, number))

    loop = Loop(
        robot, [agent], config.control, config.person, episodes=config.episodes, horizon=config.horizon, seed=seed,
        state_keys=state_keys_of(about),
    )  # fmt: skip
    # whatever the robot, its agent and its buttons have against it has been said: now it may be written
    where = config.output / f"seed_{seed}"
    with contextlib.closing(loop), Run(where, recorded, resume=config.resume, inputs=inputs, revisable=REVISABLE) as run:
        whole = loop.run(run.directory, choose)
        loop.close()
        summary = summarise(run.directory, robot.name, str(path))
        write_json(run.directory / SUMMARY, plain(summary))
        if whole:
            run.finish()
    return summary


def table(output: Path, seeds: list[int]) -> Table:
    """One row a session."""
    grid = Table(title=Text(f"Rollouts: {output}"), caption="95 % Wilson intervals; late: milliseconds, mean and largest")
    for name in ("seed", "episodes", "success", "discarded", "unlabelled", "missed deadlines", "late"):
        grid.add_column(name, justify="right")
    for seed in seeds:
        s = read_summary(output / f"seed_{seed}")
        rate = "–" if s.rate is None else "{:.2f}  [{:.2f}, {:.2f}]".format(s.rate, *s.interval)
        missed, late = "–", "–"
        if s.timing is not None:
            missed = f"{s.timing.missed_deadlines} of {s.timing.steps}"
            late = f"{1000 * s.timing.late.mean:.1f}, {1000 * s.timing.late.max:.1f}"
        grid.add_row(str(seed), str(s.episodes), Text(rate), str(s.discard), str(s.unlabelled), missed, late)
    return grid
