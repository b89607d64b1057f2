"""Min-max normalisation to [-1, 1], as in DPPO's preprocessing: x -> 2 (x - min) / (max - min + 1e-6) - 1, never clamped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from postbc.data.episodes import Dataset
from postbc.errors import InputError, require

#: Added to every range (DPPO, `process_robomimic_dataset.py`). A constant dimension is therefore divided by 1e-6.
EPSILON = 1e-6
PARTS = ("state", "action")


class Normalization(nn.Module):
    """Raw <-> normalised states and actions, per dimension; a module whose buffers travel with the policy that owns it.

    `x -> (x - low) * scale - 1` with scale = 2 / (high - low + 1e-6), prepared in float64. Frames are not its business.

    Args:
        state_low, state_high: (S,) ends of each state dimension; S may be 0.
        action_low, action_high: (A,).

    Raises:
        InputError: shapes that differ, not finite, or low above high.
    """

    state_low: Tensor
    """(S,) float32."""
    state_scale: Tensor
    """(S,) float32."""
    action_low: Tensor
    """(A,) float32."""
    action_scale: Tensor
    """(A,) float32."""

    def __init__(self, state_low: Any, state_high: Any, action_low: Any, action_high: Any) -> None:
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

    @property
    def state_dim(self) -> int:
        """S."""
        return self.state_low.shape[0]

    @property
    def action_dim(self) -> int:
        """A."""
        return self.action_low.shape[0]

    def _check(self, part: str, x: Tensor, width: int) -> None:
        require(x.shape[-1:] == (width,), f"The {part} has another width than the data this normalisation was made from.",
                key=part, found=f"shape {tuple(x.shape)}", expected=f"(..., {width})",
                remedy="use data of the same task and the same observation keys")  # fmt: skip

    def normalize_state(self, state: Tensor) -> Tensor:
        """(..., S) raw units -> (..., S), the data's range becoming [-1, 1]; values outside it go outside (no clamp)."""
        self._check("state", state, self.state_dim)
        return (state - self.state_low) * self.state_scale - 1

    def unnormalize_state(self, state: Tensor) -> Tensor:
        """(..., S) normalised -> (..., S) raw units."""
        self._check("state", state, self.state_dim)
        return (state + 1) / self.state_scale + self.state_low

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
    def fit(cls, dataset: Dataset, *, minimum_range: float = 0.0) -> Normalization:
        """Minimum and maximum of every dimension over all steps of all episodes.

        `minimum_range` (raw units) widens narrower dimensions around their middle; 0 is DPPO's behaviour, where a dimension that is
        constant in the data is divided by 1e-6, so that any other value met later becomes huge (`demos inspect` lists them).
        """
        require(0 <= minimum_range < np.inf, "The minimum range is not negative.", key="minimum_range", found=minimum_range)
        ends = []
        for values in (dataset.states, dataset.actions):
            low, high = values.min(0).astype(np.float64), values.max(0).astype(np.float64)
            extra = np.maximum(minimum_range - (high - low), 0) / 2
            ends += [low - extra, high + extra]
        return cls(*ends)

    @classmethod
    def identity(cls, state_dim: int, action_dim: int) -> Normalization:
        """Range [-1, 1] everywhere: values stay as they are (up to the 1e-6)."""
        s, a = np.ones(state_dim), np.ones(action_dim)
        return cls(-s, s, -a, a)

    def to_dict(self) -> dict[str, list[float]]:
        """Plain lists, for JSON; floats survive the round trip exactly."""
        return {f"{part}_{end}": self._ends[part][i].tolist() for part in PARTS for i, end in enumerate(("low", "high"))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Normalization:
        """Inverse of :meth:`to_dict`. InputError when a part is missing or is not numbers."""
        keys = [f"{part}_{end}" for part in PARTS for end in ("low", "high")]
        require(isinstance(values, Mapping) and set(values) == set(keys), "The normalisation is incomplete.",
                found=sorted(values) if isinstance(values, Mapping) else type(values).__name__, expected=", ".join(keys))  # fmt: skip
        return cls(*(values[key] for key in keys))


def fit_normalization(
    subset: Dataset, full: Dataset, statistics: Literal["full", "subset"] = "full", minimum_range: float = 0.0
) -> Normalization:
    """Normalisation for training on `subset` drawn from `full`.

    "full" takes the statistics of the whole file, as the paper's code base does (DPPO computes them before it takes the first
    `max_n_episodes`); "subset" takes those of the episodes actually used, which is all that a user with 5 demonstrations has.
    """
    require(statistics in ("full", "subset"), "Unknown normalisation statistics.", key="statistics", found=repr(statistics),
            expected="'full' or 'subset'")  # fmt: skip
    return Normalization.fit(full if statistics == "full" else subset, minimum_range=minimum_range)
