"""The audit log's table."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from broker.model import AuditEntry
from broker.sqlite.engine import write_rows
from broker.sqlite.threads import Handler


class AuditWrites:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.handlers: dict[str, Handler] = {"audit": self._record}

    def _record(self, calls: list[Sequence[AuditEntry]]) -> list[None]:
        write_rows(
            self._connection,
            "INSERT INTO audit (at, app, actor, address, action, subject, outcome) {values}",
            [
                (
                    entry.at,
                    entry.app_id,
                    entry.actor,
                    entry.address,
                    entry.action,
                    entry.subject,
                    entry.outcome,
                )
                for call in calls
                for entry in call
            ],
        )
        return [None] * len(calls)


class AuditReads:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.handlers: dict[str, Handler] = {
            "list_audit": lambda calls: [self._list(*call) for call in calls]
        }

    def _list(self, app_id: int | None, before: int, limit: int) -> list[tuple[int, AuditEntry]]:
        of_app = "" if app_id is None else "app = :app AND "
        rows = self._connection.execute(
            "SELECT id, at, app, actor, address, action, subject, outcome FROM audit"
            f" WHERE {of_app}id < :before ORDER BY id DESC LIMIT :limit",
            {"app": app_id, "before": before or 2**63 - 1, "limit": limit},
        )
        return [(row[0], AuditEntry(*row[1:])) for row in rows]
