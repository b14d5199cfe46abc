"""Messages as the writer thread appends them; events, retained messages, and the items of durable sessions.

Appends that wait together are a few statements. Those that depend on what is there (record changes, `replaces`, a
collapse key) go one by one: each sees what those before it did. Ids always grow in the order of the calls, for that
is the order in which their doorbells ring.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec
from pyroaring import BitMap

from broker.bitmaps import encode_bits
from broker.model import (
    Appended,
    BehaviourEvent,
    NewMessage,
    RecordChange,
    Retained,
    SessionItem,
    Withdrawn,
)
from broker.sqlite.callbacks import CallbackWrites
from broker.sqlite.engine import Row, delete_rows, read_rows, write_rows
from broker.sqlite.inbox import InboxWrites
from broker.sqlite.records import RecordWrites
from broker.sqlite.routes import AppStates
from broker.sqlite.settling import SettleWrites
from broker.sqlite.threads import Handler
from broker.store import StoreError, UnknownMessage

ID_EPOCH: Final = 1_704_067_200.0  # 2024-01-01: 41 bits of milliseconds reach to 2093
# 4096 ids a millisecond: more than a store accepts, and more only run ahead of the clock. An id stays below 2**53,
# which is as far as JavaScript, and every reader that makes JSON numbers into doubles, can count.
ID_COUNTER_BITS: Final = 12


class Ids:
    """Message and event ids: milliseconds, then a counter. They grow, also when the clock steps back."""

    def __init__(self, greatest: int, clock: Callable[[], float]) -> None:
        self.greatest = greatest
        self._clock = clock

    def next(self, count: int) -> range:
        first = max(self.greatest + 1, first_id(self._clock()))
        self.greatest = first + count - 1
        return range(first, first + count)


def first_id(at: float) -> int:
    """The least id that can be given out at this time."""
    return max(0, int((at - ID_EPOCH) * 1000)) << ID_COUNTER_BITS


PLAIN_COLUMNS: Final = "msg_id, app, broadcast, body, created_at, expires_at, sendno, target, online"
SPECIAL_COLUMNS: Final = "suppressed, high, collapse, replaces, part_of, paced, callback"


def _is_plain(message: NewMessage) -> bool:
    """Nearly all are, and half the columns are half the time."""
    return not (
        message.high
        or message.collapse
        or message.replaces
        or message.part_of
        or message.paced
        or message.callback
        or message.suppressed
    )


def _special_columns(message: NewMessage) -> Row:
    return (
        encode_bits(message.suppressed) if message.suppressed else None,
        message.high,
        message.collapse or None,
        message.replaces or None,
        message.part_of or None,
        message.paced,
        None if message.callback is None else msgspec.json.encode(message.callback).decode(),
    )


class Append(NamedTuple):
    """One call."""

    messages: Sequence[NewMessage]
    inboxes: Mapping[int, BitMap]  # by app: for whom something waits
    changes: Sequence[RecordChange]
    depends: bool  # it must see what the appends before it did


Entry = tuple[int, NewMessage]


class MessageWrites:
    """The handlers for what is appended."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        ids: Ids,
        clock: Callable[[], float],
        cid_lifetime: float,
        states: AppStates,
        inbox: InboxWrites,
        settling: SettleWrites,
        records: RecordWrites,
        callbacks: CallbackWrites,
    ) -> None:
        self._connection = connection
        self._ids = ids
        self._clock = clock
        self._cid_lifetime = cid_lifetime
        self._states = states
        self._inbox = inbox
        self._settling = settling
        self._records = records
        self._callbacks = callbacks
        self.handlers: dict[str, Handler] = {
            "append": self._append,
            "events": self._events,
            "retain": self._retain,
            "session_items": self._save_session_items,
        }

    # Appending

    def _append(self, calls: list[Append]) -> list[list[Appended] | StoreError]:
        answers: list[list[Appended] | StoreError] = []
        for depends, run in itertools.groupby(calls, key=lambda call: call.depends):
            if depends:
                answers += map(self._append_alone, run)
            else:
                answers += self._append_together(list(run))
        self._evict()
        return answers

    def _append_together(self, calls: Sequence[Append]) -> list[list[Appended]]:
        ids = iter(self._ids.next(sum(len(call.messages) for call in calls)))
        lists = [[(next(ids), message) for message in call.messages] for call in calls]
        owners = self._claim_cids([entry for entries in lists for entry in entries])
        fresh: list[Entry] = []
        answers = [self._answer(entries, owners, fresh) for entries in lists]
        self._store(fresh)
        return answers

    @staticmethod
    def _answer(
        entries: Sequence[Entry], owners: Mapping[tuple[int, str | None], Appended], fresh: list[Entry]
    ) -> list[Appended]:
        """And those of them that are to be stored, into `fresh`."""
        answer: list[Appended] = []
        for msg_id, message in entries:
            owner = owners.get((message.app_id, message.cid)) if owners else None
            if owner is None or owner.msg_id == msg_id:
                fresh.append((msg_id, message))
                answer.append(Appended(msg_id, False, message.sendno))
            else:
                answer.append(owner)
        return answer

    def _append_alone(self, call: Append) -> list[Appended] | StoreError:
        wrong = self._records.check(call.changes) or self._unknown(call.messages)
        if wrong is not None:
            return wrong
        (answer,) = self._append_together([call])
        once = not any(appended.repeated for appended in answer)
        changes = [
            change for change in call.changes if (once if change.key else not answer[change.message].repeated)
        ]
        self._records.make(changes, [appended.msg_id for appended in answer])
        return [
            appended if appended.repeated else msgspec.structs.replace(appended, withdrawn=tuple(taken))
            for appended, taken in zip(answer, self._take_place(call.messages, answer), strict=True)
        ]

    def _unknown(self, messages: Sequence[NewMessage]) -> UnknownMessage | None:
        for message in messages:
            if message.replaces and not self._exists(message.app_id, message.replaces):
                return UnknownMessage(str(message.replaces))
        return None

    def _exists(self, app_id: int, msg_id: int) -> bool:
        return (
            self._connection.execute(
                "SELECT 1 FROM messages WHERE msg_id = ? AND app = ?", (msg_id, app_id)
            ).fetchone()
            is not None
        )

    def _take_place(
        self, messages: Sequence[NewMessage], answer: Sequence[Appended]
    ) -> list[list[Withdrawn]]:
        """What waits no longer because of each message."""
        now, settling = self._clock(), self._settling
        taken: list[list[Withdrawn]] = []
        for message, appended in zip(messages, answer, strict=True):
            gone: list[Withdrawn] = []
            taken.append(gone)
            if appended.repeated:
                continue
            if message.replaces and not message.paced:  # its parts do
                public_id = message.part_of or appended.msg_id
                gone += settling.replace(message.app_id, message.replaces, public_id, now, message.targets)
            if message.collapse:
                age = message.part_of or appended.msg_id
                gone += settling.collapse(
                    message.app_id, message.collapse, age, appended.msg_id, message.targets, now
                )
        return taken

    def _claim_cids(
        self, entries: Sequence[tuple[int, NewMessage]]
    ) -> dict[tuple[int, str | None], Appended]:
        """Who owns each cid: the first of this group, or a message of before. Empty: each message its own."""
        named = [entry for entry in entries if entry[1].cid is not None]
        if not named:
            return {}
        now = self._clock()
        expires_at = now + self._cid_lifetime
        firsts: dict[tuple[int, str | None], int] = {}
        for msg_id, message in named:
            firsts.setdefault((message.app_id, message.cid), msg_id)
        claimed = write_rows(
            self._connection,
            "INSERT INTO cids (app, cid, msg_id, expires_at) {values} ON CONFLICT (app, cid) DO UPDATE"
            " SET msg_id = excluded.msg_id, expires_at = excluded.expires_at WHERE cids.expires_at <= ?",
            [(app, cid, msg_id, expires_at) for (app, cid), msg_id in firsts.items()],
            (now,),
        )
        if claimed == len(named):
            return {}
        owners = {
            (message.app_id, message.cid): Appended(msg_id, True, message.sendno)
            for msg_id, message in reversed(named)
        }
        return owners | self._earlier_owners(list(owners))

    def _earlier_owners(self, keys: list[tuple[int, str | None]]) -> dict[tuple[int, str | None], Appended]:
        rows = read_rows(
            self._connection,
            "SELECT c.app, c.cid, c.msg_id, m.sendno FROM ({values}) v"
            " CROSS JOIN cids c ON c.app = v.column1 AND c.cid = v.column2"
            " JOIN messages m ON m.msg_id = c.msg_id",  # those of this group are not there yet
            keys,
        )
        return {(app, cid): Appended(msg_id, True, sendno) for app, cid, msg_id, sendno in rows}

    def _store(self, entries: Sequence[Entry]) -> None:
        plain: list[Row] = []
        special: list[Row] = []
        fresh: list[Row] = []
        waiting: dict[bool, list[Row]] = {True: [], False: []}  # by: does it evict?
        told: list[Entry] = []  # with a callback
        for msg_id, message in entries:
            targets, app = message.targets, message.app_id
            lasting = message.expires_at > message.created_at and not message.paced
            waits = lasting and not message.broadcast
            single = not message.broadcast and len(targets) == 1
            is_plain = _is_plain(message)
            row = self._columns(msg_id, message, single, lasting)
            if is_plain:
                plain.append(row)
            else:
                special.append((*row, *_special_columns(message)))
                if message.callback is not None:
                    told.append((msg_id, message))
            if waits and single and is_plain and message.evicts:  # nearly all
                fresh.append((app, targets.min(), msg_id))
            elif waits:
                waiting[message.evicts].extend([(app, devno, msg_id) for devno in targets])
        write_rows(self._connection, f"INSERT INTO messages ({PLAIN_COLUMNS}) {{values}}", plain)
        write_rows(
            self._connection,
            f"INSERT INTO messages ({PLAIN_COLUMNS}, {SPECIAL_COLUMNS}) {{values}}",
            special,
        )
        if entries:
            self._inbox.stored(len(entries), entries[-1][0])
        self._inbox.put_fresh(fresh)
        for evicts, rows in waiting.items():
            self._inbox.put(rows, evicts=evicts)
        self._note_suppressed(told)

    def _columns(self, msg_id: int, message: NewMessage, single: bool, lasting: bool) -> Row:
        """PLAIN_COLUMNS. sqlite3 takes half a microsecond longer for a bool, and for bytes than for a bytearray."""
        app, targets = message.app_id, message.targets
        return (
            msg_id,
            app,
            int(message.broadcast),
            bytearray(message.body) if lasting or message.callback is not None else None,
            message.created_at,
            message.expires_at,
            message.sendno,
            targets.min() if single else encode_bits(targets.copy()),
            self._states.count_online(app, targets),
        )

    def _note_suppressed(self, entries: Sequence[Entry]) -> None:
        for msg_id, message in entries:
            self._callbacks.expect(message.app_id)
            if message.suppressed:
                note = (message.app_id, msg_id, "suppressed", message.suppressed, message.created_at)
                self._callbacks.note([note])

    # The newest-N rule (S8)

    def _evict(self) -> None:
        surplus, now = self._inbox.surplus(), self._clock()
        self._settling.take_out([(*row, now, 0.0, 0) for row in surplus], "evicted")
        if self._callbacks.wanted:
            self._callbacks.note(
                (app, msg_id, "evicted", BitMap((devno,)), now) for app, devno, msg_id in surplus
            )

    # Events, retained messages, session items

    def _events(self, calls: list[Sequence[BehaviourEvent]]) -> list[None]:
        events = [event for call in calls for event in call]
        write_rows(
            self._connection,
            "INSERT INTO events (id, app, devno, name, at, payload) {values}",
            [
                (event_id, event.app_id, event.devno, event.name, event.at, event.payload)
                for event_id, event in zip(self._ids.next(len(events)), events, strict=True)
            ],
        )
        return [None] * len(calls)

    def _retain(self, calls: list[Sequence[Retained]]) -> list[None]:
        newest = {(item.app_id, item.topic): item for call in calls for item in call}
        write_rows(
            self._connection,
            "INSERT OR REPLACE INTO retained (app, topic, payload, qos, properties, expires_at, source)"
            " {values}",
            [
                (*key, item.payload, item.qos, item.properties, item.expires_at, item.source)
                for key, item in newest.items()
                if item.payload
            ],
        )
        delete_rows(self._connection, "retained", [key for key, item in newest.items() if not item.payload])
        return [None] * len(calls)

    def _save_session_items(self, calls: list[Sequence[SessionItem]]) -> list[None]:
        newest = {
            (item.app_id, item.session, item.kind, item.item): item.value for call in calls for item in call
        }
        write_rows(  # not for a deleted app: its purge may be over, and nobody would remove them again
            self._connection,
            "INSERT OR REPLACE INTO session_items (app, session, kind, item, value)"
            " SELECT v.column1, v.column2, v.column3, v.column4, v.column5 FROM ({values}) v"
            " CROSS JOIN apps a ON a.app_id = v.column1 WHERE NOT a.deleted",
            [(*key, value) for key, value in newest.items() if value is not None],
        )
        delete_rows(self._connection, "session_items", [k for k, value in newest.items() if value is None])
        return [None] * len(calls)
