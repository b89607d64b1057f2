"""Bad demonstration files and requests: each ends with exit status 2, a message that names what is wrong where, and nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from postbc import cli
from postbc.data import LOW_DIM_KEYS, Dataset, read_robomimic, write_robomimic

ENVIRONMENT = {
    "env_name": "Lift",
    "env_version": "1.4.1",
    "type": 1,
    "env_kwargs": {"robots": ["Panda"], "controller_configs": {"type": "OSC_POSE"}},
}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A sound file of three short demonstrations."""
    n, rng = 6, np.random.default_rng(0)
    dataset = Dataset.from_arrays(
        [rng.standard_normal((n, 19)) for _ in range(3)],
        [rng.uniform(-1, 1, (n, 7)) for _ in range(3)],
        rewards=[np.arange(n) == n - 1 for _ in range(3)],
        dones=[np.arange(n) == n - 1 for _ in range(3)],
        states=[rng.standard_normal((n, 32)) for _ in range(3)],
        state_keys=LOW_DIM_KEYS,
        state_dims=(3, 4, 2, 10),
        environment=ENVIRONMENT,
        filters={"train": ["demo_0", "demo_1"]},
    )
    return write_robomimic(tmp_path / "data.hdf5", dataset)


def edit(change: Callable[[h5py.File], None]) -> Callable[[Path], Path]:
    """A spoiler that changes the HDF5 file in place."""

    def spoil(path: Path) -> Path:
        with h5py.File(path, "r+") as file:
            change(file)
        return path

    return spoil


def replace(key: str, values: np.ndarray) -> Callable[[Path], Path]:
    def change(file: h5py.File) -> None:
        del file[key]
        file[key] = values

    return edit(change)


def put(key: str, index: tuple[int, ...], value: float) -> Callable[[Path], Path]:
    def change(file: h5py.File) -> None:
        file[key][index] = value

    return edit(change)


def delete(key: str) -> Callable[[Path], Path]:
    def change(file: h5py.File) -> None:
        del file[key]

    return edit(change)


def environment(**changes: object) -> Callable[[Path], Path]:
    def change(file: h5py.File) -> None:
        file["data"].attrs["env_args"] = json.dumps(ENVIRONMENT | changes)

    return edit(change)


def missing(path: Path) -> Path:
    return path.with_name("nowhere.hdf5")


def directory(path: Path) -> Path:
    (path.parent / "folder").mkdir(exist_ok=True)  # without an HDF5 file in it
    return path.parent / "folder"


