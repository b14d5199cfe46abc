"""The door of an HTTP listener: how many connections there may be, and how long one may keep us waiting.

aiohttp limits neither, and every connection is a descriptor that a device cannot have. Four waits end: for a
connection's first request and for a peer that does not read its answer (here, after `request_timeout`), for a body
(call.py, files.py), and for the next request (KEEP_ALIVE, by aiohttp).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, cast

from aiohttp import hdrs, web
from aiohttp.web_request import BaseRequest

from broker.metrics import Metrics
from broker.tenants.networks import is_within, site_of

KEEP_ALIVE: Final = (
    75.0  # seconds; longer than proxies keep theirs, or their next call meets a closing socket
)
BACKLOG: Final = 1024  # connections that the system holds until they are accepted

Handler = Callable[[BaseRequest], Awaitable[web.StreamResponse]]
Table = Mapping[tuple[str, str], Callable[[Any], Awaitable[web.StreamResponse]]]

DIRECT: Final = web.AppKey("direct", Table)
"""By method and path, without a query: handlers of an application that need no match_info, and so no router."""


class Door:
    """Of one listener: `open` serves an application through it. On the event loop's thread."""

    def __init__(
        self,
        max_connections: int,
        request_timeout: float,
        *,
        per_address: int | None = None,
        proxies: Sequence[str] = (),
    ) -> None:
        """`per_address`: of the connections, None: all of them; IPv6 counts by /64. `proxies`: networks of those that
        connect for others, and are not held to it."""
        self.max_connections = max_connections
        self.request_timeout = request_timeout
        self.connections = 0
        self.refused = 0
        self._per_address = per_address
        self._proxies = proxies
        self._sources: Counter[str] = Counter()  # connections, of those who are held to it
        self._silent: dict[object, Connection] = {}  # by aiohttp's protocol: no request came yet

    def count_in(self, metrics: Metrics) -> None:
        metrics.gauge("http_connections", "Connections to the HTTP API, now.", lambda: self.connections)
        metrics.read_counter(
            "http_connections_refused",
            "Connections over http.max_connections, or that of one address.",
            lambda: self.refused,
        )

    def runner(self, application: web.Application) -> web.AppRunner:
        return web.AppRunner(application, access_log=None, keepalive_timeout=KEEP_ALIVE)

    async def open(self, runner: web.AppRunner, host: str, port: int, *, shared: bool = False) -> None:
        """Sets the runner up and listens; `shared`: where other processes do, too. Raises OSError."""
        await runner.setup()
        assert runner.server is not None
        table = runner.app.get(DIRECT, {})
        runner.server.request_handler = self._hearing(runner.server.request_handler, table)
        await _Site(runner, self, host, port, shared).start()

    def source_of(self, peer: object) -> str:
        """What a connection counts as; `peer` as a transport says it. "": it counts for nobody."""
        address = str(peer[0]) if self._per_address is not None and isinstance(peer, tuple) else ""
        return "" if is_within(address, self._proxies) else site_of(address)

    def admit(self, connection: Connection, make: Callable[[], asyncio.Protocol]) -> asyncio.Protocol | None:
        """What serves it; None: there are too many."""
        if self._is_full(connection.source):
            self.refused += 1
            return None
        self.connections += 1
        if connection.source:
            self._sources[connection.source] += 1
        served = make()
        self._silent[served] = connection
        return served

    def _is_full(self, source: str) -> bool:
        most = self._per_address
        if source and most is not None and self._sources[source] >= most:
            return True
        return self.connections >= self.max_connections

    def left(self, served: asyncio.Protocol, source: str) -> None:
        self.connections -= 1
        if source:
            self._sources[source] -= 1
            if not self._sources[source]:
                del self._sources[source]
        self._silent.pop(served, None)

    def _hearing(self, handle: Handler, table: Table) -> Handler:
        def hear(request: BaseRequest) -> Awaitable[web.StreamResponse]:
            connection = self._silent.pop(request.protocol, None)
            if connection is not None:
                connection.stop_waiting()
            direct = table.get((request.method, request.raw_path))
            if direct is None or hdrs.EXPECT in request.headers:
                return handle(request)
            return direct(request)

        return hear  # a middleware would cost each call ten microseconds


class Connection(asyncio.Protocol):
    """Between a transport and aiohttp's protocol for it."""

    __slots__ = ("_door", "_make", "_served", "_timer", "_transport", "source")

    def __init__(self, door: Door, make: Callable[[], asyncio.Protocol]) -> None:
        self._door = door
        self._make = make
        self._served: asyncio.Protocol | None = None  # None: it was not let in
        self._timer: asyncio.TimerHandle | None = None
        self.source = ""  # see Door.source_of

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self.source = self._door.source_of(transport.get_extra_info("peername"))
        self._served = self._door.admit(self, self._make)
        if self._served is None:
            self._transport.abort()
            return
        self._wait()
        self._served.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.stop_waiting()
        if self._served is not None:
            self._door.left(self._served, self.source)
            self._served.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._served is not None:
            self._served.data_received(data)

    def eof_received(self) -> bool | None:
        return None if self._served is None else self._served.eof_received()

    def pause_writing(self) -> None:
        assert self._served is not None
        self._wait()
        self._served.pause_writing()

    def resume_writing(self) -> None:
        assert self._served is not None
        self.stop_waiting()
        self._served.resume_writing()

    def _wait(self) -> None:
        self.stop_waiting()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._door.request_timeout, self._transport.abort)

    def stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Site(web.BaseSite):
    """What web.TCPSite is, with our protocol in front of aiohttp's."""

    __slots__ = ("_door", "_host", "_port", "_shared")

    def __init__(self, runner: web.AppRunner, door: Door, host: str, port: int, shared: bool) -> None:
        super().__init__(runner, backlog=BACKLOG)
        self._shared = shared
        self._door = door
        self._host = host
        self._port = port

    @property
    def name(self) -> str:
        return f"http://{self._host}:{self._port}"

    async def start(self) -> None:
        await super().start()
        make = self._runner.server
        assert make is not None  # after setup
        self._server = await asyncio.get_running_loop().create_server(
            lambda: Connection(self._door, make),
            self._host,
            self._port,
            backlog=self._backlog,
            reuse_port=self._shared or None,
        )
