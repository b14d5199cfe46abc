"""From accept to CONNACK: who comes in, as whom, and with which session.

Everything here runs on the event loop's thread. What may take long (unknown apps, first sight of an open app's
device, a login) is a task or a callback of the store; an authenticated device that is owed nothing costs none of
these (architecture, decision 4: claim the route, then fetch).
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import deque
from collections.abc import Callable
from secrets import token_hex
from typing import TYPE_CHECKING, Final

from broker.audiences.devices import Devices
from broker.bus import Bus, Taken
from broker.carriers.catalog import read_link
from broker.carriers.profile import CarrierProfile
from broker.errors import ApiError
from broker.logs import log_event
from broker.model import Claim
from broker.store import Store, StoreError
from gateway import sockets
from gateway.ack_time import OVERDUE
from gateway.admission import (
    BUSY,
    DRAINING,
    HOME_AWAY,
    INTERNAL_ERROR,
    NO_CREDENTIALS,
    OVER_RATE,
    OVERTAKEN,
    STORE_AWAY,
    UNKNOWN_APP,
    UNKNOWN_METHOD,
    WILL_NOT_ALLOWED,
    Admission,
    Guest,
    KnownDevice,
    Limits,
    OpenDevice,
    Publisher,
    Refusal,
    Terms,
    UserProperties,
    admit,
    advice,
    agree,
    connack,
    manners,
    welcome,
)
from gateway.connection import FROM_NODES, OPENING_CHECK, Connection, Phase
from gateway.doorkeeper import Doorkeeper, TurnedAway, source_of
from gateway.gate import PATIENCE, Gate
from gateway.hub import Ending, Hub, Ordinary
from gateway.live import SYS, encoding
from gateway.logins import Login, Logins
from gateway.mailbox import DEVICE, PUBLISHER, Mailbox
from gateway.mqtt import Auth, Connect, MQTTError, Properties, Reason, Will, encode
from gateway.scram import METHOD
from gateway.segments import segment_size
from gateway.session import Member, Session, SessionLimits

if TYPE_CHECKING:
    from gateway.node import Node

# User properties of a CONNECT that wants its pushes as MessagePack, or in zlib streams where that is shorter.
FORMAT_PROPERTY: Final = ("format", "msgpack")
COMPRESSION_PROPERTY: Final = ("compression", "deflate")
# And of one that tells where it is: MCC+MNC or a name, and one of broker.carriers.catalog.LINKS.
CARRIER_PROPERTY: Final = "carrier"
LINK_PROPERTY: Final = "link"
MAX_RECEIVE: Final = 65_535
HOME_TRIES: Final = 4  # to carry a connection home
HOME_PAUSE: Final = 0.1  # seconds between them: a home that stops says so first
AT_ONCE: Final = 64  # CONNECTs decided in one turn of the loop, about 2 ms

log = logging.getLogger(__name__)


class Arrivals:
    def __init__(
        self,
        node: Node,
        *,
        store: Store,
        bus: Bus,
        devices: Devices,
        doorkeeper: Doorkeeper | None,
        gate: Gate,
        wall: Callable[[], float],
    ) -> None:
        self._node = node
        self._store = store
        self._bus = bus
        self.gate = gate
        self._loop = asyncio.get_running_loop()
        self._line: deque[tuple[Connection, Connect, float]] = deque()  # since when they stand there
        self._decided_now = 0  # in this turn of the loop, of those that did not stand in line
        self._devices = devices
        self._doorkeeper = doorkeeper
        self._wall = wall
        self._sources: dict[Connection, str] = {}  # what the doorkeeper counts them as
        self.opening: set[Connection] = set()
        self.logins = Logins(admitted=self._logged_in, refused=self._login_failed, spawn=node.spawn)
        settings = node.settings
        self._session_limits = SessionLimits(
            settings.receive_maximum, settings.topic_alias_maximum, settings.mailbox
        )
        self._limits = Limits(
            settings.receive_maximum, settings.max_packet_size, settings.topic_alias_maximum
        )

    # Accept

    def opened(self, connection: Connection) -> None:
        node = self._node
        node.metrics.accepted.labels(connection.listener).value += 1
        if (
            len(self.opening) >= node.settings.max_connecting
            or node.live + len(self.opening) >= node.settings.max_connections
        ):
            self._turn_away("too many connections", connection)
        elif (refused := self._asked(connection)) is not None:
            self._turn_away(refused, connection)
        else:
            self.opening.add(connection)
            node.watch(connection, OPENING_CHECK)

    def _asked(self, connection: Connection) -> TurnedAway | None:
        """What the doorkeeper says."""
        if self._doorkeeper is None:
            return None
        if connection.listener == FROM_NODES:
            return None
        source = source_of(connection.peer)
        refused = self._doorkeeper.admit(source, self._node.clock.now)
        if refused is None:
            self._sources[connection] = source
        return refused

    def _turn_away(self, label: str, connection: Connection) -> None:
        self._node.count_refusal(label)
        connection.transport.abort()

    def left(self, connection: Connection) -> None:
        """A connection is over, in whatever phase."""
        self.opening.discard(connection)
        self.logins.forget(connection)
        if self._doorkeeper is not None and (source := self._sources.pop(connection, None)) is not None:
            self._doorkeeper.left(source, self._node.clock.now)

    # The line

    @property
    def waiting(self) -> int:
        """CONNECTs that stand in line."""
        return len(self._line)

    def join(self, connection: Connection, connect: Connect) -> None:
        """A CONNECT came. Ends, at once or later, in CONNACK; until then nothing more is read."""
        if self._node.draining:
            self._turn_back(connection, connect, DRAINING, self._node.handover.reference())
            return
        now = self._loop.time()
        if self.gate.over_rate(now):
            self._come_later(connection, connect, OVER_RATE, now)
        elif self._line and now - self._line[0][2] > PATIENCE:
            self._come_later(connection, connect, BUSY, now)
        elif self._line or self._decided_now >= AT_ONCE:
            self._line.append((connection, connect, now))
        else:
            if not self._decided_now:
                self._loop.call_soon(self._next_turn)
            self._decided_now += 1
            self._decide(connection, connect)

    def _next_turn(self) -> None:
        from_line = 0
        while self._line and from_line < AT_ONCE:
            connection, connect, _ = self._line.popleft()
            if connection.phase is not Phase.CLOSED:
                from_line += 1
                self._decide_waiting(connection, connect)
        self.gate.decided(self._decided_now + from_line, self._loop.time(), line=bool(self._line))
        self._decided_now = 0
        if self._line:
            self._loop.call_soon(self._next_turn)

    def _decide_waiting(self, connection: Connection, connect: Connect) -> None:
        try:
            self._decide(connection, connect)
        except MQTTError as error:
            connection.fail(error)
        except Exception:  # noqa: BLE001 (logged there)
            self._failed(connection, connect)

    def _come_later(self, connection: Connection, connect: Connect, refusal: Refusal, now: float) -> None:
        told = self.gate.appointment(now).properties if connect.version == 5 else ()
        self._turn_back(connection, connect, refusal, {"user_properties": told})

    def _turn_back(
        self, connection: Connection, connect: Connect, refusal: Refusal, more: Properties
    ) -> None:
        """Without a line in the log: of those that nobody has looked at yet there are thousands."""
        connection.refuse(
            connect.version,
            refusal.reason,
            refusal.text,
            refusal.label,
            maximum_packet=connect.properties.get("maximum_packet_size", 0),
            more=more,
        )

    # CONNECT

    def _decide(self, connection: Connection, connect: Connect) -> None:
        if _has_left(connection):
            self._node.count_refusal("peer left")
            connection.close("peer left")
            return
        method = connect.properties.get("authentication_method")
        if method is not None and method != METHOD:
            self._refuse(connection, connect, UNKNOWN_METHOD)
            return
        key = self._app_key(connect, method)
        if key is None:
            self._refuse(connection, connect, NO_CREDENTIALS)
            return
        hub = self._node.hubs.find(key)
        if hub is None:
            self._node.hubs.load(key, functools.partial(self._loaded, connection, connect))
        else:
            self._enter(connection, connect, hub)

    def _app_key(self, connect: Connect, method: str | None) -> str | None:
        """Of the app that the peer wants in to. Some libraries send empty credentials where they have none."""
        if not connect.username:
            return self._node.settings.anonymous_app if not connect.password and method is None else None
        return connect.username if connect.password is not None or method is not None else None

    def _loaded(self, connection: Connection, connect: Connect, hub: Hub | None, away: bool) -> None:
        if connection.phase is Phase.CLOSED:
            return
        if hub is None:
            self._refuse(connection, connect, STORE_AWAY if away else UNKNOWN_APP)
            return
        try:
            self._enter(connection, connect, hub)
        except Exception:  # noqa: BLE001 (logged there)
            self._failed(connection, connect)

    def _failed(self, connection: Connection, connect: Connect) -> None:
        """In steps that nobody else watches: a CONNECT that meets a bug of ours is refused, and does not wait for
        ever."""
        log.exception("a CONNECT was not answered")
        if connection.session is None:
            self._refuse(connection, connect, INTERNAL_ERROR)
        else:
            connection.close("internal error", Reason.UNSPECIFIED_ERROR)

    def _enter(self, connection: Connection, connect: Connect, hub: Hub) -> None:
        hub.touched = self._node.clock.now
        if hub.ordinary is Ordinary.AWAY:
            self._node.spawn(self._carry_home(connection, connect, hub))
            return
        if "authentication_method" in connect.properties:
            connection.phase = Phase.PROVING
            self.logins.begin(connection, connect, hub)
            if connection.phase is not Phase.CLOSED:
                connection.read_on()
        else:
            self._admit(connection, connect, hub)

    async def _carry_home(self, connection: Connection, connect: Connect, hub: Hub) -> None:
        """To the node where the app's ordinary topics are, which may be this one by now (decision 0022)."""
        node = self._node
        for _ in range(HOME_TRIES):
            try:
                home = await self._store.find_home(hub.app.app_id)
            except StoreError:
                self._refuse(connection, connect, STORE_AWAY)
                return
            if connection.phase is Phase.CLOSED:
                return
            if home is None:
                if node.hubs.get(hub.app.app_id) is hub:
                    node.hubs.remove(hub)
                node.hubs.load(hub.app.key, functools.partial(self._loaded, connection, connect))
                return
            if connection.listener == FROM_NODES or not home.direct:  # one of us is wrong about the home
                break
            if await node.tunnels.open(connection.transport, home.direct, lambda: _said(connection, connect)):
                connection.give_away()
                self.left(connection)
                return
            await self._look_at_nodes()
        self._refuse(connection, connect, HOME_AWAY)

    async def _look_at_nodes(self) -> None:
        """The home may have left a moment ago."""
        await asyncio.sleep(HOME_PAUSE)
        try:
            await self._store.nodes.list()
        except StoreError as error:
            log.warning("the table of nodes cannot be read: %s", error)

    def authenticate(self, connection: Connection, packet: Auth) -> None:
        """An AUTH came, before CONNACK or after. Raises ProtocolError."""
        self.logins.take(connection, packet)

    def _logged_in(self, connection: Connection, connect: Connect, login: Login) -> None:
        hub = login.hub
        if connection.session is None:
            connection.phase = Phase.JOINING
            if self._node.hubs.get(hub.app.app_id) is hub:
                self._admit(connection, connect, hub)
            else:  # the app was deleted meanwhile, or has moved
                self._refuse(connection, connect, UNKNOWN_APP if self._node.membership.alone else HOME_AWAY)
            return
        generations = self._store.token_generations(hub.app.app_id)
        again = admit(hub.app, hub.access, connect, generations, self._wall())
        if isinstance(again, Refusal):
            connection.close("authentication failed", Reason.NOT_AUTHORIZED, again.text)
        elif not _is_same(again, connection):
            connection.close("authentication failed", Reason.NOT_AUTHORIZED, "that is somebody else's proof")
        else:
            self.logins.confirm(connection, login)

    def _login_failed(self, connection: Connection, login: Login, why: str) -> None:
        if connection.session is None:
            refusal = Refusal(Reason.NOT_AUTHORIZED, f"authentication failed: {why}", "authentication failed")
            self._refuse(connection, login.connect, refusal)
        else:
            connection.close("authentication failed", Reason.NOT_AUTHORIZED)

    def _admit(self, connection: Connection, connect: Connect, hub: Hub) -> None:
        if connect.will is not None and not self._node.exchange.fits(connect.will.topic):
            self._refuse(connection, connect, WILL_NOT_ALLOWED)
            return
        generations = self._store.token_generations(hub.app.app_id)
        anonymous = not connect.username and hub.app.key == self._node.settings.anonymous_app
        match admit(hub.app, hub.access, connect, generations, self._wall(), anonymous=anonymous):
            case KnownDevice(devno, platform, generation):
                connection.generation = generation
                self._claim(connection, connect, hub, devno, platform)
            case OpenDevice():
                self._node.spawn(self._admit_open(connection, connect, hub))
            case Guest():
                self._welcome_other(connection, connect, hub, "guest", DEVICE)
            case Publisher():
                self._welcome_other(connection, connect, hub, "publisher", PUBLISHER)
            case Refusal() as refusal:
                self._refuse(connection, connect, refusal)

    async def _admit_open(self, connection: Connection, connect: Connect, hub: Hub) -> None:
        try:
            device = await self._devices.register_open(hub.app, connect.client_id)
            if connection.phase is not Phase.CLOSED:
                connection.generation = device.token_generation
                self._claim(connection, connect, hub, device.devno, device.platform)
        except ApiError as error:
            refusal = Refusal(Reason.CLIENT_IDENTIFIER_NOT_VALID, error.message, "bad client id")
            self._refuse(connection, connect, STORE_AWAY if error.http_status >= 500 else refusal)
        except StoreError as error:
            log.warning("device not registered: %s", error)
            self._refuse(connection, connect, STORE_AWAY)
        except Exception:  # noqa: BLE001 (logged there)
            self._failed(connection, connect)

    def _claim(self, connection: Connection, connect: Connect, hub: Hub, devno: int, platform: str) -> None:
        done = functools.partial(self._claimed, connection, connect, hub, devno, platform)
        self._store.claim_route(hub.app.app_id, devno, self._node.settings.node_id, done)

    # CONNACK

    def _claimed(
        self, connection: Connection, connect: Connect, hub: Hub, devno: int, platform: str, claim: Claim
    ) -> None:
        if claim.former and claim.former != self._node.settings.node_id:
            self._bus.ring([Taken(hub.app.app_id, devno, claim.epoch, claim.former)])
        try:
            self._welcome_device(connection, connect, hub, devno, platform, claim)
        except Exception:  # noqa: BLE001 (logged there)
            self._failed(connection, connect)

    def _welcome_device(
        self, connection: Connection, connect: Connect, hub: Hub, devno: int, platform: str, claim: Claim
    ) -> None:
        if connection.phase is Phase.CLOSED:
            self._give_back(hub.app.app_id, devno, claim.epoch)
            return
        if self._node.hubs.get(hub.app.app_id) is not hub:  # the app was deleted meanwhile, or has moved
            self._give_back(hub.app.app_id, devno, claim.epoch)
            self._node.hubs.load(hub.app.key, functools.partial(self._loaded, connection, connect))
            return
        if hub.is_overtaken(devno, claim.epoch):
            self._refuse(connection, connect, OVERTAKEN)  # it has come back since, and the newer wins (G5)
            return
        self._node.settler.returned(hub.app.app_id, devno)
        self._take_over(hub.members.get(devno))
        self._take_over(hub.others.get(DEVICE + connect.client_id))  # a guest of that name
        link = self._recognise(connection, connect)
        session = self._session(connection, connect, platform, devno=devno)
        self._come_back(connection, session, hub.endings.take(devno), claim)
        connection.epoch = claim.epoch
        hub.members[devno] = connection
        hub.online.add(devno)
        elsewhere = not self._node.membership.alone
        for push in hub.start(session, may_owe=claim.may_owe, elsewhere=elsewhere):
            self._node.settler.note_evicted(push)
        self._welcome(connection, connect, hub, session, link=link, role="device", prefix=DEVICE)

    @staticmethod
    def _come_back(connection: Connection, session: Session, ending: Ending, claim: Claim) -> None:
        """As the carrier has it for a device whose connection before did not end in order. If that was at another
        node, all that is known is whether it had ended."""
        delivery = connection.profile.delivery
        in_order = ending is Ending.ORDERLY and not claim.former
        session.come_back(
            session.window if in_order else delivery.first_window, urgent=delivery.order == "urgent"
        )
        if ending is Ending.OVERDUE:
            session.ack_time = OVERDUE

    def _give_back(self, app_id: int, devno: int, epoch: int) -> None:
        """A claim that nobody is here to use. It was the newer one all the same: an older connection of the device
        has lost its route to it, and with no node in the route nobody else would ever tell (G5)."""
        hub = self._node.hubs.get(app_id)
        old = None if hub is None else hub.members.get(devno)
        if old is not None and old.epoch < epoch:
            self._take_over(old)
        self._store.release_route(app_id, devno, epoch, self._wall())

    def _welcome_other(
        self, connection: Connection, connect: Connect, hub: Hub, role: str, prefix: str
    ) -> None:
        """A publisher or a guest, which is no device and has no route."""
        assigned = None if connect.client_id else token_hex(10)
        key = prefix + (connect.client_id or str(assigned))
        self._take_over(hub.others.get(key))
        link = self._recognise(connection, connect)
        session = self._session(connection, connect, "other")
        hub.others[key] = connection
        self._welcome(
            connection, connect, hub, session, link=link, role=role, prefix=prefix, assigned=assigned
        )

    def _take_over(self, old: Member | None) -> None:
        if old is not None:
            self._node.metrics.takeovers.value += 1
            old.close("taken over", Reason.SESSION_TAKEN_OVER)  # MQTT5-3.1.4-3

    def _recognise(self, connection: Connection, connect: Connect) -> str:
        """By what the peer declares of its network: nothing, if it is not made for us. Returns its link, one of
        broker.carriers.catalog.LINKS; empty: it says nothing."""
        declared = connect.properties.get("user_properties")
        if not declared:
            return ""
        carrier, link = (_declared(declared, name) for name in (CARRIER_PROPERTY, LINK_PROPERTY))
        if not (carrier or link):
            return ""
        former = connection.profile
        connection.profile = self._node.carriers.catalog.at_connect(former, carrier, link)
        sockets.change(connection.transport, former.tcp, connection.profile.tcp)
        return read_link(link)

    def _session(
        self,
        connection: Connection,
        connect: Connect,
        platform: str,
        *,
        devno: int = -1,
    ) -> Session:
        wishes = connect.properties.get("user_properties", ())
        packed, deflated = FORMAT_PROPERTY in wishes, COMPRESSION_PROPERTY in wishes
        profile = connection.profile
        by_segment = deflated and profile.delivery.compress == "packet"
        segment = segment_size(connection.transport, profile.tcp) if by_segment else 0
        return Session(
            encoding(connect.version, platform, packed, deflated, segment),
            devno=devno,
            window=min(
                connect.properties.get("receive_maximum", MAX_RECEIVE),
                profile.delivery.window,
                self._node.settings.window,
            ),
            manners=manners(connect, profile.delivery.largest if devno >= 0 else 0),
            limits=self._session_limits,
        )

    def _welcome(
        self,
        connection: Connection,
        connect: Connect,
        hub: Hub,
        session: Session,
        *,
        link: str,
        role: str,
        prefix: str,
        assigned: str | None = None,
    ) -> None:
        node, version = self._node, str(connect.version)
        terms, told = self._agree(connect, connection.profile, link)
        connection.client_id = assigned or connect.client_id
        connection.prefix = prefix
        connection.hub = hub
        connection.session = session
        connection.will = None if _is_of_sys(connect.will) else connect.will
        connection.last_seen = node.clock.now
        connection.keep_alive = terms.patience
        connection.session_expiry = terms.session_expiry
        connection.transport.set_write_buffer_limits(high=connection.profile.delivery.write_buffer)
        resumed, present = node.keeper.resume(connection, hub, session, clean_start=connect.clean_start)
        node.keeper.note_will(connection)
        self.opening.discard(connection)
        connection.phase = Phase.LIVE
        if session.devno >= 0:
            node.witness.connected(connection, hub.app.app_id, session.devno, link)
        node.count_live(connection, version, 1)
        node.blocked += connection.blocked
        more: Properties = self.logins.proof_for(connection)
        if assigned is not None:
            more["assigned_client_identifier"] = assigned
        frame = self._connack(connect.version, present, terms, more, told)
        if not session.fits(len(frame)):
            frame = self._connack(connect.version, present, terms, more, ())  # MQTT5-3.2.2-20
            if not session.fits(len(frame)):  # MQTT5-3.1.2-24: it cannot be told anything
                connection.close("packet too large")
                return
        connection.send(frame)
        node.metrics.connects.labels(connection.listener, version, role).value += 1
        log_event(
            log,
            logging.INFO,
            f"{role} connected",
            app=hub.app.key,
            device=connection.client_id,
            node=node.settings.node_id,
            transport=connection.listener,
            version=connect.version,
            keep_alive=terms.keep_alive,
        )
        if resumed:
            connection.send(b"".join(resumed))
        if session.mailbox is not None and session.mailbox.waits:
            connection.when_saved(functools.partial(_go_on, connection, session.mailbox))
        connection.catch_up()
        connection.read_on()

    def _agree(self, connect: Connect, profile: CarrierProfile, link: str) -> tuple[Terms, UserProperties]:
        """On what holds; and what a device that tells its network is advised."""
        settings, learning = self._node.settings, self._node.learning
        if link:
            # It learns by itself how long it may be silent there.
            heartbeat = learning.heartbeat(profile, link)
            least, most = heartbeat.least, heartbeat.most
            told = advice(heartbeat, settings.keep_alive_min, settings.keep_alive_max)
        else:
            least, most, told = 0, learning.longest(profile, link), ()
        terms = agree(
            connect,
            keep_alive_min=max(settings.keep_alive_min, least),
            keep_alive_max=min(most, settings.keep_alive_max),
            session_expiry_max=settings.session_expiry_max,
        )
        return terms, told

    def _connack(
        self, version: int, present: bool, terms: Terms, more: Properties, told: UserProperties
    ) -> bytes:
        if not more:
            return welcome(version, present, terms, self._limits, told)
        return connack(
            version, present, terms, self._limits, {**more, "user_properties": told} if told else more
        )

    def _refuse(self, connection: Connection, connect: Connect, refusal: Refusal) -> None:
        log_event(
            log,
            logging.INFO,
            "connect refused",
            app=(connect.username or "")[:64],
            device=connect.client_id[:64],
            node=self._node.settings.node_id,
            reason=refusal.label,
        )
        self._turn_back(connection, connect, refusal, {})


