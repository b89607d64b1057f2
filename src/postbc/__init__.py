"""postbc: Posterior Behavioral Cloning (Wagenmaker et al., arXiv 2512.16911).

The public names, imported when they are first used. In the order of the data: demonstrations → posterior → pretraining →
finetuning → evaluation.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from postbc.demonstrations import Demonstrations, Normalization, chunk_windows, fit_normalization, read_robomimic
    from postbc.errors import InputError
    from postbc.evaluation import Actor, PolicyActor, evaluate
    from postbc.finetuning.best_of_n import BestOfNActor, finetune_best_of_n
    from postbc.finetuning.dsrl import DSRLActor
    from postbc.finetuning.dsrl_training import finetune_dsrl
    from postbc.policies import DiffusionConfig, DiffusionPolicy, Policy
    from postbc.posterior import EnsembleConfig, Factor, fit_ensemble
    from postbc.pretraining import PretrainingConfig, pretrain

_WHERE = {
    "Demonstrations": "demonstrations", "Normalization": "demonstrations", "chunk_windows": "demonstrations",
    "fit_normalization": "demonstrations", "read_robomimic": "demonstrations", "InputError": "errors",
    "EnsembleConfig": "posterior", "Factor": "posterior", "fit_ensemble": "posterior",
    "DiffusionConfig": "policies", "DiffusionPolicy": "policies", "Policy": "policies",
    "PretrainingConfig": "pretraining", "pretrain": "pretraining",
    "finetune_dsrl": "finetuning.dsrl_training", "DSRLActor": "finetuning.dsrl",
    "finetune_best_of_n": "finetuning.best_of_n", "BestOfNActor": "finetuning.best_of_n",
    "Actor": "evaluation", "PolicyActor": "evaluation", "evaluate": "evaluation",
}  # fmt: skip

__all__ = [
    "Actor",
    "BestOfNActor",
    "DSRLActor",
    "Demonstrations",
    "DiffusionConfig",
    "DiffusionPolicy",
    "EnsembleConfig",
    "Factor",
    "InputError",
    "Normalization",
    "Policy",
    "PolicyActor",
    "PretrainingConfig",
    "chunk_windows",
    "evaluate",
    "finetune_best_of_n",
    "finetune_dsrl",
    "fit_ensemble",
    "fit_normalization",
    "pretrain",
    "read_robomimic",
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
