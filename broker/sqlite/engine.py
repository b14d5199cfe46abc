"""The SQLite engine under the store: schema, connections, the lock, and statements over many rows.

Every statement that touches many rows carries them as `VALUES (…),(…)` in a few fixed sizes. python's
sqlite3 drops and retakes the GIL at every step, and each retake may wait for a busy event loop; so the number
of steps decides the speed, not the number of rows (decision 0004). The sizes are powers of two, so that every
count of rows is a few statements that are already prepared.
"""

from __future__ import annotations

import fcntl
import functools
import itertools
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from broker.store import StoreError, StoreFull, StoreUnavailable

SCHEMA_VERSION: Final = 4
APPLICATION_ID: Final = 0x484F4C44  # "HOLD": tells our file from any other SQLite file
ROWS_PER_STATEMENT: Final = 512  # a prepared statement of this size takes about 150 KB
CACHED_STATEMENTS: Final = 256
BUSY_TIMEOUT: Final = 10.0

Row = tuple[Any, ...]

SESSION_ITEMS: Final = """
CREATE TABLE session_items (
    app INTEGER NOT NULL, session INTEGER NOT NULL, kind TEXT NOT NULL,
    item BLOB NOT NULL,  -- of BLOB affinity: 1 and '1' stay apart
    value BLOB NOT NULL, PRIMARY KEY (app, session, kind, item)) WITHOUT ROWID;
"""

PUSH_PRODUCT: Final = """
CREATE TABLE nodes (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);  -- 0: no node

CREATE TABLE steps (  -- who did what when, in stretches of time; chunk = devno >> 16
    msg_id INTEGER NOT NULL, step TEXT NOT NULL, node INTEGER NOT NULL, start INTEGER NOT NULL,
    width INTEGER NOT NULL, chunk INTEGER NOT NULL, bits BLOB NOT NULL,
    PRIMARY KEY (msg_id, step, node, start, width, chunk)) WITHOUT ROWID;

CREATE TABLE records (
    app INTEGER NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL, version INTEGER NOT NULL,
    due REAL, PRIMARY KEY (app, kind, key)) WITHOUT ROWID;
CREATE INDEX records_due ON records (kind, due) WHERE due IS NOT NULL;

CREATE TABLE files (
    app INTEGER NOT NULL, file TEXT NOT NULL, piece INTEGER NOT NULL, bytes BLOB NOT NULL,
    PRIMARY KEY (app, file, piece)) WITHOUT ROWID;

CREATE TABLE callback_events (
    id INTEGER PRIMARY KEY, app INTEGER NOT NULL, msg_id INTEGER NOT NULL, event TEXT NOT NULL, at REAL NOT NULL,
    bits BLOB NOT NULL, callback TEXT NOT NULL,
    due REAL,  -- NULL: parked
    attempts INTEGER NOT NULL DEFAULT 0, error TEXT NOT NULL DEFAULT '');
CREATE INDEX callback_events_due ON callback_events (due) WHERE due IS NOT NULL;
CREATE INDEX callback_events_by_app ON callback_events (app, id);
CREATE INDEX callback_events_parked ON callback_events (app, id) WHERE due IS NULL;

CREATE TABLE activity (  -- who was there in an hour or a day (width, seconds); chunk = devno >> 16
    app INTEGER NOT NULL, kind TEXT NOT NULL, width INTEGER NOT NULL, start INTEGER NOT NULL,
    chunk INTEGER NOT NULL, bits BLOB NOT NULL,
    PRIMARY KEY (app, kind, width, start, chunk)) WITHOUT ROWID;

CREATE TABLE audit (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, app INTEGER NOT NULL, actor TEXT NOT NULL,
    address TEXT NOT NULL, action TEXT NOT NULL, subject TEXT NOT NULL, outcome TEXT NOT NULL);
CREATE INDEX audit_by_app ON audit (app, id);
"""

