"""/v1/segments and /v1/audience: saved segments, and how many devices they would reach."""

from __future__ import annotations

from typing import Final

import msgspec

from broker.api.call import BODY, DONE, Call, Endpoint
from broker.audiences.segments import Segments
from broker.errors import PUSH

_encode: Final = msgspec.json.Encoder().encode


def segment_endpoints(segments: Segments) -> list[Endpoint]:
    async def create(call: Call) -> bytes:
        return _encode(await segments.create(call.app, call.raw))

    async def list_segments(call: Call) -> bytes:
        return _encode({"segments": await segments.list(call.app, call.query("after") or "")})

    async def get(call: Call) -> bytes:
        return _encode(await segments.find(call.app, call.path("id")))

    async def replace(call: Call) -> bytes:
        return _encode(await segments.replace(call.app, call.path("id"), call.raw))

    async def delete(call: Call) -> bytes:
        await segments.delete(call.app, call.path("id"))
        return DONE

    async def estimate(call: Call) -> bytes:
        return _encode(await segments.estimate(call.app, call.path("id")))

    async def estimate_rule(call: Call) -> bytes:
        return _encode(await segments.estimate_rule(call.app, call.raw))

    async def estimate_audience(call: Call) -> bytes:
        return _encode(await segments.estimate_audience(call.app, call.raw))

    all_of_them, one = ("/v1/segments",), ("/v1/segments/{id}",)
    return [
        Endpoint("GET", all_of_them, PUSH, list_segments, scope="segment"),
        Endpoint("POST", all_of_them, PUSH, create, BODY, scope="segment"),
        Endpoint("POST", ("/v1/segments/estimate",), PUSH, estimate_rule, BODY, scope="segment"),
        Endpoint("GET", one, PUSH, get, scope="segment"),
        Endpoint("PUT", one, PUSH, replace, BODY, scope="segment"),
        Endpoint("DELETE", one, PUSH, delete, scope="segment"),
        Endpoint("GET", ("/v1/segments/{id}/estimate",), PUSH, estimate, scope="segment"),
        Endpoint("POST", ("/v1/audience/estimate",), PUSH, estimate_audience, BODY),
    ]
