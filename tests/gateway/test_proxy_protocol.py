"""PROXY headers: rows for both versions, then connections that a proxy opens: headers by hand, and haproxy's."""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import itertools
import os
import resource
import shutil
import signal
import socket
import ssl
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.config import Config, ConfigError, load_config
from clients.local_server import LocalServer
from gateway import acceptor
from gateway import ports as ports_of_workers
from gateway.connection import Connection
from gateway.doorkeeper import TurnedAway
from gateway.listeners import Listener, bind, listen_tcp, listen_websocket
from gateway.mqtt import Pingreq, Pingresp, encode
from gateway.node import NodeSettings
from gateway.proxy_listener import MAX_NOTES
from gateway.proxy_protocol import MAX_HEADER, MAX_LINE, SIGNATURE, Header, ProxyError, Route, read_header
from gateway.websocket import SUBPROTOCOLS
from tests.conftest import StartServer
from tests.gateway.connected import until
from tests.gateway.peer import Closed, Peer, connect_packet, counted, eventually, push, sooner_or_later, works
from tests.gateway.world import World
from tests.patience import PATIENCE

PHONE, EDGE = ("192.0.2.7", 40_000), ("198.51.100.1", 1883)
PHONE6, EDGE6 = ("2001:db8::7", 40_000), ("2001:db8:1::1", 8883)
LOCAL_COMMAND, PROXY_COMMAND = 0x20, 0x21


def route(source: tuple[str, int], destination: tuple[str, int]) -> Route:
    packed = b"".join(ipaddress.ip_address(address).packed for address, _ in (source, destination))
    return Route(packed + struct.pack("!HH", source[1], destination[1]))


FOUR, SIX = route(PHONE, EDGE), route(PHONE6, EDGE6)


def line(*words: object) -> bytes:
    """Version 1."""
    return " ".join(["PROXY", *map(str, words)]).encode() + b"\r\n"


def record(route: Route | None, *, command: int = PROXY_COMMAND, extensions: bytes = b"") -> bytes:
    """Version 2."""
    if route is None:
        return raw(command, 0, extensions)
    return raw(command, 0x21 if ":" in route.source[0] else 0x11, route.packed + extensions)


def extension(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


def raw(command: int, family: int, body: bytes, length: int | None = None) -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, family, len(body) if length is None else length) + body


FOUR_LINE = line("TCP4", PHONE[0], EDGE[0], PHONE[1], EDGE[1])
SIX_LINE = line("TCP6", PHONE6[0], EDGE6[0], PHONE6[1], EDGE6[1])
LONGEST_LINE = line("TCP6", "ffff" + ":ffff" * 7, "ffff" + ":ffff" * 7, 65_535, 65_535)

# Rows

HEADERS = [
    pytest.param(FOUR_LINE, FOUR, id="line, IPv4"),
    pytest.param(SIX_LINE, SIX, id="line, IPv6"),
    pytest.param(line("UNKNOWN"), None, id="line, unknown"),
    pytest.param(line("UNKNOWN", "ffff::1", "whatever it says"), None, id="line, unknown with words"),
    pytest.param(
        bytes.fromhex("0d0a0d0a000d0a515549540a 21 11 000c c0000207 c6336401 9c40 075b"),
        FOUR,
        id="record, IPv4, in hex",
    ),
    pytest.param(record(SIX), SIX, id="record, IPv6"),
    pytest.param(record(FOUR, extensions=extension(0x05, b"id" * 60)), FOUR, id="record with a unique id"),
    pytest.param(record(None, command=LOCAL_COMMAND), None, id="record, local"),
    pytest.param(raw(0x20, 0x11, bytes(12)), None, id="record, local with addresses"),
    pytest.param(record(None), None, id="record, family unspecified"),
    pytest.param(raw(0x21, 0x31, bytes(216)), None, id="record, a Unix socket"),
]


