"""ValueDICE (Kostrikov et al. 2020, arXiv 1912.05032), offline: a policy whose state-action distribution is the demonstrations'.

It is an alternative pretraining, the paper's baseline. With ν a function of states and actions, d = ν(s, a) − γ·ν(s', π(s')),

    L = log E_D exp d − (1 − γ)·E_D ν(s₀, π(s₀)),

which ν minimises and π maximises. Published are an online algorithm and its defaults; without an environment there is no replay whose
share regularises it (its α = 0). An action is a chunk, s' the state after it, and what follows a demonstration's end is the absorbing
state, told apart by an indicator.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from postbc.data.windows import Windows
from postbc.devices import Compute
from postbc.errors import require
from postbc.nn import MLP, check_finite, generator_state, set_generator_state
from postbc.policies.base import Observation, policy_tree
from postbc.policies.gaussian import GaussianPolicy, orthogonal
from postbc.schemas import Count, CountOrZero, NonNegative, Positive, Share, Width, schema
from postbc.seeding import make_generator


# -- networks ------------------------------------------------------------------------------------------------------------------
class Nu(nn.Module):
    """ν(s, a): (B, F + 1), (B, D) -> (B,); the last layer has no bias, all are orthogonal."""

    def __init__(self, state_dim: int, action_dim: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.net = MLP(state_dim + action_dim, (hidden, hidden), 1, generator, "relu")
        self.net[-1] = nn.Linear(hidden, 1, bias=False)
        orthogonal(self.net, generator)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs).float().squeeze(-1)  # type: ignore[no-any-return]


class Transitions(NamedTuple):
    """What the demonstrations say, the absorbing state's own transitions included: (N, F + 1), (N, D), (N, F + 1)."""

    state: Tensor
    action: Tensor
    next_state: Tensor


@torch.no_grad()
def transitions(policy: Any, windows: Windows, absorbing: int) -> tuple[Transitions, Tensor]:
    """Every window as a transition, and the (n, F + 1) states that episodes may begin in (all of them, as published).

    Args:
        absorbing: transitions from the absorbing state to itself, an episode.
    """
    rows = torch.arange(len(windows), device=windows.device)
    device = policy.normalization.action_low.device
    end = nn.functional.one_hot(torch.tensor(policy.feature_dim, device=device)).float()

    def encoded(observation: Observation) -> Tensor:
        return nn.functional.pad(policy.encode({name: value.to(device) for name, value in observation.items()}), (0, 1))

    states, following = [], []
    for part in rows.split(256):
        after, inside = windows.next_observation(part)
        states.append(encoded(windows.observation(part)))
        following.append(torch.where(inside[:, None].to(device), encoded(after), end))
    state = torch.cat(states)
    action = policy.normalization.normalize_action(windows.chunk(rows).to(device)).flatten(1)
    more = absorbing * len(set(windows.episode.tolist()))
    ends = end.expand(more, -1)
    return Transitions(
        torch.cat((state, ends)), torch.cat((action, torch.zeros(more, action.shape[1], device=device))), torch.cat((*following, ends))
    ), state  # fmt: skip


# -- losses --------------------------------------------------------------------------------------------------------------------
def dice_loss(expert: Tensor, following: Tensor, initial: Tensor, discount: float) -> Tensor:
    """L of ν at (s, a), (s', π(s')) and (s₀, π(s₀)), each (B,): its value is log mean exp d − (1 − γ)·mean ν(s₀, π(s₀)), up to log B.

    As published the first term is a sum of d weighted by a softmax that counts as constant, which has the same gradient.
    """
    d = expert - discount * following
    return (torch.softmax(d, 0).detach() * d).sum() - (1 - discount) * initial.mean()


