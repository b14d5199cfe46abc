"""/v1/callbacks: what waits to be told, and what was given up."""

from __future__ import annotations

from typing import Final

import orjson

from broker.api.call import Call, Endpoint
from broker.errors import REPORT, ApiError
from broker.model import CallbackEvent
from broker.store import Store
from broker.telling.callbacks import Callbacks, signing_secret

MAX_PARKED: Final = 1000  # in one answer
SCOPE: Final = "callback"


def callback_endpoints(callbacks: Callbacks, store: Store) -> list[Endpoint]:
    async def counts(call: Call) -> bytes:
        waiting, parked = await store.callbacks.counts(call.app.app_id)
        return orjson.dumps(
            {"waiting": waiting, "parked": parked, "signing_secret": signing_secret(call.app)}
        )

    async def list_parked(call: Call) -> bytes:
        after = _read_int("after", call.query("after"), 0, 0, 2**63 - 1)
        limit = _read_int("limit", call.query("limit"), 100, 1, MAX_PARKED)
        events = await store.callbacks.list_parked(call.app.app_id, after, limit)
        return orjson.dumps({"events": [_parked(event) for event in events]})

    async def retry(call: Call) -> bytes:
        return orjson.dumps({"retried": await callbacks.retry_parked(call.app)})

    async def drop(call: Call) -> bytes:
        return orjson.dumps({"dropped": await store.callbacks.drop_parked(call.app.app_id)})

    parked = "/v1/callbacks/parked"
    return [
        Endpoint("GET", ("/v1/callbacks",), REPORT, counts, scope=SCOPE),
        Endpoint("GET", (parked,), REPORT, list_parked, scope=SCOPE),
        Endpoint("POST", (f"{parked}/retry",), REPORT, retry, scope=SCOPE, audit="callback.retry"),
        Endpoint("DELETE", (parked,), REPORT, drop, scope=SCOPE, audit="callback.drop"),
    ]


def _parked(event: CallbackEvent) -> dict[str, object]:
    return {
        "event_id": str(event.event_id),
        "msg_id": str(event.msg_id),
        "event": event.event,
        "at": event.at,
        "devices": len(event.devnos),
        "url": event.callback.url,
        "attempts": event.attempts,
        "error": event.error,
    }


def _read_int(name: str, text: str | None, default: int, least: int, most: int) -> int:
    if text is None:
        return default
    if not (text.isascii() and text.isdigit()) or len(text) > 19 or not least <= int(text) <= most:
        raise ApiError(3004, f"{name}: must be an integer from {least} to {most}")
    return int(text)
