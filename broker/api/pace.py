"""/v1/pushes/{msg_id}/pause, resume, stop: a slow push on its way."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from broker.api.call import Call, Endpoint
from broker.errors import PUSH, ApiError
from broker.later.pacer import Pacer, Progress
from broker.pushing.requests import parse_msg_id


def pace_endpoints(pacer: Pacer) -> list[Endpoint]:
    def endpoint(verb: str, act: Callable[[int, int], Awaitable[Progress]]) -> Endpoint:
        async def handle(call: Call) -> bytes:
            return msgspec.json.encode(await act(call.app.app_id, _msg_id(call)))

        return Endpoint("POST", (f"/v1/pushes/{{msg_id}}/{verb}",), PUSH, handle)

    return [
        endpoint("pause", pacer.pause),
        endpoint("resume", pacer.resume),
        endpoint("stop", pacer.stop),
    ]


def _msg_id(call: Call) -> int:
    text = call.path("msg_id")
    msg_id = parse_msg_id(text)
    if msg_id is None:
        raise ApiError(1003, "msg_id: must be a positive integer", http_status=404)
    return msg_id
