"""The policy protocol: whoever has `encode`, `loss` and `sample` can be PostBC-pretrained and finetuned by DSRL and Best-of-N.

A policy is one policy of one seed. It owns its encoder and its normalisation; what sees features never sees pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from postbc.data.normalization import Normalization
from postbc.errors import require
from postbc.files import load_tree, save_tree, write_json
from postbc.nn import check_finite, check_weights, from_file, header_of
from postbc.schemas import CountOrZero, NonNegative, Seed, Width, later, parse, plain, schema

#: Named observations of B states: "state" (B, S) float32, "image.<camera>" (B, C, H, W) uint8, "language" (B, E) float32; with
#: `observation_steps` > 1 a time axis stands after B, the newest last. Raw units.
Observation = Mapping[str, Tensor]
#: Name -> shape of one observation without batch and time axes: {"state": (19,)}.
Shapes = Mapping[str, tuple[int, ...]]


class Policy(Protocol):
    """A generative policy over action chunks.

    Attributes:
        chunk: T, actions a sample.
        action_dim: A.
        feature_dim: F, width of :meth:`encode`'s result.
        observation_steps: newest observations that it looks at (1: the current one).
        shapes: the observations that it reads.
        normalization: raw <-> normalised actions (and states), a module with buffers.

    One whose attribute `augments` is true (not every policy has it) is trained on `encode(observation, generator)`: random crops.
    One whose attribute `seen_dim` is below F has features of which learners see the first `seen_dim` (:func:`seen_dim`); what follows
    is what sampling needs besides, and too wide to keep or to learn from: the tokens of a vision-language model.
    """

    chunk: int
    action_dim: int
    feature_dim: int
    observation_steps: int
    shapes: Shapes
    normalization: Normalization

    def encode(self, observation: Observation) -> Tensor:
        """Raw named observations of B states -> features (B, F). For states alone the normalised vector itself."""
        ...

    def loss(self, features: Tensor, chunk: Tensor, generator: torch.Generator, weight: Tensor | None = None) -> Tensor:
        """(B, F), normalised chunks (B, T, A) -> (B,): the policy's own supervised loss, its randomness drawn from `generator`.

        `weight` (B,) multiplies the losses, (B, T) those of the single actions (demonstrations with `tail` mask: 0 for padding).
        """
        ...

    def sample(self, features: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """(B, F) -> normalised chunks (B, T, A); given latent `noise` (B, T, A) it must be deterministic to serve DSRL."""
        ...


def seen_dim(policy: Policy) -> int:
    """How many numbers of a policy's features, from the first on, learners see and keep: all, but for a policy that says otherwise."""
    return int(getattr(policy, "seen_dim", policy.feature_dim))


def weighted(errors: Tensor, weight: Tensor | None) -> Tensor:
    """Errors (B, D) of flattened chunks -> losses (B,): the mean over D, times `weight` (B,), or of errors times that (B, T)."""
    if weight is None or weight.ndim == 1:
        return errors.mean(1) if weight is None else errors.mean(1) * weight
    return (errors.unflatten(1, (weight.shape[1], -1)) * weight[..., None]).mean((1, 2))


def lacking(policy: Any) -> list[str]:
    """What of :class:`Policy` an object does not have.

    `isinstance` with a protocol does not see the submodules of a `torch.nn.Module` from Python 3.12 on.
    """
    names = [*Policy.__annotations__, *(name for name, value in vars(Policy).items() if callable(value) and name[0] != "_")]
    return [name for name in names if not hasattr(policy, name)]


#: kind -> "module:Class" of the policies that a file can hold. A class has a `Config` (a schema with a field `kind`), a constructor
#: (config, shapes, action_dim, chunk, normalization, generator, observation_steps=1, about=None), and is a torch.nn.Module.
#: A package of your own adds its kind here when it is imported.
POLICIES: dict[str, str] = {
    "diffusion": "postbc.policies.diffusion:DiffusionPolicy",
    "flow": "postbc.policies.flow:FlowPolicy",
    "gaussian": "postbc.policies.gaussian:GaussianPolicy",
    "lerobot": "postbc.lerobot.policy:LeRobotPolicy",
}


