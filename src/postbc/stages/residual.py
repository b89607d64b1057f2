"""`postbc finetune residual`: a small correction of each seed's pretrained policy, learnt off-policy."""

from __future__ import annotations

from pathlib import Path

from postbc.agents.residual import ResidualConfig
from postbc.schemas import schema
from postbc.stages.finetuning import Finetune, finetune_seed
from postbc.training.residual import ResidualTraining, finetune_residual
from postbc.training.results import Result


@schema
class FinetuneResidual(Finetune):
    """Finetune a pretrained policy by residual RL: a small actor corrects its chunks, an ensemble of critics chooses among them.

    Writes, in seed_<seed>/ of the output directory, results.json, agent.safetensors, base_policy.safetensors and metrics.csv.
    """

    demonstrations: Path | None = None
    """The policy's demonstrations, with rewards (robomimic HDF5, zarr): a share of every batch. Default: rollouts alone."""
    residual: ResidualConfig = ResidualConfig()
    training: ResidualTraining = ResidualTraining()


def run_seed(config: FinetuneResidual, seed: int) -> Result:
    """Residual RL for one seed of the policy, resumable. InputError: see :func:`postbc.training.residual.finetune_residual`."""
    return finetune_seed(finetune_residual, config, seed, config.residual, config.training, config.demonstrations)