@pytest.mark.parametrize(("header", "route"), HEADERS)
def test_a_header_is_read_whole_in_pieces_and_with_what_follows(header: bytes, route: Route | None) -> None:
    expected = Header(len(header), route)
    assert read_header(header) == expected
    for end in range(len(header)):
        assert read_header(header[:end]) is None
    assert read_header(header + header) == expected
    assert read_header(header + b"\x10\x0c\0\4MQTT") == expected


ERRORS = [
    pytest.param(b"\x10\x0c\0\4MQTT", "no PROXY header", id="MQTT"),
    pytest.param(b"\x16\x03\x01", "no PROXY header", id="TLS"),
    pytest.param(b"GET /mqtt HTTP/1.1\r\n", "no PROXY header", id="WebSocket"),
    pytest.param(b"PROXX", "no PROXY header", id="nearly a line"),
    pytest.param(SIGNATURE[:-1] + b"X", "no PROXY header", id="nearly a record"),
    pytest.param(b"PROXY TCP4" + b" " * MAX_LINE, "longer than 107", id="a line without an end"),
    pytest.param(line("UNKNOWN", "x" * 92), "longer than 107", id="a line that is too long"),
    pytest.param(line("TCP4"), "two addresses", id="nothing but a family"),
    pytest.param(line("UDP4", PHONE[0], EDGE[0], 1, 2), "must be PROXY TCP4", id="another family"),
    pytest.param(line("TCP4", PHONE[0], EDGE[0], 1), "two addresses", id="a port missing"),
    pytest.param(line("TCP4", PHONE[0], EDGE[0], 1, 2, 3), "two addresses", id="a word too many"),
    pytest.param(line("TCP4", "", PHONE[0], EDGE[0], 1, 2), "two addresses", id="two spaces"),
    pytest.param(line("TCP4", PHONE6[0], EDGE[0], 1, 2), "bad address", id="the other family"),
    pytest.param(line("TCP4", "192.0.2.300", EDGE[0], 1, 2), "bad address", id="no address"),
    pytest.param(line("TCP6", "fe80::1%eth0", EDGE6[0], 1, 2), "bad address", id="a zone"),
    pytest.param(line("TCP4", PHONE[0], EDGE[0], 65_536, 2), "a port", id="a port that is too large"),
    pytest.param(line("TCP4", PHONE[0], EDGE[0], "01", 2), "a port", id="a port with a zero before it"),
    pytest.param(line("TCP4", PHONE[0], EDGE[0], -1, 2), "a port", id="a port below zero"),
    pytest.param("PROXY TCP4 1.1.1.1 1.1.1.1 ١ 2\r\n".encode(), "a port", id="digits of another script"),
    pytest.param(raw(0x11, 0x11, bytes(12)), "version 1 is not known", id="another version"),
    pytest.param(raw(0x22, 0x11, bytes(12)), "command 2 is not known", id="another command"),
    pytest.param(raw(0x21, 0x12, bytes(12)), "family 0x12 is no stream", id="UDP"),
    pytest.param(raw(0x21, 0x11, bytes(11)), "11 bytes cannot hold", id="too short for IPv4"),
    pytest.param(raw(0x21, 0x21, bytes(35)), "35 bytes cannot hold", id="too short for IPv6"),
    pytest.param(raw(0x21, 0x11, b"", 65_535), "65551 bytes; 4096 are allowed", id="too long"),
]


@pytest.mark.parametrize(("data", "told"), ERRORS)
def test_what_is_no_header_says_why(data: bytes, told: str) -> None:
    with pytest.raises(ProxyError, match=told):
        read_header(data)


def test_the_longest_line_there_can_be_is_taken() -> None:
    assert len(LONGEST_LINE) == 104
    found = read_header(LONGEST_LINE)
    assert found is not None
    assert found.route is not None
    assert found.route.source == ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 65_535)
    padded = line("UNKNOWN", "x" * (MAX_LINE - len(line("UNKNOWN", ""))))
    assert len(padded) == MAX_LINE
    assert read_header(padded) == Header(MAX_LINE)


