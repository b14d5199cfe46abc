"""The devices of one contender in one network: a process inside the network's namespace.

    ip netns exec NAMESPACE python -m loadtest.lab.phones < spec

The spec is PhonesSpec as JSON, one line. What happens is written to standard output, a line each:

    on DEVICE TIME | off DEVICE TIME | got DEVICE TIME SERIAL        TIME is time.monotonic(), one clock for all

It ends with its input. A line `moved` there says that the phones are on another network now.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import threading
import time
from random import Random
from typing import Any, Final, Literal

import msgspec
import orjson
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from clients.device import Device, Push
from loadtest.lab.plan import read_serial

PLAIN_KEEP_ALIVE: Final = 60  # paho's default


class Login(msgspec.Struct, frozen=True, kw_only=True):
    name: str  # client id
    username: str = ""
    password: str = ""


class PhonesSpec(msgspec.Struct, frozen=True, kw_only=True):
    """`servers`: host:port, in order; a plain client knows the first one only. `topic`: a plain client subscribes to
    it with its name behind; "": pushes come without that."""

    kind: Literal["sdk", "plain"]
    servers: tuple[str, ...]
    logins: tuple[Login, ...]
    network: str = ""
    carrier: str = ""
    link: str = ""
    topic: str = ""


class Out:
    """Lines, each written at once; from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def say(self, what: str, device: int, *more: int) -> None:
        line = " ".join(map(str, (what, device, f"{time.monotonic():.6f}", *more)))
        with self._lock:
            os.write(1, f"{line}\n".encode())


# Ours


def make_device(spec: PhonesSpec, number: int, out: Out) -> Device:
    login = spec.logins[number]

    def take(push: Push) -> None:
        out.say("got", number, read_serial(push.notification["alert"]))

    return Device(
        login.username,
        login.name,
        device_key=login.password,
        servers=spec.servers,
        ordered=True,
        link=spec.link,
        network=spec.network,
        carrier=spec.carrier,
        on_push=take,
        on_state=lambda online: out.say("on" if online else "off", number),
        jitter=Random(login.name).random,
    )


async def run_sdk(spec: PhonesSpec, out: Out) -> None:
    async with contextlib.AsyncExitStack() as stack:
        devices = [
            await stack.enter_async_context(make_device(spec, number, out))
            for number in range(len(spec.logins))
        ]
        moves = 0
        while await asyncio.to_thread(sys.stdin.buffer.readline):
            moves += 1
            for device in devices:
                device.network_changed(spec.link, f"{spec.network}-{moves}")
        os._exit(0)  # a phone that is switched off says no goodbye


# A plain MQTT client


class PlainPhone:
    """paho with its defaults, MQTT 3.1.1, and a session that lasts; its thread reconnects."""

    def __init__(self, spec: PhonesSpec, login: Login, number: int, out: Out) -> None:
        self._out = out
        self._number = number
        self._topic = spec.topic and spec.topic + login.name
        self._host, _, port = spec.servers[0].rpartition(":")
        self._port = int(port)
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2, login.name, clean_session=False, protocol=paho.MQTTv311
        )
        if login.username:
            self._client.username_pw_set(login.username, login.password)
        self._client.on_connect = self._connected
        self._client.on_disconnect = self._disconnected
        self._client.on_message = self._message

    def cut(self) -> None:
        """What the system does to sockets of a network that is gone."""
        opened = self._client.socket()
        if isinstance(opened, socket.socket):
            with contextlib.suppress(OSError):  # not connected any more
                opened.shutdown(socket.SHUT_RDWR)

    def start(self) -> None:
        self._client.connect_async(self._host, self._port, PLAIN_KEEP_ALIVE)
        self._client.loop_start()

    def _connected(self, client: paho.Client, _data: Any, flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            sys.stderr.write(f"{self._number}: {reason}\n")
            return
        if self._topic and not flags.session_present:
            client.subscribe(self._topic, qos=1)
        self._out.say("on", self._number)

    def _disconnected(self, *_: Any) -> None:
        self._out.say("off", self._number)

    def _message(self, _client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        push = orjson.loads(message.payload)
        if "notification" in push:
            self._out.say("got", self._number, read_serial(push["notification"]["alert"]))


def run_plain(spec: PhonesSpec, out: Out) -> None:
    phones = [PlainPhone(spec, login, number, out) for number, login in enumerate(spec.logins)]
    for phone in phones:
        phone.start()
    while sys.stdin.buffer.readline():
        for phone in phones:
            phone.cut()


def main() -> None:
    spec = msgspec.json.decode(sys.stdin.buffer.readline(), type=PhonesSpec)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s.%(msecs)03d %(name)s %(message)s", datefmt="%T"
    )
    out = Out()
    if spec.kind == "sdk":
        asyncio.run(run_sdk(spec, out))
    else:
        run_plain(spec, out)
    os._exit(0)  # paho's threads may wait for a dead path


if __name__ == "__main__":
    main()
