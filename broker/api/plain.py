"""The answer that nearly every call gets, 200 with a body on a connection that stays open, in one write.

web.Response makes a multidict of the headers, takes nine coroutines to send them, and is a third of what aiohttp
costs a call (docs/numbers.md). Whatever is unusual about an answer is still its to say.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from email.utils import formatdate
from functools import lru_cache
from typing import Final

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import SERVER_SOFTWARE
from aiohttp.web_request import BaseRequest

HEAD: Final = "HTTP/1.1 200 OK\r\n{}Content-Length: {}\r\nDate: {}\r\nServer: " + SERVER_SOFTWARE + "\r\n\r\n"


class PlainAnswer(web.StreamResponse):
    """`headers` are our own: nothing of what a peer sent may be in them."""

    def __init__(self, body: bytes, headers: Mapping[str, str]) -> None:
        super().__init__()
        self._content = body
        self._lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])

    @staticmethod
    def fits(request: BaseRequest) -> bool:
        """Whether this is how to answer it."""
        return request.keep_alive and request.version == HttpVersion11 and request.method != hdrs.METH_HEAD

    @property
    def keep_alive(self) -> bool:
        return True

    async def prepare(self, request: BaseRequest) -> AbstractStreamWriter:
        """Sends all of it. Raises ConnectionError if nobody is there any more."""
        transport, writer = request.transport, request.writer
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the caller is gone")
        head = HEAD.format(self._lines, len(self._content), _date(int(time.time())))
        transport.write(head.encode() + self._content)
        await writer.drain()
        return writer

    async def write_eof(self, data: bytes = b"") -> None:
        """There is nothing left."""


@lru_cache(maxsize=1)
def _date(second: int) -> str:
    """RFC 9110, 5.6.7."""
    return formatdate(second, usegmt=True)
