"""What plays: an agent maps raw named observations to raw action chunks. A file of one plays alone."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from postbc.errors import require
from postbc.files import load_tree, save_tree
from postbc.nn import check_finite, check_weights
from postbc.policies.base import (
    POLICIES,
    POLICY_FILE,
    About,
    Observation,
    Policy,
    Shapes,
    load_policy,
    policy_fingerprint,
    save_policy,
)
from postbc.schemas import parse, plain

N = TypeVar("N", bound=nn.Module)


class Agent(Protocol):
    """An agent of one seed.

    Attributes:
        chunk: T, actions it decides at once.
        action_dim: A.
        observation_steps: newest observations that it looks at.
        shapes: the observations that it reads.
        device: where its tensors are.
    """

    chunk: int
    action_dim: int
    observation_steps: int
    shapes: Shapes

    @property
    def device(self) -> torch.device: ...

    def act(self, observation: Observation, generator: torch.Generator) -> Tensor:
        """Raw named observations of B states -> raw chunks (B, T, A); randomness from `generator`, which is on `device`."""
        ...


class PolicyAgent:
    """A policy as it is: encode, sample, undo the normalisation.

    Args:
        policy: of normalised units.
    """

    finetuner: str | None = None
    """Key of :data:`AGENTS`; None: not finetuned."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.chunk, self.action_dim = policy.chunk, policy.action_dim
        self.observation_steps, self.shapes = policy.observation_steps, policy.shapes

    @property
    def device(self) -> torch.device:
        return self.policy.normalization.action_low.device

    @torch.no_grad()
    def act(self, observation: Observation, generator: torch.Generator) -> Tensor:
        features = self.policy.encode(observation)
        return self.policy.normalization.unnormalize_action(self.policy.sample(features, generator=generator))


class Batch(NamedTuple):
    """Transitions in normalised units, all that a learner sees. Views of one gathered block."""

    features: Tensor
    """(B, F)."""
    action: Tensor
    """(B, D): a flattened chunk (DSRL-NA, IQL) or latent noise in [−1, 1] (DSRL-SAC)."""
    next_features: Tensor
    """(B, F): of a truncated episode its own last observation, never the first of the next."""
    reward: Tensor
    """(B,): reward of the chunk."""
    discount: Tensor
    """(B,): what multiplies the next value: γ (or γ^steps), and 0 where the episode terminated."""

    def split(self, size: int) -> list[Batch]:
        """Consecutive batches of `size` rows."""
        return [Batch(*part) for part in zip(*(whole.split(size) for whole in self), strict=True)]


# -- files ---------------------------------------------------------------------------------------------------------------------
AGENT_FILE, BASE_POLICY_FILE = "agent.safetensors", "base_policy.safetensors"
#: Of Best-of-N: the policy whose encoder its critics see by, where that is not the base policy's own.
CRITIC_ENCODER_FILE = "critic_encoder.safetensors"

#: name in an agent's file -> "module:Class" of the finetuned agents; a class has `load(directory, policy=None, device="cpu")`.
AGENTS: dict[str, str] = {
    "dsrl": "postbc.agents.dsrl:DSRLAgent",
    "dppo": "postbc.agents.dppo:DPPOAgent",
    "residual": "postbc.agents.residual:ResidualAgent",
    "best-of-n": "postbc.agents.best_of_n:BestOfNAgent",
}


def load_agent(path: str | Path, device: str | torch.device = "cpu", **overrides: Any) -> tuple[Agent, About]:
    """What `path` holds, ready to play, and what it says about itself.

    Args:
        path: a policy's file or directory (or a pretraining's checkpoint), or the directory of a finetuning run that has finished.
        overrides: of a policy's configuration (inference_steps=16, say); those of a finetuned agent are fixed.

    Raises:
        InputError: neither of them, or a file that cannot be used.
    """
    path = Path(path)
    if not (path / AGENT_FILE).is_file():
        require(
            path.is_file() or not path.is_dir() or (path / POLICY_FILE).exists() or list(path.glob(f"seed_*/{POLICY_FILE}")),
            "There is no policy and no agent here.", file=path,
            expected=f"{POLICY_FILE} of `postbc pretrain`, or {AGENT_FILE} of a finetuning run",
            remedy=f"let the run finish (same command, --resume); a pretraining's newest checkpoint plays, too: {path / 'latest'}"
            if (path / "latest").exists() else "if this is a finetuning run, let it finish: the same command with --resume",
        )  # fmt: skip
        policy = load_policy(path, device, **overrides)
        return PolicyAgent(policy), policy.about
    require(
        not overrides, "The settings of a finetuned agent's policy are fixed by its run.", file=path, key=", ".join(overrides)
    )
    kind = load_tree(path / AGENT_FILE, kind="agent").get("agent")
    require(
        isinstance(kind, str) and kind in AGENTS, "There is no such kind of agent.", file=path / AGENT_FILE, key="agent",
        found=repr(kind)[:100],
        expected=", ".join(AGENTS), remedy="import the package that defines it first, which adds it to postbc.agents.base.AGENTS",
    )  # fmt: skip
    module, name = AGENTS[kind].split(":")
    agent = getattr(importlib.import_module(module), name).load(path, device=device)
    return agent, about_of(agent.policy)


