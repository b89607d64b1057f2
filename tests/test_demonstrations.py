"""Types, subsets, filters, normalisation and windows of demonstrations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postbc.demonstrations import Demonstrations, Normalization, Trajectory, chunk_windows, fit_normalization
from postbc.demonstrations.inspect import draw, summarise
from postbc.errors import InputError

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=6)


def make(lengths: list[int], seed: int = 0, s: int = 3, a: int = 2, scale: float = 1.0, **kwargs: object) -> Demonstrations:
    """Demonstrations of the given lengths with uniform numbers in [-scale, scale]."""
    rng = np.random.default_rng(seed)
    observations = [rng.uniform(-scale, scale, (n, s)).astype(np.float32) for n in lengths]
    actions = [rng.uniform(-scale, scale, (n, a)).astype(np.float32) for n in lengths]
    return Demonstrations.from_arrays(observations, actions, **kwargs)  # type: ignore[arg-type]


def test_plain_arrays_in() -> None:
    demonstrations = make([4, 2], operators=["ann", None], states=[np.zeros((4, 5)), np.ones((2, 5))])
    assert (len(demonstrations), demonstrations.num_steps) == (2, 6)
    assert (demonstrations.observation_dim, demonstrations.action_dim) == (3, 2)
    assert demonstrations.observation_dims == (3,)
    assert demonstrations.names == ("demo_0", "demo_1")
    first = demonstrations[0]
    assert first.operator == "ann"
    assert first.observations.dtype == first.actions.dtype == first.rewards.dtype == np.float32
    assert first.dones.tolist() == [False, False, False, True]
    assert first.rewards.tolist() == [0, 0, 0, 1]
    assert first.states is not None
    assert first.states.dtype == np.float64


def test_frozen() -> None:
    with pytest.raises(AttributeError):
        make([2])[0].name = "other"  # type: ignore[misc]


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 12), n=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_subset(count: int, n: int, seed: int) -> None:
    demonstrations = make([2] * count, filters={"all": [f"demo_{i}" for i in range(count)]})
    if n > count:
        with pytest.raises(InputError, match=f"{n} asked for, {count} there"):
            demonstrations.subset(n, seed)
        return
    subset = demonstrations.subset(n, seed)
    assert subset.names == demonstrations.subset(n, seed).names  # deterministic
    assert len(set(subset.names)) == n
    assert list(subset.names) == sorted(subset.names, key=demonstrations.names.index)  # in order
    assert subset.filters["all"] == subset.names
    assert set(demonstrations.subset(max(n - 1, 1), seed).names) <= set(subset.names)  # nested


def test_subsets_differ_by_seed() -> None:
    demonstrations = make([1] * 50)
    assert len({demonstrations.subset(5, seed).names for seed in range(20)}) == 20


def test_select() -> None:
    demonstrations = make([2, 2, 2], filters={"good": ["demo_2", "demo_0"], "bad": ["demo_1"]})
    chosen = demonstrations.select("good")
    assert chosen.names == ("demo_0", "demo_2")  # the file's order
    assert set(chosen.filters) == {"good"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"actions": np.zeros((3, 2))}, "actions: 3"),
        ({"rewards": np.zeros(5)}, "rewards: 5"),
        ({"states": np.zeros((2, 9))}, "states: 2"),
        ({"observations": np.full((4, 3), np.nan)}, "demo_0/observations"),
        ({"actions": np.array([[0, 1], [np.inf, 0], [0, 0], [0, 0]])}, r"inf at index \(1, 0\)"),
        ({"observations": np.zeros(4)}, "number of axes"),
        ({"rewards": np.array(["a"] * 4)}, "not numbers"),
    ],
)
def test_trajectory_refuses(change: dict[str, np.ndarray], words: str) -> None:
    good = {"observations": np.zeros((4, 3)), "actions": np.zeros((4, 2)), "rewards": np.zeros(4), "dones": np.zeros(4)}
    Trajectory(**good)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=words):
        Trajectory(**(good | change))  # type: ignore[arg-type]


def test_any_observation_is_drawn(tmp_path: Path) -> None:
    """Data of another robot, without named parts and with a single number to see."""
    demonstrations = make([3, 5], s=1, a=1)
    summary = summarise(demonstrations)
    assert [d.name for d in summary.observations] == ["observation[0]"]
    assert [(g.name, g.count, g.length) for g in summary.operators] == [("unknown", 2, (3, 4.0, 5))]
    assert draw(demonstrations, tmp_path / "sub" / "d.png").stat().st_size > 1000


def test_constant_dimensions_are_reported() -> None:
    x = np.zeros((4, 2), np.float32)
    x[:, 1] = [0, 1, 0.5, -1]
    summary = summarise(Demonstrations.from_arrays([x], [x]))
    assert [d.narrow for d in summary.observations] == [True, False]
    assert summary.observations[0].off_by_a_hundredth > 1e4
    assert summary.actions[1].at_bound == 0.5


def test_demonstrations_refuse() -> None:
    empty = np.zeros((0, 3)), np.zeros((0, 2))
    with pytest.raises(InputError, match="no steps"):
        Demonstrations.from_arrays([empty[0]], [empty[1]])
    with pytest.raises(InputError, match="no trajectories"):
        Demonstrations(())
    with pytest.raises(InputError, match="differ in width"):
        Demonstrations((make([2])[0], make([2], a=4, names=["x"])[0]))
    with pytest.raises(InputError, match="same name"):
        make([2, 2], names=["x", "x"])
    with pytest.raises(InputError, match="mask/f"):
        make([2], filters={"f": ["demo_7"]})
    with pytest.raises(InputError, match="do not describe"):
        make([2], observation_keys=("a", "b"), observation_dims=(1, 1))
    with pytest.raises(InputError, match="no such filter"):
        make([2]).select("f")
    with pytest.raises(InputError, match="differ in length"):
        Demonstrations.from_arrays([np.zeros((2, 3))], [np.zeros((2, 2))] * 2)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, chunk=st.integers(1, 5), tail=st.sampled_from(["drop", "pad"]))
def test_windows_never_cross_trajectories(lengths: list[int], chunk: int, tail: str) -> None:
    demonstrations = make(lengths)
    if tail == "drop" and min(lengths) < chunk:
        with pytest.raises(InputError, match="shorter than the action chunk"):
            chunk_windows(demonstrations, chunk, tail=tail)
        return
    windows = chunk_windows(demonstrations, chunk, tail=tail)
    assert len(windows) == sum(n - chunk + 1 if tail == "drop" else n for n in lengths)
    assert windows.chunks.shape == (len(windows), chunk, 2)
    assert windows.chunks.dtype == windows.observations.dtype == np.float32
    for x, actions, i, step in zip(windows.observations, windows.chunks, windows.trajectory, windows.step):
        trajectory = demonstrations[int(i)]
        np.testing.assert_array_equal(x, trajectory.observations[step])
        for t in range(chunk):  # every action is the same trajectory's, its last one where it has run out
            np.testing.assert_array_equal(actions[t], trajectory.actions[min(step + t, len(trajectory) - 1)])
    assert len({(int(i), int(t)) for i, t in zip(windows.trajectory, windows.step)}) == len(windows)


def test_windows_are_normalised() -> None:
    demonstrations = make([8, 9], scale=7.0)
    normalization = Normalization.fit(demonstrations)
    windows = chunk_windows(demonstrations, 3, normalization=normalization)
    raw = chunk_windows(demonstrations, 3)
    np.testing.assert_array_equal(windows.chunks, normalization.normalize_action(raw.chunks))
    assert np.abs(windows.chunks).max() <= 1 + 1e-6
    with pytest.raises(InputError, match="tail"):
        chunk_windows(demonstrations, 3, tail="wrap")
    with pytest.raises(InputError, match="at least one action"):
        chunk_windows(demonstrations, 0)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-2, 1e3), shape=st.sampled_from([(), (5,), (2, 3)]))
def test_normalisation_round_trip(seed: int, scale: float, shape: tuple[int, ...]) -> None:
    normalization = Normalization.fit(make([20], seed=seed, scale=scale))
    rng = np.random.default_rng(seed)
    for part, width in (("observation", 3), ("action", 2)):
        there, back = getattr(normalization, f"normalize_{part}"), getattr(normalization, f"unnormalize_{part}")
        x = (3 * scale * rng.standard_normal((*shape, width))).astype(np.float32)  # outside the range too: nothing is clamped
        np.testing.assert_allclose(back(there(x)), x, rtol=1e-5, atol=1e-5 * scale)
        tensor = there(torch.from_numpy(x))
        assert isinstance(tensor, torch.Tensor)
        assert tensor.dtype == torch.float32
        np.testing.assert_allclose(tensor.numpy(), there(x), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(back(tensor).numpy(), x, rtol=1e-5, atol=1e-5 * scale)
        double = there(x.astype(np.float64))
        low, high = getattr(normalization, f"{part}_low"), getattr(normalization, f"{part}_high")
        np.testing.assert_allclose(double, 2 * (x.astype(np.float64) - low) / (high - low + 1e-6) - 1, rtol=1e-12)  # DPPO
    restored = Normalization.from_dict(json.loads(json.dumps(normalization.to_dict())))
    assert restored == normalization
    assert hash(restored) == hash(normalization)


def test_normalisation_statistics() -> None:
    full = make([5] * 20)
    subset = full.subset(2, 0)
    assert fit_normalization(subset, full) == Normalization.fit(full)
    assert fit_normalization(subset, full, "subset") == Normalization.fit(subset) != Normalization.fit(full)
    with pytest.raises(InputError, match="statistics"):
        fit_normalization(subset, full, "neither")
    identity = Normalization.identity(3, 2)
    np.testing.assert_allclose(identity.normalize_action(np.array([0.3, -1.0])), [0.3, -1.0], atol=1e-6)


def test_constant_dimension() -> None:
    """DPPO's rule divides by 1e-6; a minimum range keeps an unseen value from becoming huge."""
    x = np.zeros((4, 1), np.float32)
    demonstrations = Demonstrations.from_arrays([x], [x])
    assert Normalization.fit(demonstrations).normalize_observation(np.array([0.01]))[0] > 1e4
    widened = Normalization.fit(demonstrations, minimum_range=0.1)
    assert abs(widened.normalize_observation(np.array([0.01]))[0]) < 1
    assert Normalization.fit(demonstrations).unnormalize_action(np.array([1.0]))[0] == pytest.approx(0, abs=2e-6)


def test_normalisation_refuses() -> None:
    normalization = Normalization.identity(3, 2)
    with pytest.raises(InputError, match="another width"):
        normalization.normalize_observation(np.zeros((5, 4)))
    with pytest.raises(InputError, match="another width"):
        normalization.normalize_action(torch.zeros(3))
    with pytest.raises(InputError, match="incomplete"):
        Normalization.from_dict({"observation_low": [0.0]})
    with pytest.raises(InputError, match="not above"):
        Normalization(np.ones(2), np.zeros(2), np.zeros(1), np.ones(1))
