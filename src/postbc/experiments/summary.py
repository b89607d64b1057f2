"""From run directories to numbers: every results.json, validated, grouped into settings and methods, compared seed by seed.

A *setting* is what must be equal for two methods to be comparable: task, data, number of demonstrations, finetuner, budget, evaluation.
A *method* is the pretraining with its own parameter (α or σ) and kind of policy. A *group* is one method in one setting: its runs
differ in the seed alone.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from postbc import statistics
from postbc.errors import InputError, require
from postbc.evaluation import Evaluation, TaskRate
from postbc.experiments.material import Found, Material, look
from postbc.schemas import Count, CountOrZero, NonNegative, Seed, Share, later, parse, plain, read_json, schema
from postbc.training.results import EPISODES_FILE

Text = Annotated[str, Field(max_length=10_000)]
RESULTS_FILE = "results.json"
LARGEST = 2**26
"""Bytes of a results.json, summary.json or file of episodes that is read."""
PRETRAINING = {"bc": "BC", "sigma-bc": "σ-BC", "postbc": "PostBC", "value-dice": "ValueDICE"}
FINETUNERS = {"dsrl-sac": "DSRL-SAC", "dsrl-na": "DSRL-NA", "dppo": "DPPO", "residual": "Residual RL", "best-of-n": "Best-of-N"}


SWEEP_FILE = "sweep.json"


@schema
class Sweep:
    """sweep.json: which recipes' runs lie where."""

    runs: dict[Text, tuple[Text, ...]]
    """Directory of one method's finetunings, without its seeds -> recipes."""


@schema
class Outcomes:
    """What came of each of a run's evaluation episodes."""

    of: Text
    """Identifies the episodes, by their seeds and initial states."""
    solved: Annotated[str, Field(pattern="^[01]+$", max_length=1_000_000)]
    """A digit an episode, in the order of their seeds."""

    @property
    def values(self) -> np.ndarray:
        """(E,) 0 or 1."""
        return np.frombuffer(self.solved.encode(), np.uint8) - ord("0")


@schema
class Entry:
    """One finished run of one seed: an entry of summary.json, a row of results.csv."""

    task: Text
    """Environment."""
    finetuner: Text
    pretraining: Text | None
    """bc, sigma-bc, postbc, or one of your own; None: not known (a policy that was not pretrained here)."""
    seed: Seed
    episodes: Count
    """Evaluation episodes, before and after."""
    success_before: Share
    success_after: Share
    curve: tuple[tuple[CountOrZero, Share], ...]
    """(environment steps, success), steps increasing."""
    policy: Text | None = None
    """Kind of the policy; None: not known (written before 0.3)."""
    data: Text | None = None
    """Name of the demonstrations."""
    demonstrations: CountOrZero | None = None
    posterior_weight: NonNegative | None = None
    variant: Text | None = later(None)
    """How PostBC was not the paper's."""
    sigma: NonNegative | None = None
    budget_env_steps: CountOrZero | None = None
    wall_clock_s: NonNegative | None = None
    command: Text | None = None
    commit: Text | None = None
    rollout_episodes: CountOrZero | None = None
    """Best-of-N: rollouts of the pretrained policy."""
    rollout_success: Share | None = None
    chunk_success_before: Share | None = None
    chunk_success_after: Share | None = None
    stopped: bool = False
    """Whether the run ended before its budget, at its target."""
    gradient_steps: CountOrZero | None = None
    best_env_steps: CountOrZero | None = None
    success_best: Share | None = None
    """Of the best milestone, on episodes that did not choose it."""
    tasks_before: tuple[TaskRate, ...] = later(())
    """Success by task, where the environment has several."""
    tasks_after: tuple[TaskRate, ...] = later(())
    horizon: Count | None = later(None)
    """Environment steps after which an evaluation episode has failed; None: not known."""
    outcomes_before: Outcomes | None = later(None)
    """Of the evaluation episodes; None: they were not kept."""
    outcomes_after: Outcomes | None = later(None)
    run: Text | None = None
    """Directory of the run, relative to those that were given."""
    recipes: tuple[Text, ...] = later(())
    """Experiments that the run belongs to: recipes of a sweep, or the directory of one recipe's."""

    def __post_init__(self) -> None:
        steps = [step for step, _ in self.curve]
        require(
            all(a < b for a, b in itertools.pairwise(steps)), "A learning curve goes forward.", key="curve", found=str(steps)[:80],
            expected="[[env_steps, success], ...], env_steps increasing",
        )  # fmt: skip