def _go_on(connection: Connection, mailbox: Mailbox) -> None:
    mailbox.waits = False
    connection.catch_up()


def _said(connection: Connection, connect: Connect) -> bytes:
    """All that the peer has sent."""
    return encode(connect, connect.version) + bytes(connection.partial or b"")


def _is_same(peer: Admission, connection: Connection) -> bool:
    """Whether a live connection that proves itself again is who it was: its client id cannot have changed, its role
    could."""
    assert connection.session is not None
    if isinstance(peer, KnownDevice):
        return peer.devno == connection.session.devno
    return isinstance(peer, Publisher) == (connection.prefix == PUBLISHER)


def _declared(properties: UserProperties, name: str) -> str:
    """The first of that name."""
    return next((value for key, value in properties if key == name), "")


def _is_of_sys(will: Will | None) -> bool:
    """A bridge of mosquitto has a will on `$SYS/broker/connection/…`, which is nobody's to set: it is dropped."""
    return will is not None and will.topic.startswith(SYS)


def _has_left(connection: Connection) -> bool:
    """Whether the peer had closed its side when its CONNECT was read. On a node that is late by seconds CONNECTs wait
    unread, and their peers, tired of it, may be connected elsewhere by now: an old one must not take the device from
    there. Of who leaves later, while the CONNECT stands in line, the epoll tells the end; unless there is more to be
    read, then it is looked up."""
    return bool(connection.transport.get_extra_info("left"))
