"""The way in to the page: a listener that lets through who may look.

The page itself listens on loopback and answers only to what the gate passes on, which it marks by a secret. On loopback
the gate lets through what asks for this machine by its own name, and no other site's page, which a browser would let
talk to 127.0.0.1. From other machines it lets through who shows the token. A first visit brings ?token=...; the answer
is a cookie, which the page's own requests bring by themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

MARK = "X-Pipeline-Gate"  # the header with the secret
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST_HEAD = 16_384  # bytes of a request's head
HEAD_S = 10.0


class Gate:
    """Listens at an address and passes connections on to a port of this machine, once they show the token.

    Args:
        host: to listen at; any that is not loopback asks for the token.
        port: to listen at; 0 takes a free one.
        inner: port of the page on 127.0.0.1.
        secret: by which the page knows what comes through the gate.
    Raises: OSError where it cannot listen there.
    """

    def __init__(self, host: str, port: int, inner: int, secret: str) -> None:
        self.token = None if host in LOOPBACK else secrets.token_urlsafe(24)
        self._inner, self._mark = inner, f"{MARK}: {secret}\r\n\r\n".encode()
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, host, port, limit=MOST_HEAD))
        self.port = self._server.sockets[0].getsockname()[1]
        self.cookie = f"pipeline_view_{self.port}"  # browsers keep cookies by host, whatever the port
        threading.Thread(target=self._loop.run_forever, name="gate", daemon=True).start()

    def close(self) -> None:
        """Let nobody in any more."""
        self._loop.call_soon_threadsafe(self._server.close)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), HEAD_S)
            answer = self._judge(head)
            if answer is not None:
                writer.write(answer)
                await writer.drain()
                return
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._inner)
            inner_writer.write(head[:-2] + self._mark)
            await asyncio.gather(_pass_on(reader, inner_writer), _pass_on(inner_reader, writer))
        except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            pass
        finally:
            with contextlib.suppress(OSError):
                writer.close()

    def _judge(self, head: bytes) -> bytes | None:
        """The answer to a request that is not passed on; None for one that may pass."""
        lines = head.decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines[1:])
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        if "origin" in headers and urlsplit(headers["origin"]).netloc != headers.get("host"):  # a frame's may be "null"
            return _answer("403 Forbidden", "this page is not open to other sites")
        if self.token is None:
            if urlsplit(f"//{headers.get('host', '')}").hostname in LOOPBACK:
                return None
            return _answer("403 Forbidden", "this page answers to 127.0.0.1 alone")
        pairs = (pair.partition("=") for pair in headers.get("cookie", "").split(";"))
        cookies = {name.strip(): value for name, _, value in pairs}
        if _same(cookies.get(self.cookie, ""), self.token):
            return None
        target = lines[0].split(" ")[1] if lines[0].count(" ") == 2 else ""
        if _same(parse_qs(urlsplit(target).query).get("token", [""])[0], self.token):
            cookie = f"Set-Cookie: {self.cookie}={self.token}; HttpOnly; SameSite=Strict; Path=/\r\nLocation: /\r\n"
            return _answer("303 See Other", "", cookie)
        return _answer("403 Forbidden", "open the address with the token that `pipeline view` printed")


@contextlib.contextmanager
def behind_gate(secret: str) -> Iterator[None]:
    """Let the viser servers that are made inside answer only to requests that bring the secret.

    Viser has no setting for it: any program of this machine, and any site's page in a browser, could talk to its port.
    """
    import websockets.asyncio.server as module

    serve = module.serve

    def guarded(*words: Any, process_request: Any, **more: Any) -> Any:
        def judge(connection: Any, request: Any) -> Any:
            shown = request.headers.get_all(MARK)
            if len(shown) != 1 or not _same(shown[0], secret):
                return connection.respond(403, "this port is for the gate alone")
            return process_request(connection, request)

        return serve(*words, process_request=judge, **more)

    module.serve = guarded
    try:
        yield
    finally:
        module.serve = serve


def _same(shown: str, token: str) -> bool:
    return hmac.compare_digest(shown.encode("utf-8", "replace"), token.encode())


def _answer(status: str, text: str, more: str = "") -> bytes:
    body = text.encode()
    facts = f"Content-Type: text/plain\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    return f"HTTP/1.1 {status}\r\n{more}{facts}\r\n".encode() + body


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy bytes until the one side ends, then end the other."""
    try:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    finally:
        with contextlib.suppress(OSError):
            writer.close()
