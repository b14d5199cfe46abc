"""Messages as the writer thread appends them; events, retained messages, and the items of durable sessions.

Appends that wait together are a few statements. Those that depend on what is there (record changes, `replaces`, a
collapse key) go one by one: each sees what those before it did. Ids always grow in the order of the calls, for that
is the order in which their doorbells ring.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    candidates: Mapping[int, BitMap]  # by app, for the newest-N rule: something may wait there already
    inboxes: Mapping[int, BitMap]  # by app: who gets an inbox row
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
        settling: SettleWrites,
        records: RecordWrites,
        callbacks: CallbackWrites,
    ) -> None:
        self._connection = connection
        self._ids = ids
        self._clock = clock
        self._cid_lifetime = cid_lifetime
        self._states = states
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
        self._evict(call.candidates for call in calls)
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
        """Who owns each cid: the first of this group, or a message of before."""
        owners: dict[tuple[int, str | None], Appended] = {}
        for msg_id, message in entries:
            if message.cid is not None:
                owners.setdefault((message.app_id, message.cid), Appended(msg_id, True, message.sendno))
        if not owners:
            return owners
        now = self._clock()
        claimed = write_rows(
            self._connection,
            "INSERT INTO cids (app, cid, msg_id, expires_at) {values} ON CONFLICT (app, cid) DO UPDATE"
            " SET msg_id = excluded.msg_id, expires_at = excluded.expires_at WHERE cids.expires_at <= ?",
            [(app, cid, owner.msg_id, now + self._cid_lifetime) for (app, cid), owner in owners.items()],
            (now,),
        )
        if claimed < len(owners):
            owners.update(self._earlier_owners(list(owners)))
        return owners

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
        inbox: list[Row] = []
        told: list[Entry] = []  # with a callback
        for msg_id, message in entries:
            targets, app = message.targets, message.app_id
            lasting = message.expires_at > message.created_at and not message.paced
            single = not message.broadcast and len(targets) == 1
            target = targets.min() if single else encode_bits(targets.copy())
            row = (
                msg_id,
                app,
                message.broadcast,
                message.body if lasting or message.callback is not None else None,
                message.created_at,
                message.expires_at,
                message.sendno,
                target,
                self._states.count_online(app, targets),
            )
            if _is_plain(message):
                plain.append(row)
            else:
                special.append((*row, *_special_columns(message)))
                if message.callback is not None:
                    told.append((msg_id, message))
            if lasting and single:
                inbox.append((app, target, msg_id))
            elif lasting and not message.broadcast:
                inbox.extend([(app, devno, msg_id) for devno in targets])
        write_rows(self._connection, f"INSERT INTO messages ({PLAIN_COLUMNS}) {{values}}", plain)
        write_rows(
            self._connection,
            f"INSERT INTO messages ({PLAIN_COLUMNS}, {SPECIAL_COLUMNS}) {{values}}",
            special,
        )
        write_rows(self._connection, "INSERT INTO inbox {values}", inbox)
        self._note_suppressed(told)

    def _note_suppressed(self, entries: Sequence[Entry]) -> None:
        for msg_id, message in entries:
            self._callbacks.expect(message.app_id)
            if message.suppressed:
                note = (message.app_id, msg_id, "suppressed", message.suppressed, message.created_at)
                self._callbacks.note([note])

    # The newest-N rule (S8)

    def _evict(self, candidates: Iterable[Mapping[int, BitMap]]) -> None:
        """Candidates by app: targets that had something in the inbox already."""
        by_app: dict[int, BitMap] = {}
        for call in candidates:
            for app_id, devnos in call.items():
                by_app[app_id] = by_app[app_id] | devnos if app_id in by_app else devnos
        by_limit: dict[int, list[Row]] = {}
        for app_id, devnos in by_app.items():
            away = self._states.without_route(app_id, devnos)
            if away:
                rows = by_limit.setdefault(self._offline_limit(app_id), [])
                rows.extend([(app_id, devno) for devno in away])
        for limit, rows in by_limit.items():
            surplus = read_rows(
                self._connection,
                "SELECT i.app, i.devno, i.msg_id FROM ({values}) v"
                " CROSS JOIN inbox i ON i.app = v.column1 AND i.devno = v.column2 AND i.msg_id <="
                " (SELECT msg_id FROM inbox WHERE app = v.column1 AND devno = v.column2"
                "  ORDER BY msg_id DESC LIMIT 1 OFFSET ?)",
                rows,
                (limit,),
            )
            now = self._clock()
            self._settling.take_out([(*row, now, 0.0, 0) for row in surplus], "evicted")
            if self._callbacks.wanted:
                self._callbacks.note(
                    (app, msg_id, "evicted", BitMap((devno,)), now) for app, devno, msg_id in surplus
                )

    def _offline_limit(self, app_id: int) -> int:
        row = self._connection.execute(
            "SELECT offline_limit FROM apps WHERE app_id = ?", (app_id,)
        ).fetchone()
        return int(row[0]) if row else 0

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