ports = st.integers(0, 65_535)
fours = st.tuples(st.ip_addresses(v=4).map(str), ports)
sixes = st.tuples(st.ip_addresses(v=6).map(str), ports)
extensions = st.lists(st.builds(extension, st.integers(0, 255), st.binary(max_size=300)), max_size=8)


@settings(deadline=None)
@given(st.tuples(fours, fours) | st.tuples(sixes, sixes), extensions.map(b"".join), st.binary(max_size=40))
def test_any_addresses_come_back(
    ends: tuple[tuple[str, int], tuple[str, int]], extensions: bytes, rest: bytes
) -> None:
    source, destination = ends
    text = line("TCP6" if ":" in source[0] else "TCP4", source[0], destination[0], source[1], destination[1])
    for header in (text, record(route(*ends), extensions=extensions)):
        found = read_header(header + rest)
        assert found is not None
        assert found.size == len(header)
        assert found.route is not None
        assert (found.route.source, found.route.destination) == ends


@settings(deadline=None)
@given(
    st.sampled_from([b"", b"PROXY ", b"PROXY TCP4 ", SIGNATURE, SIGNATURE + b"\x21"]),
    st.binary(max_size=400),
)
def test_whatever_comes_is_a_header_or_none_or_needs_more(begin: bytes, rest: bytes) -> None:
    data = begin + rest
    try:
        found = read_header(data)
    except ProxyError:
        return
    assert found is None or 0 < found.size <= len(data)


@settings(deadline=None)
@given(st.binary(min_size=MAX_HEADER, max_size=MAX_HEADER))
def test_so_much_is_enough_for_any_header(data: bytes) -> None:
    with contextlib.suppress(ProxyError):
        assert read_header(SIGNATURE + b"\x21\x11" + data) is not None


# A listener in this process: what a connection knows of its peer


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = await World(tmp_path, settings=NodeSettings("node-1", max_connecting=2)).open()
    yield world
    await world.close()


@contextlib.asynccontextmanager
async def listening(
    world: World, *, trusted: str = "127.0.0.0/8", listen: Any = listen_tcp
) -> AsyncIterator[tuple[str, int]]:
    listener: Listener = listen(world.node, "127.0.0.1", 0, proxies=[trusted])
    try:
        yield listener.sockets[0].getsockname()
    finally:
        listener.close()


@contextlib.contextmanager
def dialled(address: tuple[str, int], *said: bytes) -> Iterator[socket.socket]:
    with socket.create_connection(address, PATIENCE) as dialled:
        dialled.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for words in said:
            dialled.sendall(words)
        yield dialled


async def arrived(world: World) -> Connection:
    """The only connection that has come in and said nothing yet."""
    await world.when(lambda: world.node.arrivals.opening)
    (connection,) = world.node.arrivals.opening
    return connection


@pytest.mark.parametrize("header", [FOUR_LINE, record(FOUR)], ids=["line", "record"])
@pytest.mark.parametrize("listen", [listen_tcp, listen_websocket])
async def test_a_connection_is_where_its_header_says(world: World, header: bytes, listen: Any) -> None:
    async with listening(world, listen=listen) as address:
        with dialled(address, header):
            connection = await arrived(world)
            assert (connection.peer, connection.came_to, connection.proxy) == (PHONE, EDGE, EDGE[0])


async def test_a_connection_of_the_proxy_s_own_is_where_its_socket_says(world: World) -> None:
    async with listening(world) as address:
        with dialled(address, record(None, command=LOCAL_COMMAND)) as health_check:
            connection = await arrived(world)
            assert connection.peer == health_check.getsockname()
            assert (connection.came_to, connection.proxy) == (address, "")


async def test_who_is_no_proxy_is_where_his_socket_says(world: World) -> None:
    async with listening(world, trusted="192.0.2.0/24") as address:
        with dialled(address, FOUR_LINE) as stranger:
            connection = await arrived(world)
            assert (connection.peer, connection.proxy) == (stranger.getsockname(), "")


