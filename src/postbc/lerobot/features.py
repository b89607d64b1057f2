"""LeRobot's features and our named observations: which of the one make which of the other, for whatever plays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from postbc.agents.base import Agent
from postbc.data.belonging import Facts
from postbc.data.episodes import COORDINATES, is_image
from postbc.data.language import LANGUAGE
from postbc.data.lerobot import ENVIRONMENT_STATE, STATE, StatePart, feature_name, state_parts
from postbc.environments.chunk import ChunkEnv, Observations
from postbc.environments.registry import Environment
from postbc.errors import require
from postbc.policies.base import About, Observation, Shapes

#: What LeRobot makes of "language" in an environment's observation.
TASK_VECTOR = f"observation.{LANGUAGE}"
#: Numbers of the parts that our environments' states have, less the one that differs from task to task.
WIDTHS = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2, "agent_pos": 2, "robot_hand": 4}


@dataclass(frozen=True)
class Features:
    """What our observations are made of.

    Attributes:
        shapes: ours, without the posterior's coordinates, which no robot has.
        state: where the parts of "state" are, in order.
        cameras: our name -> LeRobot's.
    """

    shapes: Shapes
    state: tuple[StatePart, ...]
    cameras: Mapping[str, str]

    @property
    def theirs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """LeRobot's feature -> its type (STATE, ENV, VISUAL) and shape, channels first."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for part in self.state:
            width = found.get(part.feature, ("", (0,)))[1][0]
            found[part.feature] = (
                "ENV" if part.feature == ENVIRONMENT_STATE else "STATE",
                (max(width, part.start + part.width),),
            )
        found |= {theirs: ("VISUAL", tuple(self.shapes[ours])) for ours, theirs in self.cameras.items()}
        return found | ({TASK_VECTOR: ("STATE", tuple(self.shapes[LANGUAGE]))} if LANGUAGE in self.shapes else {})

    def read(self, batch: Mapping[str, Any], device: torch.device) -> Observation:
        """LeRobot's batch (B, …), raw numbers and frames of 0 to 1 (or bytes), as our observation on `device`.

        Raises:
            InputError: a feature is missing, or of another shape.
        """
        for name, (_, shape) in self.theirs.items():
            there = batch.get(name)
            found = tuple(there.shape[1:]) if isinstance(there, Tensor) else f"nothing; there are {', '.join(sorted(batch))}"
            require(found == shape, "The policy reads what is not observed.", key=name, found=found, expected=shape,
                    remedy="a camera of another name: --rename_map='{\"theirs\": \"ours\"}'")  # fmt: skip
        read: dict[str, Tensor] = {}
        if self.state:
            parts = [batch[p.feature][:, p.start : p.start + p.width] for p in self.state]
            read["state"] = torch.cat(parts, 1).to(device, torch.float32)
        for ours, theirs in self.cameras.items():
            frames = batch[theirs].to(device)
            read[ours] = frames if frames.dtype == torch.uint8 else (frames * 255).round().clamp(0, 255).to(torch.uint8)
        if LANGUAGE in self.shapes:
            read[LANGUAGE] = batch[TASK_VECTOR].to(device, torch.float32)
        return read

    def write(self, observation: Observations) -> dict[str, Any]:
        """Our observation (N, …) as LeRobot's environments give theirs: agent_pos, environment_state, pixels (N, H, W, C), language."""
        made: dict[str, Any] = {}
        ends = np.cumsum([part.width for part in self.state])
        for feature, name in ((STATE, "agent_pos"), (ENVIRONMENT_STATE, "environment_state")):
            own = [observation["state"][:, end - p.width : end] for p, end in zip(self.state, ends) if p.feature == feature]
            made |= {name: np.concatenate(own, 1)} if own else {}
        pixels = {
            theirs.removeprefix("observation.images."): np.ascontiguousarray(np.moveaxis(observation[ours], 1, -1))
            for ours, theirs in self.cameras.items()
        }
        return (
            made
            | ({"pixels": pixels} if pixels else {})
            | ({LANGUAGE: observation[LANGUAGE]} if LANGUAGE in observation else {})
        )


def features_of_agent(agent: Agent, about: About) -> Features:
    """What an agent reads: of an imported LeRobot policy its own features, of another those that its data would have as LeRobot's."""
    shapes = {name: shape for name, shape in agent.shapes.items() if name != COORDINATES}
    width = shapes.get("state", (0,))[0]
    config: Any = getattr(getattr(agent, "policy", None), "config", None)
    if getattr(config, "kind", None) == "lerobot":
        pairs = [(STATE, config.own), (ENVIRONMENT_STATE, width - config.own)]
        return Features(shapes, tuple(StatePart(name, name, 0, n) for name, n in pairs if n), config.cameras)
    facts = Facts.from_dict(about.facts) if about.facts is not None else Facts()
    keys, widths = facts.state_keys or (), facts.state_dims or ()
    if len(keys) != len(widths) or sum(widths) != width:
        keys, widths = keys_and_widths(keys, width)
    return Features(shapes, state_parts(keys, widths), {name: feature_name(name) for name in shapes if is_image(name)})


def features_of_environment(environment: Environment, env: ChunkEnv) -> Features:
    """What an environment, of which `env` has been made, lets observe."""
    keys, widths = keys_and_widths(environment.state_keys or (), env.shapes.get("state", (0,))[0])
    cameras = {name: feature_name(name) for name in env.shapes if is_image(name)}
    return Features(dict(env.shapes), state_parts(keys, widths), cameras)


def keys_and_widths(keys: tuple[str, ...], width: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The parts of a state of `width` numbers, one of which may be unknown; where more are, it is one part."""
    if not width:
        return (), ()
    known = sum(WIDTHS.get(key, 0) for key in keys)
    widths = tuple(WIDTHS.get(key, width - known) for key in keys)
    return (keys, widths) if sum(widths) == width and min(widths, default=0) > 0 else (("state",), (width,))
