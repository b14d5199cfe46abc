"""The store's reads. Each takes the arguments of several calls that waited together and answers all of them,
in a few statements; they run on the reader threads, inside one read transaction."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from pyroaring import BitMap

from broker.bitmaps import decode_bits
from broker.model import (
    App,
    Appended,
    BehaviourEvent,
    Device,
    MessageRecord,
    OwedRequest,
    Retained,
    SessionItem,
    Step,
    StoredBroadcast,
    StoredMessage,
)
from broker.settlements import STATES, States, Stored, message_record, unfold
from broker.sqlite.engine import Row, read_rows
from broker.sqlite.inbox import Find, Fresh, with_fresh
from broker.sqlite.index import APP_COLUMNS, DEVICES_BY_RID, app_from_row, device_from_row
from broker.sqlite.settling import STATE_COLUMNS, decoded, merged
from broker.sqlite.threads import Handler

OWED: Final = """
SELECT json_group_array(json((
    SELECT json_group_array(msg_id) FROM (
        SELECT i.msg_id FROM inbox i CROSS JOIN messages m ON m.msg_id = i.msg_id
        WHERE i.app = v.column1 AND i.devno = v.column2 AND i.msg_id > v.column3
          AND m.expires_at > ? AND m.body IS NOT NULL
        ORDER BY i.msg_id LIMIT ?))))
