"""The replay buffer: order, wrap-around, growing, sampling, checkpoint."""

from __future__ import annotations

import pytest
import torch

from postbc.agents import replay as module
from postbc.agents.base import Batch
from postbc.agents.replay import Replay
from postbc.errors import InputError
from postbc.seeding import make_generator

F, D = 3, 2


def transitions(start: int, n: int) -> Batch:
    """Rows whose every number tells the index of the row."""
    base = torch.arange(start, start + n, dtype=torch.float32)
    wide = base.unsqueeze(-1)
    return Batch(wide.expand(-1, F) + 0.1, wide.expand(-1, D) + 0.2, wide.expand(-1, F) + 0.3, base + 0.4, base + 0.5)


@pytest.mark.parametrize("sizes", [[3, 3, 3, 3], [7], [1] * 12, [5, 6], [4, 25]])
@pytest.mark.parametrize("first", [1, 2**16])
def test_holds_the_newest_rows(sizes: list[int], first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST", first)  # memory taken at once: from a single row it has to grow
    replay, total = Replay(7, F, D), 0
    for n in sizes:
        replay.add(transitions(total, n))
        total += n
    assert len(replay) == min(total, 7)
    batch = replay.batch(torch.arange(len(replay)))
    assert sorted((batch.reward - 0.4).round().int().tolist()) == list(range(total - len(replay), total))
    for part, offset in ((batch.features, 0.1), (batch.action, 0.2), (batch.next_features, 0.3)):
        torch.testing.assert_close(part, (batch.reward - 0.4 + offset).unsqueeze(-1).expand_as(part))
    torch.testing.assert_close(batch.discount, batch.reward + 0.1)


def test_memory_is_taken_as_it_fills() -> None:
    replay = Replay(10**9, F, D)
    replay.add(transitions(0, 5))
    assert len(replay.rows) == module.FIRST


def test_sampling_is_uniform() -> None:
    replay = Replay(100, F, D)
    replay.add(transitions(0, 10))
    batch = replay.sample(make_generator(4, "online/data"), 20_000)
    counts = torch.bincount((batch.reward - 0.4).round().long(), minlength=10)
    assert counts.sum() == 20_000
    assert len(counts) == 10
    assert (counts - 2000).abs().max() < 200


def test_split_keeps_the_order() -> None:
    replay = Replay(20, F, D)
    replay.add(transitions(0, 20))
    whole = replay.sample(make_generator(0, "online/data"), 12)
    parts = whole.split(4)
    assert len(parts) == 3
    for tensor, shares in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(shares), tensor)


@pytest.mark.parametrize("filled", [0, 5, 10, 23])
def test_a_checkpoint_holds_the_filled_part_and_goes_on_alike(filled: int) -> None:
    first, second = Replay(10, F, D), Replay(10, F, D)
    if filled:
        first.add(transitions(0, filled))
    state = first.state_dict()
    assert len(state["rows"]) == min(filled, 10)
    second.load_state_dict(state)
    for replay in (first, second):
        replay.add(transitions(50, 4))
    assert len(first) == len(second)
    index = torch.arange(len(first))
    assert torch.equal(first.batch(index).reward, second.batch(index).reward)


def test_refuses_what_does_not_fit() -> None:
    replay = Replay(10, F, D)
    with pytest.raises(InputError, match="empty"):
        replay.sample(make_generator(0, "online/data"), 4)
    replay.add(transitions(0, 4))
    with pytest.raises(InputError, match="another size"):
        Replay(11, F, D).load_state_dict(replay.state_dict())
    with pytest.raises(InputError, match="another size"):
        Replay(10, F, D).load_state_dict({**replay.state_dict(), "position": 7})


@pytest.mark.gpu
def test_rows_live_on_the_gpu() -> None:
    replay = Replay(10, F, D, "cuda")
    replay.add(Batch(*(part.cuda() for part in transitions(0, 6))))
    assert replay.sample(make_generator(0, "online/data", "cuda"), 4).features.device.type == "cuda"
    other = Replay(10, F, D)
    other.load_state_dict(replay.state_dict())  # a checkpoint goes back to the CPU
    assert other.rows.device.type == "cpu"
