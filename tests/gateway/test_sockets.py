"""A carrier's TCP settings, on real sockets; and what is said of those that the system does not take."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trustme
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.carriers.catalog import Carriers, Catalog
from broker.carriers.profile import Tcp
from gateway import sockets
from gateway.connection import Connection
from gateway.listeners import Certificate, listen_tcp
from gateway.mqtt import Connack, Connect, Properties, Reason, decode, encode
from gateway.sockets import BUFFERS, IP_PMTUDISC_DONT, OPTIONS, changes, clamp, set_up, settings_of
from gateway.tcp_info import parse_tcp_info
from tests.conftest import StartServer
from tests.gateway.connected import Held, pair
from tests.gateway.peer import eventually
from tests.gateway.world import World
from tests.patience import PATIENCE

TCP = socket.IPPROTO_TCP
ALL = Tcp(
    user_timeout=45.5,
    retry_pause=3,
    linear_retries=True,
    keepalive_idle=100,
    keepalive_interval=20,
    keepalive_count=4,
    congestion="reno",
    send_buffer=16_384,
    receive_buffer=8192,
    notsent_lowat=4096,
    fragment=True,
)
CONGESTION_SIZE = 16
unheard_of = itertools.count(1)  # names that no test before has used: each is logged once in a process


def read(connected: socket.socket) -> dict[str, Any]:
    """What the socket has of each option, as the kernel says it."""
    found: dict[str, Any] = {
        option.field: connected.getsockopt(option.level, option.number) for option in (*OPTIONS, *BUFFERS)
    }
    found["congestion"] = connected.getsockopt(TCP, socket.TCP_CONGESTION, CONGESTION_SIZE).rstrip(b"\0")
    found["keepalive"] = connected.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    return found


def test_each_setting_reaches_the_socket() -> None:
    with pair() as (ours, _):
        set_up(Held(ours), ALL)
        assert read(ours) == {
            "user_timeout": 45_500,  # ms
            "retry_pause": 3000,
            "linear_retries": 1,
            "keepalive_idle": 100,
            "keepalive_interval": 20,
            "keepalive_count": 4,
            "congestion": b"reno",
            "send_buffer": 2 * 16_384,  # the kernel counts its own records, too
            "receive_buffer": 2 * 8192,
            "notsent_lowat": 4096,
            "fragment": IP_PMTUDISC_DONT,
            "keepalive": 1,
        }


def test_every_field_but_the_mss_has_an_option() -> None:
    fields = {field.name for field in msgspec.structs.fields(Tcp)}
    assert {option.field for option in (*OPTIONS, *BUFFERS)} == fields - {"mss"}


def test_a_profile_that_leaves_all_to_the_system_touches_no_socket() -> None:
    class Untouchable:
        def get_extra_info(self, name: str) -> Any:
            raise AssertionError(name)

    set_up(Untouchable(), Tcp(mss=1200))
    sockets.change(Untouchable(), ALL, msgspec.structs.replace(ALL))
    assert settings_of(Tcp()) == ()


def test_another_carrier_s_settings_replace_the_former_ones() -> None:
    with pair() as (ours, _), pair() as (fresh, _):
        former, now = Tcp(user_timeout=10.0, keepalive_idle=50), Tcp(user_timeout=20.0, notsent_lowat=4096)
        set_up(Held(ours), former)
        sockets.change(Held(ours), former, now)
        assert read(ours) == read(fresh) | {"user_timeout": 20_000, "notsent_lowat": 4096}


def test_what_nobody_sets_any_more_is_the_system_s_again() -> None:
    with pair() as (ours, _), pair() as (fresh, _):
        set_up(Held(ours), ALL)
        sockets.change(Held(ours), ALL, Tcp())
        buffers = {"send_buffer": 2 * 16_384, "receive_buffer": 2 * 8192}  # these stay
        assert read(ours) == read(fresh) | buffers


times = st.none() | st.floats(0.01, 100.0)
numbers = st.none() | st.integers(1, 120)
profiles = st.builds(
    Tcp,
    user_timeout=times,
    retry_pause=numbers,
    linear_retries=st.none() | st.booleans(),
    keepalive_idle=numbers,
    keepalive_interval=numbers,
    keepalive_count=numbers,
    congestion=st.sampled_from([None, "reno"]),
    notsent_lowat=st.none() | st.integers(1024, 65_536),
    fragment=st.none() | st.booleans(),
)


@settings(deadline=None)
@given(st.lists(profiles, min_size=1, max_size=4))
def test_only_the_last_of_several_carriers_counts(those: list[Tcp]) -> None:
    with pair() as (ours, _), pair() as (straight, _):
        set_up(Held(ours), those[0])
        for former, now in itertools.pairwise(those):
            sockets.change(Held(ours), former, now)
        set_up(Held(straight), those[-1])
        assert read(ours) == read(straight)
        assert changes(those[-1], those[-1]) == settings_of(those[-1])


def test_a_time_below_a_millisecond_is_not_the_kernel_s_own() -> None:
    (setting,) = settings_of(Tcp(user_timeout=0.0001))
    assert setting.value == 1


# What the system does not take


def test_an_option_that_the_system_does_not_take_is_logged_once_and_the_others_are_set(
    caplog: pytest.LogCaptureFixture,
) -> None:
    unknown = Tcp(congestion=f"none-{next(unheard_of)}", user_timeout=5.0)
    for _ in range(3):
        with pair() as (ours, _):
            set_up(Held(ours), unknown)
            assert read(ours)["user_timeout"] == 5000
    (record,) = caplog.records
    assert "tcp.congestion" in record.getMessage()
    assert str(unknown.congestion) in record.getMessage()


def test_each_value_is_logged_for_itself(caplog: pytest.LogCaptureFixture) -> None:
    with pair() as (ours, _):
        for _ in range(2):
            set_up(Held(ours), Tcp(congestion=f"none-{next(unheard_of)}"))
        set_up(Held(ours), Tcp(keepalive_count=40_000))
    assert len(caplog.records) == 3


def test_an_option_that_the_system_does_not_know_has_no_value_to_go_back_to() -> None:
    assert sockets._system_value(TCP, 999) is None
    assert sockets._system_value(TCP, socket.TCP_USER_TIMEOUT) == 0


def test_a_socket_that_is_closed_says_nothing_of_an_option(caplog: pytest.LogCaptureFixture) -> None:
    with pair() as (ours, _):
        pass
    set_up(Held(ours), ALL)
    set_up(Held(None), ALL)
    assert not caplog.records


# Connections of a node

CARRIERS = {
    "default": "",
    "slow": """
        inherits = "default"
        [recognise]
        networks = ["127.0.0.2/32"]
        [tcp]
        user_timeout = 40.0
    """,
    "mobile": """
        inherits = "default"
        [recognise]
        names = ["Mobile"]
        [tcp]
        user_timeout = 70.0
        notsent_lowat = 4096
    """,
    "narrow": """
        inherits = "default"
        [recognise]
        listeners = ["ws"]
        [tcp]
        mss = 700
    """,
}


def write_carriers(folder: Path, **changes: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in {**CARRIERS, **changes}.items():
        rest = "\n".join(part.strip() for part in text.splitlines())
        (folder / f"{name}.toml").write_text(f'name = "{name}"\n{rest}\n')
    return folder


@pytest.fixture
def carriers(tmp_path: Path) -> Path:
    return write_carriers(tmp_path / "carriers")


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def issue(authority: trustme.CA, folder: Path) -> Path:
    """A file with certificate and key."""
    file = folder / "server.pem"
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(file))
    return file


@pytest.fixture
async def world(tmp_path: Path, carriers: Path) -> AsyncIterator[World]:
    world = await World(tmp_path).open()
    world.node.carriers = Carriers(carriers)
    yield world
    await world.close()


@contextlib.asynccontextmanager
async def connected(
    world: World,
    source: str,
    *declared: tuple[str, str],
    certificate: Certificate | None = None,
    trust: ssl.SSLContext | None = None,
) -> AsyncIterator[Connection]:
    """A peer, with what it declares, that has its CONNACK."""
    listener = listen_tcp(world.node, "127.0.0.1", 0, certificate)
    host, port = listener.sockets[0].getsockname()
    reader, writer = await asyncio.open_connection(
        host, port, local_addr=(source, 0), ssl=trust, server_hostname="localhost" if trust else None
    )
    try:
        writer.write(encode(backend(world, {"user_properties": declared} if declared else {}), 5))
        received = b""
        while (found := decode(received, 0, 5, 1 << 20)) is None:
            received += await reader.read(1 << 16)
        assert isinstance(found[0], Connack)
        assert found[0].reason == 0
        (connection,) = world.node.connections()
        yield connection
    finally:
        writer.close()
        await writer.wait_closed()
        listener.close()


def backend(world: World, properties: Properties) -> Connect:
    return Connect(
        "backend", True, 60, world.app.key, world.app.master_secret.encode(), properties=properties
    )


def timeout_of(connection: Connection) -> int:
    found: int = connection.transport.get_extra_info("socket").getsockopt(TCP, socket.TCP_USER_TIMEOUT)
    return found


async def test_a_socket_is_set_up_at_accept(world: World) -> None:
    async with connected(world, "127.0.0.2") as connection:
        assert connection.profile.name == "slow"
        assert timeout_of(connection) == 40_000


async def test_and_again_when_connect_says_whose_it_is(world: World) -> None:
    async with connected(world, "127.0.0.2", ("carrier", "Mobile"), ("link", "cellular")) as connection:
        assert connection.profile.name == "mobile"
        assert timeout_of(connection) == 70_000


async def test_a_carrier_may_have_a_port_of_its_own(world: World, carriers: Path) -> None:
    with contextlib.closing(listen_tcp(world.node, "127.0.0.1", 0)) as listener:
        name = listener.sockets[0].getsockname()
        (carriers / "own.toml").write_text(f"[recognise]\nlisteners = ['{name[1]}']\n")
        world.node.carriers.reload()
        with socket.create_connection(name):
            await world.when(lambda: world.node.arrivals.opening)
            assert [connection.profile.name for connection in world.node.arrivals.opening] == ["own"]


async def test_others_have_what_the_system_gives(world: World) -> None:
    async with connected(world, "127.0.0.3") as connection:
        assert connection.profile.name == "default"
        assert timeout_of(connection) == 0


@pytest.mark.parametrize(
    ("label", "told"), [("taken over", 5000), ("ack timeout", 5000), ("client disconnected", 40_000)]
)
async def test_what_went_to_nobody_is_not_repeated_for_long(world: World, label: str, told: int) -> None:
    async with connected(world, "127.0.0.2") as connection:
        connection.close(label, Reason.UNSPECIFIED_ERROR)
        assert timeout_of(connection) == told


def test_also_on_the_loop_of_a_server(tmp_path: Path, carriers: Path) -> None:
    async def story() -> None:
        async with await World(tmp_path).open() as world:
            world.node.carriers = Carriers(carriers)
            async with connected(world, "127.0.0.2") as connection:
                assert timeout_of(connection) == 40_000
            async with connected(world, "127.0.0.2", ("carrier", "Mobile")) as connection:
                assert timeout_of(connection) == 70_000

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(story())


async def test_also_over_tls(world: World, tmp_path: Path, authority: trustme.CA) -> None:
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    certificate = Certificate(*[issue(authority, tmp_path)] * 2)
    async with connected(world, "127.0.0.2", certificate=certificate, trust=trust) as connection:
        assert timeout_of(connection) == 40_000


# On a path that drops packets

IN_A_NAMESPACE = """
ip link set lo mtu 1500 up
nft add table ip path
nft add chain ip path in '{ type filter hook input priority 0; }'
exec "$0" -m pytest -q -p no:cacheprovider -o python_functions='inside_*' "$1"
"""


@pytest.mark.parametrize("test", ["long_packets_pass_where_they_may_be_cut", "tcp_tries_again_sooner"])
def test_on_a_path_that_drops_packets(test: str) -> None:
    """In a network namespace of its own: this file again, with one of those below."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    for program in ("unshare", "nft", "ip"):
        if shutil.which(program, path=path) is None:
            pytest.skip(f"{program} is not installed")
    file = f"{__file__}::inside_a_namespace_{test}"
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", IN_A_NAMESPACE, sys.executable, file],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
        check=False,
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def drop(rule: str) -> None:
    subprocess.run(["nft", f"add rule ip path in {rule} drop"], check=True)


