"""`postbc finetune dsrl`: RL over the latent noise of each seed's pretrained policy."""

from __future__ import annotations

from postbc.agents.dsrl import DSRLConfig
from postbc.schemas import schema
from postbc.stages.evaluate import environment_of
from postbc.stages.finetuning import Finetune, base_of
from postbc.training.dsrl import finetune_dsrl
from postbc.training.online import OnlineConfig
from postbc.training.results import Result, read_result


@schema
class FinetuneDSRL(Finetune):
    """Finetune a pretrained policy by DSRL: SAC over its latent noise, the policy itself frozen.

    Writes, in seed_<seed>/ of the output directory, results.json, agent.safetensors, base_policy.safetensors and metrics.csv.
    """

    dsrl: DSRLConfig = DSRLConfig()
    training: OnlineConfig = OnlineConfig()


def run_seed(config: FinetuneDSRL, seed: int) -> Result:
    """DSRL for one seed of the policy, resumable.

    Raises:
        InputError: see :func:`postbc.training.dsrl.finetune_dsrl`.
    """
    path, policy = base_of(config, seed, deterministic=True)
    finetune_dsrl(
        policy, environment_of(config.environment, policy.about, path), config.output / f"seed_{seed}", config.dsrl, config.training,
        seed=seed, compute=config.compute, resume=config.resume, source=path, allow_version_mismatch=config.allow_version_mismatch,
    )  # fmt: skip
    return read_result(config.output / f"seed_{seed}")
