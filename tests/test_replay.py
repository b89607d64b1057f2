"""The replay buffer: order, wrap-around, sampling by each seed's own generator, checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from postbc.errors import InputError
from postbc.finetuning.replay import Replay
from postbc.nn import make_generators

S, D = 3, 2


def transitions(members: int, start: int, n: int) -> tuple[Tensor, ...]:
    """Rows whose every number tells the member and the index of the row."""
    index = torch.arange(start, start + n, dtype=torch.float32).expand(members, n)
    base = index + 1000 * torch.arange(members).unsqueeze(1)
    return (
        base.unsqueeze(-1).expand(-1, -1, S) + 0.1, base.unsqueeze(-1).expand(-1, -1, D) + 0.2,
        base.unsqueeze(-1).expand(-1, -1, S) + 0.3, base + 0.4, base + 0.5,
    )  # fmt: skip


@pytest.mark.parametrize("sizes", [[3, 3, 3, 3], [7], [1] * 12, [5, 6], [4, 25]])
def test_holds_the_newest_rows(sizes: list[int]) -> None:
    replay, total = Replay(2, 7, S, D), 0
    for n in sizes:
        replay.add(*transitions(2, total, n))
        total += n
    assert len(replay) == min(total, 7)
    batch = replay.batch(torch.arange(len(replay)).expand(2, -1))
    for m in range(2):
        found = sorted((batch.reward[m] - 0.4 - 1000 * m).round().int().tolist())
        assert found == list(range(total - len(replay), total))
    for part, offset in ((batch.observation, 0.1), (batch.action, 0.2), (batch.next_observation, 0.3)):
        torch.testing.assert_close(part, (batch.reward - 0.4 + offset).unsqueeze(-1).expand_as(part))
    torch.testing.assert_close(batch.discount, batch.reward + 0.1)


def test_sampling_is_uniform_and_each_seeds_own() -> None:
    replay = Replay(3, 100, S, D)
    replay.add(*transitions(3, 0, 10))
    batch = replay.sample(make_generators([4, 5, 6]), 20_000)
    rows = (batch.reward - 0.4 - 1000 * torch.arange(3).unsqueeze(1)).round().long()
    for m in range(3):
        counts = torch.bincount(rows[m], minlength=10)
        assert counts.sum() == 20_000
        assert len(counts) == 10
        assert (counts - 2000).abs().max() < 200
    alone = Replay(1, 100, S, D)
    alone.add(*transitions(1, 0, 10))
    assert torch.equal(
        alone.sample(make_generators([5]), 50).reward[0] + 1000, replay.sample(make_generators([4, 5, 6]), 50).reward[1]
    )


def test_split_keeps_the_order() -> None:
    replay = Replay(2, 20, S, D)
    replay.add(*transitions(2, 0, 20))
    whole = replay.sample(make_generators([0, 1]), 12)
    parts = whole.split(4)
    assert len(parts) == 3
    for tensor, shares in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(shares, 1), tensor)


@pytest.mark.parametrize("filled", [0, 5, 23])
def test_checkpoint_holds_the_filled_part_and_goes_on_alike(filled: int) -> None:
    first, second = Replay(2, 10, S, D), Replay(2, 10, S, D)
    if filled:
        first.add(*transitions(2, 0, filled))
    state = first.state_dict()
    assert state["rows"].shape[1] == min(filled, 10)
    second.load_state_dict(state)
    for replay in (first, second):
        replay.add(*transitions(2, 50, 4))
    assert len(first) == len(second)
    index = torch.arange(len(first)).expand(2, -1)
    assert torch.equal(first.batch(index).reward, second.batch(index).reward)


def test_refuses_what_does_not_fit() -> None:
    replay = Replay(2, 10, S, D)
    with pytest.raises(ValueError, match="empty"):
        replay.sample(make_generators([0, 1]), 4)
    replay.add(*transitions(2, 0, 4))
    with pytest.raises(InputError, match="another size"):
        Replay(2, 11, S, D).load_state_dict(replay.state_dict())
