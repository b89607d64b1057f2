"""`postbc finetune residual`: a small correction of each seed's pretrained policy, learnt off-policy."""

from __future__ import annotations

from pathlib import Path

from postbc.agents.residual import ResidualConfig
from postbc.schemas import schema
from postbc.stages.evaluate import environment_of
from postbc.stages.finetuning import Finetune, base_of
from postbc.training.residual import ResidualTraining, finetune_residual
from postbc.training.results import Result, read_result


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
    """Residual RL for one seed of the policy, resumable.

    Raises:
        InputError: see :func:`postbc.training.residual.finetune_residual`.
    """
    path, policy = base_of(config, seed)
    finetune_residual(
        policy, environment_of(config.environment, policy.about, path), config.output / f"seed_{seed}", config.residual,
        config.training, config.demonstrations, seed=seed, compute=config.compute, resume=config.resume, source=path,
        allow_version_mismatch=config.allow_version_mismatch,
    )  # fmt: skip
    return read_result(config.output / f"seed_{seed}")