#: Fields of summary.json and results.csv in their order.
FIELDS = (
    "task", "data", "finetuner", "pretraining", "seed", "demonstrations", "posterior_weight", "sigma", "budget_env_steps",
    "episodes", "success_before", "success_after", "curve", "wall_clock_s", "command", "commit",
)  # fmt: skip
OPTIONAL = (
    "policy", "stopped", "gradient_steps", "best_env_steps", "success_best", "rollout_episodes", "rollout_success",
    "chunk_success_before", "chunk_success_after", "run", "variant", "tasks_before", "tasks_after", "recipes", "horizon",
    "outcomes_before", "outcomes_after",
)  # fmt: skip
#: Not numbers of a row of results.csv.
LISTS = ("curve", "tasks_before", "tasks_after", "recipes", "outcomes_before", "outcomes_after")


class Setting(NamedTuple):
    """What is held equal between methods."""

    task: str
    data: str | None
    demonstrations: int | None
    finetuner: str
    budget: str | None
    """80,000 environment steps, or 300 rollouts."""
    episodes: int
    """Evaluation episodes of a run."""
    horizon: int | None = None
    """Environment steps of such an episode, at most; None: not known."""

    @property
    def evaluation(self) -> str:
        """200 evaluation episodes of up to 300 steps."""
        return f"{self.episodes:,} evaluation episodes" + (f" of up to {self.horizon:,} steps" if self.horizon else "")

    @property
    def title(self) -> str:
        """For a heading: Lift · 5 demonstrations · DSRL-SAC."""
        number = f"{self.demonstrations} demonstration{'s' if self.demonstrations != 1 else ''}" if self.demonstrations else ""
        shown = [self.task.removeprefix("postbc/"), number, FINETUNERS.get(self.finetuner, self.finetuner)]
        return " · ".join(s for s in shown if s)


@dataclass(frozen=True)
class Group:
    """The runs of one method in one setting, by seed."""

    setting: Setting
    pretraining: str | None
    parameter: float | None
    runs: tuple[Entry, ...]
    """One a seed, in the order of the seeds."""
    policy: str | None = None
    """Kind of the policy."""
    recipe: str = ""
    """Where methods of the same name differ in something else: the experiments that they are of."""

    @property
    def label(self) -> str:
        """BC, σ-BC (σ=0.1), PostBC (α=1), and the recipe where that tells it from another."""
        return ": ".join(
            filter(None, (self.recipe, label(self.pretraining, self.parameter, self.runs[0].variant, self.policy)))
        )

    @property
    def seeds(self) -> list[int]:
        """Seeds of the runs."""
        return [run.seed for run in self.runs]

    def values(self, field: str) -> np.ndarray:
        """(S,) one number a seed; "area" is the mean height of the learning curve over the budget, of a run that stopped at its
        target as if its last success had lasted."""
        if field == "area":
            return np.array([statistics.area_under_curve([*c, *_lasting(r, c)]) for r, c in zip(self.runs, self.curves)])
        return np.array([getattr(run, field) for run in self.runs], float)

    def pooled_interval(self, field: str) -> tuple[float, float]:
        """Wilson's interval over all episodes of all seeds: of these very policies, not of the method."""
        trials = sum(run.episodes for run in self.runs)
        successes = sum(round(getattr(run, field) * run.episodes) for run in self.runs)
        return statistics.wilson_interval(successes, trials)

    def by_task(self, field: str) -> dict[str, TaskRate]:
        """Task -> its episodes of all seeds together; `field` is tasks_before or tasks_after."""
        found: dict[str, list[TaskRate]] = {}
        for rate in (rate for run in self.runs for rate in getattr(run, field)):
            found.setdefault(rate.task, []).append(rate)
        return {task: TaskRate.pooled(found[task]) for task in sorted(found)}

    @property
    def curves(self) -> list[list[tuple[float, float]]]:
        """Learning curves that start at the pretrained score."""
        return [_curve(run) for run in self.runs]


