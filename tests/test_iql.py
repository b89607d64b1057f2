"""IQL: its losses on a hand-computed batch, its Q on a 5-state MDP against dynamic programming, members, state."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from postbc.finetuning.iql import IQL, IQLConfig, critic_loss, value_loss
from postbc.finetuning.replay import Batch, Replay
from postbc.nn import make_generators, rand, randn

torch.set_num_threads(1)


def test_losses_of_a_batch_computed_by_hand() -> None:
    """Linear nets with weights set by hand; S = D = 1, two transitions, the second terminal; τ = 0.8."""
    agent = IQL(IQLConfig(hidden=(), expectile=0.8), 1, 1, make_generators([0]))
    networks = agent.networks
    for net, weights, biases in (
        (networks.values, [[2.0]], [1.0]),  # V(s) = 2s + 1
        (networks.critics, [[1.0, 1.0], [0.0, 3.0]], [0.0, 1.0]),  # Q_1 = s + a, Q_2 = 3a + 1
        (networks.target_critics, [[1.0, 2.0], [4.0, 0.0]], [0.0, -1.0]),  # Q̄_1 = s + 2a, Q̄_2 = 4s − 1
    ):
        layer = net.net[0]
        layer.weight.data = torch.tensor(weights).unsqueeze(-1)  # type: ignore[union-attr]
        layer.bias.data = torch.tensor(biases).view(-1, 1, 1)  # type: ignore[union-attr]
    batch = Batch(
        torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[2.0], [1.0]]]), torch.tensor([[[0.5], [7.0]]]),
        torch.tensor([[1.0, -1.0]]), torch.tensor([[0.9, 0.0]]),
    )  # fmt: skip
    # first: min(1 + 4, 4 − 1) = 3, V = 3, x = 0;  second: min(2, −1) = −1, V = 1, x = −2 < 0: (1 − 0.8)·4 = 0.8
    loss, info = value_loss(networks.layers, batch, 0.8)
    torch.testing.assert_close(loss, torch.tensor([(0.0 + 0.8) / 2]))
    torch.testing.assert_close(info["value/advantage"].mean(1), torch.tensor([-1.0]))
    # y = 1 + 0.9·V(0.5) = 2.8 and −1;  Q_1 = 3, 1;  Q_2 = 7, 4
    expected = (0.2**2 + 2**2) / 2 + (4.2**2 + 5**2) / 2
    torch.testing.assert_close(critic_loss(networks.layers, batch)[0], torch.tensor([expected]))


def test_expectile_weights_the_two_sides() -> None:
    agent = IQL(IQLConfig(hidden=()), 1, 1, make_generators([0]))
    zero = torch.zeros(1, 1, 1)
    batch = Batch(zero, zero, zero, torch.zeros(1, 1), torch.zeros(1, 1))
    for sign, weight in ((1.0, 0.9), (-1.0, 0.1)):
        agent.networks.values.net[0].bias.data[:] = 0.0  # type: ignore[union-attr, index]
        agent.networks.target_critics.net[0].bias.data[:] = sign * 3.0  # type: ignore[union-attr, index]
        torch.testing.assert_close(value_loss(agent.networks.layers, batch, 0.9)[0], torch.tensor([9 * weight]))


def test_the_order_is_value_then_critic_then_target() -> None:
    config = IQLConfig(hidden=(8,), lr=1e-2, tau=0.3, expectile=0.7, layer_norm=False)
    agent, by_hand = (IQL(config, 2, 2, make_generators([3])) for _ in range(2))
    g = make_generators([1])
    batch = Batch(randn(g, 16, 2), randn(g, 16, 2), randn(g, 16, 2), randn(g, 16), 0.9 * torch.ones(1, 16))
    agent.update(batch)
    n = by_hand.networks
    for optimizer, loss in (
        (torch.optim.Adam(n.values.parameters(), lr=1e-2), lambda: value_loss(n.layers, batch, 0.7)[0].sum()),
        (torch.optim.Adam(n.critics.parameters(), lr=1e-2), lambda: critic_loss(n.layers, batch)[0].sum()),
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
        state[s][None], action[a][None], state[following[s, a]][None], torch.as_tensor(reward[s, a], dtype=torch.float32)[None],
        discount[None],
    )  # fmt: skip


@pytest.mark.parametrize(("expectile", "combine", "tolerance"), [(0.5, "mean", 0.02), (0.98, "max", 0.04)])
def test_q_agrees_with_dynamic_programming(expectile: float, combine: str, tolerance: float) -> None:
    """Expectile 0.5 evaluates the behaviour policy; towards 1 (a deterministic MDP) it becomes Q-learning's best policy."""
    config = IQLConfig(
        hidden=(32,), activation="relu", layer_norm=False, lr=3e-3, tau=0.05, expectile=expectile, discount=GAMMA
    )
    agent, data = IQL(config, 5, 2, make_generators([0])), chain_data()
    for _ in range(2500):
        agent.update(data)
    states, actions = torch.eye(5)[:4].repeat_interleave(2, 0)[None], torch.eye(2).repeat(4, 1)[None]
    found = agent.networks.critics(states, actions).amin(1).view(4, 2).detach().numpy()
    expected = dynamic_programming(combine)
    assert np.abs(found - expected).max() < tolerance
    other = dynamic_programming("max" if combine == "mean" else "mean")
    assert np.abs(found - other).max() > 5 * tolerance  # the two are far enough apart for this to mean something


# -- members, state ------------------------------------------------------------------------------------------------------------
def data_of(seeds: tuple[int, ...]) -> Replay:
    g = make_generators(seeds, 30)
    parts: list[Tensor] = [randn(g, 90, 3), randn(g, 90, 2), randn(g, 90, 3), randn(g, 90), rand(g, 90)]
    sizes = [40 + 5 * seed for seed in seeds]  # members may have different amounts
    return Replay.fixed([Batch(*(p[m : m + 1, :size] for p in parts)) for m, size in enumerate(sizes)])


def trained(seeds: tuple[int, ...], steps: int = 40) -> IQL:
    agent = IQL(IQLConfig(hidden=(16, 16), batch_size=16), 3, 2, make_generators(seeds))
    agent.train(data_of(seeds), steps, make_generators(seeds, 31))
    return agent


def test_a_seed_alone_equals_the_seed_beside_others() -> None:
    together, alone = trained((1, 4, 7)), trained((4,))
    for name, value in alone.networks.state_dict().items():
        share = len(value)
        torch.testing.assert_close(together.networks.state_dict()[name][share : 2 * share], value, atol=1e-6, rtol=1e-4)


def test_state_resumes_bit_for_bit() -> None:
    reference, resumed = trained((0, 1)), trained((0, 1), 3)
    resumed.load_state_dict(reference.state_dict())
    for agent in (reference, resumed):
        agent.train(data_of((0, 1)), 5, make_generators([0, 1], 32))
    for a, b in zip(reference.networks.parameters(), resumed.networks.parameters(), strict=True):
        assert torch.equal(a, b)


def test_members_with_less_data_are_sampled_within_it() -> None:
    data = data_of((0, 9))
    assert data.sizes == [40, 85]
    known = {float(r) for r in data.rows[0, :40, -2]}
    assert {float(r) for r in data.sample(make_generators([0, 9]), 3000).reward[0]} == known


@pytest.mark.parametrize("change", [{"expectile": 1.0}, {"expectile": 0.0}, {"discount": 1.5}, {"steps": 0}])
def test_refuses_impossible_numbers(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        IQLConfig(**change)  # type: ignore[arg-type]
