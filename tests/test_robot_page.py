"""The labelling page through Starlette's client and through a real server; in a browser: test_robot_page_browser.py."""

from __future__ import annotations

import http.client
import io
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette.testclient", exc_type=Exception)

from PIL import Image
from starlette.testclient import TestClient

from made import write_demonstrations
from postbc import cli
from postbc.errors import InputError
from postbc.robot.asking import ask
from postbc.robot.catalogue import Catalogue
from postbc.robot.labels import Labels
from postbc.robot.page import application, serve
from postbc.robot.session import Session

CAMERAS = {"agentview_image": (36, 48, 3), "wrist_image": (24, 24, 3)}
ORIGIN = {"Origin": "http://127.0.0.1"}


def recorded(folder: Path, episodes: int = 3, images: dict | None = CAMERAS) -> Path:
    for episode in range(episodes):
        write_demonstrations(folder / "episodes" / f"episode_{episode:05}.hdf5", 1, 10 + episode, images=images, seed=episode)
    return folder


def client(of, token=None, **options) -> TestClient:
    return TestClient(application(of, token), base_url="http://127.0.0.1", headers=ORIGIN, **options)


@pytest.fixture
def session():
    session = Session(10, 20.0, 200, ("front", "wrist/left"))
    session.enter("label", "How did it go?", episode=4)
    return session


# -- beside a running robot ----------------------------------------------------------------------------------------------------------
def test_the_state_is_the_sessions(session):
    page = client(session)
    said = page.get("/state").json()
    assert {**said, "seconds": 0, "notices": 0} == {**session.state(), "seconds": 0, "notices": 0}
    assert said["phase"] == "label"
    assert page.get("/").text.count("<script") == 1


def test_a_press_reaches_the_session(session):
    page = client(session)
    assert page.post("/press", json={"button": "success", "by": "Ada", "episode": 4}).json() == {}
    press = session.wait_for("success", timeout=0)
    assert (press.button, press.by, press.episode) == ("success", "Ada", 4)


@pytest.mark.parametrize(
    ("asked", "status", "words"),
    [
        ({"button": "start"}, 409, "means nothing now"),
        ({"button": "success", "episode": 3}, 409, "Another episode"),
        ({"button": "faster"}, 400, "button"),
        ({"button": "success", "by": "x" * 101}, 400, "by"),
        ({"button": "success", "more": 1}, 400, "more"),
        ([], 400, ""),
    ],
)
def test_a_press_that_means_nothing_is_refused_with_its_reason(session, asked, status, words):
    answer = client(session).post("/press", json=asked)
    assert (answer.status_code, words in answer.json()["error"]) == (status, True)
    assert session.wait_for("success", "start", timeout=0) is None


def test_who_labels_too_late_is_told_and_so_is_everybody(session):
    page = client(session)
    page.post("/press", json={"button": "success", "by": "Ada", "episode": 4})
    late = page.post("/press", json={"button": "failure", "by": "Ben", "episode": 4})
    assert late.status_code == 409
    assert "Ada" in late.json()["error"]
    (notice,) = page.get("/state").json()["notices"]
    assert "Ben said failure of episode 4" in notice["text"]
    assert session.wait_for("success", "failure", timeout=0).by == "Ada"


def test_pictures(session):
    page = client(session)
    assert page.get("/frame/front").status_code == 204
    assert page.get("/frame/other").status_code == 404
    frame = np.zeros((60, 80, 3), np.uint8)
    frame[:, :, 0] = 200
    session.show({"front": frame, "wrist/left": np.zeros((1200, 1600, 3), np.uint8)}, 1)
    for _ in range(2):  # the second from memory
        shown = np.asarray(Image.open(io.BytesIO(page.get("/frame/front").content)))
        np.testing.assert_allclose(shown, frame, atol=12)
    session.show({"front": 255 - frame})
    assert np.asarray(Image.open(io.BytesIO(page.get("/frame/front").content)))[0, 0, 1] > 240
    assert max(Image.open(io.BytesIO(page.get("/frame/wrist%2Fleft").content)).size) == 960


