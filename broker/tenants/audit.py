"""The audit log: administrative calls, with who made them from where, to what, and how it ended.

It has what changes who may do what, and what takes something away from others: apps, secrets, keys, access rules,
settings, groups, tokens, and the removal of tags, aliases and parked callbacks. It has no pushes: those have reports.
Failed calls of somebody who proved a secret are in it; those of strangers are not, for anybody could fill it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from broker.errors import ApiError
from broker.model import AuditEntry
from broker.store import Store, StoreError

log: Final = logging.getLogger(__name__)

Clock = Callable[[], float]
MAX_TEXT: Final = 500  # of one field: what callers send must not grow a row without bound
MAX_ENTRIES: Final = 1000  # in one answer


@dataclass(slots=True)
class Deed:
    """An administrative call that is under way; filled in as more is known."""

    app_id: int
    subject: str


def printable(text: str) -> str:
    """Names that callers choose are read on an operator's terminal, which obeys what is not printable."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in text)


class Audit:
    """Entries are written when the call is over. One that the store does not take is an error in the log: what was
    done is done."""

    def __init__(self, store: Store, clock: Clock = time.time) -> None:
        self._store = store
        self._clock = clock

    async def record(
        self, app_id: int, actor: str, address: str, action: str, subject: str, outcome: str = "done"
    ) -> None:
        texts = (printable(text[:MAX_TEXT]) for text in (actor, address, action, subject, outcome))
        try:
            await self._store.record_audit([AuditEntry(self._clock(), app_id, *texts)])
        except StoreError as error:
            log.error("not in the audit log: %s %s %s: %s", actor, action, subject, error)

    @asynccontextmanager
    async def deed(self, actor: str, address: str, action: str, subject: str) -> AsyncIterator[Deed]:
        """Records what happens inside, how ever it ends."""
        deed, outcome = Deed(0, subject), "failed"
        try:
            yield deed
            outcome = "done"
        except (ApiError, StoreError) as error:
            outcome = error.message if isinstance(error, ApiError) else str(error)
            raise
        finally:
            await self.record(deed.app_id, actor, address, action, deed.subject, outcome)

    async def entries(
        self, app_id: int | None, before: int = 0, limit: int = 100
    ) -> list[tuple[int, AuditEntry]]:
        """With their ids, those below `before` (0: all), newest first. None: of all apps. Lets StoreError pass."""
        return await self._store.list_audit(app_id, before, limit)


def describe_page(
    found: Sequence[tuple[int, AuditEntry]], limit: int, keys: Mapping[int, str] | None = None
) -> dict[str, object]:
    """`before` continues, 0: that was all. `keys`: of the apps, where there may be several."""
    entries = []
    for entry_id, entry in found:
        row: dict[str, object] = {"id": entry_id, "at": entry.at}
        if keys is not None:
            row["app_key"] = keys.get(entry.app_id)
        for name in ("actor", "address", "action", "subject", "outcome"):
            row[name] = getattr(entry, name)
        entries.append(row)
    return {"entries": entries, "before": found[-1][0] if len(found) == limit else 0}


def read_page(before: str | None, limit: str | None) -> tuple[int, int]:
    """The query of a listing. Raises ApiError."""
    return _read_int("before", before, 0, 0, 2**63 - 1), _read_int("limit", limit, 100, 1, MAX_ENTRIES)


def _read_int(name: str, text: str | None, default: int, least: int, most: int) -> int:
    if text is None:
        return default
    if not (text.isascii() and text.isdigit()) or len(text) > 19 or not least <= int(text) <= most:
        raise ApiError(1003, f"{name}: must be an integer from {least} to {most}")
    return int(text)
