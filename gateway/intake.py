"""What devices and publishers publish: reserved topics go to the broker, everything else to the exchange.

A message is answered when what it says is safe: a publisher's PUBACK means that the push is durable. Answers keep
the order of the messages (`Session.answer`), so accepts may overlap.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final

from broker.devices import Devices
from broker.errors import ApiError
from broker.pushes import Pushes
from broker.reports import Reports
from broker.store import Store, StoreError
from gateway.exchange import Exchange
from gateway.live import PUSH_TOPIC
from gateway.metrics import NodeMetrics
from gateway.mqtt import Publish, Reason
from gateway.wheel import Clock

if TYPE_CHECKING:
    from gateway.connection import Connection
    from gateway.hub import Hub

RECEIPT_TOPIC: Final = "receipt"
DEVICE_TOPIC: Final = "device"
EVENT_PREFIX: Final = "event/"

Verdict = tuple[Reason, str, tuple[tuple[str, str], ...]]
DONE: Final[Verdict] = (Reason.SUCCESS, "", ())


class Intake:
    def __init__(
        self,
        *,
        store: Store,
        pushes: Pushes,
        devices: Devices,
        reports: Reports,
        exchange: Exchange,
        clock: Clock,
        metrics: NodeMetrics,
    ) -> None:
        self._store = store
        self._pushes = pushes
        self._devices = devices
        self._reports = reports
        self._exchange = exchange
        self._clock = clock
        self._metrics = metrics

    def take(self, connection: Connection, packet: Publish) -> None:
        connection.node.spawn(self._take(connection, packet))

    async def _take(self, connection: Connection, packet: Publish) -> None:
        hub, session = connection.hub, connection.session
        if hub is None or session is None:
            return
        kind, work = self._work(connection, hub, packet)
        self._metrics.inbound.labels(kind).value += 1
        try:
            reason, text, properties = await work
        except ApiError as error:
            if error.http_status >= 500 and session.encoding.version != 5:
                connection.close(
                    "store unavailable"
                )  # 3.1.1 cannot be told; unacknowledged, it will try again
                return
            reason, text, properties = _reason(error), error.message, (("code", str(error.code)),)
        except StoreError as error:
            if session.encoding.version != 5:
                connection.close("store unavailable")
                return
            reason, text, properties = Reason.IMPLEMENTATION_SPECIFIC_ERROR, str(error), ()
        if packet.qos == 0 or connection.session is not session:
            return
        congested = session.congested
        connection.send(session.answer(packet, reason, text=text, user_properties=properties))
        if congested and not session.congested:
            connection.resume_reading()

    def _work(
        self, connection: Connection, hub: Hub, packet: Publish
    ) -> tuple[str, Coroutine[Any, Any, Verdict]]:
        """The kind, for the metric, and what is to be done."""
        assert connection.session is not None
        devno = connection.session.devno
        if devno < 0:
            if packet.topic == PUSH_TOPIC:
                return "push", self._push(hub, packet)
        elif packet.topic == RECEIPT_TOPIC:
            return "receipt", self._receipt(hub, devno, packet)
        elif packet.topic.startswith(EVENT_PREFIX):
            return "event", self._event(hub, devno, packet)
        elif packet.topic == DEVICE_TOPIC:
            return "device", self._change(hub, connection.client_id, packet)
        elif packet.topic == PUSH_TOPIC or not self._exchange.allowed(connection):
            return "refused", _refuse(packet.topic)
        return "topic", self._ordinary(connection, hub, packet)

    async def _push(self, hub: Hub, packet: Publish) -> Verdict:
        accepted = await self._pushes.push(hub.app, packet.payload)
        return Reason.SUCCESS, "", (("msg_id", str(accepted.msg_id)), ("sendno", accepted.sendno))

    async def _receipt(self, hub: Hub, devno: int, packet: Publish) -> Verdict:
        receipt = self._reports.receipt(hub.app.app_id, devno, packet.payload)
        await self._store.record_receipts([receipt])
        return DONE

    async def _event(self, hub: Hub, devno: int, packet: Publish) -> Verdict:
        name = packet.topic.removeprefix(EVENT_PREFIX)
        event = self._reports.event(hub.app.app_id, devno, name, packet.payload, self._clock.wall)
        await self._store.record_events([event])
        return DONE

    async def _change(self, hub: Hub, registration_id: str, packet: Publish) -> Verdict:
        await self._devices.change(hub.app, registration_id, packet.payload)
        return DONE

    async def _ordinary(self, connection: Connection, hub: Hub, packet: Publish) -> Verdict:
        origin = connection.session.mailbox if connection.session else None
        return await self._exchange.publish(hub, packet, origin), "", ()


async def _refuse(topic: str) -> Verdict:
    return Reason.NOT_AUTHORIZED, f"this device may not publish on {topic!r}", ()


def _reason(error: ApiError) -> Reason:
    """The closest MQTT 5 reason; the API's own code goes along as the user property `code`."""
    if error.code == 1011:
        return Reason.NO_MATCHING_SUBSCRIBERS
    if error.http_status == 429:
        return Reason.QUOTA_EXCEEDED
    if error.http_status in (401, 403):
        return Reason.NOT_AUTHORIZED
    return Reason.IMPLEMENTATION_SPECIFIC_ERROR if error.http_status >= 500 else Reason.PAYLOAD_FORMAT_INVALID
