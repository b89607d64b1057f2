"""An agent of postbc as a LeRobot policy: its own files, played one action at a time (:class:`postbc.lerobot.player.Player`)."""

from copy import copy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor, nn

from lerobot_policy_postbc.configuration_postbc import PostBCConfig
from postbc.agents.base import load_agent
from postbc.errors import InputError, require
from postbc.jobs import load_plugins
from postbc.lerobot import export
from postbc.lerobot.features import features_of_agent
from postbc.lerobot.player import Player
from postbc.stages.seeds import one_agent


class PostBCPolicy(PreTrainedPolicy):
    """Plays a policy, or a DSRL, residual, DPPO or Best-of-N agent.

    Args:
        config: `agent` says where its files are, unless `directory` does.
        directory: of an exported folder.

    Raises:
        InputError: there is no agent, several, or one that reads what the configuration's features do not have.
    """

    config_class = PostBCConfig
    name = "postbc"

    def __init__(self, config: PostBCConfig, directory: str | Path | None = None, **_: Any) -> None:
        super().__init__(config)
        require(directory or config.agent, "Which agent?", key="policy.agent", expected="the directory of a policy or finetuned agent",
                remedy="--policy.agent=runs/dsrl/seed_0, or --policy.path= what `postbc lerobot export` wrote")  # fmt: skip
        load_plugins()
        self.source = one_agent(Path(directory or config.agent))
        agent, about = load_agent(self.source, config.device)
        features = features_of_agent(agent, about)
        seed = config.seed if config.seed is not None else about.seed or 0
        self.player = Player(agent, features, seed, config.n_action_steps)
        self.networks = nn.ModuleDict({name: value for name, value in vars(agent).items() if isinstance(value, nn.Module)})
        made = {name: PolicyFeature(FeatureType[kind], shape) for name, (kind, shape) in features.theirs.items()}
        for name, feature in made.items() if config.input_features else ():
            known = config.input_features.get(name)
            require(known is not None and tuple(known.shape) == feature.shape, "The agent reads what is not observed here.",
                    file=self.source, key=name, found=f"observed: { {k: tuple(v.shape) for k, v in config.input_features.items()} }",
                    expected=feature.shape, remedy="an agent that was trained on these observations")  # fmt: skip
        acts = (config.output_features or {}).get("action")
        require(acts is None or tuple(acts.shape) == (agent.action_dim,), "The agent's actions are of another size.", file=self.source,
                key="action", found=agent.action_dim, expected=None if acts is None else tuple(acts.shape))  # fmt: skip
        config.input_features, config.n_obs_steps = made, agent.observation_steps
        config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (agent.action_dim,))}

    # -- play ------------------------------------------------------------------------------------------------------------------
    def reset(self) -> None:
        """An episode begins."""
        self.player.reset()

    @torch.no_grad()
    def select_action(self, batch: dict[str, Tensor], **_: Any) -> Tensor:
        """The next raw actions (B, A)."""
        return self.player.select_action(batch)

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor], **_: Any) -> Tensor:
        """The raw chunk (B, T, A) that begins here."""
        return self.player.predict_action_chunk(batch)

    # -- files -----------------------------------------------------------------------------------------------------------------
    def _save_pretrained(self, save_directory: Path, state_dict: Any = None) -> None:
        export.copy_agent(self.source, save_directory)
        config = copy(self.config)
        config.agent, config.pretrained_path = "", None
        config._save_pretrained(save_directory)

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, config: PreTrainedConfig | None = None, revision: str | None = None, **kwargs: Any
    ) -> "PostBCPolicy":  # fmt: skip
        """Read a folder of `postbc lerobot export` or `save_pretrained`, or a repository of the hub that holds one."""
        folder = Path(pretrained_name_or_path)
        if not folder.is_dir():
            of_hub = {k: kwargs[k] for k in ("cache_dir", "force_download", "local_files_only", "token") if k in kwargs}
            folder = Path(snapshot_download(str(pretrained_name_or_path), revision=revision, allow_patterns=["*.safetensors", "*.json"],
                                            **of_hub))  # fmt: skip
        return cls(config or PreTrainedConfig.from_pretrained(folder), folder).eval()

    # -- training: not here ----------------------------------------------------------------------------------------------------
    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any] | None]:
        """InputError: it is trained by postbc."""
        raise InputError("An agent of postbc is not trained by LeRobot.", remedy="postbc finetune …")

    def get_optim_params(self) -> dict[str, Any]:
        """Nothing: its parameters are frozen."""
        return {}
