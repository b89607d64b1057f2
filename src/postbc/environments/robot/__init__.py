"""Robots: any gymnasium `Env` of one action a control step, stepped in real time by the loop in `postbc.robot`.

What is asked of an `Env`:

- `observation_space`: a Box, or a Dict of vectors (Box of one axis) and cameras (uint8 Box of three);
- `action_space`: a Box of one axis.
- `reset()` -> observation, info; `step(action)` -> observation, reward, terminated, truncated, info. `step` sends the action and
  returns what is observed a control period later; one that returns sooner (a simulation) is waited for.

What the loop heeds where it is there:

- `hold()`: stop moving and hold the position, at once; called from another thread while `step` may be running. Without it nothing is
  sent any more.
- `info["observation_age"]`: seconds since the newest observation was taken.
- `info["command"]` of `reset`: the action (A,) that would keep the robot where it is; rate limits begin there.
- `info["success"]` (or `"is_success"`): the task is solved; without it only people can say so.
"""

from __future__ import annotations

from postbc.environments.robot.registry import ROBOTS, Robot, find_robot
from postbc.environments.robot.safety import ActionLimits

__all__ = ["ROBOTS", "ActionLimits", "Robot", "find_robot"]
