"""Min-max normalisation to [-1, 1], as in DPPO's preprocessing: x -> 2 (x - min) / (max - min + 1e-6) - 1, never clamped.

A state's quaternions may be read as rotations instead: the first two columns of their matrices, which are within ±1 as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from postbc.data.episodes import Dataset
from postbc.data.rotations import columns_of, find_quaternions, rotation_6d
from postbc.errors import InputError, require

#: Added to every range (DPPO, `process_robomimic_dataset.py`). A constant dimension is therefore divided by 1e-6.
EPSILON = 1e-6
PARTS = ("state", "action")
Rotations = Literal["as-recorded", "6d"]


class Normalization(nn.Module):
    """Raw <-> normalised states and actions, per dimension; a module whose buffers travel with the policy that owns it.

    `x -> (x - low) * scale - 1` with scale = 2 / (high - low + 1e-6), prepared in float64. Frames are not its business.

    Args:
        state_low, state_high: (S,) ends of each state dimension; S may be 0.
        action_low, action_high: (A,).
        quaternions: columns of the state where quaternions (x, y, z, w) begin that become six numbers each, behind all others.

    Raises:
        InputError: shapes that differ, not finite, or low above high; quaternions that overlap or end beyond the state.
    """

    state_low: Tensor
    """(S,) float32."""
    state_scale: Tensor
    """(S,) float32."""
    action_low: Tensor
    """(A,) float32."""
    action_scale: Tensor
    """(A,) float32."""

    def __init__(
        self, state_low: Any, state_high: Any, action_low: Any, action_high: Any, quaternions: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self._ends: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for part, low, high in (("state", state_low, state_high), ("action", action_low, action_high)):
            try:
                low, high = np.array(low, dtype=np.float64), np.array(high, dtype=np.float64)
            except (TypeError, ValueError) as error:
                raise InputError("A normalisation is made of numbers.", key=part, found=str(error)) from None
            require(
                low.ndim == 1 and low.shape == high.shape and np.all(np.isfinite(low) & np.isfinite(high)) and np.all(low <= high),
                "A normalisation needs finite lower values not above the upper ones, one of each a dimension.",
                key=f"{part}_low, {part}_high", found=f"shapes {low.shape} and {high.shape}",
            )  # fmt: skip
            self._ends[part] = low, high
            self.register_buffer(f"{part}_low", torch.tensor(low, dtype=torch.float32))
            self.register_buffer(f"{part}_scale", torch.tensor(2 / (high - low + EPSILON), dtype=torch.float32))
        self.quaternions = tuple(quaternions)
        columns = columns_of(self.quaternions)
        require(
            columns == sorted(set(columns)) and all(0 <= column < self.state_dim for column in columns),
            "Quaternions are four columns of the state each, one after another.", key="quaternions", found=self.quaternions,
            expected=f"first columns, at least 4 apart, 0 to {self.state_dim - 4}",
        )  # fmt: skip
        others = [column for column in range(self.state_dim) if column not in columns]
        self._quaternions: Tensor  # (Q, 4)
        self._others: Tensor  # (S − 4·Q,)
        self.register_buffer("_quaternions", torch.tensor(columns, dtype=torch.int64).view(-1, 4), persistent=False)
        self.register_buffer("_others", torch.tensor(others, dtype=torch.int64), persistent=False)

    @property
    def state_dim(self) -> int:
        """S."""
        return self.state_low.shape[0]

    @property
    def action_dim(self) -> int:
        """A."""
        return self.action_low.shape[0]

    @property
    def state_features(self) -> int:
        """Width of a normalised state: S, and two more for each quaternion."""
        return self.state_dim + 2 * len(self.quaternions)

    def _check(self, part: str, x: Tensor, width: int) -> None:
        require(x.shape[-1:] == (width,), f"The {part} has another width than the data this normalisation was made from.",
                key=part, found=f"shape {tuple(x.shape)}", expected=f"(..., {width})",
                remedy="use data of the same task and the same observation keys")  # fmt: skip

    def normalize_state(self, state: Tensor) -> Tensor:
        """(..., S) raw units -> (..., S + 2·Q), the data's range becoming [-1, 1]; values outside it go outside (no clamp).

        Q of `quaternions`, each of which is six numbers in [-1, 1] at the end.
        """
        self._check("state", state, self.state_dim)
        normalised = (state - self.state_low) * self.state_scale - 1
        if not self.quaternions:
            return normalised
        rotations = rotation_6d(state[..., self._quaternions]).flatten(-2)
        return torch.cat((normalised[..., self._others], rotations), -1)

    def normalize_action(self, action: Tensor) -> Tensor:
        """(..., A) raw units -> (..., A) normalised; chunks (..., T, A) step by step with the same numbers."""
        self._check("action", action, self.action_dim)
        return (action - self.action_low) * self.action_scale - 1

    def unnormalize_action(self, action: Tensor) -> Tensor:
        """(..., A) normalised -> (..., A) raw units."""
        self._check("action", action, self.action_dim)
        return (action + 1) / self.action_scale + self.action_low

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[no-untyped-call]
        for part in PARTS:  # buffers of a checkpoint that are not of these ends: from now on the ends are theirs
            low, high = self._ends[part]
            mine, scale = getattr(self, f"{part}_low").cpu(), getattr(self, f"{part}_scale").cpu()
            wide = torch.tensor(2 / (high - low + EPSILON), dtype=torch.float32)
            if not (torch.equal(mine, torch.tensor(low, dtype=torch.float32)) and torch.equal(scale, wide)):
                low = mine.double().numpy()
                self._ends[part] = low, low + np.maximum(2 / scale.double().numpy() - EPSILON, 0)

    @classmethod
    def fit(cls, dataset: Dataset, *, minimum_range: float = 0.0, rotations: Rotations = "as-recorded") -> Normalization:
        """Minimum and maximum of every dimension over all steps of all episodes.

        `minimum_range` (raw units) widens narrower dimensions around their middle; 0 is DPPO's behaviour, where a dimension that is
        constant in the data is divided by 1e-6, so that any other value met later becomes huge (`demos inspect` lists them).
        `rotations` "6d": the quaternions that are found in the states (:func:`~postbc.data.rotations.find_quaternions`) become six
        numbers each, whatever their range.
        """
        require(0 <= minimum_range < np.inf, "The minimum range is not negative.", key="minimum_range", found=minimum_range)
        ends: dict[str, Any] = {}
        for part, values in zip(PARTS, (dataset.states, dataset.actions)):
            low, high = values.min(0).astype(np.float64), values.max(0).astype(np.float64)
            extra = np.maximum(minimum_range - (high - low), 0) / 2
            ends[f"{part}_low"], ends[f"{part}_high"] = low - extra, high + extra
        return cls(**ends, quaternions=find_quaternions(dataset) if rotations == "6d" else ())

    @classmethod
    def identity(cls, state_dim: int, action_dim: int) -> Normalization:
        """Range [-1, 1] everywhere: values stay as they are (up to the 1e-6)."""
        s, a = np.ones(state_dim), np.ones(action_dim)
        return cls(-s, s, -a, a)

    def to_dict(self) -> dict[str, list[float]]:
        """Plain lists, for JSON; floats survive the round trip exactly. Quaternions only where there are some."""
        values = {f"{part}_{end}": self._ends[part][i].tolist() for part in PARTS for i, end in enumerate(("low", "high"))}
        return values | ({"quaternions": list(self.quaternions)} if self.quaternions else {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Normalization:
        """Inverse of :meth:`to_dict`. InputError when a part is missing or is not numbers."""
        keys = [f"{part}_{end}" for part in PARTS for end in ("low", "high")]
        require(isinstance(values, Mapping) and set(values) - {"quaternions"} == set(keys), "The normalisation is incomplete.",
                found=sorted(values) if isinstance(values, Mapping) else type(values).__name__, expected=", ".join(keys))  # fmt: skip
        quaternions = values.get("quaternions", [])
        require(isinstance(quaternions, list) and all(type(first) is int for first in quaternions),
                "Quaternions are said by their first columns.", key="quaternions", found=quaternions,
                expected="a list of integers")  # fmt: skip
        return cls(**values)


def fit_normalization(
    subset: Dataset, full: Dataset, statistics: Literal["full", "subset"] = "full", minimum_range: float = 0.0,
    rotations: Rotations = "as-recorded",
) -> Normalization:  # fmt: skip
    """Normalisation for training on `subset` drawn from `full`.

    "full" takes the statistics of the whole file, as the paper's code base does (DPPO computes them before it takes the first
    `max_n_episodes`); "subset" takes those of the episodes actually used, which is all that a user with 5 demonstrations has.
    """
    require(statistics in ("full", "subset"), "Unknown normalisation statistics.", key="statistics", found=repr(statistics),
            expected="'full' or 'subset'")  # fmt: skip
    return Normalization.fit(full if statistics == "full" else subset, minimum_range=minimum_range, rotations=rotations)
