"""MQTT clients that others wrote, against the running server: they need no change to be devices and publishers."""

from __future__ import annotations

import asyncio
import queue
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Literal

import aiomqtt
import orjson
import paho.mqtt.client as paho
import pytest
import trustme
from amqtt.client import MQTTClient as AmqttClient  # type: ignore[import-untyped]
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from clients.local_server import AppKeys, LocalServer
from tests.conftest import StartServer
from tests.gateway.peer import accounts, call, counted, eventually, push, push_body, register
from tests.patience import PATIENCE

TRANSPORTS: Final = ("tcp", "tls", "ws")
VERSIONS: Final = (4, 5)
EVERY_WAY: Final = [(transport, version) for transport in TRANSPORTS for version in VERSIONS]
needs_mosquitto = pytest.mark.skipif(
    not shutil.which("mosquitto_sub"), reason="mosquitto_sub: apt-get install mosquitto-clients"
)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CA file; the certificate of localhost and its key lie beside it."""
    folder = tmp_path_factory.mktemp("tls")
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(folder / "ca.pem"))
    certificate = ca.issue_cert("localhost")
    certificate.private_key_pem.write_to_path(str(folder / "key.pem"))
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(str(folder / "cert.pem"), append=True)
    return str(folder / "ca.pem")


@pytest.fixture(scope="module")
def server(start_server: StartServer, authority: str) -> LocalServer:
    folder = authority.removesuffix("ca.pem")
    files = ("--mqtt-certificate", folder + "cert.pem", "--mqtt-private-key", folder + "key.pem")
    return start_server("--mqtts-port", "0", *files)


def address(server: LocalServer, transport: str) -> tuple[str, int]:
    found = {"tcp": server.addresses.mqtt, "tls": server.addresses.mqtts, "ws": server.addresses.ws}[
        transport
    ]
    assert found is not None
    return "localhost" if transport == "tls" else found[0], found[1]


# paho-mqtt


class Paho:
    """A paho client with what it received in a queue."""

    def __init__(
        self, server: LocalServer, name: str, *, app: AppKeys, password: str, transport: str, version: int,
        ca: str, clean: bool, **options: Any,
    ) -> None:  # fmt: skip
        self.received: queue.Queue[paho.MQTTMessage] = queue.Queue()
        self.connected: queue.Queue[tuple[bool, int]] = queue.Queue()
        self.ended: queue.Queue[int] = queue.Queue()
        self.answered: queue.Queue[tuple[int, int, Any]] = queue.Queue()
        self.subscribed: queue.Queue[list[int]] = queue.Queue()
        kind: Literal["tcp", "websockets"] = "websockets" if transport == "ws" else "tcp"
        protocol = MQTTProtocolVersion(version)
        self.client = client = paho.Client(
            CallbackAPIVersion.VERSION2, name, None if version == 5 else clean, protocol=protocol, transport=kind,
            reconnect_on_failure=False,
        )  # fmt: skip
        client.username_pw_set(app.app_key, password)
        if transport == "tls":
            client.tls_set(ca)
        if transport == "ws":
            client.ws_set_options("/mqtt")
        client.on_message = lambda _c, _u, message: self.received.put(message)
        client.on_connect = lambda _c, _u, flags, reason, _p: self.connected.put(
            (flags.session_present, reason.value)
        )
        client.on_disconnect = lambda _c, _u, _f, reason, _p: self.ended.put(reason.value)
        client.on_publish = lambda _c, _u, mid, reason, properties: self.answered.put(
            (mid, reason.value, properties)
        )
        client.on_subscribe = lambda _c, _u, _m, reasons, _p: self.subscribed.put([r.value for r in reasons])
        if version == 5:
            wished = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            wished.SessionExpiryInterval = 0 if clean else 3600
            options |= {"clean_start": clean, "properties": wished}
        client.connect(*address(server, transport), **options)
        client.loop_start()

    def push(self) -> dict[str, Any]:
        message = self.received.get(timeout=PATIENCE)
        assert (message.topic, message.qos) == ("push", 1)
        content: dict[str, Any] = orjson.loads(message.payload)
        return content

    def subscribe(self, topic_filter: str, qos: int = 0) -> int:
        self.client.subscribe(topic_filter, qos)
        return self.subscribed.get(timeout=PATIENCE)[0]


@contextmanager
def paho_client(
    server: LocalServer, name: str, *, app: AppKeys | None = None, password: str | None = None,
    transport: str = "tcp", version: int = 5, ca: str = "", clean: bool = False, **options: Any,
) -> Iterator[Paho]:  # fmt: skip
    app = app or server.app
    secret = app.device_key if password is None else password
    made = Paho(
        server,
        name,
        app=app,
        password=secret,
        transport=transport,
        version=version,
        ca=ca,
        clean=clean,
        **options,
    )
    try:
        yield made
    finally:
        made.client.disconnect()
        made.client.loop_stop()


@pytest.mark.parametrize(("transport", "version"), EVERY_WAY)
def test_paho_is_a_device(server: LocalServer, authority: str, transport: str, version: int) -> None:
    name = f"paho-{transport}-{version}"
    how: dict[str, Any] = {"transport": transport, "version": version, "ca": authority}
    connects = f'connects_total{{role="device",transport="{transport}",version="{version}"}}'
    with counted(server, connects, by=2):
        with paho_client(server, name, **how) as device:
            assert device.connected.get(timeout=PATIENCE) == (False, 0)
            online = push(server, server.app, name, "online")
            assert device.push() == {"msg_id": online, "notification": {"alert": "online"}}
            eventually(lambda: accounts(server, server.app, online)["delivered"] == 1)
        away = [push(server, server.app, name, str(i)) for i in range(50)]
        with paho_client(server, name, **how) as device:
            assert device.connected.get(timeout=PATIENCE) == (True, 0)
            assert [device.push()["msg_id"] for _ in away] == away
            eventually(lambda: accounts(server, server.app, away[-1])["delivered"] == 1)


@pytest.mark.parametrize("version", VERSIONS)
def test_paho_may_forget_its_session_and_keeps_its_pushes(server: LocalServer, version: int) -> None:
    name = f"paho-clean-{version}"
    for _ in range(2):
        with paho_client(server, name, version=version, clean=True) as device:
            assert device.connected.get(timeout=PATIENCE) == (False, 0)
    waiting = push(server, server.app, name)
    with paho_client(server, name, version=version, clean=True) as device:
        assert device.push()["msg_id"] == waiting


def test_paho_is_told_that_it_was_taken_over(server: LocalServer) -> None:
    with paho_client(server, "paho-twice") as old:
        old.connected.get(timeout=PATIENCE)
        with paho_client(server, "paho-twice"):
            assert old.ended.get(timeout=PATIENCE) == 0x8E


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("user", "password", "code", "reason"),
    [
        ("nobody", "x", 0x86, "unknown app"),
        (None, "wrong", 0x86, "wrong password"),
        (None, "", 0x86, "wrong password"),
    ],
)
def test_paho_is_told_why_it_is_refused(
    server: LocalServer, version: int, user: str | None, password: str, code: int, reason: str
) -> None:
    app = server.app if user is None else AppKeys(user, "", "")
    with (
        counted(server, f'refusals_total{{reason="{reason}"}}'),
        paho_client(server, "paho-wrong", app=app, password=password, version=version) as device,
    ):
        assert device.connected.get(timeout=PATIENCE)[1] == code


def test_paho_with_the_token_of_another_app_or_device_is_refused(server: LocalServer) -> None:
    one, other = server.create_app("paho-one"), server.create_app("paho-other")
    token = register(server, one, "phone")
    for app, name in ((other, "phone"), (one, "tablet")):
        with paho_client(server, name, app=app, password=token) as device:
            assert device.connected.get(timeout=PATIENCE)[1] == 0x86
    with paho_client(server, "phone", app=one, password=token) as device:
        assert device.connected.get(timeout=PATIENCE) == (False, 0)


def test_paho_is_a_publisher(server: LocalServer) -> None:
    with (
        paho_client(server, "paho-target") as device,
        paho_client(server, "paho-backend", password=server.app.master_secret) as backend,
    ):
        device.connected.get(timeout=PATIENCE)
        backend.connected.get(timeout=PATIENCE)
        backend.client.publish("push", orjson.dumps(push_body(["paho-target"], sendno=5)), 1)
        _, reason, properties = backend.answered.get(timeout=PATIENCE)
        told = dict(properties.UserProperty)
        assert (reason, told["sendno"]) == (0, "5")
        assert device.push()["msg_id"] == told["msg_id"]
        backend.client.publish("push", b"{}", 1)
        _, reason, properties = backend.answered.get(timeout=PATIENCE)
        assert (reason, dict(properties.UserProperty)["code"]) == (0x99, "1002")


def test_paho_sends_receipts_and_events(server: LocalServer) -> None:
    with paho_client(server, "paho-teller") as device:
        device.connected.get(timeout=PATIENCE)
        msg_id = push(server, server.app, "paho-teller")
        device.push()
        for topic, content in (
            ("receipt", {"msg_id": msg_id, "event": "clicked"}),
            ("event/opened", {"n": 1}),
        ):
            device.client.publish(topic, orjson.dumps(content), 1)
            assert device.answered.get(timeout=PATIENCE)[1] == 0
    assert accounts(server, server.app, msg_id)["clicked"] == 1
    events = call(server, server.app, "GET", "/v1/events")[1]["events"]
    assert ("paho-teller", "opened") in [(event["registration_id"], event["name"]) for event in events]


# Ordinary topics


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("qos", [0, 1, 2])
def test_paho_clients_talk_both_ways(server: LocalServer, version: int, qos: int) -> None:
    how: dict[str, Any] = {"version": version, "clean": True}
    with paho_client(server, "left", **how) as left, paho_client(server, "right", **how) as right:
        for mine, client in (("left", left), ("right", right)):
            client.connected.get(timeout=PATIENCE)
            assert client.subscribe(f"to/{mine}/+", qos) == qos
        for sender, receiver, to in ((left, right, "right"), (right, left, "left")):
            for i in range(20):
                sender.client.publish(f"to/{to}/{i}", str(i), qos)
            got = [receiver.received.get(timeout=PATIENCE) for _ in range(20)]
            assert [(m.topic, m.payload, m.qos) for m in got] == [
                (f"to/{to}/{i}", str(i).encode(), qos) for i in range(20)
            ]
            assert [sender.answered.get(timeout=PATIENCE)[1] for _ in range(20)] == [0] * 20


@pytest.mark.parametrize("version", VERSIONS)
def test_paho_gets_what_came_while_it_was_away(server: LocalServer, version: int) -> None:
    name = f"absent-{version}"
    with paho_client(server, name, version=version) as absent:
        absent.connected.get(timeout=PATIENCE)
        absent.subscribe(f"{name}/#", 2)
    with paho_client(server, "present", clean=True) as present:
        present.connected.get(timeout=PATIENCE)
        for qos in (0, 1, 2):
            present.client.publish(f"{name}/{qos}", b"x", qos)
        assert len([present.answered.get(timeout=PATIENCE) for _ in range(3)]) == 3
    with paho_client(server, name, version=version) as absent:
        got = [absent.received.get(timeout=PATIENCE) for _ in range(2)]
        assert [message.topic for message in got] == [f"{name}/1", f"{name}/2"]  # not QoS 0


def test_retained_messages_survive_a_kill(start_server: StartServer) -> None:
    server = start_server()
    with paho_client(server, "keeper") as keeper:
        keeper.connected.get(timeout=PATIENCE)
        for topic in ("house/door", "house/roof", "garden"):
            keeper.client.publish(topic, topic.encode(), 1, retain=True)
        keeper.client.publish("house/roof", b"", 1, retain=True)
        assert len([keeper.answered.get(timeout=PATIENCE) for _ in range(4)]) == 4
    server.restart()
    with paho_client(server, "looker") as looker:
        looker.connected.get(timeout=PATIENCE)
        looker.subscribe("house/#", 1)
        message = looker.received.get(timeout=PATIENCE)
        assert (message.topic, message.payload, message.retain) == ("house/door", b"house/door", True)
        looker.subscribe("+", 1)
        assert looker.received.get(timeout=PATIENCE).topic == "garden"
        assert looker.received.empty()


@pytest.mark.parametrize(
    ("topic_filter", "topics"),
    [
        ("a/+/c", ["a/b/c", "a//c"]),
        ("a/#", ["a", "a/b", "a/b/c", "a//c"]),
        ("+/b", ["a/b"]),
        ("+", ["a"]),
        ("#", ["a", "a/b", "a/b/c", "a//c"]),
        ("$other/#", ["$other/a"]),
    ],
)
def test_wildcards(server: LocalServer, topic_filter: str, topics: list[str]) -> None:
    app = server.create_app("wild", open=True)
    with paho_client(server, "wild", app=app, clean=True) as client:
        client.connected.get(timeout=PATIENCE)
        client.subscribe(topic_filter, 1)
        for topic in ("a", "a/b", "a/b/c", "a//c", "$other/a"):
            client.client.publish(topic, b"x", 1)
            client.answered.get(timeout=PATIENCE)
        assert [client.received.get(timeout=PATIENCE).topic for _ in topics] == topics
        assert client.received.empty()


def test_a_closed_app_gives_devices_no_ordinary_topics(server: LocalServer) -> None:
    app = server.create_app("paho-closed")
    token = register(server, app, "phone")
    with paho_client(server, "phone", app=app, password=token) as device:
        device.connected.get(timeout=PATIENCE)
        assert device.subscribe("a/b") == 0x87
        device.client.publish("a/b", b"x", 1)
        assert device.answered.get(timeout=PATIENCE)[1] == 0x87


# aiomqtt


@pytest.mark.parametrize(("transport", "version"), EVERY_WAY)
async def test_aiomqtt_is_a_device(server: LocalServer, authority: str, transport: str, version: int) -> None:
    name = f"aiomqtt-{transport}-{version}"
    host, port = address(server, transport)
    trusted = ssl.create_default_context(cafile=authority) if transport == "tls" else None
    options: dict[str, Any] = {"clean_start": False} if version == 5 else {"clean_session": False}
    client = aiomqtt.Client(
        host, port, username=server.app.app_key, password=server.app.device_key, identifier=name,
        protocol=aiomqtt.ProtocolVersion(version), tls_context=trusted,
        transport="websockets" if transport == "ws" else "tcp", websocket_path="/mqtt", timeout=PATIENCE, **options,
    )  # fmt: skip
    sent: list[str] = []
    for _ in range(2):  # online, and after being away
        if sent:
            sent.append(await asyncio.to_thread(push, server, server.app, name))
        async with client, asyncio.timeout(PATIENCE):
            if not sent:
                sent.append(await asyncio.to_thread(push, server, server.app, name))
            message = await anext(client.messages)
            assert orjson.loads(bytes(message.payload))["msg_id"] == sent[-1]
            await asyncio.to_thread(
                eventually, lambda: accounts(server, server.app, sent[-1])["delivered"] == 1
            )


async def test_aiomqtt_is_told_why_it_is_refused(server: LocalServer) -> None:
    host, port = address(server, "tcp")
    login = {"username": server.app.app_key, "password": "wrong"}
    client = aiomqtt.Client(host, port, identifier="aiomqtt", timeout=PATIENCE, **login)
    with pytest.raises(aiomqtt.MqttError, match="Bad user name or password"):
        async with client:
            pass


# amqtt (3.1.1 only)


@pytest.mark.parametrize("transport", ["tcp", "ws"])
async def test_amqtt_is_a_device(server: LocalServer, transport: str) -> None:
    name = f"amqtt-{transport}"
    host, port = address(server, transport)
    scheme, path = ("mqtt", "") if transport == "tcp" else ("ws", "/mqtt")
    url = f"{scheme}://{server.app.app_key}:{server.app.device_key}@{host}:{port}{path}"
    client = AmqttClient(client_id=name, config={"auto_reconnect": False})
    await client.connect(url, cleansession=False)
    try:
        msg_id = await asyncio.to_thread(push, server, server.app, name)
        message = await client.deliver_message(timeout_duration=PATIENCE)
        assert message is not None
        assert orjson.loads(bytes(message.publish_packet.data or b""))["msg_id"] == msg_id
        await asyncio.to_thread(eventually, lambda: accounts(server, server.app, msg_id)["delivered"] == 1)
    finally:
        await client.disconnect()


# mosquitto


def mosquitto(
    server: LocalServer, tool: str, name: str, password: str, *, ca: str = "", version: int = 5
) -> list[str]:
    host, port = address(server, "tls" if ca else "tcp")
    command = [f"mosquitto_{tool}", "-h", host, "-p", str(port), "-V", "5" if version == 5 else "311"]
    trust = ["--cafile", ca] if ca else []
    return [*command, "-i", name, "-u", server.app.app_key, "-P", password, *trust]


def mosquitto_sub(
    server: LocalServer, name: str, topic: str = "push", *, ca: str = "", version: int = 5
) -> list[str]:
    """For one message."""
    command = mosquitto(server, "sub", name, server.app.device_key, ca=ca, version=version)
    return [*command, "-t", topic, "-q", "1", "-C", "1", "-W", f"{PATIENCE:.0f}"]


@needs_mosquitto
@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_mosquitto_sub_is_a_device(server: LocalServer, authority: str, tls: bool, version: int) -> None:
    name = f"mosquitto-{tls}-{version}"
    command = mosquitto_sub(server, name, ca=authority if tls else "", version=version)
    register(server, server.app, name)
    waiting = push(server, server.app, name, "waiting")
    done = subprocess.run(command, capture_output=True, check=True, timeout=PATIENCE)
    assert orjson.loads(done.stdout) == {"msg_id": waiting, "notification": {"alert": "waiting"}}
    eventually(lambda: accounts(server, server.app, waiting)["delivered"] == 1)
    with subprocess.Popen([*command, "-c"], stdout=subprocess.PIPE) as online:
        status = ("POST", "/v3/devices/status", {"registration_ids": [name]})
        eventually(lambda: call(server, server.app, *status)[1][name]["online"])
        msg_id = push(server, server.app, name, "online")
        assert orjson.loads(online.communicate(timeout=PATIENCE)[0])["msg_id"] == msg_id


@needs_mosquitto
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("qos", ["0", "1", "2"])
def test_mosquitto_pub_is_a_publisher(server: LocalServer, version: int, qos: str) -> None:
    name = f"mosquitto-to-{version}-{qos}"
    register(server, server.app, name)
    body = orjson.dumps(push_body([name], "from the shell")).decode()
    command = mosquitto(server, "pub", "shell", server.app.master_secret, version=version)
    # At QoS 0 it leaves at once.
    subprocess.run([*command, "-q", qos, "-t", "push", "-m", body], check=True, timeout=PATIENCE)
    done = subprocess.run(mosquitto_sub(server, name), capture_output=True, check=True, timeout=PATIENCE)
    assert orjson.loads(done.stdout)["notification"]["alert"] == "from the shell"


@needs_mosquitto
def test_mosquitto_clients_talk(server: LocalServer) -> None:
    listener = mosquitto_sub(server, "listener", "talk")
    with counted(server, 'publishes_received_total{kind="topic"}'):
        teller = mosquitto(server, "pub", "teller", server.app.device_key)
        subprocess.run([*teller, "-t", "talk", "-m", "hi", "-r"], check=True, timeout=PATIENCE)
    done = subprocess.run(listener, capture_output=True, check=True, timeout=PATIENCE)
    assert done.stdout == b"hi\n"


@needs_mosquitto
def test_mosquitto_is_told_why_it_is_refused(server: LocalServer) -> None:
    command = mosquitto(server, "sub", "x", "wrong")
    done = subprocess.run(
        [*command, "-t", "push"], capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert done.returncode == 0x86
