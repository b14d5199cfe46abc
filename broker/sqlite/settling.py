"""What becomes of messages, as the writer thread records it: settlements, withdrawals, receipts; and when.

A message for one device (nearly all) keeps its target as a plain number: "delivered" is then one statement over all
such messages, the time a column. A message with a bitmap gets its settlements as rows of `settled`, written without
reading anything, and folded into the message's own bitmaps and into `steps` once FOLD_AFTER of them have gathered;
whoever reads the message merges them in (`merged`). So a broadcast to a million devices rewrites its bitmap a few
dozen times while a million acknowledgements come in.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

from pyroaring import BitMap

from broker.bitmaps import decode_bits, encode_bits
from broker.later.paces import HELD, SLOW
from broker.model import Receipt, Settled, Withdrawn
from broker.settlements import IN_FLIGHT, STATES, States, stretch, unfold
from broker.sqlite.callbacks import CallbackWrites
from broker.sqlite.engine import Row, delete_rows, read_rows, write_rows
from broker.sqlite.inbox import InboxWrites
from broker.sqlite.threads import Handler

FOLD_AFTER: Final = 64  # rows of `settled` for one message; reading one costs about a microsecond
COUNTED_MESSAGES: Final = (
    16_384  # messages whose rows of `settled` are counted; past it the oldest start anew
)
COLLAPSED_INBOX: Final = (
    2_000  # waiting pushes of one collapse key that a broadcast with it takes the place of
)
CHUNK_BITS: Final = 16  # of `steps`: one receipt rewrites at most 8 KB

STATE_COLUMNS: Final = "m.msg_id, m.target, m.delivered, m.evicted, m.recalled, m.sent"

# Taken out of an inbox, or sent from it: (app, devno, msg_id, at, sent_at, node).
_SINGLES: Final = {
    "delivered": "delivered = target, body = NULL, sent_at = coalesce(sent_at, v.column5),"
    " done_at = CASE WHEN delivered IS NULL THEN v.column4 ELSE done_at END,"
    " node = CASE WHEN delivered IS NULL THEN v.column6 ELSE node END",
    "evicted": "evicted = target, body = NULL, done_at = coalesce(done_at, v.column4)",
    "recalled": "recalled = target, body = NULL, done_at = coalesce(done_at, v.column4)",
    "sent": "sent = target, sent_at = coalesce(sent_at, v.column4), node = v.column6",
}


def merged(connection: sqlite3.Connection, rows: Iterable[Row]) -> dict[int, States]:
    """STATE_COLUMNS -> msg_id -> the bitmaps, with what is not folded yet."""
    found = {row[0]: States(*map(decode_bits, row[1:6])) for row in rows}
    later = read_rows(
        connection,
        "SELECT s.msg_id, s.delivered, s.evicted, s.recalled, s.sent FROM ({values}) v"
        " CROSS JOIN settled s ON s.msg_id = v.column1",
        [(msg_id,) for msg_id in found],
    )
    for msg_id, *more in later:
        for bits, added in zip(found[msg_id][1:], more, strict=True):
            bits.update(decode_bits(added))
    for states in found.values():  # whoever was not meant has no state (S4)
        for bits in states[1:]:
            bits &= states.targets  # noqa: PLW2901 - in place
    return found


def decoded(columns: Sequence[bytes | None]) -> list[BitMap | None]:
    """The STATES columns of a row of `settled`."""
    return [None if column is None else decode_bits(column) for column in columns]


def chunks(bits: BitMap) -> Iterator[tuple[int, BitMap]]:
    """The parts of a bitmap by devno >> CHUNK_BITS."""
    if not bits:
        return
    for chunk in range(bits.min() >> CHUNK_BITS, (bits.max() >> CHUNK_BITS) + 1):
        part = bits & BitMap(range(chunk << CHUNK_BITS, (chunk + 1) << CHUNK_BITS))
        if part:
            yield chunk, part


class Steps:
    """Gathers who did what when, and writes it."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._gathered: dict[tuple[int, str, int, int, int], BitMap] = {}

    def add(self, msg_id: int, step: str, node: int, when: tuple[int, int], devnos: BitMap) -> None:
        if devnos:
            self._gathered.setdefault((msg_id, step, node, *when), BitMap()).update(devnos)

    def write(self) -> None:
        gathered, self._gathered = self._gathered, {}
        fresh = {(*key, chunk): part for key, bits in gathered.items() for chunk, part in chunks(bits)}
        known = read_rows(
            self._connection,
            "SELECT s.* FROM ({values}) v CROSS JOIN steps s ON s.msg_id = v.column1 AND s.step = v.column2"
            " AND s.node = v.column3 AND s.start = v.column4 AND s.width = v.column5 AND s.chunk = v.column6",
            list(fresh),
        )
        for *key, bits in known:
            fresh[tuple(key)] |= decode_bits(bits)
        write_rows(
            self._connection,
            "INSERT OR REPLACE INTO steps {values}",
            [(*key, encode_bits(bits)) for key, bits in fresh.items()],
        )


