"""One app on this node: its live devices, its broadcast log, its topics. Decides what each session is sent next.

No I/O here: methods take sessions and *now* and return byte strings; `fanout.py` and `node.py` write them.

Theory. The broadcast log holds the app's live broadcasts in msg_id order; a *position* counts from the node's
start and never comes back. `Session.cursor` is the position of the first broadcast not yet considered for it, so
"what is this device owed?" is a walk from the cursor over `targets` and `settled` bitmaps. Inbox rows and
broadcasts are merged by msg_id (G3): a broadcast is sent only when no older inbox row can still turn up, and a
page of inbox rows comes here only when every broadcast older than its last row is in the log (`fetcher.py`).

A device whose carrier wants the urgent first is sent its *backlog* otherwise (`Session.urgent`): what is owed when it
connects, and what comes until that is through, goes out with high priority first, then the newest first. Rows and
broadcasts stand in `Session.inbox` then, as many as one page brings, the most urgent at the end; a push that takes
the place of another still goes behind it. After the backlog order holds as for everybody.

The bitmaps know what happened on this node, and what the store knew when it was last asked. A device that may have
been elsewhere since is *unsure*: the store is asked again before it is sent a broadcast (`sweeper.py`).
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from math import ceil
from sys import getsizeof
from typing import TYPE_CHECKING, Final, NamedTuple

from msgspec.structs import replace
from pyroaring import BitMap

from broker.metrics import Counter
from broker.model import App, StoredBroadcast, Withdrawn
from broker.tenants.access import Access
from gateway.live import Encoding, Flight, LivePush
from gateway.mailbox import Mailbox
from gateway.session import MAX_PACKET_ID, Comeback, Inbox, Member, Session
from gateway.topics import RetainedMessages, SubscriptionIndex
from gateway.wheel import Clock

if TYPE_CHECKING:
    from gateway.wills import DelayedWill

RECALL_MEMORY: Final = (
    60.0  # seconds: a page of inbox rows may have been read before a recall, and come after it
)
FLEETING: Final = (
    5.0  # seconds in which a broadcast without time to live is sent to those who were online for it
)
SPREADING: Final = (
    60.0  # seconds in which a broadcast may have rung and not be among the store's live ones yet
)
TAKEN_MEMORY: Final = 60.0  # seconds: a claim of ours may be answered after we heard of a newer one
SPARSE: Final = 256  # bytes of a dict for each of its items: far more than one that only grew has (30 to 110)
FEW: Final = 64  # items for which no dict is made anew
MAX_UINT32: Final = 0xFFFF_FFFF
ROWS: Final = 32  # of one inbox in one read: what a connected device may hold in RAM beyond its window
BACKLOG: Final = 128  # the same for a device that is sent the urgent first: what is sorted at once
FLIGHTS_KEPT: Final = 1024  # of one walk; more packet ids than this share nothing
PAGE: Final = 64  # devnos
MAX_PAGES: Final = (
    131_072  # of one app, 60 MB; past it the oldest are forgotten, and their sessions begin anew
)


class Walk:
    """A broadcast on its way through the devices that were online when it came."""

    __slots__ = ("_devnos", "_flights", "last", "left", "position", "push", "todo")

    def __init__(self, push: LivePush, position: int, devnos: BitMap) -> None:
        self.push = push
        self.position = position
        self.todo: Iterator[int] = iter(devnos)
        self.left = len(devnos)
        self.last = -1  # the greatest devno that it came to
        self._devnos = devnos
        self._flights: dict[tuple[Encoding, int, tuple[LivePush, ...]], Flight] = {}

    def flight(self, session: Session, pushes: tuple[LivePush, ...]) -> Flight | None:
        """These, for a session at rest; None: they do not go into its window, or not under ids in a row."""
        if len(pushes) > session.window:
            return None
        key = session.encoding, session.next_id, pushes
        flight = self._flights.get(key)
        if flight is None and session.next_id + len(pushes) <= MAX_PACKET_ID:
            if len(self._flights) >= FLIGHTS_KEPT:
                self._flights.clear()
            flight = self._flights[key] = Flight(pushes, session.encoding, session.next_id)
        return flight

    def leave_out(self, devnos: BitMap) -> None:
        self._devnos = self._devnos - devnos
        self.todo = self._devnos.iter_equal_or_larger(self.last + 1)
        self.left = len(self._devnos) - (self._devnos.rank(self.last) if self.last >= 0 else 0)


class SessionEnds:
    """Until when the sessions of absent devices live: four bytes for each devno, in pages that are there once one of
    their devices left; a dict would take a hundred for each device. Of an app with a hundred million devices a node
    knows few. Whole seconds, rounded up."""

    __slots__ = ("_pages", "_start", "latest")

    def __init__(self) -> None:
        self._start = 0.0  # when the first one was noted; monotonic, as all times here
        self._pages: dict[int, array[int]] = {}  # seconds after the start; 0: no session
        self.latest = 0.0

    def note(self, devno: int, now: float, expiry: int) -> None:
        """The device left, and its session lives `expiry` seconds more."""
        self._start = self._start or now
        page = self._pages.get(devno // PAGE)
        if page is None:
            if len(self._pages) >= MAX_PAGES:
                del self._pages[next(iter(self._pages))]
            page = self._pages[devno // PAGE] = array("I", bytes(4 * PAGE))
        page[devno % PAGE] = min(ceil(now - self._start) + expiry, MAX_UINT32)
        self.latest = max(self.latest, now + expiry + 1)

    def take(self, devno: int, now: float) -> bool:
        """The device is back: whether its session is still there."""
        page = self._pages.get(devno // PAGE)
        if page is None:
            return False
        end, page[devno % PAGE] = page[devno % PAGE], 0
        return end > 0 and now - self._start < end  # `now` may be a tick older than the start


class Ending(enum.Enum):
    """How the connection of a device ended."""

    ORDERLY = enum.auto()  # or it is not known
    WORDLESS = enum.auto()  # without DISCONNECT or close: what is on its way to it may be lost again
    OVERDUE = enum.auto()  # likewise, and an acknowledgement did not come in time


class Endings:
    """Of devices that are away, and whose last connection here did not end in order. Bitmaps: a byte or two each."""

    __slots__ = ("_overdue", "_wordless")

    def __init__(self) -> None:
        self._wordless = BitMap()
        self._overdue = BitMap()

    def note(self, devno: int, ending: Ending) -> None:
        if ending is not Ending.ORDERLY:
            self._wordless.add(devno)
        if ending is Ending.OVERDUE:
            self._overdue.add(devno)

    def take(self, devno: int) -> Ending:
        """The device is back, here or elsewhere."""
        if devno not in self._wordless:
            return Ending.ORDERLY
        self._wordless.discard(devno)
        if devno not in self._overdue:
            return Ending.WORDLESS
        self._overdue.discard(devno)
        return Ending.OVERDUE


class Resend(NamedTuple):
    """The pushes in flight when a connection ended."""

    packet_ids: dict[int, int]  # by msg_id
    expires_at: float  # with its session, monotonic


class Ordinary(enum.Enum):
    """Where the app's ordinary topics are (decision 0022)."""

    HERE = enum.auto()  # this node is their home
    AWAY = enum.auto()  # another one is: who connects is carried there
    NONE = enum.auto()  # nobody may use any


