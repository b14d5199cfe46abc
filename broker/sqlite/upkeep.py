"""Removing what is over, in slices: each call is one short transaction between two groups of writes. No
table has an index for this that appends would pay for, beyond the two on expiry: ids carry their time, and
the inbox rows of an expired message follow from its own bitmaps."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Final

from broker.settlements import FLEETING
from broker.sqlite.activity import ActivityWrites
from broker.sqlite.callbacks import CallbackWrites
from broker.sqlite.engine import DELETED_KEYS, Row, delete_rows, read_rows, write_rows
from broker.sqlite.inbox import InboxWrites
from broker.sqlite.messages import Ids, first_id
from broker.sqlite.settling import STATE_COLUMNS, SettleWrites, merged
from broker.sqlite.threads import Handler

SLICE_ROWS: Final = 4_000  # of one transaction: about 20 ms
SLICE_MESSAGES: Final = 500  # expired messages looked at in one transaction; each may have many inbox rows
SLICE_BITS: Final = 1 << 20  # bytes of their target bitmaps; three more of each are read
SLICE_PIECES: Final = 64  # of files: 4 MB
SCAN_MESSAGES: Final = 20_000  # messages passed over in one transaction while looking for a deleted app's
FREE_PAGES: Final = 1_000  # kept for what comes next (4 MB)
VACUUM_PAGES: Final = 500  # given back in one transaction

APP_TABLES: Final = (  # whose rows a deleted app takes with it; its messages are found by scanning
    "inbox",
    "devices",
    "postings",
    "cids",
    "retained",
    "session_items",
    "events",
    "records",
    "callback_events",
    "activity",
)


class Upkeep:
    def __init__(
        self,
        connection: sqlite3.Connection,
        ids: Ids,
        inbox: InboxWrites,
        settling: SettleWrites,
        callbacks: CallbackWrites,
        activity: ActivityWrites,
        report_lifetime: float,
        event_lifetime: float,
        audit_lifetime: float,
    ) -> None:
        self._connection = connection
        self._ids = ids
        self._inbox = inbox
        self._settling = settling
        self._callbacks = callbacks
        self._report_lifetime = report_lifetime
        self._event_lifetime = event_lifetime
        self._audit_lifetime = audit_lifetime
        self._steps: tuple[Callable[[float], int], ...] = (
            self._expire_messages,
            self._drop_reports,
            self._drop_cids,
            self._drop_events,
            self._drop_retained,
            self._drop_audit,
            self._drop_apps,
            activity.expire,
            self._give_space_back,
        )
        self.handlers: dict[str, Handler] = {"expire": lambda calls: [self._expire(now) for now in calls]}

    def _expire(self, now: float) -> int:
        """The first step that finds something to do takes the whole slice."""
        return next((gone for step in self._steps if (gone := step(now))), 0)

    def _expire_messages(self, now: float) -> int:
        rows = read_rows(
            self._connection,
            f"SELECT {STATE_COLUMNS}, m.app, m.broadcast, m.expires_at, m.paced FROM ({{values}}) v"
            " CROSS JOIN messages m ON m.msg_id = v.column1",
            self._expired_ids(now),
        )
        bitmaps = merged(self._connection, rows)
        waiting: list[Row] = []
        done: list[Row] = []
        for row in rows:
            msg_id, (app, broadcast, expires_at, paced) = row[0], row[6:]
            expired = bitmaps[msg_id].waiting
            if paced:
                expired -= self._settling.released(msg_id)
            elif not broadcast:
                waiting.extend([(app, devno, msg_id) for devno in expired])
            if expired and self._callbacks.wanted:
                self._callbacks.note([(app, msg_id, "expired", expired, expires_at)])
            done.append((msg_id,))
            if len(waiting) >= SLICE_ROWS:
                break
        self._inbox.take(waiting)
        self._settling.fold([msg_id for (msg_id,) in done])
        write_rows(self._connection, "UPDATE messages SET body = NULL WHERE msg_id IN ({values})", done)
        return len(waiting) + len(done)

    def _expired_ids(self, now: float) -> list[Row]:
        """As many as have SLICE_BITS of bitmaps together, and one at least."""
        sizes = self._connection.execute(
            "SELECT msg_id, length(target) FROM messages"
            " WHERE body IS NOT NULL AND expires_at <= ?1 AND (expires_at > created_at OR expires_at <= ?1 - ?2)"
            " ORDER BY expires_at LIMIT ?3",
            (now, FLEETING, SLICE_MESSAGES),
        ).fetchall()
        total = 0
        ids: list[Row] = []
        for msg_id, size in sizes:
            if ids and total + size > SLICE_BITS:
                break
            total += size
            ids.append((msg_id,))
        return ids

    def _drop_reports(self, now: float) -> int:
        return self._drop_messages(
            "SELECT msg_id FROM messages WHERE msg_id < ? AND body IS NULL ORDER BY msg_id LIMIT ?",
            (first_id(now - self._report_lifetime), SLICE_ROWS),
        )

    def _drop_messages(self, query: str, parameters: Row) -> int:
        """Messages with all that is known of them."""
        rows = self._connection.execute(query, parameters).fetchall()
        if not rows:
            return 0
        for table in ("settled", "steps", "messages"):
            delete_rows(self._connection, table, rows)
        self._keep_high_water()
        return len(rows)

    def _keep_high_water(self) -> None:
        """Ids that were given out must not come again, even if the clock steps back and we restart."""
        self._connection.execute("UPDATE high_water SET id = ?", (self._ids.greatest,))

    def _drop(self, table: str, condition: str, parameters: Row, limit: int = SLICE_ROWS) -> int:
        """The first rows that fulfil the condition."""
        keys = self._connection.execute(
            f"SELECT {', '.join(DELETED_KEYS[table])} FROM {table} WHERE {condition} LIMIT ?",
            (*parameters, limit),
        ).fetchall()
        delete_rows(self._connection, table, keys)
        return len(keys)

    def _drop_cids(self, now: float) -> int:
        return self._drop("cids", "expires_at <= ? ORDER BY expires_at", (now,))

    def _drop_events(self, now: float) -> int:
        before = (first_id(now - self._event_lifetime),)
        gone = self._drop("events", "id < ? ORDER BY id", before)
        gone = gone or self._drop("callback_events", "id < ? ORDER BY id", before)
        if gone:
            self._keep_high_water()
        return gone

    def _drop_retained(self, now: float) -> int:
        return self._drop("retained", "expires_at <= ?", (now,))

    def _drop_audit(self, now: float) -> int:
        """Ids grow with time: only the oldest are looked at."""
        oldest = "at <= ? AND id < (SELECT min(id) FROM audit) + ?"
        return self._drop("audit", oldest, (now - self._audit_lifetime, SLICE_ROWS))

    # Deleted apps

    def _drop_apps(self, _now: float) -> int:
        app = self._connection.execute(
            "SELECT app_id, purged_to FROM apps WHERE deleted ORDER BY app_id LIMIT 1"
        ).fetchone()
        if app is None:
            return 0
        app_id, purged_to = app
        self._inbox.forget(app_id)
        return (
            self._drop_rows(app_id)
            or self._drop_scanned(app_id, purged_to)
            or self._connection.execute("DELETE FROM apps WHERE app_id = ?", (app_id,)).rowcount
        )

    def _drop_rows(self, app_id: int) -> int:
        gone = 0
        for table in APP_TABLES:
            gone += self._drop(table, "app = ?", (app_id,), SLICE_ROWS - gone)
        return gone or self._drop("files", "app = ?", (app_id,), SLICE_PIECES)

    def _drop_scanned(self, app_id: int, purged_to: int) -> int:
        """Its messages: they have no index by app, so all are passed over, a stretch at a time."""
        (last, scanned) = self._connection.execute(
            "SELECT max(msg_id), count(*) FROM"
            " (SELECT msg_id FROM messages WHERE msg_id > ? ORDER BY msg_id LIMIT ?)",
            (purged_to, SCAN_MESSAGES),
        ).fetchone()
        if last is None:
            return 0
        self._drop_messages(
            "SELECT msg_id FROM messages WHERE msg_id > ? AND msg_id <= ? AND app = ?",
            (purged_to, last, app_id),
        )
        self._connection.execute("UPDATE apps SET purged_to = ? WHERE app_id = ?", (last, app_id))
        return int(scanned)

    # Space

    def _give_space_back(self, _now: float) -> int:
        """Only when more is free than the file will soon use again."""
        (free,) = self._connection.execute("PRAGMA freelist_count").fetchone()
        (pages,) = self._connection.execute("PRAGMA page_count").fetchone()
        surplus = free - max(FREE_PAGES, pages // 10)
        if surplus <= 0:
            return 0
        count = min(surplus, VACUUM_PAGES)
        # execute() would take one step: one page. A script runs to the end, but outside our transaction,
        # which has nothing in it yet: every other step found nothing to do.
        self._connection.executescript(f"PRAGMA incremental_vacuum({count}); BEGIN")
        return int(count)
