"""`postbc finetune best-of-n`: roll out each seed's policy, learn what its chunks are worth, play the best of N."""

from __future__ import annotations

from pathlib import Path

from postbc.agents.best_of_n import BestOfNConfig
from postbc.agents.iql import IQLConfig
from postbc.data.transitions import TransitionConfig
from postbc.errors import require
from postbc.policies.base import POLICY_FILE, load_policy
from postbc.robot.recorded import is_session
from postbc.schemas import schema
from postbc.stages.evaluate import environment_of
from postbc.stages.finetuning import Finetune, base_of
from postbc.stages.seeds import file_of_seed, seeds_of
from postbc.training.best_of_n import finetune_best_of_n
from postbc.training.results import Result, read_result
from postbc.training.rollouts import ROLLOUTS_FILE


@schema
class FinetuneBestOfN(Finetune):
    """Play the pretrained policy, fit an IQL critic on its rollouts, then play the best of N sampled chunks at every step.

    Writes, in seed_<seed>/ of the output directory, rollouts.hdf5, agent.safetensors, base_policy.safetensors, results.json and
    metrics.csv.
    """

    rollouts: tuple[Path, ...] = ()
    """Learn from these instead of collecting (robomimic HDF5, also of a real robot; zarr; a labelled session of `postbc robot rollout`;
    a directory of this stage, or of that, with its seeds): one for all seeds, or one a seed."""
    encoder: Path | None = None
    """Whose frozen encoder the critics see by: what `postbc pretrain` wrote (of the same seed, or one policy.safetensors for all);
    default the policy's own."""
    best_of_n: BestOfNConfig = BestOfNConfig()
    iql: IQLConfig = IQLConfig()
    transitions: TransitionConfig = TransitionConfig()


def rollouts_of(config: FinetuneBestOfN, seed: int) -> Path | None:
    """The rollout file of one seed, None to collect. InputError for a number of files that is neither one nor one a seed."""
    if not config.rollouts:
        return None
    seeds = seeds_of(config)
    require(
        len(config.rollouts) in (1, len(seeds)), "The number of rollout files is not that of the seeds.", key="rollouts",
        found=len(config.rollouts), expected=f"1 or {len(seeds)}, in the order of the seeds {', '.join(map(str, seeds))}",
    )  # fmt: skip
    path = config.rollouts[0] if len(config.rollouts) == 1 else config.rollouts[seeds.index(seed)]
    own = path / f"seed_{seed}"
    if (own / ROLLOUTS_FILE).is_file():
        return own / ROLLOUTS_FILE
    return own if is_session(own) else path


def run_seed(config: FinetuneBestOfN, seed: int) -> Result:
    """Best-of-N for one seed of the policy, resumable.

    Raises:
        InputError: see :func:`postbc.training.best_of_n.finetune_best_of_n`.
    """
    rollouts = rollouts_of(config, seed)
    path, policy = base_of(config, seed)
    encoder = (
        None if config.encoder is None else load_policy(file_of_seed(config.encoder, seed, POLICY_FILE, "postbc pretrain"))
    )
    simulated = rollouts is None or config.best_of_n.eval_episodes > 0
    environment = environment_of(config.environment, policy.about, path) if simulated else None
    finetune_best_of_n(
        policy, environment, config.output / f"seed_{seed}", config.best_of_n, config.iql, config.transitions, seed=seed,
        rollouts=rollouts, encoder=encoder, compute=config.compute, resume=config.resume, source=path,
        allow_version_mismatch=config.allow_version_mismatch,
    )  # fmt: skip
    return read_result(config.output / f"seed_{seed}")
