"""Small inputs that several test files need: demonstration files, pretrained policies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np

OSC = {
    "type": "OSC_POSE", "input_max": 1, "input_min": -1, "output_max": [0.05] * 3 + [0.5] * 3,
    "output_min": [-0.05] * 3 + [-0.5] * 3, "kp": 150, "damping_ratio": 1, "impedance_mode": "fixed", "control_delta": True,
}  # fmt: skip
LIFT = {
    "env_name": "Lift", "env_version": "1.4.1", "type": 1,
    "env_kwargs": {"robots": ["Panda"], "control_freq": 20, "controller_configs": OSC},
}  # fmt: skip
#: As robomimic's v1.5 files have it: robosuite 1.5 keeps an arm's controller among the parts of the body.
RIGHT = {
    **{key: value for key, value in OSC.items() if key != "damping_ratio"}, "damping": 1,
    "kp_limits": [0, 300], "damping_limits": [0, 10], "position_limits": None,
    "orientation_limits": None, "uncouple_pos_ori": True, "interpolation": None, "ramp_ratio": 0.2,
    "input_ref_frame": "world", "gripper": {"type": "GRIP"},
}  # fmt: skip
LIFT_15 = {
    "env_name": "Lift", "env_version": "1.5.1", "type": 1,
    "env_kwargs": {
        "has_renderer": False, "has_offscreen_renderer": False, "ignore_done": True, "use_object_obs": True, "use_camera_obs": False,
        "control_freq": 20, "controller_configs": {"type": "BASIC", "body_parts": {"right": RIGHT}}, "robots": ["Panda"],
        "camera_depths": False, "camera_heights": 84, "camera_widths": 84, "lite_physics": False, "reward_shaping": False,
    },
}  # fmt: skip
WIDTHS = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2, "object": 10}


def write_demonstrations(
    path: Path,
    trajectories: int = 6,
    length: int = 12,
    *,
    environment: dict[str, Any] | None = None,
    widths: dict[str, int] | None = None,
    action_dim: int = 7,
    images: dict[str, tuple[int, int, int]] | None = None,
    tasks: tuple[str, ...] = (),
    seed: int = 0,
) -> Path:
    """A robomimic file whose actions depend on its observations: success at the last step, reward 0/1."""
    rng = np.random.default_rng(seed)
    widths = WIDTHS if widths is None else widths
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps(LIFT if environment is None else environment)
        if tasks:
            data.attrs["tasks"] = json.dumps(tasks)
        total = sum(widths.values())
        mixing = rng.normal(size=(total, action_dim)) / np.sqrt(total)
        for i in range(trajectories):
            demo = data.create_group(f"demo_{i}")
            demo.attrs["num_samples"] = length
            if tasks:
                demo.attrs["task"] = tasks[i % len(tasks)]
            state = rng.uniform(-1, 1, (length, total)).astype(np.float32)
            demo["actions"] = np.tanh(state @ mixing)
            last = np.arange(length) == length - 1
            demo["rewards"], demo["dones"] = last.astype(float), last.astype(int)
            ends = np.cumsum(list(widths.values()))
            for (key, width), end in zip(widths.items(), ends):
                demo[f"obs/{key}"] = state[:, end - width : end]
            for key, shape in (images or {}).items():
                demo[f"obs/{key}"] = rng.integers(0, 256, (length, *shape), dtype=np.uint8)
        file["mask/half"] = np.array([f"demo_{i}".encode() for i in range(0, trajectories, 2)])
    return path


def save_policy(
    directory: Path,
    state_dim: int = 19,
    action_dim: int = 7,
    *,
    chunk: int = 4,
    task: str | None = "Lift",
    kind: str = "diffusion",
    seed: int = 0,
    **config: Any,
) -> Path:
    """A small policy with random weights, as `postbc pretrain` would have left it in `directory`."""
    from postbc.data.belonging import Facts
    from postbc.data.normalization import Normalization
    from postbc.policies.base import About, policy_class, save_policy
    from postbc.schemas import plain
    from postbc.seeding import make_generator

    made = policy_class(kind)
    small = {"diffusion": {"hidden": 8, "denoising_steps": 4, "inference_steps": 2}, "flow": {"hidden": 8}}[kind]
    facts = None if task is None else plain(Facts.of_env_args({**LIFT, "env_name": task}))
    about = About(method="bc", seed=seed, task=task, demonstrations=1, facts=facts)
    policy = made(
        made.Config(**{**small, **config}), {"state": (state_dim,)}, action_dim, chunk, Normalization.identity(state_dim, action_dim),
        make_generator(seed, "policy/initialisation"), about=about,
    )  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    save_policy(directory / "policy.safetensors", policy)
    return directory
