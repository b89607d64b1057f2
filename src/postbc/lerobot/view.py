"""A LeRobotDataset whose actions are PostBC's targets: all that LeRobot's training sees of PostBC."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from postbc.errors import require
from postbc.lerobot.factors import Factors

ACTION, PADDING = "action", "action_is_pad"


class Visit(int):
    """A frame's place in the dataset, and the epoch that it is read in."""

    epoch: int

    def __new__(cls, place: int, epoch: int) -> Visit:
        made = super().__new__(cls, place)
        made.epoch = epoch
        return made

    def __reduce__(self) -> Any:
        return Visit, (int(self), self.epoch)


class PosteriorDataset(Dataset[dict[str, Any]]):
    """ã = a + α·w, w ~ N(0, cov(frame)), drawn afresh in every epoch; everything else is the dataset's.

    Raw actions are perturbed, before any processor: whatever the policy does with them (min-max, mean-std, quantiles, relative actions,
    tokens) it does with PostBC's targets. Actions beyond the episode are padding and stay as they are. A draw is decided by seed, epoch
    and frame: no random state is touched, so α = 0 is BC to the bit, and a resumed run draws what an undisturbed one would have.

    Args:
        base: a LeRobotDataset with windows of actions.
        factors: of its frames.
        weight: α.
        seed: of the draws.

    Raises:
        InputError: the posterior is of other chunks than the policy is trained on.
    """

    def __init__(self, base: Any, factors: Factors, weight: float, seed: int) -> None:
        self.base, self.factors, self.weight, self.seed = base, factors, weight, seed
        steps = tuple(round(t * base.fps) for t in (base.delta_timestamps or {}).get(ACTION, ()))
        require(steps == factors.about.delta_indices, "The posterior is of other chunks than the policy is trained on.",
                file=factors.path, key="delta_indices", found=list(factors.about.delta_indices), expected=list(steps),
                remedy="give another --postbc.factors: it is fitted first")  # fmt: skip

    def __len__(self) -> int:
        return len(self.base)

    def __getattr__(self, name: str) -> Any:
        if name == "base":  # while being unpickled
            raise AttributeError(name)
        return getattr(self.base, name)

    def __getitem__(self, place: int) -> dict[str, Any]:
        item: dict[str, Any] = self.base[int(place)]
        w = self.factors.sample(int(item["index"]), self.seed, getattr(place, "epoch", 0))
        item[ACTION] = item[ACTION] + self.weight * w.to(item[ACTION].dtype).masked_fill(item[PADDING].unsqueeze(-1), 0)
        return item

    def __getitems__(self, places: Sequence[int]) -> list[dict[str, Any]]:
        return [self[place] for place in places]


def with_epochs(sampler: type) -> type:
    """A subclass of LeRobot's sampler, whose places know the epoch: workers and resumed runs draw by it.

    Two things keep LeRobot 0.6.1 itself from resuming to the bit, and are put right here: accelerate counts a process's epochs from 0
    and sets the sampler's to that (the data order would begin again), and a DataLoader that begins within an epoch draws a number
    from torch that an undisturbed run does not draw there.
    """

    class Visits(sampler):  # type: ignore[misc, valid-type]
        first = 0
        saved: torch.Tensor | None = None

        def set_epoch(self, epoch: int) -> None:
            super().set_epoch(self.first + epoch)

        def load_state_dict(self, state: dict[str, Any]) -> None:
            super().load_state_dict(state)
            self.first = int(state["epoch"])
            self.saved = torch.get_rng_state() if state["start_index"] else None

        def __iter__(self) -> Iterator[Visit]:
            epoch = int(self.state_dict()["epoch"])
            if self.saved is not None:
                torch.set_rng_state(self.saved)
                self.saved = None
            return (Visit(place, epoch) for place in super().__iter__())

    return Visits
