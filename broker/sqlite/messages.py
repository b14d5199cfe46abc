"""Messages as the writer thread changes them: appends, settlements, receipts, events, retained messages; and the
items of durable sessions.

A message for one device (nearly all) keeps its target as a plain number: "delivered" is then one statement
over all such messages. A message with a bitmap gets its settlements as rows of `settled`, written without
reading anything, and folded into the message's own bitmaps once FOLD_AFTER of them have gathered; whoever
reads the message merges them in (`merged`). So a broadcast to a million devices rewrites its bitmap a few
dozen times while a million acknowledgements come in.
"""

from __future__ import annotations

import sqlite3
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from pyroaring import BitMap

from broker.model import Appended, BehaviourEvent, NewMessage, Receipt, Retained, SessionItem, Settled
from broker.sqlite.engine import Row, decode_bits, delete_rows, encode_bits, read_rows, write_rows
from broker.sqlite.threads import Handler

FOLD_AFTER: Final = 64  # rows of `settled` for one message; reading one costs about a microsecond
COUNTED_MESSAGES: Final = (
    16_384  # messages whose rows of `settled` are counted; past it the oldest start anew
)
ID_EPOCH: Final = 1_704_067_200.0  # 2024-01-01: 41 bits of milliseconds reach to 2093
ID_COUNTER_BITS: Final = 22  # four million ids a millisecond


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


def merged(connection: sqlite3.Connection, rows: Iterable[Row]) -> dict[int, tuple[BitMap, BitMap, BitMap]]:
    """(msg_id, target, delivered, evicted) columns -> msg_id -> the three bitmaps as they are now."""
    found = {row[0]: (decode_bits(row[1]), decode_bits(row[2]), decode_bits(row[3])) for row in rows}
    later = read_rows(
        connection,
        "SELECT s.msg_id, s.delivered, s.evicted FROM ({values}) v"
        " CROSS JOIN settled s ON s.msg_id = v.column1",
        [(msg_id,) for msg_id in found],
    )
    for msg_id, more_delivered, more_evicted in later:
        _, delivered, evicted = found[msg_id]
        delivered |= decode_bits(more_delivered)
        evicted |= decode_bits(more_evicted)
    return {  # whoever was not meant has no state (S4)
        msg_id: (targets, delivered & targets, evicted & targets)
        for msg_id, (targets, delivered, evicted) in found.items()
    }