FROM ({values}) v
"""  # one row comes back, as one piece of JSON: each row would be a step, and wait for the GIL

MESSAGE_COLUMNS: Final = (
    "msg_id, app, body, created_at, expires_at, coalesce(part_of, 0), coalesce(replaces, 0), high"
)


def _stored_message(row: Row) -> StoredMessage:
    """MESSAGE_COLUMNS."""
    msg_id, app_id, body, created_at, expires_at, part_of, replaces, high = row
    return StoredMessage(msg_id, app_id, body, created_at, expires_at, part_of, replaces, bool(high))


def _single_steps(row: Row) -> list[tuple[str, int, float, BitMap]]:
    """Of a message for one device: its row has the times."""
    _, devno, delivered, evicted, recalled, sent, _, done_at, sent_at, node = row
    target = BitMap((devno,))
    steps = []
    if sent_at and (sent is not None or delivered is not None):
        steps.append(("sent", node, float(sent_at), target))
    done = next(
        (
            state
            for state, column in (("delivered", delivered), ("recalled", recalled), ("evicted", evicted))
            if column is not None
        ),
        None,
    )
    if done is not None and done_at is not None:
        steps.append((done, node if done == "delivered" else 0, float(done_at), target))
    return steps


class Reads:
    def __init__(self, connection: sqlite3.Connection, clock: Callable[[], float], fresh: Fresh) -> None:
        self._connection = connection
        self._clock = clock
        self._fresh = fresh
        self.handlers: dict[str, Handler] = {
            "resolve": self._resolve,
            "find_devices": self._find_devices,
            "names": self._names,
            "fetch_owed": self._fetch_owed,
            "find_cids": lambda calls: [self._find_cids(*call) for call in calls],
            "find_app": lambda calls: [self._find_app(key) for key in calls],
            "list_apps": lambda calls: [self._list_apps(*call) for call in calls],
            "list_terms": lambda calls: [self._list_terms(*call) for call in calls],
            "live_broadcasts": lambda calls: [self._live_broadcasts(app_id) for app_id in calls],
            "find_steps": lambda calls: [self._find_steps(*call) for call in calls],
            "find_messages": lambda calls: [self._find_messages(*call) for call in calls],
            "list_events": lambda calls: [self._list_events(*call) for call in calls],
            "list_retained": lambda calls: [self._list_retained(app_id) for app_id in calls],
            "list_session_items": lambda calls: [self._list_session_items(app_id) for app_id in calls],
        }

    # Apps and devices

    def _find_app(self, key: str) -> tuple[App, dict[int, int]] | None:
        """The app and its token generations."""
        row = self._connection.execute(
            f"SELECT {APP_COLUMNS} FROM apps WHERE key = ? AND NOT deleted", (key,)
        ).fetchone()
        if row is None:
            return None
        generations = self._connection.execute(
            "SELECT devno, generation FROM devices WHERE app = ? AND generation > 0", (row[0],)
        ).fetchall()
        return app_from_row(row), dict(generations)

    def _list_apps(self, after: int, limit: int) -> list[App]:
        rows = self._connection.execute(
            f"SELECT {APP_COLUMNS} FROM apps WHERE app_id > ? AND NOT deleted ORDER BY app_id LIMIT ?",
            (after, limit),
        ).fetchall()
        return [app_from_row(row) for row in rows]

    def _resolve(self, calls: list[tuple[int, Sequence[str]]]) -> list[dict[str, int]]:
        rows = read_rows(
            self._connection,
            "SELECT d.app, d.rid, d.devno FROM ({values}) v"
            " CROSS JOIN devices d ON d.app = v.column1 AND d.rid = v.column2",
            list({(app, rid): None for app, rids in calls for rid in rids}),
        )
        found = {(app, rid): devno for app, rid, devno in rows}
        return [{rid: found[app, rid] for rid in rids if (app, rid) in found} for app, rids in calls]

    def _names(self, calls: list[tuple[int, Sequence[int]]]) -> list[dict[int, str]]:
        rows = read_rows(
            self._connection,
            "SELECT d.app, d.devno, d.rid FROM ({values}) v"
            " CROSS JOIN devices d ON d.app = v.column1 AND d.devno = v.column2",
            list({(app, devno): None for app, devnos in calls for devno in devnos}),
        )
        found = {(app, devno): rid for app, devno, rid in rows}
        return [
            {devno: found[app, devno] for devno in devnos if (app, devno) in found} for app, devnos in calls
        ]

    def _find_devices(self, calls: list[tuple[int, Sequence[str]]]) -> list[dict[str, Device]]:
        wanted = list({(app, rid): None for app, rids in calls for rid in rids})
        devices = map(device_from_row, read_rows(self._connection, DEVICES_BY_RID, wanted))
        found = {(device.app_id, device.registration_id): device for device in devices}
        return [{rid: found[app, rid] for rid in rids if (app, rid) in found} for app, rids in calls]

    def _list_terms(self, app_id: int, kind: str) -> list[str]:
        rows = self._connection.execute(
            "SELECT DISTINCT value FROM postings WHERE app = ? AND kind = ? ORDER BY value", (app_id, kind)
        ).fetchall()
        return [value for (value,) in rows]

    # Messages

    def _fetch_owed(self, calls: list[Sequence[OwedRequest]]) -> list[list[list[StoredMessage]]]:
        requests = [request for call in calls for request in call]
        with self._fresh.reading() as find_fresh:
            owed = iter(self._owed_ids(requests, find_fresh))
        ids = [[next(owed)[: request.limit] for request in call] for call in calls]
        messages = self._bodies({msg_id for call in ids for found in call for msg_id in found})
        return [[[messages[msg_id] for msg_id in found] for found in call] for call in ids]

    def _find_cids(self, app_id: int, cids: Sequence[str]) -> dict[str, Appended]:
        rows = read_rows(
            self._connection,
            "SELECT c.cid, c.msg_id, m.sendno FROM ({values}) v"
            " CROSS JOIN cids c ON c.app = v.column1 AND c.cid = v.column2"
            " JOIN messages m ON m.msg_id = c.msg_id WHERE c.expires_at > ?",
            [(app_id, cid) for cid in dict.fromkeys(cids)],
            (self._clock(),),
        )
        return {cid: Appended(msg_id, True, sendno) for cid, msg_id, sendno in rows}

    def _owed_ids(self, requests: Sequence[OwedRequest], find_fresh: Find) -> list[list[int]]:
        rows = read_rows(
            self._connection,
            OWED,
            [(request.app_id, request.devno, request.after) for request in requests],
            # LIMIT cannot name a column: the largest for all, cut by the caller
            before=(self._clock(), max((request.limit for request in requests), default=0)),
        )
        moved = [ids for (text,) in rows for ids in json.loads(text)]
        fresh = [find_fresh((request.app_id, request.devno), request.after) for request in requests]
        return with_fresh(self._connection, moved, fresh, self._clock())

    def _bodies(self, msg_ids: set[int]) -> dict[int, StoredMessage]:
        rows = read_rows(
            self._connection,
            f"SELECT {MESSAGE_COLUMNS} FROM messages WHERE msg_id IN ({{values}})",
            [(msg_id,) for msg_id in msg_ids],
        )
        return {row[0]: _stored_message(row) for row in rows}

    def _live_broadcasts(self, app_id: int) -> tuple[list[StoredBroadcast], list[int]]:
        """And the ids of those that owe nobody any more, to be folded."""
        rows = self._connection.execute(
            f"SELECT {STATE_COLUMNS}, {MESSAGE_COLUMNS} FROM messages m"
            " WHERE app = ? AND broadcast AND body IS NOT NULL AND NOT paced AND expires_at > ? ORDER BY msg_id",
            (app_id, self._clock()),
        ).fetchall()
        bitmaps = merged(self._connection, rows)
        live: list[StoredBroadcast] = []
        finished: list[int] = []
        for row in rows:
            states = bitmaps[row[0]]
            if states.waiting:
                live.append(StoredBroadcast(_stored_message(row[6:]), states.targets, states.settled))
            else:
                finished.append(row[0])
        return live, finished

    def _find_messages(self, app_id: int, msg_ids: Sequence[int]) -> dict[int, MessageRecord]:
        wanted = [(msg_id,) for msg_id in dict.fromkeys(msg_ids)]
        wholes = self._stored_states("v.column1 = m.msg_id", app_id, wanted)
        parts: dict[int, list[Stored]] = {}
        for part in self._stored_states("v.column1 = m.part_of", app_id, wanted).values():
            parts.setdefault(part.part_of, []).append(part)
        receipts = self._receipts({msg_id: stored.states.targets for msg_id, stored in wholes.items()})
        now = self._clock()
        return {
            msg_id: message_record(stored, parts.get(msg_id, []), receipts[msg_id], now)
            for msg_id, stored in wholes.items()
        }

    def _stored_states(self, join: str, app_id: int, wanted: Sequence[Row]) -> dict[int, Stored]:
        rows = read_rows(
            self._connection,
            f"SELECT {STATE_COLUMNS}, m.app, m.broadcast, m.created_at, m.expires_at, m.sendno, m.suppressed,"
            " m.online, m.paced, coalesce(m.part_of, 0), m.withdrawn_at, m.replaced_by FROM ({values}) v"
            f" CROSS JOIN messages m ON {join} WHERE m.app = ?",
            wanted,
            (app_id,),
        )
        states = merged(self._connection, rows)
        return {row[0]: Stored(row[0], states[row[0]], *row[6:]) for row in rows}

    def _receipts(self, targets: dict[int, BitMap]) -> dict[int, dict[str, BitMap]]:
        rows = read_rows(
            self._connection,
            "SELECT s.msg_id, s.step, s.bits FROM ({values}) v CROSS JOIN steps s ON s.msg_id = v.column1"
            f" WHERE s.step NOT IN {STATES}",
            [(msg_id,) for msg_id in targets],
        )
        found: dict[int, dict[str, BitMap]] = {msg_id: {} for msg_id in targets}
        for msg_id, event, bits in rows:
            shown = decode_bits(bits) & targets[msg_id]
            if shown:
                found[msg_id][event] = found[msg_id].get(event, BitMap()) | shown
        return found

    def _find_steps(self, app_id: int, msg_id: int) -> list[Step]:
        """In the order of their times. What is not folded yet is put into stretches here, as `fold` would."""
        rows = self._connection.execute(
            f"SELECT {STATE_COLUMNS}, m.created_at, m.done_at, m.sent_at, coalesce(m.node, 0) FROM messages m"
            " WHERE m.app = ?1 AND (m.msg_id = ?2 OR m.part_of = ?2)",
            (app_id, msg_id),
        ).fetchall()
        names = dict(self._connection.execute("SELECT id, name FROM nodes").fetchall()) | {0: ""}
        steps: list[Step] = []
        for row in rows:
            own = _single_steps(row) if isinstance(row[1], int) else []
            steps += [Step(row[0], step, names[node], at, 0.0, devnos) for step, node, at, devnos in own]
            steps += self._stored_steps(row, names)
        return sorted(steps, key=lambda step: (step.start, step.msg_id, step.step))

    def _stored_steps(self, row: Row, names: Mapping[int, str]) -> list[Step]:
        msg_id, targets, created_at = row[0], decode_bits(row[1]), row[6]
        found: dict[tuple[str, int, int, int], BitMap] = {}
        for step, node, start, width, bits in self._connection.execute(
            "SELECT step, node, start, width, bits FROM steps WHERE msg_id = ?", (msg_id,)
        ):
            found.setdefault((step, node, start, width), BitMap()).update(decode_bits(bits) & targets)
        unfolded = self._connection.execute(
            "SELECT at, sent_at, node, delivered, evicted, recalled, sent FROM settled WHERE msg_id = ? ORDER BY at",
            (msg_id,),
        ).fetchall()
        states = States(*map(decode_bits, row[1:6]))
        for at, sent_at, node, *columns in unfolded:
            for step, when, devnos in unfold(states, created_at, at, sent_at, decoded(columns)):
                found.setdefault((step, node, *when), BitMap()).update(devnos)
        return [
            Step(msg_id, step, names[node], float(start), float(width), devnos)
            for (step, node, start, width), devnos in found.items()
            if devnos
        ]

    def _list_events(self, app_id: int, after: int, limit: int) -> list[tuple[int, BehaviourEvent]]:
        rows = self._connection.execute(
            "SELECT id, devno, name, at, payload FROM events WHERE app = ? AND id > ? ORDER BY id LIMIT ?",
            (app_id, after, limit),
        ).fetchall()
        return [(row[0], BehaviourEvent(app_id, *row[1:])) for row in rows]

    def _list_retained(self, app_id: int) -> list[Retained]:
        rows = self._connection.execute(
            "SELECT app, topic, payload, qos, properties, expires_at, source FROM retained"
            " WHERE app = ? AND (expires_at IS NULL OR expires_at > ?) ORDER BY topic",
            (app_id, self._clock()),
        ).fetchall()
        return [Retained(*row) for row in rows]

    def _list_session_items(self, app_id: int) -> list[SessionItem]:
        rows = self._connection.execute(
            "SELECT app, session, kind, item, value FROM session_items WHERE app = ?"
            " ORDER BY session, kind, item",
            (app_id,),
        ).fetchall()
        return [SessionItem(*row) for row in rows]
