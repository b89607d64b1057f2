"""The labelling page: beside a running robot, and later over the episodes that it recorded.

A live page shows a :class:`~postbc.robot.session.Session` and presses its buttons; a page of a folder shows films of its episodes and
appends to its labels. Either asks this server for the state a few times a second, and whatever does not answer looks dead on it.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import io
import itertools
import json
import secrets
import socket
import threading
import time
from collections import Counter, deque
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field

from postbc.errors import InputError, require

try:
    import jinja2
    import uvicorn
    from PIL import Image
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    from postbc.robot.guard import Guard, is_loopback
except ImportError as missing:
    raise InputError("The labelling page needs Starlette, uvicorn and Pillow.", found=str(missing),
                     remedy="pip install 'postbc[robot]', or label in the terminal") from missing  # fmt: skip

from postbc.progress import say
from postbc.robot.catalogue import Catalogue, session_folder
from postbc.robot.labels import LABELS, Label, Labels
from postbc.robot.session import Button, Session
from postbc.schemas import CountOrZero, parse, schema

PORT = 8017
NOTICE_SECONDS = 15.0
"""How long everybody is shown that two people pressed at once."""
_ASSETS = {"page.css": "text/css", "common.js": "text/javascript", "live.js": "text/javascript", "review.js": "text/javascript"}
_Name = Annotated[str, Field(max_length=100)]
T = TypeVar("T")


@schema
class _Pressed:
    button: Button
    by: _Name = ""
    episode: CountOrZero | None = None


@schema
class _Labelled:
    episode: CountOrZero
    label: Label
    by: _Name = ""


@schema
class _Undone:
    by: _Name = ""


class _Live:
    """The routes of a running session."""

    mode = "live"

    def __init__(self, session: Session) -> None:
        self.session, self.title = session, "Robot"
        self._pictures: dict[str, tuple[Any, bytes]] = {}
        self._asked = 0.0
        self._notices: deque[tuple[float, int, str]] = deque(maxlen=5)
        self._number = itertools.count(1)
        self.routes = [
            Route("/state", self.state),
            Route("/press", self.press, methods=["POST"]),
            Route("/frame/{camera:path}", self.frame),
        ]

    async def state(self, request: Request) -> Response:
        self._asked = time.monotonic()
        since = self._asked - NOTICE_SECONDS
        notices = [{"number": number, "text": text} for when, number, text in self._notices if when > since]
        return JSONResponse({**self.session.state(), "notices": notices})

    async def press(self, request: Request) -> Response:  # no thread between the request and the session: a stop is at once
        asked = await _body(request, _Pressed)
        try:
            self.session.press(asked.button, asked.by, asked.episode)
        except InputError as error:
            if asked.button in LABELS:
                said = f"{asked.by or 'Somebody'} said {asked.button} of episode {asked.episode}"
                self._notices.append((time.monotonic(), next(self._number), f"{said}, but that episode was decided already."))
            raise error
        return JSONResponse({})

    def frame(self, request: Request) -> Response:
        camera = request.path_params["camera"]
        if camera not in self.session.cameras:
            raise HTTPException(404, f"There is no camera {camera!r}.")
        frame = self.session.frame(camera)
        if frame is None:
            return Response(status_code=204)
        shown, picture = self._pictures.get(camera, (None, b""))
        if shown is not frame:
            buffer, image = io.BytesIO(), Image.fromarray(frame)
            image.thumbnail((960, 960))
            image.save(buffer, "JPEG", quality=80)
            picture = buffer.getvalue()
            self._pictures[camera] = frame, picture
        return Response(picture, media_type="image/jpeg")

    def close(self) -> None:
        """Let open pages hear that the session is over, or they would say that the connection is lost."""
        if self.session.phase == "finished" and time.monotonic() - self._asked < 1:
            time.sleep(0.6)


class _Review:
    """The routes over a folder of recorded episodes."""

    mode = "review"

    def __init__(self, folder: str | Path) -> None:
        folder = session_folder(folder)
        self.labels, self.catalogue, self.title = Labels(folder), Catalogue(folder), folder.resolve().name
        self.labels.history(), self.catalogue.all()  # what cannot be read is said now
        self.routes = [
            Route("/state", self.state),
            Route("/label", self.label, methods=["POST"]),
            Route("/undo", self.undo, methods=["POST"]),
            Route("/film/{episode:int}.mp4", self.film),
        ]

    def state(self, request: Request) -> Response:
        current, opinions = self.labels.current(), self.labels.opinions()
        episodes = [
            {
                "episode": r.episode, "steps": r.steps, "seconds": r.steps / r.rate if r.rate else None, "cameras": len(r.cameras),
                "error": r.error, "label": current.get(r.episode), "opinions": opinions.get(r.episode, {}),
            }
            for r in self.catalogue.all().values()
        ]  # fmt: skip
        counts = Counter(e["label"] or "unlabelled" for e in episodes)
        content = {"episodes": episodes, "labels": {name: counts[name] for name in (*LABELS, "unlabelled")}}
        seen = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
        return JSONResponse({"seen": seen} if request.query_params.get("seen") == seen else {"seen": seen, **content})

    async def label(self, request: Request) -> Response:
        asked = await _body(request, _Labelled)
        await run_in_threadpool(self._label, asked)
        return JSONResponse({})

    def _label(self, asked: _Labelled) -> None:
        require(asked.episode in self.catalogue.all(), "There is no such episode.", key="episode", found=asked.episode)
        self.labels.set(asked.episode, asked.label, asked.by)

    async def undo(self, request: Request) -> Response:
        asked = await _body(request, _Undone)
        episode = await run_in_threadpool(self.labels.undo, asked.by)
        require(episode is not None, "There is nothing to take back: none of the labels that count is yours.")
        return JSONResponse({"episode": episode})

    def film(self, request: Request) -> Response:
        return FileResponse(self.catalogue.film(request.path_params["episode"]), media_type="video/mp4")

    def close(self) -> None:
        self.catalogue.close()


def application(of: Session | str | Path, token: str | None = None) -> Starlette:
    """The page of a session or of a folder as an ASGI application; without a `token` it serves this machine alone."""
    page: _Live | _Review = _Live(of) if isinstance(of, Session) else _Review(of)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    assets = {name: _asset(name) for name in (*_ASSETS, "page.html.j2")}
    html = environment.from_string(assets["page.html.j2"]).render(mode=page.mode, title=page.title)

    async def index(request: Request) -> Response:
        return HTMLResponse(html)

    async def asset(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _ASSETS:
            raise HTTPException(404, "There is no such page.")
        return Response(assets[name], media_type=_ASSETS[name])

    async def refused(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": str(error)}, error.status_code if isinstance(error, HTTPException) else 409)

    app = Starlette(
        routes=[Route("/", index), *page.routes, Route("/{name}", asset)],
        middleware=[Middleware(Guard, token=token)],
        exception_handlers={InputError: refused, HTTPException: refused},
    )
    app.state.close = page.close
    return app


class Server:
    """The page, served by a thread of this process until :meth:`close`. Made by :func:`serve`."""

    def __init__(self, app: Starlette, listening: socket.socket, host: str, token: str | None) -> None:
        self.token, self.port = token, int(listening.getsockname()[1])
        shown = _own_address() if host in ("0.0.0.0", "::", "") else host
        shown = f"[{shown}]" if ":" in shown else shown
        self.link = f"http://{shown}:{self.port}/" + (f"?token={token}" if token else "")
        """What to open; it has the token, if there is one."""
        self._close = app.state.close
        self._server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none", timeout_graceful_shutdown=1)
        )
        self._thread = threading.Thread(target=self._server.run, args=([listening],), name="labelling page", daemon=True)
        self._thread.start()
        while self._thread.is_alive() and not self._server.started:
            time.sleep(0.01)

    def wait(self) -> None:
        """Until somebody closes it, or a signal ends the waiting."""
        self._thread.join()

    def close(self) -> None:
        """Stop serving; the port is free then. Pages that are open say that the connection is lost."""
        self._close()
        self._server.should_exit = True
        self._thread.join(5)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(of: Session | str | Path, host: str = "127.0.0.1", port: int = PORT, token: str | None = None) -> Server:
    """Serve the page of a running session, or of a session's folder, in a thread of this process, and print its link.

    Args:
        host: where to listen; another one than this machine's own needs a token.
        port: 0: a free one.
        token: what the link must have; made where one is needed and none is given.

    Raises:
        InputError: the folder is no session, or the port cannot be listened on.
    """
    require(token is None or len(token) >= 8, "The token is too short.", key="token", expected="at least 8 characters",
            remedy="leave it out: one is made")  # fmt: skip
    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe(16)
    app = application(of, token)
    try:
        kind = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        listening = socket.create_server((host, port), family=kind)
    except OSError as error:
        app.state.close()
        raise InputError("The page cannot listen there.", key="host, port", found=f"{host}:{port}: {error.strerror or error}",
                         remedy="close what listens there, or choose another port (0: a free one)") from None  # fmt: skip
    server = Server(app, listening, host, token)
    say(f"The labelling page: {server.link}")
    return server


def _asset(name: str) -> str:
    return importlib.resources.files("postbc.robot").joinpath(name).read_text(encoding="utf-8")


async def _body(request: Request, kind: type[T]) -> T:
    """The request's JSON, of a few bytes, as a `kind`."""
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > 10_000:
            raise HTTPException(413, "This request is too large.")
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise HTTPException(415, "This request is not JSON.")
    try:
        return parse(kind, json.loads(content))
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, str(error)) from None


def _own_address() -> str:
    """This machine's address in its network, as far as it knows; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address of documentation, which nobody has
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
