"""A device: connects, stays connected, hands each push to the app exactly once, reports back.

    async with Device("APPKEY", "phone-1", device_key="…", on_push=show, journal=Path("phone-1.journal")):
        …

The logic is `clients.session.DeviceSession`; this is the asyncio shell around it, with `clients.approach`, which
finds the way to a server. An idle device owns a transport, a protocol and one timer, and no task.

Exactly once. `on_push` returns, then the push's id is written to the journal and synced, then PUBACK
leaves; a push that comes again is acknowledged and not handed over. What remains is one window: a process
that dies after `on_push` did its work and before the id is on disk gets that one push again. An app that
must close it stores `push.msg_id` in the same transaction as its own work. Without a journal the promise
holds for one process.

`on_push` gets one push at a time. If it raises, the push is not acknowledged: the next connection brings it
again, after pushes that came later (the server ends the connection when its ack timeout is over).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import logging
import random
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self, assert_never, cast

import orjson

from clients.addresses import PACE, Address, AppState, Hints, Transport
from clients.approach import Approach
from clients.dispatch import Dispatch
from clients.errors import DeviceError, DeviceStopped
from clients.http import http_address
from clients.journal import NETWORKS_KEPT, Credentials, Journal, JournalError
from clients.reach import Line, connect
from clients.session import (
    SEEN_KEPT,
    Action,
    Answered,
    DeviceSession,
    Discarded,
    Drop,
    LinkSettings,
    Offer,
    Offline,
    Online,
    Open,
    OutboxFull,
    Phase,
    Push,
    Refused,
    Send,
)
from gateway.mqtt import Reason

__all__ = ["Credentials", "Device", "DeviceError", "DeviceStopped", "Hints", "LinkSettings", "Push"]

RENEW_BEFORE: Final = 7 * 86_400  # seconds before a token expires in which a connect renews it
RENEW_PATIENCE: Final = (
    5.0  # seconds for a renewal that is not urgent: the API may be out of reach where we are not
)
CLOSE_GRACE: Final = 5.0  # seconds `close` waits for a push that is being handed over
GOODBYE_LIMIT: Final = 1.0  # seconds `close` waits for the peer to close as well (TLS)
RECEIPT_TOPIC: Final = "receipt"
DEVICE_TOPIC: Final = "device"
EVENT_PREFIX: Final = "event/"
DISPATCH: Final = "dispatch"  # its answers, in the journal
DEFAULTS: Final = LinkSettings()
HINTS: Final = Hints()

OnPush = Callable[[Push], Awaitable[None] | None]
Renew = Callable[[Credentials], Awaitable[Credentials]]

log = logging.getLogger(__name__)


class _Socket(Line):
    """One connection, or an attempt at one. It speaks only while it is the device's current one."""

    __slots__ = ("device", "transport")

    def __init__(self, device: Device) -> None:
        self.device = device
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.device._received(self, data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.device._lost(self, exc)

    def discard(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class Device:
    """Needs credentials: `token`; or a journal that has one; or `device_key`. With `device_key` and `api`
    (the base address of the HTTP API) it registers and keeps its token; with `device_key` alone it connects
    with that key, which open apps accept.

    `renew` gets credentials that expired, were revoked or soon expire, and returns new ones; it raises
    DeviceStopped if there are none, anything else to be asked again later. The default asks `api`.

    All methods belong to the event loop that ran `start`.
    """

    __slots__ = (
        "__weakref__",
        "_answers",
        "_api",
        "_app_key",
        "_app_state",
        "_approach",
        "_away",
        "_carrier",
        "_clock",
        "_closing",
        "_credentials",
        "_device_key",
        "_dispatch",
        "_gone",
        "_handing",
        "_journal",
        "_journal_path",
        "_leaving",
        "_link",
        "_loop",
        "_network",
        "_networks",
        "_on_push",
        "_on_state",
        "_online",
        "_online_since",
        "_opening",
        "_port",
        "_renew",
        "_renewed",
        "_session",
        "_settings",
        "_socket",
        "_stale",
        "_stopped",
        "_timer",
        "_timer_at",
        "_tls",
        "_transport",
        "_up",
        "_wishes",
        "_writing",
    )

    def __init__(
        self,
        app_key: str,
        registration_id: str | None = None,
        *,
        on_push: OnPush,
        token: str | None = None,
        device_key: str | None = None,
        host: str = "127.0.0.1",
        port: int = 1883,
        servers: Sequence[str] = (),
        ordered: bool = False,
        dispatch: Dispatch | None = None,
        doors: Sequence[str] = (),
        hints: Hints = HINTS,
        link: str = "",
        network: str = "",
        carrier: str = "",
        tls: ssl.SSLContext | None = None,
        api: str | None = None,
        journal: Path | None = None,
        platform: str | None = None,
        alias: str | None = None,
        tags: Iterable[str] | None = None,
        renew: Renew | None = None,
        on_state: Callable[[bool], None] | None = None,
        settings: LinkSettings = DEFAULTS,
        jitter: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`servers`: `[transport://]host[:port]` of several nodes, instead of host and port. They are tried one
        after another, a few beside each other; the first one is chosen by chance, unless they are `ordered`. With
        `dispatch`, which is asked at `doors`, its addresses go before those of `servers`, and its hints before
        `hints`; host and port are not used. `link`, `network` and `carrier`: as `network_changed` has them.
        `platform`, `alias` and `tags` are for registration. `on_state` is told when the device is online (True), and
        when it is not any more; it must not raise. `clock` gives Unix seconds."""
        self._app_key = app_key
        self._on_push = on_push
        self._on_state = on_state
        self._device_key = device_key
        self._port = port
        self._tls = tls
        self._transport: Transport = "tcp" if tls is None else "tls"
        own = [self._read(server) for server in servers]
        if not own and dispatch is None:
            own = [Address(host, port, self._transport)]
        chosen = 0 if ordered or len(own) < 2 else int(jitter() * len(own))
        self._dispatch = dispatch
        self._approach = Approach(
            own[chosen:] + own[:chosen],
            hints,
            dispatch,
            doors,
            secret=tls is not None,
            clock=clock,
            on_answer=self._dispatch_answered,
        )
        self._settings = settings
        self._app_state: AppState = "foreground"
        self._link, self._network, self._carrier = link, network, carrier
        self._networks: dict[str, dict[str, Any]] = {}  # what was learned of each
        self._api = None if api is None else http_address(api)
        self._journal_path = journal
        self._wishes: dict[str, Any] = {
            "platform": platform,
            "alias": alias,
            "tags": None if tags is None else list(tags),
        }
        self._renew = renew or (self._renew_over_http if api and device_key else None)
        self._clock = clock
        self._session = DeviceSession(registration_id or "", app_key, b"", jitter, settings=settings)
        self._credentials: Credentials | None = None
        if token is not None and registration_id is not None:
            self._credentials = Credentials(app_key, registration_id, token, float("inf"))
        self._check(registration_id, token)

        self._loop: asyncio.AbstractEventLoop = cast("asyncio.AbstractEventLoop", None)
        self._journal: Journal | None = None
        self._writing: list[asyncio.Future[None]] = []
        self._online_since = 0.0
        self._socket: _Socket | None = None
        self._leaving: _Socket | None = None  # dropped, not gone yet
        self._gone: asyncio.Event | None = None
        self._opening: asyncio.Task[None] | None = None
        self._handing: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0  # uvloop's handles do not always say it
        self._answers: dict[int, asyncio.Future[None]] = {}
        self._online: asyncio.Event | None = None  # while somebody waits for it
        self._up = False  # `on_state` was told so
        self._stopped: asyncio.Future[None] | None = None
        self._closing = False
        self._away = False  # there is no network
        self._renewed = False  # since the last time the server took us
        self._stale = False  # the server refused the credentials

    def _check(self, registration_id: str | None, token: str | None) -> None:
        if token is not None and registration_id is None:
            raise ValueError("a token belongs to a registration id: give both")
        if token is None and self._device_key is None and self._journal_path is None:
            raise ValueError("give token, device_key, or a journal that holds credentials")
        if self._device_key is not None and registration_id is None and self._api is None:
            raise ValueError("without a registration id, give api, so that the server can choose one")

    # Life

    async def start(self) -> None:
        """Open the journal and begin to connect. Raises JournalError."""
        assert self._stopped is None, "a device is started once"
        loop = self._loop = asyncio.get_running_loop()
        self._stopped = loop.create_future()
        self._stopped.add_done_callback(_retrieve)
        if self._journal_path is not None:
            self._open_journal(self._journal_path)
        self._enter()
        self._perform(self._session.tick(self._loop.time()))

    def _open_journal(self, path: Path) -> None:
        journal = Journal(path, SEEN_KEPT)
        kept = journal.credentials()
        wanted = self._session.client_id
        if kept is not None and (kept.app_key != self._app_key or wanted not in ("", kept.registration_id)):
            journal.close()
            raise JournalError(f"journal {path}: belongs to {kept.registration_id} of app {kept.app_key}")
        self._journal = journal
        self._session.remember_all(journal.seen())
        self._credentials = self._credentials or kept
        self._networks = journal.networks()
        if self._dispatch is not None and (answers := journal.kept(DISPATCH)) is not None:
            self._dispatch.restore(orjson.loads(answers))

    async def connected(self) -> None:
        """Wait until the device is online. Raises DeviceStopped."""
        assert self._stopped is not None, "not started"
        if self._up:
            return
        if self._online is None:
            self._online = asyncio.Event()
        online = self._loop.create_task(self._online.wait())
        either: set[asyncio.Future[Any]] = {online, self._stopped}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            online.cancel()
        if self._stopped.done():
            self._stopped.result()
            raise DeviceStopped("the device is closed")

    async def wait(self) -> None:
        """Until `close` (returns) or a final refusal (raises DeviceStopped)."""
        assert self._stopped is not None, "not started"
        await asyncio.shield(self._stopped)

    def finish(self) -> None:
        """Take no more pushes, let the one that is being handed over finish (at most CLOSE_GRACE), then say
        goodbye; `wait` returns then. For `on_push` and signal handlers."""
        self._closing = True
        if self._handing is None:
            self._say_goodbye()
        else:
            self._loop.call_later(CLOSE_GRACE, self._say_goodbye)

    async def close(self) -> None:
        """`finish`, and wait for it. Not to be called from `on_push`, for which it waits."""
        if self._stopped is None:
            return
        assert asyncio.current_task() is not self._handing, "on_push may call finish, not close"
        self.finish()
        if self._handing is not None:
            await asyncio.wait({self._handing}, timeout=CLOSE_GRACE)
        self._say_goodbye()
        for task in (self._opening, self._handing):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
        await self._approach.close()
        await self._close_journal()
        await self._wait_gone()

    async def _close_journal(self) -> None:
        if self._journal is None:
            return
        self._save()
        if self._writing:
            await asyncio.wait(self._writing)
        self._journal.close()
        self._journal = None

    async def _wait_gone(self) -> None:
        if self._leaving is None:
            return
        self._gone = asyncio.Event()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._gone.wait(), GOODBYE_LIMIT)
        if self._leaving is not None and self._leaving.transport is not None:
            self._leaving.transport.abort()

    def _say_goodbye(self) -> None:
        if self._session.phase is not Phase.OVER:
            self._perform(self._session.close(self._loop.time()))
        self._stop(None)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def registration_id(self) -> str:
        """ "" until the server has chosen one."""
        return self._session.client_id

    @property
    def online(self) -> bool:
        return self._session.phase is Phase.ONLINE

    @property
    def repeats(self) -> int:
        """Pushes that came again and were not handed over again."""
        return self._session.repeats

    # What the phone says

    def network_changed(self, link: str, network: str = "", carrier: str | None = None) -> None:
        """Call it whenever the system says so. `link`: wifi, cellular, ethernet, satellite, other; or "none" while
        there is no network. `network`: which one, in the app's words ("wifi:" and a hash of the BSSID); what is
        learned is kept for each. `carrier`: MCC and MNC ("46000"), or a name; None: as before. The connection of
        another network is given up at once."""
        self._away = link == "none"
        if self._away:
            return
        there = (link, network, self._carrier if carrier is None else carrier)
        if there != (self._link, self._network, self._carrier):
            if self._running:
                self._save()
                self._learn()
            self._link, self._network, self._carrier = there
            if self._running:
                self._enter()
        self._hurry()

    @property
    def _running(self) -> bool:
        return self._stopped is not None and not self._stopped.done()

    def app_state(self, state: AppState) -> None:
        """Whether somebody looks. Decides how long the device waits between attempts to connect (PACE), and whether
        it may learn how long it can be silent. Without a call it does not wait longer, and learns."""
        self._app_state = state
        self._session.foreground = state == "foreground"
        self._session.dozing = state == "doze"
        self._set_pace()
        if state == "foreground":
            self._hurry()

    def _set_pace(self) -> None:
        more_base, more_cap = PACE[self._app_state]
        hints, own = self._approach.hints, self._settings
        base = more_base * (own.backoff_base if hints.base is None else hints.base)
        cap = more_cap * (own.backoff_cap if hints.cap is None else hints.cap)
        if (base, cap) != (self._session.settings.backoff_base, self._session.settings.backoff_cap):
            self._session.settings = dataclasses.replace(
                self._session.settings, backoff_base=base, backoff_cap=cap
            )

    def _hurry(self) -> None:
        """Now is a better time than later: connect, or see whether the connection is still there."""
        if not self._running:
            return
        now = self._loop.time()
        self._session.hurry(now)
        self._perform(self._session.check(now))

    def _enter(self) -> None:
        """Go on with what is known of the network."""
        place = self._place
        kept, now = self._networks.get(place, {}), self._loop.time()
        silences = kept.get("heartbeat")
        self._perform(self._session.enter_network(silences, now, link=self._link, carrier=self._carrier))
        self._approach.enter(place, kept.get("addresses"), link=self._link, carrier=self._carrier)
        self._heed_dispatch()

    def _heed_dispatch(self) -> None:
        told = self._approach.told
        if told is not None:
            self._session.take_advice("{} {} {}".format(*told.heartbeat))
        self._session.alternatives = self._approach.alternatives
        self._set_pace()

    def _dispatch_answered(self) -> None:
        self._heed_dispatch()
        if self._journal is not None and self._dispatch is not None:
            self._write(self._journal.keep_value, DISPATCH, orjson.dumps(self._dispatch.state()))

    @property
    def _place(self) -> str:
        """What is learned is kept under it. A phone that does not say which network it is on learns one for each
        link."""
        return self._network or self._link

    def _learn(self) -> bool:
        """Put aside what is known of the network. Whether there is anything new."""
        silences = self._session.heartbeat_state(self._loop.time())
        before = self._networks.pop(self._place, {})
        learned = self._networks[self._place] = {"addresses": self._approach.state(), "heartbeat": silences}
        if len(self._networks) > NETWORKS_KEPT:
            del self._networks[next(iter(self._networks))]
        return _lasting(before) != _lasting(learned)

    def _save(self) -> None:
        if self._journal is not None and self._learn():
            self._write(self._journal.keep_network, self._place, self._networks[self._place])

    def _write(self, write: Callable[..., None], *what: object) -> None:
        """In a thread, for it waits for the disk. What a crash loses is learned again."""
        writing = self._loop.run_in_executor(None, write, *what)
        self._writing.append(writing)
        writing.add_done_callback(self._written)

    def _written(self, writing: asyncio.Future[None]) -> None:
        self._writing.remove(writing)
        if not writing.cancelled() and (error := writing.exception()) is not None:
            log.warning("%s; what was learned of the network is not kept", error)

    # Reports: each returns when the server has it for good, on this connection or a later one

    async def receipt(self, push: Push | int, event: Literal["shown", "clicked", "dismissed"]) -> None:
        """What a person did with a push. Raises DeviceError."""
        msg_id = push.msg_id if isinstance(push, Push) else push
        await self._report(RECEIPT_TOPIC, orjson.dumps({"msg_id": str(msg_id), "event": event}))

    async def event(self, name: str, payload: Any = None) -> None:
        """Something that happened in the app; `payload` is anything JSON has. Recorded at least once: an
        answer that was lost means a repetition. Raises DeviceError."""
        await self._report(EVENT_PREFIX + name, b"" if payload is None else orjson.dumps(payload))

    async def update(
        self,
        *,
        alias: str | None = None,
        tags: Iterable[str] | None = None,
        add_tags: Iterable[str] = (),
        remove_tags: Iterable[str] = (),
        mobile: str | None = None,
        platform: str | None = None,
        attributes: Mapping[str, str | float | bool | None] | None = None,
    ) -> None:
        """None leaves a value as it is, "" clears alias and mobile; `tags` replaces all of them. Of `attributes`
        (app_version, carrier, language, region, and the app's own) those that are named change; None removes one.
        Raises DeviceError."""
        add, remove = list(add_tags), list(remove_tags)
        if tags is not None and (add or remove):
            raise ValueError("give tags, or add_tags and remove_tags")
        change: dict[str, object] = {
            "alias": alias,
            "mobile": mobile,
            "platform": platform,
            "attributes": attributes,
        }
        if tags is not None:
            change["tags"] = list(tags)
        elif add or remove:
            change["tags"] = {"add": add, "remove": remove}
        wanted = {name: value for name, value in change.items() if value is not None}
        await self._report(DEVICE_TOPIC, orjson.dumps(wanted))

    async def _report(self, topic: str, payload: bytes) -> None:
        assert self._stopped is not None, "not started"
        if self._stopped.done():
            self._stopped.result()
            raise DeviceStopped("the device is closed")
        try:
            ticket, actions = self._session.publish(topic, payload, self._loop.time())
        except OutboxFull as error:
            raise DeviceError(str(error), Reason.QUOTA_EXCEEDED) from error
        answer = self._answers[ticket] = self._loop.create_future()
        self._perform(actions)
        await answer

    # From the event loop

    def _opened(self, socket: _Socket) -> None:
        assert socket.transport is not None
        if self._session.phase is not Phase.OPENING:  # dropped meanwhile
            socket.discard()
            return
        if socket.transport.is_closing():
            self._broke(silent=False)
            raise ConnectionResetError(f"{self._approach.at} was closed at once")
        self._socket = socket
        self._perform(self._session.opened(self._loop.time()))

    def _received(self, socket: _Socket, data: bytes) -> None:
        if socket is self._socket:
            self._perform(self._session.receive(data, self._loop.time()))

    def _lost(self, socket: _Socket, error: Exception | None) -> None:
        if socket is self._leaving:
            self._leaving = None
            if self._gone is not None:
                self._gone.set()
        elif socket is self._socket:
            self._socket = None
            why = "the connection was closed" if error is None else f"the connection broke: {error}"
            self._broke(silent=False)
            self._perform(self._session.lost(why, self._loop.time()))

    def _tick(self) -> None:
        self._timer = None
        now, approach = self._loop.time(), self._approach
        if approach.greet_by is not None and now >= approach.greet_by:
            why = f"{approach.at} was opened, and does not answer"
            self._broke(silent=True)
            self._perform(self._session.lost(why, now))
            return
        actions = self._session.tick(now)
        if any(isinstance(action, Offline) for action in actions):
            approach.gave_up()
            self._broke(silent=True)
        elif self._journal is not None and self.online:
            self._save()  # a process may end without a word
        self._perform(actions)

    def _broke(self, *, silent: bool) -> None:
        """Nobody said goodbye."""
        stable = self._loop.time() >= self._online_since + self._settings.stable_after
        self._approach.broke(greeted=self._up, stable=stable, silent=silent)

    def _set_timer(self) -> None:
        """Keep a timer that is not later than the deadline; moving it for each packet would cost more than
        one that finds nothing to do."""
        deadline = self._session.deadline
        if self._approach.greet_by is not None and deadline is not None:
            deadline = min(deadline, self._approach.greet_by)
        if deadline is None or (self._timer is not None and self._timer_at <= deadline):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at = self._loop.call_at(deadline, self._tick), deadline

    # Actions

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send():
                    assert self._socket is not None
                    assert self._socket.transport is not None
                    self._socket.transport.write(action.data)
                case Offer():
                    if not self._closing:
                        self._handing = self._loop.create_task(self._hand_over(action.push))
                case Answered():
                    self._answer(action)
                case Open():
                    self._opening = self._loop.create_task(self._open(action.address))
                case Drop():
                    self._drop()
                case Online():
                    self._went_online(action)
                case Offline():
                    self._went_offline()
                    log.info("offline: %s; next attempt in %.1f s", action.why, action.retry_in)
                case Discarded():
                    log.warning("discarded %s", action.text)
                case Refused():
                    self._refused(action)
                case _:
                    assert_never(action)
        self._set_timer()

    def _drop(self) -> None:
        socket, self._socket = self._socket, None
        self._approach.left()
        if socket is not None and socket.transport is not None:
            self._leaving = socket
            if socket.transport.get_write_buffer_size():
                socket.transport.abort()  # nobody reads: a polite close would wait for ever
            else:
                socket.transport.close()
        if self._opening is not None and self._opening is not asyncio.current_task():
            self._opening.cancel()

    def _went_online(self, action: Online) -> None:
        self._renewed = self._stale = False
        self._up = True
        if self._online is not None:
            self._online.set()
            self._online = None
        self._online_since = self._loop.time()
        self._tell_state(True)
        assert self._socket is not None
        assert self._socket.transport is not None
        peer = self._socket.transport.get_extra_info("peername")
        self._approach.greeted(peer[0] if peer else "")
        self._save()
        log.info("online as %s%s", self.registration_id, ", session resumed" if action.resumed else "")

    def _went_offline(self) -> None:
        if self._up:
            self._up = False
            self._tell_state(False)

    def _tell_state(self, online: bool) -> None:
        if self._on_state is not None:
            self._on_state(online)

    def _answer(self, answered: Answered) -> None:
        answer = self._answers.pop(answered.ticket)
        if answer.done():  # its caller gave up
            return
        if answered.refused:
            text = answered.text or answered.reason.name.lower().replace("_", " ")
            answer.set_exception(DeviceError(text, answered.reason, answered.code))
        else:
            answer.set_result(None)

    def _refused(self, action: Refused) -> None:
        """Bad credentials may be renewed, once in a row; everything else is final."""
        credentials = action.reason in (Reason.NOT_AUTHORIZED, Reason.BAD_USER_NAME_OR_PASSWORD)
        if credentials and self._renew is not None and self._credentials is not None and not self._renewed:
            self._stale = True
            self._perform(self._session.retry(f"renewing the token: {action.text}", self._loop.time()))
        else:
            self._stop(DeviceStopped(action.text, action.reason))

    def _stop(self, error: DeviceStopped | None) -> None:
        assert self._stopped is not None
        if self._stopped.done():
            return
        self._went_offline()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if error is None:
            self._stopped.set_result(None)
        else:
            log.error("stopped: %s", error)
            self._stopped.set_exception(error)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(
                    error or DeviceStopped("the device was closed before the server answered")
                )
        self._answers.clear()

    # Opening a connection

    async def _open(self, address: str | None) -> None:
        try:
            await self._obtain_credentials()
            await self._reach(address)
        except DeviceStopped as error:
            self._perform(self._session.close(self._loop.time()))
            self._stop(error)
        except (OSError, ValueError, JournalError) as error:
            self._perform(self._session.lost(f"could not connect: {error}", self._loop.time()))

    async def _reach(self, referred: str | None) -> None:
        if self._away:
            raise ConnectionError("there is no network")
        first = [] if referred is None else [self._read(server) for server in referred.split()]
        self._opened(await self._approach.open(first, self._connect))

    async def _connect(self, address: Address) -> _Socket:
        tls = self._tls
        if address.secret and tls is None:
            tls = self._tls = await asyncio.to_thread(ssl.create_default_context)
        return await connect(address, lambda: _Socket(self), tls if address.secret else None)

    def _read(self, text: str) -> Address:
        """A server of the app's, or that the server sent us to (MQTT5-4.11). Raises ValueError."""
        return Address.read(text, port=self._port, transport=self._transport)

    async def _obtain_credentials(self) -> None:
        known = self._credentials
        if known is None and self._device_key is not None and self._api is not None:
            self._keep(await self._register(self._api, self._device_key))
        elif known is not None and self._renew is not None and self._should_renew(known):
            await self._renew_credentials(self._renew, known)
        elif known is None and self._device_key is None:
            raise DeviceStopped("the journal holds no credentials yet: give token or device_key")
        if self._credentials is None:
            assert self._device_key is not None
            self._session.password = self._device_key.encode()
        else:
            self._session.client_id = self._credentials.registration_id
            self._session.password = self._credentials.token.encode()

    async def _renew_credentials(self, renew: Renew, known: Credentials) -> None:
        """Where only the API is out of reach, a token that is still good is used."""
        needed = self._stale or self._clock() >= known.expires_at
        try:
            async with asyncio.timeout(None if needed else RENEW_PATIENCE):
                fresh = await _ask(renew, known)
        except OSError as error:
            if needed:
                raise
            log.warning("the token could not be renewed yet: %s", error or "no answer in time")
            return
        self._keep(fresh)
        self._renewed = True

    def _should_renew(self, known: Credentials) -> bool:
        return self._stale or self._clock() > known.expires_at - RENEW_BEFORE

    def _keep(self, credentials: Credentials) -> None:
        self._credentials = credentials
        if self._journal is not None:
            self._journal.keep(credentials)

    async def _register(self, api: str, device_key: str) -> Credentials:
        from clients.enroll import register

        wanted = self._session.client_id or None
        return await register(api, self._app_key, device_key, wanted, **self._wishes)

    async def _renew_over_http(self, current: Credentials) -> Credentials:
        """While the token is good it is enough; after that the server may still register the id again."""
        from clients.enroll import renew

        assert self._api is not None
        assert self._device_key is not None
        if self._stale:
            return await self._register(self._api, self._device_key)
        return await renew(self._api, self._device_key, current)

    # Handing over a push

    async def _hand_over(self, push: Push) -> None:
        handled = await self._run_on_push(push) and await self._remember(push.msg_id)
        now = self._loop.time()
        self._handing = None
        self._perform(self._session.handled(now) if handled else self._session.failed(now))
        if self._closing:
            self._say_goodbye()

    async def _run_on_push(self, push: Push) -> bool:
        try:
            result = self._on_push(push)
            if inspect.isawaitable(result):
                await result
        except Exception:
            log.exception("on_push failed for %d; it comes again with the next connection", push.msg_id)
            return False
        return True

    async def _remember(self, msg_id: int) -> bool:
        """Durable when it returns True."""
        if self._journal is None:
            return True
        try:
            await asyncio.to_thread(self._journal.remember, msg_id)
        except JournalError as error:
            log.error("%s; push %d is not acknowledged and comes again", error, msg_id)
            return False
        return True


async def _ask(renew: Renew, known: Credentials) -> Credentials:
    try:
        return await renew(known)
    except (DeviceStopped, OSError):
        raise
    except Exception as error:
        log.exception("the renewal hook failed")
        raise OSError("the renewal hook failed") from error


def _lasting(learned: Mapping[str, Any]) -> object:
    """What is worth a write: the time until a probe is different each time."""
    return learned.get("addresses"), {**learned.get("heartbeat", {}), "probe_in": 0}


def _retrieve(stopped: asyncio.Future[None]) -> None:
    """Whoever does not wait for the end is told by the log; asyncio need not complain as well."""
    if not stopped.cancelled():
        stopped.exception()
