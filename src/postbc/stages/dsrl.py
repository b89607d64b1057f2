"""`postbc finetune dsrl`: RL over the latent noise of each seed's pretrained policy."""

from __future__ import annotations

from postbc.agents.dsrl import DSRLConfig
from postbc.schemas import schema
from postbc.stages.finetuning import Finetune, finetune_seed
from postbc.training.dsrl import finetune_dsrl
from postbc.training.online import OnlineConfig
from postbc.training.results import Result


@schema
class FinetuneDSRL(Finetune):
    """Finetune a pretrained policy by DSRL: SAC over its latent noise, the policy itself frozen.

    Writes, in seed_<seed>/ of the output directory, results.json, agent.safetensors, base_policy.safetensors and metrics.csv.
    """

    dsrl: DSRLConfig = DSRLConfig()
    training: OnlineConfig = OnlineConfig()


def run_seed(config: FinetuneDSRL, seed: int) -> Result:
    """DSRL for one seed of the policy, resumable. InputError: see :func:`postbc.training.dsrl.finetune_dsrl`."""
    return finetune_seed(finetune_dsrl, config, seed, config.dsrl, config.training, deterministic=True)
