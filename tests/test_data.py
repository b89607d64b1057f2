"""Episodes, datasets, subsets, filters, normalisation and windows."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postbc.data import Dataset, Episode, Normalization, Windows, fit_normalization, write_robomimic
from postbc.data.inspect import draw, draw_beside, summarise
from postbc.data.lazy import LazyArray
from postbc.data.robomimic import read_robomimic
from postbc.errors import InputError

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=6)


def make(lengths: list[int], seed: int = 0, s: int = 3, a: int = 2, scale: float = 1.0, **kwargs: Any) -> Dataset:
    """Episodes of the given lengths with uniform numbers in [-scale, scale]."""
    rng = np.random.default_rng(seed)
    states = [rng.uniform(-scale, scale, (n, s)).astype(np.float32) for n in lengths]
    actions = [rng.uniform(-scale, scale, (n, a)).astype(np.float32) for n in lengths]
    return Dataset.from_arrays(states, actions, **kwargs)


class Compared(str):
    """Text that counts how often it is compared."""

    times = 0

    def __eq__(self, other: object) -> bool:
        Compared.times += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_many_instructions_take_no_longer_than_many_episodes() -> None:
    """A task an episode: names are looked up, not compared one with another."""
    n = 300
    tasks = [Compared(f"put object {i} away") for i in range(n)]
    states, actions = np.zeros((1, 2), np.float32), np.zeros((1, 1), np.float32)
    episodes = tuple(Episode({"state": states}, actions, name=f"demo_{i}", task=Compared(task)) for i, task in enumerate(tasks))
    Compared.times = 0
    dataset = Dataset(episodes, tasks=tuple(tasks))
    assert dataset.count_tasks() == dict.fromkeys(tasks, 1)
    assert Compared.times < 20 * n
    with pytest.raises(InputError, match="not listed"):
        Dataset(episodes, tasks=tuple(tasks[1:]))


def with_frames(lengths: list[int], states: bool = True) -> Dataset:
    """Episodes with frames (3, 4, 5) whose first number tells the step, beside states or alone."""
    rng, steps, observations = np.random.default_rng(1), 0, []
    for n in lengths:
        frames = rng.integers(0, 256, (n, 3, 4, 5), dtype=np.uint8)
        frames[:, 0, 0, 0] = np.arange(steps, steps + n)
        observations.append({"image.top": frames, **({"state": rng.normal(size=(n, 2))} if states else {})})
        steps += n
    return Dataset.from_arrays(observations, [rng.uniform(-1, 1, (n, 2)) for n in lengths])


def test_plain_arrays_in() -> None:
    dataset = make(
        [4, 2], operators=["ann", None], states=[np.zeros((4, 5)), np.ones((2, 5))], rewards=[np.ones(4), np.ones(2)]
    )
    assert (len(dataset), dataset.num_steps) == (2, 6)
    assert dataset.shapes == {"state": (3,)}
    assert dataset.action_dim == 2
    assert (dataset.state_keys, dataset.state_dims) == (("state",), (3,))
    assert dataset.names == ("demo_0", "demo_1")
    first = dataset[0]
    assert first.operator == "ann"
    assert first.rewards is not None
    assert first.dones is None  # unknown unless given
    assert first.state.dtype == first.actions.dtype == first.rewards.dtype == np.float32
    assert first.states is not None
    assert first.states.dtype == np.float64
    copy = pickle.loads(pickle.dumps(first))
    np.testing.assert_array_equal(copy.state, first.state)


def test_frozen() -> None:
    episode = make([2])[0]
    with pytest.raises(AttributeError):
        episode.name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        episode.observations["state"] = np.zeros((2, 3))  # type: ignore[index]


def test_named_observations() -> None:
    dataset = with_frames([3, 4])
    assert dataset.shapes == {"image.top": (3, 4, 5), "state": (2,)}
    alone = with_frames([3, 4], states=False)
    assert alone.shapes == {"image.top": (3, 4, 5)}
    assert (alone.state_keys, alone[0].state.shape, alone.states.shape) == ((), (3, 0), (7, 0))
    with pytest.raises(InputError, match="one frame a step"):
        Dataset.from_arrays([{"image.top": np.zeros((3, 4, 5, 3))}], [np.zeros((3, 1))])  # not uint8
    with pytest.raises(InputError, match="at least one observation"):
        Dataset.from_arrays([{}], [np.zeros((3, 1))])
    with pytest.raises(InputError, match=r"demo_1/image.top"):
        Dataset((dataset[0], Episode({"state": np.zeros((3, 2))}, np.zeros((3, 2)), name="demo_1")))


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 12), n=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_subset(count: int, n: int, seed: int) -> None:
    dataset = make([2] * count, filters={"all": [f"demo_{i}" for i in range(count)]})
    if n > count:
        with pytest.raises(InputError, match=f"{n} asked for, {count} there"):
            dataset.subset(n, seed)
        return
    subset = dataset.subset(n, seed)
    assert subset.names == dataset.subset(n, seed).names  # deterministic
    assert len(set(subset.names)) == n
    assert list(subset.names) == sorted(subset.names, key=dataset.names.index)  # in order
    assert subset.filters["all"] == subset.names
    assert set(dataset.subset(max(n - 1, 1), seed).names) <= set(subset.names)  # nested


def test_subsets_differ_by_seed() -> None:
    dataset = make([1] * 50)
    assert len({dataset.subset(5, seed).names for seed in range(20)}) == 20


def test_subsets_are_those_of_the_first_house() -> None:
    assert make([1] * 36).subset(5, 0).names == ("demo_2", "demo_3", "demo_4", "demo_30", "demo_34")


def test_select() -> None:
    dataset = make([2, 2, 2], filters={"good": ["demo_2", "demo_0"], "bad": ["demo_1"]})
    chosen = dataset.select("good")
    assert chosen.names == ("demo_0", "demo_2")  # the file's order
    assert set(chosen.filters) == {"good"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"actions": np.zeros((3, 2))}, "actions: 3"),
        ({"rewards": np.zeros(5)}, "rewards: 5"),
        ({"states": np.zeros((2, 9))}, "states: 2"),
        ({"observations": {"state": np.full((4, 3), np.nan)}}, "demo_0/state"),
        ({"observations": {"state": np.full((4, 3), 1e300)}}, "float32"),
        ({"actions": np.array([[0, 1], [np.inf, 0], [0, 0], [0, 0]])}, r"inf at index \(1, 0\)"),
        ({"actions": np.zeros((4, 2), complex)}, "Complex"),
        ({"actions": np.zeros((4, 0))}, "at least one number"),
        ({"observations": {"state": np.zeros(4)}}, "number of axes"),
        ({"rewards": np.array(["a"] * 4)}, "not numbers"),
    ],
)
def test_episode_refuses(change: dict[str, Any], words: str) -> None:
    good: dict[str, Any] = {
        "observations": {"state": np.zeros((4, 3))}, "actions": np.zeros((4, 2)), "rewards": np.zeros(4), "dones": np.zeros(4)
    }  # fmt: skip
    Episode(**good)
    with pytest.raises(InputError, match=words):
        Episode(**(good | change))


def test_any_observation_is_drawn(tmp_path: Path) -> None:
    """Data of another robot, without named parts and with a single number to see; frames alone; names that look like formulas."""
    dataset = make([3, 5], s=1, a=1, operators=["$\\frac{$", "[/red]"])
    summary = summarise(dataset)
    assert [d.name for d in summary.observations] == ["state[0]"]
    assert [(g.name, g.count, g.length) for g in summary.operators] == [
        ("$\\frac{$", 1, (3, 3.0, 3)),
        ("[/red]", 1, (5, 5.0, 5)),
    ]
    assert summary.total.solved is None  # there are no rewards
    assert draw(dataset, tmp_path / "sub" / "d.png").stat().st_size > 1000
    assert draw(with_frames([3], states=False), tmp_path / "f.svg").stat().st_size > 1000


def test_pictures_replace_nothing(tmp_path: Path) -> None:
    path = write_robomimic(tmp_path / "data.png", make([3]))  # a data file of an unlucky name
    before = path.read_bytes()
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "data-2.png").symlink_to(tmp_path / "elsewhere")
    assert draw_beside(read_robomimic(path)).name == "data-3.png"
    assert path.read_bytes() == before
    assert (tmp_path / "elsewhere").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data-2.png", "data-3.png", "data.png", "elsewhere"]
    with pytest.raises(InputError, match="already"):
        draw(make([3]), path)
    with pytest.raises(InputError, match="ending"):
        draw(make([3]), tmp_path / "picture")
    with pytest.raises(InputError, match="directory"):
        draw(make([3]), tmp_path)


def test_constant_dimensions_are_reported() -> None:
    x = np.zeros((4, 2), np.float32)
    x[:, 1] = [0, 1, 0.5, -1]
    summary = summarise(Dataset.from_arrays([x], [x]))
    assert [d.narrow for d in summary.observations] == [True, False]
    assert summary.observations[0].off_by_a_hundredth > 1e4
    assert summary.actions[1].at_bound == 0.5


def test_datasets_refuse() -> None:
    with pytest.raises(InputError, match="no steps"):
        Dataset.from_arrays([np.zeros((0, 3))], [np.zeros((0, 2))])
    with pytest.raises(InputError, match="no episodes"):
        Dataset(())
    with pytest.raises(InputError, match="differ in width"):
        Dataset((make([2])[0], make([2], a=4, names=["x"])[0]))
    with pytest.raises(InputError, match="same name"):
        make([2, 2], names=["x", "x"])
    with pytest.raises(InputError, match="mask/f"):
        make([2], filters={"f": ["demo_7"]})
    with pytest.raises(InputError, match="do not describe"):
        make([2], state_keys=("a", "b"), state_dims=(1, 1))
    with pytest.raises(InputError, match="no such filter"):
        make([2]).select("f")
    with pytest.raises(InputError, match="differ in length"):
        Dataset.from_arrays([np.zeros((2, 3))], [np.zeros((2, 2))] * 2)


# -- windows ---------------------------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, chunk=st.integers(1, 5), tail=st.sampled_from(["drop", "pad", "mask"]), to=st.integers(1, 3))
def test_windows_never_cross_episodes(lengths: list[int], chunk: int, tail: Any, to: int) -> None:
    dataset = make(lengths)
    if tail == "drop" and min(lengths) < chunk:
        with pytest.raises(InputError, match="shorter than the action chunk"):
            Windows(dataset, chunk, tail=tail)
        return
    windows = Windows(dataset, chunk, tail=tail, observation_steps=to)
    assert len(windows) == sum(n - chunk + 1 if tail == "drop" else n for n in lengths)
    rows = torch.arange(len(windows))
    states, chunks = windows.observation(rows)["state"], windows.chunk(rows)
    assert chunks.shape == (len(windows), chunk, 2)
    assert states.shape == (len(windows), *((to,) if to > 1 else ()), 3)
    assert chunks.dtype == states.dtype == torch.float32
    for x, actions, i, step in zip(states.reshape(len(windows), to, 3), chunks, windows.episode, windows.step):
        episode = dataset[int(i)]
        for k in range(to):  # the newest last; before the first step the first observation again
            np.testing.assert_array_equal(x[k], episode.state[max(step - to + 1 + k, 0)])
        for t in range(chunk):  # every action is the same episode's, its last one where it has run out
            np.testing.assert_array_equal(actions[t], episode.actions[min(step + t, len(episode) - 1)])
    assert len({(int(i), int(t)) for i, t in zip(windows.episode, windows.step)}) == len(windows)
    inside = windows.inside(rows)
    assert (inside is None) == (tail != "mask")
    if inside is not None:
        expected = [[s + t < lengths[int(i)] for t in range(chunk)] for i, s in zip(windows.episode, windows.step)]
        assert inside.tolist() == expected


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("lazy", [True, False])
def test_frames(tmp_path: Path, lazy: bool, cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = with_frames([5, 3, 4])
    if lazy:
        dataset = read_robomimic(write_robomimic(tmp_path / "d.hdf5", dataset), image_keys=["image.top"])
        assert isinstance(dataset[0].observations["image.top"], LazyArray)
    if not cached:
        monkeypatch.setattr("postbc.data.windows.CACHE", 0)
    windows = Windows(dataset, 2, tail="pad", observation_steps=2)
    frames = windows.observation(torch.tensor([0, 4, 5, 11, 5]))["image.top"]
    assert frames.shape == (5, 2, 3, 4, 5)
    assert frames.dtype == torch.uint8
    assert frames[:, :, 0, 0, 0].tolist() == [[0, 0], [3, 4], [5, 5], [10, 11], [5, 5]]
    assert windows.fingerprint == Windows(with_frames([5, 3, 4]), 2, tail="pad", observation_steps=2).fingerprint


def test_a_file_of_50_gigabytes_is_never_read_whole(tmp_path: Path) -> None:
    """54 GB of frames (which the file, being empty, does not take): a batch reads its own."""
    with h5py.File(tmp_path / "d.hdf5", "w") as file:
        for i in range(2):
            demo = file.create_group(f"data/demo_{i}")
            demo["actions"] = np.zeros((1000, 2))
            demo.create_dataset("obs/top_image", (1000, 3000, 3000, 3), np.uint8, chunks=(1, 600, 600, 3))
    dataset = read_robomimic(tmp_path / "d.hdf5", observation_keys=[], image_keys=["top_image"])
    windows = Windows(dataset, 4)
    assert windows.observation(torch.tensor([3, 1500]))["image.top"].shape == (2, 3, 3000, 3000)


def test_many_frames_are_written_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = with_frames([5, 3])
    whole = read_robomimic(write_robomimic(tmp_path / "whole.hdf5", dataset), image_keys=["image.top"])
    monkeypatch.setattr("postbc.data.robomimic_write.LARGE", 100)
    pieces = read_robomimic(write_robomimic(tmp_path / "pieces.hdf5", dataset), image_keys=["image.top"])
    assert Windows(pieces, 2).fingerprint == Windows(whole, 2).fingerprint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pieces.hdf5", "whole.hdf5"]


def test_lazy_arrays(tmp_path: Path) -> None:
    dataset = with_frames([6])
    frames = np.asarray(dataset[0].observations["image.top"])
    path = write_robomimic(tmp_path / "d.hdf5", dataset)
    array = pickle.loads(pickle.dumps(LazyArray(path, "data/demo_0/obs/top_image", rows=(1, 6))))
    assert (array.shape, len(array), array.nbytes) == ((5, 3, 4, 5), 5, 300)
    for index in (0, -1, slice(1, 4), slice(0, 5, 2), slice(3, 1), [0, 1, 4], np.array([4, 4, 0])):
        np.testing.assert_array_equal(array[index], frames[1:][index])
    assert array[[]].shape == (0, 3, 4, 5)
    np.testing.assert_array_equal(np.asarray(array), frames[1:])
    for index in (5, [0, 7]):
        with pytest.raises(IndexError):
            array[index]


def test_fingerprint_is_of_the_contents() -> None:
    base = make([5, 6])
    prints = {
        Windows(base, 2).fingerprint, Windows(base, 3).fingerprint, Windows(base, 2, tail="pad").fingerprint,
        Windows(base, 2, observation_steps=2).fingerprint, Windows(make([5, 6], seed=1), 2).fingerprint,
        Windows(make([6, 5]), 2).fingerprint, Windows(with_frames([5, 6]), 2).fingerprint,
    }  # fmt: skip
    assert len(prints) == 7
    assert Windows(make([5, 6]), 2).fingerprint == Windows(base, 2).fingerprint


def test_windows_refuse() -> None:
    for change, words in (({"tail": "wrap"}, "tail"), ({"observation_steps": 0}, "at least one observation")):
        with pytest.raises(InputError, match=words):
            Windows(make([8]), 3, **change)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least one action"):
        Windows(make([8]), 0)


# -- normalisation ---------------------------------------------------------------------------------------------------------------
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-2, 1e3), shape=st.sampled_from([(), (5,), (2, 3)]))
def test_normalisation_round_trip(seed: int, scale: float, shape: tuple[int, ...]) -> None:
    normalization = Normalization.fit(make([20], seed=seed, scale=scale))
    rng = np.random.default_rng(seed)
    values = normalization.to_dict()
    for part, width in (("state", 3), ("action", 2)):
        there = getattr(normalization, f"normalize_{part}")
        x = torch.tensor(
            3 * scale * rng.standard_normal((*shape, width)), dtype=torch.float32
        )  # outside too: nothing is clamped
        if part == "action":
            torch.testing.assert_close(normalization.unnormalize_action(there(x)), x, rtol=1e-5, atol=1e-5 * scale)
        low, high = np.array(values[f"{part}_low"]), np.array(values[f"{part}_high"])
        np.testing.assert_allclose(there(x), 2 * (x.numpy() - low) / (high - low + 1e-6) - 1, rtol=1e-4, atol=1e-4)  # DPPO
    restored = Normalization.from_dict(json.loads(json.dumps(values)))
    assert restored.to_dict() == values


def test_normalisation_is_a_module() -> None:
    """Its buffers travel, and whoever loads other ones has their ends too."""
    one, other = Normalization.fit(make([20])), Normalization.fit(make([20], seed=1))
    assert set(one.state_dict()) == {"state_low", "state_scale", "action_low", "action_scale"}
    exact = other.to_dict()
    other.load_state_dict(other.state_dict())
    assert other.to_dict() == exact  # its own: to the last bit
    one.load_state_dict(other.state_dict())
    for key, values in one.to_dict().items():
        np.testing.assert_allclose(values, exact[key], atol=1e-6)
    x = torch.rand(4, 3)
    torch.testing.assert_close(one.normalize_state(x), other.normalize_state(x))
    assert one.double().normalize_state(x.double()).dtype == torch.float64


def test_normalisation_statistics() -> None:
    full = make([5] * 20)
    subset = full.subset(2, 0)
    assert fit_normalization(subset, full).to_dict() == Normalization.fit(full).to_dict()
    assert fit_normalization(subset, full, "subset").to_dict() == Normalization.fit(subset).to_dict()
    assert Normalization.fit(subset).to_dict() != Normalization.fit(full).to_dict()
    with pytest.raises(InputError, match="statistics"):
        fit_normalization(subset, full, "neither")  # type: ignore[arg-type]
    identity = Normalization.identity(3, 2)
    torch.testing.assert_close(
        identity.normalize_action(torch.tensor([0.3, -1.0])), torch.tensor([0.3, -1.0]), atol=1e-6, rtol=0
    )


def test_constant_dimension() -> None:
    """DPPO's rule divides by 1e-6; a minimum range keeps an unseen value from becoming huge."""
    x = np.zeros((4, 1), np.float32)
    dataset, unseen = Dataset.from_arrays([x], [x]), torch.tensor([0.01])
    assert Normalization.fit(dataset).normalize_state(unseen)[0] > 1e4
    assert abs(Normalization.fit(dataset, minimum_range=0.1).normalize_state(unseen)[0]) < 1
    assert Normalization.fit(dataset).unnormalize_action(torch.ones(1))[0] == pytest.approx(0, abs=2e-6)


def test_frames_alone_have_no_state_to_normalise() -> None:
    normalization = Normalization.fit(with_frames([4], states=False))
    assert (normalization.state_dim, normalization.action_dim) == (0, 2)
    assert normalization.normalize_state(torch.zeros(5, 0)).shape == (5, 0)
    assert Normalization.from_dict(normalization.to_dict()).state_dim == 0


def test_normalisation_refuses() -> None:
    normalization = Normalization.identity(3, 2)
    with pytest.raises(InputError, match="another width"):
        normalization.normalize_state(torch.zeros(5, 4))
    with pytest.raises(InputError, match="another width"):
        normalization.unnormalize_action(torch.zeros(3))
    for bad in ({"state_low": [0.0]}, {**normalization.to_dict(), "more": 1}, "text"):
        with pytest.raises(InputError, match="incomplete"):
            Normalization.from_dict(bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="numbers"):
        Normalization.from_dict({**normalization.to_dict(), "state_low": ["x", 0, 0]})
    for low, high in ((np.ones(2), np.zeros(2)), (np.zeros(2), np.full(2, np.inf)), (np.zeros(2), np.zeros(3))):
        with pytest.raises(InputError, match="not above"):
            Normalization(low, high, np.zeros(1), np.ones(1))