def agent_files(path: Path) -> list[Path]:
    """What :func:`load_agent` reads of `path`: the files that make an agent or a policy."""
    if path.is_file():
        return [path]
    finetuned = (path / AGENT_FILE).is_file()
    names = (AGENT_FILE, BASE_POLICY_FILE, CRITIC_ENCODER_FILE) if finetuned else (POLICY_FILE,)
    return [path / name for name in names if (path / name).is_file()]


def about_of(policy: Any) -> About:
    """What a policy says about itself; a policy class of your own need not say anything."""
    about = getattr(policy, "about", None)
    return about if isinstance(about, About) else About()


def is_savable(policy: Any) -> bool:
    """Whether the policy can be written to a file of its own: a module of a registered kind."""
    return isinstance(policy, nn.Module) and getattr(getattr(policy, "config", None), "kind", None) in POLICIES


def save_agent(directory: str | Path, kind: str, policy: Policy, header: Mapping[str, Any], module: nn.Module) -> None:
    """Write agent.safetensors and, where the policy can be saved, base_policy.safetensors: all that playing needs.

    Raises:
        NotFiniteError: a parameter is NaN or infinite; nothing is written.
    """
    directory, parameters = Path(directory), module.state_dict()
    check_finite(parameters, "The agent's parameters are not finite; it is not saved.", directory / AGENT_FILE)
    if is_savable(policy):
        save_policy(directory / BASE_POLICY_FILE, policy)
    values = {"kind": "agent", "agent": kind, "policy": policy_fingerprint(policy), **plain(dict(header))}
    save_tree(directory / AGENT_FILE, {**values, "parameters": parameters})


@dataclass(frozen=True)
class AgentFile:
    """An agent's file as read: where it is, its header (a schema), and parameters that nobody has checked yet."""

    path: Path
    header: Any
    parameters: Any


def read_agent(
    directory: str | Path, head: type[Any], policy: Policy | None, device: str | torch.device
) -> tuple[AgentFile, Policy]:
    """agent.safetensors with a header of schema `head`, and its base policy (`policy` where given) on `device`.

    Raises:
        InputError: there is none, another header, or another base policy than the agent was made with.
    """
    path = Path(directory) / AGENT_FILE
    tree = load_tree(path, device, kind="agent")
    parameters = tree.pop("parameters", None)
    file = AgentFile(path, parse(head, tree, path), parameters)
    if policy is None:
        base = Path(directory) / BASE_POLICY_FILE
        require(base.exists(), "The agent's base policy is not beside it.", file=base,
                remedy="copy the whole directory of the run; a policy class of your own is given as policy=…")  # fmt: skip
        policy = load_policy(base, device)
    assert policy is not None
    require(
        policy_fingerprint(policy) == file.header.policy, "The agent was made with another base policy.", file=path, key="policy",
        found=f"a policy of fingerprint {policy_fingerprint(policy)}", expected=file.header.policy,
        remedy="use base_policy.safetensors of the same run, with the same sampler and settings",
    )  # fmt: skip
    return file, policy


def load_parameters(build: Callable[[torch.Generator], N], file: AgentFile, device: str | torch.device) -> N:
    """The network that `build` makes, holding the file's parameters, frozen; these are checked before it takes memory."""
    with torch.device("meta"):
        check_weights(file.parameters, build(torch.Generator()).state_dict(), file.path)
    network = build(torch.Generator())
    network.load_state_dict(file.parameters)
    return network.to(device).requires_grad_(False)