def truncated(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def overwritten(path: Path) -> Path:
    """A sound header, then rubbish where the contents were."""
    content = path.read_bytes()
    path.write_bytes(content[:600] + b"\xff" * (len(content) - 600))
    return path


def text(path: Path) -> Path:
    path.write_text("demo,action\n0,1\n")
    return path


def empty(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def no_demonstrations(file: h5py.File) -> None:
    for name in list(file["data"]):
        del file["data"][name]


def zero_length(file: h5py.File) -> None:
    demo = file["data/demo_1"]
    for key in ["actions", "rewards", "dones", "states", *(f"obs/{k}" for k in LOW_DIM_KEYS)]:
        shape = demo[key].shape
        del demo[key]
        demo[key] = np.zeros((0, *shape[1:]))


def narrow_actions(file: h5py.File) -> None:
    for demo in file["data"].values():
        del demo["actions"]
        demo["actions"] = np.zeros((6, 6))


def broken_env_args(file: h5py.File) -> None:
    file["data"].attrs["env_args"] = "{env_name: Lift"


#: what is done to the file, further arguments of `demos inspect`, what the message must say
FILES = [
    ("missing file", missing, [], ["no such demonstration file", "nowhere.hdf5", "demos collect"]),
    ("directory", directory, [], ["directory"]),
    ("truncated file", truncated, [], ["truncated", "data.hdf5", "copy or download"]),
    ("overwritten file", overwritten, [], ["data.hdf5"]),
    ("not HDF5", text, [], ["not HDF5", "data.hdf5", "demo,act"]),
    ("empty file", empty, [], ["not HDF5", "0 bytes"]),
    ("no data group", delete("data"), [], ["lacks a group", "key: data"]),
    ("no demonstrations", edit(no_demonstrations), [], ["no demonstrations"]),
    ("no obs group", delete("data/demo_1/obs"), [], ["no observations", "data/demo_1/obs", "demos convert"]),
    ("no observation key", delete("data/demo_1/obs/object"), [], ["lacks a dataset", "data/demo_1/obs/object", "robot0_eef_pos"]),
    ("no actions", delete("data/demo_2/actions"), [], ["lacks a dataset", "data/demo_2/actions"]),
    ("group for dataset", edit(lambda f: (f["data/demo_0"].move("actions", "a"), f["data/demo_0"].create_group("actions"))), [],
     ["something else in place of a dataset", "data/demo_0/actions"]),
    ("text for numbers", replace("data/demo_0/actions", np.array([b"up"] * 6)), [], ["does not hold numbers", "data/demo_0/actions"]),
    ("NaN observation", put("data/demo_1/obs/object", (2, 3), np.nan), [], ["NaN", "demo_1/state", "(2, 12)", "data.hdf5"]),
    ("infinite action", put("data/demo_1/actions", (4, 0), np.inf), [],
     ["infinite", "demo_1/actions", "inf at index (4, 0)", "data.hdf5"]),
    ("NaN action", put("data/demo_1/actions", (4, 0), np.nan), [], ["NaN", "demo_1/actions", "(4, 0)"]),
    ("NaN reward", put("data/demo_1/rewards", (0,), np.nan), [], ["NaN", "demo_1/rewards"]),
    ("action out of range", put("data/demo_1/actions", (4, 2), 1.2), [],
     ["range", "data/demo_1/actions", "1.2", "[-1, 1]", "dimensions [2]"]),
    ("actions of wrong width", replace("data/demo_1/actions", np.zeros((6, 8))), [],
     ["wrong width", "data/demo_1/actions", "(6, 8)", "7"]),
    ("all actions of wrong width", edit(narrow_actions), [], ["wrong width", "(6, 6)", "(N, 7)"]),
    ("actions flat", replace("data/demo_1/actions", np.zeros(6)), [], ["axes", "data/demo_1/actions", "(6,)"]),
    ("actions too few", replace("data/demo_1/actions", np.zeros((5, 7))), [], ["another length", "num_samples", "5 actions", "6"]),
    ("rewards too few", replace("data/demo_1/rewards", np.zeros(5)), [],
     ["disagree", "data/demo_1/rewards", "(5,)", "6 rows", "data.hdf5"]),
    ("observations too few", replace("data/demo_1/obs/object", np.zeros((5, 10))), [], ["disagree", "data/demo_1/obs/object"]),
    ("attribute promises more", edit(lambda f: f["data/demo_1"].attrs.__setitem__("num_samples", 9)), [],
     ["num_samples", "6 actions", "9"]),
    ("attribute of another type", edit(lambda f: f["data/demo_1"].attrs.__setitem__("num_samples", "six")), [],
     ["num_samples", "six"]),
    ("seed of another type", edit(lambda f: f["data/demo_1"].attrs.__setitem__("episode_seed", 0.5)), [], ["episode_seed", "0.5"]),
    ("observation of other width", replace("data/demo_1/obs/object", np.zeros((6, 14))), [],
     ["width", "data/demo_1/obs/object", "14", "10"]),
    ("images for low-dim", replace("data/demo_1/obs/object", np.zeros((6, 8, 8, 3))), [], ["data/demo_1/obs/object", "(6, 8, 8, 3)"]),
    ("zero length", edit(zero_length), [], ["num_samples", "0 actions", "demo_1", "data.hdf5"]),
    ("unknown filter", lambda path: path, ["--filter-key", "valid"], ["no such filter", "mask/valid", "train", "data.hdf5"]),
    ("filter of a missing demonstration", delete("data/demo_1"), [], ["mask/train", "demo_1"]),
    ("empty filter", replace("mask/train", np.array([], dtype="S6")), ["--filter-key", "train"],
     ["selects no demonstration", "mask/train"]),
    ("broken env_args", edit(broken_env_args), [], ["not a JSON object", "env_args"]),
    ("deep env_args", edit(lambda f: f["data"].attrs.__setitem__("env_args", "[" * 60_000)), [], ["not a JSON object", "env_args"]),
    ("list for env_args", edit(lambda f: f["data"].attrs.__setitem__("env_args", "[1]")), [], ["a JSON list", "env_args"]),
    ("numbers for names", replace("mask/train", np.arange(3)), [], ["does not hold names", "mask/train"]),
    ("mask is a dataset", edit(lambda f: (f.pop("mask"), f.create_dataset("mask", data=1))), [], ["in place of a group", "mask"]),
    ("other observation keys", lambda path: path, ["--observation-keys", "object", "nose"], ["lacks a dataset", "nose", "object"]),
    ("numbers for frames", lambda path: path, ["--image-keys", "object"], ["one frame a step", "(6, 10)"]),
    ("output exists", lambda path: path, ["--output", __file__], ["exists already", "--overwrite"]),
    ("output is a directory", lambda path: path, ["--output", str(Path(__file__).parent), "--overwrite"], ["directory"]),
    ("output of another kind", lambda path: path, ["--output", "/nowhere/picture.docx"], [".png"]),
]  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Standard error of a command that must end with status 2."""
    try:
        status = cli.main(list(args))
    except SystemExit as error:  # an option of its own
        status = int(str(error.code))
    captured = capsys.readouterr()
    assert status == 2
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(("spoil", "options", "words"), [row[1:] for row in FILES], ids=[row[0] for row in FILES])
def test_bad_file(
    good: Path, spoil: Callable[[Path], Path], options: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = spoil(good)
    before = sorted(p.name for p in good.parent.iterdir())
    message = run(capsys, "demos", "inspect", str(path), *options)
    for word in words:
        assert word in message
    assert sorted(p.name for p in good.parent.iterdir()) == before  # no picture


def test_the_good_file_is_good(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(read_robomimic(good)) == 3
    with h5py.File(good, "r+") as file:  # what it may lack
        for key in ("rewards", "dones", "states"):
            del file[f"data/demo_1/{key}"]
        del file["data"].attrs["env_args"]
    assert cli.main(["demos", "inspect", str(good), "--output", str(good.with_name("p.png"))]) == 0
    assert "There are no rewards" in capsys.readouterr().out


@pytest.mark.parametrize("holder", ["r+", "w", "swmr"])
def test_a_file_in_use(good: Path, holder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Another program has it open for writing: said as that, not as damage."""
    path = good if holder == "r+" else good.with_name("new.hdf5")
    mode = "'w', libver='latest'" if holder == "swmr" else repr(holder)  # swmr: HDF5's own mode for readers beside a writer
    then = "f.swmr_mode = True; " if holder == "swmr" else ""
    held = f"import h5py, sys; f = h5py.File({str(path)!r}, {mode}); {then}print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            message = run(capsys, "demos", "inspect", str(path))
        finally:
            process.kill()
    assert "another program" in message
    assert "damaged" not in message
    if holder == "swmr":  # it was killed: the mark stays, and the message says how to remove it
        assert "h5clear" in run(capsys, "demos", "inspect", str(path))


def test_not_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe.hdf5")  # opening it would wait for ever
    assert "not a file" in run(capsys, "demos", "inspect", str(tmp_path / "pipe.hdf5"))
    (tmp_path / "link.hdf5").symlink_to(tmp_path / "gone.hdf5")
    assert "no such demonstration file" in run(capsys, "demos", "inspect", str(tmp_path / "link.hdf5"))
    assert "cannot be reached" in run(capsys, "demos", "inspect", str(tmp_path / ("n" * 300)))
    assert "device" in run(capsys, "demos", "inspect", "/dev/null")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads and writes everything")
def test_no_permission(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good.parent.chmod(0o555)
    assert cli.main(["demos", "inspect", str(good)]) == 0
    assert "No picture" in capsys.readouterr().out
    good.parent.chmod(0o755)
    good.chmod(0)
    assert "may not be read" in run(capsys, "demos", "inspect", str(good))


#: what is done to the file, further arguments of `demos replay`, what the message must say
REPLAYS = [
    ("fewer than asked", lambda path: path, ["--num", "4"], ["4 asked for, 3 there", "data.hdf5"]),
    ("none asked", lambda path: path, ["--num", "0"], ["0 asked for"]),
    ("negative seed", lambda path: path, ["--num", "1", "--seed", "-1"], ["seed", "-1", ">= 0"]),
    ("unknown task", environment(env_name="Stack"), [], ["env_name", "Stack", "Lift"]),
    ("text for arguments", environment(env_kwargs="robots=Panda"), [], ["env_kwargs", "robots=Panda", "data.hdf5"]),
    ("two controllers", environment(env_kwargs={"controller_configs": [{}, {}]}), [], ["controller_configs", "list of one"]),
    ("NaN state", put("data/demo_1/states", (0, 0), np.nan), [], ["NaN", "demo_1/states"]),
    ("states too few", replace("data/demo_1/states", np.zeros((5, 32))), [], ["disagree", "data/demo_1/states", "(5, 32)"]),
]

#: the same, where the simulator is there
SIMULATED = [
    ("other simulator version", environment(env_version="1.5.1"), [], ["1.5.1", "1.4.0", "--allow-version-mismatch"]),
    ("no states", edit(lambda file: [file.__delitem__(f"data/{name}/states") for name in list(file["data"])]), [], ["states"]),
    ("states of another width", replace("data/demo_1/states", np.zeros((6, 45))), [], ["data/demo_1/states", "(6, 45)", "32"]),
    (
        "absolute commands",
        environment(env_kwargs={"controller_configs": {"control_delta": False}}),
        [],
        ["control_delta", "False"],
    ),
    ("another robot", environment(env_kwargs={"robots": "Sawyer"}), [], ["robots", "Sawyer", "Panda"]),
    ("another rate", environment(env_kwargs={"control_freq": 10}), [], ["control freq", "10", "20"]),
]


def simulated(row: tuple[object, ...]) -> object:
    return pytest.param(*row[1:], id=str(row[0]), marks=pytest.mark.simulator)


@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [*(pytest.param(*row[1:], id=row[0]) for row in REPLAYS), *(simulated(row) for row in SIMULATED)],
)
def test_bad_replay(
    good: Path, spoil: Callable[[Path], Path], options: list[str], words: list[str], capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    if request.node.get_closest_marker("simulator"):
        pytest.importorskip("robosuite")
    message = run(capsys, "demos", "replay", str(spoil(good)), *options)
    for word in words:
        assert word in message


COLLECTS = [
    ("nothing to collect", ["--num", "0"], ["num", "1"]),
    ("negative seed", ["--seed", "-1"], ["seed", "-1"]),
    ("negative tail", ["--tail", "-1"], ["tail", "-1"]),
    ("no environments", ["--num-envs", "0"], ["num", "envs", "0"]),
    ("unknown operator", ["--operators", "operator_z"], ["operator_z", "operator_a", "worse"]),
    ("output under a file", ["--output", __file__ + "/new.hdf5"], ["cannot be written", "not a directory"]),
    ("output is a directory", ["--output", str(Path(__file__).parent), "--overwrite"], ["directory"]),
    ("output exists", [], ["exists already", "--overwrite"]),
]


@pytest.mark.parametrize(("options", "words"), [row[1:] for row in COLLECTS], ids=[row[0] for row in COLLECTS])
def test_bad_collect(good: Path, options: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    output = good.with_name("new.hdf5") if options else good
    content = good.read_bytes()
    where = [] if "--output" in options else ["--output", str(output)]
    message = run(capsys, "demos", "collect", *where, *options)
    for word in words:
        assert word in message
    assert [p.name for p in good.parent.iterdir()] == ["data.hdf5"]
    assert good.read_bytes() == content


def test_bad_convert(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = good.with_name("new.hdf5")
    assert "exists already" in run(capsys, "demos", "convert", str(good), "--output", str(good))
    with h5py.File(good, "r+") as file:
        del file["data/demo_2/states"]
    message = run(capsys, "demos", "convert", str(good), "--output", str(output))
    assert "data/demo_2/states" in message
    with h5py.File(good, "r+") as file:
        del file["data"].attrs["env_args"], file["data/demo_2"]
        del file["mask"]
    assert "env_info" in run(capsys, "demos", "convert", str(good), "--output", str(output))
    assert [p.name for p in good.parent.iterdir()] == ["data.hdf5"]
