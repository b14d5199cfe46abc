"""What devices and publishers publish: reserved topics go to the broker, everything else to the exchange.

A message is answered when what it says is safe: a publisher's PUBACK means that the push is durable. Answers keep
the order of the messages (`Session.answer`), so accepts may overlap.
"""

from __future__ import annotations

import logging
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final

from broker.audiences.devices import Devices
from broker.errors import ApiError
from broker.pushing.pushes import Pushes
from broker.store import Store, StoreError
from broker.telling.reports import Reports
from gateway.exchange import Exchange
from gateway.live import DEVICE_TOPIC, EVENT_PREFIX, PUSH_TOPIC, RECEIPT_TOPIC
from gateway.mailbox import role_of
from gateway.metrics import NodeMetrics
from gateway.mqtt import Publish, Reason
from gateway.session import Session
from gateway.wheel import Clock

if TYPE_CHECKING:
    from gateway.connection import Connection
    from gateway.hub import Hub

log = logging.getLogger(__name__)

Verdict = tuple[Reason, str, tuple[tuple[str, str], ...]]
DONE: Final[Verdict] = (Reason.SUCCESS, "", ())
REFUSED: Final = {  # labels of `publishes_refused`
    Reason.PAYLOAD_FORMAT_INVALID: "payload format",
    Reason.TOPIC_NAME_INVALID: "topic limits",
    Reason.NOT_AUTHORIZED: "not allowed",
}


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
        """Decide at once where it goes. What waits for the store counts as `connection.busy` until answered."""
        hub, session = connection.hub, connection.session
        assert hub is not None
        assert session is not None
        topic, devno = packet.topic, session.devno
        if not _utf8_as_said(packet):
            self._refuse(connection, packet, Reason.PAYLOAD_FORMAT_INVALID, "the payload is not UTF-8")
        elif devno < 0 and topic == PUSH_TOPIC:
            self._start("push", connection, packet, self._push(hub, packet))
        elif devno >= 0 and topic == RECEIPT_TOPIC:
            self._start("receipt", connection, packet, self._receipt(hub, devno, packet))
        elif devno >= 0 and topic.startswith(EVENT_PREFIX):
            self._start("event", connection, packet, self._event(hub, devno, packet))
        elif devno >= 0 and topic == DEVICE_TOPIC:
            self._start("device", connection, packet, self._change(hub, connection.client_id, packet))
        elif not self._exchange.fits(topic):
            self._refuse(connection, packet, Reason.TOPIC_NAME_INVALID, "the topic is too long or too deep")
        elif topic == PUSH_TOPIC or not hub.access.may_publish(*role_of(connection.key), topic):
            self._refuse(connection, packet, Reason.NOT_AUTHORIZED, f"you may not publish on {topic!r}")
        else:
            self._ordinary(connection, hub, session, packet)

    def _refuse(self, connection: Connection, packet: Publish, reason: Reason, text: str) -> None:
        session = connection.session
        assert session is not None
        self._metrics.inbound.labels("refused").value += 1
        self._metrics.publishes_refused.labels(REFUSED[reason]).value += 1
        self._answer(connection, session, packet, (reason, text, ()))

    def _ordinary(self, connection: Connection, hub: Hub, session: Session, packet: Publish) -> None:
        exchange, key = self._exchange, connection.key
        reason, saving = exchange.publish(hub, packet, key, session)
        if saving:
            self._start("topic", connection, packet, _then(exchange.saved(hub, packet, key, session), reason))
            return
        self._metrics.inbound.labels("topic").value += 1
        if reason is Reason.QUOTA_EXCEEDED:
            self._metrics.publishes_refused.labels("retained full").value += 1
        self._answer(connection, session, packet, (reason, "", ()))

    def _start(
        self, kind: str, connection: Connection, packet: Publish, work: Coroutine[Any, Any, Verdict]
    ) -> None:
        self._metrics.inbound.labels(kind).value += 1
        session = connection.session
        assert session is not None
        connection.busy += 1
        if packet.qos == 2 and kind != "topic":
            work = self._taken(session, packet, work)
        connection.node.spawn(self._finish(connection, session, packet, work))

    async def _taken(self, session: Session, packet: Publish, work: Coroutine[Any, Any, Verdict]) -> Verdict:
        verdict = await work
        await self._exchange.taken(packet, session)
        return verdict

    async def _finish(
        self, connection: Connection, session: Session, packet: Publish, work: Coroutine[Any, Any, Verdict]
    ) -> None:
        """The work is done even if the connection has ended: a QoS 0 message and DISCONNECT often share a read."""
        try:
            verdict = await work
        except ApiError as error:
            self._metrics.publishes_refused.labels(str(error.code)).value += 1
            verdict = (_reason(error), error.message, (("code", str(error.code)),))
        except StoreError as error:
            self._metrics.publishes_refused.labels("store").value += 1
            verdict = (Reason.IMPLEMENTATION_SPECIFIC_ERROR, str(error), ())
        except Exception:  # a bug of ours: unanswered, the message comes again
            log.exception("a message was not taken")
            if packet.qos == 2:
                session.refused(packet.packet_id)
            connection.close("internal error", Reason.UNSPECIFIED_ERROR)
            return
        if connection.session is session:  # still the same life
            self._answer(connection, session, packet, verdict)
            connection.less_busy()
        elif packet.qos == 2 and verdict[0] >= Reason.UNSPECIFIED_ERROR:
            session.refused(packet.packet_id)

    def _answer(self, connection: Connection, session: Session, packet: Publish, verdict: Verdict) -> None:
        reason, text, properties = verdict
        if packet.qos == 0:
            return
        if reason is Reason.IMPLEMENTATION_SPECIFIC_ERROR and session.encoding.version != 5:
            if packet.qos == 2:
                session.refused(packet.packet_id)
            # 3.1.1 cannot be told; unacknowledged, it will try again.
            connection.close("store unavailable", Reason.IMPLEMENTATION_SPECIFIC_ERROR)
            return
        connection.send(session.answer(packet, reason, text=text, user_properties=properties))

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


async def _then(saving: Coroutine[Any, Any, None], reason: Reason) -> Verdict:
    await saving
    return reason, "", ()


def _utf8_as_said(packet: Publish) -> bool:
    """MQTT5-3.3.2.3.2: a payload that is said to be UTF-8 is, or goes to nobody."""
    if not packet.properties.get("payload_format_indicator"):
        return True
    try:
        packet.payload.decode()
    except UnicodeDecodeError:
        return False
    return True


def _reason(error: ApiError) -> Reason:
    """The closest MQTT 5 reason; the API's own code goes along as the user property `code`."""
    if error.code == 1011:
        return Reason.NO_MATCHING_SUBSCRIBERS
    if error.http_status == 429:
        return Reason.QUOTA_EXCEEDED
    if error.http_status in (401, 403):
        return Reason.NOT_AUTHORIZED
    return Reason.IMPLEMENTATION_SPECIFIC_ERROR if error.http_status >= 500 else Reason.PAYLOAD_FORMAT_INVALID