MESSAGE_INDEXES: Final = """
CREATE INDEX messages_with_callback ON messages (app) WHERE callback IS NOT NULL;
CREATE INDEX messages_by_part ON messages (part_of) WHERE part_of IS NOT NULL;
CREATE INDEX messages_by_collapse ON messages (app, collapse, broadcast, msg_id)
    WHERE collapse IS NOT NULL AND body IS NOT NULL;
CREATE INDEX paced_by_collapse ON messages (app, collapse, expires_at) WHERE collapse IS NOT NULL AND paced;
"""

SCHEMA: Final = f"""
CREATE TABLE apps (
    app_id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used again, so that no cache can mix two apps up
    key TEXT NOT NULL UNIQUE, name TEXT NOT NULL, master_secret TEXT NOT NULL, device_key TEXT NOT NULL,
    signing_key BLOB NOT NULL, open INTEGER NOT NULL, created_at REAL NOT NULL,
    offline_limit INTEGER NOT NULL,
    deleted INTEGER NOT NULL DEFAULT 0,
    purged_to INTEGER NOT NULL DEFAULT 0,  -- of a deleted app: its messages up to this id are gone
    access TEXT NOT NULL DEFAULT '[]',  -- access rules, as JSON
    settings TEXT NOT NULL DEFAULT '{{}}');  -- AppSettings, as JSON
CREATE INDEX deleted_apps ON apps (app_id) WHERE deleted;

CREATE TABLE devices (
    app INTEGER NOT NULL, devno INTEGER NOT NULL, rid TEXT NOT NULL, platform TEXT NOT NULL, alias TEXT,
    tags TEXT NOT NULL, mobile TEXT, generation INTEGER NOT NULL, created_at REAL NOT NULL,
    last_online_at REAL, attributes TEXT NOT NULL DEFAULT '{{}}',  -- as JSON
    PRIMARY KEY (app, devno)) WITHOUT ROWID;
CREATE UNIQUE INDEX devices_by_rid ON devices (app, rid);
CREATE INDEX revoked_devices ON devices (app, devno, generation) WHERE generation > 0;

CREATE TABLE postings (  -- chunk = devno >> 16: one changed tag rewrites at most 8 KB
    app INTEGER NOT NULL, kind TEXT NOT NULL, value TEXT NOT NULL, chunk INTEGER NOT NULL, bits BLOB NOT NULL,
    PRIMARY KEY (app, kind, value, chunk)) WITHOUT ROWID;

CREATE TABLE messages (
    msg_id INTEGER PRIMARY KEY, app INTEGER NOT NULL, broadcast INTEGER NOT NULL,
    body BLOB,  -- NULL once nobody can be owed it, and nobody is to be told that it expired
    created_at REAL NOT NULL, expires_at REAL NOT NULL, sendno TEXT NOT NULL,
    target NOT NULL,  -- a devno (INTEGER), or a bitmap (BLOB); the same for the next two
    delivered, evicted,
    recalled, sent,  -- the same; sent has those that were sent it and have not acknowledged it
    suppressed BLOB, online INTEGER NOT NULL DEFAULT 0, high INTEGER NOT NULL DEFAULT 0,
    collapse TEXT, replaces INTEGER, part_of INTEGER,
    paced INTEGER NOT NULL DEFAULT 0,  -- a whole that is delivered in parts
    callback TEXT,  -- as JSON
    withdrawn_at REAL, replaced_by INTEGER,  -- as a whole: by its publisher, by the first that overrode it
    done_at REAL, sent_at REAL, node INTEGER);  -- of a single target: when it was delivered (evicted, recalled)
CREATE INDEX messages_by_expiry ON messages (expires_at) WHERE body IS NOT NULL;
CREATE INDEX live_broadcasts ON messages (app, msg_id) WHERE broadcast AND body IS NOT NULL;
{MESSAGE_INDEXES}
CREATE TABLE settled (  -- what bitmap messages got since they were folded last
    msg_id INTEGER NOT NULL, delivered BLOB, evicted BLOB, recalled BLOB, sent BLOB, at REAL NOT NULL DEFAULT 0,
    sent_at REAL NOT NULL DEFAULT 0, node INTEGER NOT NULL DEFAULT 0);
CREATE INDEX settled_by_message ON settled (msg_id);

CREATE TABLE inbox (  -- what waits for one device; without what came lately: see broker/sqlite/inbox.py
    app INTEGER NOT NULL, devno INTEGER NOT NULL, msg_id INTEGER NOT NULL,
    PRIMARY KEY (app, devno, msg_id)) WITHOUT ROWID;

CREATE TABLE cids (
    app INTEGER NOT NULL, cid TEXT NOT NULL, msg_id INTEGER NOT NULL, expires_at REAL NOT NULL,
    PRIMARY KEY (app, cid)) WITHOUT ROWID;
CREATE INDEX cids_by_expiry ON cids (expires_at);

CREATE TABLE events (
    id INTEGER PRIMARY KEY, app INTEGER NOT NULL, devno INTEGER NOT NULL, name TEXT NOT NULL,
    at REAL NOT NULL, payload BLOB NOT NULL);
CREATE INDEX events_by_app ON events (app);

CREATE TABLE retained (
    app INTEGER NOT NULL, topic TEXT NOT NULL, payload BLOB NOT NULL, qos INTEGER NOT NULL,
    properties BLOB NOT NULL, expires_at REAL, source TEXT NOT NULL DEFAULT '', PRIMARY KEY (app, topic));
CREATE INDEX retained_by_expiry ON retained (expires_at) WHERE expires_at IS NOT NULL;
{SESSION_ITEMS}
{PUSH_PRODUCT}
CREATE TABLE high_water (
    id INTEGER NOT NULL,  -- the greatest message or event id given out before the last purge
    epoch INTEGER NOT NULL,  -- the route epochs of this run are above it
    moved INTEGER NOT NULL);  -- later messages for one device may have no row in `inbox` yet
INSERT INTO high_water VALUES (0, 0, 0);
"""

