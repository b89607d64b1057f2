"""What a reward says about success: the one place that decides it."""

from __future__ import annotations

from typing import Annotated, Literal, Union

import numpy as np
from pydantic import Field

from postbc.data.episodes import Dataset
from postbc.errors import InputError, require

#: auto: by what the rewards are, if they leave no doubt; zero-one: 1 at a success, else 0; minus-one-zero: 0 at a success, else -1;
#: a number: at least that.
SuccessRule = Union[Literal["auto", "zero-one", "minus-one-zero"], Annotated[float, Field(allow_inf_nan=False)]]  # noqa: UP007

_VALUES = {"zero-one": (0.0, 1.0), "minus-one-zero": (-1.0, 0.0)}
_RULES = "zero-one (1 at a success, else 0), minus-one-zero (0 at a success, else -1), or a number that a success reaches"


def _found(values: np.ndarray) -> str:
    if len(values) == 1:
        return f"every reward is {values[0]:g}"
    return f"rewards {', '.join(f'{v:g}' for v in values[:6])}{'' if len(values) <= 6 else f' … {values[-1]:g}'}"


def success_rule(dataset: Dataset, rule: SuccessRule = "auto") -> Literal["zero-one", "minus-one-zero"] | float:
    """The rule that applies to all of a dataset's rewards.

    Raises:
        InputError: no rewards, or rewards that do not fit the rule; under "auto" also shaped and all-equal ones: that would be a guess.
    """
    without = next((e.name for e in dataset if e.rewards is None), None)
    require(without is None, "There are no rewards, so that success is unknown.", file=dataset.source, key=f"{without}/rewards",
            remedy="use data with rewards; rewards are not needed for pretraining")  # fmt: skip
    if not isinstance(rule, str):
        return float(rule)
    values = np.unique(np.concatenate([np.unique(e.rewards) for e in dataset if e.rewards is not None]))
    if rule == "auto":
        require(len(values) > 1, "No step tells success from failure: nothing to learn from the rewards.", file=dataset.source,
                key="rewards", found=_found(values), expected="0 and 1, or -1 and 0",
                remedy=f"add episodes that succeed, or say what success is: {_RULES}")  # fmt: skip
        for name, allowed in _VALUES.items():
            if set(values.tolist()) <= set(allowed):
                return name  # type: ignore[return-value]
        raise InputError("The rewards are shaped, and do not say what success is.", file=dataset.source, key="rewards",
                         found=_found(values), expected="0 and 1, or -1 and 0", remedy=f"say what success is: {_RULES}")  # fmt: skip
    require(rule in _VALUES, "There is no such rule of success.", key="success", found=repr(rule), expected=_RULES)
    require(set(values.tolist()) <= set(_VALUES[rule]), "The rewards do not fit the rule of success.", file=dataset.source,
            key="rewards", found=_found(values), expected=f"{rule}: only {_VALUES[rule][0]:g} and {_VALUES[rule][1]:g}")  # fmt: skip
    return rule  # type: ignore[return-value]


def step_successes(dataset: Dataset, rule: SuccessRule = "auto") -> list[np.ndarray]:
    """(N,) bool an episode: whether the task was solved after that step.

    Raises:
        InputError: see :func:`success_rule`.
    """
    chosen = success_rule(dataset, rule)
    threshold = chosen if isinstance(chosen, float) else _VALUES[chosen][1]
    return [np.asarray(e.rewards) >= threshold for e in dataset]
