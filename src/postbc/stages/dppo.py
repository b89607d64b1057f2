"""`postbc finetune dppo`: PPO through the last denoising steps of each seed's pretrained policy."""

from __future__ import annotations

from postbc.agents.dppo import DPPOConfig
from postbc.errors import require
from postbc.schemas import schema
from postbc.stages.finetuning import Finetune, finetune_seed
from postbc.training.dppo import DPPOTraining, finetune_dppo
from postbc.training.results import Result


@schema
class FinetuneDPPO(Finetune):
    """Finetune a pretrained policy by DPPO: PPO over its last denoising (or flow) steps, in which a copy of its network learns.

    Writes, in seed_<seed>/ of the output directory, results.json, agent.safetensors, base_policy.safetensors and metrics.csv.
    """

    dppo: DPPOConfig = DPPOConfig()
    training: DPPOTraining = DPPOTraining()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.inference_steps is None, "DPPO samples its own chain.", key="inference_steps", found=self.inference_steps,
                remedy="give --dppo.sampling-steps")  # fmt: skip


def run_seed(config: FinetuneDPPO, seed: int) -> Result:
    """DPPO for one seed of the policy, resumable. InputError: see :func:`postbc.training.dppo.finetune_dppo`."""
    return finetune_seed(finetune_dppo, config, seed, config.dppo, config.training)
