"""`postbc robot compare`: two agents or more on one robot, in random order, blind, until it is known which is better."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field

from postbc.devices import Compute
from postbc.errors import require
from postbc.files import write_json
from postbc.robot.comparison import Comparison, Tournament, compare_agents
from postbc.robot.comparison_report import film, verdict, write_report
from postbc.robot.labels import Labels
from postbc.robot.rollout import Control, Loop, Person
from postbc.runs import Run, digest
from postbc.schemas import Count, CountOrZero, OpenShare, Seed, plain, read_json, schema
from postbc.seeding import EVALUATION_SEED, evaluation_seeds
from postbc.stages.evaluate import digests
from postbc.stages.robot_rollout import REVISABLE, agent_for, check_options, recorded_person, robot_of, state_keys_of
from postbc.stages.seeds import one_agent

COMPARISON = "comparison.json"


@schema
class RobotCompare:
    """Play two agents or more on a robot, in random order; whoever labels does not see which. Stops as soon as the answer is known.

    Writes episodes/, timing/, labels.jsonl, comparison.json, report.html and report.md (with videos, where the robot has cameras) into
    the output directory. plays.json says who played when: do not look before it is over.
    """

    agents: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Policies or agents, each as `postbc robot rollout --policy` takes it, of one seed."""
    robot: str
    """As of `postbc robot rollout`."""
    output: Path
    """Directory of the comparison."""
    robot_config: Path | None = None
    """YAML file of the robot's own options."""
    episodes: Count = 40
    """Episodes of each agent, at most; discarded ones are played again."""
    level: OpenShare = 0.05
    """Probability at most of any wrong claim, however long it takes."""
    horizon: Count | None = None
    """Control steps of an episode; default the robot's."""
    seed: Seed = 0
    """Of the order, and of the agents' random numbers."""
    episode_seed: Annotated[int, Field(ge=EVALUATION_SEED, lt=2**32)] = EVALUATION_SEED
    """Seed of the first round's scene, for a robot whose scene seeds decide: the same for all agents of a round."""
    videos: CountOrZero = 2
    """Up to so many videos of each agent's successes, and of its failures."""
    control: Annotated[Control, tyro.conf.arg(name="")] = Control()
    person: Annotated[Person, tyro.conf.arg(name="")] = Person()
    allow_version_mismatch: bool = False
    """Go on although the agents' data were made with another version of the simulator."""
    compute: Annotated[Compute, tyro.conf.arg(name="")] = Compute()
    resume: bool = False
    """Go on with the comparison in the output directory."""

    def __post_init__(self) -> None:
        require(len(self.agents) >= 2, "A comparison is of two agents or more.", key="agents", found=len(self.agents))
        require(self.person.label != "later", "A comparison that stops when it knows needs labels as it goes.", key="label",
                found="later", expected="keyboard, page or simulator")  # fmt: skip
        evaluation_seeds(self.episodes, self.episode_seed)
        check_options(self.control, self.person)


def compare(config: RobotCompare) -> Comparison:
    """Play until it is known which agent is best, all rounds are played, or a person ends it; resumable at the next episode.

    Raises:
        InputError: as :func:`postbc.stages.robot_rollout.roll_out`, or agents that order their observations differently.
    """
    config = dataclasses.replace(config, compute=config.compute.resolved())
    device = config.compute.start()
    paths = [one_agent(path) for path in config.agents]
    robot = robot_of(config.robot, config.robot_config, config.control, config.person)
    loaded = [agent_for(path, robot, device, config.allow_version_mismatch) for path in paths]
    keys = {state_keys_of(about) for _, about in loaded}
    require(len(keys) == 1, "The agents' data order the parts of their states differently.", key="agents", found=sorted(keys))
    recorded = dataclasses.replace(config, robot=robot.name, person=recorded_person(config.person))
    inputs = {f"agent-{k}-{kind}": value for k, path in enumerate(paths) for kind, value in digests(path).items()}
    inputs |= {} if config.robot_config is None else {"robot_config": digest(config.robot_config)}
    loop = Loop(
        robot, [agent for agent, _ in loaded], config.control, config.person, horizon=config.horizon, seed=config.seed,
        episodes=config.episodes * len(paths), state_keys=keys.pop(),
    )  # fmt: skip
    moved = (*REVISABLE, "agents", "videos")
    with contextlib.closing(loop), Run(config.output, recorded, resume=config.resume, inputs=inputs, revisable=moved) as run:
        folder = run.directory
        tournament = Tournament(folder, len(paths), config.episodes, config.seed, config.episode_seed, config.level)
        whole = loop.run(folder, tournament.choose)
        loop.close()
        labels = Labels(folder).current()
        found = compare_agents(tournament, labels, robot.name, [str(path) for path in paths])
        write_json(folder / COMPARISON, plain(found))
        videos, note = film(folder, tournament, labels, config.videos, config.control.rate or robot.rate) if whole else ([], "")
        write_report(folder, found, videos, note if whole else "It was ended before the answer was known: --resume goes on.")
        if whole:
            run.finish()
    return found


def said(output: Path) -> str:
    """The answer, and each agent's rate, in a few lines."""
    found = read_json(output / COMPARISON, Comparison)
    rates = [f"  {row.name}: {row.successes} of {row.episodes}  {row.path}" for row in found.agents]
    return "\n".join([verdict(found), *rates, f"report: {output / 'report.html'}"])
