"""Frames as an agent's data have them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from postbc.errors import require


def resized(frame: Any, size: int | None) -> NDArray[np.uint8]:
    """A camera's frame (H, W, 3) as (size, size, 3), each pixel the mean of the area that it stands for; as it is for None.

    Raises:
        InputError: not (H, W, 3) of uint8.
    """
    picture = np.asarray(frame)
    good = picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    require(good, "A camera's frame is no picture.", key="image", found=f"{picture.dtype} of shape {picture.shape}",
            expected="uint8 of shape (H, W, 3)", remedy="look at the camera")  # fmt: skip
    if size is None or picture.shape[:2] == (size, size):
        return np.ascontiguousarray(picture)
    tensor = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float()
    small = torch.nn.functional.interpolate(tensor, (size, size), mode="area")[0].permute(1, 2, 0)
    return small.round().to(torch.uint8).contiguous().numpy()