def policy_class(kind: str) -> Any:
    """The class of a kind. InputError for one that nobody has registered."""
    require(kind in POLICIES, "There is no such kind of policy.", key="kind", found=kind, expected=", ".join(POLICIES),
            remedy="import the package that defines it first, which adds it to postbc.policies.POLICIES")  # fmt: skip
    module, name = POLICIES[kind].split(":")
    return getattr(importlib.import_module(module), name)


# -- files ---------------------------------------------------------------------------------------------------------------------
POLICY_FILE = "policy.safetensors"


@schema
class About:
    """What a reader of a policy should know; None: unknown."""

    method: str | None = None
    """bc, sigma-bc or postbc."""
    posterior_weight: NonNegative | None = None
    """α (postbc)."""
    posterior_weight_source: str | None = later(None)
    """Where it came from, if it was found by calibration (`auto`)."""
    variant: str | None = later(None)
    """How PostBC was not the paper's, for tables: closed form, coherent 4, auto."""
    sigma: NonNegative | None = None
    """σ (sigma-bc)."""
    seed: Seed | None = None
    """Of data, initialisation and training."""
    task: str | None = None
    """Name of the environment that the demonstrations come from."""
    data: str | None = None
    """Name of the demonstrations' file."""
    data_digest: str | None = None
    """Of its content (:func:`postbc.runs.digest`)."""
    demonstrations: CountOrZero | None = None
    """Number of trajectories."""
    trajectories: tuple[str, ...] | None = None
    """Their names."""
    windows: CountOrZero | None = None
    """Number of training windows."""
    facts: dict[str, Any] | None = None
    """Of the demonstrations' environment (:class:`postbc.data.belonging.Facts`)."""
    steps: CountOrZero | None = None
    """Gradient steps."""
    compute: dict[str, Any] | None = None
    """Device, precision, threads (:class:`postbc.devices.Compute`)."""
    versions: dict[str, Any] | None = None
    """Of what decided the result."""

    def is_of(self, path: Path, content: str) -> bool:
        """Whether `path` is the demonstrations' file: its digest is `content`; of a policy that knows none, by its name."""
        return self.data == path.name if self.data_digest is None else self.data_digest == content


@schema
class PolicyHead:
    """All of a policy's file but the weights."""

    kind: Literal["policy"]
    policy: str
    config: dict[str, Any]
    shapes: dict[str, Annotated[tuple[Width, ...], Field(min_length=1, max_length=4)]]
    action_dim: Width
    chunk: Width
    observation_steps: Annotated[int, Field(ge=1, le=1000)]
    normalization: dict[str, Any]
    about: About


def _weights(policy: Any) -> dict[str, Tensor]:
    """Everything in its state but the normalisation, which the header holds in double precision."""
    return {name: value for name, value in policy.state_dict().items() if not name.startswith("normalization.")}


def _head(policy: Any) -> dict[str, Any]:
    return {
        "kind": "policy", "policy": policy.config.kind, "config": plain(policy.config),
        "shapes": {name: list(shape) for name, shape in policy.shapes.items()}, "action_dim": policy.action_dim,
        "chunk": policy.chunk, "observation_steps": policy.observation_steps,
        "normalization": policy.normalization.to_dict(), "about": plain(policy.about),
    }  # fmt: skip