# Ids were milliseconds << 22; they are milliseconds << 12, so that they stay below 2**53. Their order is kept.
RENUMBERED: Final = (
    "".join(
        f"UPDATE {table} SET {column} = ({column} >> 22 << 12) | ({column} & 4095);\n"
        for table, column in (
            ("messages", "msg_id"),
            ("inbox", "msg_id"),
            ("settled", "msg_id"),
            ("receipts", "msg_id"),
            ("cids", "msg_id"),
            ("events", "id"),
            ("high_water", "id"),
        )
    )
    + "UPDATE apps SET purged_to = 0;"
)

UPGRADES: Final = {  # from this version to the next
    1: f"""
{SESSION_ITEMS}
ALTER TABLE apps ADD COLUMN access TEXT NOT NULL DEFAULT '[]';
ALTER TABLE retained ADD COLUMN source TEXT NOT NULL DEFAULT '';
""",
    2: f"""
{RENUMBERED}
ALTER TABLE apps ADD COLUMN settings TEXT NOT NULL DEFAULT '{{}}';
ALTER TABLE devices ADD COLUMN attributes TEXT NOT NULL DEFAULT '{{}}';
ALTER TABLE messages ADD COLUMN recalled;
ALTER TABLE messages ADD COLUMN sent;
ALTER TABLE messages ADD COLUMN suppressed BLOB;
ALTER TABLE messages ADD COLUMN online INTEGER NOT NULL DEFAULT 0;
ALTER TABLE messages ADD COLUMN high INTEGER NOT NULL DEFAULT 0;
ALTER TABLE messages ADD COLUMN collapse TEXT;
ALTER TABLE messages ADD COLUMN replaces INTEGER;
ALTER TABLE messages ADD COLUMN part_of INTEGER;
ALTER TABLE messages ADD COLUMN paced INTEGER NOT NULL DEFAULT 0;
ALTER TABLE messages ADD COLUMN callback TEXT;
ALTER TABLE messages ADD COLUMN withdrawn_at REAL;
ALTER TABLE messages ADD COLUMN replaced_by INTEGER;
ALTER TABLE messages ADD COLUMN done_at REAL;
ALTER TABLE messages ADD COLUMN sent_at REAL;
ALTER TABLE messages ADD COLUMN node INTEGER;
{MESSAGE_INDEXES}
ALTER TABLE settled ADD COLUMN recalled BLOB;
ALTER TABLE settled ADD COLUMN sent BLOB;
ALTER TABLE settled ADD COLUMN at REAL NOT NULL DEFAULT 0;
ALTER TABLE settled ADD COLUMN sent_at REAL NOT NULL DEFAULT 0;
ALTER TABLE settled ADD COLUMN node INTEGER NOT NULL DEFAULT 0;
{PUSH_PRODUCT}
INSERT INTO steps (msg_id, step, node, start, width, chunk, bits)
    SELECT msg_id, event, 0, 0, 0, chunk, bits FROM receipts;
DROP TABLE receipts;
""",
    3: """
ALTER TABLE high_water ADD COLUMN moved INTEGER NOT NULL DEFAULT 0;
UPDATE high_water SET moved = coalesce((SELECT max(msg_id) FROM messages), 0);
""",
}


