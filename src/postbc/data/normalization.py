"""Min-max normalisation to [-1, 1], as in DPPO's preprocessing: x -> 2 (x - min) / (max - min + 1e-6) - 1, never clamped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from postbc.errors import InputError

if TYPE_CHECKING:
    from postbc.demonstrations.types import Demonstrations

#: Added to every range (DPPO, ``process_robomimic_dataset.py``). A constant dimension is therefore divided by 1e-6.
EPSILON = 1e-6

ArrayOrTensor = TypeVar("ArrayOrTensor", np.ndarray, torch.Tensor)


@dataclass(frozen=True, eq=False)
class Normalization:
    """Per-dimension lower and upper values of observations and actions.

    The four methods take numpy arrays or torch tensors (any leading axes, the last one is S or A) and return the same kind,
    dtype (float32 at least for numpy integers) and device. The two ``unnormalize`` are exact inverses up to rounding; DPPO's own
    forgets the 1e-6 on the way back, a difference of at most 1e-6 in raw units.
    """

    observation_low: np.ndarray
    """(S,) float64 minimum of each observation dimension."""
    observation_high: np.ndarray
    """(S,) float64 maximum."""
    action_low: np.ndarray
    """(A,) float64 minimum of each action dimension."""
    action_high: np.ndarray
    """(A,) float64 maximum."""
    _tensors: dict[Any, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for part in ("observation", "action"):
            low, high = (np.array(getattr(self, f"{part}_{end}"), dtype=np.float64) for end in ("low", "high"))
            if (
                low.ndim != 1
                or low.shape != high.shape
                or not np.all(np.isfinite(low) & np.isfinite(high))
                or np.any(low > high)
            ):
                raise InputError(
                    "A normalisation needs finite lower values not above the upper ones, one of each a dimension.",
                    key=f"{part}_low, {part}_high",
                    found=f"shapes {low.shape} and {high.shape}",
                )
            for end, values in (("low", low), ("high", high)):
                values.setflags(write=False)
                object.__setattr__(self, f"{part}_{end}", values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Normalization) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.observation_low.tobytes(), self.action_low.tobytes()))

    @property
    def observation_dim(self) -> int:
        """S."""
        return len(self.observation_low)

    @property
    def action_dim(self) -> int:
        """A."""
        return len(self.action_low)

    # Differences of observations lose digits if they are taken in float32 after scaling, so the scale is prepared in float64.
    def _affine(self, part: str, x: ArrayOrTensor) -> tuple[Any, Any]:
        low: np.ndarray = getattr(self, f"{part}_low")
        span = getattr(self, f"{part}_high") - low + EPSILON
        if x.shape[-1:] != low.shape:
            raise InputError(
                f"The {part} has another width than the data this normalisation was made from.",
                key=part,
                found=f"shape {tuple(x.shape)}",
                expected=f"(..., {len(low)})",
                remedy="use data of the same task and the same observation keys",
            )
        if isinstance(x, np.ndarray):
            dtype = x.dtype if np.issubdtype(x.dtype, np.floating) else np.dtype(np.float32)
            return low.astype(dtype), span.astype(dtype)
        key = (part, x.dtype, x.device)
        if key not in self._tensors:  # made once a device: a transfer a call would stall an accelerator
            self._tensors[key] = torch.as_tensor(np.stack([low, span]), dtype=x.dtype, device=x.device)
        return self._tensors[key][0], self._tensors[key][1]

    def _normalize(self, part: str, x: ArrayOrTensor) -> ArrayOrTensor:
        low, span = self._affine(part, x)
        return 2 * (x - low) / span - 1

    def _unnormalize(self, part: str, x: ArrayOrTensor) -> ArrayOrTensor:
        low, span = self._affine(part, x)
        return (x + 1) * (span / 2) + low

    def normalize_observation(self, observation: ArrayOrTensor) -> ArrayOrTensor:
        """(..., S) raw units -> (..., S), the data's range becoming [-1, 1]; values outside it go outside (no clamp)."""
        return self._normalize("observation", observation)

    def unnormalize_observation(self, observation: ArrayOrTensor) -> ArrayOrTensor:
        """(..., S) normalised -> (..., S) raw units."""
        return self._unnormalize("observation", observation)

    def normalize_action(self, action: ArrayOrTensor) -> ArrayOrTensor:
        """(..., A) raw units -> (..., A) normalised; a chunk (T, A) is normalised step by step with the same numbers."""
        return self._normalize("action", action)

    def unnormalize_action(self, action: ArrayOrTensor) -> ArrayOrTensor:
        """(..., A) normalised -> (..., A) raw units."""
        return self._unnormalize("action", action)

    @classmethod
    def fit(cls, demonstrations: Demonstrations, *, minimum_range: float = 0.0) -> Normalization:
        """Minimum and maximum of every dimension over all steps of all trajectories.

        ``minimum_range`` (raw units) widens narrower dimensions around their middle; 0 is DPPO's behaviour, where a dimension that
        is constant in the data is divided by 1e-6, so that any other value met later becomes huge (``demos inspect`` lists them).
        """
        ends = []
        for values in (demonstrations.observations, demonstrations.actions):
            low, high = values.min(0).astype(np.float64), values.max(0).astype(np.float64)
            extra = np.maximum(minimum_range - (high - low), 0) / 2
            ends += [low - extra, high + extra]
        return cls(*ends)

    @classmethod
    def identity(cls, observation_dim: int, action_dim: int) -> Normalization:
        """Range [-1, 1] everywhere: values stay as they are (up to the 1e-6)."""
        s, a = np.ones(observation_dim), np.ones(action_dim)
        return cls(-s, s, -a, a)

    def to_dict(self) -> dict[str, list[float]]:
        """Plain lists, for JSON; floats survive the round trip exactly."""
        return {
            key: getattr(self, key).tolist() for key in ("observation_low", "observation_high", "action_low", "action_high")
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Normalization:
        """Inverse of :meth:`to_dict`. InputError when a part is missing."""
        keys = ("observation_low", "observation_high", "action_low", "action_high")
        missing = [key for key in keys if key not in values]
        if missing:
            raise InputError("The normalisation is incomplete.", key=missing[0], found=sorted(values), expected=", ".join(keys))
        return cls(*(np.asarray(values[key], dtype=np.float64) for key in keys))


def fit_normalization(subset: Demonstrations, full: Demonstrations, statistics: str = "full") -> Normalization:
    """Normalisation for training on ``subset`` drawn from ``full``.

    ``"full"`` takes the statistics of the whole file, as the paper's code base does (DPPO computes them before it takes the first
    ``max_n_episodes``); ``"subset"`` takes those of the trajectories actually used, which is all that a user with 5 demonstrations has.
    """
    if statistics not in ("full", "subset"):
        raise InputError(
            "Unknown normalisation statistics.", key="statistics", found=repr(statistics), expected="'full' or 'subset'"
        )
    return Normalization.fit(full if statistics == "full" else subset)