def inside_a_namespace_long_packets_pass_where_they_may_be_cut() -> None:
    drop("ip length > 1200 ip frag-off & 0x4000 != 0")
    with pair() as (ours, theirs):
        theirs.settimeout(1.0)
        ours.sendall(bytes(5000))
        with pytest.raises(TimeoutError):
            theirs.recv(5000)
        set_up(Held(ours), Tcp(fragment=True))
        theirs.settimeout(PATIENCE)  # until TCP tries again
        left = 5000
        while left:
            left -= len(theirs.recv(left))


def inside_a_namespace_tcp_tries_again_sooner() -> None:
    with pair() as (plain, _), pair() as (even, _), pair() as (capped, _):
        set_up(Held(plain), Tcp(congestion="reno"))
        set_up(Held(even), Tcp(congestion="reno", linear_retries=True))
        set_up(Held(capped), Tcp(congestion="reno", retry_pause=1))
        for ours in (plain, even, capped):
            drop(f"tcp sport {ours.getsockname()[1]} tcp dport {ours.getpeername()[1]}")
            ours.sendall(b"x")
        eventually(lambda: tries(plain) >= 3)
        fewer = tries(plain)
        assert tries(even) > fewer + 1
        eventually(lambda: tries(capped) >= 3)
        assert pause(capped) == pytest.approx(1.0, abs=0.01)
        assert pause(plain) > 1.2


