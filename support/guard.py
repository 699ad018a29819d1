"""Access control for serve.py, and its JSON: answers, and errors in the form of OpenAI's API.

By default the server listens on this computer alone. A page of another site could still send requests through
the user's browser, directly or by DNS rebinding, so Host and Origin are checked before a body is read. On any
other address every API request needs the token.
"""

import hmac
import json
import sys
from urllib.parse import urlsplit

import anyio
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException

from support.memory import is_out_of_memory

MOST_BYTES = 2**20  # of a request's body
SECONDS = 20  # in which it must arrive
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = {  # they keep a browser from doing more than the page needs
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class Guard:
    """Refuses requests from other origins or without the token, and those with too large a body."""

    def __init__(self, app, host: str, token: str):
        self.app = app
        self.token = token
        self.loopback = host in LOOPBACK

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def protected(message):
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            self.check(scope["method"], scope["path"], Headers(scope=scope))
            if scope["method"] == "POST":
                receive = with_body(await read_body(receive), receive)
        except (HTTPException, ValueError) as error:  # ValueError: urlsplit's
            return await (await error_response(None, error))(scope, receive, protected)
        return await self.app(scope, receive, protected)

    def check(self, method: str, path: str, headers: Headers) -> None:
        """Raises Refused, or ValueError for a Host or Origin that is no address."""
        host = headers.get("host", "")
        origin = headers.get("origin")
        if self.loopback and urlsplit(f"//{host}").hostname not in LOOPBACK:  # a rebound DNS name
            raise Refused(403, f"the Host header {host!r} is not a name of this server")
        if not path.startswith(("/v1", "/lab", "/tokenize", "/detokenize")):
            if method not in ("GET", "HEAD"):
                raise Refused(405, "only GET is allowed here")
            return
        foreign = origin is not None and urlsplit(origin).netloc != host
        if foreign or headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise Refused(403, "pages of other sites may not use this server")
        given = headers.get("authorization", "").partition(" ")[2]
        if self.token and not hmac.compare_digest(given.encode(), self.token.encode()):
            raise Refused(401, "this server needs its token: Authorization: Bearer ... (serve.py printed it)")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != "application/json":
            raise Refused(415, "the body must be application/json")


async def read_body(receive) -> bytes:
    body = b""
    more = True
    with anyio.move_on_after(SECONDS):
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MOST_BYTES:
                raise Refused(413, f"the body is larger than {MOST_BYTES} bytes")
    if more:
        raise Refused(408, f"the body of the request did not arrive within {SECONDS} seconds")
    return body


def with_body(body: bytes, receive):
    """`receive`, which first gives the body that was already read."""
    unread = [{"type": "http.request", "body": body}]

    async def again():
        return unread.pop() if unread else await receive()

    return again


# -----------------------------------------------------------------------------
# Answers and errors


class Refused(HTTPException):
    """An error with a status, and a code of OpenAI's API."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(status, message)
        self.code = code


class NotFound(Refused):
    """There is no run or model of this name (any more)."""

    def __init__(self, message: str):
        super().__init__(404, message, "model_not_found")


def to_json(data) -> str:
    """JSON, in which NaN and infinity are null."""
    try:
        return json.dumps(data, allow_nan=False)
    except ValueError:
        return json.dumps(json.loads(json.dumps(data), parse_constant=lambda _: None))


class Json(JSONResponse):
    def render(self, content) -> bytes:
        return to_json(content).encode()


def status_and_message(error: Exception) -> tuple[int, str]:
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail)
    if isinstance(error, RequestValidationError):
        found = error.errors()[0]
        where = ".".join(str(part) for part in found["loc"] if part != "body")
        return 400, f"{where}: {found['msg']}" if where else found["msg"]
    if is_out_of_memory(error):
        return 503, "out of memory: a smaller n, fewer tokens or a smaller model may fit"
    if isinstance(error, (ValueError, OSError)):
        return 400, str(error)
    print(f"serve.py: {type(error).__name__}: {error}", file=sys.stderr)
    return 500, f"{type(error).__name__}: {error}"


def error_body(error: Exception) -> tuple[int, dict]:
    """Status and body, in the form of OpenAI's API, for the exception of a request."""
    status, message = status_and_message(error)
    kind = "invalid_request_error" if status < 500 else "server_error"
    code = error.code if isinstance(error, Refused) else None
    return status, {"error": {"message": message, "type": kind, "param": None, "code": code}}


async def error_response(_, error: Exception) -> JSONResponse:
    status, body = error_body(error)
    return JSONResponse(body, status)