class Hub:
    __slots__ = (
        "_base",
        "_last_message",
        "_last_session",
        "_log",
        "_positions",
        "_too_large",
        "access",
        "app",
        "endings",
        "last_broadcast",
        "mailboxes",
        "members",
        "online",
        "ordinary",
        "others",
        "recalled",
        "resend",
        "retained",
        "session_ends",
        "subscriptions",
        "taken",
        "touched",
        "wills",
    )

    def __init__(self, app: App, *, max_retained: int, max_retained_bytes: int, too_large: Counter) -> None:
        self.app = app
        self.access = Access(app)
        self._too_large = too_large  # pushes over a device's Maximum Packet Size
        self.members: dict[int, Member] = {}  # devno -> its one live connection (G5)
        self.online = BitMap()  # the same devnos
        self.touched = 0.0  # when the last CONNECT came, monotonic
        self.others: dict[str, Member] = {}  # session key -> connection of a publisher, or of a guest
        self._log: list[LivePush | None] = []  # None: over; leading ones are cut off
        self._base = 0  # position of _log[0]
        self._positions: dict[int, int] = {}  # by msg_id, of those in the log
        self.last_broadcast = 0  # msg_id; a doorbell may ring twice
        self.recalled: dict[int, tuple[BitMap, float]] = {}  # msg_id -> for whom; until when it is remembered
        self.taken: dict[
            int, tuple[int, float]
        ] = {}  # devno -> epoch of another node's claim; until when, likewise
        self.ordinary = Ordinary.HERE
        self.subscriptions = SubscriptionIndex()
        self.retained = RetainedMessages(max_retained, max_retained_bytes)
        self.mailboxes: dict[str, Mailbox] = {}  # session key -> what absent clients left
        self.resend: dict[int, Resend] = {}  # devno -> what was in flight, likewise
        self.wills: dict[str, DelayedWill] = {}  # of such sessions
        self._last_session = 0  # numbers of durable sessions, and of messages and copies that wait for them
        self._last_message = 0
        self.session_ends = SessionEnds()
        self.endings = Endings()

    # The broadcast log

    @property
    def end(self) -> int:
        """The position the next broadcast will have."""
        return self._base + len(self._log)

    def add_broadcast(self, row: StoredBroadcast) -> tuple[LivePush, int] | None:
        """Append a row and return it with its position; None if it is known already."""
        if row.message.msg_id <= self.last_broadcast:
            return None
        self.last_broadcast = row.message.msg_id
        if row.message.expires_at <= row.message.created_at:
            row = self._for_those_online(row)
        push = LivePush(row.message, row)
        self._positions[push.msg_id] = self.end
        self._log.append(push)
        return push, self.end - 1

    def _for_those_online(self, row: StoredBroadcast) -> StoredBroadcast:
        """No time to live: it goes through the log for a moment all the same, so that it keeps its place among
        the others (G3)."""
        message = replace(row.message, expires_at=row.message.created_at + FLEETING)
        return StoredBroadcast(message, row.targets & self.online, row.settled)

    def broadcasts(self) -> Iterator[LivePush]:
        return (push for push in self._log if push is not None)

    def recall(self, gone: Withdrawn, now: float) -> LivePush | None:
        """A push is owed to these devices no longer. Returns it if it is in the broadcast log; `now` is monotonic."""
        broadcast = self._find_broadcast(gone.msg_id)
        if broadcast is not None:
            assert broadcast.settled is not None
            broadcast.settled |= gone.devnos
        elif gone.devnos:
            self._recall_rows(gone, now)
        return broadcast

    def _recall_rows(self, gone: Withdrawn, now: float) -> None:
        """Inbox rows: of pages that are here, and of those on their way."""
        known = self.recalled.get(gone.msg_id)
        devnos = gone.devnos | known[0] if known else gone.devnos
        self.recalled[gone.msg_id] = (devnos, now + RECALL_MEMORY)
        for devno in gone.devnos & self.online:
            session = self.members[devno].session
            if session is not None and session.inbox:
                session.inbox = [push for push in session.inbox if push.msg_id != gone.msg_id] or None

    def _find_broadcast(self, msg_id: int) -> LivePush | None:
        position = self._positions.get(msg_id)
        return None if position is None else self._log[position - self._base]

    def _is_recalled(self, push: LivePush, devno: int) -> bool:
        known = self.recalled.get(push.msg_id)
        return known is not None and devno in known[0]

    def forget(self, now: float) -> None:
        """What was remembered for a while; `now` is monotonic."""
        if self.recalled:
            self.recalled = {i: known for i, known in self.recalled.items() if known[1] > now}
        if self.taken:
            self.taken = {devno: known for devno, known in self.taken.items() if known[1] > now}
        if getsizeof(self.members) > SPARSE * (len(self.members) + FEW):
            self.members = dict(self.members)  # by itself a dict keeps the size it once had

    def note_taken(self, devno: int, epoch: int, now: float) -> None:
        """Another node has claimed the device."""
        known = self.taken.get(devno, (0, 0.0))[0]
        self.taken[devno] = max(epoch, known), now + TAKEN_MEMORY
        self.resend.pop(devno, None)  # packet ids of a connection that is not its last one
        self.session_ends.take(devno, now)
        self.endings.take(devno)

    def is_overtaken(self, devno: int, epoch: int) -> bool:
        """Whether the claim with this epoch is not the newest that we know of."""
        member = self.members.get(devno)
        known = self.taken.get(devno)
        return (member is not None and member.epoch > epoch) or (known is not None and known[0] > epoch)

    def merge(self, rows: Iterable[StoredBroadcast], now: float) -> None:
        """`rows`: the app's live broadcasts, as the store has them; what they say of those in the log. `now` in Unix
        seconds."""
        found = {row.message.msg_id: row.settled for row in rows}
        newest = max(found, default=0)
        for push in self.broadcasts():
            assert push.settled is not None
            assert push.targets is not None
            settled = found.get(push.msg_id)
            if settled is not None:
                push.settled |= settled
            elif not _is_fleeting(push) and (
                push.msg_id < newest or now > push.message.created_at + SPREADING
            ):
                push.settled |= push.targets  # nobody is owed it any more

    def unsettle(self, msg_id: int, devnos: BitMap) -> None:
        """What these acknowledged of a broadcast does not count."""
        push = self._find_broadcast(msg_id)
        if push is not None:
            assert push.settled is not None
            push.settled -= devnos

    def drop_finished(self, now: float, unrecorded: Collection[tuple[int, int]] = ()) -> None:
        """Forget broadcasts that expired or that every target has; `unrecorded` (app_id, msg_id) stay, for what was
        acknowledged may turn out not to count (`unsettle`)."""
        for i, push in enumerate(self._log):
            if push is None:
                continue
            assert push.targets is not None
            assert push.settled is not None
            finished = len(push.targets) == len(push.settled)
            if finished and (self.app.app_id, push.msg_id) in unrecorded:
                finished = False
            if finished or push.message.expires_at <= now:
                self._log[i] = None
                del self._positions[push.msg_id]
        keep = next((i for i, push in enumerate(self._log) if push is not None), len(self._log))
        del self._log[:keep]
        self._base += keep

    def walk(self, push: LivePush, position: int) -> Walk:
        assert push.targets is not None
        devnos = push.targets & self.online
        return Walk(push, position, devnos - push.settled if push.settled else devnos)

    # What a session is owed

    def owed_broadcasts(self, session: Session, wall: float) -> tuple[LivePush, ...]:
        """All from its cursor on, for a session that owes no older inbox row; in msg_id order."""
        devno, sent = session.devno, session.sent
        return tuple(
            [
                push
                for push in self._log[max(session.cursor - self._base, 0) :]
                if push is not None
                and push.owed_to(devno)
                and push.message.msg_id > sent
                and push.message.expires_at > wall
            ]
        )

    def start(self, session: Session, *, may_owe: bool, elsewhere: bool = False) -> list[LivePush]:
        """A device connected: everything owed is to be looked at from the beginning. Applies the newest-N rule to
        broadcasts and returns those it dropped for this device (its devno added to their `evicted`). `elsewhere`: it
        may have been on another node."""
        session.cursor = self._base
        session.fetch = Inbox.WANTED if may_owe else Inbox.EMPTY
        if not self._log:
            return []
        if elsewhere and any(push.owed_to(session.devno) for push in self.broadcasts()):
            session.unsure = True
            session.fetch = Inbox.WANTED  # with its page, it waits until the store was asked
            return []
        return self.apply_newest_n(session)

    def apply_newest_n(self, session: Session) -> list[LivePush]:
        """To the broadcasts that the device is owed; see `start`."""
        owed = [push for push in self.broadcasts() if push.owed_to(session.devno)]
        if len(owed) > self.app.offline_limit:  # what it acknowledged a moment ago is not folded yet
            owed = [push for push in owed if session.devno not in push.acked]
        dropped = owed[: max(0, len(owed) - self.app.offline_limit)]
        for push in dropped:
            assert push.settled is not None
            push.evicted.append(session.devno)
            push.settled.add(session.devno)
        return dropped

    def collect(self, session: Session, clock: Clock) -> list[bytes]:
        """Packets of the pushes the device is owed and has room for, in msg_id order, or by urgency."""
        comeback = session.comeback
        if session.cursor == self.end and session.inbox is None and comeback is None:  # nothing
            session.behind = session.room == 0
            return []
        frames: list[bytes] = []
        if comeback is not None:
            session.widen(comeback)
        room = session.room
        while room > 0 and (push := self._next(session)) is not None:
            if push.message.expires_at <= clock.wall or not self.fits(session, push):
                continue  # stays undelivered, and expires
            if self.recalled and self._is_recalled(push, session.devno):
                continue
            frames.append(session.send_push(push, clock.now))
            room -= 1
        session.behind = room == 0
        if comeback is not None:
            session.begin_round(comeback)
        return frames

    def _next(self, session: Session) -> LivePush | None:
        """The oldest push owed, taken off; None if there is none or an older one may still be fetched."""
        if session.comeback is not None and session.comeback.urgent:
            return self._next_urgent(session, session.comeback)
        broadcast = self._next_broadcast(session)
        inbox = session.inbox
        if inbox:
            if broadcast is None or inbox[-1].msg_id < broadcast.msg_id:
                push = inbox.pop()
                if not inbox:
                    session.inbox = None
                return push
        elif session.fetch is not Inbox.EMPTY:
            return None
        if broadcast is not None:
            session.cursor += 1
        return broadcast

    def _next_broadcast(self, session: Session) -> LivePush | None:
        """The first broadcast owed at or after the cursor, which is left standing on it. One that came into the
        log after newer pushes were sent (a doorbell rang again, or late) is for the next connection (G3)."""
        log, base = self._log, self._base
        index = max(session.cursor - base, 0)
        while index < len(log):
            push = log[index]
            if push is not None and push.msg_id > session.sent and push.owed_to(session.devno):
                session.cursor = base + index
                return push
            index += 1
        session.cursor = base + index
        return None

    def _next_urgent(self, session: Session, comeback: Comeback) -> LivePush | None:
        """The most urgent push owed, taken off; None if there is none or rows are still to be fetched."""
        comeback.newest = max(comeback.newest, session.sent)
        if session.inbox is None and session.fetch is not Inbox.EMPTY:
            return None
        if session.cursor < self.end:
            self._take_up(session, comeback, ())
        while session.inbox:
            push = session.inbox.pop()
            if not session.inbox:
                session.inbox = None
            if not push.broadcast or push.owed_to(session.devno):  # it may have been recalled meanwhile
                return push
        if session.fetch is Inbox.EMPTY:
            session.backlog_through(comeback)
        return None

    def _take_up(self, session: Session, comeback: Comeback, rows: Iterable[LivePush]) -> None:
        """Put these rows, and the broadcasts that came since, into the backlog."""
        came = list(rows)
        while (broadcast := self._next_broadcast(session)) is not None:
            session.cursor += 1
            came.append(broadcast)
        if came:
            session.inbox = by_urgency([*(session.inbox or ()), *came])
            comeback.newest = max(comeback.newest, *map(_msg_id, came))

    def offer(self, session: Session, push: LivePush, clock: Clock) -> list[bytes]:
        """A targeted push arrived for a live device: what to send it, older broadcasts first. When it cannot go
        now it is left in the store."""
        if push.msg_id <= session.newest or self._is_over(push, session.devno, clock):
            return []  # the doorbell rang twice, or late, or the fetch was faster
        if session.fetch is not Inbox.EMPTY or session.behind:
            self._leave_waiting(session, push)
            return []
        frames = self.collect(session, clock)
        if push.msg_id < session.sent:
            return frames  # an old doorbell rang again, and newer broadcasts have gone out
        if session.behind or not session.room:
            session.behind = True
            self._leave_waiting(session, push)
            return frames
        session.seen = push.msg_id
        if self.fits(session, push):
            push.sent_at = max(clock.wall, push.message.created_at)  # the clock may be a tick old
            frames.append(session.send_push(push, clock.now))
        return frames

    def _leave_waiting(self, session: Session, push: LivePush) -> None:
        """In the store; or in the backlog, where it may be more urgent than the others."""
        comeback = session.comeback
        if (
            comeback is not None
            and comeback.urgent
            and session.fetch is Inbox.EMPTY
            and len(session.inbox or ()) < BACKLOG
        ):
            session.seen = push.msg_id
            self._take_up(session, comeback, (push,))
        else:
            self.note_rows(session)

    def _is_over(self, push: LivePush, devno: int, clock: Clock) -> bool:
        """A doorbell may ring again long after its push was."""
        message = push.message
        if clock.wall > max(message.expires_at, message.created_at + FLEETING):
            return True
        return bool(self.recalled) and self._is_recalled(push, devno)

    def fits(self, session: Session, push: LivePush) -> bool:
        """Whether the device accepts a packet of this size; counts those it does not."""
        frames = push.frames(session.encoding)
        fits = not session.manners.choosy or session.accepts(frames)
        self._too_large.value += not fits
        return fits

    @staticmethod
    def note_rows(session: Session) -> None:
        """There are inbox rows the session has not seen."""
        session.fetch = Inbox.FETCHING_STALE if session.fetch >= Inbox.FETCHING else Inbox.WANTED

    @staticmethod
    def wants_fetch(session: Session) -> bool:
        return session.fetch is Inbox.WANTED and not session.inbox and session.room > 0

    @staticmethod
    def page_size(session: Session) -> int:
        """How many inbox rows are to be fetched at once."""
        return BACKLOG if session.urgent else ROWS

    def fetched(self, session: Session, page: Sequence[LivePush], *, more: bool) -> None:
        """A page of inbox rows came, oldest first; `more` if it was full."""
        comeback = session.comeback
        if comeback is not None and comeback.urgent:
            self._take_up(session, comeback, page)
        elif page:
            session.inbox = list(reversed(page))
        if page:
            session.seen = page[-1].msg_id
        stale = session.fetch is Inbox.FETCHING_STALE
        session.fetch = Inbox.WANTED if more or stale else Inbox.EMPTY

    @staticmethod
    def look_again(session: Session, *, owing: bool) -> bool:
        """A doorbell may have been lost. A page that is here may be of pushes that were recalled. Whether the session
        is to catch up, at once or when there is room. A backlog by urgency stays as it is: what of it went out cannot
        be told by a msg_id."""
        if session.inbox and not session.urgent:
            session.inbox, session.seen = None, session.sent
            session.fetch = Inbox.WANTED
        elif owing:
            Hub.note_rows(session)
        return session.fetch is Inbox.WANTED

    def idle(self, now: float) -> bool:
        """Nothing here that could not be loaded again."""
        kept = (self.members, self.others, self.mailboxes, self.resend, self.wills)
        return not any(kept) and now > self.session_ends.latest

    def change_app(self, app: App) -> None:
        """The operator changed it."""
        self.app = app
        self.access = Access(app)

    # Ordinary sessions

    def new_session_number(self) -> int:
        self._last_session += 1
        return self._last_session

    def new_message_number(self) -> int:
        self._last_message += 1
        return self._last_message

    def numbers_used(self, session: int, message: int = 0) -> None:
        """The store holds some up to these."""
        self._last_session = max(self._last_session, session)
        self._last_message = max(self._last_message, message)

    def drop_sessions(self, now: float) -> list[Mailbox]:
        """Forget sessions that expired while their client was away; returns their mailboxes."""
        for devno in [devno for devno, resend in self.resend.items() if resend.expires_at <= now]:
            del self.resend[devno]
        expired = [
            key
            for key, mailbox in self.mailboxes.items()
            if mailbox.expires_at is not None and mailbox.expires_at <= now
        ]
        return [self.mailboxes.pop(key) for key in expired]

    def sessions(self) -> Iterator[Mailbox]:
        """Mailboxes of all sessions, live and kept."""
        live = (member.session.mailbox for member in self.everyone() if member.session is not None)
        yield from (mailbox for mailbox in live if mailbox is not None)
        yield from self.mailboxes.values()

    def everyone(self) -> list[Member]:
        """All live connections of the app."""
        return [*self.members.values(), *self.others.values()]


def _is_fleeting(push: LivePush) -> bool:
    return push.message.expires_at <= push.message.created_at + FLEETING


def by_urgency(pushes: Iterable[LivePush]) -> list[LivePush]:
    """The most urgent at the end: high priority, then the newest. A push and those that take its place go together
    and in their order, as urgent as the most urgent of them: or else what was taken away would show again."""
    firsts: dict[int, int] = {}  # public id -> that of the first in its row of replacements
    keys: dict[int, tuple[bool, int]] = {}  # by that
    rows: dict[LivePush, int] = {}
    for push in sorted(pushes, key=_msg_id):
        message = push.message
        replaces = message.replaces or message.public_id
        first = firsts[message.public_id] = rows[push] = firsts.get(replaces, replaces)
        keys[first] = keys.get(first, (False, 0))[0] or message.high, push.msg_id
    return sorted(rows, key=lambda push: (keys[rows[push]], -push.msg_id))


def _msg_id(push: LivePush) -> int:
    return push.msg_id