def _lasting(e: Entry, curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of a run that stopped at its target: the end of its budget."""
    budget = e.budget_env_steps or 0
    return [(budget, curve[-1][1])] if e.stopped and budget > curve[-1][0] else []


def _curve(e: Entry) -> list[tuple[float, float]]:
    begun = e.curve and e.curve[0][0] == 0
    return [*([] if begun else [(0, e.success_before)]), *e.curve]


OWN_POLICY = ("value-dice",)
"""Pretrainings that have a kind of policy of their own (ValueDICE: Gaussian), whatever that of the others is."""


def label(pretraining: str | None, parameter: float | None, variant: str | None = None, policy: str | None = None) -> str:
    """BC, σ-BC (σ=0.1), PostBC (α=1), PostBC (closed form, auto), BC (flow policy)."""
    name = PRETRAINING.get(pretraining or "", pretraining or "given policy")
    symbol = {"sigma-bc": "σ", "postbc": "α"}.get(pretraining or "")
    weight = None if symbol is None or parameter is None else f"{symbol}={parameter:g}"
    kind = f"{policy} policy" if policy not in (None, "diffusion") and pretraining not in OWN_POLICY else None
    more = ", ".join(filter(None, (weight, variant, kind)))
    return f"{name} ({more})" if more else name


@dataclass(frozen=True)
class Pair:
    """PostBC against a baseline in one setting on one measure; or a variant of a method against another of it."""

    setting: Setting
    ours: Group
    baseline: Group
    field: str
    result: statistics.Comparison
    p_holm: float
    """Holm-adjusted within all pairs of the report on this measure that are tested; 1 of those with too few seeds."""
    p_episodes: float | None = None
    """Of the test over episodes, which is about these policies: Holm-adjusted likewise; None where episodes were not kept."""

    def mean(self, group: Group) -> float:
        """A group's mean over the seeds that are compared."""
        shared = set(self.ours.seeds) & set(self.baseline.seeds)
        return float(np.mean([v for seed, v in zip(group.seeds, group.values(self.field)) if seed in shared]))

    @property
    def verdict(self) -> str:
        """What may be said, in words."""
        return verdict(self.result, self.p_holm, name="" if self.ours.pretraining == self.baseline.pretraining else "PostBC")


TOO_FEW = "too few seeds to tell"


def verdict(result: statistics.Comparison, p_holm: float, margin: float = 0.05, name: str = "PostBC") -> str:
    """PostBC higher | PostBC lower | equal within ±margin | not distinguishable | too few seeds to tell."""
    if result.seeds < statistics.FEWEST_SEEDS:
        return TOO_FEW
    if p_holm < 0.05 and not (result.low < 0 < result.high):
        return f"{name} {'higher' if result.difference > 0 else 'lower'}".strip()
    if -margin < result.low and result.high < margin:
        return f"equal within ±{margin:g}"
    return "not distinguishable"


# -- reading -------------------------------------------------------------------------------------------------------------------
def collect(directories: Iterable[str | Path], material: Material | None = None) -> tuple[list[Entry], list[str]]:
    """Entries of every results.json under the directories, sorted, and notes on what is left out.

    A directory without any is taken for a former report's, and its summary.json is read (also one of postbc 0.1).

    Raises:
        InputError: a directory does not exist, or a results.json is damaged; the message names file and field.
    """
    entries: dict[Path, list[Entry]] = {}
    notes: list[str] = []
    for directory in map(Path, directories):
        files = look([directory]) if material is None else material
        root = Path(os.path.realpath(directory))
        results = [f for f in files.named(RESULTS_FILE) if f.path.is_relative_to(root)]
        for found in results:
            if found.path not in entries:
                entries[found.path] = _of_result(found, files, notes)
        former = [f for f in files.named("summary.json") if f.path.parent == root]
        if not results and former and former[0].path not in entries:
            entries[former[0].path] = _of_summary(former[0], notes)
    files = look(directories) if material is None else material
    of, titles = experiments(files)
    named = [replace(e, recipes=of(path)) if of(path) else e for path, several in entries.items() for e in several]
    place = {title: k for k, title in enumerate(dict.fromkeys([*titles, *(name for e in named for name in e.recipes)]))}
    return sorted(named, key=lambda e: _order(e, place)), notes


def experiments(material: Material) -> tuple[Callable[[Path], tuple[str, ...]], list[str]]:
    """Tells the recipes that a results.json belongs to: by the sweep's record, or by the directory of its recipe's own run; and all of
    them in the order in which they were given.

    Two directories of one recipe (other seeds, methods or finetuners of it) are one experiment.
    """
    sweeps: dict[Path, tuple[str, ...]] = {}
    for found in material.named(SWEEP_FILE):
        if (sweep := material.json(found, Sweep)) is not None:
            sweeps |= {found.path.parent / where: recipes for where, recipes in sweep.runs.items()}
    alone: dict[Path, tuple[str, ...]] = {}
    known: list[tuple[dict[str, Any], str]] = []
    for stage in (s for s in material.stages() if s.kind == "run" and "methods" in s.values):
        values = {
            k: v for k, v in stage.values.items() if k not in ("methods", "finetuners", "finetune_in", "seeds", "compute")
        }
        name = next((name for before, name in known if before == values), None)
        if name is None:
            known.append((values, name := stage.path.name))
        alone[stage.path] = (name,)

    def of(path: Path) -> tuple[str, ...]:
        where = path.parent.parent
        if where in sweeps:
            return sweeps[where]
        return next((alone[above] for above in path.parents if above in alone), ())

    return of, [title for titles in (*sweeps.values(), *alone.values()) for title in titles]


def _of_result(found: Found, material: Material, notes: list[str]) -> list[Entry]:
    values = read_json(found.path, dict[str, Any] | list[Any], LARGEST)  # type: ignore[arg-type]
    require(
        isinstance(values, dict) and values.get("format") == 2, "These results were written by an earlier postbc (0.1).",
        file=found.path, found="a list" if isinstance(values, list) else f"format {values.get('format')!r:.40}", expected="format 2",
        remedy="report them with that version, and give its report's directory here; or run the stage again",
    )  # fmt: skip
    if any(values.get(key, 0) is None for key in ("success_before", "success_after")):
        notes.append(f"{found.name}: it was not evaluated, and is left out")
        return []
    known = {f.name for f in dataclasses.fields(Entry)}  # type: ignore[arg-type]
    entry = parse(Entry, {**{k: v for k, v in values.items() if k in known}, "run": str(Path(found.name).parent)}, found.path)
    kept: dict[str, Any] = {}
    for when in ("before", "after"):
        episodes = material.beside(found, EPISODES_FILE.format(when))
        if episodes is not None:
            try:
                kept[f"outcomes_{when}"] = _outcomes(episodes, entry.episodes, getattr(entry, f"success_{when}"))
            except InputError as error:
                material.note(episodes, error)
    return [replace(entry, **kept)]


def _outcomes(found: Found, number: int, success: float) -> Outcomes:
    """What a run's file of episodes says. InputError if it is none, or not that of its results.json."""
    require(found.size <= LARGEST, "This file is too large.", file=found.path, found=f"{found.size:,} bytes")
    episodes = Evaluation.load(found.path).episodes
    solved = "".join(str(int(e.success)) for e in episodes)
    require(len(solved) == number and abs(solved.count("1") / number - success) < 1e-9, "These are not the episodes of the result.",
            file=found.path, found=f"{solved.count('1')} of {len(solved)} solved", expected=f"{success:g} of {number}")  # fmt: skip
    # rounded: machines may differ in a last digit
    states = [(e.episode_seed, [round(x, 6) + 0.0 for x in e.initial_observation or ()]) for e in episodes]
    return Outcomes(hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16], solved)