class Nodes:
    """Names of nodes as numbers; 0 is no node."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._numbers = {"": 0}

    def number(self, name: str) -> int:
        number = self._numbers.get(name)
        if number is None:
            self._connection.execute("INSERT OR IGNORE INTO nodes (name) VALUES (?)", (name,))
            (number,) = self._connection.execute("SELECT id FROM nodes WHERE name = ?", (name,)).fetchone()
            self._numbers[name] = number
        return int(number)

    def forget(self) -> None:
        """The transaction that may have inserted some was rolled back."""
        self._numbers = {"": 0}


class _Shared:
    """Settlements of one message at one node in one second, sent in one second, on their way into `settled`."""

    __slots__ = ("at", "bits", "sent_at")

    def __init__(self, at: float, sent_at: float) -> None:
        self.at = at
        self.sent_at = sent_at
        self.bits: dict[str, BitMap] = {}

    def add(self, state: str, devnos: Iterable[int]) -> None:
        bits = self.bits.setdefault(state, BitMap())
        bits.update(devnos)

    def columns(self) -> list[bytes | None]:
        return [encode_bits(bits) if (bits := self.bits.get(state)) else None for state in STATES]


_SharedKey = tuple[int, int, int, int, int]  # app, msg_id, node, seconds in which it was settled and sent


class SettleWrites:
    """The handlers for what becomes of messages."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        clock: Callable[[], float],
        inbox: InboxWrites,
        callbacks: CallbackWrites,
    ) -> None:
        self._connection = connection
        self._clock = clock
        self._inbox = inbox
        self._callbacks = callbacks
        self._nodes = Nodes(connection)
        self._steps = Steps(connection)
        self._unfolded: OrderedDict[int, int] = (
            OrderedDict()
        )  # msg_id -> rows of `settled` since its last fold
        self.handlers: dict[str, Handler] = {
            "settle": self._settle,
            "fold": self._fold_all,
            "recall": lambda calls: [self._recall_whole(*call) for call in calls],
            "receipts": self._receipts,
        }

    def begin(self) -> None:
        """A transaction starts."""
        self._nodes.forget()

    # Settling

    def _settle(self, calls: list[Sequence[Settled]]) -> list[None]:
        rows: dict[str, list[Row]] = {"delivered": [], "evicted": [], "sent": []}
        shared: dict[_SharedKey, _Shared] = {}
        items = [item for call in calls for item in call]
        for item in items:
            app, msg_id, node = item.app_id, item.msg_id, self._nodes.number(item.node)
            by_state = (("delivered", item.delivered), ("evicted", item.evicted), ("sent", item.sent))
            for state, devnos in by_state:
                if devnos and item.broadcast:
                    self._share(shared, app, msg_id, item.at, item.sent_at, node).add(state, devnos)
                elif devnos:
                    rows[state] += [(app, devno, msg_id, item.at, item.sent_at, node) for devno in devnos]
        for state, taken in rows.items():
            self.take_out(taken, state)
        self._add_settled(shared)
        if self._callbacks.wanted:
            self._callbacks.note(
                (item.app_id, item.msg_id, event, devnos, item.at)
                for item in items
                for event, devnos in (("delivered", item.delivered), ("evicted", item.evicted))
                if devnos
            )
        return [None] * len(calls)

    @staticmethod
    def _share(
        shared: dict[_SharedKey, _Shared], app: int, msg_id: int, at: float, sent_at: float, node: int
    ) -> _Shared:
        key = (app, msg_id, node, int(at), int(sent_at))
        found = shared.get(key)
        if found is None:
            found = shared[key] = _Shared(at, sent_at)
        return found

    def take_out(self, rows: Sequence[Row], state: str) -> None:
        """Record the state of (app, devno, msg_id, at, sent_at, node) deliveries of inbox messages; but for `sent`
        they wait no longer."""
        if not rows:
            return
        if state != "sent":
            self._inbox.take([row[:3] for row in rows])
        only = "" if state == "delivered" else " AND messages.delivered IS NULL"
        singles = write_rows(
            self._connection,
            f"UPDATE messages SET {_SINGLES[state]} FROM ({{values}}) v WHERE"
            f" messages.msg_id = v.column3 AND messages.app = v.column1 AND messages.target = v.column2{only}",
            rows,
        )
        if singles == len(rows):
            return
        shared: dict[_SharedKey, _Shared] = {}
        for app, devno, msg_id, at, sent_at, node in rows:
            self._share(shared, app, msg_id, at, sent_at, node).add(state, (devno,))
        self._add_settled(shared)

    def _add_settled(self, items: Mapping[_SharedKey, _Shared]) -> None:
        """For messages with a bitmap, of this app; others are left alone by the join."""
        write_rows(
            self._connection,
            "INSERT INTO settled (msg_id, delivered, evicted, recalled, sent, at, sent_at, node)"
            " SELECT v.column1, v.column3, v.column4, v.column5, v.column6, v.column7, v.column8, v.column9"
            " FROM ({values}) v CROSS JOIN messages m ON m.msg_id = v.column1 AND m.app = v.column2"
            " WHERE typeof(m.target) = 'blob'",
            [
                (msg_id, app, *item.columns(), item.at, item.sent_at, node)
                for (app, msg_id, node, *_), item in items.items()
            ],
        )
        due = []
        for msg_id in {key[1]: None for key in items}:
            count = self._unfolded.pop(msg_id, 0) + 1
            if count >= FOLD_AFTER:
                due.append(msg_id)
            else:
                self._unfolded[msg_id] = count
        while len(self._unfolded) > COUNTED_MESSAGES:
            self._unfolded.popitem(last=False)
        self.fold(due)

    # Folding

    def _fold_all(self, calls: list[Sequence[int]]) -> list[None]:
        self.fold(list({msg_id: None for call in calls for msg_id in call}))
        return [None] * len(calls)

    def fold(self, msg_ids: Sequence[int]) -> None:
        """Merge what was settled into the messages and their steps. A message that owes nobody any more gives its
        body up."""
        if not msg_ids:
            return
        keys = [(msg_id,) for msg_id in msg_ids]
        messages = read_rows(
            self._connection,
            f"SELECT {STATE_COLUMNS}, m.created_at FROM ({{values}}) v"
            " CROSS JOIN messages m ON m.msg_id = v.column1 WHERE typeof(m.target) = 'blob'",
            keys,
        )
        found = {row[0]: (States(*map(decode_bits, row[1:6])), float(row[6])) for row in messages}
        later = read_rows(
            self._connection,
            "SELECT s.msg_id, s.at, s.sent_at, s.node, s.delivered, s.evicted, s.recalled, s.sent"
            " FROM ({values}) v CROSS JOIN settled s ON s.msg_id = v.column1",
            keys,
        )
        for msg_id, at, sent_at, node, *columns in sorted(later, key=lambda row: float(row[1])):
            if msg_id in found:
                states, created_at = found[msg_id]
                for step, when, devnos in unfold(states, created_at, at, sent_at, decoded(columns)):
                    self._steps.add(msg_id, step, node, when, devnos)
        self._steps.write()
        write_rows(
            self._connection,
            "UPDATE messages SET delivered = v.column2, evicted = v.column3, recalled = v.column4, sent = v.column5,"
            " body = CASE WHEN v.column6 THEN NULL ELSE body END"
            " FROM ({values}) v WHERE messages.msg_id = v.column1",
            [
                (msg_id, *(encode_bits(bits) if bits else None for bits in states[1:]), not states.waiting)
                for msg_id, (states, _) in found.items()
            ],
        )
        delete_rows(self._connection, "settled", keys)

    # Withdrawing

    def _recall_whole(self, app_id: int, msg_ids: Sequence[int], now: float) -> list[Withdrawn]:
        """And note that its publisher wanted it so."""
        write_rows(
            self._connection,
            "UPDATE messages SET withdrawn_at = coalesce(withdrawn_at, v.column2) FROM ({values}) v"
            " WHERE messages.msg_id = v.column1 AND messages.app = ?",
            [(msg_id, now) for msg_id in msg_ids],
            (app_id,),
        )
        return self.recall(app_id, msg_ids, now)

    def replace(self, app_id: int, msg_id: int, by: int, now: float, only: BitMap) -> list[Withdrawn]:
        """For these devices another push has its place."""
        self._connection.execute(
            "UPDATE messages SET replaced_by = coalesce(replaced_by, ?) WHERE msg_id = ? AND app = ?",
            (by, msg_id, app_id),
        )
        return self.recall(app_id, [msg_id], now, only)

    def recall(
        self, app_id: int, msg_ids: Sequence[int], now: float, only: BitMap | None = None
    ) -> list[Withdrawn]:
        """Of these messages and their parts."""
        parts = read_rows(
            self._connection,
            "SELECT m.msg_id FROM ({values}) v CROSS JOIN messages m ON m.part_of = v.column1 WHERE m.app = ?",
            [(msg_id,) for msg_id in msg_ids],
            (app_id,),
        )
        every = dict.fromkeys([*msg_ids, *(msg_id for (msg_id,) in parts)])
        return [withdrawn for i in every if (withdrawn := self.withdraw(app_id, i, now, only))]

    def withdraw(self, app_id: int, msg_id: int, now: float, only: BitMap | None = None) -> Withdrawn | None:
        """What waits of one message (`only`: for these devices) is recalled. None: there is no such message."""
        row = self._connection.execute(
            f"SELECT {STATE_COLUMNS}, m.expires_at, m.paced, m.broadcast FROM messages m"
            " WHERE m.msg_id = ? AND m.app = ?",
            (msg_id, app_id),
        ).fetchone()
        if row is None:
            return None
        states = merged(self._connection, [row])[msg_id]
        reached, waiting = states.delivered | states.sent, states.waiting
        over = now >= row[6]
        paced = bool(row[7])
        if paced:
            waiting -= self.released(msg_id)
        if only is not None:
            waiting &= only
        if over and now >= row[6] + IN_FLIGHT:
            waiting = BitMap()
        elif waiting and not over:
            if paced:
                self._stop_parts(app_id, msg_id)
            self._take_back(app_id, msg_id, now, waiting, single=isinstance(row[1], int), broadcast=row[8])
            if waiting == states.waiting:
                self.fold([msg_id])  # it owes nobody any more
        return Withdrawn(app_id, msg_id, waiting, reached)

    def _stop_parts(self, app_id: int, msg_id: int) -> None:
        """Whoever is about to let the next part go has seen other targets: he is to look again (S12)."""
        for kind in (SLOW, HELD):
            self._connection.execute(
                "UPDATE records SET version = version + 1 WHERE app = ? AND kind = ? AND key = ?",
                (app_id, kind, str(msg_id)),
            )

    def released(self, msg_id: int) -> BitMap:
        """The targets that a paced message's parts have."""
        rows = self._connection.execute("SELECT target FROM messages WHERE part_of = ?", (msg_id,)).fetchall()
        return BitMap.union(BitMap(), *(decode_bits(target) for (target,) in rows))

    def _take_back(
        self, app_id: int, msg_id: int, now: float, devnos: BitMap, *, single: bool, broadcast: bool
    ) -> None:
        if single:
            self.take_out([(app_id, devnos.min(), msg_id, now, 0.0, 0)], "recalled")
        else:
            if not broadcast:
                self._inbox.take([(app_id, devno, msg_id) for devno in devnos])
            shared: dict[_SharedKey, _Shared] = {}
            self._share(shared, app_id, msg_id, now, 0.0, 0).add("recalled", devnos)
            self._add_settled(shared)
        if self._callbacks.wanted:
            self._callbacks.note([(app_id, msg_id, "recalled", devnos, now)])

    def collapse(
        self, app_id: int, key: str, age: int, msg_id: int, devnos: BitMap, now: float
    ) -> list[Withdrawn]:
        """For these devices `msg_id` has the place of what is older and has this key: that waits no longer.

        `age`: its id, or that of the whole that it is part of: a part is as old as its whole, however late it is let
        go.
        """
        older = dict.fromkeys(self._collapsed_wide(app_id, key, age, now), devnos)
        for found, devno in self._collapsed_inboxes(app_id, key, age, devnos):
            older.setdefault(found, BitMap()).add(devno)
        older.pop(msg_id, None)
        taken = [self.withdraw(app_id, found, now, only) for found, only in sorted(older.items())]
        return [withdrawn for withdrawn in taken if withdrawn is not None and withdrawn.devnos]

    def _collapsed_wide(self, app_id: int, key: str, age: int, now: float) -> list[int]:
        """Broadcasts, and wholes whose parts may not all have gone."""
        rows = self._connection.execute(
            "SELECT msg_id FROM messages WHERE app = ?1 AND collapse = ?2 AND broadcast = 1 AND body IS NOT NULL"
            " AND expires_at > ?4 AND coalesce(part_of, msg_id) < ?3"
            " UNION SELECT msg_id FROM messages WHERE app = ?1 AND collapse = ?2 AND paced AND expires_at > ?4"
            " AND msg_id < ?3",
            (app_id, key, age, now),
        ).fetchall()
        return [msg_id for (msg_id,) in rows]

    def _collapsed_inboxes(self, app_id: int, key: str, age: int, devnos: BitMap) -> list[Row]:
        """(msg_id, devno) of what waits in inboxes with this key. For more than COLLAPSED_INBOX devices of the newest
        pushes only, up to so many deliveries."""
        if len(devnos) <= COLLAPSED_INBOX:
            return read_rows(
                self._connection,
                "SELECT i.msg_id, i.devno FROM ({values}) v"
                " CROSS JOIN inbox i ON i.app = v.column1 AND i.devno = v.column2"
                " CROSS JOIN messages m ON m.msg_id = i.msg_id"
                " WHERE m.collapse = ? AND coalesce(m.part_of, m.msg_id) < ?",
                [(app_id, devno) for devno in devnos],
                (key, age),
            )
        newest = self._connection.execute(
            "SELECT msg_id, target FROM messages WHERE app = ?1 AND collapse = ?2 AND broadcast = 0"
            " AND body IS NOT NULL AND coalesce(part_of, msg_id) < ?3 ORDER BY msg_id DESC LIMIT ?4",
            (app_id, key, age, COLLAPSED_INBOX),
        )
        rows = ((found, devno) for found, target in newest for devno in decode_bits(target) & devnos)
        return list(itertools.islice(rows, COLLAPSED_INBOX))

    # Receipts

    def _receipts(self, calls: list[Sequence[Receipt]]) -> list[None]:
        """The first receipt of an event counts. Devices that are no targets are dropped when receipts are read."""
        receipts = [receipt for call in calls for receipt in call]
        created = {
            (app, msg_id): float(created_at)
            for app, msg_id, created_at in read_rows(
                self._connection,
                "SELECT m.app, m.msg_id, m.created_at FROM ({values}) v"
                " CROSS JOIN messages m ON m.msg_id = v.column2 AND m.app = v.column1",
                list({(receipt.app_id, receipt.msg_id): None for receipt in receipts}),
            )
        }
        known = self._known_receipts(receipts)
        first: dict[tuple[int, int, str, float], BitMap] = {}
        for receipt in receipts:
            key, devno = (receipt.app_id, receipt.msg_id), receipt.devno
            done = known.setdefault((receipt.msg_id, receipt.event, devno >> CHUNK_BITS), BitMap())
            if key not in created or devno in done:
                continue
            done.add(devno)
            when = stretch(created[key], receipt.at)
            self._steps.add(receipt.msg_id, receipt.event, 0, when, BitMap((devno,)))
            first.setdefault((*key, receipt.event, receipt.at), BitMap()).add(devno)
        self._steps.write()
        if first and self._callbacks.wanted:
            self._callbacks.note(
                (app, msg_id, event, devnos, at) for (app, msg_id, event, at), devnos in first.items()
            )
        return [None] * len(calls)

    def _known_receipts(self, receipts: Sequence[Receipt]) -> dict[tuple[int, str, int], BitMap]:
        """By message, event and chunk: who had told it before."""
        keys = {(receipt.msg_id, receipt.event, receipt.devno >> CHUNK_BITS): None for receipt in receipts}
        rows = read_rows(
            self._connection,
            "SELECT s.msg_id, s.step, s.chunk, s.bits FROM ({values}) v CROSS JOIN steps s"
            " ON s.msg_id = v.column1 AND s.step = v.column2 WHERE s.chunk = v.column3",
            list(keys),
        )
        known: dict[tuple[int, str, int], BitMap] = {}
        for msg_id, event, chunk, bits in rows:
            known.setdefault((msg_id, event, chunk), BitMap()).update(decode_bits(bits))
        return known
