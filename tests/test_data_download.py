"""`demos download` against a small server that answers as the hub does: facts first, resumed, checked on arrival."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from postbc import cli
from postbc.data.download import DEMONSTRATIONS, LIBERO, REPOSITORY, check_arrived, filename_of, look_up
from postbc.data.libero_tasks import KITCHEN
from postbc.errors import InputError

pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILENAME = "v1.5/lift/ph/low_dim_v15.hdf5"


class Hub:
    """A hub with one file, and knobs for what goes wrong."""

    def __init__(self, content: bytes, repository: str = REPOSITORY, filename: str = FILENAME) -> None:
        self.repository, self.filename = repository, filename
        self.content, self.sha256, self.licence = content, hashlib.sha256(content).hexdigest(), "mit"
        self.stop_after: int | None = None  # bytes, then the connection is lost and the server refuses
        self.down = False
        self.ranges: list[str | None] = []
        self.missing = False
        self.sized = True
        self.authorised: list[str | None] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def answer(self, value: Any, status: int = 200) -> None:
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                assert self.path == f"/api/datasets/{hub.repository}/paths-info/{COMMIT}"
                size = len(hub.content)
                entry = {"type": "file", "path": hub.filename, "size": size, "oid": "0" * 40}
                entry["lfs"] = {"oid": hub.sha256, "size": size, "pointerSize": 134}
                self.answer([] if hub.missing else [entry])

            def do_HEAD(self) -> None:
                found = self.path == f"/rt_benchmark/{hub.filename.partition('/')[2]}"
                self.send_response(200 if found else 404)
                if found and hub.sized:
                    self.send_header("Content-Length", str(len(hub.content)))
                self.send_header("ETag", '"1a2b-3c"')
                self.end_headers()

            def do_GET(self) -> None:
                hub.authorised.append(self.headers.get("Authorization"))
                if self.path == f"/rt_benchmark/{hub.filename.partition('/')[2]}":
                    self.send_file()
                elif self.path.split("?")[0] == f"/api/datasets/{hub.repository}":
                    self.answer(
                        {"id": hub.repository, "sha": COMMIT, "cardData": {"license": hub.licence}, "siblings": [], "tags": []}
                    )
                elif hub.down:
                    self.answer({"error": "down"}, 503)
                else:
                    assert self.path == f"/datasets/{hub.repository}/resolve/{COMMIT}/{hub.filename}"
                    self.send_file()

            def send_file(self) -> None:
                asked = self.headers.get("Range")
                hub.ranges.append(asked)
                begin = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
                body = hub.content[begin:]
                self.send_response(206 if asked else 200)
                self.send_header("Content-Length", str(len(body)))
                if asked:
                    self.send_header("Content-Range", f"bytes {begin}-{len(hub.content) - 1}/{len(hub.content)}")
                self.end_headers()
                if hub.stop_after is not None:
                    self.wfile.write(body[: hub.stop_after])
                    hub.down, self.close_connection = True, True
                else:
                    self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"


def robomimic_bytes(path: Path, demonstrations: int, steps: int = 40) -> bytes:
    with h5py.File(path, "w") as file:
        for i in range(demonstrations):
            file[f"data/demo_{i}/actions"] = np.random.default_rng(i).random((steps, 7))
    return path.read_bytes()


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return robomimic_bytes(tmp_path_factory.mktemp("hub") / "source.hdf5", 200)


@pytest.fixture
def hub(content: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub(content)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library waits between its own retries
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def download(directory: Path, *options: str) -> int:
    return cli.main(["demos", "download", "--dataset", "ph", "--output-dir", str(directory), *options])


def test_facts_first(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert download(tmp_path / "data", "--dry-run") == 0
    out = capsys.readouterr().out
    for word in (f"{len(hub.content) / 1e6:.1f} MB", "Licence: mit", "robosuite 1.5.1", "1.4.0", FILENAME, COMMIT[:12]):
        assert word in out
    assert not (tmp_path / "data").exists()
    hub.licence = ""
    assert look_up("lift", "ph").licence == "not stated"


def test_arrives_and_is_kept(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert download(tmp_path) == 0
    assert "200 demonstrations" in capsys.readouterr().out
    assert (tmp_path / FILENAME).read_bytes() == hub.content
    assert download(tmp_path) == 0  # it is there
    assert hub.ranges == [None]
    (tmp_path / FILENAME).write_bytes(b"something of mine")
    assert download(tmp_path) == 2
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / FILENAME).read_bytes() == b"something of mine"
    assert download(tmp_path, "--force") == 0
    assert (tmp_path / FILENAME).read_bytes() == hub.content


def test_resumes(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)  # 10 MB by default: more than this file
    hub.stop_after = 100_000
    assert download(tmp_path) == 2
    assert "it resumes" in capsys.readouterr().err
    assert not (tmp_path / FILENAME).exists()
    hub.stop_after, hub.down = None, False
    assert download(tmp_path) == 0
    begun = hub.ranges[-1]
    assert begun is not None
    assert 0 < int(begun.removeprefix("bytes=").rstrip("-")) <= 100_000
    assert (tmp_path / FILENAME).read_bytes() == hub.content
    assert [p.name for p in (tmp_path / FILENAME).parent.iterdir()] == ["low_dim_v15.hdf5"]


def test_damaged_on_the_way(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound = hub.content
    hub.content = sound[:-1] + bytes([sound[-1] ^ 1])  # the checksum stays that of the sound one
    assert download(tmp_path) == 2
    message = capsys.readouterr().err
    assert "SHA-256" in message
    assert hub.sha256 in message
    assert not (tmp_path / FILENAME).exists()
    hub.content = sound
    assert download(tmp_path) == 0


def test_not_what_it_should_be(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.content = robomimic_bytes(tmp_path / "few.hdf5", 7)
    hub.sha256 = hashlib.sha256(hub.content).hexdigest()
    assert download(tmp_path) == 2
    message = capsys.readouterr().err
    assert "number of demonstrations" in message
    assert "200" in message
    hub.content = b"<html>please sign in</html>"
    hub.sha256 = hashlib.sha256(hub.content).hexdigest()
    assert download(tmp_path) == 2
    assert "not a robomimic file" in capsys.readouterr().err
    hub.missing = True
    assert download(tmp_path) == 2
    assert "no longer has this file" in capsys.readouterr().err


def test_a_file_of_libero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"libero_90/{KITCHEN[14]}_demo.hdf5"
    hub = Hub(robomimic_bytes(tmp_path / "source", 50), LIBERO, name)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    arguments = ["demos", "download", "--output-dir", str(tmp_path), "--task"]
    try:
        assert cli.main([*arguments, f"libero/{KITCHEN[14]}"]) == 0
        assert (tmp_path / name).read_bytes() == hub.content
        out = capsys.readouterr().out
        assert "50 demonstrations" in out
        assert "1.5.1" not in out
        assert cli.main([*arguments, "libero/kitchen/3+14", "--dry-run"]) == 2  # the hub has one of the two
        assert f"no longer has this file.\n  key: {LIBERO}: libero_90/{KITCHEN[3]}_demo.hdf5" in capsys.readouterr().err
        assert cli.main([*arguments, "libero/kitchn"]) == 2
        assert cli.main([*arguments, "transport"]) == 2
    finally:
        hub.server.shutdown()
        hub.server.server_close()


def test_too_little_space(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("Usage", "total used free")(10, 9, 1))
    assert download(tmp_path) == 2
    assert hub.ranges == []


@pytest.mark.parametrize(
    ("task", "dataset", "filename", "demonstrations"),
    [
        ("lift", "mh", "v1.4.1/lift/mh/low_dim_v141.hdf5", 300),
        ("square", "ph", "v1.4.1/square/ph/low_dim_v141.hdf5", 200),
        ("lift", "mg", "v1.4.1/lift/mg/low_dim_sparse_v141.hdf5", 1500),
    ],
)
def test_older_files_from_robomimics_server(
    task: str, dataset: str, filename: str, demonstrations: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A plain server says no checksum; it is not told the hub's token."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server = Hub(robomimic_bytes(tmp_path / "source", demonstrations, steps=2), filename=filename)
    monkeypatch.setattr("postbc.data.download.OLDER", f"{server.endpoint}/rt_benchmark")
    fetch = ["demos", "download", "--version", "v1.4.1", "--task"]
    arguments = [*fetch, task, "--dataset", dataset, "--output-dir", str(tmp_path / "data")]
    try:
        assert cli.main([*arguments, "--dry-run"]) == 0
        assert not (tmp_path / "data").exists()
        assert cli.main(arguments) == 0
        out = capsys.readouterr().out
        assert f"{demonstrations} demonstrations" in out
        assert "1.5.1" not in out  # it belongs to the simulator here
        assert (tmp_path / "data" / filename).read_bytes() == server.content
        assert server.authorised == [None]
        server.sized = False
        assert cli.main([*arguments, "--dry-run"]) == 2
        assert "how large" in capsys.readouterr().err
        server.filename = "v1.4.1/elsewhere.hdf5"
        assert cli.main([*arguments, "--dry-run"]) == 2
        assert "404" in (said := capsys.readouterr().err)
        assert "could not be fetched" in said
    finally:
        server.server.shutdown()
        server.server.server_close()


def test_every_file_of_robomimics(hub: Hub) -> None:
    """Names as in robomimic's registry of data sets; machine-generated ones are of two tasks, with either reward."""
    names = {(task, dataset): filename_of(task, dataset, "v1.5") for task, dataset in DEMONSTRATIONS}
    assert names == {
        **{(t, d): f"v1.5/{t}/{d}/low_dim_v15.hdf5" for t in ("lift", "can", "square") for d in ("ph", "mh")},
        **{(t, "mg"): f"v1.5/{t}/mg/low_dim_sparse_v15.hdf5" for t in ("lift", "can")},
        **{(t, "mg-dense"): f"v1.5/{t}/mg/low_dim_dense_v15.hdf5" for t in ("lift", "can")},
    }
    assert (DEMONSTRATIONS["lift", "mg"], DEMONSTRATIONS["can", "mg-dense"]) == (1500, 3900)
    hub.filename = "v1.5/can/mg/low_dim_dense_v15.hdf5"
    assert look_up("can", "mg-dense").filename == hub.filename
    with pytest.raises(InputError, match=r"(?s)no such data set.*square, mg"):
        look_up("square", "mg")


def test_incomplete_file(hub: Hub, tmp_path: Path) -> None:
    remote = look_up("lift", "ph")
    (tmp_path / "part").write_bytes(hub.content[:100])
    with pytest.raises(InputError, match="incomplete"):
        check_arrived(tmp_path / "part", remote, 200)
    with pytest.raises(InputError, match="no such data set"):
        look_up("lift", "paired")


def test_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing listens there: exit status 2, a message that says what to do, nothing written."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert download(tmp_path / "data") == 2
    message = capsys.readouterr().err
    assert "could not be fetched" in message
    assert "demos collect" in message
    assert not (tmp_path / "data").exists()
