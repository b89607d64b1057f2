"""`--policy.type=postbc`. LeRobot finds the policy and its processors by the names of this module and class (modeling_, processor_)."""

from dataclasses import dataclass, field

from lerobot.configs import FeatureType, NormalizationMode, PreTrainedConfig

from postbc.errors import InputError


@PreTrainedConfig.register_subclass("postbc")
@dataclass
class PostBCConfig(PreTrainedConfig):
    """A policy or finetuned agent of postbc, whatever it is made of: its own files say that."""

    # Directory of the agent or policy; "": the folder of --policy.path itself (`postbc lerobot export`).
    agent: str = ""
    # How many actions of a chunk are played before the next is decided; None: all.
    n_action_steps: int | None = None
    # Of its random numbers; None: the agent's own, as in `postbc evaluate`.
    seed: int | None = None
    # Agents take and give raw units.
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: dict.fromkeys((kind.value for kind in FeatureType), NormalizationMode.IDENTITY)
    )

    @property
    def observation_delta_indices(self) -> list[int]:
        return list(range(1 - self.n_obs_steps, 1))

    @property
    def action_delta_indices(self) -> None:
        return None

    @property
    def reward_delta_indices(self) -> None:
        return None

    def validate_features(self) -> None:
        """The policy does, which knows what the agent reads."""

    def get_optimizer_preset(self) -> None:
        raise InputError("An agent of postbc is not trained by LeRobot.", key="policy.type", found="postbc",
                         remedy="postbc finetune …; or `postbc lerobot train` with a policy of LeRobot's")  # fmt: skip

    get_scheduler_preset = get_optimizer_preset
