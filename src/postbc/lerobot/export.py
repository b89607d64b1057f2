"""`postbc lerobot export`: a policy or finetuned agent of ours as a folder that LeRobot plays, with the plugin `lerobot_policy_postbc`.

The folder is LeRobot's `pretrained_model`: config.json, the two processors (which normalise nothing: our agents take and give raw
units) and, instead of model.safetensors, our own files as they are. Neither LeRobot nor the plugin is needed to write it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from postbc.agents.base import agent_files, load_agent
from postbc.data.language import LANGUAGE
from postbc.data.lerobot import ACTION
from postbc.disk import atomic_path, os_errors, write_json
from postbc.errors import require
from postbc.lerobot.features import Features, features_of_agent
from postbc.lerobot.player import Player
from postbc.policies.base import POLICY_FILE
from postbc.schemas import Count, Seed, schema
from postbc.stages.seeds import one_agent

#: Of the plugin: what config.json says its type is.
TYPE = "postbc"
CONFIG, PREPROCESSOR, POSTPROCESSOR = "config.json", "policy_preprocessor.json", "policy_postprocessor.json"


@schema
class Export:
    """Write a policy, or a finetuned agent (DSRL, residual, DPPO, Best-of-N), as a folder that `lerobot-eval` and robots play."""

    agent: Path
    """The directory of a finetuned seed or a policy, or of a stage with one seed."""
    output: Path
    """Folder to write; LeRobot's --policy.path."""
    n_action_steps: Count | None = None
    """How many actions of a chunk are played before the next is decided; default all, as in training."""
    seed: Seed | None = None
    """Of its random numbers; default its own, as in `postbc evaluate`."""

    def run(self) -> Path:
        """Check that it can be played, and write; returns the folder. InputError for what LeRobot could not play."""
        require(not self.output.exists(), "There is something already.", file=self.output, remedy="choose another --output")
        source = one_agent(self.agent)
        agent, about = load_agent(source)
        features = features_of_agent(agent, about)
        require(LANGUAGE not in agent.shapes, "The agent is told its task by numbers, which no robot gives.", file=source, key=LANGUAGE,
                expected="an agent of one task", remedy="--policy.type=postbc --policy.agent=… in our environments, which give them",
                )  # fmt: skip
        Player(agent, features, 0, self.n_action_steps)
        copy_agent(source, self.output)
        write_json(self.output / PREPROCESSOR, PROCESSORS[0])
        write_json(self.output / POSTPROCESSOR, PROCESSORS[1])
        steps = {"n_obs_steps": agent.observation_steps, "n_action_steps": self.n_action_steps, "seed": self.seed}
        write_json(self.output / CONFIG, {"type": TYPE, **steps, **described(features, agent.action_dim)})  # last: now it plays
        return self.output


def copy_agent(source: Path, folder: Path) -> None:
    """Copy the files of an agent or policy, each atomically. InputError if one cannot be read or written."""
    for file in agent_files(source):
        with os_errors(file, "read"), atomic_path(folder / (POLICY_FILE if file == source else file.name)) as partial:
            shutil.copyfile(file, partial)


def described(features: Features, action_dim: int) -> dict[str, Any]:
    """`input_features` and `output_features` of a LeRobot configuration."""
    inputs = {name: {"type": kind, "shape": list(shape)} for name, (kind, shape) in features.theirs.items()}
    return {"input_features": inputs, "output_features": {ACTION: {"type": "ACTION", "shape": [action_dim]}}}


def _step(name: str, **config: Any) -> dict[str, Any]:
    return {"registry_name": name, "config": config}


#: What LeRobot's pipelines of these steps save of themselves.
PROCESSORS = (
    {"name": "policy_preprocessor", "steps": [
        _step("rename_observations_processor", rename_map={}), _step("to_batch_processor"),
        _step("device_processor", device="cpu", float_dtype=None)]},
    {"name": "policy_postprocessor", "steps": [_step("device_processor", device="cpu", float_dtype=None)]},
)  # fmt: skip