def gradient_penalty(nu: Nu, one: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """mean (‖∇ν‖ − 1)² at interpolates of inputs (B, ·), `share` (B, 1) of the first."""
    inputs = (share * one + (1 - share) * other).detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(nu(inputs).sum(), inputs, create_graph=True)
    return (gradient.norm(dim=-1) - 1).square().mean()


def orthogonal_penalty(network: nn.Module) -> Tensor:
    """Σ over linear layers of the squared off-diagonal of WᵀW, as the published actor's regularisation."""
    total = torch.zeros((), device=next(network.parameters()).device)
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            gram = layer.weight @ layer.weight.T  # torch's weight is (out, in): published WᵀW of (in, out)
            total = total + (gram * (1 - torch.eye(len(gram), device=gram.device))).square().sum()
    return total


# -- update --------------------------------------------------------------------------------------------------------------------
class ValueDICE:
    """Trains a Gaussian policy step by step, as :class:`postbc.pretraining.Pretraining` does.

    Args:
        policy: trained in place.
        windows: of the demonstrations, raw units.
        config: the algorithm's numbers.
        seed: of initialisation, batches and noise.
        compute: device and precision; and, on cuda, whether a step is recorded as one graph.

    Raises:
        InputError: another kind of policy, or one that sees images, whose encoder nothing here trains; windows with masked padding;
            compilation elsewhere than on cuda.
    """

    def __init__(
        self, policy: Any, windows: Windows, config: ValueDICEConfig, seed: int, compute: Compute | None = None
    ) -> None:
        compute = self.compute = (compute or Compute()).resolved()
        check_policy(policy, windows, compute)
        device = compute.start()
        self.policy, self.config, self.done = policy.to(device).train(), config, 0
        self.steps = config.steps
        self.expert, self.initial = transitions(policy, windows, config.absorbing)
        names = ("initialisation", "data", "noise")
        self.streams = {name: make_generator(seed, f"value-dice/{name}", device) for name in names}
        dims = policy.feature_dim + 1, policy.chunk * policy.action_dim
        self.nu = Nu(*dims, config.hidden, self.streams["initialisation"]).to(device)
        self.optimisers = {
            "nu": torch.optim.Adam(self.nu.parameters(), config.nu_lr, capturable=device.type == "cuda"),
            "actor": torch.optim.Adam(policy.network.parameters(), config.actor_lr, capturable=device.type == "cuda"),
        }
        self._update = compute.compiled(self._step)

    def _act(self, state: Tensor, noise: Tensor) -> Tensor:
        mean, std = self.policy.distribution(state)
        return torch.tanh(mean + std * noise)

    def _batch(self, count: int) -> Tensor:
        generator = self.streams["data"]
        return torch.randint(count, (self.config.batch_size,), generator=generator, device=generator.device)

    def losses(
        self, expert: Transitions, initial: Tensor, share: Tensor, noise: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """ν's and the actor's loss on (B, ·) transitions and first states.

        Args:
            share: (B, 1), of the demonstrations in the interpolates.
            noise: standard normal (B, D), the policy's at the next states and at the first.
        """
        config = self.config
        with self.compute.autocast():
            at = torch.cat((expert.state, expert.action), -1)
            after, first = (
                torch.cat((s, self._act(s, n)), -1) for s, n in zip((expert.next_state, initial), noise, strict=True)
            )
            loss = dice_loss(self.nu(at), self.nu(after), self.nu(first), config.discount)
            penalty = gradient_penalty(self.nu, torch.cat((at, after)), torch.cat((first, first)), torch.cat((share, share)))
        return (
            loss + config.gradient_penalty * penalty,
            -loss + config.orthogonal_penalty * orthogonal_penalty(self.policy.network),
        )

    def _step(self, initial: Tensor, share: Tensor, next_noise: Tensor, first_noise: Tensor, *expert: Tensor) -> Tensor:
        """One gradient step of ν and of the actor, both from the same loss; ν's ()."""
        of_nu, of_actor = self.losses(Transitions(*expert), initial, share, (next_noise, first_noise))
        parameters = [list(m.parameters()) for m in (self.nu, self.policy.network)]
        gradients = [
            torch.autograd.grad(loss, ps, retain_graph=True) for loss, ps in zip((of_nu, of_actor), parameters, strict=True)
        ]
        for optimiser, ps, gs in zip(self.optimisers.values(), parameters, gradients, strict=True):
            for p, g in zip(ps, gs, strict=True):
                p.grad = g
            optimiser.step()
        return of_nu.detach()

    def update(self, expert: Transitions, initial: Tensor, share: Tensor, noise: tuple[Tensor, Tensor]) -> Tensor:
        """One gradient step on what :meth:`losses` takes; ν's loss ()."""
        self.done += 1
        loss: Tensor = self._update(initial, share, *noise, *expert)
        return loss

    def step(self) -> Tensor:
        """One gradient step on a batch of the demonstrations; ν's loss ()."""
        rows = self._batch(len(self.expert.state))
        expert, initial = Transitions(*(part[rows] for part in self.expert)), self.initial[self._batch(len(self.initial))]
        generator, shape = self.streams["noise"], (len(rows), self.expert.action.shape[1])
        share = torch.rand(len(rows), 1, generator=generator, device=rows.device)
        after, first = (torch.randn(shape, generator=generator, device=rows.device) for _ in range(2))
        return self.update(expert, initial, share, (after, first))

    def finish(self) -> None:
        """Freeze the policy. NotFiniteError if its weights are NaN or infinite."""
        weights = self.policy.network.state_dict()
        check_finite(
            weights, "The policy's weights are not finite; it is not saved.", remedy="lower value_dice.nu_lr or actor_lr"
        )
        self.policy.eval().requires_grad_(False)

    def state(self) -> dict[str, Any]:
        """Everything that decides the remaining steps."""
        return {
            "policy": self.policy.state_dict(), "averaged": policy_tree(self.policy), "nu": self.nu.state_dict(),
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
            "streams": {name: generator_state(g) for name, g in self.streams.items()}, "done": self.done,
        }  # fmt: skip

    def load_state(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state`."""
        self.policy.load_state_dict(state["policy"])
        self.nu.load_state_dict(state["nu"])
        for name, optimiser in self.optimisers.items():
            saved = state["optimisers"][name]["state"]  # the groups say how to step on this device
            optimiser.load_state_dict({"state": saved, "param_groups": optimiser.state_dict()["param_groups"]})
        for name, generator in self.streams.items():
            set_generator_state(generator, state["streams"][name])
        self.done = int(state["done"])


def check_policy(policy: Any, windows: Windows, compute: Compute) -> None:
    """InputError unless ValueDICE can train it, on these windows and in this way."""
    require(isinstance(policy, GaussianPolicy), "ValueDICE trains a Gaussian policy.", key="policy.kind",
            found=getattr(getattr(policy, "config", None), "kind", type(policy).__name__), expected="gaussian",
            remedy="give --policy.kind gaussian")  # fmt: skip
    images = [name for name in policy.shapes if name.startswith("image.")]
    require(not images, "ValueDICE does not train an encoder.", key="data.image_keys", found=", ".join(images),
            expected="states", remedy="pretrain a policy that sees by another method")  # fmt: skip
    require(not compute.compile or compute.device == "cuda", "ValueDICE differentiates twice, which torch.compile cannot.",
            key="compute.compile", found=f"on {compute.device}", expected="cuda, where a step is recorded as one graph",
            remedy="leave --compile out")  # fmt: skip
    require(windows.tail != "mask", "ValueDICE has no loss that padding could be left out of.", key="data.tail", found="mask",
            expected="drop or pad")  # fmt: skip


# -- configuration -------------------------------------------------------------------------------------------------------------
@schema
class ValueDICEConfig:
    """The algorithm's numbers; defaults are the published ones."""

    steps: Count = 500_000
    """Gradient steps (published: 5 an environment step, 100,000 of these)."""
    hidden: Width = 256
    """Width of ν (two layers)."""
    nu_lr: Positive = 1e-3
    """Adam's step size of ν."""
    actor_lr: Positive = 1e-5
    """Adam's step size of the policy."""
    batch_size: Width = 256
    """Transitions a step."""
    discount: Share = 0.99
    """γ of a chunk."""
    gradient_penalty: NonNegative = 10.0
    """Weight of (‖∇ν‖ − 1)² at interpolates between the demonstrations' (s, a) and (s', π(s')) and the policy's (s₀, π(s₀))."""
    orthogonal_penalty: NonNegative = 1e-4
    """Weight of the actor's orthogonal regularisation."""
    absorbing: CountOrZero = 10
    """Transitions of the absorbing state, an episode."""