def policy_tree(policy: Any, parameters: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """What a file holds of a policy, with `parameters` in place of its own where they are given (averages of them).

    Of a class that no file can hold (without `config` and `about`), the parameters alone.
    """
    head = _head(policy) if hasattr(policy, "config") and hasattr(policy, "about") else {}
    return {**head, "parameters": {**_weights(policy), **(parameters or {})}}


def save_policy(path: str | Path, policy: Any) -> None:
    """Write `path` (safetensors; everything inference needs) and, beside it, a readable .json of all but the weights.

    Raises:
        InputError: a policy of no registered kind.
        NotFiniteError: a weight is NaN or infinite; nothing is written.
    """
    path, kind = Path(path), getattr(getattr(policy, "config", None), "kind", None)
    require(kind in POLICIES, "No file can hold a policy of no registered kind.", file=path, key="config.kind",
            found=kind, expected=", ".join(POLICIES), remedy="register it: docs/bring-your-own-policy.md")  # fmt: skip
    tree = policy_tree(policy)
    check_finite(tree["parameters"], "The policy's weights are not finite; it is not saved.", path)
    write_json(path.with_suffix(".json"), {name: value for name, value in tree.items() if name != "parameters"})
    save_tree(path, tree)


def load_policy(path: str | Path, device: str | torch.device = "cpu", **overrides: Any) -> Any:
    """Read a policy, frozen; `overrides` replace fields of its configuration (inference_steps=16, say).

    Args:
        path: a policy file, a directory with a policy.safetensors, or a checkpoint of a pretraining (`latest`): its averaged weights.

    Raises:
        InputError: not a policy file, an unknown override, or a header that does not fit the weights.
    """
    path = Path(path)
    if path.is_dir():
        seeds = sorted(p.parent.name for p in path.glob(f"seed_*/{POLICY_FILE}"))
        remedy = (
            f"give one of its seeds: {path / seeds[0]}" if seeds
            else "it holds a finetuned agent: give the policy that it was made from" if list(path.glob("**/agent.safetensors"))
            else f"wait until the run has finished, or give its newest checkpoint: {path / 'latest'}" if (path / "latest").exists()
            else "run `postbc pretrain`, or wait until it has finished"
        )  # fmt: skip
        require((path / POLICY_FILE).exists(), "There is no policy here.", file=path, expected=POLICY_FILE,
                found=", ".join(seeds) or None, remedy=remedy)  # fmt: skip
        path = path / POLICY_FILE
    tree = load_tree(path, kind=("policy", "checkpoint"))
    if tree["kind"] == "checkpoint":
        tree = _averaged(tree, path)
    weights = tree.pop("parameters", None)
    head = parse(PolicyHead, tree, path)
    with header_of(path, "policy"):
        kind = policy_class(head.policy)
    known = {field.name for field in dataclasses.fields(kind.Config)} - {"kind"}
    unknown, listed = sorted(set(overrides) - known), ", ".join(sorted(known))
    require(not unknown, "The policy has no such setting.", file=path, key=", ".join(unknown), expected=listed)
    config = parse(kind.Config, {**head.config, **plain(overrides)}, path)
    with header_of(path, "policy"):
        normalization = Normalization.from_dict(head.normalization)
        found = (normalization.state_dim, normalization.action_dim)
        expected = (head.shapes.get("state", (0,))[0], head.action_dim)
        require(found == expected, "The normalisation has another width than the policy.", key="normalization",
                found=f"{found[0]} state and {found[1]} action dimensions", expected=f"{expected[0]} and {expected[1]}")  # fmt: skip
        arguments = (config, head.shapes, head.action_dim, head.chunk, normalization, torch.Generator(), head.observation_steps)
        with torch.device("meta"):  # shapes without memory: a header may ask for anything
            blank = kind(*arguments, head.about)
        check_weights(weights, _weights(blank), path)
        with from_file():
            policy = kind(*arguments, head.about)
        policy.load_state_dict({**policy.state_dict(), **weights})
    return policy.to(device).eval().requires_grad_(False)


def _averaged(checkpoint: Any, path: Path) -> dict[str, Any]:
    """The policy that a pretraining has come to, as its checkpoint holds it."""
    state = checkpoint.get("state")
    tree = state.get("averaged") if isinstance(state, dict) else None
    require(isinstance(tree, dict), "This checkpoint is of no pretraining.", file=path, expected="one that `postbc pretrain` wrote",
            remedy="give a policy, or let the run finish: the same command with --resume")  # fmt: skip
    assert isinstance(state, dict)
    assert isinstance(tree, dict)
    about = tree.get("about")  # the steps that were done, not those that were planned
    return {**tree, "about": {**about, "steps": state.get("done")} if isinstance(about, dict) else about}


def policy_fingerprint(policy: Any) -> str:
    """Identifies what a policy decides: weights, normalisation, configuration (its sampler included), and any plain attribute."""
    digest = hashlib.sha256(f"{type(policy).__module__}.{type(policy).__qualname__}".encode())
    simple = {k: v for k, v in vars(policy).items() if isinstance(v, (bool, int, float, str, tuple)) and k not in ("training",)}
    head = {
        "config": plain(getattr(policy, "config", None)), "shapes": {k: list(v) for k, v in policy.shapes.items()},
        "normalization": policy.normalization.to_dict(), "attributes": plain(simple),
    }  # fmt: skip
    digest.update(json.dumps(head, sort_keys=True, default=str).encode())
    if isinstance(policy, torch.nn.Module):
        for name, value in sorted(_weights(policy).items()):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