# `DELETE … WHERE (a, b) IN (VALUES …)` scans the table in some versions and uses part of the key in others.
# A row inserted into one of these views deletes exactly its own, by the whole key.
DELETED_KEYS: Final = {
    "inbox": ("app", "devno", "msg_id"),
    "devices": ("app", "devno"),
    "postings": ("app", "kind", "value", "chunk"),
    "cids": ("app", "cid"),
    "retained": ("app", "topic"),
    "session_items": ("app", "session", "kind", "item"),
    "messages": ("msg_id",),
    "settled": ("msg_id",),
    "steps": ("msg_id",),
    "events": ("id",),
    "records": ("app", "kind", "key"),
    "files": ("app", "file", "piece"),
    "callback_events": ("id",),
    "activity": ("app", "kind", "width", "start", "chunk"),
    "audit": ("id",),
}


# Opening


def lock_data_dir(directory: Path) -> int:
    """Take the directory for this process; the lock lives as long as the returned descriptor. Raises
    StoreUnavailable if another server has it or it cannot be written."""
    path = directory / "holdfast.lock"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreUnavailable(
            f"cannot write in the data directory {directory}: {error.strerror}; "
            "fix its permissions or choose another with --data-dir"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise StoreUnavailable(
            f"the data directory {directory} is in use by another server (process {owner}); "
            "stop it or choose another with --data-dir"
        ) from error
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
    except OSError as error:
        os.close(descriptor)
        raise StoreUnavailable(f"cannot write {path}: {error.strerror}") from error
    return descriptor


def connect(path: Path, *, cache_size: int) -> sqlite3.Connection:
    """A connection in autocommit mode. One thread at a time may use it."""
    connection = sqlite3.connect(
        path,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=CACHED_STATEMENTS,
        timeout=BUSY_TIMEOUT,
    )
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA cache_size = -{cache_size // 1024}")
    # Debian's default writes each freed page once more, as zeros: on a full disk nothing could be removed.
    connection.execute("PRAGMA secure_delete = FAST")
    connection.execute("PRAGMA wal_autocheckpoint = 0")  # the checkpointer does it, away from commits
    return connection


def open_database(path: Path, *, cache_size: int) -> sqlite3.Connection:
    """Open the writer's connection; create the schema in a new file."""
    try:
        connection = connect(path, cache_size=cache_size)
        try:
            _prepare(connection, path)
        except BaseException:
            connection.close()
            raise
    except sqlite3.Error as error:
        raise cannot_open(path, error) from error
    return connection


def cannot_open(path: Path, error: sqlite3.Error) -> StoreUnavailable:
    return StoreUnavailable(
        f"cannot open {path}: {error}; check that the disk is writable and has room. "
        "A damaged file can be saved with the sqlite3 tool's .recover"
    )


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if tables and application != APPLICATION_ID:
        raise StoreUnavailable(f"{path} is an SQLite file, but not one of Holdfast")
    if version > SCHEMA_VERSION:
        raise StoreUnavailable(
            f"{path} has schema version {version}, this server knows up to {SCHEMA_VERSION}; "
            "run the newer server that wrote it, or restore a backup"
        )
    if not tables:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # only possible before the first table
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA temp_store = MEMORY")
    if not tables:
        connection.executescript(
            f"BEGIN; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION};"
            f" PRAGMA application_id = {APPLICATION_ID}; COMMIT;"
        )
    else:
        for known in range(version, SCHEMA_VERSION):
            connection.executescript(f"BEGIN; {UPGRADES[known]} PRAGMA user_version = {known + 1}; COMMIT;")
    _create_deletion_views(connection)


def _create_deletion_views(connection: sqlite3.Connection) -> None:
    for table, key in DELETED_KEYS.items():
        columns = ", ".join(f"0 AS {column}" for column in key)
        same = " AND ".join(f"{column} = NEW.{column}" for column in key)
        connection.execute(f"CREATE TEMP VIEW delete_{table} AS SELECT {columns}")
        connection.execute(
            f"CREATE TEMP TRIGGER delete_from_{table} INSTEAD OF INSERT ON delete_{table}"
            f" BEGIN DELETE FROM {table} WHERE {same}; END"
        )


def as_store_error(error: Exception) -> StoreError:
    """What the caller is told about an engine's error."""
    if isinstance(error, StoreError):
        return error
    code = getattr(error, "sqlite_errorcode", None)
    if code == sqlite3.SQLITE_FULL:
        return StoreFull(f"no room for the data: {error}")
    if code is not None and code & 0xFF in UNAVAILABLE:
        return StoreUnavailable(f"the database cannot be used: {error}")
    return StoreError(f"{type(error).__name__}: {error}")


UNAVAILABLE: Final = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_READONLY,
    }
)


