"""The doctor finds what is broken, says what to do about it, and exits with 2 only where something required is broken."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import made
from postbc import cli, doctor
from postbc.data import Episode, read_robomimic, write_robomimic
from postbc.data.episodes import Dataset
from postbc.doctor import Check, Doctor, Study
from postbc.errors import InputError


def named(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", {"robosuite": "1.4.0", "mujoco": "3.3.0"}.get)
    for name in ("check_native_control", "check_rendering", "check_video", "check_pusht", "check_libero", "check_import"):
        monkeypatch.setattr(doctor, name, lambda name=name: Check(name, "ok", ""))


def test_all_is_well(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    healthy(monkeypatch)
    Doctor().run()
    assert "simulator" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("robosuite", "mujoco", "status"),
    [
        ("1.4.0", "3.3.0", "ok"),
        ("1.5.1", "3.3.0", "fail"),
        (None, None, "fail"),
        ("1.4.0", "3.17.0", "warn"),
        ("1.4.0", None, "fail"),
    ],
)
def test_simulator_versions(monkeypatch: pytest.MonkeyPatch, robosuite: str | None, mujoco: str | None, status: str) -> None:
    monkeypatch.setattr(doctor, "_version", {"robosuite": robosuite, "mujoco": mujoco}.get)
    monkeypatch.setattr(doctor, "check_import", lambda: None)
    check = doctor.check_simulator()
    assert check.status == status
    assert bool(check.remedy) == (status != "ok")


def test_a_missing_simulator_fails_with_a_remedy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    with pytest.raises(InputError, match=r"postbc\[robosuite\]"):
        Doctor().run()
    out = capsys.readouterr().out
    assert "robosuite missing" in " ".join(out.split())
    assert "native" not in out  # what needs the simulator is left out


def test_a_check_that_raises_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    healthy(monkeypatch)

    def broken() -> Check:
        raise OSError("libsomething.so: no such file\nsecond line")

    monkeypatch.setattr(doctor, "check_native_control", broken)
    check = named(doctor.diagnose())["native control"]
    assert check.status == "fail"
    assert check.found == "OSError: libsomething.so: no such file"


def test_what_is_wrong_with_data_is_said_with_its_own_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    healthy(monkeypatch)
    (tmp_path / "[bad].hdf5").write_text("no data")
    check = named(doctor.diagnose(Study(tmp_path / "[bad].hdf5")))["demonstrations"]
    assert check.status == "fail"
    assert "[bad].hdf5" in check.found
    assert "pip" not in check.remedy
    with pytest.raises(InputError, match="checks failed"):
        Doctor(Study(tmp_path / "[bad].hdf5")).run()


def test_the_file_is_named_as_everywhere_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    healthy(monkeypatch)
    path = made.write_demonstrations(tmp_path / "d.hdf5")
    monkeypatch.setattr(doctor, "check_demonstrations", lambda path, keys: Check("demonstrations", "ok", f"played {path.name}"))
    assert cli.main(["doctor", str(path)]) == 0
    assert "played d.hdf5" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["doctor", str(tmp_path / "none.hdf5")]) == 2
    assert "none.hdf5" in capsys.readouterr().err


def test_push_t_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    assert doctor.check_pusht().status == "ok"


def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    for free, status in ((1e8, "fail"), (2e9, "warn"), (5e10, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(1e12, 0, free))
        assert doctor.check_disk(tmp_path / "not" / "yet" / "there").status == status


@pytest.mark.parametrize(
    ("code", "out", "err", "status"),
    [
        (0, "spread 200", "", "ok"),
        (0, "spread 0", "", "warn"),
        (1, "", "Traceback\nImportError: EGL", "warn"),
        (-11, "", "", "warn"),
    ],
)
def test_rendering_never_ends_the_doctor(monkeypatch: pytest.MonkeyPatch, code: int, out: str, err: str, status: str) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, code, out, err))
    check = doctor.check_rendering()
    assert check.status == status
    assert ("libegl1" in check.remedy) == (status != "ok")


def test_python_and_torch() -> None:
    assert doctor.check_python().status in ("ok", "warn")
    assert doctor.check_torch().status in ("ok", "warn")
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in doctor.check_python().found


def test_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for mine, there, quota, status, word in (
        (4, 4, None, "ok", ""), (2, 2, 2.0, "ok", ""), (1, 1, None, "warn", "--jobs 1"), (1, 16, None, "warn", "cpus-per-task"),
        (16, 16, 2.5, "warn", "--jobs 2"), (16, 16, 0.5, "warn", "--jobs 1"),
    ):  # fmt: skip
        monkeypatch.setattr("postbc.devices.cores", lambda mine=mine: mine)
        monkeypatch.setattr(os, "cpu_count", lambda there=there: there)
        monkeypatch.setattr(doctor, "_quota", lambda quota=quota: quota)
        check = doctor.check_cores()
        assert check.status == status, (mine, there, quota)
        assert word in check.remedy
        assert bool(check.remedy) == (status != "ok")


def test_a_gpu_that_torch_could_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_nvidia", lambda: False)
    assert doctor.check_gpu().status == "ok"
    monkeypatch.setattr(doctor, "_nvidia", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    check = doctor.check_gpu()
    assert (check.status, "CUDA build" in check.remedy) == ("warn", True)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert "driver" in doctor.check_gpu().remedy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "unset CUDA_VISIBLE_DEVICES" in doctor.check_gpu().remedy
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert doctor.check_gpu().status == "ok"


# -- a policy, and demonstrations -------------------------------------------------------------------------------------------------


def pretrained(folder: Path, dataset: Dataset, seed: int = 0, **changes: Any) -> Path:
    """A policy of these demonstrations, or one that says otherwise of itself."""
    from postbc.data.belonging import Facts
    from postbc.data.normalization import Normalization
    from postbc.policies.base import About, save_policy
    from postbc.policies.diffusion import DiffusionConfig, DiffusionPolicy
    from postbc.schemas import plain
    from postbc.seeding import make_generator

    facts = plain(dataclasses.replace(Facts.of_dataset(dataset), **changes.pop("facts", {})))
    policy = DiffusionPolicy(
        DiffusionConfig(hidden=8, denoising_steps=4, inference_steps=2), {"state": (changes.pop("width", dataset.state_dims[0]),)},
        dataset.action_dim, changes.pop("chunk", 2), changes.pop("normalization", None) or Normalization.fit(dataset),
        make_generator(seed, "policy/initialisation"), about=About(method="bc", task="gymnasium:reach:Reach-v0", facts=facts),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_policy(folder / "policy.safetensors", policy)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    reach = {"env_name": "Reach-v0", "type": 2, "env_kwargs": {}}
    return made.write_demonstrations(tmp_path / "d.hdf5", environment=reach, widths={"state": 4}, action_dim=2)


def examined(
    monkeypatch: pytest.MonkeyPatch, data: Path | None, policy: Path, environment: str | None = None
) -> dict[str, Check]:
    healthy(monkeypatch)
    return named(doctor.diagnose(Study(data, policy, environment)))


def test_a_good_policy(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = examined(monkeypatch, data, pretrained(tmp_path / "p", read_robomimic(data, observation_keys=["state"])))
    assert [found[name].status for name in ("data", "statistics", "lengths")] == ["ok"] * 3
    assert found["policy"].status in ("ok", "warn"), found["policy"]  # this environment says little of itself
    assert "chunks of 2" in found["policy"].found
    assert found["demonstrations"].status == "warn"  # of no simulator here


def test_a_policy_of_another_task(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its environment, its observations' order and sizes, its controller: each a failure with what to do."""
    dataset = read_robomimic(data, observation_keys=["state"])
    policy = pretrained(tmp_path / "p", dataset)
    check = examined(monkeypatch, data, policy, "postbc/PushT")["policy"]
    assert (check.status, bool(check.remedy)) == ("fail", True)
    for changes, word in (({"environment": "Push-v0"}, "environment"), ({"state_dims": (3,)}, "state dims")):
        check = examined(monkeypatch, data, pretrained(tmp_path / "q", dataset, facts=changes))["statistics"]
        assert (check.status, word in check.found, bool(check.remedy)) == ("fail", True, True), check
    assert examined(monkeypatch, data, tmp_path / "none")["policy"].status == "fail"
    reach = {"env_name": "Reach-v0", "type": 2, "env_kwargs": {}}
    other = made.write_demonstrations(tmp_path / "other.hdf5", environment=reach, widths={"a": 3, "b": 1}, action_dim=2)
    check = examined(monkeypatch, other, policy)["statistics"]  # which reads "state"
    assert (check.status, "obs/state" in check.found) == ("fail", True)


