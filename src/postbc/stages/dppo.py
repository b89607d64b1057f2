"""`postbc finetune dppo`: PPO through the last denoising steps of each seed's pretrained policy."""

from __future__ import annotations

from postbc.agents.dppo import DPPOConfig
from postbc.errors import require
from postbc.schemas import schema
from postbc.stages.evaluate import environment_of
from postbc.stages.finetuning import Finetune, base_of
from postbc.training.dppo import DPPOTraining, finetune_dppo
from postbc.training.results import Result, read_result


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
    """DPPO for one seed of the policy, resumable.

    Raises:
        InputError: see :func:`postbc.training.dppo.finetune_dppo`.
    """
    path, policy = base_of(config, seed)
    finetune_dppo(
        policy, environment_of(config.environment, policy.about, path), config.output / f"seed_{seed}", config.dppo, config.training,
        seed=seed, compute=config.compute, resume=config.resume, source=path, allow_version_mismatch=config.allow_version_mismatch,
    )  # fmt: skip
    return read_result(config.output / f"seed_{seed}")