def _of_summary(found: Found, notes: list[str]) -> list[Entry]:
    values = read_json(found.path, list[dict[str, Any]], LARGEST)
    known = {f.name for f in dataclasses.fields(Entry)}  # type: ignore[arg-type]
    unknown = sorted({k for value in values for k in value if k not in known})
    if unknown:
        notes.append(f"{found.name}: fields that are not known are left out: {', '.join(unknown)[:200]}")
    entries = []
    for number, value in enumerate(values):
        try:
            entries.append(parse(Entry, {k: v for k, v in value.items() if k in known}))
        except InputError as error:
            raise InputError(f"Entry {number} cannot be used. {error}", file=found.path) from None
    return [e if e.run else replace(e, run=str(Path(found.name).parent)) for e in entries]


def _order(e: Entry, place: Mapping[str, int]) -> tuple[Any, ...]:
    rank = {name: i for i, name in enumerate(PRETRAINING)}
    parameter = e.posterior_weight or e.sigma or 0.0
    budget = (e.rollout_episodes if e.finetuner == "best-of-n" else e.budget_env_steps) or 0
    return (
        e.task, e.data or "", e.demonstrations or 0, e.finetuner, budget, e.episodes, e.horizon or 0, rank.get(e.pretraining or "", 9),
        parameter, min((place[name] for name in e.recipes), default=0), e.seed, e.run or "",
    )  # fmt: skip