# Statements over many rows


@functools.lru_cache(maxsize=CACHED_STATEMENTS)
def _with_values(template: str, width: int, count: int) -> str:
    row = "(" + ",".join("?" * width) + ")"
    return template.replace("{values}", "VALUES " + ",".join([row] * count))


def _statements(
    template: str, rows: Sequence[Row], before: Row, after: Row
) -> Iterator[tuple[str, list[Any]]]:
    start, left = 0, len(rows)
    while left:
        count = min(ROWS_PER_STATEMENT, 1 << (left.bit_length() - 1))
        parameters = [*before, *itertools.chain.from_iterable(rows[start : start + count]), *after]
        yield _with_values(template, len(rows[start]), count), parameters
        start += count
        left -= count


def write_rows(connection: sqlite3.Connection, template: str, rows: Sequence[Row], after: Row = ()) -> int:
    """Run the template, its `{values}` standing for the rows, `after` for the parameters behind it; returns
    how many rows changed."""
    changed = 0
    for statement, parameters in _statements(template, rows, (), after):
        changed += connection.execute(statement, parameters).rowcount
    return changed


def read_rows(
    connection: sqlite3.Connection, template: str, rows: Sequence[Row], after: Row = (), *, before: Row = ()
) -> list[Row]:
    """The same for a query; `before` are the parameters in front of `{values}`."""
    found: list[Row] = []
    for statement, parameters in _statements(template, rows, before, after):
        found.extend(connection.execute(statement, parameters).fetchall())
    return found


def delete_rows(connection: sqlite3.Connection, table: str, keys: Sequence[Row]) -> None:
    """Delete by the key columns of DELETED_KEYS. The writer's connection only."""
    write_rows(connection, f"INSERT INTO delete_{table} {{values}}", keys)
