"""Saved segments, and how many devices a rule or an audience would reach: the registered, and those online now."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec
from pyroaring import BitMap

from broker.audiences.audience import resolve
from broker.audiences.segment_rules import KIND, StoredSegment, find_segment, read_rule, resolve_rules
from broker.errors import PUSH, ApiError
from broker.limits import Limits, limits_of
from broker.model import App, Record, RecordChange
from broker.pushing.requests import AudienceObject, decode, read_audience, read_platforms
from broker.store import Conflict, Store, TooMany

Clock = Callable[[], float]
TRIES: Final = 10  # to change a segment that others change meanwhile


class SegmentRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    rule: Any


class EstimateRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rule: Any


class AudienceRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    platform: str | list[str] | None = None
    audience: str | AudienceObject | None = None


class Segment(msgspec.Struct, frozen=True):
    id: str
    name: str
    rule: Any  # as JSON


class Estimate(msgspec.Struct, frozen=True):
    """Devices that a push would be for now."""

    registered: int
    online: int


_read_segment: Final = msgspec.json.Decoder(SegmentRequest).decode
_read_estimate: Final = msgspec.json.Decoder(EstimateRequest).decode
_read_question: Final = msgspec.json.Decoder(AudienceRequest).decode
_read_stored: Final = msgspec.json.Decoder(StoredSegment).decode
_encode: Final = msgspec.json.Encoder().encode


class Segments:
    """`raw` arguments are JSON bodies. Every method raises ApiError; store failures pass as StoreError."""

    def __init__(self, store: Store, limits: Limits | None = None, clock: Clock = time.time) -> None:
        self._store = store
        self._limits = limits or Limits()
        self._clock = clock

    async def create(self, app: App, raw: bytes) -> Segment:
        stored = self._check(app, raw)
        most = limits_of(self._limits, app).max_segments
        segment_id = secrets.token_hex(8)
        change = RecordChange(app.app_id, KIND, segment_id, _encode(stored), 0, at_most=most)
        try:
            await self._store.records.save([change])
        except TooMany:
            raise ApiError(1003, f"the app has {most} segments already; delete one") from None
        return Segment(segment_id, stored.name, stored.rule)

    async def list(self, app: App, after: str = "") -> list[Segment]:
        """With id > after, at most 1000."""
        return [_segment(record) for record in await self._store.records.list(app.app_id, KIND, after)]

    async def find(self, app: App, segment_id: str) -> Segment:
        found = await find_segment(self._store, app.app_id, segment_id)
        if found is None:
            raise _unknown(segment_id)
        return Segment(segment_id, found.name, found.rule)

    async def replace(self, app: App, segment_id: str, raw: bytes) -> Segment:
        stored = self._check(app, raw)
        await self._save(app, segment_id, _encode(stored))
        return Segment(segment_id, stored.name, stored.rule)

    async def delete(self, app: App, segment_id: str) -> None:
        await self._save(app, segment_id, None)

    async def estimate(self, app: App, segment_id: str) -> Estimate:
        return await self._estimate_rule(app, (await self.find(app, segment_id)).rule)

    async def estimate_rule(self, app: App, raw: bytes) -> Estimate:
        """`{"rule": …}`."""
        return await self._estimate_rule(app, decode(_read_estimate, raw, PUSH).rule)

    async def estimate_audience(self, app: App, raw: bytes) -> Estimate:
        """`{"platform": …, "audience": …}` as in a push."""
        request = decode(_read_question, raw, PUSH)
        platforms = read_platforms(request.platform)
        audience = read_audience(request.audience, platforms, limits_of(self._limits, app))
        (devnos,) = await resolve(self._store, app.app_id, [audience], self._clock())
        return await self._count(app, devnos)

    async def _estimate_rule(self, app: App, rule: Any) -> Estimate:
        read = read_rule(rule, limits_of(self._limits, app))
        (devnos,) = await resolve_rules(self._store, app.app_id, [read], self._clock())
        return await self._count(app, devnos)

    async def _count(self, app: App, devnos: BitMap) -> Estimate:
        return Estimate(len(devnos), len(await self._store.online(app.app_id, devnos)))

    async def _save(self, app: App, segment_id: str, value: bytes | None) -> None:
        """The last one wins."""
        for _ in range(TRIES):
            record = await self._store.records.find(app.app_id, KIND, segment_id)
            if record is None:
                raise _unknown(segment_id)
            try:
                change = RecordChange(app.app_id, KIND, segment_id, value, record.version)
                await self._store.records.save([change])
                return
            except Conflict:
                continue
        raise ApiError(1030, "others change this segment all the time; try again")

    def _check(self, app: App, raw: bytes) -> StoredSegment:
        request, limits = decode(_read_segment, raw, PUSH), limits_of(self._limits, app)
        if not 0 < len(request.name.encode()) <= limits.segment_name_size or not request.name.isprintable():
            raise ApiError(1003, f"name: must be 1 to {limits.segment_name_size} bytes of printable text")
        read_rule(request.rule, limits)
        return StoredSegment(request.name, request.rule)


def _segment(record: Record) -> Segment:
    stored = _read_stored(record.value)
    return Segment(record.key, stored.name, stored.rule)


def _unknown(segment_id: str) -> ApiError:
    return ApiError(1003, f"there is no segment {segment_id:.64}", http_status=404)