# -- grouping and comparing ----------------------------------------------------------------------------------------------------
def group(entries: Sequence[Entry]) -> tuple[list[Group], list[str]]:
    """Groups in the order of the entries, and notes. Several runs of one seed in a group are averaged (and noted)."""
    found: dict[tuple[Any, ...], dict[int, list[Entry]]] = {}
    for e in entries:
        setting = Setting(e.task, e.data, e.demonstrations, e.finetuner, _budget(e), e.episodes, e.horizon)
        parameter = {"postbc": e.posterior_weight, "sigma-bc": e.sigma}.get(e.pretraining or "")
        if "auto" in (e.variant or ""):  # each seed has its own
            parameter = None
        found.setdefault((setting, e.pretraining, parameter, e.variant, e.policy, e.recipes), {}).setdefault(e.seed, []).append(
            e
        )
    groups, notes = [], []
    several = Counter(key[:-1] for key in found)
    for (*method, recipes), seeds in found.items():
        (setting, pretraining, parameter, _, policy), runs = method, tuple(_average(seeds[seed]) for seed in sorted(seeds))
        made = Group(setting, pretraining, parameter, runs, policy, ", ".join(recipes) if several[tuple(method)] > 1 else "")
        groups.append(made)
        repeated = [seed for seed, runs in seeds.items() if len(runs) > 1]
        if repeated:
            notes.append(f"{setting.title}, {made.label}: several runs of seed {', '.join(map(str, repeated))}, averaged")
    return groups, notes


def _budget(e: Entry) -> str | None:
    # Best-of-N is given episodes; how many steps those take differs from run to run, and from method to method
    if e.finetuner == "best-of-n":
        return f"{e.rollout_episodes:,} rollouts" if e.rollout_episodes else None
    return f"{e.budget_env_steps:,} environment steps" if e.budget_env_steps else None


def _average(runs: list[Entry]) -> Entry:
    if len(runs) == 1:
        return runs[0]
    total = sum(r.episodes for r in runs)
    mean = {k: sum(getattr(r, k) * r.episodes for r in runs) / total for k in ("success_before", "success_after")}
    grid, values = statistics.interpolate([_curve(r) for r in runs if r.curve] or [_curve(runs[0])])
    curve = tuple((round(x), min(max(float(y), 0.0), 1.0)) for x, y in zip(grid, values.mean(0)))
    return replace(runs[0], **mean, episodes=total, curve=curve, outcomes_before=None, outcomes_after=None)


