"""A device whose addresses fail, whose network changes, whose app sleeps: against a real server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random

import orjson
import pytest
import uvloop
from aiohttp import web

from broker.dispatch.document import Content, Reconnect
from broker.dispatch.signing import SigningKey
from clients.addresses import Address, Hints
from clients.device import Credentials, Device, DeviceStopped, LinkSettings
from clients.dispatch import Dispatch
from clients.journal import Journal
from clients.local_server import LocalServer
from clients.publisher import Publisher
from clients.session import Phase
from tests.patience import PATIENCE

QUICK = LinkSettings(backoff_base=0.01, backoff_cap=0.05)
SLOW = LinkSettings(backoff_base=1000, backoff_cap=1000)
HINTS = Hints(stagger=6.0, greeting=6.0)  # a busy machine answers later than one would think


class Port:
    """One that takes connections, counts them, and does with them what `kind` says."""

    def __init__(self, kind: str, target: tuple[str, int] = ("", 0)) -> None:
        self.kind = kind  # mute: never answers; rude: closes at once; good: a way to the target
        self.connections = 0
        self._target = target
        self._writers: set[asyncio.StreamWriter] = set()

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.number: int = self._server.sockets[0].getsockname()[1]

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.number}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        with contextlib.suppress(OSError):
            if self.kind == "good":
                await self._connect_through(reader, writer)
            elif self.kind == "mute":
                await reader.read()
        writer.transport.abort()

    async def _connect_through(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(*self._target)
        self._writers.add(back)
        await asyncio.gather(self._pump(reader, back), self._pump(there, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
        writer.transport.abort()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def close(self) -> None:
        self._server.close()
        self.cut()
        await self._server.wait_closed()


@pytest.fixture
async def port(server: LocalServer) -> AsyncIterator[Callable[[str], Port]]:
    """`await port("good")` …"""
    ports: list[Port] = []

    async def open_port(kind: str) -> Port:
        ports.append(Port(kind, server.addresses.mqtt))
        await ports[-1].open()
        return ports[-1]

    yield open_port  # type: ignore[misc]
    for one in ports:
        await one.close()


def make_device(server: LocalServer, name: str, *servers: str, **more: object) -> Device:
    options: dict[str, object] = {
        "on_push": print, "servers": servers, "ordered": True, "hints": HINTS, "settings": QUICK,
        "device_key": server.app.device_key,
    }  # fmt: skip
    return Device(server.app.app_key, name, **{**options, **more})  # type: ignore[arg-type]


async def happens(true: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while True:
            if true():
                return
            await asyncio.sleep(0.01)


async def online(device: Device) -> None:
    await asyncio.wait_for(device.connected(), PATIENCE)


# Addresses that fail


async def test_an_address_that_swallows_everything(server: LocalServer, silent_port: int, port) -> None:
    good = await port("good")
    async with make_device(server, "swallowed", f"tcp://127.0.0.1:{silent_port}", good.address) as device:
        await online(device)


async def test_an_address_where_nobody_speaks(server: LocalServer, port) -> None:
    mute, good = await port("mute"), await port("good")
    async with make_device(server, "mute", mute.address, good.address) as device:
        await online(device)
        assert (mute.connections, good.connections) == (1, 1)
        good.cut()
        await device.event("back")
        assert (mute.connections, good.connections) == (1, 2)  # the last good one first


async def test_an_address_that_hangs_up(server: LocalServer, port) -> None:
    rude, good = await port("rude"), await port("good")
    async with make_device(server, "rude", rude.address, good.address) as device:
        await online(device)


async def test_without_another_address_a_slow_server_is_waited_for(server: LocalServer, port) -> None:
    """Its patience is that of the settings, not that of the race."""
    mute = await port("mute")
    settings = LinkSettings(connect_timeout=1.0, backoff_base=0.01, backoff_cap=0.01)
    async with make_device(
        server, "patient", mute.address, settings=settings, hints=Hints(greeting=0.01)
    ) as device:
        began = asyncio.get_running_loop().time()
        await happens(lambda: mute.connections == 2)
        assert asyncio.get_running_loop().time() - began >= 0.99
        assert not device.online


async def test_a_path_that_dies_is_left_for_the_other(server: LocalServer, port) -> None:
    """As shipped: the stagger of 2.5 s, a backoff of up to one second."""
    first, second = await port("good"), await port("good")
    async with make_device(
        server,
        "dead-path",
        first.address,
        second.address,
        settings=LinkSettings(stable_after=0),
        hints=Hints(),
    ) as device:
        await online(device)
        first.kind = "mute"
        first.cut()
        await asyncio.wait_for(device.event("back"), PATIENCE)
        assert first.connections > 1
        assert second.connections > 0


async def test_every_address_refuses_and_later_one_does_not(
    server: LocalServer, caplog: pytest.LogCaptureFixture
) -> None:
    host, number = server.addresses.mqtt
    with socket.socket() as holder:
        holder.bind((host, 0))
        dead = f"{host}:{holder.getsockname()[1]}"
        caplog.set_level("INFO", "clients")
        async with make_device(server, "refused", dead) as device:
            await happens(lambda: "could not connect" in caplog.text)
            assert dead in caplog.text
            assert not device.online
        async with make_device(server, "refused", dead, f"{host}:{number}") as device:
            await online(device)


async def test_what_was_good_is_tried_first_by_the_next_process(
    server: LocalServer, port, tmp_path: Path
) -> None:
    mute, good = await port("mute"), await port("good")
    options = {"journal": tmp_path / "journal", "network": "home"}
    for _ in range(2):
        async with make_device(server, "remembers", mute.address, good.address, **options) as device:
            await online(device)
    assert (mute.connections, good.connections) == (1, 2)
    options["network"] = "office"
    async with make_device(server, "remembers", mute.address, good.address, **options) as device:
        await online(device)
    assert (mute.connections, good.connections) == (2, 3)
    journal = Journal(tmp_path / "journal", 1)
    networks = journal.networks()
    journal.close()
    assert list(networks) == ["home", "office"]
    assert networks["office"]["addresses"]["good"] == good.address


async def test_a_journal_that_cannot_be_written_stops_no_device(
    server: LocalServer, port, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = await port("good")
    async with make_device(server, "full-disk", good.address, journal=tmp_path / "journal") as device:
        await online(device)
        assert device._journal is not None
        device._journal._db.execute("DROP TABLE networks")
        device.network_changed("wifi", "elsewhere")
        await device.event("back")
    assert "is not kept" in caplog.text


@pytest.mark.parametrize("transport", ["ws", "tcp"])
async def test_one_list_has_addresses_of_any_kind(server: LocalServer, transport: str) -> None:
    assert server.addresses.ws is not None
    place = server.addresses.ws if transport == "ws" else server.addresses.mqtt
    async with make_device(server, f"by-{transport}", f"{transport}://{place[0]}:{place[1]}") as device:
        await online(device)
        await device.event("hello", "x" * 4000)
        device.app_state("foreground")


async def test_an_app_that_asked_for_tls_is_sent_nowhere_without(server: LocalServer) -> None:
    device = make_device(server, "safe", "tls://127.0.0.1:1", tls=ssl.create_default_context())
    secret, plain = Address("h", 1, "tls"), Address("h", 1)
    assert device._approach._safe([plain, secret]) == [secret]
    assert make_device(server, "plain", "h")._approach._safe([plain, secret]) == [plain, secret]


def test_a_device_on_uvloop(server: LocalServer) -> None:
    """Its handles and transports are not those of asyncio."""
    host, number = server.addresses.mqtt

    async def story() -> None:
        with socket.socket() as holder:
            holder.bind((host, 0))
            dead = f"{host}:{holder.getsockname()[1]}"
            async with make_device(server, "on-uvloop", dead, f"{host}:{number}") as device:
                await online(device)
                device.network_changed("wifi")
                await online(device)
                await device.event("hello")

    uvloop.run(story())


# Another network


async def test_a_new_network_means_a_new_connection_at_once(server: LocalServer, port) -> None:
    good = await port("good")
    states: list[bool] = []
    async with make_device(
        server,
        "roamer",
        good.address,
        settings=SLOW,
        on_state=states.append,
        link="cellular",
        carrier="46000",
    ) as device:
        await online(device)
        device.network_changed("wifi", "wifi:home")
        assert not device.online
        await online(device)
        assert good.connections == 2
        assert states == [True, False, True]
        device.network_changed("wifi", "wifi:home")  # nothing new: it asks whether anybody is there
        assert device.online
    assert states == [True, False, True, False]


async def test_without_a_network_nothing_is_tried(server: LocalServer, port) -> None:
    good = await port("good")
    device = make_device(server, "in-a-tunnel", good.address)
    device.network_changed("none")
    async with device:
        good.connections = 0
        await happens(lambda: device._session._attempt >= 3)
        assert good.connections == 0
        device.network_changed("cellular")
        await online(device)
        device.network_changed("none")  # for a moment: the connection may live through it
        assert device.online


async def test_what_failed_on_one_network_is_not_held_against_it_on_another(
    server: LocalServer, port
) -> None:
    first, second = await port("mute"), await port("good")
    async with make_device(server, "per-network", first.address, second.address, network="a") as device:
        await online(device)
        first.kind = "good"
        device.network_changed("wifi", "b")
        await online(device)
        assert (first.connections, second.connections) == (2, 1)
        device.network_changed("wifi", "a")
        await online(device)
        assert (first.connections, second.connections) == (2, 2)


async def test_a_device_that_ended_is_not_woken_by_its_phone(server: LocalServer, port) -> None:
    good = await port("good")
    device = make_device(server, "ended", good.address)
    device.app_state("doze")
    device.network_changed("wifi")
    async with device:
        await online(device)
    device.network_changed("cellular")
    device.app_state("foreground")
    assert (good.connections, device.online) == (1, False)


# The app's state


async def test_who_opens_the_app_need_not_wait_for_the_backoff(server: LocalServer, port) -> None:
    rude = await port("rude")
    async with make_device(server, "opened", rude.address, settings=SLOW, jitter=lambda: 0.9) as device:
        await happens(lambda: rude.connections and device._session.phase is Phase.RESTING)
        rude.kind = "good"
        device.app_state("foreground")
        await online(device)


async def test_in_the_background_a_device_waits_longer(server: LocalServer) -> None:
    device = make_device(
        server, "asleep", "127.0.0.1:1", settings=LinkSettings(backoff_base=1, backoff_cap=60)
    )
    device.app_state("background")
    assert (device._session.settings.backoff_base, device._session.settings.backoff_cap) == (2, 300)
    device.app_state("doze")
    assert (device._session.settings.backoff_base, device._session.settings.backoff_cap) == (5, 900)
    device.app_state("foreground")
    assert (device._session.settings.backoff_base, device._session.settings.backoff_cap) == (1, 60)


# Dispatch


KEY = SigningKey(bytes(range(32)))


class Doors:
    """Answers as the installation would, with the addresses that it is given."""

    def __init__(self) -> None:
        self.addresses: tuple[str, ...] = ()
        self.questions: list[dict[str, str]] = []
        self.told: list[dict[str, object]] = []
        self.reported = asyncio.Event()

    async def open(self) -> str:
        app = web.Application()
        app.router.add_get("/v1/dispatch", self._answer)
        app.router.add_post("/v1/dispatch/report", self._report)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, number = self._runner.addresses[0][:2]
        return f"http://{host}:{number}"

    async def _answer(self, request: web.Request) -> web.Response:
        self.questions.append(dict(request.query))
        content = Content(
            addresses=self.addresses,
            carrier="mobile",
            heartbeat="100 50 200",
            reconnect=Reconnect(base=20, cap=70, stagger=60_000, ban=1000, parallel=2),
            region="",
            ttl=3600,
        )
        return web.Response(body=KEY.sign(content, time.time()).raw)

    async def _report(self, request: web.Request) -> web.Response:
        self.told.append(orjson.loads(await request.read()))
        self.reported.set()
        return web.json_response({})

    async def close(self) -> None:
        await self._runner.cleanup()


@pytest.fixture
async def doors() -> AsyncIterator[Doors]:
    doors = Doors()
    yield doors
    await doors.close()


def dispatch_of(server: LocalServer, *built_in: str) -> Dispatch:
    return Dispatch(server.app.app_key, [KEY.public], Random(1).random, built_in=built_in)


async def test_dispatch_says_where_to_go_and_hears_how_it_went(
    server: LocalServer, port, doors: Doors, tmp_path: Path
) -> None:
    door, rude, good = await doors.open(), await port("rude"), await port("good")
    doors.addresses = (rude.address, good.address)
    options = {"journal": tmp_path / "journal", "link": "cellular", "carrier": "46000", "doors": [door]}
    async with make_device(server, "dispatched", dispatch=dispatch_of(server), **options) as device:
        await online(device)
        await asyncio.wait_for(doors.reported.wait(), PATIENCE)
        assert (rude.connections, good.connections) == (1, 1)
        assert device._approach.hints.ban == 1
        assert device._session.settings.backoff_cap == 0.07
    asked = {"app": server.app.app_key, "carrier": "46000", "link": "cellular"}
    assert doors.questions == [asked]
    tried = [
        {"address": rude.address, "ok": 0, "failed": 1},
        {"address": good.address, "ok": 1, "failed": 0},
    ]
    assert doors.told == [asked | {"tried": tried}]
    async with make_device(server, "dispatched", dispatch=dispatch_of(server), **options) as device:
        await online(device)  # it kept the answer
    assert (rude.connections, good.connections, len(doors.questions)) == (1, 2, 1)


async def test_where_dispatch_is_out_of_reach_the_built_in_list_is_used(server: LocalServer, port) -> None:
    good = await port("good")
    dispatch = dispatch_of(server, good.address)
    async with make_device(server, "built-in", dispatch=dispatch, doors=["http://127.0.0.1:1"]) as device:
        await online(device)


async def test_a_new_network_is_asked_about(server: LocalServer, port, doors: Doors) -> None:
    door, good = await doors.open(), await port("good")
    doors.addresses = (good.address,)
    device = make_device(server, "asks-again", dispatch=dispatch_of(server), doors=[door], link="wifi")
    async with device:
        await online(device)
        device.network_changed("cellular", carrier="46001")
        await online(device)
        await happens(lambda: len(doors.questions) == 2 and device._approach._asking is None)
    assert [question["link"] for question in doors.questions] == ["wifi", "cellular"]


# A token that is renewed in time, where the API is out of reach


async def test_a_token_that_is_still_good_is_used_where_it_cannot_be_renewed(
    server: LocalServer, port
) -> None:
    good, asked = await port("good"), []

    async def renew(known: Credentials) -> Credentials:
        asked.append(known)
        raise ConnectionError("no way to the API")

    app = server.create_app("renewal")
    async with Publisher(app.app_key, app.master_secret, server.addresses.http) as publisher:
        registered = await publisher.register_device("late")
    device = Device(
        app.app_key, "late", on_push=print, token=registered.token, servers=[good.address], settings=QUICK,
        renew=renew, clock=time.time,
    )  # fmt: skip
    device._credentials = Credentials(app.app_key, "late", registered.token, time.time() + 60)
    async with device:
        await online(device)
        assert len(asked) == 1
    expired = Device(
        app.app_key,
        "late",
        on_push=print,
        token=registered.token,
        servers=[good.address],
        settings=QUICK,
        renew=renew,
    )
    expired._credentials = Credentials(app.app_key, "late", registered.token, time.time() - 1)
    before = good.connections
    async with expired:
        await happens(lambda: len(asked) >= 3)
        assert good.connections == before


async def test_a_renewal_that_says_no_is_final(server: LocalServer, port) -> None:
    good = await port("good")

    async def renew(known: Credentials) -> Credentials:
        raise DeviceStopped("not any more")

    device = Device("app", "gone", on_push=print, token="t", servers=[good.address], renew=renew)
    device._credentials = Credentials("app", "gone", "t", time.time() + 60)
    async with device:
        with pytest.raises(DeviceStopped, match="not any more"):
            await online(device)
