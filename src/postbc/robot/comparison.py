"""Agents against one another, blindly: whose turn it is, and whether it is known who is best.

A round is an episode of every agent, in an order drawn for the round, from the same scene where seeds decide it; discarded ones are
played again. After each round every pair of agents is tested (:class:`postbc.sequential.PairedTest` with margin 0, which bets on both
sides), with the level shared out among all of these bets (Bonferroni): whenever it stops, the probability of any wrong claim is at
most the level.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from postbc.disk import write_json
from postbc.errors import require
from postbc.robot.labels import Label
from postbc.robot.rollout import Play
from postbc.schemas import Count, CountOrZero, NonNegative, OpenShare, Share, plain, read_json, schema
from postbc.sequential import PairedTest
from postbc.statistics import newcombe_interval, wilson_interval

PLAYS = "plays.json"
STREAM = 17_029  # of the order within a round


@schema
class Turn:
    """Which agent an episode was of."""

    episode: CountOrZero
    round: CountOrZero
    agent: CountOrZero


@schema
class Turns:
    """plays.json: not to be looked at before the comparison is over."""

    turns: tuple[Turn, ...] = ()


class Pair(NamedTuple):
    """What is known of two agents."""

    first: int
    second: int
    test: PairedTest

    @property
    def better(self) -> int | None:
        """Which of them; None: not known."""
        decision = self.test.decision
        return None if decision is None else self.first if decision == "not worse" else self.second


class Tournament:
    """Whose turn it is, from the labels alone; what was played is kept in plays.json.

    Args:
        folder: the session's.
        agents: how many.
        rounds: at most.
        seed: of the order.
        scene_seed: of the first round's scene.
        level: probability of any wrong claim.

    Raises:
        InputError: fewer than two agents, or a plays.json that is none.
    """

    def __init__(self, folder: Path, agents: int, rounds: int, seed: int, scene_seed: int, level: float) -> None:
        require(agents >= 2, "A comparison is of two agents or more.", key="agents", found=agents)
        self.file, self.agents, self.rounds, self.seed, self.scene_seed, self.level = (
            folder / PLAYS, agents, rounds, seed, scene_seed, level,
        )  # fmt: skip
        self.turns = {t.episode: t for t in read_json(self.file, Turns).turns} if self.file.exists() else {}

    def order(self, number: int) -> list[int]:
        """Of the agents in a round."""
        order: list[int] = np.random.default_rng((STREAM, self.seed, number)).permutation(self.agents).tolist()
        return order

    def outcomes(self, labels: Mapping[int, Label]) -> list[dict[int, bool]]:
        """Agent -> success, for each round; discarded episodes count for nothing."""
        found: list[dict[int, bool]] = [{} for _ in range(self.rounds)]
        for episode, turn in sorted(self.turns.items()):
            if turn.round < self.rounds and labels.get(episode) in ("success", "failure"):
                found[turn.round][turn.agent] = labels[episode] == "success"
        return found

    def complete(self, labels: Mapping[int, Label]) -> np.ndarray:
        """(R, agents) bool: success in the rounds that were played whole."""
        whole = [[of[a] for a in range(self.agents)] for of in self.outcomes(labels) if len(of) == self.agents]
        return np.array(whole, bool).reshape(-1, self.agents)

    def pairs(self, labels: Mapping[int, Label]) -> list[Pair]:
        """Every two agents, tested on all whole rounds."""
        both, outcomes = list(itertools.combinations(range(self.agents), 2)), self.complete(labels)
        made = [Pair(a, b, PairedTest(0.0, self.level / (2 * len(both)))) for a, b in both]
        for row in outcomes.tolist():
            for pair in made:
                pair.test.add(row[pair.first], row[pair.second])
        return made

    def best(self, labels: Mapping[int, Label]) -> int | None:
        """The agent that is known to be better than every other one."""
        better = [pair.better for pair in self.pairs(labels)]
        return next((a for a in range(self.agents) if better.count(a) == self.agents - 1), None)

    def choose(self, number: int, labels: Mapping[int, Label]) -> Play | None:
        """The next episode; None where it is known who is best, or all rounds are played."""
        for round_number, of in enumerate(self.outcomes(labels)):
            missing = [agent for agent in self.order(round_number) if agent not in of]
            if not missing:
                continue
            if len(missing) == self.agents and self.best(labels) is not None:
                return None
            self.turns[number] = Turn(number, round_number, missing[0])
            write_json(self.file, plain(Turns(tuple(turn for _, turn in sorted(self.turns.items())))))
            return Play(missing[0], self.scene_seed + round_number, (self.seed, number))
        return None


@schema
class AgentRow:
    """One agent of a comparison."""

    name: str
    """A, B, …"""
    path: str
    episodes: CountOrZero
    """Labelled success or failure, in whole rounds."""
    successes: CountOrZero
    interval: tuple[Share, Share]
    """95 %, Wilson: of this agent by itself, and only as good as if the number of episodes had been fixed before."""


@schema
class PairRow:
    """Two agents of a comparison."""

    first: str
    second: str
    difference: float
    """Of the success rates, first − second."""
    interval: tuple[float, float]
    """95 %, Newcombe: a description, not the test."""
    only_first: CountOrZero
    """Rounds in which the first alone succeeded."""
    only_second: CountOrZero
    evidence: tuple[NonNegative, NonNegative]
    """Capitals of the bets (e-values) that the first is better, and that the second is."""
    needed: NonNegative
    """Evidence that decides."""
    better: str | None
    """Which is; None: not known."""


@schema
class Comparison:
    """comparison.json."""

    robot: str
    rounds: CountOrZero
    """Played whole."""
    rounds_at_most: Count
    level: OpenShare
    """Probability at most of any wrong claim here, whenever it stopped."""
    agents: tuple[AgentRow, ...]
    pairs: tuple[PairRow, ...]
    best: str | None
    """Better than all others; None: not known."""
    discarded: CountOrZero


def letter(agent: int) -> str:
    """A, B, …, Z, A1, …"""
    return chr(ord("A") + agent % 26) + (str(agent // 26) if agent >= 26 else "")


def compare_agents(tournament: Tournament, labels: Mapping[int, Label], robot: str, paths: list[str]) -> Comparison:
    """What the labels say."""
    outcomes = tournament.complete(labels)
    n, solved = len(outcomes), outcomes.sum(0).astype(int).tolist()
    rows = tuple(
        AgentRow(letter(a), path, n, solved[a], wilson_interval(solved[a], n)) for a, path in enumerate(paths)
    )  # fmt: skip
    pairs = []
    for pair in tournament.pairs(labels):
        a, b = outcomes[:, pair.first], outcomes[:, pair.second]
        low, high = newcombe_interval(solved[pair.first], n, solved[pair.second], n) if n else (-1.0, 1.0)
        pairs.append(
            PairRow(
                first=letter(pair.first), second=letter(pair.second), difference=float(a.mean() - b.mean()) if n else 0.0,
                interval=(low, high), only_first=int((a & ~b).sum()), only_second=int((b & ~a).sum()), evidence=pair.test.capital,
                needed=1 / pair.test.level, better=None if pair.better is None else letter(pair.better),
            )
        )  # fmt: skip
    best = tournament.best(labels)
    return Comparison(
        robot=robot, rounds=n, rounds_at_most=tournament.rounds, level=tournament.level, agents=rows, pairs=tuple(pairs),
        best=None if best is None else letter(best), discarded=sum(label == "discard" for label in labels.values()),
    )  # fmt: skip