def test_a_stop_is_pressed_within_one_control_step(session):
    """From the request to Session.press, over a real connection, while another thread of this process computes."""
    session.enter("running", episode=4)
    busy = threading.Event()

    def compute() -> None:
        while not busy.is_set():
            sum(range(2000))

    worker = threading.Thread(target=compute, daemon=True)
    taken = []
    with serve(session, port=0) as server:
        worker.start()
        try:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
            for _ in range(20):
                begin = time.monotonic()
                connection.request("POST", "/press", b'{"button": "stop"}', {"Content-Type": "application/json"})
                connection.getresponse().read()
                taken.append(session.wait_for("stop", timeout=5).time - begin)
        finally:
            busy.set()
    print(f"stop: median {1000 * statistics.median(taken):.1f} ms, slowest {1000 * max(taken):.1f} ms")
    assert statistics.quantiles(taken)[0] < 0.05  # 20 Hz; the quickest quarter, as the machine may be busy


# -- over recorded episodes ----------------------------------------------------------------------------------------------------------
def test_episodes_are_listed_labelled_and_taken_back(tmp_path):
    page = client(recorded(tmp_path))
    state = page.get("/state").json()
    assert [(e["episode"], e["steps"], e["seconds"], e["cameras"], e["label"]) for e in state["episodes"]] == [
        (0, 10, 0.5, 2, None), (1, 11, 0.55, 2, None), (2, 12, 0.6, 2, None)
    ]  # fmt: skip
    assert page.get(f"/state?seen={state['seen']}").json() == {"seen": state["seen"]}
    assert page.post("/label", json={"episode": 1, "label": "success", "by": "Ada"}).json() == {}
    assert page.post("/label", json={"episode": 1, "label": "failure", "by": "Ben"}).json() == {}
    state = page.get(f"/state?seen={state['seen']}").json()
    assert state["episodes"][1]["label"] == "failure"
    assert state["episodes"][1]["opinions"] == {"Ada": "success", "Ben": "failure"}
    assert state["labels"] == {"success": 0, "failure": 1, "discard": 0, "unlabelled": 2}
    assert page.post("/undo", json={"by": "Ada"}).status_code == 409  # hers does not count any more
    assert page.post("/undo", json={"by": "Ben"}).json() == {"episode": 1}
    assert Labels(tmp_path).current() == {}
    assert len(Labels(tmp_path).history()) == 3
    recorded(tmp_path, 4)  # the robot goes on meanwhile
    assert len(page.get("/state").json()["episodes"]) == 4


@pytest.mark.parametrize(
    "asked", [{"episode": 7, "label": "success"}, {"episode": 1, "label": "good"}, {"episode": 1, "label": None}]
)
def test_a_decision_on_nothing_is_refused(tmp_path, asked):
    page = client(recorded(tmp_path))
    assert page.post("/label", json=asked).status_code in (400, 409)
    assert Labels(tmp_path).history() == []


def test_a_film_has_the_frames_of_all_cameras_in_real_time(tmp_path):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    page = client(recorded(tmp_path, 1))
    whole = page.get("/film/0.mp4")
    assert whole.headers["content-type"] == "video/mp4"
    part = page.get("/film/0.mp4", headers={"Range": "bytes=4-7"})  # Safari plays nothing without
    assert (part.status_code, part.content) == (206, b"ftyp")
    (tmp_path / "film.mp4").write_bytes(whole.content)
    film = imageio_ffmpeg.read_frames(str(tmp_path / "film.mp4"))
    about = next(film)
    frames = [np.frombuffer(f, np.uint8).reshape(36, 72, 3) for f in film]
    assert (about["size"], about["fps"], len(frames)) == ((72, 36), 20.0, 10)
    assert frames[0][30:, 54:].max() < 40  # below the lower camera


