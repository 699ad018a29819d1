"""Access control for serve.py, and error responses.

By default the server listens on this computer alone. A page of another site could still send requests through
the user's browser, directly or by DNS rebinding, so Host and Origin are checked before a body is read. On any
other address every API request needs the token.
"""

import asyncio
import hmac
import sys
from urllib.parse import urlsplit

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from support.memory import is_out_of_memory
from support.watching import ContextTooLong, NotFound

MOST_BYTES = 2**20  # of a request's body
LOOPBACK = ("127.0.0.1", "localhost", "::1")
CSP = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


class Guard:
    """Refuses requests of other origins, of strangers, and those that are too large, before they are read."""

    def __init__(self, app, host: str, token: str):
        self.app, self.token, self.loopback = app, token, host in LOOPBACK

    async def __call__(self, scope, receive, send):
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close"})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        try:
            refusal = self.refusal(scope["method"], scope["path"], headers)
        except ValueError:  # of urlsplit
            refusal = 400, "malformed Host or Origin"
        body = b""
        if refusal is None and scope["method"] == "POST":
            try:
                body = await asyncio.wait_for(read_body(receive), 20)
            except asyncio.TimeoutError:
                refusal = 408, "the body of the request did not arrive within 20 seconds"
            if body is None:
                refusal = 413, f"the body is larger than {MOST_BYTES} bytes"
        if refusal is not None:
            return await failure(*refusal)(scope, receive, protected(send))

        given = [{"type": "http.request", "body": body}]

        async def again():  # the body that was read; after that, what the client does
            return given.pop() if given else await receive()

        await self.app(scope, again if scope["method"] == "POST" else receive, protected(send))

    def refusal(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.loopback and urlsplit(f"//{host}").hostname not in LOOPBACK:
            return (
                403,
                f"the Host header {host!r} is not a name of this server",
            )  # a DNS name that was pointed at this computer
        if not path.startswith(("/v1", "/lab", "/tokenize", "/detokenize")):
            return None if method in ("GET", "HEAD") else (405, "only GET is allowed here")
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, f"pages of {origin} may not use this server"
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return 403, "pages of other sites may not use this server"
        given = headers.get("authorization", "").partition(" ")[2]
        if self.token and not hmac.compare_digest(given.encode(), self.token.encode()):
            return 401, "this server needs its token: Authorization: Bearer ... (serve.py printed it)"
        if (
            method == "POST"
            and headers.get("content-type", "").split(";")[0].strip().lower() != "application/json"
        ):
            return 415, "the body must be application/json"
        if int_of(headers.get("content-length", "0")) > MOST_BYTES:
            return 413, f"the body is larger than {MOST_BYTES} bytes"
        return None


def int_of(text: str) -> int:
    return int(text) if text.isascii() and text.isdecimal() else MOST_BYTES + 1


async def read_body(receive) -> bytes | None:
    """A request's body; None if it is larger than MOST_BYTES, or the client has left."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MOST_BYTES or message["type"] == "http.disconnect":
            return None
        more = message.get("more_body", False)
    return body


def protected(send):
    """Wraps `send`: adds headers that keep a browser from doing more than the page needs."""
    extra = {"content-security-policy": CSP, "x-content-type-options": "nosniff"}
    extra |= {"referrer-policy": "no-referrer", "cache-control": "no-cache"}

    async def with_extra(message):
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in extra.items())]
        await send(message)

    return with_extra


def failure(status: int, message: str, code: str | None = None) -> JSONResponse:
    """An error as OpenAI's API words it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status)


def explained(error: Exception) -> JSONResponse:
    """Turns an exception of a request into an error body of OpenAI's API."""
    if isinstance(error, HTTPException):
        return failure(error.status_code, str(error.detail))
    if isinstance(error, RequestValidationError):
        found = error.errors()[0]
        where = ".".join(str(part) for part in found["loc"] if part != "body")
        return failure(400, f"{where}: {found['msg']}" if where else found["msg"])
    if isinstance(error, NotFound):
        return failure(404, str(error), "model_not_found")
    if is_out_of_memory(error):
        return failure(503, "out of memory: a smaller n, fewer tokens or a smaller model may fit")
    if isinstance(error, (ValueError, OSError)):
        return failure(
            400, str(error), "context_length_exceeded" if isinstance(error, ContextTooLong) else None
        )
    print(f"serve.py: {type(error).__name__}: {error}", file=sys.stderr)
    return failure(500, f"{type(error).__name__}: {error}")