@pytest.mark.parametrize("cut", range(1, len(FOUR_LINE), 7))
async def test_a_header_may_trickle_in(world: World, cut: int) -> None:
    async with listening(world) as address:
        with dialled(address, FOUR_LINE[:cut]) as proxy:
            await world.turns()
            assert not world.node.arrivals.opening
            proxy.sendall(FOUR_LINE[cut:])
            assert (await arrived(world)).peer == PHONE


def refused(world: World, reason: str) -> float:
    return world.node.metrics.refusals.labels(reason).value


async def test_a_proxy_that_says_nothing_is_closed_in_time(world: World) -> None:
    world.node.settings = replace(world.node.settings, connect_timeout=0.3)
    async with listening(world) as address:
        with dialled(address) as proxy, dialled(address, b"PROXY TCP4"):
            await until(lambda: refused(world, "connect timeout") == 2)
            assert proxy.recv(1) == b""


async def test_so_many_may_be_silent_at_once(world: World) -> None:
    async with listening(world) as address:
        with dialled(address), dialled(address), dialled(address) as third:
            await until(lambda: refused(world, "too many connections") == 1)
            assert third.recv(1) == b""


async def test_a_look_whether_the_port_is_open_counts_nowhere(world: World) -> None:
    async with listening(world) as address:
        with dialled(address):
            pass
        with dialled(address, FOUR_LINE[:9]):
            pass
        with dialled(address, FOUR_LINE):
            await arrived(world)  # accepted after the two
        assert not world.node.metrics.refusals.children


async def test_a_mistake_of_a_proxy_is_logged_once_and_counted_each_time(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", "gateway.proxy_listener")
    async with listening(world) as address:
        for count in (1, 2, 3):
            await mistake(world, address, b"\x10\x0c", count)
        assert len(caplog.records) == 1
        assert "127.0.0.1" in caplog.text
        for count in range(
            4, MAX_NOTES + 10
        ):  # each another one: strangers behind a proxy do not fill the log
            await mistake(world, address, raw(0x21, 0x11, b"", 60_000 + count), count)
    assert len(caplog.records) == MAX_NOTES


async def mistake(world: World, address: tuple[str, int], said: bytes, count: int) -> None:
    with dialled(address, said):
        await until(lambda: refused(world, "bad proxy header") == count)


async def test_who_waits_when_the_listener_closes_is_closed(world: World) -> None:
    with contextlib.ExitStack() as stack:
        async with listening(world) as address:
            proxy = stack.enter_context(dialled(address, b"PROXY "))
            await world.turns()
        assert proxy.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, PATIENCE)


async def test_without_files_left_it_waits_and_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(acceptor, "ACCEPT_PAUSE", 0.05)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with listening(world) as address:
        with socket.socket() as proxy:
            with socket.socket() as first_free:
                resource.setrlimit(resource.RLIMIT_NOFILE, (first_free.fileno(), hard))
            try:
                proxy.connect(address)
                proxy.sendall(FOUR_LINE)
                await until(lambda: len(caplog.records) >= 2)  # it tries again, and not all the time
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert "not accepting for a moment" in caplog.text
            await until(lambda: world.node.arrivals.opening)
            assert (await arrived(world)).peer == PHONE


# Its sockets


def test_a_port_that_is_held_for_workers_can_be_listened_on_by_each() -> None:
    held = ports_of_workers._hold("127.0.0.1", 0)
    try:
        with contextlib.ExitStack() as stack:
            pairs = [bind("127.0.0.1", held.number, shared=True) for _ in range(2)]
            numbers = {stack.enter_context(one).getsockname()[1] for (one,) in pairs}
            assert numbers == {held.number}
            with pytest.raises(OSError, match="in use"):
                bind("127.0.0.1", held.number, shared=False)
    finally:
        ports_of_workers.release_ports({"mqtt": held})


