"""IQL: its losses on a hand-computed batch, its Q on a 5-state MDP against dynamic programming, the old house's numbers, state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from postbc.agents.base import Batch
from postbc.agents.iql import IQL, IQLConfig, critic_loss, value_loss
from postbc.agents.networks import means
from postbc.agents.replay import Replay
from postbc.devices import Compute
from postbc.errors import InputError
from postbc.seeding import make_generator


def learner(config: IQLConfig, features: int = 4, actions: int = 4, seed: int = 3) -> IQL:
    return IQL(config, features, actions, make_generator(seed, "best-of-n/initialisation"))


def random_batch(seed: int = 0, rows: int = 90, features: int = 4, actions: int = 4) -> Batch:
    """Drawn as the old house's tests drew it (its generator of seed 30, stream 0)."""
    g = make_generator(30 + seed, "ensemble/initialisation")
    return Batch(
        torch.randn(rows, features, generator=g), 2 * torch.rand(rows, actions, generator=g) - 1,
        torch.randn(rows, features, generator=g), -4 * torch.rand(rows, generator=g),
        0.97 * (torch.rand(rows, generator=g) > 0.1).float(),
    )  # fmt: skip


def test_losses_of_a_batch_computed_by_hand() -> None:
    """Linear nets with weights set by hand; F = D = 1, two transitions, the second terminal; τ = 0.8."""
    networks = learner(IQLConfig(hidden=(), expectile=0.8), 1, 1).networks
    networks.value.net[0].weight.data = torch.tensor([[2.0]])  # V(s) = 2s + 1
    networks.value.net[0].bias.data = torch.tensor([1.0])
    for net, weights, biases in (
        (networks.critics, [[1.0, 1.0], [0.0, 3.0]], [0.0, 1.0]),  # Q_1 = s + a, Q_2 = 3a + 1
        (networks.target_critics, [[1.0, 2.0], [4.0, 0.0]], [0.0, -1.0]),  # Q̄_1 = s + 2a, Q̄_2 = 4s − 1
    ):
        net.net[0].weight.data = torch.tensor(weights).unsqueeze(-1)
        net.net[0].bias.data = torch.tensor(biases).view(-1, 1, 1)
    batch = Batch(
        torch.tensor([[1.0], [0.0]]), torch.tensor([[2.0], [1.0]]), torch.tensor([[0.5], [7.0]]), torch.tensor([1.0, -1.0]),
        torch.tensor([0.9, 0.0]),
    )  # fmt: skip
    # first: min(1 + 4, 4 − 1) = 3, V = 3, x = 0;  second: min(2, −1) = −1, V = 1, x = −2 < 0: (1 − 0.8)·4 = 0.8
    loss, info = value_loss(networks, batch, 0.8)
    torch.testing.assert_close(loss, torch.tensor((0.0 + 0.8) / 2))
    torch.testing.assert_close(info["value/advantage"].mean(), torch.tensor(-1.0))
    # y = 1 + 0.9·V(0.5) = 2.8 and −1;  Q_1 = 3, 1;  Q_2 = 7, 4
    expected = (0.2**2 + 2**2) / 2 + (4.2**2 + 5**2) / 2
    torch.testing.assert_close(critic_loss(networks, batch)[0], torch.tensor(expected))


def test_expectile_weights_the_two_sides() -> None:
    networks = learner(IQLConfig(hidden=()), 1, 1).networks
    zero = torch.zeros(1, 1)
    batch = Batch(zero, zero, zero, torch.zeros(1), torch.zeros(1))
    for sign, weight in ((1.0, 0.9), (-1.0, 0.1)):
        networks.value.net[0].bias.data[:] = 0.0
        networks.target_critics.net[0].bias.data[:] = sign * 3.0
        torch.testing.assert_close(value_loss(networks, batch, 0.9)[0], torch.tensor(9 * weight))


