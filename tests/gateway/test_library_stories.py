"""The same stories with three client libraries that others wrote: paho-mqtt, aiomqtt and gmqtt, in MQTT 3.1.1 and 5.

A `User` makes a client usable in the same way as those of the other libraries, and adds nothing to what it does.
Properties are written as `response_topic`, and read as `ResponseTopic`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import aiomqtt
import gmqtt  # type: ignore[import-untyped]
import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from clients.local_server import LocalServer
from tests.conftest import StartServer
from tests.gateway.peer import SHORT_PATIENCE
from tests.patience import PATIENCE

EXPIRY: Final = 3600  # seconds for which a session that is not clean outlives its connection


@dataclass(frozen=True, slots=True)
class Message:
    topic: str
    payload: str
    qos: int
    retain: bool
    properties: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Will:
    topic: str
    payload: str
    delay: int = 0


class User(ABC):
    """Connected while its `async with` block runs. It does not come back by itself."""

    present: bool  # what CONNACK said of the session

    def __init__(
        self, server: LocalServer, name: str, version: int, *, clean: bool = True, will: Will | None = None,
        aliases: int = 0,
    ) -> None:  # fmt: skip
        self.host, self.port = server.addresses.mqtt
        self.username, self.password = server.app.app_key, server.app.device_key
        self.name, self.version, self.clean, self.will = name, version, clean, will
        self.aliases = aliases  # that it takes from the server
        self.inbox: asyncio.Queue[Message] = asyncio.Queue()

    @abstractmethod
    async def __aenter__(self) -> User: ...

    @abstractmethod
    async def __aexit__(self, *_: object) -> None: ...

    @abstractmethod
    async def subscribe(self, topic_filter: str, qos: int = 2) -> None:
        """Returns when it is granted."""

    @abstractmethod
    async def publish(
        self, topic: str, payload: str, qos: int = 1, retain: bool = False, **properties: Any
    ) -> None: ...

    @abstractmethod
    def vanish(self) -> None:
        """Close the socket without a DISCONNECT."""

    async def receive(self, number: int = 1) -> list[Message]:
        async with asyncio.timeout(PATIENCE):
            return [await self.inbox.get() for _ in range(number)]

    async def receive_nothing(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SHORT_PATIENCE):
                raise AssertionError(f"{await self.inbox.get()} came")


def _paho_properties(packet: int, values: dict[str, Any]) -> Properties | None:
    made = Properties(packet)  # type: ignore[no-untyped-call]
    for name, value in values.items():
        setattr(made, name.title().replace("_", ""), value)
    return made if values else None


def _from_paho(message: Any) -> Message:
    properties = message.properties.json() if message.properties else {}
    names = ("UserProperty", "ResponseTopic", "CorrelationData", "ContentType")
    short = {name: properties[name] for name in names if name in properties}
    return Message(str(message.topic), message.payload.decode(), message.qos, message.retain, short)


class PahoUser(User):
    async def __aenter__(self) -> User:
        loop = asyncio.get_running_loop()
        self._connected: asyncio.Queue[bool] = asyncio.Queue()
        self._done: asyncio.Queue[int] = asyncio.Queue()
        v5 = self.version == 5
        self._client = client = paho.Client(
            CallbackAPIVersion.VERSION2, self.name, None if v5 else self.clean,
            protocol=MQTTProtocolVersion(self.version), reconnect_on_failure=False,
        )  # fmt: skip
        client.username_pw_set(self.username, self.password)

        def later(action: Callable[..., Any], *what: object) -> None:
            loop.call_soon_threadsafe(action, *what)

        client.on_message = lambda _c, _u, message: later(self.inbox.put_nowait, _from_paho(message))
        client.on_connect = lambda _c, _u, flags, _r, _p: later(
            self._connected.put_nowait, flags.session_present
        )
        client.on_subscribe = lambda _c, _u, mid, _r, _p: later(self._done.put_nowait, mid)
        if self.will is not None:
            delay = {"will_delay_interval": self.will.delay} if self.will.delay else {}
            properties = _paho_properties(PacketTypes.WILLMESSAGE, delay)
            client.will_set(self.will.topic, self.will.payload, 1, properties=properties)
        expiry = {} if self.clean else {"session_expiry_interval": EXPIRY}
        wished = {"clean_start": self.clean, "properties": _paho_properties(PacketTypes.CONNECT, expiry)}
        client.connect(self.host, self.port, **(wished if v5 else {}))
        client.loop_start()
        async with asyncio.timeout(PATIENCE):
            self.present = await self._connected.get()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._client.disconnect()
        await asyncio.to_thread(self._client.loop_stop)

    async def subscribe(self, topic_filter: str, qos: int = 2) -> None:
        self._client.subscribe(topic_filter, qos)
        async with asyncio.timeout(PATIENCE):
            await self._done.get()

    async def publish(
        self, topic: str, payload: str, qos: int = 1, retain: bool = False, **properties: Any
    ) -> None:
        made = _paho_properties(PacketTypes.PUBLISH, properties)
        info = self._client.publish(topic, payload, qos, retain, properties=made)
        await asyncio.to_thread(info.wait_for_publish, PATIENCE)
        assert info.is_published()

    def vanish(self) -> None:
        self._client.socket().shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]


class AiomqttUser(User):
    async def __aenter__(self) -> User:
        v5 = self.version == 5
        options: dict[str, Any] = {"clean_start": self.clean} if v5 else {"clean_session": self.clean}
        if not self.clean and v5:
            options["properties"] = _paho_properties(PacketTypes.CONNECT, {"session_expiry_interval": EXPIRY})
        if self.will is not None:
            delay = {"will_delay_interval": self.will.delay} if self.will.delay else {}
            properties = _paho_properties(PacketTypes.WILLMESSAGE, delay)
            options["will"] = aiomqtt.Will(self.will.topic, self.will.payload, 1, properties=properties)
        self._client = aiomqtt.Client(
            self.host, self.port, username=self.username, password=self.password, identifier=self.name,
            protocol=aiomqtt.ProtocolVersion(self.version), timeout=PATIENCE, **options,
        )  # fmt: skip
        connected = self._client._on_connect

        def on_connect(client: Any, userdata: Any, flags: Any, *others: Any) -> None:
            self.present = (
                flags.session_present if hasattr(flags, "session_present") else flags["session present"]
            )
            connected(client, userdata, flags, *others)

        self._client._client.on_connect = on_connect  # aiomqtt keeps what CONNACK said to itself
        await self._client.__aenter__()
        self._reader = asyncio.create_task(self._read())
        return self

    async def _read(self) -> None:
        with contextlib.suppress(aiomqtt.MqttError):
            async for message in self._client.messages:
                self.inbox.put_nowait(_from_paho(message))

    async def __aexit__(self, *_: object) -> None:
        self._reader.cancel()
        with contextlib.suppress(aiomqtt.MqttError):  # it vanished
            await self._client.__aexit__(None, None, None)

    async def subscribe(self, topic_filter: str, qos: int = 2) -> None:
        await self._client.subscribe(topic_filter, qos)

    async def publish(
        self, topic: str, payload: str, qos: int = 1, retain: bool = False, **properties: Any
    ) -> None:
        made = _paho_properties(PacketTypes.PUBLISH, properties)
        await self._client.publish(topic, payload, qos, retain, properties=made)

    def vanish(self) -> None:
        self._client._client.socket().shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]


class GmqttUser(User):
    async def __aenter__(self) -> User:
        options: dict[str, Any] = (
            {} if self.clean or self.version < 5 else {"session_expiry_interval": EXPIRY}
        )
        if self.will is not None:
            delay = {"will_delay_interval": self.will.delay} if self.will.delay else {}
            options["will_message"] = gmqtt.Message(self.will.topic, self.will.payload, 1, **delay)
        if self.aliases:
            options["topic_alias_maximum"] = self.aliases
        self._client = client = gmqtt.Client(self.name, clean_session=self.clean, **options)
        self._done: asyncio.Queue[int] = asyncio.Queue()
        client.set_config({"reconnect_retries": 0})
        client.set_auth_credentials(self.username, self.password)
        client.on_connect = self._on_connect
        client.on_message = self._on_message
        client.on_subscribe = lambda _c, mid, _q, _p: self._done.put_nowait(mid)
        async with asyncio.timeout(PATIENCE):
            await client.connect(self.host, self.port, version=self.version)
        return self

    def _on_connect(self, client: Any, flags: int, reason: int, properties: Any) -> None:
        self.present = bool(flags & 1)

    def _on_message(
        self, client: Any, topic: str, payload: bytes, qos: int, properties: dict[str, Any]
    ) -> int:
        wanted = {"response_topic", "correlation_data", "content_type", "topic_alias"}
        told = {name.title().replace("_", ""): properties[name][0] for name in wanted & properties.keys()}
        if "CorrelationData" in told:
            told["CorrelationData"] = told["CorrelationData"].hex()
        if "user_property" in properties:
            told["UserProperty"] = [tuple(pair) for pair in properties["user_property"]]
        self.inbox.put_nowait(Message(topic, payload.decode(), qos, bool(properties["retain"]), told))
        return 0

    async def __aexit__(self, *_: object) -> None:
        await self._client.disconnect()

    async def subscribe(self, topic_filter: str, qos: int = 2) -> None:
        self._client.subscribe(topic_filter, qos)
        async with asyncio.timeout(PATIENCE):
            await self._done.get()

    async def publish(
        self, topic: str, payload: str, qos: int = 1, retain: bool = False, **properties: Any
    ) -> None:
        self._client.publish(topic, payload, qos, retain, **properties)
        if qos:
            async with asyncio.timeout(PATIENCE):
                await self._client._persistent_storage.wait_empty()  # there is no other way to see the answer

    def vanish(self) -> None:
        self._client._connection._transport.abort()


MakeUser = Callable[..., User]
LIBRARIES: Final = {"paho": PahoUser, "aiomqtt": AiomqttUser, "gmqtt": GmqttUser}


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[4, 5])
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def user(library: str, version: int) -> MakeUser:
    """user(server, name, **options); names and topics of each test and library are their own."""
    kind = LIBRARIES[library]

    def make(server: LocalServer, name: str, **options: Any) -> User:
        return kind(server, f"{library}-{version}-{name}", version, **options)

    return make


@pytest.fixture
def topic(request: pytest.FixtureRequest) -> str:
    return str(request.node.name).replace("#", "").replace("+", "")


def said(messages: list[Message]) -> list[tuple[str, int]]:
    return [(message.payload, message.qos) for message in messages]


async def test_messages_of_every_qos_arrive_in_order(server: LocalServer, user: MakeUser, topic: str) -> None:
    async with user(server, "left") as left, user(server, "right") as right:
        for mine in (left, right):
            await mine.subscribe(f"{topic}/{mine.name}")
        for sender, receiver in ((left, right), (right, left)):
            for qos in (0, 1, 2):
                for i in range(10):
                    await sender.publish(f"{topic}/{receiver.name}", str(i), qos)
                assert said(await receiver.receive(10)) == [(str(i), qos) for i in range(10)]


async def test_a_retained_message_is_there_for_who_comes_later(
    server: LocalServer, user: MakeUser, topic: str
) -> None:
    async with user(server, "keeper") as keeper, user(server, "looker") as looker:
        await keeper.publish(topic, "old", 1, True)
        await keeper.publish(topic, "new", 1, True)
        await looker.subscribe(topic)
        assert [(m.payload, m.retain) for m in await looker.receive()] == [("new", True)]
        await keeper.publish(topic, "", 1, True)
        assert [(m.payload, m.retain) for m in await looker.receive()] == [("", False)]
        await looker.subscribe(topic)
        await looker.receive_nothing()


async def test_a_will_is_sent_for_who_vanishes(server: LocalServer, user: MakeUser, topic: str) -> None:
    async with user(server, "heir") as heir:
        await heir.subscribe(topic)
        async with user(server, "leaving", will=Will(topic, "gone")):
            pass
        await heir.receive_nothing()
        async with user(server, "mortal", will=Will(topic, "gone")) as mortal:
            mortal.vanish()
            assert said(await heir.receive()) == [("gone", 1)]


@pytest.mark.parametrize("version", [5], indirect=True)
async def test_a_will_waits_for_its_delay_and_is_dropped_if_its_owner_comes_back(
    server: LocalServer, user: MakeUser, topic: str
) -> None:
    async with user(server, "heir") as heir:
        await heir.subscribe(topic)
        async with user(server, "mortal", clean=False, will=Will(topic, "not yet", delay=3600)) as mortal:
            mortal.vanish()
        await heir.receive_nothing()
        async with user(server, "mortal", clean=False, will=Will(topic, "gone", delay=1)) as mortal:
            assert mortal.present
            mortal.vanish()
            assert said(await heir.receive()) == [("gone", 1)]
        async with user(server, "mortal"):  # a will that still waited would go with its session
            await heir.receive_nothing()


async def test_a_session_is_resumed_after_a_crash_of_the_server(
    own_server: LocalServer, user: MakeUser, topic: str
) -> None:
    async with user(own_server, "absent", clean=False) as absent:
        assert not absent.present
        await absent.subscribe(f"{topic}/+")
    async with user(own_server, "present") as present:
        for qos in (1, 2):
            for i in range(5):
                await present.publish(f"{topic}/{qos}", str(i), qos)
    await asyncio.to_thread(own_server.restart)
    async with user(own_server, "absent", clean=False) as absent:
        assert absent.present
        assert said(await absent.receive(10)) == [(str(i), qos) for qos in (1, 2) for i in range(5)]
        await absent.publish(f"{topic}/again", "still subscribed", 2)
        assert said(await absent.receive()) == [("still subscribed", 2)]


@pytest.fixture(scope="module")
def own_server(start_server: StartServer) -> LocalServer:
    """One that tests kill."""
    return start_server()


async def test_members_of_a_group_share_its_messages(server: LocalServer, user: MakeUser, topic: str) -> None:
    async with user(server, "boss") as boss, user(server, "one") as one:
        await one.subscribe(f"$share/workers/{topic}", 1)
        async with user(server, "two") as two:
            await two.subscribe(f"$share/workers/{topic}", 1)
            for i in range(20):
                await boss.publish(topic, str(i))
            half = await one.receive(10)
            other = await two.receive(10)
            assert sorted(int(m.payload) for m in half + other) == list(range(20))
        for i in range(5):
            await boss.publish(topic, f"new {i}")
        got: list[Message] = []
        while len(got) < 5:  # what `two` left without having acknowledged it comes, too
            got += [message for message in await one.receive(1) if message.payload.startswith("new")]
        assert said(got) == [(f"new {i}", 1) for i in range(5)]


@pytest.mark.parametrize("version", [5], indirect=True)
async def test_a_request_gets_its_response(server: LocalServer, user: MakeUser, topic: str) -> None:
    async with user(server, "asks") as asks, user(server, "answers") as answers:
        await asks.subscribe(f"{topic}/response")
        await answers.subscribe(f"{topic}/request")
        await asks.publish(
            f"{topic}/request", "2 + 2", 1, response_topic=f"{topic}/response", correlation_data=b"\x00\x01",
            content_type="text/plain", user_property=[("lang", "en"), ("lang", "de")],
        )  # fmt: skip
        [request] = await answers.receive()
        assert request.properties == {
            "ResponseTopic": f"{topic}/response", "CorrelationData": "0001", "ContentType": "text/plain",
            "UserProperty": [("lang", "en"), ("lang", "de")],
        }  # fmt: skip
        await answers.publish(request.properties["ResponseTopic"], "4", 1, correlation_data=b"\x00\x01")
        [response] = await asks.receive()
        assert (response.payload, response.properties) == ("4", {"CorrelationData": "0001"})


@pytest.mark.parametrize("version", [5], indirect=True)
async def test_an_alias_stands_for_its_topic(server: LocalServer, user: MakeUser, topic: str) -> None:
    async with user(server, "short") as short, user(server, "reader") as reader:
        await reader.subscribe(topic)
        await short.publish(topic, "long", 1, topic_alias=3)
        for i in range(3):
            await short.publish("", str(i), 1, topic_alias=3)
        messages = await reader.receive(4)
        assert {message.topic for message in messages} == {topic}
        assert [message.payload for message in messages] == ["long", "0", "1", "2"]


@pytest.mark.parametrize("version", [5], indirect=True)
@pytest.mark.parametrize("library", ["gmqtt"], indirect=True)  # the others leave the topic empty
async def test_a_client_that_takes_aliases_knows_every_topic(
    server: LocalServer, user: MakeUser, topic: str
) -> None:
    async with user(server, "sender") as sender, user(server, "reader", aliases=2) as reader:
        await reader.subscribe(f"{topic}/+")
        sent = [f"{topic}/{i % 3}" for i in range(9)]
        for one in sent:
            await sender.publish(one, "x")
        messages = await reader.receive(9)
        assert [message.topic for message in messages] == sent
        assert len([message for message in messages if "TopicAlias" in message.properties]) >= 6
