"""What Diffusion Policy's human Push-T demonstrations and gym-pusht share, so that a policy trained on the one plays the other.

Measured: frames that gym-pusht 0.1.8 draws of the data's states differ from the data's frames by 0.6 of 255 grey values on average, so
positions (pixels of a 512 window), the block's angle (rad, 0 to 2π) and the origin of the block are the same. The data's own nine
`keypoint`s are other points of the T than gym-pusht's eight corners; those follow from the block's pose, to 1e-5 pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

#: Corners of the T's two rectangles around the block's origin, unturned, as gym-pusht's `get_keypoints` orders them.
CORNERS = np.array(
    [[-60, 0], [60, 0], [60, 30], [-60, 30], [-15, 30], [15, 30], [15, 120], [-15, 120]], dtype=np.float64
)  # fmt: skip
#: Default observation: agent x, y, then the 8 corners x0, y0, x1, … (gym-pusht's agent_pos and environment_state).
STATE_KEYS = ("agent_pos", "keypoints")
STATE_DIMS = (2, 16)
#: robomimic's `env_args` of data and environment.
ENVIRONMENT: dict[str, Any] = {"env_name": "PushT", "type": 2, "env_kwargs": {"control_freq": 10}}


def keypoints(states: np.ndarray) -> np.ndarray:
    """States (..., 5) [agent x, y, block x, y, angle] -> (..., 16) corners of the block as gym-pusht reports them (pixels)."""
    cos, sin = np.cos(states[..., 4:5]), np.sin(states[..., 4:5])
    x, y = CORNERS.T
    turned = np.stack([x * cos - y * sin, x * sin + y * cos], -1) + states[..., None, 2:4]
    return turned.reshape(*states.shape[:-1], 16)


def observation(states: np.ndarray) -> np.ndarray:
    """States (..., 5) -> (..., 18) float32: the default observation of `STATE_KEYS`."""
    states = np.asarray(states, np.float64)
    return np.concatenate([states[..., :2], keypoints(states)], -1).astype(np.float32)
