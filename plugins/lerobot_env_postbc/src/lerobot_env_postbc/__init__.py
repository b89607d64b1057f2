"""LeRobot finds this distribution by its name and imports it: from then on there is `--env.type=postbc`."""

from dataclasses import dataclass
from typing import Any

from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_STATE

from postbc.environments.registry import find_environment
from postbc.lerobot.environment import LeRobotVectorEnv
from postbc.lerobot.features import TASK_VECTOR

NAMES = {OBS_STATE: "agent_pos", OBS_ENV_STATE: "environment_state", TASK_VECTOR: "language"}


@EnvConfig.register_subclass("postbc")
@dataclass
class PostBCEnv(EnvConfig):
    """An environment of postbc by name; see :class:`postbc.lerobot.environment.LeRobotVectorEnv`."""

    task: str = "Lift"
    # Actions of an episode; None: the environment's own number.
    episode_length: int | None = None
    # What policies with language are told; "": the task's name where there are several, else nothing.
    task_description: str = ""
    # Whether lerobot-eval's videos show the environment; otherwise they are black, and evaluation is faster.
    render: bool = True

    def __post_init__(self) -> None:
        environment = find_environment(self.task)
        self.fps = environment.fps
        env = self._make(1)
        try:
            self.features = {ACTION: PolicyFeature(FeatureType.ACTION, env.single_action_space.shape)}
            self.features_map = {ACTION: ACTION}
            for theirs, (kind, shape) in env.features.theirs.items():
                key = NAMES.get(theirs, theirs)
                shape = (*shape[1:], shape[0]) if kind == "VISUAL" else shape
                self.features[key], self.features_map[key] = PolicyFeature(FeatureType[kind], shape), theirs
        finally:
            env.close()

    def _make(self, n_envs: int) -> LeRobotVectorEnv:
        return LeRobotVectorEnv(find_environment(self.task), n_envs, horizon=self.episode_length, render=self.render,
                                task_description=self.task_description)  # fmt: skip

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, LeRobotVectorEnv]]:
        """All of a batch are stepped in this process, by threads where the simulator has them; processes would not be faster."""
        return {self.type: {0: self._make(n_envs)}}
