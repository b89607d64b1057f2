"""The doctor finds what is broken, says what to do about it, and exits with 2 only where something required is broken."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from postbc import doctor
from postbc.doctor import Check, Doctor
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
    check = named(doctor.diagnose(demonstrations=tmp_path / "[bad].hdf5"))["demonstrations"]
    assert check.status == "fail"
    assert "[bad].hdf5" in check.found
    assert "pip" not in check.remedy
    with pytest.raises(InputError, match="checks failed"):
        Doctor(tmp_path / "[bad].hdf5").run()


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
