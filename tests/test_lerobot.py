"""PostBC under LeRobot: factors by frame, targets by view (any Python), and LeRobot's own training (where it is installed)."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("pyarrow")
pytest.importorskip("av")

from made import write_demonstrations
from postbc import cli
from postbc.data import Dataset, Windows, pusht, read_dataset
from postbc.data.lerobot_write import LeRobotWriter
from postbc.data.normalization import Normalization
from postbc.devices import Compute
from postbc.errors import InputError
from postbc.lerobot import hook
from postbc.lerobot.encoders import make_encoder
from postbc.lerobot.factors import About, Factors, write_factors
from postbc.lerobot.fit import chunk_rows, fit_factors, frame_features, inputs, read_frames
from postbc.lerobot.hook import hold_numbers
from postbc.lerobot.train import PostBC, Record, split, train
from postbc.lerobot.view import PosteriorDataset, Visit, with_epochs
from postbc.policies import load_policy
from postbc.posterior import EnsembleConfig
from postbc.posterior.calibration import calibrate
from postbc.posterior.ensemble import fit_ensemble
from postbc.schemas import read_json

SMALL = EnsembleConfig(ensemble_size=5, hidden=16, steps=30, batch_size=16)
DELTA = [-1, 0, 1, 2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lerobot")
    file = write_demonstrations(folder / "a.hdf5", 5, 12, images={"top_image": (64, 64, 3)})
    return LeRobotWriter(folder / "set", read_dataset(file, image_keys=["top_image"]), "x").write()


def factors_of(path: Path, rows: torch.Tensor, index: list[int], scale: float = 1.0) -> Factors:
    n, rank, d = rows.shape
    about = About("lerobot-factors", "0", tuple(DELTA[: d // 2]), 2, n, {})
    write_factors(path, about, torch.tensor(index), torch.full((d,), scale), rank, rows.split(2))
    return Factors(path)


# -- the file ------------------------------------------------------------------------------------------------------------------
def test_a_file_of_factors(tmp_path: Path) -> None:
    """The covariance is rowsᵀ·rows in raw units; a draw is decided by frame, seed and visit, in any process."""
    rows = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
    factors = factors_of(tmp_path / "f.safetensors", rows, [2, 3, 4, 7, 100], scale=2.0)
    drawn = torch.stack([factors.sample(3, 0, visit).flatten() for visit in range(20000)])
    covariance = 4 * rows[1].half().float().T @ rows[1].half().float()
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), covariance, atol=0.05 * covariance.abs().max(), rtol=0)
    assert drawn.mean(0).abs().max() < 0.1 * covariance.diagonal().sqrt().max()
    again = pickle.loads(pickle.dumps(factors))
    assert torch.equal(again.sample(3, 0, 5), factors.sample(3, 0, 5))
    assert len({factors.sample(*key).sum().item() for key in ((3, 0, 0), (3, 0, 1), (3, 1, 0), (7, 0, 0))}) == 4
    with pytest.raises(InputError, match="no posterior"):
        factors.sample(6, 0, 0)
    from safetensors.torch import load_file  # the format's own reader

    torch.testing.assert_close(load_file(tmp_path / "f.safetensors")["rows"], rows.half())


def test_what_is_no_file_of_factors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for name, write in (
        ("rubbish", lambda p: p.write_bytes(b"x" * 99)), ("other", lambda p: save_file({"rows": torch.zeros(2)}, p)),
        ("gone", lambda p: None),
        ("header", lambda p: save_file(
            {"rows": torch.zeros(2, 2, 2), "index": torch.zeros(2), "scale": torch.zeros(2)}, p, {"postbc": "{}"})),
    ):  # fmt: skip
        write(tmp_path / name)
        with pytest.raises(InputError, match=r"no file of factors|value cannot be used"):
            Factors(tmp_path / name)


# -- fitting -------------------------------------------------------------------------------------------------------------------
@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.lists(st.integers(-3, 6), min_size=1, max_size=5))
def test_chunks_are_lerobots(lengths: list[int], delta: list[int]) -> None:
    episode = np.repeat(np.arange(len(lengths)) * 3, lengths)
    rows, pad = chunk_rows(episode, delta)
    ends = np.cumsum(lengths)
    for i in range(len(episode)):
        last = int(ends[np.searchsorted(ends, i, side="right")])
        first = last - lengths[int(np.searchsorted(ends, i, side="right"))]
        assert rows[i].tolist() == [max(first, min(last - 1, i + d)) for d in delta]
        assert pad[i].tolist() == [not first <= i + d < last for d in delta]


def test_fit(tmp_path: Path, root: Path) -> None:
    """Of the frames of some episodes, keyed by the dataset's numbers; what lies beyond an episode has no spread."""
    frames = read_frames(root, [4, 1])
    assert frames.index.tolist() == [*range(12, 24), *range(48, 60)]
    dataset = read_dataset(root)
    np.testing.assert_array_equal(frames.actions, np.concatenate([dataset[1].actions, dataset[4].actions]))
    np.testing.assert_array_equal(frames.numbers, np.concatenate([dataset[1].state, dataset[4].state]))
    assert frames.fingerprint != read_frames(root).fingerprint

    def means(camera: str, images: torch.Tensor) -> torch.Tensor:
        assert (camera, images.shape[1:]) == ("observation.images.top", (3, 64, 64))
        return images.mean((2, 3))

    cameras = ["observation.images.top"]
    seen = frame_features(root, frames, means, cameras)
    pixels = np.asarray(read_dataset(root, image_keys=["image.top"])[4].observations["image.top"][:])
    np.testing.assert_allclose(seen[12:, 19:], pixels.mean((2, 3)) / 255, atol=1e-6)
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    spreads = [fit_factors(path, root, frames, DELTA, SMALL, 0, encode=means, cameras=cameras) for path in paths]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert spreads[0] > 0.01
    factors = Factors(paths[0])
    assert factors.about.delta_indices == tuple(DELTA)
    for index, inside in ((12, [0, 1, 1, 1]), (59, [1, 1, 0, 0]), (30, None), (50, [1, 1, 1, 1])):
        if inside is None:
            with pytest.raises(InputError, match="no posterior"):
                factors.sample(index, 0, 0)
        else:
            drawn = torch.stack([factors.sample(index, 0, visit) for visit in range(50)])
            assert (drawn.abs().amax((0, 2)) > 0).tolist() == [bool(i) for i in inside]


