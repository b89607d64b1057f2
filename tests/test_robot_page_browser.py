"""The labelling page in a real browser: Playwright drives the Chromium that is installed here."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

pytest.importorskip("uvicorn")
pytest.importorskip("playwright.sync_api")

from playwright import sync_api as playwright

from made import write_demonstrations
from postbc.environments.robot.registry import Robot
from postbc.robot.labels import Labels
from postbc.robot.page import Server, serve
from postbc.robot.rollout import Control, Loop, Person, Play
from postbc.robot.session import Session

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium here: apt-get install chromium", allow_module_level=True)
expect = playwright.expect
expect.set_options(timeout=20_000)  # a busy machine


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    # nothing of its own to the network; and as root, as in CI, it has no sandbox
    arguments = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
                 "--disable-sync", *(["--no-sandbox"] if os.geteuid() == 0 else [])]  # fmt: skip
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser) -> Iterator[Callable[..., Any]]:
    """A person's browser on a server's page, of somebody called `name`; whatever the page complains of fails the test."""
    opened, complaints = [], []

    def go(server: Server, name: str = "", **context: Any) -> Any:
        person = browser.new_context(**context)
        opened.append(person)
        page = person.new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if "Content Security" in said.text else None)
        page.goto(server.link)
        if name:
            page.get_by_label("You").fill(name)
            page.get_by_label("You").press("Enter")
        expect(page.locator("#connected")).to_have_text("connected")
        return page

    yield go
    for person in opened:
        person.close()
    assert not complaints


@pytest.fixture
def session() -> Session:
    session = Session(10, 20.0, 50, ("front", "wrist"))
    session.count({"success": 2, "failure": 1})
    return session


@pytest.fixture
def live(session) -> Iterator[Server]:
    with serve(session, port=0) as server:
        yield server


@pytest.fixture
def folder(tmp_path) -> Path:
    for episode in range(4):
        write_demonstrations(
            tmp_path / "episodes" / f"episode_{episode:05}.hdf5",
            1,
            20,
            images={"front_image": (32, 48, 3)} if episode != 2 else None,
        )
    return tmp_path


@pytest.fixture
def review(folder) -> Iterator[Server]:
    with serve(folder, port=0) as server:
        yield server


def enabled(page: Any) -> set[str]:
    return set(page.eval_on_selector_all(".controls > button:enabled", "found => found.map(b => b.id)"))


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# -- beside a running robot ----------------------------------------------------------------------------------------------------------
def test_an_episode_by_keyboard(session, live, visit):
    page = visit(live, "Ada")
    session.enter("reset", "Put the cube back.", episode=3)
    expect(page.locator("#message")).to_have_text("Put the cube back.")
    until(lambda: enabled(page) == {"start", "undo", "stop"})
    page.keyboard.press("s")  # means nothing now
    page.keyboard.press("Enter")
    press = session.wait_for("start", "success", timeout=20)
    assert (press.button, press.by) == ("start", "Ada")

    session.enter("running")
    frame = np.full((32, 48, 3), 90, np.uint8)
    session.show({"front": frame, "wrist": frame}, 12)
    expect(page.locator("#step")).to_contain_text("step 12 of 50 · 20 Hz")
    expect(page.locator("#cameras img").first).to_have_js_property("naturalWidth", 48)
    until(lambda: enabled(page) == {"stop"})
    page.get_by_label("You").focus()  # even while somebody types
    page.keyboard.press("Escape")
    assert session.wait_for("stop", timeout=20).by == "Ada"

    session.enter("label", "Was it lifted?")
    expect(page.locator("#phase")).to_have_text("How did it go?")
    page.get_by_label("You").press("f")  # a letter of a name is no label
    page.get_by_label("You").fill("Ada")
    page.get_by_label("You").press("Enter")
    page.keyboard.press("f")
    press = session.wait_for("success", "failure", timeout=20)
    assert (press.button, press.episode) == ("failure", 3)
    session.enter("finished", "All done.")
    expect(page.locator("#phase")).to_have_text("The session is over")
    until(lambda: enabled(page) == set())


def test_space_stops_whatever_has_the_focus(session, live, visit):
    page = visit(live)
    session.enter("reset", episode=0)
    expect(page.get_by_role("button", name="Scene is reset: start")).to_be_enabled()
    page.get_by_role("button", name="Scene is reset: start").click()
    assert session.wait_for("start", timeout=20)
    session.enter("running")
    expect(page.locator("#phase")).to_have_text("The robot is moving")
    page.keyboard.press("Space")
    assert session.wait_for("stop", timeout=20)
    assert session.wait_for("start", timeout=0) is None
    page.keyboard.press("Tab")  # looking around is no stop, any letter is
    page.keyboard.press("x")
    assert session.wait_for("stop", timeout=20)
    session.enter("paused")
    expect(page.locator("#stop")).to_contain_text("End session")
    time.sleep(1)  # a stop right after a start is always one
    page.keyboard.press("Space")  # ending takes the button
    page.keyboard.press("Escape")
    assert session.wait_for("stop", timeout=0.5) is None
    page.locator("#stop").click()
    assert session.wait_for("stop", timeout=20)


def test_a_stop_right_after_the_start_is_not_lost(session, live, visit):
    page = visit(live)
    session.enter("reset", episode=0)
    expect(page.locator("#start")).to_be_enabled()
    page.route("**/state", lambda route: None)  # the page hears nothing new
    page.keyboard.press("Enter")
    assert session.wait_for("start", timeout=20)
    session.enter("running")
    page.keyboard.press("Space")
    assert session.wait_for("stop", timeout=20)


def test_the_end_of_a_session_is_no_alarm(session, visit):
    session.enter("label", "How?", episode=0)
    with serve(session, port=0) as server:
        page = visit(server)
        session.enter("finished", "Done.")
    expect(page.locator("#lost")).to_have_text("The session is over, and its page is closed.")


def test_a_stop_that_is_not_heeded_says_so(session, live, visit):
    page = visit(live)
    session.enter("running", episode=0)
    session.show({}, 1)
    expect(page.locator("#lost")).to_contain_text("has made no step")
    assert "doubtful" in page.locator("#stop").get_attribute("class")
    page.locator("#stop").click()
    expect(page.locator("#stop")).to_contain_text("Stopping")
    expect(page.locator("#lost")).to_contain_text("has not heeded the stop")
    session.enter("label", "How?")
    expect(page.locator("#lost")).to_be_hidden()


def test_a_lost_connection_leaves_no_button_alive_and_comes_back(session, visit):
    session.enter("running", episode=0)
    with serve(session, port=0) as server:
        page, port = visit(server), server.port
        until(lambda: "stop" in enabled(page))
    begin = time.monotonic()
    expect(page.locator("#lost")).to_contain_text("no button works, STOP neither")
    assert time.monotonic() - begin < 15  # 1.5 s, and what a busy machine needs
    until(lambda: enabled(page) == set())
    expect(page.locator("#stop")).to_contain_text("Stop does not work")
    expect(page.locator("#phase")).to_have_text("Last known: The robot is moving")
    page.keyboard.press("Escape")  # tried all the same
    expect(page.locator("#lost")).to_contain_text("The stop did not reach the robot")
    session.enter("label", "How?")
    with serve(session, port=port):
        expect(page.locator("#connected")).to_have_text("connected")
        expect(page.locator("#lost")).to_be_hidden()
        expect(page.locator("#success")).to_be_enabled()


def test_two_people_beside_the_robot(session, live, visit):
    session.enter("label", "How?", episode=5)
    ada, ben = visit(live, "Ada"), visit(live, "Ben")
    for page in (ada, ben):
        expect(page.locator("#success")).to_be_enabled()
    ada.keyboard.press("s")
    until(lambda: session._pressed is not None)
    ben.keyboard.press("f")
    expect(ben.locator("#said .bad")).to_contain_text("Ada")
    for page in (ada, ben):
        expect(page.locator("#said .conflict")).to_contain_text("Ben said failure of episode 5")
    assert session.wait_for("success", "failure", timeout=0).button == "success"


def test_from_another_machine_by_the_link(session, browser):
    session.enter("label", "How?", episode=5)
    with serve(session, host="0.0.0.0", port=0) as server:
        page = browser.new_context().new_page()
        page.goto(f"http://127.0.0.1:{server.port}/")
        assert "Open the link" in page.inner_text("body")
        page.goto(f"http://127.0.0.1:{server.port}/?token={server.token}")
        assert server.token not in page.url
        page.locator("#discard").click()
        assert session.wait_for("discard", timeout=20)
        page.context.close()


class Arm(gymnasium.Env):
    """A robot that goes where it is told, seen by a camera."""

    metadata = {"render_fps": 20}  # noqa: RUF012

    def __init__(self) -> None:
        box = gymnasium.spaces.Box
        self.observation_space = gymnasium.spaces.Dict(
            {"at": box(-9, 9, (2,), np.float32), "image.top": box(0, 255, (24, 32, 3), np.uint8)}
        )
        self.action_space = box(-1, 1, (2,), np.float32)
        self.held: list[float] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return {"at": np.zeros(2, np.float32), "image.top": np.full((24, 32, 3), 99, np.uint8)}, {"command": np.zeros(2)}

    def step(self, action: np.ndarray) -> Any:
        return self.reset()[0], 0.0, False, False, {}

    def hold(self) -> None:
        self.held.append(time.monotonic())


class Still:
    chunk, action_dim, observation_steps, shapes, device = 2, 2, 1, {"state": (2,)}, torch.device("cpu")

    def act(self, observation: Any, generator: torch.Generator) -> torch.Tensor:
        return torch.zeros(1, 2, 2)


def test_an_episode_of_the_real_loop(tmp_path, visit, monkeypatch):
    servers, arm, agent = [], Arm(), Still()
    monkeypatch.setattr("postbc.robot.page.serve", lambda *of, **more: servers.append(serve(*of, **more)) or servers[-1])
    robot = Robot("arm", lambda: arm, 20.0, 1000)
    loop = Loop(robot, [agent], Control(), Person(label="page", port=0), episodes=1)  # it serves the page already
    thread = threading.Thread(
        target=loop.run, args=(tmp_path, lambda number, labels: Play(0, 0, (0, 0)) if number == 0 else None)
    )
    thread.start()
    until(lambda: bool(servers))
    page = visit(servers[0], "Ada")
    expect(page.locator("#phase")).to_have_text("Reset the scene")
    page.keyboard.press("Enter")
    expect(page.locator("#phase")).to_have_text("The robot is moving")
    expect(page.locator("#cameras img")).to_have_js_property("naturalWidth", 32)
    expect(page.locator("#step")).to_contain_text("of 1000 · 20")
    begin = time.monotonic()
    page.keyboard.press("Space")
    expect(page.locator("#phase")).to_have_text("How did it go?")
    stopped = min(when for when in arm.held if when > begin) - begin
    print(f"from the key in the browser to the robot that holds: {1000 * stopped:.0f} ms, at 50 ms a step")
    assert stopped < 1.0  # on a busy machine; test_robot_page.py measures the request, the rest is the browser
    page.keyboard.press("s")
    thread.join(20)
    loop.close()
    expect(page.locator("#lost")).to_contain_text("The session is over")
    assert [(d.episode, d.label, d.by) for d in Labels(tmp_path).history()] == [(0, "success", "Ada")]


def test_a_robot_without_cameras_says_so(visit):
    with serve(Session(1), port=0) as server:
        expect(visit(server, "Ada").locator("#cameras")).to_contain_text("no camera")


# -- over recorded episodes ----------------------------------------------------------------------------------------------------------
def test_episodes_are_seen_and_labelled_by_keyboard(folder, review, visit):
    page = visit(review)
    expect(page.locator("#list li")).to_have_count(4)
    expect(page.locator("#episode")).to_have_text("Episode 0")
    expect(page.locator("#film")).to_have_js_property("duration", 1)
    until(lambda: page.locator("#film").evaluate("film => film.currentTime") > 0)  # it plays
    page.keyboard.press("s")
    expect(page.locator("#said")).to_contain_text("Say who you are")
    page.get_by_label("You").fill("Ada")
    page.get_by_label("You").press("Enter")
    page.keyboard.press("s")
    expect(page.locator("#episode")).to_have_text("Episode 1")
    page.keyboard.press("f")
    expect(page.locator("#episode")).to_have_text("Episode 2")
    expect(page.locator("#nofilm")).to_contain_text("no camera")
    page.keyboard.press("d")
    expect(page.locator("#episode")).to_have_text("Episode 3")
    assert Labels(folder).current() == {0: "success", 1: "failure", 2: "discard"}
    page.keyboard.press("u")
    expect(page.locator("#episode")).to_have_text("Episode 2")
    assert Labels(folder).current() == {0: "success", 1: "failure"}
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowUp")
    expect(page.locator("#episode")).to_have_text("Episode 0")
    expect(page.locator("#success")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("Control+f")  # the browser's own
    page.get_by_label("Show").select_option("unlabelled")
    expect(page.locator("#list li")).to_have_count(2)
    page.get_by_label("Show").select_option("failure")
    expect(page.locator("#list li")).to_have_count(1)
    page.get_by_label("Show").select_option("disagreement")
    expect(page.locator("#empty")).to_be_visible()
    assert [d.by for d in Labels(folder).history()] == ["Ada"] * 4
    page.reload()
    expect(page.get_by_label("You")).to_have_value("Ada")  # asked once


def test_a_state_from_before_a_label_does_not_take_it_back(review, visit):
    page = visit(review, "Ada")
    expect(page.locator("#list li")).to_have_count(4)
    held: list[tuple[Any, Any]] = []
    page.route("**/state*", lambda route: held.append((route, route.fetch())))
    page.keyboard.press("s")
    expect(page.locator("#episode")).to_have_text("Episode 1")
    while not held or '"success":1' not in held[-1][1].text():  # a state that has the first label
        if held:
            route, response = held.pop()
            route.fulfill(response=response)
        page.wait_for_timeout(50)
    page.keyboard.press("f")
    expect(page.locator("#episode")).to_have_text("Episode 2")
    route, response = held.pop()
    route.fulfill(response=response)  # and comes after the second
    while not held:
        page.wait_for_timeout(50)
    page.get_by_label("Show").select_option("unlabelled")
    expect(page.locator("#list li")).to_have_count(2)
    page.unroute_all(behavior="ignoreErrors")


def test_two_people_label_at_once(folder, review, visit):
    ada, ben = visit(review, "Ada"), visit(review, "Ben")
    for page in (ada, ben):
        expect(page.locator("#success")).to_be_enabled()
    ada.keyboard.press("s")
    ben.keyboard.press("f")  # of the same episode, named in each request
    until(lambda: len(Labels(folder).history()) == 2)
    last = Labels(folder).history()[-1]
    assert Labels(folder).current() == {0: last.label}
    for page in (ada, ben):
        expect(page.locator("#said .conflict")).to_contain_text("Episode 0: Ada says success, Ben says failure")
        expect(page.locator("#said .conflict")).to_contain_text(f"The last one counts: {last.label}")
        page.get_by_role("button", name="Look").click()
        expect(page.locator("#episode")).to_have_text("Episode 0")
        expect(page.locator("#opinions.conflict")).to_be_visible()
        page.get_by_label("Show").select_option("disagreement")
        expect(page.locator("#list li")).to_have_count(1)
    ben.keyboard.press("s")  # Ben gives way
    expect(ada.locator("#opinions")).to_contain_text("says Ada and Ben")
    assert Labels(folder).current() == {0: "success"}
    assert [d.label for d in Labels(folder).history() if d.by == "Ben"] == ["failure", "success"]


def test_what_the_robot_records_meanwhile_and_what_is_broken_appears(folder, review, visit):
    page = visit(review, "Ada")
    expect(page.locator("#list li")).to_have_count(4)
    (folder / "episodes" / "episode_00004.hdf5").write_bytes(b"junk")
    expect(page.locator("#list li")).to_have_count(5)
    page.locator("#list li button").last.click()
    expect(page.locator("#nofilm")).to_contain_text("not HDF5")
    expect(page.locator("#discard")).to_be_enabled()  # nothing else can be said of it
    assert {"success", "failure"}.isdisjoint(enabled(page))


# -- how it looks and reads ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_cut_and_buttons_are_large(session, live, review, visit, scheme):
    session.enter("label", "Was the cube lifted above the line, and did it stay there until the end?", episode=3)
    phone = {"viewport": {"width": 360, "height": 640}, "is_mobile": True, "has_touch": True, "color_scheme": scheme}
    for server in (live, review):
        page = visit(server, "Maximiliane", **phone)
        expect(page.locator("#success")).to_be_enabled()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        for button in page.locator(".controls > button").all():
            box = button.bounding_box()
            assert box["height"] >= 48
            assert box["y"] + box["height"] <= 640  # in reach without scrolling
            assert button.evaluate("b => b.scrollWidth <= b.clientWidth")
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (scheme == "light")


def test_texts_have_contrast(session, live, review, visit):
    """WCAG AA: 4.5 to 1; of large bold text 3 to 1."""
    session.enter("running", "Go", episode=3)
    session.show({}, 3)
    script = """() => {
      const parse = (c) => c.match(/[\\d.]+/g).map(Number);
      const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
      const found = [];
      for (const e of document.querySelectorAll("body *")) {
        const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
        if (!own || !e.offsetParent || e.closest(":disabled") || ["OPTION", "SCRIPT", "NOSCRIPT", "KBD"].includes(e.tagName)) continue;
        let at = e, back = [0, 0, 0, 0];
        while (at && (back = parse(getComputedStyle(at).backgroundColor), back[3] === 0)) at = at.parentElement;
        const [a, b] = [light(parse(getComputedStyle(e).color)), light(back)].sort((x, y) => y - x);
        const size = parseFloat(getComputedStyle(e).fontSize);
        found.push([(a + 0.05) / (b + 0.05), size, e.className + " " + e.textContent.slice(0, 30)]);
      }
      return found;
    }"""
    for server in (live, review):
        for scheme in ("light", "dark"):
            page = visit(server, color_scheme=scheme)
            expect(page.locator(".controls > button:enabled").first).to_be_enabled()
            found = page.evaluate(script)
            assert len(found) > 8
            assert not [row for row in found if row[0] < (3 if row[1] > 18.6 else 4.5)]


def test_a_screen_reader_is_told(session, live, review, visit):
    session.enter("label", "Was it lifted?", episode=3)
    session.show({"front": np.zeros((32, 48, 3), np.uint8)})
    page = visit(live)
    for name in ("Success", "Failure", "Discard", "Undo label", "Stop"):
        assert page.get_by_role("button", name=name, exact=True).count() == 1
    assert page.locator("#lost").get_attribute("role") == "alert"
    for name in ("message", "said"):
        assert page.locator(f"#{name}").get_attribute("aria-live") == "polite"
    assert page.get_by_role("progressbar", name="Steps of this episode").count() == 1
    expect(page.get_by_role("img", name="Camera front, live")).to_be_visible()
    page = visit(review)
    expect(page.get_by_role("button", name="Episode 2, 20 steps · 1.0 s, unlabelled")).to_be_visible()
    assert page.get_by_role("navigation", name="Episodes").count() == 1
