"""Profiles on a running server: recognised at accept and at CONNECT, told in CONNACK, read again on SIGHUP."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner

from clients.local_server import LocalServer, ServerFailed
from gateway.command import serve
from gateway.mqtt import Connack, Properties, Puback, encode
from tests.conftest import StartServer
from tests.gateway.peer import Peer, connect_packet, device, eventually, push

EDGE = "127.0.0.5"  # loopback is wide: the address says the carrier
FILES = {
    "default": "[heartbeat]\nleast = 20\n",
    "edge": "[recognise]\nnetworks = ['127.0.0.4/30']\noperators = ['46020']\n[heartbeat]\nmost = 300\n",
    "thin": "[recognise]\nlinks = ['satellite']\n[delivery]\nwindow = 2\nfirst_window = 2\n",
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profiles")
    for name, text in FILES.items():
        (folder / f"{name}.toml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def server(start_server: StartServer, directory: Path) -> LocalServer:
    return start_server("--carriers-directory", str(directory), "--mqtt-keep-alive-max", "2000")


def declares(**told: str) -> Properties:
    return {"user_properties": tuple(told.items())}


def answer_to(
    server: LocalServer, *, keep_alive: int = 60, source: str = "", properties: Properties | None = None
) -> Connack:
    with Peer(server.addresses.mqtt, source=source) as peer:
        packet = connect_packet(server.app, "phone", keep_alive=keep_alive, properties=properties)
        answer = peer.connect(packet)
        assert answer.reason == 0
        return answer


def told(answer: Connack) -> tuple[int | None, object]:
    """Server Keep Alive, and user properties."""
    return answer.properties.get("server_keep_alive"), answer.properties.get("user_properties", ())


def heartbeat(text: str) -> tuple[tuple[str, str], ...]:
    return (("heartbeat", text),)


@pytest.mark.parametrize(
    ("keep_alive", "source", "properties", "expected"),
    [
        # who says nothing of its network is told nothing new, and may be as lively as it likes
        (60, "", None, (None, ())),
        (1, "", None, (None, ())),
        (1300, "", None, (1200, ())),
        (0, "", None, (1200, ())),
        (0, EDGE, None, (300, ())),
        (300, EDGE, None, (None, ())),
        (0, "127.0.0.8", None, (1200, ())),
        # who does is told its heartbeat, and kept within the profile
        (60, "", declares(link="wifi"), (None, heartbeat("240 20 1200"))),
        (10, "", declares(link="wifi"), (20, heartbeat("240 20 1200"))),
        (0, "", declares(carrier="46020"), (300, heartbeat("240 20 300"))),
        (0, "", declares(link="wifi", carrier="46020"), (1200, heartbeat("240 20 1200"))),
        (0, EDGE, declares(link="wifi"), (300, heartbeat("240 20 300"))),
        (60, "", declares(link="by pigeon"), (None, heartbeat("240 20 1200"))),
        (60, "", declares(carrier="", link=""), (None, ())),
        (60, "", declares(format="msgpack"), (None, ())),
    ],
)
def test_keep_alive_and_heartbeat_are_the_profiles(
    server: LocalServer,
    keep_alive: int,
    source: str,
    properties: Properties | None,
    expected: tuple[int | None, object],
) -> None:
    answer = answer_to(server, keep_alive=keep_alive, source=source, properties=properties)
    assert told(answer) == expected


def test_the_settings_bound_what_a_profile_says(start_server: StartServer, directory: Path) -> None:
    server = start_server(
        *(
            "--carriers-directory",
            str(directory),
            "--mqtt-keep-alive-max",
            "100",
            "--mqtt-keep-alive-min",
            "40",
        )
    )
    assert told(answer_to(server, keep_alive=0)) == (100, ())
    assert told(answer_to(server, keep_alive=0, properties=declares(link="wifi"))) == (
        100,
        heartbeat("100 40 100"),
    )
    assert told(answer_to(server, keep_alive=30, properties=declares(link="wifi")))[0] == 40


def test_without_room_for_it_the_heartbeat_is_left_out(server: LocalServer) -> None:
    size = len(encode(answer_to(server), 5))
    properties: Properties = {"maximum_packet_size": size, **declares(link="wifi")}
    assert told(answer_to(server, properties=properties)) == (None, ())


def test_a_login_that_proves_itself_is_told_its_heartbeat_too(server: LocalServer) -> None:
    """An assigned client id shares the CONNACK with it."""
    with Peer(server.addresses.mqtt) as peer:
        properties = declares(link="wifi")
        packet = connect_packet(server.app, "", password=server.app.master_secret, properties=properties)
        answer = peer.connect(packet)
        assert answer.properties["user_properties"] == heartbeat("240 20 1200")
        assert answer.properties["assigned_client_identifier"]


def test_a_device_has_the_window_of_what_it_declares(server: LocalServer) -> None:
    with device(server, "dish", properties=declares(link="satellite")) as peer:
        for number in range(3):
            push(server, server.app, "dish", str(number))
        pushes = [peer.push(ack=False) for _ in range(2)]
        peer.expect_nothing()
        peer.send(Puback(pushes[0].packet_id))
        peer.push()


def test_all_that_come_to_a_listener_of_a_profile_have_it(start_server: StartServer, tmp_path: Path) -> None:
    (tmp_path / "default.toml").write_text("")
    (tmp_path / "plain.toml").write_text("[recognise]\nlisteners = ['tcp']\n[heartbeat]\nmost = 400\n")
    server = start_server("--carriers-directory", str(tmp_path))
    assert told(answer_to(server, keep_alive=0))[0] == 400


def test_a_server_does_not_start_with_a_mistake_in_a_profile(
    start_server: StartServer, tmp_path: Path
) -> None:
    (tmp_path / "default.toml").write_text("ack_timeout = 1\n")
    told = f"Error: {tmp_path}/default.toml:1: ack_timeout: no such key or section"
    with pytest.raises(ServerFailed, match=re.escape(told)):
        start_server("--carriers-directory", str(tmp_path))
    answer = CliRunner().invoke(serve, ["--carriers-directory", str(tmp_path), "--check"])
    assert answer.exit_code == 1
    assert told in answer.output


def test_profiles_are_read_again_and_live_connections_stay(start_server: StartServer, tmp_path: Path) -> None:
    default = tmp_path / "default.toml"
    default.write_text("[heartbeat]\nmost = 1000\n")
    server = start_server("--carriers-directory", str(tmp_path))
    with device(server, "stays") as peer:
        default.write_text("[heartbeat]\nmost = 900\n")
        assert told(answer_to(server, keep_alive=0))[0] == 1000
        os.kill(server.pid, signal.SIGHUP)
        eventually(lambda: "carrier profiles reloaded" in server.log_text())
        assert told(answer_to(server, keep_alive=0))[0] == 900
        default.write_text("[heartbeat]\nmost = 800\nleast = 5\n")
        os.kill(server.pid, signal.SIGHUP)
        eventually(lambda: "carrier profiles not reloaded, the old ones stay" in server.log_text())
        assert (
            f"{default}:3: heartbeat.least = 5: must be a whole number from 10 to 65535" in server.log_text()
        )
        assert told(answer_to(server, keep_alive=0))[0] == 900
        push(server, server.app, "stays")
        peer.push()