def test_alpha_by_trajectories_left_out(tmp_path: Path) -> None:
    """The core's calibration of the same ensemble; frames whose chunk leaves the episode are not held against it."""
    rng = np.random.default_rng(0)
    states = [rng.normal(size=(15, 3)) for _ in range(8)]
    actions = [x[:, :2] + 0.3 * rng.normal(size=2) + 0.1 * rng.normal(size=(15, 2)) for x in states]
    made = Dataset.from_arrays(states, actions)
    folder = LeRobotWriter(tmp_path / "set", made, "x", fps=10).write()
    config, delta = EnsembleConfig(ensemble_size=12, hidden=16, steps=60, batch_size=32), [0, 1, 2]
    frames = read_frames(folder)
    for name, calibrated in (("plain", False), ("auto", True)):
        fit_factors(tmp_path / name, folder, frames, delta, config, 3, calibrated=calibrated)
    plain, auto = Factors(tmp_path / "plain"), Factors(tmp_path / "auto")
    assert plain.about.calibration is None
    assert torch.equal(plain.rows, auto.rows)
    found = auto.about.calibration
    assert found is not None
    windows = Windows(made, 3)  # those that lie in their episode
    rows, pad = chunk_rows(frames.episode, delta)
    assert (~pad.any(1)).sum() == len(windows)
    norm = Normalization(frames.numbers.min(0), frames.numbers.max(0), frames.actions.min(0), frames.actions.max(0))
    seen, chunks = (
        norm.normalize_state(torch.from_numpy(frames.numbers)),
        norm.normalize_action(torch.from_numpy(frames.actions[rows])),
    )
    ensemble = fit_ensemble(seen, chunks, frames.episode, config, 3, Compute(device="cpu"))
    inside = torch.from_numpy(~pad.any(1))
    without = ensemble.out_of_bag(seen, chunks, torch.from_numpy(frames.episode), 3)
    whole = inside[torch.isin(torch.from_numpy(frames.episode), without.trajectory)]
    expected = calibrate(without.of(whole), seed=3)
    assert (found.windows, found.trajectories) == (int(whole.sum()), expected.trajectories)
    assert found.posterior_weight == expected.posterior_weight
    np.testing.assert_allclose(np.array(found.curve), np.array(expected.curve), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="as long as a chunk"):
        fit_factors(tmp_path / "long", folder, frames, list(range(16)), config, 3, calibrated=True)


def test_the_posterior_sees_what_the_policy_sees() -> None:
    camera, depth, state = "observation.images.top", "observation.images.depth", "observation.state"
    meta = types.SimpleNamespace(
        features={state: {}, camera: {}, depth: {}, "action": {}}, camera_keys=[camera, depth], depth_keys=[depth]
    )
    for chosen, renamed, expected in (
        ({}, {}, (state, camera)), ({state: 0}, {}, (state,)), ({"camera": 0}, {camera: "camera"}, (camera,)),
        ({depth: 0, state: 0}, {}, (state,)),
    ):  # fmt: skip
        assert inputs(types.SimpleNamespace(input_features=chosen), meta, renamed) == expected