def test_a_name_with_several_addresses_has_one_port() -> None:
    expected = {info[4][0] for info in socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)}
    with contextlib.ExitStack() as stack:
        bound = [stack.enter_context(one) for one in bind("localhost", 0, shared=False)]
        assert {one.getsockname()[0] for one in bound} == expected
        assert len({one.getsockname()[1] for one in bound}) == 1


def test_both_families_can_listen_on_a_port() -> None:
    with contextlib.ExitStack() as stack:
        (four,) = bind("0.0.0.0", 0, shared=False)
        number = stack.enter_context(four).getsockname()[1]
        (six,) = bind("::", number, shared=False)
        stack.enter_context(six)
        assert six.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1


# A server behind a proxy


class Proxied(Peer):
    """A peer whose bytes come from a proxy."""

    def __init__(
        self,
        address: tuple[str, int],
        *said: bytes,
        tls: ssl.SSLContext | None = None,
        source: str = "127.0.0.1",
    ) -> None:
        self.version = 5
        self._received = b""
        self._socket = socket.create_connection(address, PATIENCE, (source, 0))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for words in said:
            self._socket.sendall(words)
        if tls is not None:
            self._socket = tls.wrap_socket(self._socket, server_hostname="localhost")


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def trust(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.fixture(scope="module")
def certificate(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Flags of a server that has one."""
    file = tmp_path_factory.mktemp("tls") / "server.pem"
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(file))
    return ("--mqtts-port", "0", "--mqtt-certificate", str(file), "--mqtt-private-key", str(file))


@pytest.fixture(scope="module")
def server(start_server: StartServer, certificate: tuple[str, ...]) -> LocalServer:
    """Trusts 127.0.0.1, and lets in two connections of one address."""
    limits = ("--mqtt-max-connections-per-address", "2")
    return start_server("--mqtt-proxy-protocol", "127.0.0.1", *certificate, *limits)


def said_by(number: int) -> bytes:
    """The header of a phone."""
    return line("TCP4", f"192.0.2.{number}", EDGE[0], PHONE[1], EDGE[1])


def talks(server: LocalServer, peer: Peer, name: str) -> None:
    """CONNECT, a push, PINGREQ."""
    assert peer.connect(connect_packet(server.app, name)).reason == 0
    push(server, server.app, name)
    peer.push()
    peer.send(Pingreq())
    assert peer.receive() == Pingresp()


def test_mqtt_follows_the_header(server: LocalServer) -> None:
    with Proxied(server.addresses.mqtt, FOUR_LINE) as peer:
        talks(server, peer, "line")
    with Proxied(server.addresses.mqtt, record(SIX)) as peer:
        talks(server, peer, "record")


def test_a_header_may_come_late_and_in_pieces(server: LocalServer) -> None:
    with Proxied(server.addresses.mqtt) as peer:
        for end in range(0, len(FOUR_LINE), 20):
            server.metrics()  # it has had a turn since
            peer.send(FOUR_LINE[end : end + 20])
        talks(server, peer, "late")


def test_header_and_connect_may_share_a_segment(server: LocalServer) -> None:
    connect = encode(connect_packet(server.app, "shared"), 5)
    with Proxied(server.addresses.mqtt, said_by(1) + connect + encode(Pingreq(), 5)) as peer:
        peer.receive()
        assert peer.receive() == Pingresp()


def test_tls_follows_the_header(server: LocalServer, trust: ssl.SSLContext) -> None:
    assert server.addresses.mqtts is not None
    for name, header in (("secured-1", FOUR_LINE), ("secured-2", record(FOUR))):
        with Proxied(server.addresses.mqtts, header, tls=trust) as peer:
            talks(server, peer, name)


def test_header_and_client_hello_may_share_a_segment(server: LocalServer, trust: ssl.SSLContext) -> None:
    assert server.addresses.mqtts is not None
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    secured = trust.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with dialled(server.addresses.mqtts) as proxy:
        header: bytes = record(FOUR)
        while True:
            with contextlib.suppress(ssl.SSLWantReadError):
                secured.do_handshake()
                break
            proxy.sendall(header + outgoing.read())
            header = b""
            incoming.write(proxy.recv(65_536))
    assert secured.version() == "TLSv1.3"


def test_a_tls_handshake_that_fails_after_the_header_harms_nobody(server: LocalServer) -> None:
    assert server.addresses.mqtts is not None
    with Proxied(server.addresses.mqtts, said_by(2), b"no TLS at all, whatever it is") as peer:
        peer.rest_of_bytes()
    works_behind(server)


def test_a_tls_handshake_that_hangs_after_the_header_harms_nobody(
    start_server: StartServer, certificate: tuple[str, ...]
) -> None:
    server = start_server("--mqtt-proxy-protocol", "127.0.0.1", "--mqtt-connect-timeout", "1", *certificate)
    assert server.addresses.mqtts is not None
    with (
        counted(server, 'refusals_total{reason="connect timeout"}'),
        Proxied(server.addresses.mqtts, said_by(2)) as peer,
    ):
        assert peer.rest_of_bytes() == b""
    sooner_or_later(lambda: works_behind(server))


def test_a_websocket_follows_the_header(server: LocalServer) -> None:
    assert server.addresses.ws is not None
    fields = {
        "Host": "localhost",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": base64.b64encode(bytes(16)).decode(),
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Protocol": SUBPROTOCOLS[0],
    }
    request = "\r\n".join(["GET /mqtt HTTP/1.1", *(f"{k}: {v}" for k, v in fields.items()), "", ""])
    with dialled(server.addresses.ws, FOUR_LINE + request.encode()) as proxy:
        assert proxy.recv(65_536).startswith(b"HTTP/1.1 101")


witnesses = itertools.count(1)


def works_behind(server: LocalServer) -> None:
    """As `works`, by the proxy."""
    with Proxied(server.addresses.mqtt, said_by(99)) as peer:
        talks(server, peer, f"witness-{next(witnesses)}")


def test_addresses_are_limited_as_the_header_has_them(server: LocalServer) -> None:
    turned_away = f'refusals_total{{reason="{TurnedAway.ADDRESS}"}}'
    with contextlib.ExitStack() as stack, counted(server, turned_away, by=1):
        for n, number in enumerate((10, 11, 12, 10, 11)):  # two of an address
            peer = stack.enter_context(Proxied(server.addresses.mqtt, said_by(number)))
            assert peer.connect(connect_packet(server.app, f"limited-{n}")).reason == 0
        third = stack.enter_context(Proxied(server.addresses.mqtt, said_by(10)))
        assert third.rest_of_bytes() == b""


@pytest.mark.parametrize("header", [b"\x10\x0c\0\4MQTT", line("TCP4", "nobody"), raw(0x41, 0x11, bytes(12))])
def test_a_proxy_has_to_say_whose_connection_it_is(server: LocalServer, header: bytes) -> None:
    with (
        counted(server, 'refusals_total{reason="bad proxy header"}'),
        Proxied(server.addresses.mqtt, header) as peer,
    ):
        assert peer.rest_of_bytes() == b""
    assert "bad proxy header" in server.log_text()


def test_others_are_served_as_they_are(server: LocalServer) -> None:
    with Proxied(server.addresses.mqtt, source="127.0.0.2") as peer:
        talks(server, peer, "neighbour")


def test_nobody_else_can_claim_an_address(server: LocalServer) -> None:
    """His header is read as MQTT, which it is not."""
    with (
        counted(server, 'refusals_total{reason="bad CONNECT"}'),
        Proxied(server.addresses.mqtt, FOUR_LINE, source="127.0.0.2") as peer,
        contextlib.suppress(Closed),
    ):
        peer.receive()
    works_behind(server)


def test_the_server_stops_while_a_proxy_says_nothing(start_server: StartServer) -> None:
    server = start_server("--mqtt-proxy-protocol", "127.0.0.1")
    with Proxied(server.addresses.mqtt, b"PROXY ") as peer:
        works_behind(server)
        assert server.terminate() == 0
        assert peer.rest_of_bytes() == b""


def test_without_the_setting_a_header_is_a_broken_packet(start_server: StartServer) -> None:
    server = start_server()
    with counted(server, 'refusals_total{reason="bad CONNECT"}'), Peer(server.addresses.mqtt) as peer:
        peer.send(FOUR_LINE)
        peer.rest_of_bytes()
    works(server)


# Behind haproxy

HAPROXY = """
global
    maxconn 4000  # it serves no descriptor that is above twice as many
defaults
    mode tcp
    timeout connect 60s
    timeout client 60s
    timeout server 60s
listen one
    bind fd@{one}
    server mqtt 127.0.0.1:{mqtt} {check} send-proxy
listen two
    bind fd@{two}
    server mqtts 127.0.0.1:{mqtts} send-proxy-v2
"""


@contextlib.contextmanager
def haproxy(server: LocalServer, folder: Path, check: str = "") -> Iterator[tuple[int, int]]:
    """Its ports for MQTT with version 1, and for MQTT over TLS with version 2."""
    program = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("haproxy is missing")
    assert server.addresses.mqtts is not None
    settings = folder / "haproxy.cfg"
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        files = one.fileno(), two.fileno()  # it inherits them: nobody else gets the ports meanwhile
        to = {"mqtt": server.addresses.mqtt[1], "mqtts": server.addresses.mqtts[1]}
        settings.write_text(HAPROXY.format(one=files[0], two=files[1], check=check, **to))
        command = [program, "-f", str(settings), "-db"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, pass_fds=files)
        try:
            yield one.getsockname()[1], two.getsockname()[1]
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


def test_devices_come_through_haproxy(server: LocalServer, trust: ssl.SSLContext, tmp_path: Path) -> None:
    with haproxy(server, tmp_path) as (one, two):
        with Peer(("127.0.0.1", one), source="127.0.0.3") as peer:
            talks(server, peer, "through-line")
        with Peer(("127.0.0.1", two), source="127.0.0.3", tls=trust) as peer:
            talks(server, peer, "through-record")


def test_haproxy_s_peers_are_told_apart(server: LocalServer, tmp_path: Path) -> None:
    with haproxy(server, tmp_path) as (one, _), contextlib.ExitStack() as stack:
        for n, number in enumerate((4, 4, 5, 5)):
            peer = stack.enter_context(Peer(("127.0.0.1", one), source=f"127.0.0.{number}"))
            assert peer.connect(connect_packet(server.app, f"apart-{n}")).reason == 0
        third = stack.enter_context(Peer(("127.0.0.1", one), source="127.0.0.4"))
        assert third.rest_of_bytes() == b""


def test_haproxy_s_health_checks_find_the_server_well(server: LocalServer, tmp_path: Path) -> None:
    with (
        counted(server, 'refusals_total{reason="bad proxy header"}', by=0),
        haproxy(server, tmp_path, "check inter 100ms check-send-proxy") as (one, _),
        Peer(("127.0.0.1", one), source="127.0.0.6") as peer,
    ):
        talks(server, peer, "while-checked")
        accepted = 'holdfast_connections_accepted_total{transport="tcp"}'
        before = server.metrics()[accepted]
        eventually(lambda: server.metrics()[accepted] >= before + 3)


# The setting


def test_the_setting_is_read() -> None:
    config = load_config(None, None, {"mqtt.proxy_protocol": "10.0.0.0/8, 192.0.2.1"})
    assert config.device_proxies == ("10.0.0.0/8", "192.0.2.1/32")
    assert Config().device_proxies == ()


@pytest.mark.parametrize("wrong", ["proxy.example", "10.0.0.1/8", " , "])
def test_a_setting_that_names_no_network_is_a_mistake(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"mqtt\.proxy_protocol = "):
        load_config(None, None, {"mqtt.proxy_protocol": wrong})
