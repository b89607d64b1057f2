"""When a foreign environment says that its task is solved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from postbc.errors import InputError, require

#: "auto", a key of `info`, "terminated", or a reward.
Success = str | float
KEYS = ("success", "is_success")


def truth(key: str, value: Any) -> bool:
    """Whether a value reported under `key` says success. InputError for anything but booleans, and numbers that are 0 or 1."""
    found = np.asarray(value)
    good = found.dtype.kind == "b" or (found.dtype.kind in "iuf" and bool(np.isin(found, (0, 1)).all()))
    require(good, "Success is yes or no.", key=f'info["{key}"]', found=repr(value)[:100], expected="a boolean, or 0 or 1",
            remedy='report a boolean, or name another key or rule: from Python, success="…"')  # fmt: skip
    return bool(found.any())


class SuccessReader:
    """Success after one step of a vector environment.

    Args:
        rule: "auto": `info["success"]` or `info["is_success"]`; another text: that key of `info`; "terminated": the environment ends an
            episode itself only when it is solved; a number: rewards of at least this are successes. A key may be reported at every
            step or at an episode's end only (in `final_info` where the next episode begins in the same step).

    Attributes:
        reported: whether any environment has reported it so far.
    """

    def __init__(self, rule: Success = "auto") -> None:
        good = isinstance(rule, str) or (isinstance(rule, int | float) and not isinstance(rule, bool) and np.isfinite(rule))
        require(good, "There is no such rule of success.", key="success", found=rule,
                expected='"auto", a key of info, "terminated", or the reward of a success')  # fmt: skip
        self.rule = rule
        self.keys = KEYS if rule == "auto" else (str(rule),)
        self.reported = rule == "terminated" or not isinstance(rule, str)
        self._seen: set[str] = set()

    def __call__(
        self,
        info: Mapping[str, Any],
        reward: NDArray[Any],
        terminated: NDArray[np.bool_],
        over: NDArray[np.bool_],
        playing: NDArray[np.bool_],
        same_step: bool,
    ) -> NDArray[np.bool_]:
        """(N,) success of this step; `same_step`: where one is `over`, `final_info` says it, and `info` is of the next episode."""
        if not isinstance(self.rule, str):
            return reward >= self.rule
        if self.rule == "terminated":
            return terminated
        final = info.get("final_info") if same_step else None
        success, said = self._read(info, len(over))
        if final is not None:
            last, last_said = self._read(final, len(over))
            success, said = np.where(over, last, success), np.where(over, last_said, said)
        self.reported = self.reported or bool((said & playing).any())
        return success & said

    def _read(self, info: Any, count: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Values (N,) and whether they were reported (N,); 'info' as gymnasium batches it, or one dict an environment."""
        success, said = np.zeros(count, bool), np.zeros(count, bool)
        if not isinstance(info, Mapping):
            for i, one in enumerate(info):
                for key in self.keys:
                    if isinstance(one, Mapping) and one.get(key) is not None:
                        success[i], said[i] = truth(key, one[key]), True
                self._seen.update(one or {})
            return success, said
        self._seen.update(key for key in info if not key.startswith("_"))
        for key in self.keys:
            values = info.get(key)
            if values is None or isinstance(values, Mapping) or len(values) != count:
                continue
            present = np.asarray(info.get(f"_{key}", np.ones(count)), bool) & np.array([v is not None for v in values], bool)
            success |= np.array([bool(there) and truth(key, v) for there, v in zip(present, values, strict=True)], bool)
            said |= present
        return success, said

    def require_reported(self) -> None:
        """InputError if an episode has ended and nobody has ever said whether it was solved."""
        if self.reported:
            return
        raise InputError(
            "An episode has ended, and the environment has never said whether its task is solved.", key="success",
            found=f"in info: {', '.join(sorted(self._seen)) or 'nothing'}", expected=" or ".join(f'info["{key}"]' for key in self.keys),
            remedy='say where it is, in Python (postbc.environments.from_vector_env): success="another key of info"; '
            'success="terminated" where an episode ends by itself only when it is solved; or success=1.0, the reward of a success. '
            "What is reported at an episode's own end only, needs a horizon as long as its own",
        )  # fmt: skip
