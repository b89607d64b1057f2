"""`postbc evaluate`: a pretrained policy, or a finetuned agent, of each seed in an environment."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from pydantic import Field
from rich.table import Table
from rich.text import Text

from postbc import saliency
from postbc.agents.base import Agent, agent_files, load_agent
from postbc.agents.best_of_n import BestOfNAgent
from postbc.data.episodes import COORDINATES, is_image
from postbc.data.libero_tasks import IMAGE
from postbc.devices import Compute
from postbc.environments.registry import ENVIRONMENTS, Environment, find_environment
from postbc.environments.robosuite.tasks import IMAGE as ROBOMIMIC_IMAGE
from postbc.environments.robosuite.tasks import TASKS
from postbc.errors import require
from postbc.evaluation import Evaluation, Summary, TaskRate, check_plays, evaluate
from postbc.files import write_json
from postbc.policies.base import About, Observation
from postbc.progress import note, say
from postbc.runs import Run, digest
from postbc.schemas import Count, CountOrZero, Seed, later, plain, read_json, schema
from postbc.seeding import EVALUATION_SEED, evaluation_seeds
from postbc.stages.seeds import agent_of, of_one_seed, require_seed
from postbc.statistics import mean_of_rates
from postbc.training.results import RESULTS_FILE, read_result
from postbc.videos import check_rendering, choose, name_of, record

EPISODES, SUMMARY, VIDEOS, SALIENCY = "episodes.jsonl", "evaluation.json", "videos", "saliency.png"


@schema
class Evaluate:
    """Roll out a policy or a finetuned agent on fixed episodes; success by both definitions with Wilson intervals.

    Writes, in seed_<seed>/ of the output directory, episodes.jsonl (one line an episode), evaluation.json (rates, intervals) and
    videos/*.mp4 (and saliency.png, if asked for).
    """

    policy: Path
    """policy.safetensors or its directory, the directory of a finetuned seed, or the directory of a stage with its seeds."""
    output: Path
    """Directory of the stage; each seed's run is seed_<seed> in it."""
    environment: str | None = None
    """postbc/Lift, postbc/PushT, gymnasium:SomeId-v1, …; default: the task that the policy was trained on."""
    seeds: tuple[Seed, ...] = ()
    """Seeds of the policy to evaluate; default: every one that is there."""
    episodes: Count = 200
    """Episodes a seed (paper: 200 on Robomimic)."""
    horizon: Count | None = None
    """Environment steps after which an episode has failed; default: the environment's."""
    episode_seed: Annotated[int, Field(ge=EVALUATION_SEED, lt=2**32)] = EVALUATION_SEED
    """First episode seed, 10⁹ or more: the same number gives the same initial states to any policy."""
    num_envs: Annotated[int, Field(ge=1, le=10_000)] = 10
    """Environments side by side (part of the random stream: other numbers give other noise)."""
    inference_steps: Count | None = None
    """Sampling steps instead of the policy's own."""
    samples: Count | None = later(None)
    """Of a Best-of-N agent: N instead of its own; its critics are the same for every N."""
    cover: tuple[str, ...] = later(())
    """Cameras that the agent sees black (image.agentview): whose success does not fall does not look. posterior: a coherent policy's
    coordinates as 0, so that it plays the posterior's mean."""
    saliency: CountOrZero = later(0)
    """Decisions of the first episode, of an agent that sees, for which saliency.png shows what of each frame moves the chunk."""
    videos: CountOrZero = 3
    """Up to so many videos of successes, and of failures; 0 for none."""
    allow_version_mismatch: bool = False
    """Go on although the policy's data were made with another version of the simulator."""
    compute: Annotated[Compute, tyro.conf.arg(name="")] = Compute()
    jobs: Count = 1
    """Seeds at a time, each a process of its own."""
    resume: bool = False
    """Complete what is missing in the output directory; a finished evaluation is only shown."""

    def __post_init__(self) -> None:
        evaluation_seeds(self.episodes, self.episode_seed)
        require(len(set(self.seeds)) == len(self.seeds), "A seed is there twice.", key="seeds", found=self.seeds)


def evaluate_stage(config: Evaluate, seed: int) -> Evaluation:
    """Evaluate one seed, complete whatever is missing of its files, and return the episodes.

    Raises:
        InputError: the policy is not one, is of another environment or size, the directory holds another run, or videos
            are asked for and cannot be rendered here. Nothing is written then.
    """
    config = dataclasses.replace(config, compute=config.compute.resolved())
    device = config.compute.start()
    path = agent_of(config.policy, seed)
    overrides = {} if config.inference_steps is None else {"inference_steps": config.inference_steps}
    agent, about = load_agent(path, device, **overrides)
    require_seed(about, seed, path)
    take_samples(agent, config.samples, path)
    environment = environment_of(config.environment, about, path)
    horizon = environment.horizon if config.horizon is None else config.horizon
    note(check_plays(agent, about, environment, horizon, path, config.allow_version_mismatch))
    if config.cover:
        agent = Covered(agent, config.cover)
    if config.saliency:
        saliency.cameras_of(agent)
    if config.videos:
        check_rendering(environment.scene)
    recorded = of_one_seed(dataclasses.replace(config, environment=environment.name), seed)
    moved = ("compute", "policy")
    with Run(config.output / f"seed_{seed}", recorded, resume=config.resume, inputs=digests(path), revisable=moved) as run:
        folder = run.directory
        saved = run.load()
        evaluation = None
        if (folder / EPISODES).exists():
            evaluation = Evaluation.load(
                folder / EPISODES, evaluation_seeds(config.episodes, config.episode_seed).tolist(), seed
            )
        if evaluation is None or (saved is None and _is_missing(folder, evaluation, config.videos)):
            evaluation = evaluate(  # what plays computes in float32, here as in the finetuners' evaluations
                agent, environment, episodes=config.episodes, seed=config.episode_seed, num_envs=config.num_envs, agent_seed=seed,
                horizon=horizon, record_actions=config.videos > 0,
            )  # fmt: skip
            chosen = choose(evaluation, config.videos)
            actions = {str(e.episode_seed): np.asarray(evaluation.actions[e.episode_seed]) for e in chosen}
            saved = 1, {"actions": actions, "chooses_episodes": evaluation.chooses_episodes}
            run.save(*saved)  # what the rest is made of, if this process dies
            if not evaluation.chooses_episodes:
                say(f"note: {environment.name} begins episodes of its own, so other policies are not measured on the same ones")
            evaluation.save(folder / EPISODES)
        if saved is not None:
            state: Any = saved[1]
            if not (folder / SUMMARY).exists():
                summary = Summary(
                    environment=environment.name, policy=str(path), method=about.method,
                    finetuner=getattr(agent, "finetuner", None), horizon=horizon, chunk=agent.chunk, covered=config.cover,
                    chooses_episodes=bool(state["chooses_episodes"]), **evaluation.summary(),
                )  # fmt: skip
                write_json(folder / SUMMARY, plain(summary))
            if config.videos and environment.scene is not None:
                films = choose(evaluation, config.videos)
                record(
                    films, lambda e: state["actions"][str(e.episode_seed)], environment.scene, folder / VIDEOS, environment.fps
                )
        if config.saliency and not (folder / SALIENCY).exists():
            found = saliency.looks(agent, environment, config.episode_seed, config.saliency, seed, horizon)
            saliency.plot(found, folder / SALIENCY, f"{path.parent.name}/{path.name}: what moves the chunk when it is covered")
        run.finish()
    return evaluation


def take_samples(agent: Agent, samples: int | None, path: Path) -> None:
    """Give a Best-of-N agent another N, where one is asked for. InputError for an agent that chooses among none."""
    if samples is not None:
        require(isinstance(agent, BestOfNAgent), "Only a Best-of-N agent chooses among samples.", file=path, key="samples",
                found=getattr(agent, "finetuner", None) or "a policy that was not finetuned", expected="best-of-n")  # fmt: skip
        agent.samples = samples  # type: ignore[attr-defined]


class Covered:
    """An agent whose cameras see nothing: zeros under these names, all else as it is; the posterior's coordinates may be covered, too.

    Raises:
        InputError: the agent reads nothing of such a name.
    """

    def __init__(self, agent: Agent, names: Sequence[str]) -> None:
        self._agent, self._names = agent, tuple(names)
        cameras = [name for name in agent.shapes if is_image(name) or name == COORDINATES]
        unknown = [name for name in names if name not in cameras]
        require(not unknown, "The agent reads no such camera.", key="cover",
                found=", ".join(unknown), expected=f"some of {', '.join(cameras)}" if cameras
                else "an agent that reads images (posterior: a coherent one)")  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        return getattr(self._agent, name)

    def act(self, observation: Observation, generator: torch.Generator) -> torch.Tensor:
        """As the agent's."""
        return self._agent.act(
            dict(observation) | {name: torch.zeros_like(observation[name]) for name in self._names}, generator
        )


def environment_of(name: str | None, about: About, file: Path) -> Environment:
    """The environment asked for, or the policy's own. InputError if it is not known."""
    if name is not None:
        return find_environment(name)
    facts = about.facts or {}
    known = about.task or facts.get("environment")
    if not known and (file / RESULTS_FILE).is_file():
        known = read_result(file).task
    require(known, "The policy does not say what environment it was trained for.", file=file, key="environment",
            remedy="give --environment, for example postbc/Lift")  # fmt: skip
    found, keys = find_environment(str(known)), tuple(facts.get("state_keys") or ())
    images = facts.get("images") or {}
    if keys and keys == found.state_keys and not images:
        return found
    default = IMAGE if found.name.startswith("libero/") else ROBOMIMIC_IMAGE
    if images and (found.name.startswith("libero/") or found.name.removeprefix("postbc/") in TASKS):
        size = next(iter(images.values()))[-1]
        return find_environment(f"{found.name}-pixels{'' if size == default else size}")
    for other in (other for other in ENVIRONMENTS if other.startswith(f"{found.name}-")):  # with other observations
        if (keys and find_environment(other).state_keys == keys) or (images and other.endswith("-pixels")):
            return find_environment(other)
    return found


def digests(path: Path) -> dict[str, str]:
    """Of the files that make an agent."""
    return {file.stem: digest(file) for file in agent_files(path)}


def _is_missing(folder: Path, evaluation: Evaluation, videos: int) -> bool:
    """Whether something is missing that episodes.jsonl alone does not make."""
    films = (folder / VIDEOS / name_of(episode) for episode in choose(evaluation, videos))
    return not (folder / SUMMARY).exists() or not all(film.exists() for film in films)


def task_table(output: Path, seeds: list[int]) -> Table | None:
    """Success at any step by task, all seeds' episodes together and each seed's; None where there is one task."""
    rows = [read_json(output / f"seed_{seed}" / SUMMARY, Summary) for seed in seeds]
    names = list(dict.fromkeys(rate.task for row in rows for rate in row.tasks))
    if not names:
        return None
    grid = Table(title="Success (any step) by task", caption="95 % Wilson intervals over the episodes of all seeds")
    for name in ("task", "episodes", "success", *(f"seed {row.agent_seed}" for row in rows if len(rows) > 1)):
        grid.add_column(name, justify="left" if name == "task" else "right", overflow="fold")
    of_rows, of_tasks = [{rate.task: rate for rate in row.tasks} for row in rows], []
    for name in sorted(names):
        each = [of.get(name) for of in of_rows]
        pooled = TaskRate.pooled([rate for rate in each if rate is not None])
        of_tasks.append(pooled)
        shown = [("" if rate is None else f"{rate.success:.2f}") for rate in each] if len(rows) > 1 else []
        interval = "{:.3f}  [{:.2f}, {:.2f}]".format(pooled.success, *pooled.success_interval)
        grid.add_row(Text(name), str(pooled.episodes), Text(interval), *shown)
    means = [f"{np.mean([rate.success for rate in row.tasks]):.3f}" if row.tasks else "" for row in rows]
    mean = mean_of_rates([rate.success * rate.episodes for rate in of_tasks], [rate.episodes for rate in of_tasks])
    grid.add_row("mean of the tasks", "", Text("{:.3f}  [{:.2f}, {:.2f}]".format(*mean)), *(means if len(rows) > 1 else []))
    return grid


def table(output: Path, seeds: list[int]) -> Table:
    """The rates with their intervals, one row a seed."""
    grid = Table(title=Text(f"Evaluation: {output}"), caption="95 % Wilson intervals over the episodes of one policy")
    for name in ("seed", "episodes", "success (any step)", "success (whole chunk)", "mean steps"):
        grid.add_column(name, justify="right")
    rows = [read_json(output / f"seed_{seed}" / SUMMARY, Summary) for seed in seeds]
    for row in rows:
        pairs = ((row.success, row.success_interval), (row.chunk_success, row.chunk_success_interval))
        rates = [Text("{:.3f}  [{:.2f}, {:.2f}]".format(rate, *interval)) for rate, interval in pairs]
        grid.add_row(str(row.agent_seed), str(row.episodes), *rates, f"{row.mean_steps:.0f}")
    if len(rows) > 1:
        means = [f"{np.mean([getattr(row, name) for row in rows]):.3f}" for name in ("success", "chunk_success")]
        grid.add_row("mean", str(sum(row.episodes for row in rows)), *means, "")
    return grid
