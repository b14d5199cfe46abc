"""The publisher of one contender: a process beside the server, which sends the pushes of a plan at their times.

    ip netns exec NAMESPACE python -m loadtest.lab.sender < spec

The spec is SenderSpec as JSON, one line. For each push that the server accepted it writes a line
`accepted SERIAL TIME` (time.monotonic()); it ends with the plan.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Final, Literal

import msgspec
import orjson
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from clients.publisher import Publisher, PushError

RETRY_PAUSE: Final = 0.2  # seconds
ANSWER_LIMIT: Final = 30.0


class SentPush(msgspec.Struct, frozen=True, array_like=True):
    """`at`: seconds after the start."""

    serial: int
    at: float
    target: str
    text: str


class SenderSpec(msgspec.Struct, frozen=True, kw_only=True):
    """`start`: of time.monotonic(). For Holdfast: app key and secret; for MQTT: `topic` before a target's name."""

    kind: Literal["http", "mqtt"]
    start: float
    pushes: tuple[SentPush, ...]
    url: str = ""
    app_key: str = ""
    secret: str = ""
    topic: str = ""


def content(push: SentPush) -> bytes:
    """What Holdfast makes of it, so that the other broker carries as much."""
    return orjson.dumps({"msg_id": f"{push.serial:018d}", "notification": {"alert": push.text}})


def _say(serial: int) -> None:
    os.write(1, f"accepted {serial} {time.monotonic():.6f}\n".encode())


async def send_http(spec: SenderSpec) -> None:
    async with Publisher(spec.app_key, spec.secret, spec.url) as publisher:
        sending: set[asyncio.Task[None]] = set()
        for push in spec.pushes:
            await asyncio.sleep(spec.start + push.at - time.monotonic())
            task = asyncio.create_task(_post(publisher, push))
            sending.add(task)
            task.add_done_callback(sending.discard)
        if sending:
            await asyncio.wait(sending)


async def _post(publisher: Publisher, push: SentPush) -> None:
    """Until it is accepted: with a cid that is no second push."""
    request = {
        "platform": "all",
        "audience": {"registration_id": [push.target]},
        "notification": {"alert": push.text},
        "cid": f"lab-{push.serial}",
    }
    for _ in range(int(ANSWER_LIMIT / RETRY_PAUSE)):
        try:
            await publisher.push(request)
        except PushError as error:
            sys.stderr.write(f"push {push.serial}: {error}\n")
            await asyncio.sleep(RETRY_PAUSE)
        else:
            _say(push.serial)
            return


def send_mqtt(spec: SenderSpec) -> None:
    client = paho.Client(
        CallbackAPIVersion.VERSION2, "lab-sender", clean_session=False, protocol=paho.MQTTv311
    )
    serials: dict[int, int] = {}
    early: set[int] = set()

    def published(_client: object, _data: object, packet_id: int, *_: object) -> None:
        if packet_id in serials:
            _say(serials.pop(packet_id))
        else:
            early.add(packet_id)  # answered before `publish` returned

    client.on_publish = published
    client.reconnect_delay_set(1, 2)
    client.connect("127.0.0.1", 1883)
    client.loop_start()
    for push in spec.pushes:
        time.sleep(max(0.0, spec.start + push.at - time.monotonic()))
        packet_id = client.publish(spec.topic + push.target, content(push), qos=1).mid
        if packet_id in early:
            early.discard(packet_id)
            _say(push.serial)
        else:
            serials[packet_id] = push.serial
    deadline = time.monotonic() + ANSWER_LIMIT
    while serials and time.monotonic() < deadline:
        time.sleep(0.05)
    client.disconnect()
    client.loop_stop()


def main() -> None:
    spec = msgspec.json.decode(sys.stdin.buffer.readline(), type=SenderSpec)
    if spec.kind == "http":
        asyncio.run(send_http(spec))
    else:
        send_mqtt(spec)


if __name__ == "__main__":
    main()
