"""Scripted demonstrations in robosuite 1.5.1, as robomimic's v1.5 files hold them: `python record.py TASK NUM OUTPUT`.

Runs where robosuite 1.5.1 is installed (and mujoco 3.3.0, h5py, scipy), with PYTHONPATH naming postbc's src: an environment of its own,
for postbc itself simulates with 1.4.0. Each reset of robosuite's own environment, no seeds: 1.5's are not 1.4's anyway.
"""

from __future__ import annotations

import json
import sys

import h5py
import numpy as np
import robosuite

from postbc.data.scripted.hands import ScriptedOperators, geometry_of
from postbc.data.scripted.operators import OPERATORS

KEYS = {"robot0_eef_pos": "robot0_eef_pos", "robot0_eef_quat": "robot0_eef_quat", "robot0_gripper_qpos": "robot0_gripper_qpos",
        "object": "object-state"}  # fmt: skip
NAMES = {"Lift": "Lift", "Can": "PickPlaceCan", "Square": "NutAssemblySquare"}
OBJECTS = {"Lift": "cube", "Can": "Can", "Square": "SquareNut"}
#: The arm's controller in robomimic's v1.5 files: 1.4's, with commands in the world's axes (1.5's own default: the robot's base).
RIGHT = {
    "type": "OSC_POSE", "input_max": 1, "input_min": -1, "output_max": [0.05] * 3 + [0.5] * 3, "output_min": [-0.05] * 3 + [-0.5] * 3,
    "kp": 150, "damping_ratio": 1, "impedance_mode": "fixed", "kp_limits": [0, 300], "damping_ratio_limits": [0, 10],
    "position_limits": None, "orientation_limits": None, "uncouple_pos_ori": True, "input_type": "delta", "input_ref_frame": "world",
    "interpolation": None, "ramp_ratio": 0.2, "gripper": {"type": "GRIP"},
}  # fmt: skip
TAIL = 5


def main() -> None:
    task, wanted, output = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    options = {
        "robots": "Panda", "controller_configs": {"type": "BASIC", "body_parts": {"right": RIGHT}}, "control_freq": 20,
        "has_renderer": False, "has_offscreen_renderer": False, "use_camera_obs": False, "use_object_obs": True, "ignore_done": True,
        "reward_shaping": False, "lite_physics": False,
    }  # fmt: skip
    env = robosuite.make(NAMES[task], **options)
    people = [operator for operator in OPERATORS.values() if operator.quality == "proficient"]
    np.random.seed(0)  # noqa: NPY002  robosuite draws from it
    hands, kept, tried = ScriptedOperators(task, 1, geometry_of(task).patience), 0, 0
    with h5py.File(output, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": NAMES[task], "env_version": robosuite.__version__, "type": 1,
                                             "env_kwargs": {**options, "robots": ["Panda"]}})  # fmt: skip
        while kept < wanted:
            seen, model = env.reset(), env.sim.model.get_xml()
            hands.begin(0, people[tried % len(people)], [15, tried])
            tried += 1
            steps: dict[str, list[np.ndarray]] = {key: [] for key in (*KEYS, "actions", "states", "rewards")}
            solved = 0
            while len(steps["actions"]) < geometry_of(task).patience and solved <= TAIL:
                for key, name in KEYS.items():
                    steps[key].append(np.array(seen[name]))
                steps["states"].append(np.array(env.sim.get_state().flatten()))
                # the hands know 1.4's order of "object", in which the pose comes first
                pose = [np.asarray(seen[f"{OBJECTS[task]}_{part}"]) for part in ("pos", "quat")]
                action = hands.act(np.concatenate([*(steps[key][-1] for key in list(KEYS)[:3]), *pose])[None])[0]
                seen, reward, _, _ = env.step(action)
                steps["actions"].append(action)
                steps["rewards"].append(np.float64(reward > 0))
                solved = solved + 1 if reward > 0 else 0
            if not solved:
                continue
            group = data.create_group(f"demo_{kept}")
            group.attrs["num_samples"], group.attrs["model_file"] = len(steps["actions"]), model
            for key, values in steps.items():
                group[f"obs/{key}" if key in KEYS else key] = np.stack(values)
            group["dones"] = np.arange(len(steps["actions"])) == len(steps["actions"]) - 1
            kept += 1
            print(f"{task}: {kept} of {tried} episodes, {len(steps['actions'])} steps", flush=True)
        data.attrs["total"] = sum(int(group.attrs["num_samples"]) for group in data.values())


if __name__ == "__main__":
    main()
