"""What both finetuners share around the algorithm: checks of policy against environment, when to checkpoint, results.json."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from postbc.errors import InputError
from postbc.evaluation import Evaluation
from postbc.policies.base import Policy
from postbc.runs import Run, Tree, versions, write_json

RESULTS_FILE = "results.json"


def select_seeds(policy: Policy, seeds: Sequence[int] | None) -> Policy:
    """The policy's members of these seeds (all by default). InputError names a seed that the policy does not have."""
    known = list(getattr(policy, "seeds", range(policy.members)))
    if seeds is None or list(seeds) == known:
        return policy
    for seed in seeds:
        if seed not in known:
            raise InputError(
                "The policy has no member of this seed.", key="seeds", found=seed, expected=", ".join(map(str, known)),
                remedy="choose among them, or pretrain with this seed",
            )  # fmt: skip
    return policy.select([known.index(seed) for seed in seeds])  # type: ignore[attr-defined, no-any-return]


def check_sizes(policy: Policy, env: VectorEnv, file: str | Path | None = None) -> None:
    """InputError if the policy's observations or actions do not have the environment's sizes."""
    for what, have, space in (
        ("observation", (policy.observation_dim,), env.single_observation_space),
        ("action", (policy.action_dim,), env.single_action_space),
    ):
        expected = (space.shape or ())[-1:]
        if expected and have != expected:
            raise InputError(
                f"The policy's {what} size is not the environment's.", file=file, key=f"{what}_dim", found=have[0],
                expected=expected[0], remedy="finetune a policy that was pretrained on this task",
            )  # fmt: skip


def fingerprint(policy: Policy) -> str:
    """A digest of the policy's parameters, so that a run is never resumed with another policy ("" for one without parameters)."""
    if not isinstance(policy, torch.nn.Module):
        return ""
    digest = hashlib.sha256()
    for name, value in sorted(policy.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class Checkpoints:
    """Decides when to checkpoint: at least `seconds` apart, and never more than about 5 % of the time spent on it.

    A run's state is complete, so when it is saved has no influence on what comes out.
    """

    def __init__(self, run: Run, seconds: float, elapsed: float = 0.0) -> None:
        self.run, self.seconds = run, seconds
        self._start = self._last = time.monotonic()
        self._elapsed, self._cost = elapsed, 0.0

    @property
    def elapsed(self) -> float:
        """Seconds that the stage has taken, earlier attempts included as far as they were saved."""
        return self._elapsed + time.monotonic() - self._start

    @property
    def due(self) -> bool:
        return time.monotonic() - self._last >= max(self.seconds, 20 * self._cost)

    def save(self, step: int, state: Tree) -> None:
        begin = time.monotonic()
        self.run.save(step, state)
        self._last = time.monotonic()
        self._cost = self._last - begin


def outcome(evaluation: Evaluation) -> dict[str, list[float]]:
    """Both success rates of every member, plain numbers."""
    return {"success": evaluation.success_rate.tolist(), "chunk_success": evaluation.chunk_success_rate.tolist()}


def write_results(
    directory: Path,
    policy: Policy,
    finetuner: str,
    task: str | None,
    seeds: Sequence[int],
    before: dict[str, list[float]] | None,
    after: dict[str, list[float]] | None,
    curves: Sequence[Sequence[tuple[int, float]]],
    **rest: Any,
) -> list[dict[str, Any]]:
    """Write results.json: a list with one entry a member; `rest` are further fields, shared or one value a member (arrays, lists)."""
    about, known = getattr(policy, "about", {}), versions()
    entries = []
    for m, seed in enumerate(seeds):
        own = {k: v[m] if isinstance(v, (list, tuple, np.ndarray)) else v for k, v in rest.items()}
        entries.append(
            {
                "task": task, "data": about.get("data"), "finetuner": finetuner, "pretraining": about.get("method"),
                "seed": int(seed), "demonstrations": about.get("demonstrations"),
                "posterior_weight": about.get("posterior_weight"), "sigma": about.get("sigma"),
                **{k: v.item() if isinstance(v, np.generic) else v for k, v in own.items()},
                "success_before": before and before["success"][m], "success_after": after and after["success"][m],
                "chunk_success_before": before and before["chunk_success"][m],
                "chunk_success_after": after and after["chunk_success"][m],
                "curve": [[int(step), float(success)] for step, success in curves[m]],
                "command": known["command"], "commit": known["commit"],
            }
        )  # fmt: skip
    write_json(directory / RESULTS_FILE, entries)
    return entries


def read_results(directory: str | Path) -> list[dict[str, Any]]:
    """The entries of a finished run, one a member. InputError if it has not finished."""
    path = Path(directory) / RESULTS_FILE
    if not path.is_file():
        raise InputError("There are no results here.", file=path, remedy="let the run finish: the same command with --resume")
    entries: list[dict[str, Any]] = json.loads(path.read_text())
    return entries
