"""Saved audiences: rules over tags, attributes, platforms and when a device was there; and estimates."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from clients.publishing.calls import Calls, quoted
from clients.publishing.pushes import Audience, Everyone, Platform

PATH: Final = "/v1/segments"
PAGE: Final = 1000  # segments in one answer

Rule = Mapping[str, Any]
"""`{"and": [...]}`, `{"or": [...]}`, `{"not": ...}`, `{"tag": ...}`, `{"alias": ...}`, `{"platform": ...}`,
`{"attribute": name, "op": ..., "value": ...}`, `{"last_active": ...}`, `{"registered": ...}`: see docs/api.md."""


class Segment(msgspec.Struct, frozen=True):
    """`id` is what an audience names."""

    id: str
    name: str
    rule: Rule


class Estimate(msgspec.Struct, frozen=True):
    """Devices that a push would be for now, and those of them that are connected."""

    registered: int
    online: int


class _Page(msgspec.Struct, frozen=True):
    segments: list[Segment]


class Segments:
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def create(self, name: str, rule: Rule) -> Segment:
        """Names need not be unique: a creation whose answer was lost is not tried again."""
        return await self._calls.post(PATH, {"name": name, "rule": rule}, Segment, safe=False)

    async def get(self, segment_id: str) -> Segment:
        return await self._calls.get(f"{PATH}/{quoted(segment_id)}", Segment)

    async def all(self) -> AsyncIterator[Segment]:
        """Page by page, in the order of their ids."""
        after: str | None = None
        while True:
            page = (await self._calls.get(PATH, _Page, after=after)).segments
            for segment in page:
                yield segment
            if len(page) < PAGE:
                return
            after = page[-1].id

    async def replace(self, segment_id: str, name: str, rule: Rule) -> Segment:
        """Pushes from here on mean the new rule."""
        return await self._calls.put(f"{PATH}/{quoted(segment_id)}", {"name": name, "rule": rule}, Segment)

    async def delete(self, segment_id: str) -> None:
        await self._calls.do("DELETE", f"{PATH}/{quoted(segment_id)}")

    async def estimate(self, segment_id: str) -> Estimate:
        return await self._calls.get(f"{PATH}/{quoted(segment_id)}/estimate", Estimate)

    async def estimate_rule(self, rule: Rule) -> Estimate:
        return await self._calls.post(f"{PATH}/estimate", {"rule": rule}, Estimate, safe=True)


async def estimate_audience(
    calls: Calls, audience: Audience | Mapping[str, Any] | Everyone, platform: Everyone | Sequence[Platform]
) -> Estimate:
    body = {"platform": platform, "audience": audience}
    return await calls.post("/v1/audience/estimate", body, Estimate, safe=True)
