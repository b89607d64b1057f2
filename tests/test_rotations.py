"""Quaternions of a state: found, their jumps said, and read as rotation matrices by policies and posteriors."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from made import write_demonstrations
from postbc import cli, doctor
from postbc.data.episodes import Dataset, Episode
from postbc.data.normalization import Normalization
from postbc.data.rotations import find_quaternions, rotation_6d, sign_jumps
from postbc.data.training_set import TrainingSetConfig, load_training_set
from postbc.data.windows import Windows
from postbc.errors import InputError
from postbc.policies.base import load_policy, save_policy
from postbc.policies.diffusion import DiffusionConfig, DiffusionPolicy
from postbc.posterior.ensemble import EnsembleConfig
from postbc.posterior.features import state_features
from postbc.posterior.saved import Posterior
from postbc.posterior.seeing import fit_seeing_ensemble

components = st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q) > 0.1)


@given(components, st.floats(0.1, 10))
@settings(max_examples=200, deadline=None)
def test_six_numbers_are_two_columns_of_scipys_matrix(q: list[float], size: float) -> None:
    expected = Rotation.from_quat(q).as_matrix()[:, :2].T.reshape(6)
    for sign in (size, -size):  # the sign and the length say nothing
        found = rotation_6d(torch.tensor(q, dtype=torch.float64) * sign)
        np.testing.assert_allclose(found, expected, atol=1e-9)


def test_no_quaternion_is_no_rotation() -> None:
    np.testing.assert_array_equal(rotation_6d(torch.zeros(2, 4)), [[1, 0, 0, 0, 1, 0]] * 2)


def jumping(steps: int = 30, episodes: int = 3) -> Dataset:
    """x, y, a quaternion that jumps, a gripper, an object that is not always there, and which of four tasks it is."""
    random = np.random.default_rng(0)
    made = []
    for i in range(episodes):
        turn = Rotation.from_rotvec(np.cumsum(0.02 * random.standard_normal((steps, 3)), 0) + 1).as_quat()
        turn *= np.where(np.arange(steps) % 5 == 0, -1, 1)[:, None]  # as mat2quat's sign where w is near 0
        other = Rotation.random(steps, random_state=i).as_quat() * (i > 0)
        task = np.eye(4)[[i] * steps]
        actions = random.uniform(-1, 1, (steps, 2)).astype(np.float32)
        state = np.concatenate((random.uniform(-1, 1, (steps, 2)), turn, random.random((steps, 1)), other, task), 1)
        made.append(Episode({"state": state.astype(np.float32)}, actions, name=f"demo_{i}"))
    return Dataset(tuple(made), ("state",), (15,))


def test_quaternions_are_found_and_nothing_else() -> None:
    data = jumping()
    assert find_quaternions(data) == (2, 7)
    assert sign_jumps(data, 2) == pytest.approx(11 / 29)  # out of step 0, into and out of each of 5, 10, … 25
    actions = np.zeros((9, 1), np.float32)
    for states, expected in (
        (data.states[:9, 1:], (1,)), (data.states[-9:, 1:], (1, 6)), (data.states[:9, :5], ()), (data.states[:9, :3], ()),
        (np.zeros((9, 8), np.float32), ()), (1.1 * data.states[-9:], ()),
    ):  # fmt: skip
        assert find_quaternions(Dataset((Episode({"state": states}, actions),))) == expected


# -- in a policy ---------------------------------------------------------------------------------------------------------------------
def test_of_those_that_overlap_the_nearer_is_taken_and_keys_are_not_crossed() -> None:
    random = np.random.default_rng(0)
    turn = Rotation.from_rotvec([[np.pi, 0, 0]]) * Rotation.from_rotvec(0.01 * random.standard_normal((50, 3)))
    state = np.concatenate((random.uniform(0.4, 0.5, (50, 2)), random.uniform(0, 0.01, (50, 1)), turn.as_quat()), 1).astype(
        np.float32
    )
    episode = Episode({"state": state}, np.zeros((50, 1), np.float32))
    assert find_quaternions(Dataset((episode,))) == (3,)  # not (2,): height, x, y, z, as w is near 0
    assert find_quaternions(Dataset((episode,), ("a", "b"), (5, 2))) == ()


def flipped(states: torch.Tensor) -> torch.Tensor:
    states = states.clone()
    states[..., [2, 3, 4, 5, 7, 8, 9, 10]] *= -1
    return states


def test_a_normalised_state_has_no_signs() -> None:
    data = jumping()
    plain, norm = (Normalization.fit(data, rotations=how) for how in ("as-recorded", "6d"))
    states = torch.from_numpy(data.states).view(3, 30, 15)
    found = norm.normalize_state(states)
    assert (norm.state_dim, norm.state_features, found.shape) == (15, 19, (3, 30, 19))
    assert torch.equal(found, norm.normalize_state(flipped(states)))
    others = [0, 1, 6, 11, 12, 13, 14]
    assert torch.equal(found[..., :7], plain.normalize_state(states)[..., others])
    assert torch.equal(found[..., 7:13], rotation_6d(states[..., 2:6]))
    assert found[..., 7:].abs().max() <= 1 + 1e-6
    again = Normalization.from_dict(json.loads(json.dumps(norm.to_dict())))
    assert torch.equal(again.normalize_state(states), found)
    assert set(plain.to_dict()) == {"state_low", "state_high", "action_low", "action_high"}  # files of before stay as they are


@pytest.mark.parametrize("quaternions", [[0, 3], [12], [-1], [7, 2], [True], "27", [2.0]])
def test_columns_that_hold_no_quaternions_are_refused(quaternions: object) -> None:
    with pytest.raises(InputError, match=r"[qQ]uaternions"):
        Normalization.from_dict({**Normalization.fit(jumping()).to_dict(), "quaternions": quaternions})


@pytest.mark.parametrize("steps", [1, 2])
def test_a_policy_sees_no_signs_and_keeps_that_in_its_file(tmp_path: Path, steps: int) -> None:
    data = jumping()
    norm = Normalization.fit(data, rotations="6d")
    policy = DiffusionPolicy(
        DiffusionConfig(hidden=16, layers=1), data.shapes, 2, 3, norm, torch.Generator().manual_seed(0), steps
    )
    assert policy.feature_dim == 19 * steps
    states = Windows(data, 3, observation_steps=steps).observation(torch.arange(9))["state"]
    noise = torch.randn(9, 3, 2, generator=torch.Generator().manual_seed(1))
    one, other = (policy.sample(policy.encode({"state": s}), noise) for s in (states, flipped(states)))
    assert torch.equal(one, other)
    save_policy(tmp_path / "policy.safetensors", policy)
    again = load_policy(tmp_path)
    assert torch.equal(again.sample(again.encode({"state": states}), noise), one)
    assert torch.equal(
        state_features(data.shapes, norm)({"state": states}), policy.encode({"state": states})
    )  # the posterior's


def test_members_with_encoders_of_their_own_see_none_either(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    seen = (Episode({**e.observations, "image.top": random.integers(0, 256, (len(e), 3, 8, 8), np.uint8)}, e.actions, name=e.name)
            for e in jumping())  # fmt: skip
    data = Dataset(tuple(seen), ("state",), (15,))
    windows, norm = Windows(data, 2), Normalization.fit(data, rotations="6d")
    config = EnsembleConfig(ensemble_size=2, hidden=8, layers=1, steps=2, batch_size=8, encoder="own")
    model = fit_seeing_ensemble(windows, norm, config, 0)
    Posterior(model, norm, "windows", 0).save(tmp_path)
    again = Posterior.load(tmp_path)
    observation = windows.observation(torch.arange(5))
    found = again.model.predict(observation, again.normalization)
    assert torch.equal(found, model.predict(observation, norm))
    assert torch.equal(found, model.predict({**observation, "state": flipped(observation["state"])}, norm))


# -- in training sets and what is said ---------------------------------------------------------------------------------------------
def test_jumps_are_warned_of_where_they_stay(tmp_path: Path) -> None:
    config = TrainingSetConfig(demonstrations=tmp_path, chunk=2)
    with pytest.warns(
        UserWarning, match=r"state\[2\] to state\[5\] changes its sign at 37.9% of the steps.*--data.rotations 6d"
    ):
        plain = load_training_set(config, 0, full=jumping())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        data = load_training_set(dataclasses.replace(config, rotations="6d"), 0, full=jumping())
    assert not [w for w in said if "sign" in str(w.message)]
    assert data.normalization.quaternions == (2, 7)
    assert plain.fingerprint != data.fingerprint  # a posterior of the one is not used with the other


def test_inspect_and_doctor_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_demonstrations(tmp_path / "d.hdf5", length=40)
    with h5py.File(path, "r+") as file:
        for demo in file["data"].values():
            turn = np.sqrt(0.5) * np.where(np.arange(40) % 2, 1, -1)
            demo["obs/robot0_eef_quat"][:] = np.stack((turn, 0 * turn, 0 * turn, -turn), 1)
    assert cli.main(["demos", "inspect", str(path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    name = "robot0_eef_quat[0] to robot0_eef_quat[3]"
    assert f"The quaternion {name} changes its sign at 100.0% of the steps, not its rotation: --data.rotations 6d." in said
    check = doctor.check_data(doctor.Study(path))
    assert (check.status, f"{name} at 100.0%" in check.found, "--data.rotations 6d" in check.remedy) == ("warn", True, True)
    assert "constant or nearly so: robot0_eef_quat[1], robot0_eef_quat[2]" in check.found