class MessageWrites:
    """The handlers for messages."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        ids: Ids,
        clock: Callable[[], float],
        cid_lifetime: float,
        without_route: Callable[[int, BitMap], BitMap],
    ) -> None:
        self._connection = connection
        self._ids = ids
        self._clock = clock
        self._cid_lifetime = cid_lifetime
        self._without_route = without_route
        self._unfolded: OrderedDict[int, int] = (
            OrderedDict()
        )  # msg_id -> rows of `settled` since its last fold
        self.handlers: dict[str, Handler] = {
            "append": self._append,
            "settle": self._settle,
            "fold": self._fold_all,
            "receipts": self._receipts,
            "events": self._events,
            "retain": self._retain,
            "session_items": self._save_session_items,
        }

    # Appending

    def _append(
        self, calls: list[tuple[Sequence[NewMessage], Mapping[int, BitMap], Mapping[int, BitMap]]]
    ) -> list[list[Appended]]:
        count = sum(len(messages) for messages, *_ in calls)
        ids = iter(self._ids.next(count))
        lists = [[(next(ids), message) for message in messages] for messages, *_ in calls]
        owners = self._claim_cids([entry for entries in lists for entry in entries])
        fresh: list[tuple[int, NewMessage]] = []
        answers: list[list[Appended]] = []
        for entries in lists:
            answer: list[Appended] = []
            for msg_id, message in entries:
                owner = owners.get((message.app_id, message.cid)) if owners else None
                if owner is None or owner.msg_id == msg_id:
                    fresh.append((msg_id, message))
                    answer.append(Appended(msg_id, False, message.sendno))
                else:
                    answer.append(owner)
            answers.append(answer)
        self._store(fresh)
        self._evict(candidates for _, candidates, _ in calls)
        return answers

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

    def _store(self, entries: Sequence[tuple[int, NewMessage]]) -> None:
        messages: list[Row] = []
        inbox: list[Row] = []
        for msg_id, message in entries:
            targets, app = message.targets, message.app_id
            lasting = message.expires_at > message.created_at
            single = not message.broadcast and len(targets) == 1
            target = targets.min() if single else encode_bits(targets.copy())
            messages.append(
                (
                    msg_id,
                    app,
                    message.broadcast,
                    message.body if lasting else None,
                    message.created_at,
                    message.expires_at,
                    message.sendno,
                    target,
                )
            )
            if lasting and single:
                inbox.append((app, target, msg_id))
            elif lasting and not message.broadcast:
                inbox.extend([(app, devno, msg_id) for devno in targets])
        write_rows(
            self._connection,
            "INSERT INTO messages (msg_id, app, broadcast, body, created_at, expires_at, sendno, target)"
            " {values}",
            messages,
        )
        write_rows(self._connection, "INSERT INTO inbox {values}", inbox)

    # The newest-N rule (S8)

    def _evict(self, candidates: Iterable[Mapping[int, BitMap]]) -> None:
        """Candidates by app: targets that had something in the inbox already."""
        by_app: dict[int, BitMap] = {}
        for call in candidates:
            for app_id, devnos in call.items():
                by_app[app_id] = by_app[app_id] | devnos if app_id in by_app else devnos
        by_limit: dict[int, list[Row]] = {}
        for app_id, devnos in by_app.items():
            away = self._without_route(app_id, devnos)
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
            self._take_out(surplus, "evicted")

    def _offline_limit(self, app_id: int) -> int:
        row = self._connection.execute(
            "SELECT offline_limit FROM apps WHERE app_id = ?", (app_id,)
        ).fetchone()
        return int(row[0]) if row else 0

    # Settling

    def _settle(self, calls: list[Sequence[Settled]]) -> list[None]:
        delivered: list[Row] = []
        evicted: list[Row] = []
        broadcasts: dict[tuple[int, int], tuple[BitMap, BitMap]] = {}
        for call in calls:
            for item in call:
                app, msg_id = item.app_id, item.msg_id
                if item.broadcast:
                    both = broadcasts.setdefault((app, msg_id), (BitMap(), BitMap()))
                    both[0].update(item.delivered)
                    both[1].update(item.evicted)
                    continue
                delivered.extend([(app, devno, msg_id) for devno in item.delivered])
                evicted.extend([(app, devno, msg_id) for devno in item.evicted])
        self._take_out(delivered, "delivered")
        self._take_out(evicted, "evicted")
        self._add_settled(broadcasts)
        return [None] * len(calls)

    def _take_out(self, rows: Sequence[Row], state: str) -> None:
        """Record the state of (app, devno, msg_id) deliveries of inbox messages; they wait no longer."""
        delete_rows(self._connection, "inbox", rows)
        singles = write_rows(
            self._connection,
            f"UPDATE messages SET {state} = target, body = NULL FROM ({{values}}) v WHERE"
            " messages.msg_id = v.column3 AND messages.app = v.column1 AND messages.target = v.column2",
            rows,
        )
        if singles == len(rows):
            return
        shared: dict[tuple[int, int], tuple[BitMap, BitMap]] = {}
        for app, devno, msg_id in rows:
            both = shared.setdefault((app, msg_id), (BitMap(), BitMap()))
            both[state == "evicted"].add(devno)
        self._add_settled(shared)

    def _add_settled(self, items: Mapping[tuple[int, int], tuple[BitMap, BitMap]]) -> None:
        """For messages with a bitmap, of this app; others are left alone by the join."""
        write_rows(
            self._connection,
            "INSERT INTO settled (msg_id, delivered, evicted) SELECT v.column1, v.column3, v.column4"
            " FROM ({values}) v CROSS JOIN messages m ON m.msg_id = v.column1 AND m.app = v.column2"
            " WHERE typeof(m.target) = 'blob'",
            [
                (
                    msg_id,
                    app,
                    encode_bits(both[0]) if both[0] else None,
                    encode_bits(both[1]) if both[1] else None,
                )
                for (app, msg_id), both in items.items()
            ],
        )
        due = []
        for _, msg_id in items:
            count = self._unfolded.pop(msg_id, 0) + 1
            if count >= FOLD_AFTER:
                due.append(msg_id)
            else:
                self._unfolded[msg_id] = count
        while len(self._unfolded) > COUNTED_MESSAGES:
            self._unfolded.popitem(last=False)
        self.fold(due)

    def _fold_all(self, calls: list[Sequence[int]]) -> list[None]:
        self.fold(list({msg_id: None for call in calls for msg_id in call}))
        return [None] * len(calls)

    def fold(self, msg_ids: Sequence[int]) -> None:
        """Merge what was settled into the messages. A message that owes nobody any more gives its body up."""
        rows = read_rows(
            self._connection,
            "SELECT m.msg_id, m.target, m.delivered, m.evicted FROM ({values}) v"
            " CROSS JOIN messages m ON m.msg_id = v.column1 WHERE typeof(m.target) = 'blob'",
            [(msg_id,) for msg_id in msg_ids],
        )
        write_rows(
            self._connection,
            "UPDATE messages SET delivered = v.column2, evicted = v.column3,"
            " body = CASE WHEN v.column4 THEN NULL ELSE body END"
            " FROM ({values}) v WHERE messages.msg_id = v.column1",
            [
                (msg_id, encode_bits(delivered), encode_bits(evicted), targets <= delivered | evicted)
                for msg_id, (targets, delivered, evicted) in merged(self._connection, rows).items()
            ],
        )
        delete_rows(self._connection, "settled", [(msg_id,) for msg_id in msg_ids])

    # Receipts, events, retained messages, session items

    def _receipts(self, calls: list[Sequence[Receipt]]) -> list[None]:
        fresh: dict[tuple[int, int, str, int], BitMap] = {}
        for call in calls:
            for receipt in call:
                key = (receipt.app_id, receipt.msg_id, receipt.event, receipt.devno >> 16)
                fresh.setdefault(key, BitMap()).add(receipt.devno)
        stored = read_rows(  # devices that are not targets are dropped when the receipts are read
            self._connection,
            "SELECT v.column1, v.column2, v.column3, v.column4, r.bits FROM ({values}) v"
            " CROSS JOIN messages m ON m.msg_id = v.column2 AND m.app = v.column1"
            " LEFT JOIN receipts r ON r.msg_id = v.column2 AND r.event = v.column3 AND r.chunk = v.column4",
            list(fresh),
        )
        write_rows(
            self._connection,
            "INSERT OR REPLACE INTO receipts (msg_id, event, chunk, bits) {values}",
            [
                (msg_id, event, chunk, encode_bits(fresh[app, msg_id, event, chunk] | decode_bits(bits)))
                for app, msg_id, event, chunk, bits in stored
            ],
        )
        return [None] * len(calls)

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