def test_what_has_no_film_says_why(tmp_path):
    recorded(tmp_path, 2, images=None)
    (tmp_path / "episodes" / "episode_00001.hdf5").write_bytes(b"junk")
    page = client(tmp_path)
    assert "no camera" in page.get("/film/0.mp4").json()["error"]
    assert "not HDF5" in page.get("/film/1.mp4").json()["error"]
    assert "no such episode" in page.get("/film/2.mp4").json()["error"]
    assert "not HDF5" in page.get("/state").json()["episodes"][1]["error"]
    assert page.get("/film/x.mp4").status_code == 404


def test_a_grey_and_a_four_channel_camera_are_shown(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    recorded(tmp_path, 1, {"depth_image": (16, 16, 1), "front_image": (15, 17, 4)})
    catalogue = Catalogue(tmp_path)
    assert catalogue.film(0).stat().st_size > 500
    catalogue.close()


def test_the_folder_must_be_one_session(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        application(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no session"):
        application(tmp_path)
    recorded(tmp_path / "seed_0")
    assert len(client(tmp_path).get("/state").json()["episodes"]) == 3
    recorded(tmp_path / "seed_1")
    with pytest.raises(InputError, match=r"Several sessions[\s\S]*seed_0, seed_1"):
        application(tmp_path)
    (tmp_path / "seed_0" / "labels.jsonl").write_text("junk\n{}\n")
    with pytest.raises(InputError, match=r"labels\.jsonl, line 1"):
        application(tmp_path / "seed_0")


def test_labels_that_break_meanwhile_are_said(tmp_path):
    page = client(recorded(tmp_path))
    (tmp_path / "labels.jsonl").write_text("junk\n{}\n")
    answer = page.get("/state")
    assert answer.status_code == 409
    assert "line 1" in answer.json()["error"]


# -- who may use it ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Origin": "", "Sec-Fetch-Site": "same-origin"},
        {"Host": "evil.example", "Origin": "http://evil.example"},  # a name that was rebound to this machine
        {"Host": "[", "Origin": "http://["},
    ],
)
def test_other_sites_press_nothing(session, headers):
    page = client(session)
    answer = page.post("/press", json={"button": "success", "episode": 4}, headers=headers)
    assert answer.status_code == 403
    assert session.wait_for("success", timeout=0) is None


def test_a_form_of_another_site_presses_nothing_without_an_origin_either(session):
    bare = TestClient(application(session), base_url="http://127.0.0.1")
    body = '{"button": "success", "episode": 4}'
    assert bare.post("/press", content=body, headers={"Content-Type": "text/plain"}).status_code == 415
    crossing = {"Content-Type": "application/json", "Sec-Fetch-Site": "cross-site"}
    assert bare.post("/press", content=body, headers=crossing).status_code == 403
    assert bare.post("/press", content=" " * 20000, headers={"Content-Type": "application/json"}).status_code == 413
    assert session.wait_for("success", timeout=0) is None


def test_other_names_of_this_machine_are_served_and_no_others(session):
    page = client(session)
    for host, status in [
        ("localhost:8765", 200),
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("192.168.1.5", 403),
        ("robot.lan", 403),
    ]:
        assert page.get("/state", headers={"Host": host}).status_code == status


def test_with_a_token_only_the_link_opens_it(session):
    page = client(session, token="a-long-token", follow_redirects=False)
    for path in (
        "/",
        "/state",
        "/frame/front",
        "/?token=wrong",
        "/?token=",
        "/state?token=a-long-token",
        "/?token=%ff",
        "/page.css",
    ):
        answer = page.get(path)
        assert (answer.status_code, "a-long-token" in answer.text) == (403, False), path
    assert page.post("/press", json={"button": "success"}).status_code == 403
    opened = page.get("/?token=a-long-token", headers={"Host": "robot.lan"})
    assert (opened.status_code, opened.headers["location"]) == (303, "/")
    cookie = opened.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=lax" in cookie
    page.get("/?token=a-long-token")
    assert page.get("/state").status_code == 200
    assert page.post("/press", json={"button": "success"}).status_code == 200
    assert page.post("/press", json={"button": "success"}, headers={"Origin": "http://evil.example"}).status_code == 403


def test_nothing_frames_the_page_or_brings_scripts_of_its_own(session):
    for path in ("/", "/state", "/live.js", "/nothing"):
        headers = client(session).get(path).headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store"


def test_the_page_needs_nothing_from_elsewhere():
    folder = Path(cli.__file__).parent.parent / "robot"
    for file in [*folder.glob("*.js"), *folder.glob("*.css"), *folder.glob("*.j2")]:
        assert "http" not in file.read_text(encoding="utf-8").replace("httponly", ""), file.name


def test_names_are_text_in_the_page(tmp_path):
    folder = recorded(tmp_path / "<script>alert(1)<")
    assert "<script>alert" not in client(folder).get("/").text


# -- the server ----------------------------------------------------------------------------------------------------------------------
def test_another_machine_needs_a_token_which_is_made(session):
    with serve(session, host="0.0.0.0", port=0) as server:
        assert len(server.token) > 15
        assert server.link.endswith(f":{server.port}/?token={server.token}")
        assert "0.0.0.0" not in server.link
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
        connection.request("GET", "/state")
        assert connection.getresponse().status == 403
    with serve(session, port=0) as server:
        assert server.token is None
    with pytest.raises(InputError, match="too short"):
        serve(session, port=0, token="x")


def test_a_taken_port_is_said_and_a_closed_one_is_free(session):
    with serve(session, port=0) as server:
        port = server.port
        with pytest.raises(InputError, match=f"cannot listen[\\s\\S]*127.0.0.1:{port}"):
            serve(session, port=port)
    with serve(session, port=port):
        pass
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=1)
    with pytest.raises(InputError, match="cannot listen"):
        serve(session, host="no.such.host.invalid", port=0)


