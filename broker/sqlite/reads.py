"""The store's reads. Each takes the arguments of several calls that waited together and answers all of them,
in a few statements; they run on the reader threads, inside one read transaction."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence
from typing import Final

from pyroaring import BitMap

from broker.model import (
    App,
    BehaviourEvent,
    Device,
    MessageRecord,
    OwedRequest,
    Retained,
    SessionItem,
    StoredBroadcast,
    StoredMessage,
)
from broker.sqlite.engine import decode_bits, read_rows
from broker.sqlite.index import APP_COLUMNS, DEVICES_BY_RID, app_from_row, device_from_row
from broker.sqlite.messages import merged
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


class Reads:
    def __init__(self, connection: sqlite3.Connection, clock: Callable[[], float]) -> None:
        self._connection = connection
        self._clock = clock
        self.handlers: dict[str, Handler] = {
            "resolve": self._resolve,
            "find_devices": self._find_devices,
            "names": self._names,
            "fetch_owed": self._fetch_owed,
            "find_app": lambda calls: [self._find_app(key) for key in calls],
            "list_apps": lambda calls: [self._list_apps(*call) for call in calls],
            "list_terms": lambda calls: [self._list_terms(*call) for call in calls],
            "live_broadcasts": lambda calls: [self._live_broadcasts(app_id) for app_id in calls],
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
        owed = iter(self._owed_ids(requests))
        ids = [[next(owed)[: request.limit] for request in call] for call in calls]
        messages = self._bodies({msg_id for call in ids for found in call for msg_id in found})
        return [[[messages[msg_id] for msg_id in found] for found in call] for call in ids]

    def _owed_ids(self, requests: Sequence[OwedRequest]) -> list[list[int]]:
        rows = read_rows(
            self._connection,
            OWED,
            [(request.app_id, request.devno, request.after) for request in requests],
            # LIMIT cannot name a column: the largest for all, cut by the caller
            before=(self._clock(), max((request.limit for request in requests), default=0)),
        )
        return [ids for (text,) in rows for ids in json.loads(text)]

    def _bodies(self, msg_ids: set[int]) -> dict[int, StoredMessage]:
        rows = read_rows(
            self._connection,
            "SELECT msg_id, app, body, created_at, expires_at FROM messages WHERE msg_id IN ({values})",
            [(msg_id,) for msg_id in msg_ids],
        )
        return {row[0]: StoredMessage(*row) for row in rows}

    def _live_broadcasts(self, app_id: int) -> tuple[list[StoredBroadcast], list[int]]:
        """And the ids of those that owe nobody any more, to be folded."""
        rows = self._connection.execute(
            "SELECT msg_id, target, delivered, evicted, body, created_at, expires_at FROM messages"
            " WHERE app = ? AND broadcast AND body IS NOT NULL AND expires_at > ? ORDER BY msg_id",
            (app_id, self._clock()),
        ).fetchall()
        bitmaps = merged(self._connection, (row[:4] for row in rows))
        live: list[StoredBroadcast] = []
        finished: list[int] = []
        for msg_id, _, _, _, body, created_at, expires_at in rows:
            targets, delivered, evicted = bitmaps[msg_id]
            settled = delivered | evicted
            if targets <= settled:
                finished.append(msg_id)
            else:
                message = StoredMessage(msg_id, app_id, body, created_at, expires_at)
                live.append(StoredBroadcast(message, targets, settled))
        return live, finished

    def _find_messages(self, app_id: int, msg_ids: Sequence[int]) -> dict[int, MessageRecord]:
        rows = read_rows(
            self._connection,
            "SELECT m.msg_id, m.target, m.delivered, m.evicted, m.broadcast, m.created_at, m.expires_at"
            " FROM ({values}) v CROSS JOIN messages m ON m.msg_id = v.column1 WHERE m.app = ?",
            [(msg_id,) for msg_id in dict.fromkeys(msg_ids)],
            (app_id,),
        )
        bitmaps = merged(self._connection, (row[:4] for row in rows))
        receipts = self._receipts({msg_id: bitmap[0] for msg_id, bitmap in bitmaps.items()})
        return {
            msg_id: MessageRecord(
                msg_id, app_id, bool(broadcast), created_at, expires_at, *bitmaps[msg_id], receipts[msg_id]
            )
            for msg_id, _, _, _, broadcast, created_at, expires_at in rows
        }

    def _receipts(self, targets: dict[int, BitMap]) -> dict[int, dict[str, BitMap]]:
        rows = read_rows(
            self._connection,
            "SELECT r.msg_id, r.event, r.bits FROM ({values}) v"
            " CROSS JOIN receipts r ON r.msg_id = v.column1",
            [(msg_id,) for msg_id in targets],
        )
        found: dict[int, dict[str, BitMap]] = {msg_id: {} for msg_id in targets}
        for msg_id, event, bits in rows:
            shown = decode_bits(bits) & targets[msg_id]
            if shown:
                found[msg_id][event] = found[msg_id].get(event, BitMap()) | shown
        return found

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