def test_statistics_that_ruin_a_policy(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from postbc.data.normalization import Normalization
    from postbc.files import load_tree, save_tree

    dataset = read_robomimic(data, observation_keys=["state"])
    low, high, a_low, a_high = (getattr(x, f)(0) for x in (dataset.states, dataset.actions) for f in ("min", "max"))

    def check(*ends: Any) -> Check:
        policy = pretrained(tmp_path / "p", dataset, normalization=Normalization(*ends))
        return doctor.check_statistics(Study(data, policy))

    assert check(low, high, a_low, a_high).status == "ok"
    constant = check(np.array([0, *low[1:]]), np.array([0, *high[1:]]), a_low, a_high)
    assert (constant.status, "state[0]" in constant.found, "minimum-range" in constant.remedy) == ("warn", True, True)
    narrow = check(low, high, a_low, np.array([a_low[0] + 0.2 * (a_high - a_low)[0], a_high[1]]))
    assert (narrow.status, "action[0]" in narrow.found) == ("fail", True)
    few = check(low, np.array([*high[:3], low[3] + 0.8 * (high - low)[3]]), a_low, a_high)
    assert few.status == "ok"  # a subset's range, as a few demonstrations have it
    fewer = check(low, np.array([*high[:3], low[3] + 0.6 * (high - low)[3]]), a_low, a_high)
    assert (fewer.status, "far outside the policy's range in state[3]" in fewer.found) == ("warn", True)
    millimetres = check(1000 * low, 1000 * high, a_low, a_high)
    assert (millimetres.status, "fill less" in millimetres.found, "units" in millimetres.remedy) == ("warn", True, True)
    metres = check(low / 1000, high / 1000, a_low, a_high)
    assert (metres.status, "units" in metres.remedy) == ("fail", True)
    path = pretrained(tmp_path / "p", dataset) / "policy.safetensors"
    tree = load_tree(path, kind="policy")
    tree["normalization"]["state_low"][0] = float("nan")
    save_tree(path, tree)
    broken = examined(monkeypatch, data, tmp_path / "p")
    assert {broken[name].status for name in ("policy", "statistics")} == {"fail"}


def test_demonstrations_shorter_than_a_chunk_or_longer_than_an_episode(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = read_robomimic(data, observation_keys=["state"])
    found = examined(monkeypatch, data, pretrained(tmp_path / "p", dataset, chunk=13))["lengths"]
    assert (found.status, "6 are shorter than a chunk" in found.found, "--data.tail pad" in found.remedy) == (
        "warn",
        True,
        True,
    )
    times = 60
    long = [Episode({"state": np.tile(e.state, (times, 1))}, np.tile(e.actions, (times, 1)), name=e.name) for e in dataset]
    slow = write_robomimic(tmp_path / "slow.hdf5", dataclasses.replace(dataset, episodes=tuple(long), filters={}))
    found = examined(monkeypatch, slow, pretrained(tmp_path / "p", dataset))["lengths"]
    assert (found.status, "longer than an episode" in found.found) == ("warn", True)


@pytest.mark.simulator
def test_lift_and_a_policy_of_another_controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("robosuite")
    from postbc.environments.robosuite.collect import collect

    healthy(monkeypatch)
    dataset = collect("Lift", num=2, operators=["operator_g"], num_envs=2).dataset
    path = write_robomimic(tmp_path / "lift.hdf5", dataset)
    assert doctor.check_demonstrations(path).status == "ok"
    newer = write_robomimic(tmp_path / "newer.hdf5", dataclasses.replace(dataset, environment=made.LIFT_15))
    check = doctor.check_demonstrations(newer)
    assert (check.status, "1.5.1" in check.found) == ("warn", True)  # these replay all the same
    check = doctor.check_data(doctor.Study(newer, environment="postbc/Lift"))
    assert (check.status, '"object"' in check.found, "demos convert" in check.found) == ("warn", True, True)
    assert check.found.count("Made with simulator version") == 1
    still = dataclasses.replace(dataset, episodes=tuple(dataclasses.replace(e, actions=0 * e.actions) for e in dataset))
    check = doctor.check_demonstrations(write_robomimic(tmp_path / "still.hdf5", still))
    assert (check.status, "0 of 2" in check.found, "demos collect" in check.remedy) == ("fail", True, True)
    kwargs = dataset.environment["env_kwargs"]
    stiff = {**dataset.environment, "env_kwargs": {**kwargs, "controller_configs": {**kwargs["controller_configs"], "kp": 300}}}
    policy = pretrained(tmp_path / "p", dataclasses.replace(dataset, environment=stiff), width=19)
    check = examined(monkeypatch, None, policy, "postbc/Lift")["policy"]
    assert (check.status, "kp" in check.found) == ("fail", True)
    mixed = {"state_keys": dataset.state_keys[::-1], "state_dims": dataset.state_dims[::-1]}
    check = examined(monkeypatch, None, pretrained(tmp_path / "p", dataset, width=19, facts=mixed), "postbc/Lift")["policy"]
    assert (check.status, "state keys" in check.found) == ("fail", True)
    check = examined(monkeypatch, None, pretrained(tmp_path / "p", dataset, width=19), "postbc/Can")["policy"]
    assert (check.status, "Lift" in check.found) == ("fail", True)
    check = examined(monkeypatch, None, pretrained(tmp_path / "p", dataset, width=19), "postbc/Lift")["policy"]
    assert check.status == "ok", check


@pytest.mark.simulator
def test_a_file_of_liberos_is_replayed_by_libero(tmp_path: Path) -> None:
    pytest.importorskip("robosuite")
    from postbc.data.libero_tasks import installed

    if installed() is None:
        pytest.skip("LIBERO is not installed")
    path = tmp_path / "stove.hdf5"
    arguments = [
        "--task",
        "libero/KITCHEN_SCENE3_turn_on_the_stove",
        "--num",
        "1",
        "--operators",
        "operator_g",
        "--num-envs",
        "1",
    ]
    assert cli.main(["demos", "collect", "--output", str(path), *arguments]) == 0
    check = doctor.check_demonstrations(path)
    assert (check.status, "1 of 1" in check.found) == ("ok", True), check


@pytest.mark.simulator
def test_native_control_agrees_and_a_disagreement_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("robosuite")
    from postbc.environments import robosuite as environments

    assert doctor.check_native_control().status == "ok"
    make = environments.make

    def skewed(task: str, **options: object) -> object:
        env = make(task, **options)  # type: ignore[arg-type]
        if options["native"]:
            step = env.step
            env.step = lambda actions: step(np.asarray(actions) * 0.9)  # type: ignore[method-assign]
        return env

    monkeypatch.setattr(environments, "make", skewed)
    assert doctor.check_native_control().status == "fail"