# -- the view ------------------------------------------------------------------------------------------------------------------
class Base:
    """What the view needs of a LeRobotDataset."""

    fps = 10
    delta_timestamps = {"action": [d / 10 for d in DELTA]}  # noqa: RUF012
    meta = "meta"

    def __len__(self) -> int:
        return 6

    def __getitem__(self, place: int) -> dict[str, Any]:
        pad = torch.tensor([place == 0, False, False, place == 5])
        return {"action": torch.full((4, 2), float(place)), "action_is_pad": pad, "index": torch.tensor(place + 10)}

    def __getitems__(self, places: list[int]) -> None:
        raise AssertionError("past the view")


def view(tmp_path: Path, weight: float) -> PosteriorDataset:
    rows = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(1))
    return PosteriorDataset(Base(), factors_of(tmp_path / "f.safetensors", rows, list(range(10, 16))), weight, 3)


def test_the_view(tmp_path: Path) -> None:
    seen = view(tmp_path, 2.0)
    assert (len(seen), seen.meta) == (6, "meta")
    for place in range(6):
        item, plain = seen[Visit(place, 4)], Base()[place]
        w = seen.factors.sample(place + 10, 3, 4)
        expected = plain["action"] + 2 * w * ~plain["action_is_pad"][:, None]
        torch.testing.assert_close(item["action"], expected)
        assert torch.equal(view(tmp_path, 0.0)[place]["action"], plain["action"])
    assert not torch.equal(seen[Visit(1, 0)]["action"], seen[Visit(1, 1)]["action"])

    class Other(Base):
        delta_timestamps = {"action": [0.0]}  # noqa: RUF012

    with pytest.raises(InputError, match="other chunks"):
        PosteriorDataset(Other(), seen.factors, 1.0, 0)


class Sampler:
    """LeRobot's, as far as the view relies on it: `__iter__` moves on to the next epoch."""

    epoch = 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def __iter__(self) -> Any:
        self.epoch += 1
        return iter([2, 0, 1, 5, 4, 3])

    def __len__(self) -> int:
        return 6


def test_workers_and_resumed_runs_draw_the_same(tmp_path: Path) -> None:
    """Epochs travel with the places to whoever reads; each epoch draws afresh."""

    def collate(items: list[dict[str, Any]]) -> torch.Tensor:
        return torch.stack([item["action"] for item in items])

    def run(workers: int, epochs: int, first: int = 0) -> list[torch.Tensor]:
        sampler = with_epochs(Sampler)()
        sampler.epoch = first
        context = multiprocessing.get_context("fork") if workers else None
        loader = torch.utils.data.DataLoader(view(tmp_path, 1.0), 2, sampler=sampler, num_workers=workers, collate_fn=collate,
                                             persistent_workers=workers > 0, multiprocessing_context=context)  # fmt: skip
        return [torch.cat(list(loader)) for _ in range(epochs)]

    alone = run(0, 3)
    assert all(torch.equal(a, b) for a, b in zip(alone, run(2, 3)))
    assert torch.equal(alone[2], run(0, 1, first=2)[0])
    assert not torch.equal(alone[0], alone[1])
    assert torch.equal(pickle.loads(pickle.dumps(view(tmp_path, 1.0)))[Visit(2, 0)]["action"], alone[0][0])


# -- the command ---------------------------------------------------------------------------------------------------------------
def test_arguments() -> None:
    asked = split(["--policy.type=act", "--postbc.weight=0.5", "--steps", "5", "--postbc.factors", "f", "--postbc.seed=3"])
    assert asked.theirs == ("--policy.type=act", "--steps", "5")
    assert asked.options() == PostBC(weight=0.5, factors=Path("f"), seed=3)
    assert split(["--postbc.weight=2"]).options(asked.options()) == PostBC(weight=2.0, factors=Path("f"), seed=3)
    assert split(["--postbc.ensemble.hidden=8"]).options().ensemble.ensemble_size == 20
    assert split(["--postbc.weight=auto"]).options().weight == "auto"


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["lerobot", "train", "--help"])
    assert end.value.code == 0
    assert "--postbc.weight" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        cli.main(["lerobot", "train", "--postbc.wight=1"])
    assert end.value.code == 2
    with pytest.raises(SystemExit):
        cli.main(["lerobot", "train", "--postbc.weight=-1"])
    assert "greater than or equal to 0" in capsys.readouterr().err


def script(monkeypatch: pytest.MonkeyPatch, source: str, version: str = "0.6.1") -> Any:
    module = types.ModuleType(hook.SCRIPT)
    exec(source, module.__dict__)
    for name in ("lerobot", "lerobot.scripts"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, hook.SCRIPT, module)
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    return module


KNOWN = """
def make_train_eval_datasets(cfg): return "training", "held out"
class EpisodeAwareSampler:
    state_dict = load_state_dict = set_epoch = None
def save_checkpoint(checkpoint_dir, step): saved.append((checkpoint_dir, step))
def submit_to_hf(cfg): saved.append("a machine is paid for")
saved = []
job = None
def train():
    if job: return submit_to_hf(job)
    made = make_train_eval_datasets(1), EpisodeAwareSampler
    save_checkpoint(checkpoint_dir="000005", step=5)
    return made
def main(): return train()
"""