def tries(ours: socket.socket) -> int:
    info = parse_tcp_info(ours.getsockopt(TCP, socket.TCP_INFO, 512))
    assert info is not None
    return info.retransmits


def pause(ours: socket.socket) -> float:
    """Until the next try."""
    micros: int = struct.unpack_from("=8xI", ours.getsockopt(TCP, socket.TCP_INFO, 512))[0]
    return micros / 1e6


# The size of segments is a matter of listening sockets


def segment_size(listening: socket.socket) -> int:
    """Of what is sent to somebody who connects."""
    with socket.create_connection(listening.getsockname()) as theirs:
        ours, _ = listening.accept()
        with ours:
            ours.sendall(bytes(20_000))
            taken = 0
            while taken < 20_000:
                taken += len(theirs.recv(20_000))
            info = parse_tcp_info(ours.getsockopt(TCP, socket.TCP_INFO, 512))
            assert info is not None
            return info.snd_mss


def test_segments_are_clamped_where_the_listener_says_whose_they_are(carriers: Path) -> None:
    catalog = Catalog.read(carriers)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        free = segment_size(listening)
        clamp([listening], catalog, "tcp")
        assert segment_size(listening) == free
        clamp([listening], catalog, "ws")
        assert 600 < segment_size(listening) <= 700  # less what TCP's own options take
        clamp([listening], catalog, "tcp")
        assert segment_size(listening) == free


def test_the_default_s_segments_are_everybody_s(carriers: Path) -> None:
    catalog = Catalog.read(write_carriers(carriers, default="[tcp]\nmss = 1000"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        clamp([listening], catalog, "tls")
        assert 900 < segment_size(listening) <= 1000


# A server


def offered(address: tuple[str, int]) -> int:
    """The largest segment that a listener lets us send."""
    with socket.create_connection(address) as dialled:
        size: int = dialled.getsockopt(TCP, socket.TCP_MAXSEG)
        return size


def test_a_reload_clamps_new_connections(start_server: StartServer, carriers: Path) -> None:
    server = start_server("--carriers-directory", str(carriers))
    assert server.addresses.ws is not None
    assert offered(server.addresses.ws) <= 700
    before = offered(server.addresses.mqtt)
    write_carriers(carriers, default="[tcp]\nmss = 1000", narrow='inherits = "default"')
    os.kill(server.pid, signal.SIGHUP)
    eventually(lambda: offered(server.addresses.mqtt) <= 1000 < before)
    assert offered(server.addresses.ws) <= 1000
