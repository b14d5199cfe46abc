"""What a device keeps across restarts of its process: who it is, which pushes it has handled, and what it learned of
the networks it was on.

An SQLite file (decision 0006). One process at a time may have it open; methods may be called from any thread.
"""

from __future__ import annotations

import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS credentials (
    only INTEGER PRIMARY KEY CHECK (only = 1),
    app_key TEXT NOT NULL, registration_id TEXT NOT NULL, token TEXT NOT NULL, expires_at REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS handled (n INTEGER PRIMARY KEY, msg_id INTEGER NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS networks (
    n INTEGER PRIMARY KEY, network TEXT NOT NULL UNIQUE, learned TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS kept (name TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT;
"""
NETWORKS_KEPT: Final = 32  # that it was on last; who travels meets a new one each day
TRIM_EVERY: Final = 256  # ids between deletions of the oldest


class JournalError(Exception):
    """The journal cannot be used; the message names the file and says why."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """`expires_at` in Unix seconds."""

    app_key: str
    registration_id: str
    token: str
    expires_at: float

    def __repr__(self) -> str:
        return f"Credentials({self.app_key}, {self.registration_id})"


class Journal:
    """Raises JournalError. `kept`: how many ids `seen` gives back at most."""

    def __init__(self, path: Path, kept: int) -> None:
        self._path = path
        self._kept = kept
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)  # it holds a token
            self._db = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
            self._open()
        except (OSError, sqlite3.Error) as error:
            raise self._explain(error) from error

    def _open(self) -> None:
        try:
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")  # one fsync for each commit
            self._db.executescript(SCHEMA)
            last = self._db.execute("SELECT max(n) FROM handled").fetchone()[0]
        except sqlite3.Error:
            self._db.close()
            raise
        self._last: int = last or 0

    def _explain(self, error: Exception) -> JournalError:
        why = "another process has it open" if "locked" in str(error) else str(error)
        return JournalError(f"journal {self._path}: {why}")

    def credentials(self) -> Credentials | None:
        row = self._db.execute(
            "SELECT app_key, registration_id, token, expires_at FROM credentials"
        ).fetchone()
        return None if row is None else Credentials(*row)

    def keep(self, credentials: Credentials) -> None:
        """Durable when it returns."""
        c = credentials
        self._execute(
            "INSERT OR REPLACE INTO credentials VALUES (1, ?, ?, ?, ?)",
            (c.app_key, c.registration_id, c.token, c.expires_at),
        )

    def seen(self) -> list[int]:
        """The newest handled msg_ids, oldest first."""
        rows = self._db.execute("SELECT msg_id FROM handled ORDER BY n DESC LIMIT ?", (self._kept,))
        return [msg_id for (msg_id,) in rows][::-1]

    def remember(self, msg_id: int) -> None:
        """Durable when it returns."""
        n = self._last + 1
        self._execute("INSERT INTO handled VALUES (?, ?)", (n, msg_id))
        self._last = n
        if n % TRIM_EVERY == 0:
            self._execute("DELETE FROM handled WHERE n <= ?", (n - self._kept,))

    def networks(self) -> dict[str, dict[str, Any]]:
        """What was learned of each network, that of the last one last."""
        rows = self._db.execute("SELECT network, learned FROM networks ORDER BY n")
        return {network: orjson.loads(learned) for network, learned in rows}

    def keep_network(self, network: str, learned: dict[str, Any]) -> None:
        """`learned` is small, and JSON. Durable when it returns."""
        text = orjson.dumps(learned).decode()
        self._execute(
            "INSERT OR REPLACE INTO networks (n, network, learned)"
            " SELECT coalesce(max(n), 0) + 1, ?, ? FROM networks",
            (network, text),
        )
        self._execute(
            "DELETE FROM networks WHERE n <= (SELECT n FROM networks ORDER BY n DESC LIMIT 1 OFFSET ?)",
            (NETWORKS_KEPT,),
        )

    def kept(self, name: str) -> bytes | None:
        row = self._db.execute("SELECT value FROM kept WHERE name = ?", (name,)).fetchone()
        return None if row is None else row[0]

    def keep_value(self, name: str, value: bytes) -> None:
        """Durable when it returns."""
        self._execute("INSERT OR REPLACE INTO kept VALUES (?, ?)", (name, value))

    def _execute(self, statement: str, parameters: tuple[object, ...]) -> None:
        try:
            with self._lock:
                self._db.execute(statement, parameters)
        except sqlite3.Error as error:
            raise self._explain(error) from error

    def close(self) -> None:
        """Waits for a write under way; a later one raises."""
        with self._lock:
            self._db.close()