def compare_groups(groups: Sequence[Group], field: str) -> list[Pair]:
    """Every PostBC group against every group of its setting that was pretrained otherwise, on the seeds that both have; Holm over all.

    Their policies are of one kind, but for a baseline's that has its own (`OWN_POLICY`). Where recipes have methods of the same name,
    those of one recipe are compared. The same pretrained policies under another finetuner, with the same success before, are one
    comparison, not two.
    """

    def comparable(ours: Group, other: Group) -> bool:
        apart = ours.recipe and other.recipe and not set.intersection(*(set(g.runs[0].recipes) for g in (ours, other)))
        of_a_kind = ours.policy == other.policy or other.pretraining in OWN_POLICY
        return ours.setting == other.setting and of_a_kind and not apart

    baselines = [g for g in groups if g.pretraining not in (None, "postbc")]
    return _compared([(a, b) for a in groups if a.pretraining == "postbc" for b in baselines if comparable(a, b)], field)


def compare_variants(groups: Sequence[Group], field: str) -> list[Pair]:
    """Groups of one method in one setting (α, posterior, kind of policy, recipe), each against one of them; Holm over all.

    That one, the reference, is the group that most recipes share (what ablations vary), among equals the first.
    """
    methods: dict[tuple[Setting, str], list[Group]] = {}
    for g in groups:
        if g.pretraining is not None:
            methods.setdefault((g.setting, g.pretraining), []).append(g)
    pairs = []
    for of in methods.values():
        reference = max(of, key=lambda g: len(g.runs[0].recipes))
        pairs += [(g, reference) for g in of if g is not reference]
    return _compared(pairs, field)


def _compared(pairs: Sequence[tuple[Group, Group]], field: str) -> list[Pair]:
    """Each first against its second, on the seeds that both have, and on their episodes where both kept the same; Holm over all."""
    seen = set()
    found: list[tuple[Group, Group, statistics.Comparison]] = []
    for ours, other in pairs:
        shared = sorted(set(ours.seeds) & set(other.seeds))
        if not shared:
            continue
        a, b = (np.array([dict(zip(g.seeds, g.values(field)))[seed] for seed in shared]) for g in (ours, other))
        identity = (*ours.setting[:3], ours.label, other.label, *a, *b)
        if field == "success_before" and identity in seen:
            continue
        seen.add(identity)
        found.append((ours, other, statistics.compare(*(_by_episode(ours, other, shared, field) or (a, b)))))
    tested = [k for k, (_, _, result) in enumerate(found) if result.seeds >= statistics.FEWEST_SEEDS]
    adjusted = dict(zip(tested, statistics.holm([found[k][2].p for k in tested])))
    of_episodes = {k: result.p_episodes for k, (_, _, result) in enumerate(found) if result.p_episodes is not None}
    episodes = dict(zip(of_episodes, map(float, statistics.holm([*of_episodes.values()]))))
    return [
        Pair(a.setting, a, b, field, result, float(adjusted.get(k, 1.0)), episodes.get(k))
        for k, (a, b, result) in enumerate(found)
    ]


def _by_episode(ours: Group, other: Group, seeds: Sequence[int], field: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(S, E) outcomes of both, where both kept them and the episodes are the same."""
    if field not in ("success_before", "success_after"):
        return None
    name = field.replace("success", "outcomes")
    of: list[list[Outcomes | None]] = [[getattr(run, name) for run in g.runs if run.seed in seeds] for g in (ours, other)]
    if any(a is None or b is None or a.of != b.of for a, b in zip(*of)):
        return None
    a, b = (np.stack([o.values for o in row if o is not None]).astype(float) for row in of)
    return a, b


def summary_files(entries: Sequence[Entry]) -> dict[str, str]:
    """Name -> text of summary.json (`FIELDS` first, all included) and results.csv (one row a run, without `LISTS`)."""
    more = [k for k in OPTIONAL if any(getattr(e, k) not in (None, ()) for e in entries)]
    rows = [{k: plain(e)[k] for k in (*FIELDS, *OPTIONAL) if k in FIELDS or getattr(e, k) not in (None, ())} for e in entries]
    text = io.StringIO()
    writer = csv.DictWriter(text, [k for k in (*FIELDS, *more) if k not in LISTS], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return {"summary.json": json.dumps(rows, indent=2, allow_nan=False) + "\n", "results.csv": text.getvalue()}