class Ours:
    """What LeRobot's training asks of us."""

    def __init__(self) -> None:
        self.told: list[Path] = []

    def view(self, cfg: Any, dataset: Any) -> str:
        return f"{dataset} {cfg} wrapped"

    def saved(self, checkpoint: Path) -> None:
        self.told.append(checkpoint)


def test_the_hook_is_put_in_and_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    module, ours = script(monkeypatch, KNOWN), Ours()
    before = dict(module.__dict__)
    with hook.trained_on(ours) as inside:
        (training, held_out), sampler = inside.main()
    assert (training, held_out) == ("training 1 wrapped", "held out")
    assert issubclass(sampler, before["EpisodeAwareSampler"])
    assert (module.saved, ours.told) == ([("000005", 5)], [Path("000005")])
    with pytest.raises(KeyboardInterrupt), hook.trained_on(ours):
        raise KeyboardInterrupt
    assert module.__dict__ == before


def test_plain_training_is_never_passed_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job for a rented machine is refused before it is sent; of a script that asks for no dataset one is told."""
    module = script(monkeypatch, KNOWN + "\njob = 'a10g'")
    with pytest.raises(InputError, match=r"(?s)train plainly.*job\.target"):
        hook.lerobot_train([], Ours())
    assert module.saved == []
    script(monkeypatch, KNOWN.replace("def main(): return train()", "def main(): return None"))
    with pytest.raises(InputError, match="then plainly"):
        hook.lerobot_train([], Ours())


def test_a_lerobot_that_moved_what_is_replaced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, KNOWN, "0.6.2")
    with pytest.warns(UserWarning, match=r"0\.6\.2 has not been tried"):
        hook.training_script()
    script(monkeypatch, KNOWN.replace(" = set_epoch", ""))
    with pytest.raises(InputError, match="EpisodeAwareSampler"):
        hook.training_script()
    script(monkeypatch, KNOWN.replace("made = make_train_eval_datasets(1)", "made = factory.make(1)"), "0.9.0")
    with pytest.raises(InputError, match=r"(?s)another way.*0\.9\.0.*make_train_eval_datasets.*lerobot==0\.6\.1"):
        hook.training_script()
    with pytest.raises(InputError, match=r"reads in another way"):
        hold_numbers(Base())


# -- where LeRobot is installed (make test-lerobot) ------------------------------------------------------------------------------
COMMON = ["--policy.device=cpu", "--policy.push_to_hub=false", "--batch_size=16", "--env_eval_freq=0", "--log_freq=0"]
DIFFUSION = [
    "--policy.type=diffusion", "--policy.n_obs_steps=2", "--policy.horizon=8", "--policy.n_action_steps=4",
    "--policy.down_dims=[16,32]", "--policy.noise_scheduler_type=DDIM", "--policy.num_inference_steps=4",
    "--policy.do_mask_loss_for_padding=true", "--policy.pretrained_backbone_weights=null", "--policy.crop_shape=null",
]  # fmt: skip
ACT = [
    "--policy.type=act", "--policy.chunk_size=8", "--policy.n_action_steps=4", "--policy.dim_model=32", "--policy.n_heads=2",
    "--policy.dim_feedforward=64", "--policy.n_encoder_layers=1", "--policy.n_vae_encoder_layers=1",
    "--policy.pretrained_backbone_weights=null",
]  # fmt: skip
FIT = [
    "--postbc.encoder=random",
    "--postbc.ensemble.ensemble-size=4",
    "--postbc.ensemble.hidden=16",
    "--postbc.ensemble.steps=20",
]
CONFIG = "pretrained_model/train_config.json"
needs_lerobot = pytest.mark.skipif(importlib.util.find_spec("lerobot") is None, reason="needs LeRobot: make test-lerobot")


def data(root: Path) -> list[str]:
    return ["--dataset.repo_id=postbc/test", f"--dataset.root={root}"]


def plainly(*arguments: str) -> None:
    module, given = hook.training_script(), sys.argv
    sys.argv = ["lerobot-train", *arguments]
    try:
        module.main()
    finally:
        sys.argv = given


def weights(output: Path, step: str = "last") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(output / "checkpoints" / step / "pretrained_model/model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@needs_lerobot
def test_this_lerobot_has_what_is_replaced() -> None:
    from importlib.metadata import version

    hook.training_script()
    assert version("lerobot") in hook.VERSIONS


@needs_lerobot
@pytest.mark.parametrize("video", [False, True])
def test_numbers_in_memory_are_the_same_items(tmp_path: Path, video: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of some episodes, with windows of actions and frames: every key, type and bit; and LeRobot's library is asked no longer."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    file = write_demonstrations(tmp_path / "a.hdf5", 4, 6, images={"top_image": (32, 32, 3)})
    LeRobotWriter(tmp_path / "set", read_dataset(file, image_keys=["top_image"]), "x", video=video).write()
    camera = "observation.images.top"

    def read() -> Any:
        times = {"action": [-0.05, 0.0, 0.05], "observation.state": [-0.05, 0.0], camera: [-0.05, 0.0]}
        return LeRobotDataset("postbc/test", tmp_path / "set", episodes=[1, 3], delta_timestamps=times)

    import datasets

    plain, held = read(), read()
    hold_numbers(held)
    assert len(plain) == len(held) == 12
    asked: set[str] = set()
    getitem = datasets.Dataset.__getitem__

    def watched(table: Any, key: Any) -> Any:
        asked.update(() if table is held.meta.episodes else table.column_names)
        return getitem(table, key)

    for place in range(12):
        expected = plain[place]
        with monkeypatch.context() as patch:
            patch.setattr(datasets.Dataset, "__getitem__", watched)
            found = held[place]
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert type(found[key]) is type(value)
            if isinstance(value, str):
                assert found[key] == value
            else:
                assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape)
                assert torch.equal(found[key], value)
        found["action"].zero_()  # an item is nobody else's
        assert torch.equal(held[place]["action"], expected["action"])
    assert asked == (set() if video else {camera})
    assert torch.equal(pickle.loads(pickle.dumps(held.hf_dataset))["action"][[3]][0], plain[3]["action"][1])


@needs_lerobot
@pytest.mark.parametrize("videos", [False, True])
def test_a_dataset_that_lerobot_wrote(tmp_path: Path, videos: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """LeRobotDataset.create, add_frame, save_episode: numbers and PNGs as they were given, by our reader and by LeRobot's in memory."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    camera, rng = "observation.images.wrist", np.random.default_rng(0)
    features = {
        "observation.state": {"dtype": "float32", "shape": (3,), "names": ["x", "y", "z"]},
        "observation.grid": {"dtype": "float32", "shape": (2, 2), "names": None},
        "action": {"dtype": "float32", "shape": (2,), "names": ["a", "b"]},
        "next.success": {"dtype": "bool", "shape": (1,), "names": None},
        camera: {"dtype": "video" if videos else "image", "shape": (64, 64, 3), "names": ["height", "width", "channels"]},
    }
    made = LeRobotDataset.create("postbc/test", 10, features, root=tmp_path / "set", use_videos=videos)
    episodes = []
    for e, n in enumerate((5, 7)):
        frames = np.broadcast_to(np.linspace(20, 220, n).astype(np.uint8)[:, None, None, None], (n, 64, 64, 3))
        parts = {
            "observation.state": rng.normal(size=(n, 3)).astype(np.float32), "action": rng.normal(size=(n, 2)).astype(np.float32),
            "observation.grid": rng.normal(size=(n, 2, 2)).astype(np.float32), "next.success": np.arange(n)[:, None] == n - 1,
            camera: np.ascontiguousarray(frames),
        }  # fmt: skip
        for t in range(n):
            made.add_frame({key: values[t] for key, values in parts.items()} | {"task": f"task {e}"})
        made.save_episode()
        episodes.append(parts)
    made.finalize()

    ours = read_dataset(tmp_path / "set", image_keys=["wrist"], observation_keys=["observation.state", "observation.grid"])
    assert (len(ours), ours.tasks) == (2, ("task 0", "task 1"))
    for episode, parts in zip(ours, episodes):
        flat = np.concatenate([parts["observation.state"], parts["observation.grid"].reshape(-1, 4)], 1)
        np.testing.assert_array_equal(episode.state, flat)
        np.testing.assert_array_equal(episode.actions, parts["action"])
        assert episode.rewards is not None
        np.testing.assert_array_equal(episode.rewards, parts["next.success"][:, 0])
        seen = np.moveaxis(np.asarray(episode.observations["image.wrist"][:]), 1, -1).astype(int)
        assert np.abs(seen - parts[camera]).max() <= (4 if videos else 0)  # a video is not exact
    plain, held = (LeRobotDataset("postbc/test", tmp_path / "set") for _ in range(2))
    hold_numbers(held)
    for place in (0, 8):
        for key, value in plain[place].items():
            assert value == held[place][key] if isinstance(value, str) else torch.equal(value, held[place][key]), key


