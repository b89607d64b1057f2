"""What the ensemble regresses from: the features of every window, computed once, in batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from postbc.data.batches import read_ahead
from postbc.data.normalization import Normalization
from postbc.data.windows import Windows
from postbc.errors import require

#: Raw named observations of B states -> features (B, F), as a policy's `encode`.
Encode = Callable[[Mapping[str, Tensor]], Tensor]


def state_features(shapes: Mapping[str, tuple[int, ...]], normalization: Normalization) -> Encode:
    """The normalised vector of a state, (B, S) or (B, To, S) -> (B, To·S), and other vectors (language) as they are beside it.

    Raises:
        InputError: the observations are not vectors alone: only an encoder makes features of images.
    """
    images = [name for name, shape in shapes.items() if len(shape) != 1]
    require(
        not images, "A posterior cannot be fitted on images themselves, only on an encoder's features.", key="encoder",
        found=f"observations {', '.join(images)}, and no encoder", expected="the directory of a policy pretrained on the same data",
        remedy="run `postbc pretrain --pretraining.method bc` first, then give --encoder DIR; or give every member an encoder of its "
        "own: --ensemble.encoder own",
    )  # fmt: skip

    def encode(observation: Mapping[str, Tensor]) -> Tensor:
        parts = {name: observation[name].float() for name in shapes}
        parts |= {"state": normalization.normalize_state(parts["state"])} if "state" in parts else {}
        return torch.cat([part.flatten(1) for part in parts.values()], 1)

    return encode


@torch.no_grad()
def window_features(windows: Windows, encode: Encode, batch: int = 1024, rows: Tensor | None = None) -> Tensor:
    """(n, F) features of the windows `rows` (n,), by default of all, on their device; each is read once."""
    wanted = (torch.arange(len(windows)) if rows is None else rows).split(batch)
    return torch.cat([encode(observation) for observation in read_ahead(windows, wanted, windows.device)])