def test_the_order_is_value_then_critic_then_target() -> None:
    config = IQLConfig(hidden=(8,), lr=1e-2, tau=0.3, expectile=0.7, layer_norm=False)
    agent, by_hand = learner(config), learner(config)
    batch = random_batch(rows=16)
    agent.update(batch)
    n = by_hand.networks
    for optimizer, loss in (
        (torch.optim.Adam(n.value.parameters(), lr=1e-2), lambda: value_loss(n, batch, 0.7)[0]),
        (torch.optim.Adam(n.critics.parameters(), lr=1e-2), lambda: critic_loss(n, batch)[0]),
    ):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    with torch.no_grad():
        for target, online in zip(n.target_critics.parameters(), n.critics.parameters(), strict=True):
            target.mul_(0.7).add_(0.3 * online)
    for a, b in zip(agent.networks.parameters(), n.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


# -- a 5-state MDP -------------------------------------------------------------------------------------------------------------
# Chain 0 … 4; action 1 steps right, action 0 falls back to 0; entering 4 pays 1 and ends. Behaviour: right with probability 0.6.
GAMMA, RIGHT = 0.9, 0.6


def chain() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """next state, reward, terminal, each (4 states, 2 actions)."""
    following = np.array([[0, s + 1] for s in range(4)])
    reward = np.array([[0.0, float(s == 3)] for s in range(4)])
    return following, reward, reward > 0


def dynamic_programming(combine: str) -> np.ndarray:
    """(4, 2) Q of the behaviour policy ("mean") or of the best one ("max")."""
    following, reward, terminal = chain()
    value = np.zeros(5)
    for _ in range(1000):
        q = reward + GAMMA * np.where(terminal, 0, value[following])
        value[:4] = q @ np.array([1 - RIGHT, RIGHT]) if combine == "mean" else q.max(1)
    return q


def chain_data() -> Batch:
    following, reward, terminal = chain()
    rows = [(s, a) for s in range(4) for a, copies in ((0, 4), (1, 6)) for _ in range(copies)]  # 0.4 and 0.6
    s, a = np.array(rows).T
    state, action = torch.eye(5), torch.eye(2)
    discount = torch.as_tensor(GAMMA * ~terminal[s, a], dtype=torch.float32)
    return Batch(
        state[s], action[a], state[following[s, a]], torch.as_tensor(reward[s, a], dtype=torch.float32), discount
    )  # fmt: skip


@pytest.mark.parametrize(("expectile", "combine", "tolerance"), [(0.5, "mean", 0.02), (0.98, "max", 0.04)])
def test_q_agrees_with_dynamic_programming(expectile: float, combine: str, tolerance: float) -> None:
    """Expectile 0.5 evaluates the behaviour policy; towards 1 (a deterministic MDP) it becomes Q-learning's best policy."""
    config = IQLConfig(
        hidden=(32,), activation="relu", layer_norm=False, lr=3e-3, tau=0.05, expectile=expectile, discount=GAMMA
    )
    agent, data = learner(config, 5, 2, 0), chain_data()
    for _ in range(1500):
        agent.update(data)
    states, actions = torch.eye(5)[:4].repeat_interleave(2, 0), torch.eye(2).repeat(4, 1)
    found = agent.networks.critics(states, actions).amin(0).view(4, 2).detach().numpy()
    expected = dynamic_programming(combine)
    assert np.abs(found - expected).max() < tolerance
    other = dynamic_programming("max" if combine == "mean" else "mean")
    assert np.abs(found - other).max() > 5 * tolerance  # the two are far enough apart for this to mean something


# -- numbers, state ------------------------------------------------------------------------------------------------------------
def trained(steps: int = 40, **changes: Any) -> tuple[IQL, dict[str, float]]:
    data, agent = Replay(100, 4, 4), learner(IQLConfig(hidden=(16, 16), batch_size=16, expectile=0.7, **changes))
    data.add(random_batch())
    g = make_generator(3, "best-of-n/data")
    return agent, means(agent.learn(lambda n: data.sample(g, n), steps), steps)


def test_the_numbers_are_those_of_the_first_house() -> None:
    """After 70 updates, from postbc 0.1 with one seed."""
    agent, info = trained(70)
    assert info == pytest.approx(
        {
            "value/loss": 0.016135,
            "value/v": -0.208354,
            "value/advantage": -0.146960,
            "critic/loss": 12.413103,
            "critic/q": -0.255688,
        },
        abs=1e-4,
    )
    sums = [float(p.detach().double().abs().sum()) for p in agent.networks.parameters()]
    assert sorted(sums) == pytest.approx(
        sorted(
            [
                18.47031,
                3.70236,
                16.07514,
                0.19553,
                32.50984,
                1.98058,
                15.96235,
                0.15708,
                1.81670,
                0.12779,
                44.78448,
                5.19387,
                32.08840,
                0.48656,
                65.60363,
                3.70059,
                32.10088,
                0.54025,
                3.43017,
                0.10128,
                44.58617,
                5.34747,
                32.01351,
                0.07589,
                65.50643,
                3.80329,
                32.01147,
                0.08720,
                3.35433,
                0.10136,
            ]
        ),
        abs=1e-4,
    )


def test_state_resumes_bit_for_bit() -> None:
    (reference, _), (resumed, _) = trained(), trained(3)
    resumed.load_state_dict(reference.state_dict())
    for agent in (reference, resumed):
        for k in range(5):
            agent.update(random_batch(k, 16))
    for a, b in zip(reference.networks.parameters(), resumed.networks.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "change",
    [{"expectile": 1.0}, {"expectile": 0.0}, {"discount": 1.5}, {"steps": 0}, {"lr": float("inf")}, {"lr": float("nan")}, {"tau": 0.0},
     {"hidden": (0,)}, {"batch_size": -1}],
)  # fmt: skip
def test_refuses_impossible_numbers(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        IQLConfig(**change)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_learns_the_same(compiled: bool) -> None:
    agents = []
    for device in ("cpu", "cuda"):
        agent = learner(IQLConfig(hidden=(16, 16), batch_size=16))
        other = IQL(
            agent.config,
            4,
            4,
            make_generator(3, "best-of-n/initialisation", device),
            Compute(device=device, compile=compiled and device == "cuda"),
        )
        other.load_state_dict(agent.state_dict())  # the same weights, on another device
        for k in range(10):
            other.update(Batch(*(part.to(device) for part in random_batch(k, 16))))
        agents.append(other)
    for a, b in zip(*(agent.networks.parameters() for agent in agents), strict=True):
        torch.testing.assert_close(a, b.cpu(), atol=1e-4, rtol=1e-3)