@needs_lerobot
@pytest.mark.parametrize("policy", [DIFFUSION, ACT])
def test_nothing_is_plain_training(tmp_path: Path, root: Path, policy: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """α = 0 is lerobot-train to the bit, workers or not; α = 1 is not, and its checkpoint is a plain policy's."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    common = [*data(root), *COMMON, *policy, "--steps=3", "--dataset.eval_split=0.2", "--seed=7"]
    factors = f"--postbc.factors={tmp_path / 'f.safetensors'}"
    plainly(*common, f"--output_dir={tmp_path / 'plain'}", "--num_workers=0")
    for name, more in (
        ("zero", ["--postbc.weight=0", "--num_workers=0"]),
        ("one", ["--num_workers=0"]),
        ("two", ["--num_workers=2"]),
    ):
        arguments = ["lerobot", "train", *common, *FIT, factors, f"--output_dir={tmp_path / name}", *more]
        if policy is ACT and name != "zero":
            with pytest.warns(UserWarning, match="deterministic"):
                assert cli.main(arguments) == 0
        else:
            assert cli.main(arguments) == 0
        assert (tmp_path / "f.safetensors").exists() == (name != "zero")  # nothing is fitted for nothing
    plain, zero, one, two = (weights(tmp_path / name) for name in ("plain", "zero", "one", "two"))
    assert same(plain, zero)
    assert not same(plain, one)
    for key in one:  # LeRobot's own runs differ so much between numbers of workers
        torch.testing.assert_close(one[key], two[key], atol=1e-4, rtol=1e-3)
    configs = [
        json.loads((tmp_path / n / "checkpoints/last/pretrained_model/config.json").read_text()) for n in ("plain", "one")
    ]
    assert configs[0] == configs[1]
    assert Factors(tmp_path / "f.safetensors").about.frames == 48  # without the held-out episode
    other = [
        "lerobot",
        "train",
        *data(root),
        *COMMON,
        *policy,
        factors,
        *FIT,
        "--steps=1",
        f"--output_dir={tmp_path / 'other'}",
    ]
    assert cli.main([*other, "--seed=7"]) == 2  # all five episodes
    assert (
        cli.main([*other, "--dataset.eval_split=0.2", f"--output_dir={tmp_path / 'another'}", "--postbc.ensemble.hidden=17"])
        == 2
    )


@needs_lerobot
def test_resumed_is_undisturbed(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, across the border of an epoch (60 frames, 16 a step), with the options that the checkpoint keeps."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    common = [*data(root), *COMMON, *DIFFUSION, *FIT, f"--postbc.factors={tmp_path / 'f.safetensors'}", "--postbc.weight=1.5"]
    run = ["lerobot", "train", *common, "--steps=7", "--num_workers=1", "--dataloader_multiprocessing_context=fork"]
    assert cli.main([*run, f"--output_dir={tmp_path / 'whole'}"]) == 0
    assert cli.main([*run, "--save_freq=3", f"--output_dir={tmp_path / 'cut'}"]) == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    last = tmp_path / "cut/checkpoints/last"
    last.unlink()
    last.symlink_to("000003")
    before = weights(tmp_path / "cut", "000007")
    assert cli.main(["lerobot", "train", f"--config_path={last / CONFIG}", "--resume=true"]) == 0
    assert same(weights(tmp_path / "cut", "000007"), before)


@needs_lerobot
def test_what_a_run_was_asked_for(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is in each checkpoint; a run that died before its first one begins again; one that does not say it is not resumed."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    output, factors = tmp_path / "out", tmp_path / "f.safetensors"
    eight = [*FIT[:1], "--postbc.ensemble.ensemble-size=8", *FIT[2:], f"--postbc.factors={factors}"]
    run = ["lerobot", "train", *data(root), *COMMON, *DIFFUSION, *eight, "--num_workers=0", "--steps=1"]
    auto = [*run, "--postbc.weight=auto", f"--output_dir={output}"]

    def dies(**_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hook.training_script(), "make_policy", dies)
        with pytest.raises(KeyboardInterrupt):
            train(split(auto[2:]))
    assert factors.exists()
    assert cli.main(auto) == 0
    found = Factors(factors).about.calibration
    assert found is not None
    assert f"α = {found.posterior_weight:.2f}" in capsys.readouterr().out
    checkpoint = output / "checkpoints/000001"
    record = read_json(checkpoint / "postbc.json", Record)
    assert (record.options.weight, record.posterior_weight) == ("auto", found.posterior_weight)
    assert record.posterior_weight_source == f"{found.source}: {found.reason}"

    (checkpoint / "postbc.json").unlink()
    resume = ["lerobot", "train", f"--config_path={checkpoint / CONFIG}", "--resume=true", "--steps=2"]
    assert cli.main(resume) == 2
    assert "not known what PostBC was asked for" in capsys.readouterr().err
    assert cli.main([*resume, *eight, "--postbc.weight=0.5"]) == 0
    assert read_json(output / "checkpoints/000002/postbc.json", Record).posterior_weight == 0.5

    fitted = [f"--postbc.factors={tmp_path / 'g'}", f"--output_dir={tmp_path / 'a'}"]
    assert cli.main([*run, *fitted]) == 0
    assert cli.main([*run, fitted[0], "--postbc.weight=auto", f"--output_dir={tmp_path / 'b'}"]) == 2
    assert "without finding α" in capsys.readouterr().err
    assert cli.main([*run, f"--output_dir={tmp_path / 'c'}", "--job.target=a10g-small"]) == 2
    assert "train plainly" in capsys.readouterr().err


@needs_lerobot
def test_two_processes(tmp_path: Path, root: Path) -> None:
    """Started by accelerate: the first fits, the second trains on what it finds."""
    factors, output = tmp_path / "f.safetensors", tmp_path / "out"
    run = ["lerobot", "train", *data(root), *COMMON, *DIFFUSION, *FIT, "--num_workers=0", "--steps=2",
           f"--postbc.factors={factors}", f"--output_dir={output}"]  # fmt: skip
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "postbc"]  # what accelerate's launcher runs
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", *launch, *run], capture_output=True, text=True, env=environment, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    assert said.count("Posterior of 60 frames") == 1
    state = json.loads((output / "checkpoints/last/training_state/training_step.json").read_text())
    assert state["num_processes"] == 2
    assert Factors(factors).about.frames == 60


@needs_lerobot
@pytest.mark.parametrize("chosen", [[], ['--policy.input_features={"observation.state": {"type": "STATE", "shape": [9]}, '
                                         '"observation.environment_state": {"type": "ENV", "shape": [10]}}']])  # fmt: skip
def test_the_posterior_sees_the_policys_cameras(
    tmp_path: Path, root: Path, chosen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A camera that the policy does not read is not encoded for it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    policy = [a for a in DIFFUSION if not (chosen and ("backbone" in a or "crop" in a))]
    factors = tmp_path / "f.safetensors"
    run = [*data(root), *COMMON, *policy, *chosen, *FIT, "--num_workers=0", "--steps=1"]
    assert cli.main(["lerobot", "train", *run, f"--postbc.factors={factors}", f"--output_dir={tmp_path / 'out'}"]) == 0
    fit = Factors(factors).about.fit
    states = ["observation.state", "observation.environment_state"]
    assert fit["inputs"] == states + ([] if chosen else ["observation.images.top"])
    assert fit["encoder"] == (None if chosen else "random")


@needs_lerobot
def test_refused_by_a_streaming_dataset(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["lerobot", "train", *data(root), *COMMON, *DIFFUSION, "--dataset.streaming=true", "--steps=1",
                     f"--output_dir={tmp_path / 'out'}"]) == 2  # fmt: skip
    assert "streaming" in capsys.readouterr().err


@needs_lerobot
@pytest.mark.parametrize(
    ("policy", "mode"), [(DIFFUSION, "MEAN_STD"), (ACT, "MEAN_STD"), (DIFFUSION, "IDENTITY"), (DIFFUSION, "MIN_MAX")]
)
def test_the_encoder_of_a_checkpoint(
    tmp_path: Path, root: Path, policy: list[str], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sees frames as its policy did: normalised in the checkpoint's own mode."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lerobot.policies.factory import get_policy_class

    output, camera = tmp_path / "out", "observation.images.top"
    modes = f'{{"VISUAL": "{mode}", "STATE": "MIN_MAX", "ACTION": "MIN_MAX", "ENV": "MIN_MAX"}}'
    run = [*data(root), "--dataset.use_imagenet_stats=false", *COMMON, *policy, f"--policy.normalization_mapping={modes}"]
    plainly(*run, "--steps=1", "--num_workers=0", f"--output_dir={output}")
    checkpoint = output / "checkpoints/last/pretrained_model"
    encode = make_encoder(str(checkpoint))
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    known = {k: torch.tensor(v) for k, v in json.loads((root / "meta/stats.json").read_text())[camera].items()}
    seen = {"IDENTITY": images, "MEAN_STD": (images - known["mean"]) / (known["std"] + 1e-8),
            "MIN_MAX": 2 * (images - known["min"]) / (known["max"] - known["min"]) - 1}[mode]  # fmt: skip
    theirs = get_policy_class(policy[0][14:]).from_pretrained(checkpoint).eval()
    with torch.no_grad():
        expected = (
            theirs.diffusion.rgb_encoder[0](seen)  # of each camera its own
            if policy is DIFFUSION
            else theirs.model.backbone(seen)["feature_map"].mean((-2, -1))
        )
        torch.testing.assert_close(encode(camera, images), expected, atol=1e-5, rtol=1e-4)
    assert encode.among([camera, "observation.images.side"]) == (camera,)
    with pytest.raises(InputError, match="does not see this camera"):
        encode("observation.images.side", images)
    with pytest.raises(InputError, match="any of the cameras"):
        encode.among(["observation.images.side"])


def test_an_encoder_is_where_the_training_is() -> None:
    pytest.importorskip("torchvision")
    features = make_encoder("random", "meta")("observation.images.top", torch.rand(2, 3, 64, 64))
    assert (features.device.type, features.shape) == ("meta", (2, 512))


@needs_lerobot
@pytest.mark.parametrize("camera", [False, True])
def test_a_checkpoint_plays_as_ours(
    tmp_path: Path, root: Path, camera: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same actions as LeRobot's own processors and policy give for the same noise; saved and loaded; refused where it must be."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if not camera:
        states = read_dataset(root)
        root = LeRobotWriter(tmp_path / "states", states, "x").write()
    env = '--policy.normalization_mapping={"VISUAL": "MEAN_STD", "STATE": "MEAN_STD", "ACTION": "MIN_MAX", "ENV": "MIN_MAX"}'
    arguments = [*data(root), *COMMON, *DIFFUSION, env, "--steps=2", "--num_workers=0", f"--output_dir={tmp_path / 'out'}"]
    plainly(*[a for a in arguments if camera or "backbone" not in a])
    checkpoint = tmp_path / "out/checkpoints/last/pretrained_model"
    output = tmp_path / "imported"
    arguments = ["lerobot", "import", "--checkpoint", str(checkpoint), "--output", str(output), "--dataset", str(root)]
    assert cli.main([*arguments, "--inference-steps", "4"]) == 0
    assert cli.main(arguments) == 2  # never replaced
    policy = load_policy(output)
    dataset = read_dataset(root, image_keys=["image.top"] if camera else [])
    windows = Windows(dataset, 4, observation_steps=2)
    rows = torch.tensor([3, 20, 37])
    observation, noise = windows.observation(rows), torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = policy.normalization.unnormalize_action(policy.sample(policy.encode(observation), noise))
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
    from lerobot.policies.factory import make_pre_post_processors

    theirs = DiffusionPolicy.from_pretrained(checkpoint).eval()
    before, after = make_pre_post_processors(theirs.config, str(checkpoint))
    batch = {"observation.state": observation["state"][..., :9], "observation.environment_state": observation["state"][..., 9:]}
    if camera:
        batch["observation.images.top"] = observation["image.top"].float() / 255
    whole = torch.cat([noise[:, :1], noise, noise[:, -1:].expand(-1, 3, -1)], 1)  # of the horizon's 8, number 1 to 4 are played
    batch = before(batch)
    if camera:
        batch["observation.images"] = torch.stack([batch["observation.images.top"]], dim=-4)
    with torch.no_grad():
        expected = after(theirs.diffusion.generate_actions(batch, noise=whole))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert policy.about.facts["state_keys"] == list(dataset.state_keys)
    with pytest.raises(InputError, match="trained by LeRobot"):
        policy.loss(policy.encode(observation), noise, torch.Generator())
    (checkpoint / "config.json").write_text((checkpoint / "config.json").read_text().replace('"diffusion"', '"act"', 1))
    assert cli.main([*arguments[:-3], str(tmp_path / "other"), *arguments[-2:]]) == 2
    assert "nothing to choose among" in capsys.readouterr().err


@needs_lerobot
def test_pretrained_by_lerobot_finetuned_by_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Push-T: lerobot train, import, evaluate, Best-of-N and DSRL, each by its command."""
    pytest.importorskip("gym_pusht")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rng = np.random.default_rng(0)
    data_ = Dataset.from_arrays(
        [rng.uniform(0, 512, (20, 18)) for _ in range(4)], [rng.uniform(0, 512, (20, 2)) for _ in range(4)],
        state_keys=pusht.STATE_KEYS, state_dims=pusht.STATE_DIMS, environment=pusht.ENVIRONMENT,
    )  # fmt: skip
    folder = LeRobotWriter(tmp_path / "set", data_, "x").write()
    chosen = [*COMMON, *[a for a in DIFFUSION if "backbone" not in a], *FIT, "--steps=2", "--num_workers=0"]
    run = ["lerobot", "train", *data(folder), *chosen, f"--output_dir={tmp_path / 'out'}"]
    assert cli.main([*run, f"--postbc.factors={tmp_path / 'f'}"]) == 0
    checkpoint = str(tmp_path / "out/checkpoints/last/pretrained_model")
    assert cli.main(["lerobot", "import", "--checkpoint", checkpoint, "--output", str(tmp_path / "policy"), "--dataset", str(folder),
                     "--inference-steps", "2"]) == 0  # fmt: skip
    policy = ["--policy", str(tmp_path / "policy")]
    assert cli.main(["evaluate", *policy, "--output", str(tmp_path / "evaluation"), "--episodes", "2", "--horizon", "12",
                     "--videos", "0"]) == 0  # fmt: skip
    assert cli.main(["finetune", "best-of-n", *policy, "--output", str(tmp_path / "best"), "--best-of-n.episodes", "4",
                     "--best-of-n.eval-episodes", "2", "--best-of-n.horizon", "12", "--best-of-n.num-envs", "2", "--iql.steps", "5",
                     "--iql.hidden", "16"]) == 0  # fmt: skip
    small = ["--dsrl.hidden", "16", "--training.budget-env-steps", "200", "--training.num-envs", "2", "--training.initial-steps", "50",
             "--training.eval-every", "100", "--training.eval-episodes", "2", "--training.horizon", "12"]  # fmt: skip
    assert cli.main(["finetune", "dsrl", *policy, "--output", str(tmp_path / "dsrl"), *small]) == 0
    assert list((tmp_path / "dsrl").glob("**/agent.safetensors"))