# -- the commands --------------------------------------------------------------------------------------------------------------------
def test_the_command_serves_until_it_is_interrupted(tmp_path):
    recorded(tmp_path, 1)
    command = [sys.executable, "-m", "postbc", "robot", "label", str(tmp_path), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "http://127.0.0.1:" in line
        port = int(line.rpartition(":")[2].strip().strip("/"))
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/state")
        assert len(json.loads(connection.getresponse().read())["episodes"]) == 1
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()


def test_the_command_says_what_it_cannot_use(tmp_path, capsys):
    assert cli.main(["robot", "label", str(tmp_path)]) == 2
    assert "no session" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["robot", "label", str(tmp_path), "--port", "70000"])


def test_in_the_terminal_each_unlabelled_episode_is_asked_for(tmp_path, capsys):
    recorded(tmp_path, 4)
    Labels(tmp_path).set(1, "success", "Ben")
    answers = iter(["s", "x", "F", "u", "discard", "q"])
    asked = []

    def answer(question: str) -> str:
        asked.append(question)
        return next(answers)

    ask(tmp_path, "Ada", answer)
    assert Labels(tmp_path).current() == {0: "success", 1: "success", 2: "discard"}
    assert [(d.episode, d.label) for d in Labels(tmp_path).history() if d.by == "Ada"] == [
        (0, "success"), (2, "failure"), (2, None), (2, "discard")
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "3 of 4 episodes have no label: 0, 2, 3" in said
    assert "1 episodes have no label yet" in said


def test_in_the_terminal_by_the_command(tmp_path, capsys, monkeypatch):
    recorded(tmp_path, 2)
    monkeypatch.setattr("sys.stdin", io.StringIO("f\n\n"))
    assert cli.main(["robot", "label", str(tmp_path), "--terminal", "--by", "Ada"]) == 0
    assert [(d.episode, d.label, d.by) for d in Labels(tmp_path).history()] == [(0, "failure", "Ada")]
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert cli.main(["robot", "label", str(tmp_path), "--terminal"]) == 0  # nothing more to read
    assert "1 of 2 episodes have no label: 1" in capsys.readouterr().out
