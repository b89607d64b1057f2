"""Best-of-N: IQL learns from the policy's own rollouts what chunks are worth; the best of N samples is played at every step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from postbc.agents.base import CRITIC_ENCODER_FILE, PolicyAgent, load_parameters, read_agent, save_agent
from postbc.agents.iql import IQLConfig, make_critics
from postbc.agents.networks import Critics
from postbc.errors import require
from postbc.policies.base import Observation, Policy, load_policy, policy_fingerprint, save_policy, seen_dim
from postbc.schemas import Count, CountOrZero, NonNegative, schema

Aggregate = Literal["min", "mean"]


# -- act -----------------------------------------------------------------------------------------------------------------------
class BestOfNAgent(PolicyAgent):
    """Samples N chunks a state in one batch and plays the one of highest Q, raw units in and out (:class:`postbc.agents.base.Agent`).

    Args:
        policy: pretrained.
        critics: Q of features and flattened normalised chunks.
        iql: their numbers.
        samples: N; 1 is the pretrained policy itself, to the bit.
        aggregate: "min" or "mean" over the critics.
        encoder: the policy whose features the critics see; default the base policy's own.
    """

    finetuner = "best-of-n"

    def __init__(
        self, policy: Policy, critics: Critics, iql: IQLConfig | None = None, samples: int = 32, aggregate: Aggregate = "min",
        encoder: Policy | None = None,
    ) -> None:  # fmt: skip
        super().__init__(policy)
        self.encoder = encoder
        self.critics, self.iql, self.samples, self.aggregate = critics, iql or IQLConfig(), samples, aggregate

    @torch.no_grad()
    def act(self, observation: Observation, generator: torch.Generator) -> Tensor:
        """Raw named observations of B states -> raw chunks (B, T, A)."""
        features = self.policy.encode(observation)
        size = len(features)
        chunks = self.policy.sample(features.repeat(self.samples, 1), generator=generator)
        seen = features if self.encoder is None else self.encoder.encode(observation)
        seen = seen[:, : seen_dim(self.encoder or self.policy)]
        q = self.critics(seen.repeat(self.samples, 1), chunks.flatten(1))
        q = q.amin(0) if self.aggregate == "min" else q.mean(0)
        best = q.view(self.samples, size).argmax(0)
        chosen = chunks.view(self.samples, size, self.chunk, -1)[best, torch.arange(size, device=best.device)]
        return self.policy.normalization.unnormalize_action(chosen)

    def save(self, directory: str | Path) -> None:
        """Write agent.safetensors and, for policies of the registry, base_policy.safetensors (and critic_encoder.safetensors)."""
        header: dict[str, Any] = {"iql": self.iql, "samples": self.samples, "aggregate": self.aggregate}
        if self.encoder is not None:
            header["encoder"] = policy_fingerprint(self.encoder)
            save_policy(Path(directory) / CRITIC_ENCODER_FILE, self.encoder)
        save_agent(directory, "best-of-n", self.policy, header, self.critics)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        policy: Policy | None = None,
        samples: int | None = None,
        device: str | torch.device = "cpu",
    ) -> BestOfNAgent:
        """Read :meth:`save`'s files; `policy` replaces the saved one (for policy classes of your own), `samples` the saved N.

        Raises:
            InputError: there is no agent, it is not Best-of-N's, or it belongs to another base policy.
        """
        file, policy = read_agent(directory, _Saved, policy, device)
        head, encoder = file.header, None
        if head.encoder is not None:
            path = Path(directory) / CRITIC_ENCODER_FILE
            encoder = load_policy(path, device)
            found = policy_fingerprint(encoder)
            require(found == head.encoder, "These are not the eyes that the critics learnt with.", file=path, key="fingerprint",
                    found=found, expected=head.encoder, remedy="copy the whole directory of the run")  # fmt: skip
        dims = (seen_dim(encoder or policy), policy.chunk * policy.action_dim)
        critics = load_parameters(lambda generator: make_critics(head.iql, *dims, generator), file, device)
        return cls(policy, critics, head.iql, samples or head.samples, head.aggregate, encoder)


# -- configuration -------------------------------------------------------------------------------------------------------------
@schema
class BestOfNConfig:
    """Rollouts, the choice among samples, and evaluation (the paper's experiments)."""

    episodes: Count = 1000
    """Rollouts with the pretrained policy (paper: 1000 or 2000 on Robomimic, 100 on the robot)."""
    samples: Annotated[int, Field(ge=1, le=2**20)] = 32
    """N, chunks sampled a state (paper: 32 LIBERO, 4 and 16 WidowX)."""
    aggregate: Aggregate = "min"
    """How the critics' values of a chunk are combined before the best is taken."""
    num_envs: Annotated[int, Field(ge=1, le=10_000)] = 10
    """Environments, for rollouts and evaluation."""
    horizon: Count | None = None
    """Environment steps of an episode; default the task's."""
    eval_episodes: CountOrZero = 200
    """Evaluation episodes before and after; 0: no evaluation (rollouts of a real robot)."""
    observation_keys: tuple[str, ...] | None = None
    """Datasets under obs/ that make "state", in rollout files of your own; default the policy's own, or robomimic's four."""
    log_every: Count = 1000
    """Gradient steps between rows of metrics.csv."""
    checkpoint_seconds: NonNegative = 60.0
    """Least time between checkpoints; they never take more than about 5 % of the run."""


@schema
class _Saved:
    """What an agent's file says besides its parameters."""

    kind: Literal["agent"]
    agent: Literal["best-of-n"]
    policy: str
    """Fingerprint of the base policy."""
    iql: IQLConfig
    samples: Annotated[int, Field(ge=1, le=2**20)]
    aggregate: Aggregate
    encoder: str | None = None
    """Fingerprint of the policy whose encoder the critics see by; None: the base policy's."""
