"""Who may use the labelling page: nobody who cannot be told from a stranger may move a robot.

On this machine alone (127.0.0.1) the page is open, but not to other sites that the browser has open: requests must name this machine
(no rebinding of names) and come from the page itself (no posts across sites). For other machines a token is needed, which a link
brings and a cookie keeps.
"""

from __future__ import annotations

import ipaddress
import secrets
from typing import Any
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """ASGI: lets requests through to `app` that may pass, and adds the headers that keep other sites out.

    Args:
        token: what the link must have; None: none is needed, and only this machine is served.
    """

    def __init__(self, app: Any, token: str | None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        if scope["type"] == "http":
            answer = self._answer(Request(scope))
            await (self.app if answer is None else answer)(scope, receive, sending)

    def _answer(self, request: Request) -> Response | None:
        """A refusal, or the way to the page; None: let it through."""
        if _is_foreign(request.method, request.headers):
            return PlainTextResponse("This request comes from another site.", 403)
        if self.token is None:
            name = _split(f"//{request.headers.get('host', '')}").hostname or ""
            return None if is_loopback(name) else PlainTextResponse("This page is for this machine alone.", 403)
        cookie = f"postbc_{(request.scope.get('server') or (None, 0))[1]}"  # cookies do not tell ports apart
        if request.url.path == "/" and (given := request.query_params.get("token")) is not None and self._is_token(given):
            answer = RedirectResponse("/", 303)  # the token leaves the address bar
            answer.set_cookie(cookie, self.token, httponly=True, samesite="lax")  # strict: a link in a message would not work
            return answer
        if self._is_token(request.cookies.get(cookie, "")):
            return None
        return PlainTextResponse("Open the link that the terminal shows: it has the token that this page needs.", 403)

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode("utf-8", "replace"), (self.token or "").encode())


def _is_foreign(method: str, headers: Headers) -> bool:
    """Whether something else than the page asks to change something. What is no browser says nothing, and is no stranger's page."""
    if method in ("GET", "HEAD"):
        return False
    origin = headers.get("origin")
    if origin is None:
        return headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none")
    return _split(origin).netloc != headers.get("host")


def _split(address: str) -> SplitResult:
    try:
        return urlsplit(address)
    except ValueError:  # half a bracket
        return urlsplit("")
