"""postbc: Posterior Behavioral Cloning (Wagenmaker et al., arXiv 2512.16911).

The public names, imported when they are first used. In the order of the data: dataset → posterior → policy → pretraining →
environment → agent → evaluation and finetuning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from postbc.agents.base import Agent, PolicyAgent, load_agent
    from postbc.data.episodes import Dataset
    from postbc.data.normalization import Normalization
    from postbc.data.readers import read_dataset
    from postbc.data.windows import Windows
    from postbc.environments.registry import Environment, find_environment, from_vector_env
    from postbc.errors import InputError
    from postbc.evaluation import evaluate
    from postbc.policies.base import Policy, load_policy, save_policy
    from postbc.policies.diffusion import DiffusionConfig, DiffusionPolicy
    from postbc.policies.flow import FlowConfig, FlowPolicy
    from postbc.posterior.ensemble import EnsembleConfig, fit_ensemble
    from postbc.posterior.factor import Factor
    from postbc.pretraining import PretrainingConfig, pretrain
    from postbc.training.best_of_n import finetune_best_of_n
    from postbc.training.dsrl import finetune_dsrl

_WHERE = {
    "Dataset": "data.episodes",
    "Normalization": "data.normalization",
    "Windows": "data.windows",
    "read_dataset": "data.readers",
    "InputError": "errors",
    "EnsembleConfig": "posterior.ensemble", "fit_ensemble": "posterior.ensemble",
    "Factor": "posterior.factor",
    "Policy": "policies.base", "load_policy": "policies.base", "save_policy": "policies.base",
    "DiffusionConfig": "policies.diffusion", "DiffusionPolicy": "policies.diffusion",
    "FlowConfig": "policies.flow", "FlowPolicy": "policies.flow",
    "PretrainingConfig": "pretraining", "pretrain": "pretraining",
    "Environment": "environments.registry", "find_environment": "environments.registry", "from_vector_env": "environments.registry",
    "Agent": "agents.base", "PolicyAgent": "agents.base", "load_agent": "agents.base",
    "evaluate": "evaluation",
    "finetune_dsrl": "training.dsrl",
    "finetune_best_of_n": "training.best_of_n",
}  # fmt: skip

__all__ = [
    "Agent",
    "Dataset",
    "DiffusionConfig",
    "DiffusionPolicy",
    "EnsembleConfig",
    "Environment",
    "Factor",
    "FlowConfig",
    "FlowPolicy",
    "InputError",
    "Normalization",
    "Policy",
    "PolicyAgent",
    "PretrainingConfig",
    "Windows",
    "evaluate",
    "find_environment",
    "finetune_best_of_n",
    "finetune_dsrl",
    "fit_ensemble",
    "from_vector_env",
    "load_agent",
    "load_policy",
    "pretrain",
    "read_dataset",
    "save_policy",
]


def __getattr__(name: str) -> Any:
    # PEP 562: `postbc --help` should not wait for torch, and `import postbc.evaluation` must stay a module import
    if name in _WHERE:
        value = getattr(importlib.import_module(f"postbc.{_WHERE[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'postbc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
